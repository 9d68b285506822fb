"""Reclaiming what no kept run needs: rows of old runs, old table versions, leftovers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import unquote

import pandas as pd
import pyarrow.fs as pf
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import DeltaError

from pipeline.crash_points import crash_point
from pipeline.errors import StoreError
from pipeline.models.meta_model import filesystem_of
from pipeline.reading.delta_log import file_actions, read_actions
from pipeline.reporting.summary import text_table
from pipeline.runs.fleet_tables import FleetTables
from pipeline.storage import AppTransaction
from pipeline.tables import (
    BOOSTERS,
    DECISIONS,
    FEATURES,
    HOLDOUT,
    IMPORTANCE,
    LEDGER,
    PREDICTIONS,
    RAW,
    RUNS,
    fleet_runs,
)
from resources.delta_tables import DeltaTables
from resources.lease import Lease, hold_lease
from resources.mlflow_registry import MlflowRegistry

# Runs whose models, held-out rows and feature tables are kept.
KEPT_RUNS = 5
# Tables whose rows belong to runs, in the order in which they are let go: the run's own row last,
# so that a clean that was killed is finished by the next one.
OF_RUNS = (IMPORTANCE, HOLDOUT, BOOSTERS, LEDGER, RUNS)
OTHERS = (FEATURES, PREDICTIONS, DECISIONS)
# The other tables are written without the lease: their newest files may still wait for their commit
# and are kept for this long in any case.
UNDER_THE_LEASE = {contract.name for contract in (HOLDOUT, BOOSTERS, LEDGER, RUNS)}
WRITING = timedelta(hours=24)


@dataclass(frozen=True)
class Reclaimed:
    """What is removed from one table.

    Args:
        partitions: whose rows go: runs, or waves of boosters and held-out rows.
        files: path and size in bytes of each.
        younger: files that are not needed and too young to go.
    """

    partitions: Sequence[str]
    files: Sequence[tuple[str, int]]
    younger: int

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class _Unneeded:
    """A file that no kept version has.

    Args:
        path: on the file system of its table.
        size: bytes.
        since: when it was written, or, if later, removed from its table.
        was_committed: whether a version in the log removed it.
    """

    path: str
    size: int
    since: datetime
    was_committed: bool


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed, or would remove.

    Args:
        tables: what is removed from each table, by its name.
        dry_run: whether nothing was removed.
        kept_runs: runs of which everything is kept.
    """

    tables: Mapping[str, Reclaimed]
    dry_run: bool
    kept_runs: int

    @property
    def text(self) -> str:
        """For people: a line per table, and the sums; a dry run lists every file first."""
        lines: list[str] = []
        rows = []
        n_files = n_bytes = n_younger = 0
        for name, reclaimed in self.tables.items():
            counts = (len(reclaimed.partitions), len(reclaimed.files), reclaimed.n_bytes)
            rows.append([name, *map("{:,}".format, counts)])
            n_files += len(reclaimed.files)
            n_bytes += reclaimed.n_bytes
            n_younger += reclaimed.younger
            if self.dry_run:
                lines += [path for path, _ in reclaimed.files]
        lines.append(text_table(["table", "runs or waves", "files", "bytes"], rows))
        done = "removed"
        if self.dry_run:
            done = "would be removed (dry run: nothing was)"
        summary = f"{n_files:,} files, {n_bytes:,} bytes {done}"
        if n_younger:
            summary += f"; {n_younger:,} more are too young (--keep-hours)"
        lines.append(f"{summary}; {self.kept_runs:,} runs are kept whole (--keep-runs)")
        return "\n".join(lines)


def clean(
    tables: DeltaTables,
    registry: MlflowRegistry,
    namespace: str,
    *,
    keep: timedelta,
    keep_runs: int = KEPT_RUNS,
    dry_run: bool = False,
) -> Cleaned:
    """Remove what no kept run of a fleet needs.

    Everything is kept of the newest finished runs, of runs started since the oldest of them, and of
    the challenger's run. Of other runs that a registered version answers with, or that ever served,
    the rows of ledger and manifest are kept, so that any version can be rolled back to and
    compared. A file goes once it has been unneeded for a while: one that no commit names counts
    from when it was written, one of an old version from when that was replaced. The fleet's lease
    is held meanwhile, because the files of a running training are not committed yet. A folder
    without a table is left alone, so that a lost log does not take its files with it.

    Args:
        tables: where the fleet's tables are.
        registry: where its versions are.
        namespace: the fleet, its trial, or a backtest.
        keep: how long an unneeded file is kept; whoever reads an old version has this long.
        keep_runs: finished runs of which everything is kept, at least 1.
        dry_run: only look; takes no lease.

    Raises:
        StoreError: if a training of the fleet runs, or the store or the registry refuses; nothing
            more is removed then.
    """
    guard: AbstractContextManager[Lease | None] = nullcontext()
    if not dry_run:
        guard = hold_lease(tables, namespace, "many-models clean")
    with guard as lease:
        runs = FleetTables(tables, namespace, namespace).runs()
        kept = _kept_runs(runs, keep_runs, registry.challenger_run(namespace))
        answering = registry.fleet_versions(namespace) | _ever_served(tables, namespace)
        going = _partitions_that_go(tables, namespace, runs, kept, answering)
        if lease is not None:
            _let_go(tables, namespace, going, lease.fence)
        pinned = {FEATURES.name: _pinned_features(tables, namespace, runs, kept, keep_runs)}
        now = datetime.now(UTC)
        reclaimed: dict[str, Reclaimed] = {}
        for name, location in _locations(tables, namespace).items():
            unneeded = _unneeded_files(tables, location, pinned.get(name, ()))
            old = _old_enough(unneeded, name, keep, now)
            if not dry_run:
                _remove(tables, [file.path for file in old])
            reclaimed[name] = Reclaimed(
                partitions=going.get(name, ()),
                files=[(file.path, file.size) for file in old],
                younger=len(unneeded) - len(old),
            )
    return Cleaned(reclaimed, dry_run, len(kept))


def _locations(tables: DeltaTables, namespace: str) -> dict[str, str]:
    """Where the fleet's existing tables are, by name."""
    sources = tables.folders_below(tables.location(namespace, RAW.name))
    names = [f"{RAW.name}/{source}" for source in sources]
    names += [contract.name for contract in (*OTHERS, *OF_RUNS)]
    locations = {}
    for name in names:
        location = tables.location(namespace, name)
        if tables.exists(location):
            locations[name] = location
    return locations


def _kept_runs(runs: pd.DataFrame, keep_runs: int, challenger: str | None) -> set[str]:
    """Runs of which everything is kept."""
    finished = fleet_runs(runs[runs["finished_at"].notna()])
    newest = finished.sort_values("finished_at").tail(keep_runs)
    since_then = runs
    if not newest.empty:
        since_then = runs[runs["started_at"] >= newest["started_at"].min()]
    kept = {*newest["run_id"], *since_then["run_id"]}
    if challenger is not None and challenger in set(runs["run_id"]):
        kept.add(challenger)
    return kept


def _ever_served(tables: DeltaTables, namespace: str) -> set[str]:
    """Runs that a group was moved to or from.

    A version may combine runs; the decisions name them without reading its pack.
    """
    location = tables.location(namespace, DECISIONS.name)
    if not tables.exists(location):
        return set()
    rows = tables.read_pandas(location, columns=["from_version", "to_version"])
    return {*rows["from_version"].dropna(), *rows["to_version"].dropna()}


def _partitions_that_go(
    tables: DeltaTables,
    namespace: str,
    runs: pd.DataFrame,
    kept: Collection[str],
    answering: Collection[str],
) -> dict[str, list[str]]:
    """Per table the partitions that nobody needs; none where no table says which runs are old."""
    if runs.empty:
        return {}
    partitions: dict[str, set[str]] = {}
    for contract in OF_RUNS:
        location = tables.location(namespace, contract.name)
        partitions[contract.name] = _partitions(tables, location)
    waves: set[str] = set()
    if partitions[LEDGER.name]:
        location = tables.location(namespace, LEDGER.name)
        rows = tables.read_pandas(location, where={"run_id": sorted(kept)}, columns=["wave"])
        waves = set(rows["wave"].dropna())
    needed = {
        RUNS.name: {*kept, *answering},
        LEDGER.name: {*kept, *answering},
        IMPORTANCE.name: set(kept),
        BOOSTERS.name: waves,
        HOLDOUT.name: waves,
    }
    return {name: sorted(values - needed[name]) for name, values in partitions.items()}


def _partitions(tables: DeltaTables, location: str) -> set[str]:
    """The values of a table's one partition column."""
    if not tables.exists(location):
        return set()
    table = _opened(tables, location)
    columns = table.metadata().partition_columns
    if len(columns) != 1:  # as an earlier release made it
        return set()
    values = set(file_actions(table)[f"partition.{columns[0]}"].to_pylist())
    return set(map(str, values - {None}))


def _let_go(
    tables: DeltaTables, namespace: str, going: Mapping[str, Sequence[str]], fence: int
) -> None:
    """Delete the rows of old runs; their files stay for whoever still reads them."""
    for number, contract in enumerate(OF_RUNS, start=1):
        values = going.get(contract.name, ())
        if not values:
            continue
        location = tables.location(namespace, contract.name)
        (column,) = contract.partition_by
        literals = ", ".join(map(_sql_literal, values))
        app = AppTransaction.of_training(fence, number)
        properties = CommitProperties(app_transactions=[Transaction(app.app_id, app.number)])
        try:
            _opened(tables, location).delete(
                f"{column} IN ({literals})", commit_properties=properties
            )
        except DeltaError as error:
            raise StoreError(
                f"{location}: {error}; check that the store can be reached, then run again: it "
                "continues where it stopped"
            ) from error
        crash_point("rows_let_go")


def _sql_literal(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def _pinned_features(
    tables: DeltaTables, namespace: str, runs: pd.DataFrame, kept: Collection[str], keep_runs: int
) -> list[int]:
    """Versions of the feature table that kept runs were planned on.

    Those of the fleet's trials and backtests, too, which read the same feature table.
    """
    pinned = _features_versions(runs, kept)
    backtests = (f"{namespace}-backtest-", f"{namespace}-trial-backtest-")
    for name in tables.namespaces():
        if name == f"{namespace}-trial" or name.startswith(backtests):
            its_runs = FleetTables(tables, name, name).runs()
            pinned |= _features_versions(its_runs, _kept_runs(its_runs, keep_runs, None))
    return sorted(pinned)


def _features_versions(runs: pd.DataFrame, run_ids: Collection[str]) -> set[int]:
    versions = runs.loc[runs["run_id"].isin(list(run_ids)), "features_version"]
    return set(versions.dropna().astype(int).tolist())


def _unneeded_files(tables: DeltaTables, location: str, pinned: Iterable[int]) -> list[_Unneeded]:
    """Parquet files below a table that neither its newest nor a pinned version has, by path."""
    filesystem, root = filesystem_of(location, tables.storage_options)
    try:
        # List the files before the commits, so that the commits name all that were committed.
        infos = filesystem.get_file_info(pf.FileSelector(root, recursive=True))
        removed = _removed(filesystem, root)
        needed = _files_of(_opened(tables, location))
        for version in pinned:
            needed |= _files_of_version(tables, location, version)
    except (DeltaError, OSError, ValueError) as error:
        raise StoreError(
            f"{location}: {error}; nothing of it was removed: check that the store can be reached, "
            "then run again"
        ) from error
    unneeded = []
    for info in infos:
        path = info.path.removeprefix(f"{root}/")
        is_hidden = "/_" in f"/{path}"
        is_data = info.type == pf.FileType.File and path.endswith(".parquet") and not is_hidden
        if is_data and path not in needed:
            since = max(info.mtime, removed.get(path, info.mtime))
            unneeded.append(_Unneeded(info.path, info.size, since, was_committed=path in removed))
    return sorted(unneeded, key=lambda file: file.path)


def _old_enough(
    unneeded: Iterable[_Unneeded], table: str, keep: timedelta, now: datetime
) -> list[_Unneeded]:
    """The files that have been unneeded for long enough to be removed."""
    keep_uncommitted = keep
    if table not in UNDER_THE_LEASE:
        keep_uncommitted = max(keep, WRITING)
    old = []
    for file in unneeded:
        age = now - file.since
        if age >= keep_uncommitted or (file.was_committed and age >= keep):
            old.append(file)
    return old


def _opened(tables: DeltaTables, location: str, version: int | None = None) -> DeltaTable:
    return DeltaTable(location, version=version, storage_options=tables.storage_options or None)


def _files_of(table: DeltaTable) -> set[str]:
    return set(map(unquote, file_actions(table)["path"].to_pylist()))


def _files_of_version(tables: DeltaTables, location: str, version: int) -> set[str]:
    """The files of an old version.

    Empty where the log no longer reaches back to it: nobody can read such a version.
    """
    try:
        return _files_of(_opened(tables, location, version))
    except DeltaError:
        return set()


def _removed(filesystem: pf.FileSystem, root: str) -> dict[str, datetime]:
    """When each file that the log removes was removed."""
    removed: dict[str, datetime] = {}
    for info in filesystem.get_file_info(pf.FileSelector(f"{root}/_delta_log")):
        if info.extension != "json":
            continue
        for action in read_actions(filesystem, info.path):
            if "remove" not in action:
                continue
            moment = info.mtime
            milliseconds = action["remove"].get("deletionTimestamp")
            if milliseconds is not None:
                moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
            removed[unquote(action["remove"]["path"])] = moment
    return removed


def _remove(tables: DeltaTables, paths: Sequence[str]) -> None:
    filesystem, _ = filesystem_of(tables.root, tables.storage_options)
    for number, path in enumerate(paths):
        try:
            filesystem.delete_file(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(
                f"{path} could not be removed: {error}; {number} of {len(paths)} files were: check "
                "who may write there, then run again"
            ) from error
