"""The commits of a run: their order, their fence, and what a failure in between leaves."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StoreError
from pipeline.runs.commits import Commits
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.wave import TrainedFiles, Wave
from pipeline.storage import COMMITS_PER_LEASE, TRAINING
from pipeline.tables import BOOSTERS, HOLDOUT, LEDGER, RUNS
from pipeline.testing.doubles import FreeLease, MemoryTables
from pipeline.testing.run_parts import make_ledger_row, make_manifest
from pipeline.testing.runs import own_tables

WAVE = Wave("run-1-wave-0", pd.DataFrame({"grain": [2], "group_id": ['["north","oslo"]']}))


@dataclass
class RecordingTables(MemoryTables):
    """Tables in memory that write down each commit, and refuse the nth."""

    committed: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    refused: int | None = None

    def commit(self, location: str, *arguments: Any, **settings: Any) -> int:
        if len(self.committed) == self.refused:
            raise StoreError("no space left on device")
        version = super().commit(location, *arguments, **settings)
        application, number, is_fenced = settings["app"]
        assert (application, is_fenced) == (TRAINING, True)
        self.numbers.append(number)
        self.committed.append(
            (location.rpartition("/")[2], settings["mode"], settings["partition"])
        )
        return version


def make_commits(tables: Any, lease: FreeLease | None = None) -> Commits:
    return Commits(own_tables(tables, "small"), "run-1", lease or FreeLease())


def write_files(tables: Any) -> TrainedFiles:
    """The files of one wave, written and not committed."""
    booster = {"wave": WAVE.name, "booster_id": "booster", "run_id": "run-1"}
    prediction = {
        "wave": WAVE.name,
        "run_id": "run-1",
        "grain": 2,
        "group_id": '["north","oslo"]',
        "row_key": "[1]",
    }
    files = []
    for contract, row in ((BOOSTERS, booster), (HOLDOUT, prediction)):
        table = pa.Table.from_pylist([row], schema=contract.schema)
        files.append(
            tables.write_file(table, contract.schema, tables.location("small", contract.name))
        )
    return TrainedFiles([], [files[0]], [files[1]])


def ledger_of(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows)).reindex(columns=LEDGER.schema.names)


ROWS = ledger_of(make_ledger_row(booster_id="booster", wave=WAVE.name))


def lose_at(turn: int) -> FreeLease:
    """A lease that is lost when it is asked for the nth time."""
    turns = iter(range(1, 100))

    def refuse() -> None:
        if next(turns) == turn:
            raise StoreError("the fleet was taken over")

    return FreeLease(refuse)


def fleet_of(tables: Any) -> FleetTables:
    return own_tables(tables, "small")


# Order and fence


def test_a_wave_commits_boosters_then_held_out_rows_then_the_ledger_that_names_them() -> None:
    tables = RecordingTables()
    make_commits(tables).wave(WAVE, write_files(tables), ROWS)
    assert tables.committed == [
        ("boosters", "append", {"wave": WAVE.name}),
        ("holdout", "append", {"wave": WAVE.name}),
        ("ledger", "append", {"run_id": "run-1"}),
    ]
    assert fleet_of(tables).ledger("run-1")["booster_id"].tolist() == ["booster"]


def test_a_wave_without_boosters_commits_the_ledger_only() -> None:
    tables = RecordingTables()
    make_commits(tables).wave(
        WAVE, TrainedFiles([], [], []), ledger_of(make_ledger_row(status="failed"))
    )
    assert [name for name, *_ in tables.committed] == ["ledger"]


def test_each_commit_carries_a_number_that_grows_with_the_lease() -> None:
    tables = RecordingTables()
    commits = make_commits(tables, FreeLease(fence=7))
    commits.manifest(make_manifest())
    commits.wave(WAVE, write_files(tables), ROWS)
    commits.ledger(ROWS)
    assert tables.numbers == [7 * COMMITS_PER_LEASE + number for number in range(1, 6)]


def test_every_commit_of_a_later_holder_is_above_all_of_an_earlier_one() -> None:
    tables = RecordingTables()
    first, second = (
        make_commits(tables, FreeLease(fence=1)),
        make_commits(tables, FreeLease(fence=2)),
    )
    for _ in range(3):
        first.manifest(make_manifest())
    second.manifest(make_manifest("run-2"))
    assert tables.numbers == sorted(tables.numbers)
    # The first holder slept through the loss of its lease.
    with pytest.raises(StoreError, match="another run has taken the fleet over"):
        first.manifest(make_manifest(finished_at=None))


# Rows that are replaced


def test_a_run_has_one_manifest_the_last() -> None:
    tables: Any = MemoryTables()
    commits = make_commits(tables)
    commits.manifest(make_manifest(finished_at=None))
    commits.manifest(make_manifest(n_groups=8))
    runs = fleet_of(tables).runs()
    assert runs[["run_id", "n_groups"]].to_numpy().tolist() == [["run-1", 8]]
    assert runs["finished_at"].notna().all()


def test_other_runs_stay_where_a_run_replaces_its_own_rows() -> None:
    tables: Any = MemoryTables()
    Commits(own_tables(tables, "small"), "run-0", FreeLease()).manifest(make_manifest("run-0"))
    make_commits(tables).manifest(make_manifest("run-1"))
    assert sorted(fleet_of(tables).runs()["run_id"]) == ["run-0", "run-1"]


def test_the_complete_ledger_replaces_what_the_waves_left() -> None:
    tables: Any = MemoryTables()
    commits = make_commits(tables)
    commits.wave(WAVE, write_files(tables), ROWS)
    commits.ledger(
        ledger_of(make_ledger_row(weight=0.75), make_ledger_row(0, "[]", status="reused"))
    )
    ledger = fleet_of(tables).ledger("run-1")
    assert ledger["weight"].tolist() == [0.75, 0.5]


# What a failure leaves


@pytest.mark.parametrize("kind", ["manifest", "ledger", "wave"])
def test_a_lost_lease_commits_nothing(kind: str) -> None:
    tables = RecordingTables()
    commits = make_commits(tables, lose_at(1))
    launches = {
        "manifest": lambda: commits.manifest(make_manifest()),
        "ledger": lambda: commits.ledger(ROWS),
        "wave": lambda: commits.wave(WAVE, write_files(tables), ROWS),
    }
    with pytest.raises(StoreError, match="taken over"):
        launches[kind]()
    assert tables.committed == []
    assert not tables.exists(tables.location("small", RUNS.name))


def test_a_lease_that_is_lost_within_a_wave_leaves_no_ledger_row() -> None:
    tables = RecordingTables()
    with pytest.raises(StoreError, match="taken over"):
        make_commits(tables, lose_at(2)).wave(WAVE, write_files(tables), ROWS)
    assert [name for name, *_ in tables.committed] == ["boosters", "holdout"]
    assert fleet_of(tables).ledger("run-1").empty


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_commit_that_fails_within_a_wave_leaves_no_ledger_row_that_names_absent_boosters(
    refused: int,
) -> None:
    tables = RecordingTables(refused=refused)
    with pytest.raises(StoreError, match="no space left"):
        make_commits(tables).wave(WAVE, write_files(tables), ROWS)
    assert len(tables.committed) == refused
    assert fleet_of(tables).ledger("run-1").empty


def test_a_file_that_is_gone_before_its_commit_leaves_no_ledger_row() -> None:
    tables: Any = MemoryTables()
    elsewhere = write_files(MemoryTables())
    with pytest.raises(StoreError, match="is missing or was not written whole"):
        make_commits(tables).wave(WAVE, elsewhere, ROWS)
    assert fleet_of(tables).ledger("run-1").empty


def test_a_manifest_that_cannot_be_replaced_stays() -> None:
    tables = RecordingTables(refused=1)
    commits = make_commits(tables)
    commits.manifest(make_manifest(finished_at=None))
    with pytest.raises(StoreError, match="no space left"):
        commits.manifest(make_manifest())
    assert fleet_of(tables).runs()["finished_at"].isna().tolist() == [True]
