"""The Delta tables of one fleet: where each is, and what training runs left in them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from pipeline.errors import StoreError
from pipeline.runs.manifest import RunManifest
from pipeline.storage import Tables, Where, WrittenFile
from pipeline.tables import (
    FEATURES,
    LEDGER,
    RAW,
    RUNS,
    TableContract,
    fleet_runs,
    in_format,
    records,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclass(frozen=True)
class FleetTables:
    """The tables of a fleet, of its trial, or of one of its backtests.

    Raw tables and features are the fleet's own whatever the namespace: a trial and a backtest read
    them, and write everything else beside.

    Args:
        tables: where they are kept.
        namespace: of what is trained and answered.
        fleet: the fleet's name.
    """

    tables: Tables
    namespace: str
    fleet: str

    def location(self, contract: TableContract) -> str:
        """The root of a table; raw tables have one each, see `raw_location`."""
        if contract in (RAW, FEATURES):
            return self.tables.location(self.fleet, contract.name)
        return self.tables.location(self.namespace, contract.name)

    def raw_location(self, source: str) -> str:
        """The root of a source's raw table."""
        return self.tables.location(self.fleet, RAW.name, source)

    def features_version(self) -> int:
        """The newest version of the feature table."""
        return self.tables.version(self.location(FEATURES))

    def features(self, spark: "SparkSession", version: int | None = None) -> "DataFrame":
        """The feature table as a Spark data frame, by default its newest version."""
        return self.tables.read_spark(spark, self.location(FEATURES), version)

    def runs(self) -> pd.DataFrame:
        """The rows of `tables.RUNS`, finished or not; none where there is no table yet.

        Raises:
            StoreError: if the table is of another format.
        """
        return self._rows(RUNS)

    def run(self, run_id: str) -> RunManifest | None:
        """The manifest of a run; None where the tables do not know it."""
        runs = self.runs()
        rows = records(runs[runs["run_id"] == run_id])
        if not rows:
            return None
        return RunManifest.from_row(rows[-1])

    def newest_run(self) -> RunManifest:
        """The newest finished run that trained the whole fleet.

        Raises:
            StoreError: if no run has finished.
        """
        runs = fleet_runs(self.runs())
        asset = f"{self.namespace}/models"
        if runs.empty:
            raise StoreError(
                f"{self.namespace!r} has no finished training run; materialise {asset} first"
            )
        finished = runs[runs["finished_at"].notna()].sort_values("finished_at")
        if finished.empty:
            raise StoreError(
                f"{self.namespace!r} has no finished training run, only interrupted ones; "
                f"materialise {asset} again: it resumes"
            )
        return RunManifest.from_row(records(finished)[-1])

    def newest_as_of(self, run_ids: list[str]) -> pd.Timestamp | None:
        """The latest as-of of some runs, UTC without a zone.

        None where the tables know none of them.

        Args:
            run_ids: the training runs, e.g. those whose chains a version answers from.
        """
        runs = self.runs()
        as_of = runs.loc[runs["run_id"].isin(run_ids), "as_of"].max()
        if pd.isna(as_of):
            return None
        return pd.Timestamp(as_of).tz_convert(None)

    def ledger(self, run_id: str) -> pd.DataFrame:
        """The ledger rows of one run; none where there is no table yet.

        Raises:
            StoreError: if the table is of another format.
        """
        return self._rows(LEDGER, {"run_id": run_id})

    def write(self, contract: TableContract, rows: pa.Table) -> list[WrittenFile]:
        """Write rows below a table's root without committing them; no file for no rows."""
        file = self.tables.write_file(rows, contract.schema, self.location(contract))
        if file is None:
            return []
        return [file]

    def _rows(self, contract: TableContract, where: Where | None = None) -> pd.DataFrame:
        """Rows of a table in today's format; none where there is no table yet."""
        location = self.location(contract)
        if not self.tables.exists(location):
            return no_rows(contract)
        return in_format(self.tables.read_pandas(location, where=where), contract, location)


def no_rows(contract: TableContract) -> pd.DataFrame:
    """An empty table of a contract."""
    rows: pd.DataFrame = contract.schema.empty_table().to_pandas()
    return rows
