"""Runs that follow each other: what is reused, refitted, resumed, sampled, and what harm a group may do."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import DataError, StoreError
from pipeline.models.meta_model import group_id, group_ids
from pipeline.models.start import Start
from pipeline.runs.fingerprints import fingerprint, shared_digest
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.spark import training
from pipeline.spark.execution import without_adaptive_execution
from pipeline.spark.planning import plan_run
from pipeline.spark.training import placed_rows
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from pipeline.tables import LEDGER
from pipeline.testing.data import feature_rows, small_spec
from pipeline.testing.doubles import FailingTrainer, FreeLease
from pipeline.testing.runs import own_tables, quiet_context
from pipeline.testing.tables import write_arrow
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import RATE, train_group
from resources.delta_tables import DeltaTables

pytestmark = [pytest.mark.spark, pytest.mark.slow]

OSLO, NAPOLI = group_id(["north", "oslo"]), group_id(["south", "napoli"])
# Small waves, so that there are several.
SPEC = small_spec(tuning={"checkpoint_seconds": 0.05})
N_GROUPS = 7
SPEC_OF_ONE_WAVE = small_spec(tuning={"checkpoint_seconds": 600})
# What may differ between an interrupted and an uninterrupted run.
OF_THE_RUN = [
    "run_id",
    "source_run_id",
    "wave",
    "seconds",
    "lightgbm_seconds",
    "task",
    "planned_seconds",
]


@dataclass
class Fleet:
    """Tables of one fleet, and runs of it."""

    spark: SparkSession
    root: Path
    spec: FleetSpec = SPEC
    tables: DeltaTables = field(init=False)

    def __post_init__(self) -> None:
        self.tables = DeltaTables(root=str(self.root))

    def plan(self, rows: pd.DataFrame, run_id: str, **asked: Any) -> PlannedRun:
        history = History.read(own_tables(self.tables, "small"))
        return plan_run(
            quiet_context(self.spark),
            self.frame(rows),
            self.spec,
            Request(run_id, **asked),
            history,
        )

    def train(
        self, run: PlannedRun, check: Callable[[], None] = lambda: None, **cluster: Any
    ) -> pd.DataFrame:
        return train_run(
            quiet_context(self.spark, **cluster),
            own_tables(self.tables, "small"),
            run,
            self.spec,
            features_version=0,
            lease=FreeLease(check),
        )

    def launch(self, rows: pd.DataFrame, run_id: str, **asked: Any) -> pd.DataFrame:
        return self.train(self.plan(rows, run_id, **asked))

    def table(self, name: str) -> pd.DataFrame:
        return self.tables.read_pandas(self.tables.location("small", name))

    def frame(self, rows: pd.DataFrame) -> DataFrame:
        zoned = rows.assign(
            **{name: rows[name].dt.tz_localize("UTC") for name in ("time", "known_at")}
        )
        return self.spark.createDataFrame(
            pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
        )


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return feature_rows()


@pytest.fixture(scope="module")
def first(
    spark: SparkSession, rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Fleet, pd.DataFrame]:
    """A fleet that was trained once; do not train it again."""
    fleet = Fleet(spark, tmp_path_factory.mktemp("first"))
    return fleet, fleet.launch(rows, "run-1")


@pytest.fixture
def fleet(first: tuple[Fleet, pd.DataFrame], tmp_path: Path) -> Fleet:
    """The fleet that was trained once, to train again."""
    shutil.copytree(first[0].root, tmp_path / "tables")
    return Fleet(first[0].spark, tmp_path / "tables")


@pytest.fixture
def empty(spark: SparkSession, tmp_path: Path) -> Fleet:
    return Fleet(spark, tmp_path / "tables")


def by_group(ledger: pd.DataFrame, column: str) -> dict[str, Any]:
    return dict(zip(ledger["group_id"], ledger[column], strict=True))


def half_widths(ledger: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of the groups that have some."""
    return {
        group: json.loads(text)
        for group, text in by_group(ledger, "intervals").items()
        if isinstance(text, str)
    }


def changed(rows: pd.DataFrame, city: str) -> pd.DataFrame:
    """The rows, with one early sale of a city corrected."""
    at = rows.index[(rows["city"] == city)][10]
    return rows.assign(sales=rows["sales"].where(rows.index != at, rows["sales"] + 1))


# Nothing changed, something changed


def test_an_unchanged_fleet_is_reused_as_a_whole(
    fleet: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    before, after = first[1], fleet.launch(rows.sample(frac=1.0, random_state=1), "run-2")
    assert set(before["status"]) == {"trained"}
    assert set(after["status"]) == {"reused"}
    kept = [
        "grain",
        "group_id",
        "booster_id",
        "fingerprint",
        "source_run_id",
        "wave",
        "weight",
        "parameters",
        "report_blend",
        "rmse",
    ]
    pd.testing.assert_frame_equal(after[kept], before[kept])
    assert half_widths(after) == {
        group: pytest.approx(halves) for group, halves in half_widths(before).items()
    }
    assert after["seconds"].isna().all()
    assert len(fleet.table("boosters")) == len(first[0].table("boosters"))
    runs = fleet.table("runs").set_index("run_id")
    assert runs.loc["run-2", "previous_run_id"] == "run-1"
    assert set(json.loads(runs.loc["run-2", "waves"])) == set(before["wave"])


def test_late_rows_of_one_group_train_it_and_what_contains_it(
    fleet: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    before, after = first[1], fleet.launch(changed(rows, "oslo"), "run-2")
    statuses = by_group(after, "status")
    anew = {"[]", '["north"]', OSLO}
    assert {group for group, status in statuses.items() if status == "refreshed"} == anew
    assert {group for group, status in statuses.items() if status == "reused"} == set(
        statuses
    ) - anew
    for column in ("booster_id", "source_run_id", "tuned_as_of", "parameters"):
        same = {
            group
            for group in statuses
            if by_group(after, column)[group] == by_group(before, column)[group]
        }
        assert same >= set(statuses) - anew
        assert (same & anew == set()) == (column in ("booster_id", "source_run_id"))
    # Weights are learnt from the rows that all of a group's models have predicted, old and new.
    assert after["report_blend"].notna().all()
    assert (after["report_rows"] == before["report_rows"]).all()
    south = '["south"]'
    assert by_group(after, "report_parent")[south] != by_group(before, "report_parent")[south]
    pooled = after[after["grain"] == 0].iloc[0]
    assert pooled["rmse"] == pytest.approx(before[before["grain"] == 0]["rmse"].iloc[0], rel=0.1)


def test_a_group_that_is_gone_keeps_its_model_and_spoils_no_ones_weight(
    fleet: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    left = rows[rows["city"] != "napoli"]
    before, after = (
        first[1].set_index("group_id"),
        fleet.launch(left, "run-2").set_index("group_id"),
    )
    gone = after.loc[NAPOLI]
    assert (gone["status"], gone["reason"], gone["n_rows"]) == ("reused", "vanished", 0)
    assert (gone["booster_id"], gone["weight"]) == (
        before.loc[NAPOLI, "booster_id"],
        after.loc[OSLO, "weight"],
    )
    assert after.loc["[]", "report_rows"] == before.loc["[]", "report_rows"] * 3 / 4
    alone = (
        Fleet(fleet.spark, fleet.root.parent / "alone").launch(left, "run-1").set_index("group_id")
    )
    assert after.loc['["north"]', "report_constant"] == pytest.approx(
        alone.loc['["north"]', "report_constant"]
    )
    again = fleet.plan(left, "run-3").plan.groups.set_index("group_id")
    assert (again.loc[NAPOLI, "action"], set(again["action"])) == ("reuse", {"reuse"})


def test_only_listed_groups_are_trained_and_the_others_stay(
    fleet: Fleet, rows: pd.DataFrame
) -> None:
    run = fleet.plan(changed(rows, "oslo"), "run-2", retrain="listed", listed=(NAPOLI,))
    assert by_group(run.plan.groups, "action") == {
        group: "train" if group == NAPOLI else "reuse" for group in run.plan.groups["group_id"]
    }
    assert set(run.plan.groups.loc[run.plan.groups["action"] == "reuse", "reason"]) == {
        "not_listed"
    }
    with pytest.raises(DataError, match="did you mean"):
        fleet.plan(rows, "run-2", retrain="listed", listed=(group_id(["south", "napol"]),))


def test_a_first_run_of_listed_groups_judges_their_rows(empty: Fleet, rows: pd.DataFrame) -> None:
    ledger = empty.launch(rows, "run-1", retrain="listed", listed=(OSLO,)).set_index("group_id")
    assert by_group(ledger.reset_index(), "status") == {
        group: "trained" if group == OSLO else "inherited" for group in ledger.index
    }
    assert set(ledger["reason"].dropna()) == {"not_listed"}
    assert ledger.loc[OSLO, "weight"] > 0.5
    assert ledger.loc[OSLO, "report_own"] < ledger.loc[OSLO, "report_parent"]


def test_a_run_of_an_earlier_as_of_does_not_build_on_what_saw_more(
    fleet: Fleet, rows: pd.DataFrame
) -> None:
    earlier = fleet.plan(rows, "run-2", as_of=rows["known_at"].max() - pd.Timedelta(days=1))
    assert (earlier.previous_run_id, earlier.earlier.before) == (None, {})
    assert {Start.from_json(text) for text in earlier.plan.to_train["started_from"]} == {Start()}
    same = fleet.plan(rows, "run-2", as_of=rows["known_at"].max())
    assert (same.previous_run_id, set(same.plan.groups["action"])) == ("run-1", {"reuse"})


def test_another_spec_begins_with_what_was_found_under_the_last(
    fleet: Fleet, rows: pd.DataFrame
) -> None:
    fleet.spec = small_spec(tuning={"seed": 9})
    run = fleet.plan(rows, "run-2")
    assert set(run.plan.groups["action"]) == {"train"}
    starts = {
        group: Start.from_json(text)
        for group, text in by_group(run.plan.groups, "started_from").items()
    }
    assert all(start.refit is None for start in starts.values())
    assert {
        group: len(start.trials) for group, start in starts.items() if group in ("[]", OSLO)
    } == {"[]": 1, OSLO: 2}


def test_new_categories_leave_groups_alone_that_do_not_have_them(
    fleet: Fleet, rows: pd.DataFrame
) -> None:
    at = rows.index[rows["city"] == "oslo"][:40]
    run = fleet.plan(
        rows.assign(kind=rows["kind"].where(~rows.index.isin(at), "a new kind")), "run-2"
    )
    assert run.settings.model_spec.categories["kind"] == ("large", "small", "a new kind")
    assert {
        group for group, action in by_group(run.plan.groups, "action").items() if action != "reuse"
    } == {"[]", '["north"]', OSLO}


# Interruptions


def failing_at(turn: int) -> Callable[[], None]:
    """A check that no longer lets the run commit at its nth turn."""
    turns = iter(range(1, 10**6))

    def check() -> None:
        if next(turns) == turn:
            raise StoreError("the fleet was taken over")

    return check


def without_run(ledger: pd.DataFrame) -> list[dict[str, Any]]:
    """The ledger as it is stored, less what may differ between two runs of the same."""
    stored = pa.Table.from_pandas(ledger, schema=LEDGER.schema, preserve_index=False)
    found: list[dict[str, Any]] = stored.drop_columns(OF_THE_RUN).to_pylist()
    return found


def failing_when_done(fleet: Fleet, *, turn: int) -> Callable[[], None]:
    """A check that no longer lets the run commit once every group is trained, at its nth turn since."""
    turns = iter(range(1, 10**6))

    def check() -> None:
        location = fleet.tables.location("small", "ledger")
        is_done = fleet.tables.exists(location) and len(fleet.table("ledger")) == N_GROUPS
        if is_done and next(turns) == turn:
            raise StoreError("the fleet was taken over")

    return check


@pytest.fixture(
    params=[
        "before the second wave",
        "between its boosters and its ledger rows",
        "before the complete ledger",
        "before the end",
    ]
)
def interrupted(request: pytest.FixtureRequest, empty: Fleet, rows: pd.DataFrame) -> Fleet:
    """A fleet whose first run ended there."""
    # The manifest first, then each wave twice: before its boosters and before its ledger rows.
    checks = {
        "before the second wave": failing_at(4),
        "between its boosters and its ledger rows": failing_at(5),
        "before the complete ledger": failing_when_done(empty, turn=1),
        "before the end": failing_when_done(empty, turn=2),
    }
    with pytest.raises(StoreError, match="taken over"):
        empty.train(empty.plan(rows, "run-a"), checks[request.param])
    return empty


def test_an_interrupted_run_is_finished_as_if_nothing_had_happened(
    interrupted: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    fleet = interrupted
    left = fleet.table("ledger")
    assert 0 < len(left) <= N_GROUPS
    assert fleet.table("runs")["finished_at"].isna().all()
    run = fleet.plan(rows, "run-b")
    assert (run.is_resumed, run.run_id, run.settings.run_id) == (True, "run-a", "run-a")
    actions = run.plan.groups.set_index("group_id")["action"]
    assert set(actions.index[actions == "keep"]) == set(left["group_id"])
    assert set(actions) <= {"keep", "train"}
    ledger, expected = fleet.train(run), first[1]
    assert without_run(ledger) == without_run(expected)
    assert set(ledger["run_id"]) == set(ledger["source_run_id"]) == {"run-a"}
    kept = ledger[ledger["group_id"].isin(left["group_id"])]
    assert by_group(kept, "wave") == by_group(left, "wave")
    # What a wave left that never came to its ledger rows is there, and does not count.
    runs = fleet.table("runs")
    assert runs["run_id"].tolist() == ["run-a"]
    assert set(json.loads(runs["waves"].iloc[0])) == set(ledger["wave"])
    assert len(fleet.table("ledger")) == len(expected)
    assert set(fleet.plan(rows, "run-c").plan.groups["action"]) == {"reuse"}


def test_orphans_of_a_wave_are_there_and_do_not_count(
    empty: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    with pytest.raises(StoreError):
        empty.train(empty.plan(rows, "run-a"), failing_at(3))
    orphans = set(empty.table("holdout")["wave"])
    assert len(orphans) == 1
    assert not empty.tables.exists(empty.tables.location("small", "ledger"))
    ledger = empty.launch(rows, "run-b")
    assert orphans <= set(empty.table("holdout")["wave"])
    assert orphans.isdisjoint(ledger["wave"])
    assert (ledger["report_rows"] == first[1]["report_rows"]).all()


def test_another_request_does_not_resume_but_reuses_what_was_done(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    with pytest.raises(StoreError):
        empty.train(empty.plan(rows, "run-a"), failing_at(4))
    done = set(empty.table("ledger")["group_id"])
    other = empty.plan(rows, "run-b", retrain="stale")
    assert (other.is_resumed, other.run_id) == (False, "run-b")
    assert {
        group
        for group, action in by_group(other.plan.groups, "action").items()
        if action == "reuse"
    } == done
    everything = empty.plan(rows, "run-b", retrain="all")
    assert (everything.is_resumed, set(everything.plan.groups["action"])) == (False, {"train"})
    later = empty.plan(changed(rows, "oslo"), "run-b")
    assert later.is_resumed is False


# Waves end by the clock


def test_a_wave_whose_time_is_over_gives_back_what_it_has_not_started(
    empty: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    # Foreseen to last a moment, and each group takes a second: two slots start two groups, and then no more.
    empty.spec = small_spec(tuning={"checkpoint_seconds": 1.0})

    def train(frame: pd.DataFrame, grain: int, settings: Any, start: Start) -> Outcome:
        time.sleep(1.0)
        return train_group(frame, grain, settings, start)

    run = empty.plan(rows, "run-1")
    groups = run.plan.groups.assign(cost_seconds=0.001)
    ledger = empty.train(replace(run, plan=replace(run.plan, groups=groups)), train=train)
    assert set(ledger["status"]) == {"trained"}
    assert len(ledger) == len(empty.table("boosters")) == N_GROUPS
    assert ledger["wave"].value_counts().max() <= 2
    assert by_group(ledger, "booster_id") == by_group(first[1], "booster_id")


# Samples


def test_a_coarse_groups_sample_is_thin_nested_and_leaves_small_groups_whole(
    spark: SparkSession, empty: Fleet, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAMPLED_WHOLE", 70)
    small = (rows["city"] == "roma") & (rows["time"] >= "2024-03-31")  # 90 rows stay
    seen = rows[~small]
    run = empty.plan(seen, "run-1")
    groups = run.plan.to_train.copy()
    exponents = {0: 2, 1: 1, 2: 0}
    groups["exponent"] = groups["grain"].map(exponents)
    with without_adaptive_execution(spark):
        placed = (
            placed_rows(spark, run.rows, empty.spec, groups)
            .select("grain", "group_id", "city", "row_key", RATE)
            .toPandas()
        )
    kept = {grain: set(of["row_key"]) for grain, of in placed.groupby("grain")}
    roma = set(seen.loc[seen["city"] == "roma", "row_key"])
    assert (
        kept[0] < kept[1] < kept[2] | roma == set(seen["row_key"])
    )  # with so few rows roma has no model of its own
    rates = placed.groupby(["grain", "city"])[RATE].agg(["min", "max"])
    assert (rates["min"] == rates["max"]).all()
    assert rates["min"].to_dict() == {
        (grain, city): 1.0 if city == "roma" else 0.5**exponent
        for grain, exponent in exponents.items()
        for city in ("oslo", "bergen", "roma", "napoli")
        if (grain, city) != (2, "roma")
    }
    assert roma <= kept[0]


def test_a_sampled_fleet_is_judged_on_the_rows_that_all_its_models_have_predicted(
    empty: Fleet,
    first: tuple[Fleet, pd.DataFrame],
    rows: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "SAMPLED_WHOLE", 10)
    tuning = SPEC_OF_ONE_WAVE.tuning.model_copy(update={"max_rows": 400})
    empty.spec = SPEC_OF_ONE_WAVE.model_copy(update={"tuning": tuning})
    run = empty.plan(rows, "run-1")
    groups = run.plan.groups.set_index("group_id")
    assert groups["exponent"].to_dict() == {"[]": 2, '["north"]': 1, '["south"]': 1} | {
        group: 0 for group in groups.index if "," in group
    }
    assert groups.loc["[]", "rows_hash"].endswith("/2")
    ledger, whole = empty.train(run).set_index("group_id"), first[1].set_index("group_id")
    assert set(ledger["status"]) == {"trained"}
    assert 0.1 * 1200 < ledger.loc["[]", ["n_fit", "n_tune", "n_report"]].sum() < 0.45 * 1200
    assert 0.1 < ledger.loc["[]", "report_rows"] / whole.loc["[]", "report_rows"] < 0.45
    assert ledger.loc["[]", "report_constant"] == pytest.approx(
        whole.loc["[]", "report_constant"], rel=0.25
    )
    assert ledger.loc["[]", "rmse"] == pytest.approx(whole.loc["[]", "rmse"], rel=0.5)
    assert ledger.loc[OSLO, "booster_id"] == whole.loc[OSLO, "booster_id"]


# Budgets


def test_what_is_left_of_a_budget_improves_groups(empty: Fleet, rows: pd.DataFrame) -> None:
    empty.spec = small_spec(
        tuning={"checkpoint_seconds": 600, "budget_seconds": 1e6, "max_trials": 3, "patience": 3}
    )
    ledger = empty.launch(rows, "run-1")
    assert len(ledger) == 7
    assert set(ledger["n_trials"]) == {3}
    assert "budget" not in set(ledger["stopped_by"])
    firsts = [Start.from_json(text).trials for text in ledger["started_from"]]
    assert all(len(trials) == 1 for trials in firsts)
    assert len(set(ledger["wave"])) == 1
    assert len(empty.table("boosters")["wave"].unique()) == 2
    assert set(empty.plan(rows, "run-2").plan.groups["action"]) == {"reuse"}


# Harm


def test_a_group_that_kills_spark_workers_is_crashed_and_the_others_are_trained(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    empty.spec = SPEC_OF_ONE_WAVE

    def train(frame: pd.DataFrame, grain: int, settings: Any, start: Start) -> Outcome:
        if grain == 2 and frame["city"].iloc[0] == "oslo":
            os.kill(os.getppid(), signal.SIGKILL)
        return train_group(frame, grain, settings, start)

    ledger = empty.train(
        empty.plan(rows[rows["region"] == "north"], "run-1"), train=train
    ).set_index("group_id")
    assert len(ledger) == 4
    assert (
        ledger.loc[OSLO, "status"],
        ledger.loc[OSLO, "reason"],
        ledger.loc[OSLO, "error_class"],
    ) == ("crashed", "native_crash", "ExecutorLost")
    assert set(ledger.drop(OSLO)["status"]) == {"trained"}
    assert ledger["report_rows"].notna().all()
    assert ledger.loc[OSLO, "weight"] == 0.0


def test_what_is_wrong_with_the_data_is_not_a_groups_fault(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    run = empty.plan(rows, "run-1")
    broken = replace(run, rows=run.rows.where("raise_error('unreadable') IS NULL"))
    with pytest.raises(Exception, match="unreadable"):
        empty.train(broken)
    assert not empty.tables.exists(empty.tables.location("small", "ledger"))


POISONS = {
    "raise": ("failed", "error", "ZeroDivisionError"),
    "few": ("inherited", "too_few_rows", None),
    "constant": ("inherited", "constant_target", None),
    "all null": ("inherited", "no_target", None),
    "infinite": ("inherited", "infinite_target", None),
    "hang": ("failed", "timeout", "TimeoutError"),
    "memory": ("failed", "error", "MemoryError"),
    "KILL": ("crashed", "native_crash", "SIGKILL"),
    "../x": ("trained", None, None),
    "fine": ("trained", None, None),
}


@pytest.fixture(scope="module")
def poisoned() -> pd.DataFrame:
    rows = feature_rows(160, cities={"north": tuple(POISONS)})
    city = rows["city"]
    rows["sales"] = (
        rows["sales"]
        .mask(city == "constant", 3.0)
        .mask(city == "all null", np.nan)
        .mask((city == "infinite") & (rows.index % 5 == 0), np.inf)
    )
    return rows[(city != "few") | (rows["time"] < "2024-01-20")]


def test_poisons_are_rows_of_the_ledger_and_every_other_group_is_trained(
    empty: Fleet, poisoned: pd.DataFrame
) -> None:
    empty.spec = small_spec(
        splits={"report": "20 days", "tune": "30 days"},
        tuning={"checkpoint_seconds": 600, "kill_after_seconds": 15, "max_rounds": 10},
    )
    harm = {group_id(["north", city]): city for city in ("raise", "hang", "memory", "KILL")}
    ledger = empty.train(
        empty.plan(poisoned, "run-1"), train=FailingTrainer(harm), memory_bytes=2 << 30
    )
    found = ledger.set_index("group_id")
    for city, (status, reason, error_class) in POISONS.items():
        row = found.loc[group_id(["north", city])]
        told = (
            row["status"],
            row["reason"],
            row["error_class"] if isinstance(row["error_class"], str) else None,
        )
        assert told == (status, reason, error_class), city
        assert (row["booster_id"] is None or pd.isna(row["booster_id"])) == (status != "trained")
        assert (row["weight"] == 0.0) >= (status != "trained")
    assert set(found.loc[["[]", '["north"]'], "status"]) == {"trained"}
    assert len(ledger) == len(POISONS) + 2
    assert set(empty.table("runs")["finished_at"].notna()) == {True}
    # Whoever failed is tried again; whoever crashed is not, until it changes.
    again = by_group(empty.plan(poisoned, "run-2").plan.groups, "action")
    expected = {"failed": "train", "crashed": "reuse", "trained": "reuse", "inherited": "inherit"}
    by_trainer = {
        "constant": "reuse",
        "infinite": "reuse",
    }  # the others are seen when the run is planned
    assert {city: again[group_id(["north", city])] for city in POISONS} == {
        city: by_trainer.get(city, expected[status]) for city, (status, *_) in POISONS.items()
    }


def test_a_pooled_group_that_crashes_costs_the_others_nothing(
    fleet: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    run = fleet.plan(changed(rows, "oslo"), "run-2")
    ledger = fleet.train(run, train=FailingTrainer({"[]": "KILL"})).set_index("group_id")
    assert ledger["status"].value_counts().to_dict() == {"reused": 4, "refreshed": 2, "crashed": 1}
    assert (
        ledger.loc["[]", "report_rows"] == first[1].set_index("group_id").loc["[]", "report_rows"]
    )
    assert (ledger["weight"] > 0).any()


def test_a_refreshed_fleet_of_noise_trusts_its_models_no_more_than_a_trained_one(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    noise = rows.assign(sales=np.random.default_rng(8).normal(100, 10, len(rows)))
    before = empty.launch(noise, "run-1")
    after = empty.launch(
        noise.assign(sales=noise["sales"].where(noise.index % 40 != 0, noise["sales"] + 0.01)),
        "run-2",
    )
    assert set(after["status"]) == {"refreshed"}
    finest = [ledger.loc[ledger["grain"] == 2, "weight"].mean() for ledger in (before, after)]
    assert finest[1] <= finest[0] + 0.02


def test_a_baseline_that_is_declared_later_is_measured_without_any_training(
    fleet: Fleet, first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    # In another order, too: baselines have names.
    fleet.spec = small_spec(
        tuning={"checkpoint_seconds": 0.05}, baselines={"price itself": "price", **SPEC.baselines}
    )
    before, after = first[1], fleet.launch(rows, "run-2")
    assert set(after["status"]) == {"reused"}
    for old, new in zip(
        before["baselines"].map(json.loads), after["baselines"].map(json.loads), strict=True
    ):
        assert new.pop("price itself")["n"] > 0
        assert {name: pytest.approx(measures) for name, measures in old.items()} == new


def test_rows_of_weight_0_change_no_number(
    spark: SparkSession, rows: pd.DataFrame, tmp_path: Path
) -> None:
    spec = small_spec(target={"weight": "size"}, tuning={"checkpoint_seconds": 600})
    sound = rows.assign(size=1.0)
    junk = sound.assign(sales=1e9, size=0.0, row_key=sound["row_key"] + "?", kind="never sold")
    ledgers = []
    for name, frame in (
        ("sound", sound),
        ("with junk", pd.concat([sound, junk], ignore_index=True)),
    ):
        fleet = Fleet(spark, tmp_path / name, spec)
        run = fleet.plan(frame, "run")
        ledgers.append(fleet.train(run))
        assert run.constants[0] == pytest.approx(
            sound.loc[sound["time"] < run.cutoffs.tune_start, "sales"].mean()
        )
    same = [name for name in ledgers[0].columns if name not in ("n_rows", *OF_THE_RUN)]
    pd.testing.assert_frame_equal(ledgers[0][same], ledgers[1][same])


def test_integer_keys_beyond_53_bits_beside_a_null_key_are_exact(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    numbers = {
        city: 2**53 + 1 + 2 * number
        for number, city in enumerate(sorted(set(rows["city"]) - {"oslo"}))
    }
    cities = pd.array([numbers.get(city) for city in rows["city"]], dtype="Int64")
    ledger = empty.launch(rows.assign(city=cities), "run-1")
    finest = ledger[ledger["grain"] == 2]
    keys = rows[["region", "city"]].drop_duplicates().itertuples(index=False)
    assert set(finest["group_id"]) == {
        group_id([region, numbers.get(city)]) for region, city in keys
    }
    assert finest["report_rows"].gt(0).all()
    assert finest["rmse"].notna().all()
    assert empty.table("runs")["unknown_groups"].tolist() == ["[]"]


# Tables of an earlier release


def test_a_ledger_of_an_earlier_format_is_refused_and_nothing_is_added_to_it(
    fleet: Fleet, rows: pd.DataFrame
) -> None:
    location = fleet.tables.location("small", "ledger")
    before = fleet.table("ledger").drop(columns="intervals").assign(interval=1.0)
    shutil.rmtree(location)
    write_arrow(
        fleet.tables,
        [pa.Table.from_pandas(before, preserve_index=False)],
        pa.Schema.from_pandas(before),
        location,
        mode="overwrite",
    )
    told = (
        r"ledger was written by an earlier version: it has no column intervals, "
        r"expected format 3 .*; move it away .*, or use a new data root"
    )
    with pytest.raises(StoreError, match=told):
        fleet.launch(rows, "run-2")
    # Where it is all that is left, too.
    shutil.rmtree(fleet.tables.location("small", "runs"))
    with pytest.raises(StoreError, match=told):
        fleet.launch(rows, "run-2")
    assert set(fleet.table("ledger")["run_id"]) == {"run-1"}
    shutil.rmtree(location)
    assert set(fleet.launch(rows, "run-2")["status"]) == {"trained"}


# Without pooling


def test_without_pooling_the_finest_groups_are_trained_alone_and_all_rows_judged(
    empty: Fleet, rows: pd.DataFrame
) -> None:
    empty.spec = small_spec(pooling="none")
    ledger = empty.launch(rows, "run-1").set_index("group_id")
    finest = ledger["grain"] == 2
    assert set(ledger[finest]["status"]) == {"trained"}
    assert set(ledger[~finest]["status"]) == {"inherited"}
    assert set(ledger[~finest]["reason"]) == {"pooling_none"}
    assert set(ledger[finest]["weight"]) == {1.0}
    assert ledger["rmse"].notna().all()
    again = empty.launch(rows, "run-2").set_index("group_id")
    assert set(again[finest]["status"]) == {"reused"}
    pd.testing.assert_series_equal(again["rmse"], ledger["rmse"])
    assert again.loc["[]", "reason"] == "pooling_none"


def test_digests_of_a_run_are_those_of_its_ledger(
    first: tuple[Fleet, pd.DataFrame], rows: pd.DataFrame
) -> None:
    fleet, ledger = first
    run = fleet.plan(rows, "run-2")
    shared = shared_digest(run.settings)
    hashes = by_group(run.plan.groups, "rows_hash")
    for row in ledger.to_dict("records"):
        assert row["fingerprint"] == fingerprint(
            hashes[row["group_id"]], shared, row["started_from"]
        )
    assert set(hashes) == {str(name) for keys in SPEC.grains for name in group_ids(rows, keys)}
