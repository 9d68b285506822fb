"""One Spark session and one object store per pytest process, and a small fleet that every layer can be tried on."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pf
import pytest
from pyspark.sql import SparkSession

from pipeline.spec import FleetSpec, parse_spec
from resources.spark_session import SparkSessionResource


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    resource = SparkSessionResource(master="local[2]", memory="1g", scratch=str(tmp_path_factory.mktemp("spark")))
    session = resource.session
    yield session
    session.stop()


@pytest.fixture(scope="session")
def spark_resource(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> SparkSessionResource:
    """The resource of a run, on the one session."""
    return SparkSessionResource(master="local[2]", scratch=str(tmp_path_factory.mktemp("scratch")))


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, str]]:
    """An S3 endpoint on this machine with a bucket `fleets`, in a process of its own: the store's client holds on to this one's lock."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(port)
    options = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_CONDITIONAL_PUT": "etag",
    }
    pf.S3FileSystem(
        access_key="test",
        secret_key=options["AWS_SECRET_ACCESS_KEY"],
        region="us-east-1",
        scheme="http",
        endpoint_override=f"127.0.0.1:{port}",
        allow_bucket_creation=True,
    ).create_dir("fleets")
    yield options
    server.terminate()
    server.wait()


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at port {port}")


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
