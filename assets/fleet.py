"""The component `assets.fleet.Fleet`: one YAML file becomes one asset chain."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster.components.core.context import ComponentLoadContext
from pydantic import BaseModel, RootModel

from assets.automation import automation, check_automation
from assets.broken_fleet import BrokenFleet, fleet_name, name_taken_by, shown_path
from assets.champion import champion_asset
from assets.features import features_asset
from assets.importance import importance_asset
from assets.meta_model import meta_model_asset
from assets.models import models_asset, models_checks
from assets.predictions import predictions_asset
from assets.raw import raw_asset
from assets.settings import FleetFiles
from pipeline.errors import SpecError
from pipeline.features.sql import check_features
from pipeline.spec import FleetSpec, parse_spec
from pipeline.spec_mistakes import LineOf, Mistake, describe

# Runs as it is, on data that a package of the `demo` extra carries, so that a new fleet starts from
# something that works.
EXAMPLE: dict[str, Any] = {
    "sources": [{"name": "sales", "uri": "package://plotnine/data/txhousing.csv"}],
    "features": {
        "lags": [{"column": "price", "periods": [1, 12]}],
        "rolling": [{"column": "price", "window": "12 months"}],
        "derived": {
            "level": "ln(price_mean_12_months)",
            "change": "ln(price_lag_1) - level",
            "year_ago": "ln(price_lag_12) - level",
        },
        "exclude": ["price_lag_1", "price_lag_12", "price_mean_12_months", "level"],
        "calendar": ["month"],
        "categoricals": ["city"],
    },
    "grains": [[], ["city"]],
    "entity": ["city"],
    "time": "sold_in",
    "period": "1 month",
    "horizon": "1 month",
    "target": {"column": "price", "transform": "log", "offset": "level"},
    "splits": {"report": "12 months", "tune": "12 months"},
    "tuning": {"tune_rows": 6},
    "baselines": {"last value": "price_lag_1"},
    "scoring": {"score": "future"},
}
EXAMPLE_SQL = """-- One row per city and month; the names in defs.yaml are those of this SELECT.
SELECT city, make_date(year, month, 1) AS sold_in, median AS price
FROM sales
"""


class FleetScaffolder(dg.Scaffolder[Any]):
    """Writes a filled-in defs.yaml and features.sql to start from."""

    def scaffold(self, request: dg.ScaffoldRequest[Any]) -> None:
        """Write both files into the new folder."""
        folder = Path(request.target_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "features.sql").write_text(EXAMPLE_SQL, encoding="utf-8")
        name = "".join(character if character.isalnum() else "_" for character in folder.name)
        dg.scaffold_component(request, {"name": name, **EXAMPLE})


class FleetAttributes(RootModel[Any]):
    """What stands under `attributes:`, not looked at yet.

    Dagster validates attributes before it hands them to a component, and a mistake that it finds
    there stops every fleet. FleetSpec is therefore validated by the component itself.
    """

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """FleetSpec's fields, for Dagster's documentation, in a schema that refuses nothing.

        `dg check` would quote 20 lines of the file for every mistake, in the words of JSON schema,
        and only for one of several fleets; it prints the component's message instead.
        """
        schema = FleetSpec.model_json_schema(*arguments, **options)
        properties = {name: _documented(field) for name, field in schema["properties"].items()}
        return {"type": "object", "properties": properties, "$defs": schema.get("$defs", {})}


def _documented(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field, which takes any other value as well."""
    words: dict[str, Any] = {
        name: field[name] for name in ("title", "description", "default") if name in field
    }
    return {**words, "anyOf": [field, {}]}


@dataclass(frozen=True)
class DescribedFleet:
    """A fleet whose description holds.

    Args:
        spec: what its defs.yaml says.
        files: it is written in.
    """

    spec: FleetSpec
    files: FleetFiles

    def build_defs(self) -> dg.Definitions:
        """The asset chain."""
        spec = self.spec
        chain: Sequence[dg.AssetsDefinition] = [
            *(raw_asset(spec, source, self.files) for source in spec.sources),
            features_asset(spec, self.files),
            models_asset(spec),
            importance_asset(spec),
            meta_model_asset(spec),
            champion_asset(spec),
            predictions_asset(spec),
        ]
        assets = dg.Definitions(assets=chain, asset_checks=[models_checks(spec)])
        return dg.Definitions.merge(assets, automation(spec, self.files))


@dg.scaffold_with(FleetScaffolder)
class Fleet(dg.Component):
    """One prediction problem over many groups, from raw data to scored tables.

    The attributes are those of FleetSpec. The SQL file they name stands in the same folder.
    """

    def __init__(self, described: DescribedFleet | BrokenFleet) -> None:
        self.described = described

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """The schema of the attributes."""
        return FleetAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: ComponentLoadContext) -> Self:
        """Build and check the spec; a mistake breaks this fleet and no other."""
        folder = Path(context.path)
        written = attributes.root if isinstance(attributes, FleetAttributes) else {}
        resolution = context.resolution_context.at_path("attributes")
        try:
            given = resolution.resolve_value(written)
            return cls(_described(given, folder, _lines(resolution.source_position_tree)))
        except (SpecError, dg.DagsterError) as error:
            return cls(BrokenFleet(fleet_name(folder, written), str(error)))

    def build_defs(self, context: ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        """The fleet's asset chain, or the one asset that says what is wrong."""
        return self.described.build_defs()


def _described(attributes: Any, folder: Path, line_of: LineOf) -> DescribedFleet:
    """The fleet of a folder.

    Raises:
        SpecError: naming file, line and field of each mistake.
    """
    file = f"{shown_path(folder)}/defs.yaml"
    if not attributes:
        raise SpecError(
            f"{file} has no attributes; `dg scaffold defs assets.fleet.Fleet NAME` writes an "
            "example in another folder"
        )
    spec = parse_spec(attributes, file=file, line_of=line_of)
    owner = name_taken_by(folder, spec.name)
    if owner is not None:
        taken = Mistake(("name",), f"name: {spec.name!r} is the name of the fleet in {owner}/ too")
        raise SpecError(f"{describe(file, [taken], line_of)}; give each fleet a name of its own")
    if wrong := list(check_automation(spec)):
        raise SpecError(describe(file, wrong, line_of))
    sql_file = folder / spec.features.sql
    if not sql_file.is_file():
        missing = Mistake(
            ("features", "sql"),
            f"features.sql: {str(sql_file)!r} does not exist; available: {_names(folder)}",
        )
        raise SpecError(describe(file, [missing], line_of))
    sql = sql_file.read_text(encoding="utf-8")
    try:
        check_features(spec, sql, file=f"{shown_path(folder)}/{spec.features.sql}")
    except SpecError as error:
        mistake = Mistake.from_message(str(error))
        if not mistake.path:  # it is about the SQL file, which it names
            raise
        raise SpecError(describe(file, [mistake], line_of)) from None
    return DescribedFleet(spec, FleetFiles(folder, sql))


def _lines(positions: Any) -> LineOf:
    """The line of each field, from the positions that Dagster keeps of a file."""

    def line_of(path: Sequence[str | int]) -> int | None:
        if positions is None:
            return None
        found, _ = positions.lookup_closest_and_path(["attributes", *path], None)
        return int(found.start.line)

    return line_of


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
