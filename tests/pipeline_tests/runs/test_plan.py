import heapq
import itertools
import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.start import CrossSelection, Start, Winner
from pipeline.periods import Period
from pipeline.runs.fingerprints import fingerprint
from pipeline.runs.history import EarlierRuns
from pipeline.runs.plan import (
    LAST_SHARES,
    TASK_SECONDS,
    CostModel,
    Policy,
    TrainingPlan,
    assign_waves,
    build_plan,
    pack_tasks,
)

COUNTS = ["n_rows", "n_target", "n_fit", "n_tune", "n_report"]
AS_OF = pd.Timestamp("2024-06-01")
groups = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=40
)
costs_of_groups = st.lists(st.floats(0.01, 20.0), max_size=60).map(
    lambda costs: sorted(costs, reverse=True)
)
Row = Mapping[str, Any]


def counted(rows: Sequence[tuple[int, int, int]]) -> pd.DataFrame:
    records = [
        {
            "grain": number % 3,
            "group_id": f'["{number}"]',
            "parent_id": f'["{number - 1}"]' if number % 3 else None,
            "n_rows": sum(row) + 5,
            "n_target": sum(row),
            **dict(zip(COUNTS[2:], row, strict=True)),
            "rows_hash": f"{number}-{sum(row)}",
        }
        for number, row in enumerate(rows)
    ]
    columns = ["grain", "group_id", "parent_id", *COUNTS, "rows_hash"]
    return pd.DataFrame(records, columns=columns).astype(dict.fromkeys(["grain", *COUNTS], "int64"))


def policy(**changes: Any) -> Policy:
    settings: dict[str, Any] = {
        "retrain": "changed",
        "listed": (),
        "retune_after": Period.parse("1 month"),
        "as_of": AS_OF,
        "shared": "shared",
        "fit_rows": 100,
        "tune_rows": 20,
        **changes,
    }
    return Policy(**settings)


NOTHING = EarlierRuns()
PRIOR = CostModel(n_features=10, n_trials=7)


def plan_of(
    counts: pd.DataFrame,
    memory: EarlierRuns = NOTHING,
    *,
    slots: int = 2,
    checkpoint_seconds: float = 60,
    cost_model: CostModel = PRIOR,
    **changes: Any,
) -> TrainingPlan:
    return build_plan(
        counts,
        policy(**changes),
        memory,
        cost_model,
        slots=slots,
        checkpoint_seconds=checkpoint_seconds,
    )


def planned(rows: Sequence[tuple[int, int, int]], *, slots: int = 2) -> TrainingPlan:
    return plan_of(counted(rows), slots=slots)


def makespan(costs: list[float], tasks: list[int], slots: int) -> float:
    """Tasks start in order, each on the slot that is free first."""
    loads = [0.0] * slots
    for task in range(max(tasks, default=-1) + 1):
        heapq.heapreplace(
            loads, loads[0] + sum(cost for cost, at in zip(costs, tasks, strict=True) if at == task)
        )
    return max(loads)


def best_makespan(costs: list[float], slots: int) -> float:
    return min(
        max(
            sum(cost for cost, at in zip(costs, places, strict=True) if at == slot)
            for slot in range(slots)
        )
        for places in itertools.product(range(slots), repeat=len(costs))
    )


@given(groups, st.integers(1, 8), st.sampled_from([0.01, 0.1, 1.0, 60.0]))
def test_every_group_is_in_exactly_one_task_of_one_wave(
    rows: list[tuple[int, int, int]], slots: int, checkpoint_seconds: float
) -> None:
    plan = plan_of(counted(rows), slots=slots, checkpoint_seconds=checkpoint_seconds)
    assert sorted(plan.groups["group_id"]) == sorted(counted(rows)["group_id"])
    trained = plan.groups["action"] == "train"
    assert plan.to_train.index.tolist() == plan.groups.index[trained].tolist()
    assert set(plan.to_train["wave"]) == set(range(plan.n_waves))
    for _, wave in plan.to_train.groupby("wave"):
        assert set(wave["task"]) == set(range(wave["task"].nunique()))
    assert plan.n_tasks == len(plan.to_train.groupby(["wave", "task"]))
    assert (plan.groups.loc[~trained, ["wave", "task"]] == -1).all(axis=None)
    assert (plan.groups["reason"].isna() == trained).all()
    assert (plan.groups.loc[~trained, "cost_seconds"] == 0).all()


@given(groups)
def test_groups_and_their_counts_are_conserved(rows: list[tuple[int, int, int]]) -> None:
    before = counted(rows)
    after = planned(rows).groups
    pd.testing.assert_frame_equal(
        after[list(before.columns)].sort_values("group_id", ignore_index=True),
        before.sort_values("group_id", ignore_index=True),
    )


@given(groups, st.sampled_from([0.05, 1.0, 60.0]))
def test_the_longest_groups_come_first(
    rows: list[tuple[int, int, int]], checkpoint_seconds: float
) -> None:
    plan = plan_of(counted(rows), checkpoint_seconds=checkpoint_seconds)
    assert plan.to_train["cost_seconds"].is_monotonic_decreasing
    loads = plan.to_train.groupby(["wave", "task"])["cost_seconds"].sum().sort_index()
    assert loads.round(9).is_monotonic_decreasing


@given(groups, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_counts(
    rows: list[tuple[int, int, int]], random: Random
) -> None:
    counts = counted(rows)
    order = list(range(len(counts)))
    random.shuffle(order)
    memory = EarlierRuns(
        before={
            (0, '["gone"]'): ledger_row("gone", "", 0),
            (2, '["2"]'): ledger_row("2", "other", 2),
        }
    )
    plans = [plan_of(frame, memory).groups for frame in (counts, counts.iloc[order])]
    pd.testing.assert_frame_equal(*plans)


@given(costs_of_groups, st.integers(1, 8), st.floats(0.5, 60))
def test_waves_keep_all_slots_busy_for_about_the_checkpoint(
    costs: list[float], slots: int, checkpoint_seconds: float
) -> None:
    tasks = pack_tasks(costs, slots=slots)
    waves, numbers = assign_waves(tasks, costs, slots=slots, wave_seconds=checkpoint_seconds)
    assert len(waves) == len(numbers) == len(costs)
    work = pd.Series(costs, dtype=float).groupby(waves).sum() if costs else pd.Series(dtype=float)
    longest = (
        pd.Series(costs, dtype=float).groupby(tasks).sum() if costs else pd.Series(dtype=float)
    )
    assert sorted(set(waves)) == list(range(len(work)))
    for wave, seconds in work.items():
        assert seconds < checkpoint_seconds * slots + longest.max() + 1e-9
        if wave < len(work) - 1:
            assert seconds > checkpoint_seconds * slots - longest.max() - 1e-9
    # A task is in one wave, and keeps its place in the order.
    assert len(set(zip(waves, numbers, strict=True))) == len(set(tasks))
    assert [
        task for _, task in sorted(zip(zip(waves, numbers, strict=True), tasks, strict=True))
    ] == sorted(tasks)


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=7), st.integers(1, 3))
def test_packing_is_within_grahams_bound_of_the_best(costs: list[float], slots: int) -> None:
    costs = sorted(costs, reverse=True)
    tasks = pack_tasks(costs, slots=slots, task_seconds=1000.0)
    assert (
        makespan(costs, tasks, slots)
        <= (4 / 3 - 1 / (3 * slots)) * best_makespan(costs, slots) + 1e-9
    )


@given(costs_of_groups, st.integers(1, 8))
def test_no_slot_waits_for_more_than_one_task(costs: list[float], slots: int) -> None:
    tasks = pack_tasks(costs, slots=slots)
    loads = pd.Series(costs, dtype=float).groupby(tasks).sum() if costs else pd.Series([0.0])
    assert (
        makespan(costs, tasks, slots) <= sum(costs) / slots + (1 - 1 / slots) * loads.max() + 1e-9
    )


@given(costs_of_groups, st.integers(1, 8))
def test_tasks_are_numbered_longest_first_and_giants_stand_alone(
    costs: list[float], slots: int
) -> None:
    tasks = pack_tasks(costs, slots=slots)
    assert len(tasks) == len(costs)
    assert set(tasks) == set(range(len(set(tasks))))
    loads = pd.Series(costs, dtype=float).groupby(tasks).sum() if costs else pd.Series(dtype=float)
    assert loads.round(9).is_monotonic_decreasing
    assert all(
        tasks.count(task) == 1
        for cost, task in zip(costs, tasks, strict=True)
        if cost >= TASK_SECONDS
    )


@pytest.mark.parametrize("slots", [2, 3, 4, 8])
@pytest.mark.parametrize("n_groups", [90, 137, 1000])
def test_many_small_groups_fill_every_slot_to_the_end(slots: int, n_groups: int) -> None:
    costs = [0.1] * n_groups
    assert makespan(costs, pack_tasks(costs, slots=slots), slots) <= 1.1 * sum(costs) / slots + 0.1


def test_tasks_of_many_small_groups_last_a_few_seconds() -> None:
    costs = [0.1] * 2000
    loads = pd.Series(costs).groupby(pack_tasks(costs, slots=4)).sum()
    last = 4 * len(LAST_SHARES)
    assert loads[:-last].between(2, 5).all()
    assert loads[-last:].tolist() == pytest.approx(
        [TASK_SECONDS / 2] * 4 + [TASK_SECONDS / 4] * 8, abs=0.1
    )


def test_every_slot_has_work_where_groups_are_enough() -> None:
    assert len(set(pack_tasks([0.1] * 10, slots=8))) == 8
    assert len(set(pack_tasks([0.1] * 3, slots=8))) == 3


def test_why_a_group_is_not_trained() -> None:
    groups = planned(
        [(500, 50, 5), (0, 0, 0), (99, 20, 5), (500, 50, 5), (100, 19, 5), (100, 20, 0)]
    ).groups.set_index("group_id")
    reasons = {number: groups.loc[f'["{number}"]', "reason"] for number in (1, 2, 4, 5)}
    assert reasons == {1: "no_target", 2: "too_few_rows", 4: "too_few_rows", 5: None}
    assert groups.loc['["5"]', "action"] == "train"


def test_the_pooled_group_is_sent_to_a_worker_whatever_it_has_to_judge_all_rows() -> None:
    plan = planned([(0, 0, 0), (500, 50, 5)])
    assert plan.to_train["grain"].tolist() == [1, 0]


def test_a_plan_of_one_empty_group_is_a_plan() -> None:
    plan = plan_of(counted([(500, 50, 5), (0, 0, 0)]).iloc[1:])
    assert (plan.n_tasks, plan.n_waves, plan.predicted_seconds) == (0, 0, 0)
    assert pack_tasks([], slots=4) == []
    assert assign_waves([], [], slots=4, wave_seconds=1) == ([], [])


def test_a_plan_speaks_to_people() -> None:
    memory = EarlierRuns(before={(2, '["2"]'): ledger_row("2", f"2-{2025}", 2)})
    text = plan_of(
        counted([(2000, 20, 5), (0, 0, 0), (2000, 20, 5), (2000, 20, 5), (50, 20, 5)]), memory
    ).describe()
    assert text.startswith("5 groups: 2 to train, 1 unchanged (reused), 1 ")
    assert "1 no_target" in text
    assert "1 too_few_rows" in text
    assert text.endswith("; 1 to 3 s on 2 slots, estimated (no history yet)")
    model = CostModel(10, 7, 1.0, 1.0, 43)
    learnt = plan_of(counted([(2000, 20, 5)] * 3), cost_model=model).describe()
    assert learnt == (
        "3 groups: 3 to train; 3 tasks in 3 waves on 2 slots, about 468 s, "
        "estimated from 43 earlier groups"
    )
    assert (
        plan_of(counted([(0, 0, 0)]).assign(grain=1)).describe()
        == "1 groups: 1 no_target; nothing to train"
    )


# What earlier runs left

PARAMETERS = {"learning_rate": 0.03, "num_leaves": 7}
CROSS = CrossSelection(
    "2024-04-01T00:00:00", Winner({"num_leaves": 5}, 20), Winner({"num_leaves": 7}, 40)
)
FIT = (500, 50, 5)


def ledger_row(
    number: str, rows_hash: str, grain: int = 1, start: Start | None = None, **changes: Any
) -> Row:
    """A row as an earlier run left it, of a group with these rows."""
    started_from = (start or Start()).to_json()
    return {
        "grain": grain,
        "group_id": f'["{number}"]',
        "parent_id": None,
        "status": "trained",
        "reason": None,
        "started_from": started_from,
        "fingerprint": fingerprint(rows_hash, "shared", started_from),
        "parameters": json.dumps(PARAMETERS, sort_keys=True),
        "n_rounds": 31,
        "cross_selection": CROSS.to_json(),
        "tuned_as_of": pd.Timestamp("2024-05-20", tz="UTC"),
        **changes,
    }


SAME, OTHER = "1-555", "1-554"


def decided(
    before: Row | None,
    *,
    parent: Row | None = None,
    kept: Row | None = None,
    unfinished: Row | None = None,
    **changes: Any,
) -> Row:
    """What is decided for the group ["1"] of grain 1, whose rows' hash is SAME."""
    key, over = (1, '["1"]'), (0, '["0"]')
    memory = EarlierRuns(
        kept={} if kept is None else {key: kept},
        before={at: row for at, row in ((key, before), (over, parent)) if row is not None},
        unfinished={} if unfinished is None else {key: unfinished},
        same_spec=changes.pop("same_spec", True),
    )
    groups = plan_of(counted([FIT, FIT, FIT]), memory, **changes).groups.set_index("group_id")
    found: Row = groups.loc['["1"]'].to_dict()
    return found


def test_an_unchanged_group_is_reused() -> None:
    found = decided(ledger_row("1", SAME))
    assert (found["action"], found["reason"], found["wave"], found["cost_seconds"]) == (
        "reuse",
        None,
        -1,
        0.0,
    )
    assert found["fingerprint"] == ledger_row("1", SAME)["fingerprint"]


@pytest.mark.parametrize("retrain", ["changed", "stale"])
def test_a_changed_group_tuned_lately_is_refitted_with_its_last_parameters(retrain: str) -> None:
    found = decided(ledger_row("1", OTHER), retrain=retrain)
    start = Start.from_json(found["started_from"])
    assert (found["action"], start.refit, start.n_rounds, start.trials) == (
        "refresh",
        PARAMETERS,
        31,
        (),
    )
    assert start.cross == CROSS
    assert found["fingerprint"] == fingerprint(SAME, "shared", found["started_from"])
    assert found["cost_seconds"] < decided(None)["cost_seconds"]


@pytest.mark.parametrize(
    "changes",
    [
        {"same_spec": False},
        {"retune_after": Period.parse("0 days")},
        {"retune_after": Period.parse("12 days")},
        {"as_of": pd.Timestamp("2024-06-20")},
        {"retrain": "all"},
        {"retrain": "listed", "listed": ('["1"]',)},
    ],
)
def test_a_group_that_is_tuned_again_begins_with_its_own_then_its_parents_parameters(
    changes: dict[str, Any],
) -> None:
    parent = ledger_row("0", "0-554", 0, parameters=json.dumps({"num_leaves": 3}))
    found = decided(ledger_row("1", OTHER), parent=parent, **changes)
    start = Start.from_json(found["started_from"])
    assert (found["action"], start.refit, start.trials) == (
        "train",
        None,
        (PARAMETERS, {"num_leaves": 3}),
    )


def test_a_group_tuned_by_an_earlier_release_without_winners_of_halves_is_tuned_again() -> None:
    found = decided(ledger_row("1", OTHER, cross_selection=None))
    assert (found["action"], Start.from_json(found["started_from"]).trials) == (
        "train",
        (PARAMETERS,),
    )


def test_a_refit_whose_tune_rows_chose_it_is_not_taken_over() -> None:
    def unchanged(start: Start) -> Row:
        row = ledger_row("1", SAME, status="refreshed", started_from=start.to_json())
        return decided(row | {"fingerprint": fingerprint(SAME, "shared", start.to_json())})

    assert unchanged(Start(refit=PARAMETERS, n_rounds=31))["action"] == "refresh"
    assert unchanged(Start(refit=PARAMETERS, n_rounds=31, cross=CROSS))["action"] == "reuse"


def test_the_day_of_retuning_counts_as_long_ago() -> None:
    tuned = pd.Timestamp("2024-05-01", tz="UTC")
    assert decided(ledger_row("1", OTHER, tuned_as_of=tuned))["action"] == "train"
    assert (
        decided(ledger_row("1", OTHER, tuned_as_of=tuned + pd.Timedelta(seconds=1)))["action"]
        == "refresh"
    )


def test_a_new_group_begins_with_its_parents_parameters() -> None:
    start = Start.from_json(decided(None, parent=ledger_row("0", "0-554", 0))["started_from"])
    assert start.trials == (PARAMETERS,)


def test_parameters_of_a_parent_without_a_model_are_not_tried() -> None:
    parent = ledger_row("0", "0-554", 0, status="inherited", parameters=None)
    assert Start.from_json(decided(None, parent=parent)["started_from"]) == Start()


def test_stale_tunes_what_was_tuned_long_ago_though_it_is_unchanged() -> None:
    long_ago = ledger_row("1", SAME, tuned_as_of=pd.Timestamp("2024-04-01", tz="UTC"))
    assert decided(long_ago)["action"] == "reuse"
    found = decided(long_ago, retrain="stale")
    assert (found["action"], Start.from_json(found["started_from"]).trials) == (
        "train",
        (PARAMETERS,),
    )
    assert decided(ledger_row("1", SAME), retrain="stale")["action"] == "reuse"


def test_all_trains_what_is_unchanged() -> None:
    assert decided(ledger_row("1", SAME), retrain="all")["action"] == "train"


@pytest.mark.parametrize("rows_hash", [SAME, OTHER])
def test_listed_trains_the_listed_and_keeps_the_others_as_they_are(rows_hash: str) -> None:
    assert (
        decided(ledger_row("1", rows_hash), retrain="listed", listed=('["1"]',))["action"]
        == "train"
    )
    found = decided(ledger_row("1", rows_hash), retrain="listed", listed=('["2"]',))
    assert (found["action"], found["reason"]) == ("reuse", "not_listed")
    assert found["fingerprint"] == ledger_row("1", rows_hash)["fingerprint"]
    fresh = decided(None, retrain="listed", listed=('["2"]',))
    assert (fresh["action"], fresh["reason"]) == ("inherit", "not_listed")


def test_the_pooled_group_judges_all_rows_even_where_only_others_are_listed() -> None:
    listed = {"retrain": "listed", "listed": ('["1"]',)}
    fresh = plan_of(counted([FIT, FIT]), **listed).groups.set_index("group_id").loc['["0"]']
    assert (fresh["action"], fresh["reason"], Start.from_json(fresh["started_from"]).judge) == (
        "train",
        "not_listed",
        True,
    )
    memory = EarlierRuns(
        before={
            (0, '["0"]'): ledger_row("0", "other", 0, status="inherited", reason="constant_target")
        }
    )
    later = plan_of(counted([FIT, FIT]), memory, **listed).groups.set_index("group_id").loc['["0"]']
    assert (later["action"], later["fingerprint"]) == (
        "reuse",
        memory.before[0, '["0"]']["fingerprint"],
    )


@pytest.mark.parametrize("status", ["trained", "refreshed", "reused"])
def test_a_vanished_group_keeps_its_booster(status: str) -> None:
    memory = EarlierRuns(before={(1, '["gone"]'): ledger_row("gone", "x", status=status)})
    groups = plan_of(counted([FIT, FIT]), memory).groups.set_index("group_id")
    assert len(groups) == 3
    gone = groups.loc['["gone"]']
    assert (gone["action"], gone["reason"], gone["n_rows"], gone["n_fit"]) == (
        "reuse",
        "vanished",
        0,
        0,
    )


@pytest.mark.parametrize("status", ["inherited", "failed", "crashed"])
def test_a_vanished_group_without_a_booster_keeps_a_row(status: str) -> None:
    memory = EarlierRuns(before={(1, '["gone"]'): ledger_row("gone", "x", status=status)})
    gone = plan_of(counted([FIT, FIT]), memory).groups.set_index("group_id").loc['["gone"]']
    assert (gone["action"], gone["reason"]) == ("inherit", "vanished")


def test_a_failed_group_is_tried_again() -> None:
    assert decided(ledger_row("1", SAME, status="failed"))["action"] == "train"


def test_a_crashed_group_is_not_tried_again_until_it_changes() -> None:
    assert decided(ledger_row("1", SAME, status="crashed"))["action"] == "reuse"
    assert decided(ledger_row("1", SAME, status="crashed"), retrain="stale")["action"] == "reuse"
    assert decided(ledger_row("1", OTHER, status="crashed"))["action"] == "train"


@pytest.mark.parametrize("retrain", ["changed", "stale", "all"])
@pytest.mark.parametrize("status", ["trained", "refreshed", "failed", "crashed", "inherited"])
def test_what_was_done_before_the_interruption_is_kept(retrain: str, status: str) -> None:
    start = Start(trials=(PARAMETERS,))
    found = decided(None, kept=ledger_row("1", SAME, start=start, status=status), retrain=retrain)
    assert (found["action"], found["started_from"], found["wave"]) == ("keep", start.to_json(), -1)


def test_what_the_interrupted_run_did_with_other_rows_is_not_kept() -> None:
    assert decided(None, kept=ledger_row("1", OTHER))["action"] == "train"


def test_what_another_unfinished_run_did_is_reused() -> None:
    assert decided(ledger_row("1", OTHER), unfinished=ledger_row("1", SAME))["action"] == "reuse"
    assert (
        decided(ledger_row("1", OTHER), unfinished=ledger_row("1", "third"))["action"] == "refresh"
    )
    assert decided(None, unfinished=ledger_row("1", SAME, status="failed"))["action"] == "train"
    assert decided(None, unfinished=ledger_row("1", SAME), retrain="all")["action"] == "train"


def test_a_group_with_too_few_rows_now_is_not_kept_alive_by_its_past() -> None:
    assert decided(ledger_row("1", SAME), fit_rows=501)["reason"] == "too_few_rows"


def test_without_pooling_only_the_finest_grain_is_trained_and_the_pooled_group_judges() -> None:
    groups = plan_of(counted([FIT, FIT, FIT]), finest_only=True).groups.set_index("group_id")
    assert groups["action"].to_dict() == {'["0"]': "train", '["1"]': "inherit", '["2"]': "train"}
    assert groups.loc['["1"]', "reason"] == "pooling_none"
    judges = {
        group: Start.from_json(text).judge
        for group, text in groups["started_from"].dropna().items()
    }
    assert judges == {'["0"]': True, '["2"]': False}


def test_without_pooling_and_coarse_grains_the_one_grain_is_trained() -> None:
    groups = plan_of(counted([FIT]), finest_only=True).groups
    assert not Start.from_json(groups["started_from"].iloc[0]).judge


def test_a_first_pass_tries_no_more_than_it_may() -> None:
    assert Start.from_json(decided(None, max_trials=1)["started_from"]).max_trials == 1


# Costs

SLOW = CostModel(10, 7, fit_seconds=1, work_seconds=1)


def ledger_of(model: CostModel, n: int, **changes: Any) -> pd.DataFrame:
    rows = [500.0 * (number + 1) for number in range(n)]
    seconds = [float(model.predict(n_rows, is_refit=False)) for n_rows in rows]
    return pd.DataFrame({"status": "trained", "n_target": rows, "seconds": seconds, **changes})


def test_costs_are_learnt_from_what_groups_took() -> None:
    real = CostModel(10, 7, fit_seconds=0.4, work_seconds=0.003)
    found = PRIOR.learnt(ledger_of(real, 20))
    assert (found.fit_seconds, found.work_seconds, found.learnt_from) == (
        pytest.approx(0.4),
        pytest.approx(0.003),
        20,
    )


def test_refreshed_groups_are_counted_with_their_few_fits() -> None:
    real = CostModel(10, 7, fit_seconds=0.4, work_seconds=0.003)
    ledger = ledger_of(real, 20, status="refreshed")
    ledger["seconds"] = real.predict(ledger["n_target"], is_refit=True)
    found = PRIOR.learnt(pd.concat([ledger, ledger_of(real, 20)]))
    assert (found.fit_seconds, found.work_seconds) == (pytest.approx(0.4), pytest.approx(0.003))


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "reused"},
        {"status": "failed"},
        {"seconds": None},
        {"seconds": 0.0},
        {"n_target": 0},
    ],
)
def test_groups_that_were_not_trained_teach_no_costs(changes: dict[str, Any]) -> None:
    ledger = ledger_of(SLOW, 20).assign(**changes).astype({"seconds": float})
    assert PRIOR.learnt(ledger) == PRIOR


def test_a_handful_of_groups_teach_no_costs() -> None:
    assert PRIOR.learnt(ledger_of(SLOW, 7)) == PRIOR
    assert PRIOR.learnt(ledger_of(SLOW, 8)).learnt_from == 8


def test_learnt_costs_are_never_zero_or_below() -> None:
    falling = ledger_of(PRIOR, 20).assign(seconds=[20.0 - number for number in range(20)])
    found = PRIOR.learnt(falling)
    assert found.work_seconds == PRIOR.work_seconds / 100
    assert found.fit_seconds > 0
    assert found.predict(10**6, is_refit=False) > 0


def test_a_refit_of_earlier_recipes_trains_nothing_else() -> None:
    refit = Start(refit={"num_leaves": 3}, n_rounds=7, cross=CROSS)
    plan = plan_of(
        counted([(200, 40, 40)] * 3), recipes={(0, '["0"]'): refit, (1, '["1"]'): Start(judge=True)}
    )
    found = plan.groups.set_index("group_id")
    assert found["action"].to_dict() == {'["0"]': "refresh", '["1"]': "inherit", '["2"]': "inherit"}
    assert found.loc['["0"]', "started_from"] == refit.to_json()


def test_a_refit_takes_over_what_an_interrupted_one_has_fitted() -> None:
    refit = Start(refit={"num_leaves": 3}, n_rounds=7, cross=CROSS)
    recipes = {(0, '["0"]'): refit}
    counts = counted([(200, 40, 40)])
    (wanted,) = plan_of(counts, recipes=recipes).groups["fingerprint"]
    done = {(0, '["0"]'): {"fingerprint": wanted, "status": "refreshed"}}
    assert plan_of(counts, EarlierRuns(kept=done), recipes=recipes).groups["action"].tolist() == [
        "keep"
    ]
    assert plan_of(counts, EarlierRuns(unfinished=done), recipes=recipes).groups[
        "action"
    ].tolist() == ["reuse"]
