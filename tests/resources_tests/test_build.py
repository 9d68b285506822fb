from pathlib import Path

import dagster as dg
import pytest

from resources.build import build_resources
from resources.profiles import (
    DATA,
    PROFILE,
    SPARK_MASTER,
    TRACKING_URI,
    WORKER_PYTHON,
    current_profile,
)

ADDRESS = "sqlite:////tmp/user:password/mlflow.db"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        PROFILE: "cluster",
        DATA: str(tmp_path),
        SPARK_MASTER: "spark://host:7077",
        TRACKING_URI: ADDRESS,
        WORKER_PYTHON: "/opt/python",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("cluster")
def test_settings_taken_over_as_they_are_stay_variables_for_dagster(tmp_path: Path) -> None:
    built = build_resources(current_profile(tmp_path), by_variable=True)
    assert isinstance(built.registry.tracking_uri, dg.EnvVar)
    assert (built.spark.master, built.spark.worker_python, built.registry.tracking_uri) == (
        SPARK_MASTER,
        WORKER_PYTHON,
        TRACKING_URI,
    )
    assert ADDRESS not in repr(built)


@pytest.mark.usefixtures("cluster")
def test_a_run_and_a_command_get_their_values(tmp_path: Path) -> None:
    ready = build_resources(current_profile(tmp_path))
    assert (ready.spark.master, ready.spark.worker_python, ready.registry.tracking_uri) == (
        "spark://host:7077",
        "/opt/python",
        ADDRESS,
    )

    built = build_resources(current_profile(tmp_path), by_variable=True)
    seen = []

    @dg.asset
    def looked_at(registry: dg.ResourceParam[type(built.registry)]) -> None:
        seen.append(registry.tracking_uri)

    assert dg.materialize([looked_at], resources={"registry": built.registry}).success
    assert seen == [ADDRESS]


def test_on_one_machine_nothing_is_left_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (PROFILE, DATA, SPARK_MASTER, TRACKING_URI, WORKER_PYTHON):
        monkeypatch.delenv(name, raising=False)
    built = build_resources(current_profile(tmp_path))
    assert built.registry.tracking_uri == f"sqlite:///{tmp_path}/.data/mlflow/mlflow.db"
    assert built.spark.master.startswith("local[")
    assert built.spark.worker_python is None
