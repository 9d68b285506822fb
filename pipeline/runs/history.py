"""What earlier training runs of a fleet left for the next one to build on."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.manifest import RunManifest
from pipeline.spec import FleetSpec
from pipeline.tables import fleet_runs, records

LedgerRow = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """The runs before this one, from the fleet's tables.

    Args:
        runs: rows of `tables.RUNS`, oldest first.
        ledger: gives a run's ledger rows.
    """

    runs: pd.DataFrame
    ledger: Callable[[str], pd.DataFrame]

    @classmethod
    def read(cls, tables: FleetTables) -> "History":
        """From the tables of a fleet; empty where there are none yet.

        Raises:
            StoreError: if they are of another format.
        """
        # Reads no rows: a ledger of another format is refused even if no earlier run is read.
        tables.ledger("")
        runs = tables.runs().sort_values("started_at", ignore_index=True)
        return cls(runs, tables.ledger)

    def newest_finished(self, as_of: pd.Timestamp) -> RunManifest | None:
        """The newest finished run that saw nothing that a run of this as-of must not see."""
        runs = fleet_runs(self.runs)
        is_visible = runs["finished_at"].notna() & (runs["as_of"].dt.tz_convert(None) <= as_of)
        newest = records(runs[is_visible].tail(1))
        if not newest:
            return None
        return RunManifest.from_row(newest[0])

    def unfinished(self, since: RunManifest | None) -> list[RunManifest]:
        """Runs that were not finished, newest last; only those started after a given one."""
        runs = self.runs[self.runs["finished_at"].isna()]
        if since is not None:
            runs = runs[runs["started_at"] > since.started_at]
        return [RunManifest.from_row(row) for row in records(runs)]


@dataclass(frozen=True)
class EarlierRuns:
    """The ledger rows that a run may build on, by group.

    Args:
        kept: of the run that is resumed.
        before: of the newest finished run.
        unfinished: of other runs that were never finished, newer than `before`.
        same_spec: whether `before` was trained under the same spec, so that its parameters may be
            refitted without trials.
    """

    kept: Mapping[GroupKey, LedgerRow] = field(default_factory=dict)
    before: Mapping[GroupKey, LedgerRow] = field(default_factory=dict)
    unfinished: Mapping[GroupKey, LedgerRow] = field(default_factory=dict)
    same_spec: bool = True

    @classmethod
    def read(
        cls,
        history: History,
        before: RunManifest | None,
        open_runs: Sequence[RunManifest],
        resumed: RunManifest | None,
        spec: FleetSpec,
    ) -> "EarlierRuns":
        """The rows of a fleet's earlier runs.

        Args:
            history: all of them.
            before: the newest finished run.
            open_runs: those never finished, newer than it, as from `History.unfinished`.
            resumed: the interrupted run that is resumed.
            spec: the fleet as it is described now.
        """

        def rows_of(run: RunManifest | None) -> Mapping[GroupKey, LedgerRow]:
            if run is None:
                return {}
            return by_group(history.ledger(run.run_id))

        unfinished: dict[GroupKey, LedgerRow] = {}
        for run in open_runs:
            if resumed is None or run.run_id != resumed.run_id:
                unfinished |= rows_of(run)
        return cls(
            kept=rows_of(resumed),
            before=rows_of(before),
            unfinished=unfinished,
            same_spec=before is not None and before.spec_digest == spec.training_digest,
        )

    def source_of(self, key: GroupKey, fingerprint: str) -> LedgerRow:
        """The row that a group with this fingerprint is reused from."""
        row = self.before.get(key)
        if row is not None and row["fingerprint"] == fingerprint:
            return row
        return self.unfinished[key]

    @property
    def timed(self) -> pd.DataFrame:
        """Groups whose seconds predict the next run's: status, seconds and n_target of each.

        Those of the run before, and those that the resumed run trained before it was interrupted.
        """
        columns = ["status", "seconds", "n_target"]
        rows = itertools.chain(self.before.values(), self.kept.values())
        groups = pd.DataFrame(map(itemgetter(*columns), rows), columns=columns)
        groups = groups.astype({"seconds": float, "n_target": float})
        return groups[groups["seconds"] > 0]


def by_group(ledger: pd.DataFrame) -> dict[GroupKey, LedgerRow]:
    """Ledger rows of one run, by group."""
    return {GroupKey.of(row): row for row in records(ledger)}
