"""Writers that stall between their last look at the lease and their commit: the tables themselves refuse them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipeline.errors import StoreError
from pipeline.models.pack import build_model_spec
from pipeline.runs.commits import Commits
from pipeline.runs.manifest import RunManifest
from pipeline.runs.wave import TrainedFiles, Wave
from pipeline.storage import HeldLease
from pipeline.tables import BOOSTERS, LEDGER, RUNS
from pipeline.testing.doubles import FreeLease, MemoryTables
from pipeline.testing.packs import KINDS, asked_spec
from pipeline.testing.runs import own_tables
from pipeline.training.blend import Constants
from pipeline.training.splits import Cutoffs
from resources.delta_tables import DeltaTables
from resources.lease import hold_lease

FLEET, RUN = "shop", "run-1"
GROUPS = ('["EWR"]', '["JFK"]')
NOON = pd.Timestamp("2026-11-25 12:00", tz="UTC")


class Writer:
    """One process that trains the run; each step is a commit or two."""

    def __init__(self, name: str, tables: Any, lease: HeldLease) -> None:
        self.name = name
        self.tables = tables
        self.commits = Commits(own_tables(tables, FLEET), RUN, lease)

    def steps(self) -> list[Callable[[], None]]:
        return [self.pin, self.train, self.judge, self.finish]

    def pin(self) -> None:
        self.commits.manifest(self.manifest())

    def train(self) -> None:
        wave = Wave(f"{RUN}-{self.name}-0", pd.DataFrame())
        booster = pa.Table.from_pylist(
            [{"wave": wave.name, "booster_id": self.name}], schema=BOOSTERS.schema
        )
        file = self.tables.write_file(
            booster, BOOSTERS.schema, self.tables.location(FLEET, BOOSTERS.name)
        )
        self.commits.wave(wave, TrainedFiles([], [file], []), self.ledger())

    def judge(self) -> None:
        self.commits.ledger(self.ledger())

    def finish(self) -> None:
        self.commits.manifest(replace(self.manifest(), finished_at=NOON))

    def manifest(self) -> RunManifest:
        midnight = pd.Timestamp("2026-11-25")
        return RunManifest(
            run_id=RUN,
            started_at=midnight.tz_localize("UTC"),
            finished_at=None,
            previous_run_id=None,
            request=self.name,
            data_digest="",
            cutoffs=Cutoffs(midnight, midnight, midnight),
            features_version=0,
            spec_digest="",
            constants=Constants(0.0, 0.0),
            n_groups=len(GROUPS),
            model_spec=build_model_spec(asked_spec(), {"kind": KINDS}),
            versions={},
        )

    def ledger(self) -> pd.DataFrame:
        rows = [
            {"run_id": RUN, "grain": 1, "group_id": group, "status": self.name} for group in GROUPS
        ]
        return pa.Table.from_pylist(rows, schema=LEDGER.schema).to_pandas()


def outcomes(tables: Any) -> list[tuple[str, str]]:
    """Group and who trained it, for each ledger row."""
    rows = tables.read_pandas(tables.location(FLEET, LEDGER.name))
    return sorted(zip(rows["group_id"], rows["status"], strict=True))


def lands(step: Callable[[], None]) -> bool:
    """Whether a step was not fenced off."""
    try:
        step()
    except StoreError:
        return False
    return True


def test_in_every_order_of_two_writers_a_finished_run_has_one_row_per_group() -> None:
    orders = list(combinations(range(8), 4))
    n_refused = 0
    for turns in orders:
        tables = MemoryTables()
        stale = Writer("stale", tables, FreeLease(fence=1)).steps()
        later = Writer("later", tables, FreeLease(fence=2)).steps()
        for turn in range(8):
            if turn in turns:
                later.pop(0)()
                continue
            n_refused += not lands(stale.pop(0))
        assert outcomes(tables) == [(group, "later") for group in GROUPS]
        run = tables.read_pandas(tables.location(FLEET, RUNS.name))
        assert run["request"].tolist() == ["later"]
        assert run["finished_at"].notna().all()
    assert n_refused > len(orders)


class StallingLease:
    """A held lease whose holder sleeps after it has looked."""

    def __init__(self, lease: HeldLease, meanwhile: Callable[[], None]) -> None:
        self.lease = lease
        self.meanwhile = meanwhile

    @property
    def fence(self) -> int:
        return self.lease.fence

    def check(self) -> None:
        self.lease.check()
        self.meanwhile()


@pytest.fixture
def tables(tmp_path: Path) -> DeltaTables:
    return DeltaTables(root=str(tmp_path))


def finish_elsewhere(tables: DeltaTables) -> None:
    """Another machine, whose clock says that the lease has expired, finishes the run."""
    with hold_lease(
        tables, FLEET, RUN, now=lambda: datetime.now(UTC) + timedelta(hours=5)
    ) as lease:
        for step in Writer("later", tables, lease).steps():
            step()


@pytest.mark.parametrize("number", range(4))
def test_a_writer_that_sleeps_after_its_check_is_refused_once_another_has_finished_its_run(
    tables: DeltaTables, number: int
) -> None:
    with hold_lease(tables, FLEET, RUN, expiry_seconds=3600) as lease:
        awake = Writer("stale", tables, lease).steps()
        for step in awake[:number]:
            step()
        sleepy = Writer("stale", tables, StallingLease(lease, lambda: finish_elsewhere(tables)))
        with pytest.raises(
            StoreError, match=r"another run has taken the fleet over and committed since.*run again"
        ):
            sleepy.steps()[number]()
    assert outcomes(tables) == [(group, "later") for group in GROUPS]


def test_a_writer_whose_commit_another_overtakes_is_refused_when_it_looks_again(
    tables: DeltaTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = DeltaTable.create_write_transaction
    with hold_lease(tables, FLEET, RUN, expiry_seconds=3600) as lease:
        stale = Writer("stale", tables, lease)
        stale.pin()
        stale.train()

        def overtaken(table: DeltaTable, *args: Any, **more: Any) -> None:
            monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
            finish_elsewhere(tables)
            commit(table, *args, **more)

        monkeypatch.setattr(DeltaTable, "create_write_transaction", overtaken)
        with pytest.raises(StoreError, match="another run has taken the fleet over"):
            stale.train()
    assert outcomes(tables) == [(group, "later") for group in GROUPS]


@pytest.mark.parametrize(
    "lost", [OSError("connection reset"), DeltaError("Generic S3 error: connection reset")]
)
def test_a_commit_whose_answer_was_lost_is_known_to_have_landed(
    tables: DeltaTables, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    commit = DeltaTable.create_write_transaction

    def deaf(table: DeltaTable, *args: Any, **more: Any) -> None:
        commit(table, *args, **more)
        raise lost

    with hold_lease(tables, FLEET, RUN) as lease:
        writer = Writer("only", tables, lease)
        for step in writer.steps()[:2]:
            step()
        monkeypatch.setattr(DeltaTable, "create_write_transaction", deaf)
        for step in writer.steps()[1:]:
            step()
        monkeypatch.undo()
    assert outcomes(tables) == [(group, "only") for group in GROUPS]


def test_a_commit_that_was_lost_is_an_error(
    tables: DeltaTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("connection refused")

    with hold_lease(tables, FLEET, RUN) as lease:
        writer = Writer("only", tables, lease)
        writer.pin()
        monkeypatch.setattr(DeltaTable, "create_write_transaction", refused)
        with pytest.raises(StoreError, match="connection refused"):
            writer.pin()
        monkeypatch.undo()
