"""The newest training run of a fleet, as its tables tell it."""

from typing import Any

import pandas as pd

from pipeline.errors import StoreError
from pipeline.tables import LEDGER, RUNS
from resources.delta_tables import DeltaTables


def newest_run(tables: DeltaTables, namespace: str) -> "pd.Series[Any]":
    """The run manifest (a row of `tables.RUNS`) of the newest run.

    Raises:
        StoreError: if no run has finished.
    """
    location = tables.location(namespace, RUNS.name)
    if not tables.exists(location):
        raise StoreError(f"{namespace!r} has no finished training run; materialise {namespace}/models first")
    return tables.read_pandas(location).sort_values("started_at").iloc[-1]


def ledger_of(tables: DeltaTables, namespace: str, run_id: str) -> pd.DataFrame:
    """The ledger rows of one run."""
    return tables.read_pandas(tables.location(namespace, LEDGER.name), where={"run_id": run_id})
