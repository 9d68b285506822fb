"""Fixtures of the domain tests: no Dagster, no Spark, no MLflow."""

import pandas as pd
import pytest
from hypothesis import HealthCheck, settings

from pipeline.spec import FleetSpec
from pipeline.testing.data import feature_rows, small_spec, training_settings
from pipeline.training.trainer import TrainingSettings

# Machines are shared: an example that is slow today says nothing about the code. The same examples every time.
settings.register_profile(
    "domain",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("domain")


@pytest.fixture
def spec() -> FleetSpec:
    return small_spec()


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    """Four cities, 300 days each; do not change in place."""
    return feature_rows()


@pytest.fixture
def fleet_settings(spec: FleetSpec, rows: pd.DataFrame) -> TrainingSettings:
    return training_settings(spec, rows)
