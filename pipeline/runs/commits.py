"""The commits of one training run, each only while the run still owns the fleet."""

from collections.abc import Mapping, Sequence

import pandas as pd
import pyarrow as pa

from pipeline.crash_points import crash_point
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.manifest import RunManifest
from pipeline.runs.wave import TrainedFiles, Wave
from pipeline.storage import AppTransaction, HeldLease, Mode, WrittenFile
from pipeline.tables import BOOSTERS, HOLDOUT, LEDGER, RUNS, TableContract


class Commits:
    """Commits what a run leaves.

    The lease is checked before a commit, but a process may sleep for hours between the check and
    the commit. So each commit carries a number that grows with the lease: a table that holds a
    later holder's commit refuses it.

    Args:
        tables: of the fleet.
        run_id: of the run.
        lease: the right to train the fleet.
    """

    def __init__(self, tables: FleetTables, run_id: str, lease: HeldLease) -> None:
        self._tables = tables
        self._run_id = run_id
        self._lease = lease
        self._n_commits = 0

    def manifest(self, manifest: RunManifest) -> None:
        """Write the run's manifest, in place of an earlier one."""
        self._replace_run(RUNS, pa.Table.from_pylist([manifest.to_row()], schema=RUNS.schema))

    def ledger(self, rows: pd.DataFrame) -> None:
        """Write the run's complete ledger, in place of the rows that its waves left."""
        self._replace_run(LEDGER, _ledger_table(rows))

    def wave(self, wave: Wave, trained: TrainedFiles, rows: pd.DataFrame) -> None:
        """Commit a wave: boosters, then held-out predictions, then the ledger rows that name them.

        Args:
            wave: that was trained.
            trained: its files.
            rows: ledger rows of its groups, weights and errors still missing.
        """
        crash_point("wave_trained")
        self._lease.check()
        for contract, files in ((BOOSTERS, trained.boosters), (HOLDOUT, trained.holdout)):
            if files:
                self._commit(contract, files, mode="append", partition={"wave": wave.name})
            crash_point(f"{contract.name}_committed")
        files = self._tables.write(LEDGER, _ledger_table(rows))
        self._lease.check()
        self._commit(LEDGER, files, mode="append", partition={"run_id": self._run_id})
        crash_point("wave_committed")

    def _replace_run(self, contract: TableContract, rows: pa.Table) -> None:
        self._lease.check()
        files = self._tables.write(contract, rows)
        self._commit(contract, files, mode="overwrite", partition={"run_id": self._run_id})

    def _commit(
        self,
        contract: TableContract,
        files: Sequence[WrittenFile],
        *,
        mode: Mode,
        partition: Mapping[str, str],
    ) -> None:
        self._n_commits += 1
        self._tables.tables.commit(
            self._tables.location(contract),
            files,
            contract.schema,
            mode=mode,
            partition=partition,
            app=AppTransaction.of_training(self._lease.fence, self._n_commits),
        )


def _ledger_table(rows: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(rows, schema=LEDGER.schema, preserve_index=False)
