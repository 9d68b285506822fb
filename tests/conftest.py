"""One Spark session per pytest process, and a small fleet that every layer can be tried on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import pytest
from pyspark.sql import SparkSession

from pipeline.spec import FleetSpec, parse_spec
from resources.spark_session import SparkSessionResource


class KeptSpark(SparkSessionResource):
    """The resource of a run, but with the test process's one session, which outlives the run."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["KeptSpark"]:
        yield self

    @property
    def session(self) -> SparkSession:
        return SparkSession.builder.getOrCreate()


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    resource = SparkSessionResource(master="local[2]", memory="1g", scratch=str(tmp_path_factory.mktemp("spark")))
    session = resource.session
    yield session
    session.stop()


@pytest.fixture(scope="session")
def kept_spark(spark: SparkSession) -> Callable[[Any], SparkSessionResource]:
    """Makes the resource of a run on the one session, given its scratch folder."""
    return lambda scratch: KeptSpark(master="local[2]", scratch=str(scratch))


@pytest.fixture
def spark_resource(spark: SparkSession, tmp_path: Any) -> SparkSessionResource:
    return KeptSpark(master="local[2]", scratch=str(tmp_path))


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
