"""One small real fleet through real Spark, Delta and MLflow, materialised once for all tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
import yaml
from dagster.components.core.component_tree import ComponentTree

from assets.fleet import Fleet
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

HOUSING = Path("pipeline/defs/housing")
CITIES = ("Abilene", "Amarillo", "Austin", "Dallas", "Houston", "Midland")
SQL = f"""
SELECT city, make_date(year, month, 1) AS month_start, median, inventory FROM txhousing WHERE city IN {CITIES}
"""


@dataclass(frozen=True)
class Chain:
    """A fleet that was materialised once, and where it left things."""

    definitions: dg.Definitions
    resources: Mapping[str, Any]
    root: Path
    result: dg.ExecuteInProcessResult

    def table(self, *parts: str) -> pd.DataFrame:
        return self.resources["tables"].read_pandas(self.resources["tables"].location(*parts))

    def run_again(self, **launch: Any) -> dg.ExecuteInProcessResult:
        return run_chain(self.definitions, {**self.resources, "launch": LaunchSettings(**launch)})


def run_chain(
    definitions: dg.Definitions, resources: Mapping[str, Any]
) -> dg.ExecuteInProcessResult:
    assets = [*definitions.assets, *definitions.asset_checks]
    return dg.materialize(assets, resources=resources, raise_on_error=True)


@pytest.fixture(scope="session")
def chain(spark_resource: SparkSessionResource, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("a fleet [x]")
    folder = root / "housing"
    folder.mkdir()
    attributes = yaml.safe_load((HOUSING / "defs.yaml").read_text())["attributes"]
    attributes["tuning"] |= {"max_trials": 2, "patience": 1}
    (folder / "features.sql").write_text(SQL)
    context = ComponentTree.for_test().load_context
    component = Fleet.load(Fleet.get_model_cls().model_validate(attributes), _at(context, folder))
    resources: dict[str, Any] = {
        "spark": spark_resource,
        "tables": DeltaTables(root=str(root / "tables")),
        "registry": MlflowRegistry(
            tracking_uri=f"sqlite:///{root}/mlflow/mlflow.db",
            artifact_root=f"{root}/mlflow/artifacts",
            scratch=str(root / "scratch"),
        ),
        "launch": LaunchSettings(),
    }
    definitions = component.build_defs(context)
    return Chain(definitions, resources, root, run_chain(definitions, resources))


def _at(context: Any, folder: Path) -> Any:
    """The load context of a component in that folder."""
    from unittest.mock import Mock

    return Mock(path=folder, resolution_context=context.resolution_context)
