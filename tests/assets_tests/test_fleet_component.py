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
from pydantic import BaseModel, ValidationError

from assets.fleet import EXAMPLE, EXAMPLE_SQL, Fleet
from pipeline.errors import SpecError
from pipeline.spec import FleetSpec

DEFS = Path("pipeline/defs")


def load(folder: Path, attributes: dict[str, Any]) -> Fleet:
    context = ComponentTree.for_test().load_context
    model = Fleet.get_model_cls().model_validate(attributes)
    return Fleet.load(model, Mock(path=folder, resolution_context=context.resolution_context))


def shipped(name: str) -> Fleet:
    return load(DEFS / name, yaml.safe_load((DEFS / name / "defs.yaml").read_text())["attributes"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "features.sql").write_text(EXAMPLE_SQL)
    return tmp_path


def keys_and_dependencies(fleet: Fleet) -> dict[str, set[str]]:
    definitions = fleet.build_defs(ComponentTree.for_test().load_context)
    specs = [spec for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition) for spec in asset.specs]
    return {spec.key.to_user_string(): {dep.asset_key.to_user_string() for dep in spec.deps} for spec in specs}


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
    sources = {"flights/flights", "flights/weather", "flights/planes", "flights/airports", "flights/airlines"}
    assert chain["flights/features"] == sources
    assert set(chain) == sources | {f"flights/{link}" for link in ("features", "models", "importance", "meta_model", "champion", "predictions")}


def test_every_link_belongs_to_the_fleets_group_and_has_a_description_and_checks() -> None:
    definitions = shipped("housing").build_defs(ComponentTree.for_test().load_context)
    specs = [spec for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition) for spec in asset.specs]
    assert {spec.group_name for spec in specs} == {"housing"}
    assert all(spec.description and spec.kinds for spec in specs)
    checked = {key.asset_key for asset in [*(definitions.assets or ()), *(definitions.asset_checks or ())] for key in asset.check_keys}  # type: ignore[union-attr]
    assert checked == {spec.key for spec in specs}


def test_an_unknown_field_is_refused_with_what_is_allowed(folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"horizont: unknown field; did you mean 'horizon'\? Allowed: as_of"):
        load(folder, {"name": "demand", **EXAMPLE, "horizont": "1 month"})


def test_a_column_that_the_sql_does_not_give_is_refused_with_what_it_gives(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"entity: .*features\.sql gives no column 'shop'; it gives: city, price, sold_in"):
        load(folder, {"name": "demand", **EXAMPLE, "entity": ["shop"]})


def test_a_missing_sql_file_is_refused_with_the_files_there_are(tmp_path: Path) -> None:
    (tmp_path / "query.sql").write_text(EXAMPLE_SQL)
    with pytest.raises(SpecError, match=r"features\.sql names 'features\.sql', which is not in .*; there is: query\.sql"):
        load(tmp_path, {"name": "demand", **EXAMPLE})


def test_a_lag_shorter_than_the_horizon_is_refused(folder: Path) -> None:
    with pytest.raises(ValidationError, match="would leak the future"):
        load(folder, {"name": "demand", **EXAMPLE, "horizon": "2 months"})


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
    request = Mock(target_path=target, type_name="assets.fleet.Fleet", scaffold_format="yaml", project_root=tmp_path, append=False)
    FleetScaffolder().scaffold(request)
    written = yaml.safe_load((target / "defs.yaml").read_text())
    assert written["type"] == "assets.fleet.Fleet"
    assert load(target, written["attributes"]).spec.name == "my_demand"


def test_import_directions_hold() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout
