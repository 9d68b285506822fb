"""Shared parts of the training runs of tests and benchmarks."""

from typing import TYPE_CHECKING, Any

from pipeline.runs.fleet_tables import FleetTables
from pipeline.spark.training import TrainingContext
from pipeline.spark.training_run import train_run
from pipeline.storage import Tables
from pipeline.testing.doubles import FreeLease

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

    from pipeline.runs.planned_run import PlannedRun
    from pipeline.spec import FleetSpec


def quiet_context(spark: "SparkSession", **changes: Any) -> TrainingContext:
    """A context with two slots that reports nothing, with changes to its fields."""
    return TrainingContext(**{"spark": spark, "report": lambda _: None, "slots": 2, **changes})


def own_tables(tables: Tables, fleet: str) -> FleetTables:
    """The tables of a fleet under its own name."""
    return FleetTables(tables, fleet, fleet)


def train_quietly(
    spark: "SparkSession",
    tables: FleetTables,
    run: "PlannedRun",
    spec: "FleetSpec",
    *,
    features_version: int = 0,
) -> "pd.DataFrame":
    """Train a planned run with `train_run`, under a lease that nobody else wants.

    Returns:
        The run's complete ledger.
    """
    return train_run(
        quiet_context(spark),
        tables,
        run,
        spec,
        features_version=features_version,
        lease=FreeLease(),
    )
