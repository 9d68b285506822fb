"""One Spark session and one object store per pytest process, and a small fleet that every layer can be tried on."""

from collections.abc import Iterator
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipeline.spec import FleetSpec, parse_spec
from pipeline.testing.data import SHOP
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


@pytest.fixture(scope="session")
def shop_attributes() -> dict[str, Any]:
    """The attributes of a small fleet: shops in two regions, sold by month."""
    return dict(SHOP)


@pytest.fixture(scope="session")
def shop() -> FleetSpec:
    """The same, built."""
    return parse_spec(SHOP, file="shop/defs.yaml")
