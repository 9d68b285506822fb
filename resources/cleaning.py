"""Reclaiming what no kept run needs: rows of old runs, old table versions, leftovers."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
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
from pipeline.storage import COMMITS_PER_LEASE, TRAINING
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
from resources.lease import hold_lease
from resources.mlflow_registry import MlflowRegistry

# Runs whose models, held-out rows and feature tables are kept.
KEPT_RUNS = 5
# Tables whose rows belong to runs, in the order in which they are let go: the run's own row last,
# so that a clean that was killed is finished by the next one.
OF_RUNS = (IMPORTANCE, HOLDOUT, BOOSTERS, LEDGER, RUNS)
OTHERS = (FEATURES, PREDICTIONS, DECISIONS)
# Whoever writes one of the other tables does so without the lease: its newest files may have no
# commit yet, and stay so long in any case.
UNDER_THE_LEASE = {contract.name for contract in (HOLDOUT, BOOSTERS, LEDGER, RUNS)}
WRITING = timedelta(hours=24)


@dataclass(frozen=True)
class Reclaimed:
    """What of one table goes.

    Args:
        partitions: whose rows go: runs, of boosters and held-out rows waves.
        files: address and size in bytes of each.
        younger: files that are not needed and too young to go.
    """

    partitions: Sequence[str]
    files: Sequence[tuple[str, int]]
    younger: int


@dataclass(frozen=True)
class _Unneeded:
    """A file that no kept version has.

    Args:
        info: its path and size.
        since: when it was written, or, if later, taken away from its table.
        was_committed: whether a version in the log took it away.
    """

    info: pf.FileInfo
    since: datetime
    was_committed: bool


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed, or would remove.

    Args:
        tables: what of each table, by its name.
        dry_run: whether nothing was removed.
        kept_runs: runs that everything is kept of.
    """

    tables: Mapping[str, Reclaimed]
    dry_run: bool
    kept_runs: int

    @property
    def text(self) -> str:
        """For people."""
        found = self.tables
        rows = [
            [
                name,
                f"{len(one.partitions):,}",
                f"{len(one.files):,}",
                f"{sum(size for _, size in one.files):,}",
            ]
            for name, one in found.items()
        ]
        table = text_table(["table", "runs or waves", "files", "bytes"], rows)
        did = "would be removed (dry run: nothing was)" if self.dry_run else "removed"
        sizes = [size for one in found.values() for _, size in one.files]
        younger = sum(one.younger for one in found.values())
        waiting = f"; {younger:,} more are too young (--keep-hours)" if younger else ""
        listed = (
            [address for one in found.values() for address, _ in one.files] if self.dry_run else []
        )
        kept = f"{self.kept_runs:,} runs are kept whole (--keep-runs)"
        return "\n".join(
            [*listed, table, f"{len(sizes):,} files, {sum(sizes):,} bytes {did}{waiting}; {kept}"]
        )


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

    Everything stays of the newest finished runs, of what was started since the oldest of them, and
    of the challenger's run. Of other runs that a registered version answers with, or that ever
    served, the rows of ledger and manifest stay, so that any version can be rolled back to and
    compared. A file goes once it has been unneeded for a while: one that no commit names counts
    from when it was written, one of an old version from when that was replaced. The fleet's lease
    is held meanwhile: what a running training wrote is not committed yet. A folder without a table
    is left alone, so that a lost log does not take its files with it.

    Args:
        tables: where the fleet's tables are.
        registry: where its versions are.
        namespace: the fleet, its trial, or a backtest.
        keep: how long an unneeded file stays; whoever reads an old version has as long.
        keep_runs: finished runs of which everything is kept, at least 1.
        dry_run: only look; takes no lease.

    Raises:
        StoreError: if a training of the fleet runs, or the store or the registry refuses; nothing
            more is removed then.
    """
    with nullcontext() if dry_run else hold_lease(tables, namespace, "many-models clean") as lease:
        runs = FleetTables(tables, namespace, namespace).runs()
        kept = _kept_runs(runs, keep_runs, registry.challenger_run(namespace))
        answering = {*registry.fleet_versions(namespace), *_ever_served(tables, namespace)}
        going = _partitions_that_go(tables, namespace, runs, kept, answering)
        if not dry_run and lease is not None:
            _let_go(tables, namespace, going, lease.fence)
        pinned = {FEATURES.name: _pinned_features(tables, namespace, runs, kept, keep_runs)}
        now = datetime.now(UTC)
        found: dict[str, Reclaimed] = {}
        for name, location in _locations(tables, namespace).items():
            files = _unneeded_files(tables, location, pinned.get(name, ()))
            uncommitted = keep if name in UNDER_THE_LEASE else max(keep, WRITING)
            old = [
                one.info
                for one in files
                if one.since <= now - (keep if one.was_committed else uncommitted)
            ]
            if not dry_run:
                _remove(tables, [info.path for info in old])
            found[name] = Reclaimed(
                going.get(name, ()), [(info.path, info.size) for info in old], len(files) - len(old)
            )
    return Cleaned(found, dry_run, len(kept))


def _locations(tables: DeltaTables, namespace: str) -> dict[str, str]:
    """The tables that there are, by name."""
    filesystem, root = filesystem_of(tables.location(namespace, RAW.name), tables.storage_options)
    folders = filesystem.get_file_info(pf.FileSelector(root, allow_not_found=True))
    sources = sorted(info.base_name for info in folders if info.type == pf.FileType.Directory)
    names = [
        *(f"{RAW.name}/{source}" for source in sources),
        *(contract.name for contract in (*OTHERS, *OF_RUNS)),
    ]
    found = {name: tables.location(namespace, name) for name in names}
    return {name: location for name, location in found.items() if tables.exists(location)}


def _kept_runs(runs: pd.DataFrame, keep_runs: int, challenger: str | None) -> set[str]:
    """Runs that everything is kept of."""
    finished = (
        fleet_runs(runs[runs["finished_at"].notna()]).sort_values("finished_at").tail(keep_runs)
    )
    since = finished["started_at"].min()
    newer = runs if finished.empty else runs[runs["started_at"] >= since]
    there = set(runs["run_id"])
    return {*newer["run_id"], *finished["run_id"], *({challenger} & there if challenger else ())}


def _ever_served(tables: DeltaTables, namespace: str) -> set[str]:
    """Runs that a group was moved to, or from: versions that combine runs are not read for it."""
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
    """Per table the partitions that nobody needs."""
    there = {
        contract.name: _partitions(tables, tables.location(namespace, contract.name))
        for contract in OF_RUNS
    }
    if runs.empty:
        return {}
    known = {*kept, *answering}
    location = tables.location(namespace, LEDGER.name)
    waves: set[str] = set()
    if there[LEDGER.name]:
        waves = set(
            tables.read_pandas(location, where={"run_id": sorted(kept)}, columns=["wave"])[
                "wave"
            ].dropna()
        )
    needed = {
        RUNS.name: known,
        LEDGER.name: known,
        IMPORTANCE.name: set(kept),
        BOOSTERS.name: waves,
        HOLDOUT.name: waves,
    }
    return {name: sorted(set(values) - needed[name]) for name, values in there.items()}


def _partitions(tables: DeltaTables, location: str) -> set[str]:
    """The values of a table's one partition column."""
    if not tables.exists(location):
        return set()
    table = _opened(tables, location)
    columns = table.metadata().partition_columns
    if len(columns) != 1:  # as an earlier release made it
        return set()
    found = file_actions(table)[f"partition.{columns[0]}"].to_pylist()
    return {str(value) for value in found if value is not None}


def _let_go(
    tables: DeltaTables, namespace: str, going: Mapping[str, Sequence[str]], fence: int
) -> None:
    """Commit that rows of old runs are gone; their files stay for those who still read them."""
    for number, contract in enumerate(OF_RUNS, start=1):
        values = going.get(contract.name, ())
        if not values:
            continue
        location = tables.location(namespace, contract.name)
        (column,) = contract.partition_by
        listed = ", ".join("'{}'".format(value.replace("'", "''")) for value in values)
        properties = CommitProperties(
            app_transactions=[Transaction(TRAINING, fence * COMMITS_PER_LEASE + number)]
        )
        try:
            _opened(tables, location).delete(
                f"{column} IN ({listed})", commit_properties=properties
            )
        except DeltaError as error:
            raise StoreError(
                f"{location}: {error}; check that the store can be reached, then run again: it "
                "goes on"
            ) from error
        crash_point("rows_let_go")


def _pinned_features(
    tables: DeltaTables, namespace: str, runs: pd.DataFrame, kept: Collection[str], keep_runs: int
) -> list[int]:
    """Versions of the feature table that kept runs were planned on.

    Those of the fleet's trials and backtests, too.
    """
    pinned = set(runs.loc[runs["run_id"].isin(list(kept)), "features_version"])
    filesystem, root = filesystem_of(tables.root, tables.storage_options)
    for info in filesystem.get_file_info(pf.FileSelector(root)):
        if info.base_name == f"{namespace}-trial" or info.base_name.startswith(
            (f"{namespace}-backtest-", f"{namespace}-trial-backtest-")
        ):
            theirs = FleetTables(tables, info.base_name, info.base_name).runs()
            pinned |= set(
                theirs.loc[
                    theirs["run_id"].isin(list(_kept_runs(theirs, keep_runs, None))),
                    "features_version",
                ]
            )
    return sorted(int(version) for version in pinned if not pd.isna(version))


def _unneeded_files(tables: DeltaTables, location: str, pinned: Iterable[int]) -> list[_Unneeded]:
    """Parquet files below a table that neither its newest nor a pinned version has, by path."""
    filesystem, root = filesystem_of(location, tables.storage_options)
    try:
        # Files first, then the commits: one that is committed in between is named.
        files = filesystem.get_file_info(pf.FileSelector(root, recursive=True))
        removed = _removed(filesystem, root)
        needed = _files_of(_opened(tables, location))
        for version in pinned:
            needed |= _files_of_version(tables, location, version)
    except (DeltaError, OSError, ValueError) as error:
        raise StoreError(
            f"{location}: {error}; nothing of it was removed: check that the store can be reached, "
            "then run again"
        ) from error
    found = []
    for info in files:
        path = info.path.removeprefix(f"{root}/")
        hidden = any(part.startswith("_") for part in path.split("/"))
        if (
            info.type == pf.FileType.File
            and path.endswith(".parquet")
            and not hidden
            and path not in needed
        ):
            found.append(
                _Unneeded(info, max(info.mtime, removed.get(path, info.mtime)), path in removed)
            )
    return sorted(found, key=lambda one: one.info.path)


def _opened(tables: DeltaTables, location: str, version: int | None = None) -> DeltaTable:
    return DeltaTable(location, version=version, storage_options=tables.storage_options or None)


def _files_of(table: DeltaTable) -> set[str]:
    return {unquote(path) for path in file_actions(table)["path"].to_pylist()}


def _files_of_version(tables: DeltaTables, location: str, version: int) -> set[str]:
    """The files of an old version.

    Empty where the log no longer reaches back to it: nobody can read such a version.
    """
    try:
        return _files_of(_opened(tables, location, version))
    except DeltaError:
        return set()


def _removed(filesystem: pf.FileSystem, root: str) -> dict[str, datetime]:
    """When each file that the log takes away was taken away."""
    found: dict[str, datetime] = {}
    for info in filesystem.get_file_info(pf.FileSelector(f"{root}/_delta_log")):
        if info.extension != "json":
            continue
        for action in read_actions(filesystem, info.path):
            if "remove" in action:
                gone = action["remove"]
                milliseconds = gone.get("deletionTimestamp")
                moment = (
                    info.mtime
                    if milliseconds is None
                    else datetime.fromtimestamp(milliseconds / 1000, UTC)
                )
                found[unquote(gone["path"])] = moment
    return found


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
