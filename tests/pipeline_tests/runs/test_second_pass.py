"""A fleet with a budget of seconds: which groups are searched longer, and when it is spent."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.models.meta_model import GroupKey
from pipeline.models.start import Start
from pipeline.runs.fingerprints import fingerprint, shared_digest
from pipeline.runs.plan import TrainingPlan
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.second_pass import plan_second_pass
from pipeline.spec import FleetSpec
from pipeline.tables import records
from pipeline.testing.data import small_spec
from pipeline.testing.run_parts import lay_out

TrainedRows = dict[GroupKey, dict[str, Any]]
# Seven groups take a second each in the first pass: of four trials at most, and four fits besides,
# one trial and four fits. A longer search takes eight fits instead of five.
N_GROUPS = 7
SECONDS, LONGER_SECONDS = 1.0, 1.6


def spec_of(**tuning: Any) -> FleetSpec:
    return small_spec(tuning={"max_trials": 4, "patience": 3, **tuning})


def train_first_pass(run: PlannedRun, **changes: Any) -> TrainedRows:
    """Ledger rows after the first pass; the later in the plan, the larger a group's error."""
    rows: TrainedRows = {}
    for number, planned in enumerate(records(run.plan.to_train)):
        row = {
            "status": "trained",
            "seconds": SECONDS,
            "n_tune": 10,
            "tune_loss": float(number),
            "parameters": json.dumps({"num_leaves": number}),
            "stopped_by": "max_trials",
        }
        rows[GroupKey.of(planned)] = {**row, **changes}
    return rows


def search_longer(
    spec: FleetSpec, run: PlannedRun, rows: TrainedRows, seconds: float = LONGER_SECONDS
) -> Iterator[TrainingPlan]:
    """Each plan of the second pass, whose groups are then trained in that many seconds each."""
    for plan in plan_second_pass(run, spec, rows):
        yield plan
        for planned in records(plan.groups):
            rows[GroupKey.of(planned)] |= {"stopped_by": "patience", "seconds": seconds}


def passes_of(spec: FleetSpec, seconds: float = LONGER_SECONDS) -> list[list[GroupKey]]:
    """The groups of each plan of a second pass."""
    run = lay_out(spec)
    plans = search_longer(spec, run, train_first_pass(run), seconds)
    return [[GroupKey.of(planned) for planned in records(plan.groups)] for plan in plans]


def by_error(spec: FleetSpec) -> list[GroupKey]:
    """All groups, those with the largest error first."""
    return [GroupKey.of(planned) for planned in records(lay_out(spec).plan.to_train)][::-1]


def test_without_a_budget_there_is_no_second_pass() -> None:
    spec = spec_of()
    run = lay_out(spec)
    rows = train_first_pass(run)
    assert list(plan_second_pass(run, spec, rows)) == []
    assert {row["stopped_by"] for row in rows.values()} == {"max_trials"}


def test_what_is_left_of_a_budget_goes_to_the_largest_errors_and_is_kept() -> None:
    # Seven seconds are spent; four are left, and a group takes two.
    spec = spec_of(budget_seconds=11.0)
    [chosen] = passes_of(spec)
    assert sorted(chosen) == sorted(by_error(spec)[:2])


def test_a_group_of_many_rows_counts_more_than_one_of_few() -> None:
    spec = spec_of(budget_seconds=9.0)
    run = lay_out(spec)
    rows = train_first_pass(run)
    large = GroupKey(2, '["north","oslo"]')
    rows[large] |= {"n_tune": 1000, "tune_loss": 1.0}
    [plan] = search_longer(spec, run, rows)
    assert [GroupKey.of(planned) for planned in records(plan.groups)] == [large]


def test_groups_that_are_not_searched_longer_were_stopped_by_the_budget() -> None:
    spec = spec_of(budget_seconds=11.0)
    run = lay_out(spec)
    rows = train_first_pass(run)
    [plan] = search_longer(spec, run, rows)
    chosen = {GroupKey.of(planned) for planned in records(plan.groups)}
    stopped = {key for key, row in rows.items() if row["stopped_by"] == "budget"}
    assert stopped == set(rows) - chosen


def test_a_spent_budget_leaves_every_group_its_first_model() -> None:
    spec = spec_of(budget_seconds=1e-6)
    run = lay_out(spec)
    rows = train_first_pass(run)
    assert list(plan_second_pass(run, spec, rows)) == []
    assert {row["stopped_by"] for row in rows.values()} == {"budget"}


def test_seconds_of_groups_that_failed_are_spent_too() -> None:
    spec = spec_of(budget_seconds=11.0)
    run = lay_out(spec)
    rows = train_first_pass(run)
    # The one with the smallest error: five seconds more than another group.
    failed = by_error(spec)[-1]
    rows[failed] |= {"status": "failed", "seconds": 4.0}
    assert list(search_longer(spec, run, rows)) == []
    assert rows[failed]["stopped_by"] == "max_trials"


@pytest.mark.parametrize("status", ["failed", "crashed", "inherited", "refreshed"])
def test_only_groups_that_were_tuned_are_searched_longer(status: str) -> None:
    spec = spec_of(budget_seconds=1e6)
    run = lay_out(spec)
    rows = train_first_pass(run, status=status)
    assert list(plan_second_pass(run, spec, rows)) == []
    assert {row["stopped_by"] for row in rows.values()} == {"max_trials"}


def test_where_one_trial_is_all_there_is_nothing_is_left_to_search() -> None:
    spec = spec_of(budget_seconds=1e6, max_trials=1, patience=1)
    run = lay_out(spec)
    rows = train_first_pass(run)
    assert list(plan_second_pass(run, spec, rows)) == []
    assert {row["stopped_by"] for row in rows.values()} == {"max_trials"}


def test_a_large_budget_reaches_every_group_once() -> None:
    spec = spec_of(budget_seconds=1e6)
    chosen = [key for groups in passes_of(spec) for key in groups]
    assert sorted(chosen) == sorted(by_error(spec))


def test_a_plan_is_about_a_wave() -> None:
    # Two slots of two seconds, and a group takes 1.6.
    spec = spec_of(budget_seconds=1e6, checkpoint_seconds=2.0)
    assert [len(groups) for groups in passes_of(spec)] == [2, 2, 2, 1]
    # A group that is longer than a wave is one of its own.
    short_waves = spec_of(budget_seconds=1e6, checkpoint_seconds=0.5)
    assert [len(groups) for groups in passes_of(short_waves)] == [1] * N_GROUPS
    in_order = [key for groups in passes_of(short_waves) for key in groups]
    assert in_order == by_error(short_waves)


def test_seconds_that_were_really_taken_are_spent() -> None:
    # Seven seconds are left for groups that take 1.6 each, as foreseen; they take six.
    spec = spec_of(budget_seconds=14.0, checkpoint_seconds=0.5)
    assert len(passes_of(spec)) == 4
    assert len(passes_of(spec, seconds=6.0)) == 1


def test_a_longer_search_begins_with_the_parameters_that_were_found() -> None:
    spec = spec_of(budget_seconds=1e6)
    run = lay_out(spec)
    rows = train_first_pass(run)
    [plan] = search_longer(spec, run, rows)
    planned_first = {GroupKey.of(planned): planned for planned in records(run.plan.to_train)}
    shared = shared_digest(run.settings)
    for planned in records(plan.groups):
        key = GroupKey.of(planned)
        start = Start.from_json(planned["started_from"])
        assert start == Start(trials=(json.loads(rows[key]["parameters"]),))
        rows_hash = planned_first[key]["rows_hash"]
        assert planned["fingerprint"] == fingerprint(rows_hash, shared, planned["started_from"])
        assert planned["fingerprint"] != planned_first[key]["fingerprint"]
        assert planned["cost_seconds"] == pytest.approx(LONGER_SECONDS)


def test_the_seconds_of_a_second_pass_are_known_and_the_longest_group_comes_first() -> None:
    spec = spec_of(budget_seconds=1e6)
    run = lay_out(spec)
    rows = train_first_pass(run)
    rows[by_error(spec)[2]]["seconds"] = 3.0
    [plan] = search_longer(spec, run, rows)
    assert plan.learnt_from == N_GROUPS
    assert plan.groups["cost_seconds"].is_monotonic_decreasing
    assert GroupKey.of(records(plan.groups)[0]) == by_error(spec)[2]
