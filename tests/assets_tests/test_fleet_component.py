"""The component: what a defs.yaml becomes, and what is refused before anything runs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dagster as dg
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTree
from pydantic import BaseModel

from assets.broken_fleet import BrokenFleet, broken_fleets
from assets.fleet import EXAMPLE, EXAMPLE_SQL, DescribedFleet, Fleet
from assets.fleets import load_fleets
from pipeline.spec import FleetSpec

DEFS = Path("pipeline/defs")


def load(folder: Path, attributes: dict[str, Any]) -> Fleet:
    context = ComponentTree.for_test().load_context
    model = Fleet.get_model_cls().model_validate(attributes)
    return Fleet.load(model, Mock(path=folder, resolution_context=context.resolution_context))


def mistake(folder: Path, attributes: dict[str, Any]) -> str:
    described = load(folder, attributes).described
    assert isinstance(described, BrokenFleet)
    return described.message


def shipped(name: str) -> Fleet:
    return load(DEFS / name, yaml.safe_load((DEFS / name / "defs.yaml").read_text())["attributes"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "features.sql").write_text(EXAMPLE_SQL)
    return tmp_path


def name_of(fleet: Fleet) -> str:
    assert isinstance(fleet.described, DescribedFleet)
    return fleet.described.spec.name


def keys_and_dependencies(fleet: Fleet) -> dict[str, set[str]]:
    definitions = fleet.build_defs(ComponentTree.for_test().load_context)
    specs = [
        spec
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition)
        for spec in asset.specs
    ]
    return {
        spec.key.to_user_string(): {dep.asset_key.to_user_string() for dep in spec.deps}
        for spec in specs
    }


def test_housing_is_this_chain() -> None:
    assert keys_and_dependencies(shipped("housing")) == {
        "housing/txhousing": set(),
        "housing/features": {"housing/txhousing"},
        "housing/models": {"housing/features"},
        "housing/importance": {"housing/models"},
        "housing/meta_model": {"housing/models"},
        "housing/champion": {"housing/meta_model"},
        "housing/predictions": {"housing/features", "housing/champion"},
    }


def test_flights_has_five_sources_and_the_same_chain() -> None:
    chain = keys_and_dependencies(shipped("flights"))
    sources = {
        "flights/flights",
        "flights/weather",
        "flights/planes",
        "flights/airports",
        "flights/airlines",
    }
    assert chain["flights/features"] == sources
    assert set(chain) == sources | {
        f"flights/{link}"
        for link in ("features", "models", "importance", "meta_model", "champion", "predictions")
    }


def test_every_link_belongs_to_the_fleets_group_and_has_a_description_and_checks() -> None:
    definitions = shipped("housing").build_defs(ComponentTree.for_test().load_context)
    specs = [
        spec
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition)
        for spec in asset.specs
    ]
    assert {spec.group_name for spec in specs} == {"housing"}
    assert all(spec.description and spec.kinds for spec in specs)
    checked = {
        key.asset_key
        for asset in [*(definitions.assets or ()), *(definitions.asset_checks or ())]
        for key in asset.check_keys
    }  # type: ignore[union-attr]
    assert checked == {spec.key for spec in specs}


def test_an_unknown_field_is_refused_with_what_is_allowed(folder: Path) -> None:
    message = mistake(folder, {"name": "demand", **EXAMPLE, "horizont": "1 month"})
    assert "horizont: unknown field; did you mean 'horizon'? Available: as_of" in message


def test_a_column_that_the_sql_does_not_give_is_refused_with_what_it_gives(folder: Path) -> None:
    message = mistake(folder, {"name": "demand", **EXAMPLE, "entity": ["shop"]})
    assert "defs.yaml: entity: " in message
    assert "features.sql gives no column 'shop'; it gives: city, price, sold_in" in message


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"score": "0 25 * * *"},
            "automation.score: '0 25 * * *' is not a cron text; expected minute, hour",
        ),
        ({"retrain": "daily at six"}, "automation.retrain: 'daily at six' is not a cron text"),
        ({"timezone": "Europe/Bonn"}, "'Europe/Bonn' is not a time zone"),
        ({"scores": "0 6 * * *"}, "did you mean 'score'?"),
    ],
)
def test_automation_that_nothing_could_launch_is_refused(
    folder: Path, told: dict[str, Any], message: str
) -> None:
    assert message in mistake(folder, {"name": "demand", **EXAMPLE, "automation": told})


def test_a_missing_sql_file_is_refused_with_its_path_and_the_files_available(
    tmp_path: Path,
) -> None:
    (tmp_path / "query.sql").write_text(EXAMPLE_SQL)
    message = mistake(tmp_path, {"name": "demand", **EXAMPLE})
    assert (
        f"features.sql: '{tmp_path}/features.sql' does not exist; available: query.sql" in message
    )


def test_a_lag_shorter_than_the_horizon_is_refused(folder: Path) -> None:
    message = mistake(folder, {"name": "demand", **EXAMPLE, "horizon": "2 months"})
    assert "would leak the future" in message


def test_a_component_without_attributes_is_broken(folder: Path) -> None:
    context = ComponentTree.for_test().load_context
    described = Fleet.load(
        None, Mock(path=folder, resolution_context=context.resolution_context)
    ).described
    assert isinstance(described, BrokenFleet)
    assert "has no attributes" in described.message


def test_dagster_documents_the_fields_of_a_fleet_and_refuses_none_itself() -> None:
    from dagster_shared.yaml_utils.sample_yaml import generate_sample_yaml
    from jsonschema import Draft202012Validator

    schema = Fleet.get_model_cls().model_json_schema()
    assert set(schema["properties"]) == set(FleetSpec.model_fields)
    assert schema["properties"]["horizon"]["description"].startswith("How long before its time")
    assert "horizon: " in generate_sample_yaml("assets.fleet.Fleet", schema)
    assert [*Draft202012Validator(schema).iter_errors({"target": "trips", "perod": 1})] == []


GOOD = yaml.safe_dump(
    {"type": "assets.fleet.Fleet", "attributes": {"name": "good", **EXAMPLE}}, sort_keys=False
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with the fleet `good`; imported as `pipeline.defs` while the test lasts."""
    defs = tmp_path / "pipeline" / "defs"
    (defs / "good").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "pipeline"\n'
    )
    (defs / "__init__.py").write_text("")
    (defs / "good" / "defs.yaml").write_text(GOOD)
    (defs / "good" / "features.sql").write_text(EXAMPLE_SQL)
    import pipeline.defs

    monkeypatch.setattr(pipeline.defs, "__file__", str(defs / "__init__.py"))
    monkeypatch.setattr(pipeline.defs, "__path__", [str(defs)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("pipeline.defs.")]:
        del sys.modules[name]


def add_fleet(project: Path, name: str, text: str) -> None:
    folder = project / "pipeline" / "defs" / name
    folder.mkdir()
    (folder / "defs.yaml").write_text(text)
    (folder / "features.sql").write_text(EXAMPLE_SQL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("name: good", "name: other").replace("horizon: 1 month", "horizont: 1 month"), "horizont: unknown field"),
        (GOOD.replace("name: good", "name: 9lives"), "line 3: name: '9lives' is not a usable name"),
        (GOOD, "name: 'good' is the name of the fleet in good/ too"),
        ("type: assets.fleet.Fleet\nattributes:\n  name: [\n", "line 4: not YAML"),
        ("type: assets.fleet.Flet\nattributes: {name: other}\n", "no attribute `Flet`"),
        ("type: assets.fleet.Fleet\nattribute: {name: other}\n", "line 2: attribute: unknown field"),
        ("type: assets.fleet.Fleet\nattributes: {name: other, target: price}\n", "line 2: target: expected a mapping such as {column: price}"),
    ],
)  # fmt: skip
def test_a_broken_fleet_stops_no_other_and_says_what_is_wrong(
    project: Path, text: str, expected: str
) -> None:
    add_fleet(project, "other", text)
    definitions = load_fleets(project)
    (name,) = broken_fleets(definitions)
    message = broken_fleets(definitions)[name]
    assert name == "other"
    assert message.startswith("pipeline/defs/other/defs.yaml")
    assert expected in message
    groups = {
        spec.group_name
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition)
        for spec in asset.specs
    }
    assert groups == {"good", "other"}


def test_a_broken_fleet_fails_with_its_message_when_it_is_launched() -> None:
    definitions = BrokenFleet("other", "line 7: target: expected a mapping").build_defs()
    result = dg.materialize(list(definitions.assets or ()), raise_on_error=False)  # type: ignore[arg-type]
    (failure,) = (event.step_failure_data for event in result.all_events if event.is_step_failure)
    assert failure.user_failure_data is not None
    assert failure.user_failure_data.description == "line 7: target: expected a mapping"


def test_what_no_folder_is_to_blame_for_is_raised(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pyproject.toml").write_text("[tool.dg]\n")
    with pytest.raises(Exception, match=r"defs_module or root_module must be set"):
        load_fleets(project)


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    for name, field in model.model_fields.items():
        yield f"{model.__name__}.{name}", field.description
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields(part)


def test_every_field_is_described() -> None:
    described = dict(fields(FleetSpec))
    assert len(described) > 50
    assert [name for name, description in described.items() if not description] == []


def test_a_scaffolded_fleet_loads_as_it_is(tmp_path: Path) -> None:
    from assets.fleet import FleetScaffolder

    target = tmp_path / "my-demand"
    request = Mock(
        target_path=target,
        type_name="assets.fleet.Fleet",
        scaffold_format="yaml",
        project_root=tmp_path,
        append=False,
    )
    FleetScaffolder().scaffold(request)
    written = yaml.safe_load((target / "defs.yaml").read_text())
    assert written["type"] == "assets.fleet.Fleet"
    assert name_of(load(target, written["attributes"])) == "my_demand"


def test_import_directions_hold() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout
