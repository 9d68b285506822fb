import heapq
import itertools
from random import Random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.grouping.plan import TASK_SECONDS, TrainingPlan, build_plan, pack_tasks

COUNTS = ["n_rows", "n_target", "n_fit", "n_tune", "n_report"]
groups = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 60), st.integers(0, 60)), max_size=40)
costs_of_groups = st.lists(st.floats(0.01, 20.0), max_size=60).map(lambda costs: sorted(costs, reverse=True))


def counted(rows: list[tuple[int, int, int]]) -> pd.DataFrame:
    records = [
        {"grain": number % 3, "group_id": f'["{number}"]', "n_rows": sum(row) + 5, "n_target": sum(row), **dict(zip(COUNTS[2:], row, strict=True))}
        for number, row in enumerate(rows)
    ]
    return pd.DataFrame(records, columns=["grain", "group_id", *COUNTS]).astype(dict.fromkeys(["grain", *COUNTS], "int64"))


def planned(rows: list[tuple[int, int, int]], *, slots: int = 2) -> TrainingPlan:
    return build_plan(counted(rows), n_features=10, n_fits=7, fit_rows=100, tune_rows=20, slots=slots)


def makespan(costs: list[float], tasks: list[int], slots: int) -> float:
    """Tasks start in order, each on the slot that is free first."""
    loads = [0.0] * slots
    for task in range(max(tasks, default=-1) + 1):
        heapq.heapreplace(loads, loads[0] + sum(cost for cost, at in zip(costs, tasks, strict=True) if at == task))
    return max(loads)


def best_makespan(costs: list[float], slots: int) -> float:
    return min(
        max(sum(cost for cost, at in zip(costs, places, strict=True) if at == slot) for slot in range(slots))
        for places in itertools.product(range(slots), repeat=len(costs))
    )


@given(groups, st.integers(1, 8))
def test_every_group_to_train_has_exactly_one_task(rows: list[tuple[int, int, int]], slots: int) -> None:
    plan = planned(rows, slots=slots)
    train = plan.groups["status"] == "train"
    assert set(plan.groups.loc[train, "task"]) == set(range(plan.n_tasks))
    assert (plan.groups.loc[~train, "task"] == -1).all()
    assert (plan.groups["reason"].isna() == train).all()
    assert (plan.groups.loc[~train, "cost_seconds"] == 0).all()


@given(groups)
def test_groups_and_their_counts_are_conserved(rows: list[tuple[int, int, int]]) -> None:
    before = counted(rows)
    after = planned(rows).groups
    columns = ["grain", "group_id", *COUNTS]
    pd.testing.assert_frame_equal(after[columns].sort_values("group_id", ignore_index=True), before.sort_values("group_id", ignore_index=True))


@given(groups)
def test_the_longest_groups_come_first(rows: list[tuple[int, int, int]]) -> None:
    plan = planned(rows)
    costs = plan.to_train["cost_seconds"]
    assert costs.is_monotonic_decreasing
    loads = plan.to_train.groupby("task")["cost_seconds"].sum().sort_index()
    assert loads.round(9).is_monotonic_decreasing


@given(groups, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_counts(rows: list[tuple[int, int, int]], random: Random) -> None:
    counts = counted(rows)
    order = list(range(len(counts)))
    random.shuffle(order)
    plans = [build_plan(frame, n_features=10, n_fits=7, fit_rows=100, tune_rows=20, slots=2).groups for frame in (counts, counts.iloc[order])]
    pd.testing.assert_frame_equal(*plans)


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=7), st.integers(1, 3))
def test_packing_is_within_grahams_bound_of_the_best(costs: list[float], slots: int) -> None:
    costs = sorted(costs, reverse=True)
    tasks = pack_tasks(costs, slots=slots, task_seconds=1000.0)
    assert makespan(costs, tasks, slots) <= (4 / 3 - 1 / (3 * slots)) * best_makespan(costs, slots) + 1e-9


@given(costs_of_groups, st.integers(1, 8))
def test_no_slot_waits_for_more_than_one_task(costs: list[float], slots: int) -> None:
    tasks = pack_tasks(costs, slots=slots)
    loads = pd.Series(costs, dtype=float).groupby(tasks).sum() if costs else pd.Series([0.0])
    assert makespan(costs, tasks, slots) <= sum(costs) / slots + (1 - 1 / slots) * loads.max() + 1e-9


@given(costs_of_groups, st.integers(1, 8))
def test_tasks_are_numbered_longest_first_and_giants_stand_alone(costs: list[float], slots: int) -> None:
    tasks = pack_tasks(costs, slots=slots)
    assert len(tasks) == len(costs)
    assert set(tasks) == set(range(len(set(tasks))))
    loads = pd.Series(costs, dtype=float).groupby(tasks).sum() if costs else pd.Series(dtype=float)
    assert loads.round(9).is_monotonic_decreasing
    assert all(tasks.count(task) == 1 for cost, task in zip(costs, tasks, strict=True) if cost >= TASK_SECONDS)


@pytest.mark.parametrize("slots", [2, 3, 4, 8])
@pytest.mark.parametrize("n_groups", [90, 137, 1000])
def test_many_small_groups_fill_every_slot_to_the_end(slots: int, n_groups: int) -> None:
    costs = [0.1] * n_groups
    assert makespan(costs, pack_tasks(costs, slots=slots), slots) <= 1.1 * sum(costs) / slots + 0.1


def test_tasks_of_many_small_groups_last_a_few_seconds() -> None:
    costs = [0.1] * 2000
    loads = pd.Series(costs).groupby(pack_tasks(costs, slots=4)).sum()
    assert loads.between(2, 5).all()


def test_every_slot_has_work_where_groups_are_enough() -> None:
    assert len(set(pack_tasks([0.1] * 10, slots=8))) == 8
    assert len(set(pack_tasks([0.1] * 3, slots=8))) == 3


def test_why_a_group_is_not_trained() -> None:
    groups = planned([(0, 0, 0), (99, 20, 5), (100, 19, 5), (100, 20, 0)]).groups.set_index("group_id")
    assert groups["reason"].to_dict() == {'["0"]': "no_target", '["1"]': "too_few_rows", '["2"]': "too_few_rows", '["3"]': None}
    assert groups.loc['["3"]', "status"] == "train"


def test_a_plan_may_be_empty() -> None:
    plan = planned([])
    assert plan.n_tasks == 0
    assert plan.predicted_seconds == 0
    assert pack_tasks([], slots=4) == []


def test_a_plan_speaks_to_people() -> None:
    text = planned([(0, 0, 0), (50, 20, 5), (2000, 20, 5)]).describe()
    assert text.startswith("3 groups: 1 to train, 1 ")
    assert "1 no_target" in text
    assert "1 too_few_rows" in text
    assert "1 tasks on 2 slots" in text
