"""What training runs of tests and benchmarks have in common."""

from typing import TYPE_CHECKING, Any

from pipeline.runs.fleet_tables import FleetTables
from pipeline.spark.training import TrainingContext
from pipeline.storage import Tables

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def quiet_context(spark: "SparkSession", **changes: Any) -> TrainingContext:
    """Two slots that report nothing, with changes as in `TrainingContext`."""
    return TrainingContext(**{"spark": spark, "report": lambda _: None, "slots": 2, **changes})


def own_tables(tables: Tables, fleet: str) -> FleetTables:
    """The tables of a fleet under its own name."""
    return FleetTables(tables, fleet, fleet)
