"""A shop fleet that was materialised once, and ways to launch some of its links again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from assets.champion import champion_asset
from assets.features import features_asset
from assets.importance import importance_asset
from assets.meta_model import meta_model_asset
from assets.models import models_asset, models_checks
from assets.predictions import predictions_asset
from assets.raw import raw_asset
from assets.settings import FleetFiles
from pipeline.spec import FleetSpec
from pipeline.testing.doubles import MemoryRegistry
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

SQL = "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, amount, size FROM sales"
AS_OF = "2023-10-15"


@dataclass
class Shop:
    """A fleet, its files and where its tables and models are."""

    spec: FleetSpec
    files: FleetFiles
    resources: dict[str, Any]
    links: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.links = {
            "sales": [raw_asset(self.spec, self.spec.sources[0], self.files)],
            "features": [features_asset(self.spec, self.files)],
            "models": [models_asset(self.spec), models_checks(self.spec)],
            "importance": [importance_asset(self.spec)],
            "meta_model": [meta_model_asset(self.spec)],
            "champion": [champion_asset(self.spec)],
            "predictions": [predictions_asset(self.spec)],
        }

    def launch(
        self, *names: str, sql: str | None = None, **changes: Any
    ) -> dg.ExecuteInProcessResult:
        """Materialise the named links; a failure is part of the result."""
        links = (
            {
                **self.links,
                "features": [features_asset(self.spec, FleetFiles(self.files.folder, sql))],
            }
            if sql
            else self.links
        )
        chosen = [asset for name in names for asset in links[name]]
        return dg.materialize(chosen, resources={**self.resources, **changes}, raise_on_error=False)

    def table(self, name: str) -> pd.DataFrame:
        """One of its tables."""
        return self.resources["tables"].read_pandas(self.resources["tables"].location("shop", name))


def sales() -> pd.DataFrame:
    """Four years of six shops by month."""
    random = np.random.default_rng(11)
    months = pd.date_range("2020-01-01", periods=48, freq="MS")
    shops = [
        (region, f"{region[0]}{number}") for region in ("north", "south") for number in range(3)
    ]
    rows = pd.DataFrame(
        [(*shop, month) for shop in shops for month in months],
        columns=["region", "store", "sold_on"],
    )
    rows["size"] = random.integers(1, 50, len(rows))
    rows["amount"] = (100 + 2.0 * rows["size"] + random.normal(0, 5, len(rows))).round(2)
    return rows


def evaluations(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {found.check_name: found for found in result.get_asset_check_evaluations()}


def materialised(result: dg.ExecuteInProcessResult) -> dict[str, Mapping[str, Any]]:
    """Metadata by link."""
    return {
        event.asset_key.path[-1]: {
            name: value.value for name, value in event.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }


def told(result: dg.ExecuteInProcessResult) -> str:
    """What the failed step says of itself."""
    (failure,) = (event.step_failure_data for event in result.all_events if event.is_step_failure)
    assert failure.user_failure_data is not None, failure.error
    return str(failure.user_failure_data.description)


@pytest.fixture(scope="session")
def checks() -> Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]:
    return evaluations


@pytest.fixture(scope="session")
def metadata() -> Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]]:
    return materialised


@pytest.fixture(scope="session")
def failure() -> Callable[[dg.ExecuteInProcessResult], str]:
    return told


@pytest.fixture(scope="session")
def finished(
    shop: FleetSpec, spark_resource: SparkSessionResource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shop, dg.ExecuteInProcessResult]:
    root = tmp_path_factory.mktemp("shop")
    sales().to_csv(root / "sales.csv", index=False)
    resources = {
        "spark": spark_resource,
        "tables": DeltaTables(root=str(root / "tables")),
        "registry": MemoryRegistry(root / "packs"),
        "launch": LaunchSettings(as_of=AS_OF),
    }
    fleet = Shop(shop, FleetFiles(root, SQL), resources)
    return fleet, fleet.launch(*fleet.links)


@pytest.fixture
def fleet(finished: tuple[Shop, dg.ExecuteInProcessResult], tmp_path: Path) -> Shop:
    """The finished fleet, with a registry of the test's own that knows the same versions."""
    fleet, _ = finished
    registry = fleet.resources["registry"]
    own = MemoryRegistry(
        registry.folder,
        {name: list(versions) for name, versions in registry.versions.items()},
        dict(registry.aliases),
    )
    return Shop(fleet.spec, fleet.files, {**fleet.resources, "registry": own})


@pytest.fixture(scope="session")
def first_run(finished: tuple[Shop, dg.ExecuteInProcessResult]) -> dg.ExecuteInProcessResult:
    return finished[1]


@pytest.fixture(scope="session")
def launched(
    spark_resource: SparkSessionResource, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Shop, dg.ExecuteInProcessResult]]:
    """Materialises all links of another fleet, by default over the same sales, with a real registry."""

    def launch(
        spec: FleetSpec, sql: str, rows: pd.DataFrame | None = None, as_of: str = AS_OF
    ) -> tuple[Shop, dg.ExecuteInProcessResult]:
        root = tmp_path_factory.mktemp("other shop")
        (sales() if rows is None else rows).to_csv(root / "sales.csv", index=False)
        resources = {
            "spark": spark_resource,
            "tables": DeltaTables(root=str(root / "tables")),
            "registry": MlflowRegistry(
                tracking_uri=f"sqlite:///{root}/mlflow/mlflow.db",
                artifact_root=f"{root}/mlflow/artifacts",
                scratch=str(root / "scratch"),
            ),
            "launch": LaunchSettings(as_of=as_of),
        }
        fleet = Shop(spec, FleetFiles(root, sql), resources)
        return fleet, fleet.launch(*fleet.links)

    return launch
