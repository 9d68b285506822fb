"""The component `assets.fleet.Fleet`: one YAML file becomes one asset chain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster.components.core.context import ComponentLoadContext
from pydantic import BaseModel

from assets.champion import champion_asset
from assets.features import features_asset
from assets.importance import importance_asset
from assets.link import FleetFiles
from assets.meta_model import meta_model_asset
from assets.models import models_asset, models_checks
from assets.predictions import predictions_asset
from assets.raw import raw_asset
from pipeline.errors import SpecError
from pipeline.features.sql import check_features
from pipeline.spec import FleetSpec, parse_spec

# Runs as it is, on data that a package of the `demo` extra carries, so that a new fleet starts from something that works.
EXAMPLE: dict[str, Any] = {
    "sources": [{"name": "sales", "uri": "package://plotnine/data/txhousing.csv"}],
    "features": {
        "lags": [{"column": "price", "periods": [1, 12]}],
        "rolling": [{"column": "price", "window": "12 months"}],
        "derived": {"level": "ln(price_mean_12_months)", "change": "ln(price_lag_1) - level", "year_ago": "ln(price_lag_12) - level"},
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


@dg.scaffold_with(FleetScaffolder)
class Fleet(dg.Component):
    """One prediction problem over many groups, from raw data to scored tables.

    The attributes are those of FleetSpec. The SQL file they name stands in the same folder.
    """

    def __init__(self, spec: FleetSpec, files: FleetFiles) -> None:
        self.spec = spec
        self.files = files

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """The schema of the attributes."""
        return FleetSpec

    @classmethod
    def load(cls, attributes: BaseModel | None, context: ComponentLoadContext) -> Self:
        """Build and check the spec; a mistake stops the code location before any work."""
        folder = Path(context.path)
        file = f"{folder.name}/defs.yaml"
        if attributes is None:
            raise SpecError(f"{file} has no attributes; `dg scaffold defs assets.fleet.Fleet NAME` writes an example")
        given = context.resolution_context.at_path("attributes").resolve_value(attributes.model_dump(exclude_unset=True))
        spec = parse_spec(given, file=file)
        sql_file = folder / spec.features.sql
        if not sql_file.is_file():
            raise SpecError(f"{file}: features.sql names {spec.features.sql!r}, which is not in {folder.name}/; there is: {_names(folder)}")
        sql = sql_file.read_text(encoding="utf-8")
        check_features(spec, sql, file=f"{folder.name}/{spec.features.sql}")
        return cls(spec, FleetFiles(folder, sql))

    def build_defs(self, context: ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        """The fleet's asset chain."""
        chain: Sequence[dg.AssetsDefinition] = [
            *(raw_asset(self.spec, source, self.files) for source in self.spec.sources),
            features_asset(self.spec, self.files),
            models_asset(self.spec),
            importance_asset(self.spec),
            meta_model_asset(self.spec),
            champion_asset(self.spec),
            predictions_asset(self.spec),
        ]
        return dg.Definitions(assets=chain, asset_checks=[models_checks(self.spec)])


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
