"""The lease of a fleet: one holder at a time, whatever happens to processes, stores and clocks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from pipeline.errors import StoreError
from pipeline.runs.commits import Commits
from pipeline.testing.run_parts import make_manifest
from pipeline.testing.runs import own_tables
from pipeline.testing.tables import write_arrow
from resources import lease as lease_module
from resources.delta_tables import DeltaTables
from resources.lease import LEASES, Lease, LeaseRow, LeaseTable, current_lease, hold_lease

BUCKET = "fleets"
START = datetime(2026, 11, 21, 9, tzinfo=UTC)
# Reads one JSON line per command and answers each with one line: take a lease (and give back the one before), or check it.
CHILD = """
import contextlib, json, sys
from resources.delta_tables import DeltaTables
from resources.lease import hold_lease
from pipeline.testing.tables import write_arrow

print("ready", flush=True)
held, lease = contextlib.ExitStack(), None
for line in sys.stdin:
    told = json.loads(line)
    try:
        if told["do"] == "check":
            lease.check()
        else:
            held.close()
            if told["do"] == "take":
                tables = DeltaTables(root=told["root"], storage_options=told["options"])
                lease = held.enter_context(hold_lease(tables, "shop", told["run_id"], expiry_seconds=told["expiry"]))
        print("done", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
held.close()
"""


class Child:
    """Another process that holds leases as it is told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(
        self, do: str, tables: DeltaTables | None = None, run_id: str = "", expiry: float = 3600.0
    ) -> None:
        assert self.process.stdin
        told: dict[str, Any] = {"do": do, "run_id": run_id, "expiry": expiry}
        if tables is not None:
            told |= {"root": tables.root, "options": tables.storage_options}
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, *told: Any, **more: Any) -> str:
        self.tell(*told, **more)
        return self.answer()


@contextmanager
def children(n: int) -> Iterator[list[Child]]:
    started = [Child() for _ in range(n)]
    try:
        assert [child.answer() for child in started] == ["ready"] * n
        yield started
    finally:
        for child in started:
            child.process.kill()
            child.process.communicate()


@pytest.fixture(params=["a folder [x]", "s3"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> DeltaTables:
    if request.param == "s3":
        return DeltaTables(
            root=f"s3://{BUCKET}/{tmp_path.name}",
            storage_options=request.getfixturevalue("object_store"),
        )
    return DeltaTables(root=str(tmp_path / request.param))


@pytest.fixture
def local(tmp_path: Path) -> DeltaTables:
    return DeltaTables(root=str(tmp_path))


class Clock:
    """A clock that is set by hand."""

    def __init__(self, moment: datetime = START) -> None:
        self.moment = moment

    def __call__(self) -> datetime:
        return self.moment

    def pass_by(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


def row_of(**changes: Any) -> LeaseRow:
    """A lease that a living process of this machine took at the start."""
    pid = os.getpid()
    host, boot, ticks = (
        socket.gethostname(),
        lease_module.read_boot_id(),
        lease_module.read_process_start(pid),
    )
    row = LeaseRow(
        "run-1",
        f"{host}:{pid}",
        host,
        boot,
        pid,
        ticks,
        START,
        START,
        START + timedelta(seconds=60),
        released=False,
    )
    return replace(row, **changes)


def left_behind(tables: DeltaTables, **changes: Any) -> LeaseRow:
    """The same, as the table's row."""
    row = row_of(**changes)
    table = LeaseTable(tables, "shop")
    assert table.swap(table.read()[0], row)
    return row


def free_pid() -> int:
    """The pid of a process that was, and is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_lease_is_held_within_the_block_and_free_after_it(tables: DeltaTables) -> None:
    assert current_lease(tables, "shop") is None
    with hold_lease(tables, "shop", "run-1") as lease:
        lease.check()
        row = current_lease(tables, "shop")
        assert row is not None
        assert (row.run_id, row.pid, row.host, row.released) == (
            "run-1",
            os.getpid(),
            socket.gethostname(),
            False,
        )
        assert row.expires_at - row.taken_at == timedelta(seconds=60)
        with pytest.raises(
            StoreError,
            match=(
                r"fleet 'shop' is being trained by run run-1 \(this very process\) since .* "
                r"expires at .* 60 s after"
            ),
        ):
            hold_lease(tables, "shop", "run-2").__enter__()
        with hold_lease(tables, "shop-trial", "run-2") as other:
            other.check()
    with pytest.raises(StoreError, match="given back"):
        lease.check()
    with hold_lease(tables, "shop", "run-2") as lease:
        lease.check()


def test_of_two_takers_who_read_the_same_version_one_lands(tables: DeltaTables) -> None:
    one, other = LeaseTable(tables, "shop"), LeaseTable(tables, "shop")
    assert one.swap(None, row_of(run_id="first"))
    assert not other.swap(None, row_of(run_id="late"))
    (ours, _), (theirs, _) = one.read(), other.read()
    assert other.swap(theirs, row_of(run_id="second"))
    assert not one.swap(ours, row_of(run_id="stale"))
    row = current_lease(tables, "shop")
    assert row is not None
    assert row.run_id == "second"
    assert tables.version(one.location) == 1


@pytest.mark.slow
@pytest.mark.integration
def test_of_eight_processes_one_takes_the_lease(
    tmp_path: Path, object_store: dict[str, str]
) -> None:
    roots = [
        DeltaTables(root=str(tmp_path)),
        DeltaTables(root=f"s3://{BUCKET}/race", storage_options=object_store),
    ]
    with children(8) as started:
        for number, tables in enumerate([root for root in roots for _ in range(3)]):
            for index, child in enumerate(started):
                child.tell("take", tables, f"run-{number}-{index}")
            answers = [child.answer() for child in started]
            assert answers.count("done") == 1, answers
            winner = f"run-{number}-{answers.index('done')}"
            row = current_lease(tables, "shop")
            assert row is not None
            assert row.run_id == winner
            assert all(
                f"is being trained by run {winner} (host" in answer
                for answer in answers
                if answer != "done"
            ), answers
            assert [child.ask("give back") for child in started] == ["done"] * 8


@pytest.mark.integration
def test_a_killed_run_is_followed_at_once(local: DeltaTables) -> None:
    with children(1) as (child,):
        assert child.ask("take", local, "killed") == "done"
        with pytest.raises(StoreError, match=rf"run killed \(host .*, pid {child.process.pid}\)"):
            hold_lease(local, "shop", "next").__enter__()
        child.process.kill()
        for _ in range(
            100
        ):  # a zombie from then on: its parent, this process, has not waited for it
            if lease_module.read_process_state(child.process.pid)[0] == "Z":
                break
            time.sleep(0.05)
        with hold_lease(local, "shop", "next") as lease:
            lease.check()
    left_behind(local, pid=child.process.pid)
    with hold_lease(local, "shop", "another") as lease:
        lease.check()


@pytest.mark.integration
def test_a_frozen_run_loses_its_lease_once_that_expired_and_somebody_took_it(
    local: DeltaTables,
) -> None:
    with children(1) as (child,):
        assert child.ask("take", local, "frozen", expiry=2.0) == "done"
        child.process.send_signal(signal.SIGSTOP)
        time.sleep(2.2)
        child.process.send_signal(signal.SIGCONT)
        assert child.ask("check") == "done"  # nobody took it
        child.process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        with pytest.raises(StoreError, match="run frozen"):
            hold_lease(local, "shop", "next").__enter__()
        time.sleep(2.2)
        with hold_lease(local, "shop", "next") as lease:
            child.process.send_signal(signal.SIGCONT)
            lost = child.ask("check")
            assert "run frozen lost its lease of fleet 'shop'" in lost
            assert f"run next on {socket.gethostname()}, pid {os.getpid()}, took it" in lost
            time.sleep(0.5)
            lease.check()


@pytest.mark.parametrize(
    ("changes", "seconds", "taken"),
    [
        ({}, 0, False),
        ({}, 59.9, False),
        ({}, 60, True),
        ({"released": True}, 0, True),
        ({"process_started": 1}, 0, True),  # the pid is another process's by now
        ({"process_started": 0}, 0, False),
        ({"host": "elsewhere"}, 0, False),
        ({"host": "elsewhere"}, 60, True),
        ({"boot_id": "another"}, 0, False),
        ({"boot_id": ""}, 0, False),
        ({"pid": 1, "process_started": 0}, 0, False),  # there, whoever it belongs to
    ],
)
def test_who_may_take_what_another_left(
    local: DeltaTables, changes: dict[str, Any], seconds: float, taken: bool
) -> None:
    left_behind(local, **changes)
    clock = Clock()
    clock.pass_by(seconds)
    if taken:
        with hold_lease(local, "shop", "run-2", now=clock) as lease:
            lease.check()
    else:
        with pytest.raises(StoreError, match="is being trained by run run-1"):
            hold_lease(local, "shop", "run-2", now=clock).__enter__()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"host": "elsewhere"}, False),
        ({"boot_id": "another boot"}, False),
        ({"boot_id": ""}, False),
    ],
)
def test_a_process_is_known_to_be_gone_only_where_its_pid_means_something(
    local: DeltaTables, changes: dict[str, Any], taken: bool
) -> None:
    assert left_behind(local, pid=free_pid(), **changes).is_free(START) is taken


def test_the_lease_is_renewed_while_it_is_held(local: DeltaTables) -> None:
    with hold_lease(local, "shop", "run-1", expiry_seconds=2.0) as lease:
        first = current_lease(local, "shop")
        time.sleep(2.5)
        row = current_lease(local, "shop")
        lease.check()
        with pytest.raises(StoreError, match="run run-1"):
            hold_lease(local, "shop", "run-2").__enter__()
    assert first is not None
    assert row is not None
    assert row.heartbeat_at > first.expires_at
    assert row.taken_at == first.taken_at


def test_what_ran_out_and_nobody_took_is_renewed_by_the_check(local: DeltaTables) -> None:
    clock = Clock()
    with hold_lease(local, "shop", "run-1", expiry_seconds=3600, now=clock) as lease:
        clock.pass_by(3600)
        lease.check()
        row = current_lease(local, "shop")
        assert row is not None
        assert row.expires_at == clock.moment + timedelta(hours=1)


def test_what_ran_out_and_was_taken_is_lost_and_not_given_back(local: DeltaTables) -> None:
    clock = Clock()
    with hold_lease(local, "shop", "run-1", expiry_seconds=3600, now=clock) as lease:
        clock.pass_by(3600)
        with hold_lease(local, "shop", "run-2", expiry_seconds=3600, now=clock) as other:
            with pytest.raises(
                StoreError,
                match=(
                    r"run run-1 lost its lease of fleet 'shop'.*run run-2 on "
                    r".*nothing more is committed"
                ),
            ):
                lease.check()
            lease.release()
            other.check()


def test_a_table_that_vanished_is_a_lost_lease(local: DeltaTables, tmp_path: Path) -> None:
    with hold_lease(local, "shop", "run-1") as lease:
        (tmp_path / "shop").rename(tmp_path / "away")
        with pytest.raises(StoreError, match="its row is gone"):
            lease.check()


class Unreachable:
    """A store that does not answer."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        raise OSError("connection refused")

    @staticmethod
    def is_deltatable(*args: Any) -> bool:
        raise OSError("connection refused")


def test_an_unreachable_store_is_borne_until_the_lease_expires(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with hold_lease(local, "shop", "run-1", expiry_seconds=0.4, now=clock) as lease:
        with monkeypatch.context() as broken:
            broken.setattr(lease_module, "DeltaTable", Unreachable)
            time.sleep(0.4)
            lease.check()
            clock.pass_by(0.4)
            with pytest.raises(
                StoreError,
                match=(
                    r"run-1 could not renew its lease of fleet 'shop' since .*connection "
                    r"refused.*run again"
                ),
            ):
                lease.check()
            with pytest.raises(StoreError, match="cannot be read: connection refused"):
                hold_lease(local, "shop", "run-2").__enter__()
        assert "was not renewed, trying again in" in caplog.text
        for _ in range(100):
            row = current_lease(local, "shop")
            if row is not None and row.heartbeat_at == clock.moment:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the lease was not renewed once the store was back")
        lease.check()


def test_a_lease_that_cannot_be_given_back_hides_no_error(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        with hold_lease(local, "shop", "run-1"):
            monkeypatch.setattr(lease_module, "DeltaTable", Unreachable)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "was not given back" in caplog.text


@pytest.mark.parametrize(
    "interrupt",
    [KeyboardInterrupt, SystemExit, DagsterExecutionInterruptedError, dg.DagsterError, ValueError],
)
def test_whatever_ends_the_block_gives_the_lease_back(
    local: DeltaTables, interrupt: type[BaseException]
) -> None:
    with pytest.raises(interrupt), hold_lease(local, "shop", "run-1"):
        raise interrupt
    row = current_lease(local, "shop")
    assert row is not None
    assert row.released
    assert "lease-shop" not in {thread.name for thread in threading.enumerate()}


def test_a_commit_whose_answer_was_lost_is_looked_up(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = LeaseTable.commit

    def landing(*told: Any) -> None:
        commit(*told)
        raise CommitFailedError("version exists already")

    monkeypatch.setattr(LeaseTable, "commit", landing)
    for number in range(2):
        with hold_lease(local, "shop", f"run-{number}") as lease:
            lease.check()
    assert local.version(local.location("shop", "leases")) == 3


def test_a_refused_commit_that_nobody_overtook_is_tried_again(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = LeaseTable.commit
    refusals = iter([CommitFailedError("409"), None, CommitFailedError("409"), None])

    def conflicting(*told: Any) -> None:
        if (error := next(refusals, None)) is not None:
            raise error
        commit(*told)

    monkeypatch.setattr(LeaseTable, "commit", conflicting)
    with hold_lease(local, "shop", "run-1") as lease:
        lease.check()
    row = current_lease(local, "shop")
    assert row is not None
    assert row.released


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no space left on device"), "no space left on device; check that"),
        (CommitFailedError("503"), "refused 5 commits"),
    ],
)
def test_a_store_that_refuses_every_write_is_an_error(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refusing(*told: Any) -> None:
        raise error

    monkeypatch.setattr(LeaseTable, "commit", refusing)
    with pytest.raises(StoreError, match=message):
        hold_lease(local, "shop", "run-1").__enter__()


def test_old_log_entries_go_and_a_stale_commit_in_their_place_is_not_believed(
    local: DeltaTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    none_kept = {
        **lease_module.TABLE_SETTINGS,
        "delta.logRetentionDuration": "interval 0 seconds",
        "delta.deletedFileRetentionDuration": "interval 0 seconds",
    }
    monkeypatch.setattr(lease_module, "TABLE_SETTINGS", none_kept)
    table = LeaseTable(local, "shop")
    table.swap(None, row_of())
    stale, _ = table.read()
    for number in range(101):
        assert table.swap(table.read()[0], row_of(run_id=f"run-{number}"))
    log = Path(table.location, "_delta_log")
    assert len(list(log.iterdir())) < 60
    assert not (log / f"{1:020}.json").exists()
    assert not table.swap(stale, row_of(run_id="frozen for long"))
    row = current_lease(local, "shop")
    assert row is not None
    assert row.run_id == "run-100"
    with hold_lease(local, "shop", "run-2", now=lambda: START + timedelta(days=1)) as lease:
        lease.check()
        assert len(list(Path(table.location).glob("*.parquet"))) <= 3


def test_a_clock_of_pandas_will_do(local: DeltaTables) -> None:
    with hold_lease(
        local, "shop", "run-1", now=lambda: pd.Timestamp("2026-11-21 09:00:00.123456789", tz="UTC")
    ) as lease:
        lease.check()
        assert isinstance(lease, Lease)


def test_the_row_is_the_contract() -> None:
    assert [field.name for field in fields(LeaseRow)] == LEASES.schema.names


def test_a_damaged_table_is_named_with_the_next_step(local: DeltaTables) -> None:
    with hold_lease(local, "shop", "run-1"):
        pass
    location = local.location("shop", "leases")
    for path in DeltaTable(location).file_uris():
        Path(path).unlink()
    with pytest.raises(StoreError, match="remove that folder"):
        hold_lease(local, "shop", "run-2").__enter__()


def test_the_fence_grows_with_every_holder_and_stays_through_renewals(local: DeltaTables) -> None:
    for fence in (1, 2, 3):
        with hold_lease(local, "shop", f"run-{fence}", expiry_seconds=0.4) as lease:
            time.sleep(0.3)
            lease.check()
            assert lease.fence == fence
            there = current_lease(local, "shop")
            assert there is not None
            assert (there.fence, there.heartbeat_at > there.taken_at) == (fence, True)


def test_a_lease_of_an_earlier_release_has_no_fence_and_gains_one(local: DeltaTables) -> None:
    old = pa.schema([field for field in LEASES.schema if field.name != "fence"])
    row = {name: value for name, value in asdict(row_of(released=True)).items() if name != "fence"}
    location = local.location("shop", LEASES.name)
    write_arrow(local, [pa.Table.from_pylist([row], schema=old)], old, location, mode="overwrite")
    there = current_lease(local, "shop")
    assert there is not None
    assert there.fence == 0
    for fence in (1, 2):
        with hold_lease(local, "shop", "run-2") as lease:
            assert lease.fence == fence


def test_where_the_lease_was_removed_the_fence_goes_on_from_the_tables(local: DeltaTables) -> None:
    for _ in range(3):
        with hold_lease(local, "shop", "run-1") as lease:
            Commits(own_tables(local, "shop"), "run-1", lease).manifest(make_manifest("run-1"))
    shutil.rmtree(local.location("shop", LEASES.name))
    with hold_lease(local, "shop", "run-2") as lease:
        assert lease.fence == 4
