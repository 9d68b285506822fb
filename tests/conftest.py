"""One Spark session and one object store per pytest process, and a small fleet that every layer can be tried on."""

from collections.abc import Iterator
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipeline.spec import FleetSpec, parse_spec
from pipeline.testing.object_store import object_store as served_store
from resources.spark_session import SparkSessionResource


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    # One JVM lives through all tests: a full heap ends it, and every test after.
    resource = SparkSessionResource(
        master="local[2]", memory="3g", scratch=str(tmp_path_factory.mktemp("spark"))
    )
    session = resource.session
    yield session
    session.stop()


@pytest.fixture(scope="session")
def spark_resource(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> SparkSessionResource:
    """The resource of a run, on the one session."""
    return SparkSessionResource(master="local[2]", scratch=str(tmp_path_factory.mktemp("scratch")))


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, str]]:
    """Options of an S3 endpoint on this machine with a bucket `fleets`."""
    with served_store() as options:
        yield options


SHOP: dict[str, Any] = {
    "name": "shop",
    "sources": [{"name": "sales", "uri": "sales.csv"}],
    "features": {
        "columns": ["size"],
        "lags": [{"column": "amount", "periods": [1, 2]}],
        "rolling": [{"column": "amount", "window": "3 months", "statistics": ["mean", "max"]}],
        "calendar": ["month"],
        "categoricals": ["region"],
        "derived": {"change": "amount_lag_1 - amount_lag_2"},
    },
    "grains": [[], ["region"], ["region", "store"]],
    "entity": ["region", "store"],
    "time": "sold_on",
    "period": "1 month",
    "horizon": "1 month",
    "target": {"column": "amount"},
    "splits": {"report": "6 months", "tune": "6 months"},
    "tuning": {"max_trials": 2, "patience": 1, "max_rounds": 20, "fit_rows": 20, "tune_rows": 5},
    "baselines": {"last value": "amount_lag_1"},
}


@pytest.fixture(scope="session")
def shop_attributes() -> dict[str, Any]:
    """The attributes of a small fleet: shops in two regions, sold by month."""
    return SHOP


@pytest.fixture(scope="session")
def shop() -> FleetSpec:
    """The same, built."""
    return parse_spec(SHOP, file="shop/defs.yaml")
