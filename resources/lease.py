"""One training of a fleet at a time: a row in Delta that says who may train it now.

A taker reads the row at a version of the table and replaces it by the very next version, without
deltalake's retries. The log has one file per version, so of two takers who read the same version
one succeeds. Clocks are only compared with `expires_at`; those of two machines may differ by less
than the expiry.

Each taker gets a fence, one above the last. A training run's commits carry it as an application
transaction, so that the tables themselves refuse a holder who slept through its expiry, whatever
its clock says.

What grows: a renewal is one commit and one file of about 3 kB, four a minute at the usual expiry.
Every 50th commit removes log entries older than an hour; the next taker of the lease removes data
files older than an hour.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import create_table_with_add_actions

from pipeline.errors import StoreError
from pipeline.storage import COMMITS_PER_LEASE, TRAINING, Tables
from pipeline.tables import BOOSTERS, HOLDOUT, LEASES, LEDGER, RUNS
from resources.delta_tables import add_action

ATTEMPTS = 5
RENEWALS = 4  # within one expiry
_ONCE = CommitProperties(max_commit_retries=0)
TABLE_SETTINGS = {
    "delta.checkpointInterval": "50",
    "delta.enableExpiredLogCleanup": "true",
    "delta.logRetentionDuration": "interval 1 hours",
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}
_log = logging.getLogger(__name__)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _moment(now: Callable[[], datetime]) -> datetime:
    """The clock's time in whole microseconds, as the table keeps it.

    The clock may be a pandas timestamp, which has nanoseconds.
    """
    return datetime.fromtimestamp(now().timestamp(), UTC)


@dataclass(frozen=True)
class LeaseRow:
    """The row of `LEASES`.

    Args:
        run_id: the training run.
        owner: host:pid of its process.
        host: name of the machine.
        boot_id: the machine's boot and pid namespace; empty where unknown.
        pid: process.
        process_started: clock ticks since boot; 0 where unknown.
        taken_at: when the run took the lease.
        heartbeat_at: when it was last renewed.
        expires_at: from then on anybody may take it.
        released: whether the run gave it back.
        fence: one above that of the holder before; 0 in a row of an earlier release.
    """

    run_id: str
    owner: str
    host: str
    boot_id: str
    pid: int
    process_started: int
    taken_at: datetime
    heartbeat_at: datetime
    expires_at: datetime
    released: bool
    fence: int = 0

    def is_free(self, moment: datetime) -> bool:
        """Whether another may take the lease."""
        return self.released or self.expires_at <= moment or self.owner_is_gone()

    def owner_is_gone(self) -> bool:
        """Whether the process is known to be gone.

        That is known of processes of this machine, in this boot, that have ended or whose pid
        belongs to another. Where the boot is unknown (not Linux), nobody is known to be gone.
        """
        if not self.boot_id or (self.host, self.boot_id) != (socket.gethostname(), read_boot_id()):
            return False
        return not _is_running(self.pid, self.process_started)

    def same_holder(self, other: "LeaseRow | None") -> bool:
        """Whether the other row is held too, by the same process since the same moment."""
        return (
            other is not None
            and not other.released
            and replace(other, heartbeat_at=self.heartbeat_at, expires_at=self.expires_at) == self
        )


class Lease:
    """The right to train a fleet, renewed in the background; made by `hold_lease`."""

    def __init__(
        self, table: "LeaseTable", row: LeaseRow, expiry: timedelta, now: Callable[[], datetime]
    ) -> None:
        self._table = table
        self._row = row
        self._expiry = expiry
        self._now = now
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._keep, name=f"lease-{table.namespace}", daemon=True
        )

    @property
    def run_id(self) -> str:
        """The run that holds the lease."""
        return self._row.run_id

    @property
    def fence(self) -> int:
        """A number that grows each time the lease is taken."""
        return self._row.fence

    def check(self) -> None:
        """Make sure that the lease is still held; to be called before each commit.

        Reads the table. A lease that ran out while this process slept, and that nobody took, is
        renewed. While the store cannot be reached, the lease counts as held until it expires,
        because nobody may take it before. If the process is frozen between this call and its commit
        for longer than the expiry, the commit itself is refused: it carries the lease's fence.

        Raises:
            StoreError: if another run took the lease, or it ran out and cannot be renewed.
        """
        if self._ended.is_set():
            raise StoreError(
                f"run {self.run_id} has given back its lease of fleet {self._table.namespace!r}; "
                "take it anew to go on"
            )
        try:
            _, current = self._table.read()
            self._refuse_others(current)
            if current is not None and current.expires_at <= _moment(self._now):
                self._renew()
        except _Unreachable as error:
            if _moment(self._now) >= self._row.expires_at:
                raise StoreError(
                    f"run {self.run_id} could not renew its lease of fleet "
                    f"{self._table.namespace!r} since {_text(self._row.heartbeat_at)}, and it "
                    f"expired at {_text(self._row.expires_at)}: {error}; nothing more is "
                    "committed: make the store reachable, then run again"
                ) from error

    def start(self) -> None:
        """Begin to renew the lease in the background."""
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and give the lease back; if that fails, it expires by itself."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._expiry.total_seconds() / RENEWALS)
        try:
            for _ in range(ATTEMPTS):
                handle, current = self._table.read()
                if not self._row.same_holder(current):
                    return
                if self._table.swap(handle, replace(self._row, released=True)):
                    return
        except StoreError as error:
            _log.warning(
                "the lease of fleet %r was not given back and expires at %s: %s",
                self._table.namespace,
                _text(self._row.expires_at),
                error,
            )

    def _keep(self) -> None:
        pause = self._expiry.total_seconds() / RENEWALS
        wait = pause
        while not self._ended.wait(wait):
            try:
                self._renew()
            except _Unreachable as error:
                wait = pause / RENEWALS
                _log.warning(
                    "the lease of fleet %r was not renewed, trying again in %.1f s: %s",
                    self._table.namespace,
                    wait,
                    error,
                )
            except StoreError:
                return  # lost; `check` finds that out for itself
            else:
                wait = pause

    def _renew(self) -> None:
        for _ in range(ATTEMPTS):
            handle, current = self._table.read()
            self._refuse_others(current)
            moment = _moment(self._now)
            row = replace(self._row, heartbeat_at=moment, expires_at=moment + self._expiry)
            if self._table.swap(handle, row):
                self._row = row
                return
        raise _Unreachable(f"{self._table.location}: the store refused {ATTEMPTS} commits in a row")

    def _refuse_others(self, current: LeaseRow | None) -> None:
        """Raise if the table's row is not this holder's."""
        if self._row.same_holder(current):
            return
        why = "its row is gone"
        if current is not None:
            why = (
                f"run {current.run_id} on {current.host}, pid {current.pid}, "
                f"took it at {_text(current.taken_at)}"
            )
        raise StoreError(
            f"run {self.run_id} lost its lease of fleet {self._table.namespace!r}, last renewed at "
            f"{_text(self._row.heartbeat_at)}: {why}; nothing more is committed: run again once "
            "the other has ended"
        )


@contextmanager
def hold_lease(
    tables: Tables,
    namespace: str,
    run_id: str,
    *,
    expiry_seconds: float = 60.0,
    now: Callable[[], datetime] = _utc_now,
) -> Iterator[Lease]:
    """Hold the right to train a fleet while the block runs, and give it back however it ends.

    A lease is free where there is no row, it was released, it expired, or its owner was a process
    of this machine that is gone: a run that was killed can be resumed at once.

    Args:
        tables: where the fleet's tables are.
        namespace: the fleet, or its trial.
        run_id: the training run.
        expiry_seconds: how long the lease outlives its last renewal; it is renewed four times as
            often.
        now: the clock that `expires_at` is compared with, UTC with a zone.

    Yields:
        The lease; call its `check` before each commit.

    Raises:
        StoreError: if another run holds it, even in this very process, or the store refuses.
    """
    table = LeaseTable(tables, namespace)
    expiry = timedelta(seconds=expiry_seconds)
    lease = Lease(table, _take(table, run_id, expiry, now), expiry, now)
    try:
        table.forget()
        lease.start()
        yield lease
    finally:
        lease.release()


def current_lease(tables: Tables, namespace: str) -> LeaseRow | None:
    """The row of the lease, even if the lease expired or was given back.

    None if nobody ever took it.

    Raises:
        StoreError: if the table cannot be read.
    """
    return LeaseTable(tables, namespace).read()[1]


def _take(
    table: "LeaseTable", run_id: str, expiry: timedelta, now: Callable[[], datetime]
) -> LeaseRow:
    host, pid = socket.gethostname(), os.getpid()
    for _ in range(ATTEMPTS):
        handle, current = table.read()
        moment = _moment(now)
        fence = 0
        if current is not None:
            if not current.is_free(moment):
                raise StoreError(_held(table.namespace, current))
            fence = current.fence
        if not fence:
            # The lease was removed, or an earlier release wrote it: the tables know the last fence.
            fence = table.newest_fence()
        row = LeaseRow(
            run_id=run_id,
            owner=f"{host}:{pid}",
            host=host,
            boot_id=read_boot_id(),
            pid=pid,
            process_started=read_process_start(pid),
            taken_at=moment,
            heartbeat_at=moment,
            expires_at=moment + expiry,
            released=False,
            fence=fence + 1,
        )
        if table.swap(handle, row):
            return row
    raise StoreError(
        f"run {run_id} could not take the lease of fleet {table.namespace!r}: the store refused "
        f"{ATTEMPTS} commits in a row; run again"
    )


def _held(namespace: str, holder: LeaseRow) -> str:
    """The message for a taker who comes while the lease is held."""
    expiry = (holder.expires_at - holder.heartbeat_at).total_seconds()
    process = f"host {holder.host}, pid {holder.pid}"
    if holder.pid == os.getpid() and holder.boot_id == read_boot_id():
        process = "this very process"
    return (
        f"fleet {namespace!r} is being trained by run {holder.run_id} ({process}) since "
        f"{_text(holder.taken_at)}; its lease expires at {_text(holder.expires_at)} unless "
        f"renewed: wait for that run or terminate it; the lease becomes free at most {expiry:g} s "
        "after its process dies"
    )


class _Unreachable(StoreError):
    """The store did not answer, or its answer is not a lease; trying again may help."""


class LeaseTable:
    """The table of one fleet, with a compare-and-set on its one row."""

    def __init__(self, tables: Tables, namespace: str) -> None:
        self.namespace = namespace
        self.location = tables.location(namespace, LEASES.name)
        self._tables = tables
        self._options = dict(tables.storage_options) or None

    def read(self) -> tuple[DeltaTable | None, LeaseRow | None]:
        """The newest version of the table, and its row."""
        with self._readable():
            if not DeltaTable.is_deltatable(self.location, self._options):
                return None, None
            table = DeltaTable(self.location, storage_options=self._options)
            rows = table.to_pyarrow_table(columns=self._known_columns(table)).to_pylist()
        if not rows:
            return table, None
        row = LeaseRow(**rows[0])
        return table, replace(row, fence=row.fence or 0)

    def newest_fence(self) -> int:
        """The highest fence that a commit to the fleet's tables carried; 0 for none."""
        highest = 0
        for contract in (RUNS, LEDGER, BOOSTERS, HOLDOUT):
            location = self._tables.location(self.namespace, contract.name)
            highest = max(highest, self._tables.transaction(location, TRAINING) or 0)
        return highest // COMMITS_PER_LEASE

    @staticmethod
    def _known_columns(table: DeltaTable) -> list[str]:
        """Columns of the contract that the table has; one of an earlier release may lack some."""
        present = {field.name for field in table.schema().fields}
        return [name for name in LEASES.schema.names if name in present]

    def swap(self, handle: DeltaTable | None, row: LeaseRow) -> bool:
        """Write the row as the version after the handle's; returns whether it is the newest now.

        The store's own answer is not trusted: a put that was repeated after a lost answer is
        refused because of itself. So the newest version decides. After False, read again and retry.
        """
        version = -1
        if handle is not None:
            version = handle.version()
        refused: Exception | None = None
        try:
            self.commit(handle, row)
        except (DeltaError, OSError) as error:
            refused = error
        newest, current = self.read()
        beaten = isinstance(refused, CommitFailedError) or (
            newest is not None and newest.version() != version
        )
        if refused is not None and current != row and not beaten:
            raise _Unreachable(
                f"{self.location}: {refused}; check that the store can be reached and written to, "
                "then run again"
            ) from refused
        return current == row

    def commit(self, handle: DeltaTable | None, row: LeaseRow) -> None:
        """Write the row as the version after the handle's, without checking the result."""
        # Not write_deltalake: it panics where the root holds brackets.
        file = self._tables.write_file(
            pa.Table.from_pylist([asdict(row)], schema=LEASES.schema), LEASES.schema, self.location
        )
        if file is None:
            raise StoreError(f"{self.location}: the lease's file was not written; run again")
        actions: list[Any] = [add_action(file, {})]
        schema = Schema.from_arrow(LEASES.schema)
        if handle is None:
            create_table_with_add_actions(
                self.location,
                schema,
                actions,
                mode="error",
                configuration=TABLE_SETTINGS,
                storage_options=self._options,
                commit_properties=_ONCE,
            )
            return
        columns = self._known_columns(handle)
        missing = [field for field in schema.fields if field.name not in columns]
        if missing:
            # This makes a version of its own; the row follows unless somebody else comes between.
            handle.alter.add_columns(missing, commit_properties=_ONCE)
        handle.create_write_transaction(actions, "overwrite", schema, commit_properties=_ONCE)

    def forget(self) -> None:
        """Delete data files older than an hour that the table no longer names.

        Anything that cannot be deleted is left for the next run. The whole folder is listed,
        because checkpoints forget files that were removed from the table more than an hour ago.
        """
        with contextlib.suppress(DeltaError, OSError):
            DeltaTable(self.location, storage_options=self._options).vacuum(
                dry_run=False, full=True
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (DeltaError, OSError, ValueError, pa.ArrowException) as error:
            raise _Unreachable(
                f"the lease at {self.location} cannot be read: {error}; check that the store can "
                "be reached; if the table is damaged and nobody trains the fleet, remove that "
                "folder"
            ) from error


def _text(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def read_boot_id() -> str:
    """The machine's boot and the namespace of process ids; empty where /proc does not tell.

    The boot alone would not do: containers of one machine share it, and those in the host's network
    share the host's name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_running(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    state, ticks = read_process_state(pid)
    if state in ("Z", "X"):
        return False  # dead, only not yet waited for by its parent
    return started == ticks or 0 in (started, ticks)


def read_process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where /proc does not tell."""
    return read_process_state(pid)[1]


def read_process_state(pid: int) -> tuple[str, int]:
    """State letter and start in clock ticks since boot; empty and 0 where /proc does not tell.

    Source: proc_pid_stat(5), fields 3 and 22; the name before them is in parentheses and may
    contain some itself.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
