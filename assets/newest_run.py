"""The newest training run of a fleet, as its tables tell it."""

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.errors import StoreError
from pipeline.spark.fleet_training import read_runs
from pipeline.tables import LEDGER, fleet_runs, in_format
from resources.delta_tables import DeltaTables

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def newest_run(tables: DeltaTables, namespace: str) -> "pd.Series[Any]":
    """The run manifest (a row of `tables.RUNS`) of the newest finished run that trained the whole fleet.

    Raises:
        StoreError: if no run has finished.
    """
    runs = fleet_runs(read_runs(tables, namespace))
    if runs.empty:
        raise StoreError(f"{namespace!r} has no finished training run; materialise {namespace}/models first")
    finished = runs[runs["finished_at"].notna()]
    if finished.empty:
        raise StoreError(f"{namespace!r} has no finished training run, only interrupted ones; materialise {namespace}/models again: it resumes")
    return finished.sort_values("finished_at").iloc[-1]


def waves_of(run: "pd.Series[Any]") -> list[str]:
    """The waves whose boosters and held-out predictions the run's ledger refers to."""
    found: list[str] = json.loads(str(run["waves"]))
    return found


def features_of(spark: "SparkSession", tables: DeltaTables, fleet: str, run: "pd.Series[Any]") -> "DataFrame":
    """The fleet's feature table at the version that a run was planned on."""
    return tables.read_spark(spark, tables.location(fleet, "features"), int(run["features_version"]))


def ledger_of(tables: DeltaTables, namespace: str, run_id: str) -> pd.DataFrame:
    """The ledger rows of one run.

    Raises:
        StoreError: if the table is of another format.
    """
    location = tables.location(namespace, LEDGER.name)
    return in_format(tables.read_pandas(location, where={"run_id": run_id}), LEDGER, location)
