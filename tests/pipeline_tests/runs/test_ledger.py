"""One ledger row per group, whatever became of it."""

from typing import Any

import pandas as pd
import pytest

from pipeline.models.meta_model import GroupKey
from pipeline.runs.history import EarlierRuns
from pipeline.runs.ledger import (
    CRASHED_ALONE,
    LOST,
    complete_ledger,
    groups_with_model,
    ledger_rows,
    trained_row,
    waves_of,
)
from pipeline.tables import LEDGER
from pipeline.testing.data import small_spec
from pipeline.testing.run_parts import CUTOFFS, make_ledger_row, make_planned_run
from pipeline.training.blend import GroupSkill

POOLED, OSLO, ROMA = "[]", '["north","oslo"]', '["south","roma"]'
SPEC = small_spec()
AS_OF = CUTOFFS.as_of.tz_localize("UTC")
LONG_AGO = pd.Timestamp("2024-01-01", tz="UTC")
TRAINED = {"status": "trained", "reason": None, "booster_id": "new", "seconds": 3.0}
NO_MEASURES = pd.DataFrame(columns=["grain", "group_id"])


def plan_group(action: str, group: str = OSLO, grain: int = 2, **changes: Any) -> dict[str, Any]:
    """A group's row of a plan."""
    row = {
        "grain": grain,
        "group_id": group,
        "parent_id": '["north"]',
        "n_rows": 300,
        "n_target": 299,
        "n_fit": 213,
        "action": action,
    }
    return {**row, **changes}


def row_of_trained(
    outcome: dict[str, Any] | None, earlier: EarlierRuns | None = None, **changes: Any
) -> dict[str, Any]:
    """The ledger row of a single group that was trained."""
    run = make_planned_run([plan_group("train", **changes)], earlier)
    (planned,) = run.plan.groups.to_dict("records")
    return trained_row(planned, outcome, "run-2-wave-1", run, SPEC)


def rows_of(
    action: str, earlier: EarlierRuns | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """The ledger rows of a run whose plan is that of one group, before anything is trained."""
    return ledger_rows(make_planned_run([plan_group(action, **changes)], earlier), SPEC, {})


# Groups that were trained


def test_a_trained_group_has_what_was_planned_and_what_came_back() -> None:
    row = row_of_trained(TRAINED, fingerprint="print", started_from='{"judge": true}')
    assert (row["run_id"], row["source_run_id"], row["wave"]) == ("run-2", "run-2", "run-2-wave-1")
    assert (row["grain"], row["grain_name"], row["group_id"]) == (2, "[region, city]", OSLO)
    assert (row["n_rows"], row["n_target"], row["n_fit"]) == (300, 299, 213)
    assert (row["fingerprint"], row["started_from"]) == ("print", '{"judge": true}')
    assert (row["status"], row["reason"], row["booster_id"]) == ("trained", None, "new")
    assert (row["seconds"], row["planned_seconds"], row["weight"]) == (3.0, 2.0, 0.0)
    assert row["tuned_as_of"] == AS_OF


def test_what_only_the_plan_needs_is_not_in_the_ledger() -> None:
    left_out = set(row_of_trained(TRAINED)) - set(LEDGER.schema.names)
    # The plan's cost is the ledger's planned_seconds; the table takes its own columns only.
    assert left_out == {"cost_seconds"}


def test_what_came_back_counts_more_than_what_was_planned() -> None:
    assert row_of_trained({**TRAINED, "n_fit": 107})["n_fit"] == 107


def test_a_group_without_an_outcome_has_failed() -> None:
    row = row_of_trained(None)
    assert (row["status"], row["reason"], row["error_class"]) == ("failed", "error", "LostOutcome")
    assert row["error_message"] == LOST["error_message"]
    assert (row["wave"], row["tuned_as_of"]) == ("run-2-wave-1", AS_OF)


def test_a_group_that_killed_its_workers_has_crashed() -> None:
    row = row_of_trained(dict(CRASHED_ALONE))
    assert (row["status"], row["reason"], row["error_class"]) == (
        "crashed",
        "native_crash",
        "ExecutorLost",
    )


def test_a_refitted_group_keeps_the_date_of_the_run_that_chose_its_parameters() -> None:
    before = {GroupKey(2, OSLO): make_ledger_row(tuned_as_of=LONG_AGO)}
    earlier = EarlierRuns(before=before)
    assert row_of_trained({**TRAINED, "status": "refreshed"}, earlier)["tuned_as_of"] == LONG_AGO
    assert row_of_trained(TRAINED, earlier)["tuned_as_of"] == AS_OF


def test_why_a_group_was_sent_to_a_worker_counts_more_than_what_the_worker_says() -> None:
    outcome = {"status": "inherited", "reason": "too_few_rows"}
    assert row_of_trained(outcome, reason="not_listed")["reason"] == "not_listed"
    assert row_of_trained(outcome)["reason"] == "too_few_rows"


# A row per action


@pytest.mark.parametrize("action", ["train", "refresh"])
def test_a_group_that_is_trained_has_a_row_once_it_is(action: str) -> None:
    run = make_planned_run([plan_group(action)])
    row = {"grain": 2, "group_id": OSLO, "status": "trained"}
    assert ledger_rows(run, SPEC, {}) == []
    assert ledger_rows(run, SPEC, {GroupKey(2, OSLO): row}) == [row]


def test_a_group_that_was_done_before_the_interruption_keeps_its_row() -> None:
    kept = make_ledger_row(run_id="run-2", seconds=9.0)
    rows = rows_of("keep", EarlierRuns(kept={GroupKey(2, OSLO): kept}))
    assert rows == [kept]


def test_a_reused_group_takes_its_booster_over_and_no_seconds() -> None:
    source = make_ledger_row(
        run_id="run-1",
        source_run_id="run-0",
        wave="run-0-wave-3",
        tuned_as_of=LONG_AGO,
        weight=0.75,
        cross_selection="{}",
        n_fit=99,
        n_rows=1,
    )
    (row,) = rows_of(
        "reuse", EarlierRuns(before={GroupKey(2, OSLO): source}), fingerprint=source["fingerprint"]
    )
    assert (row["run_id"], row["status"], row["reason"]) == ("run-2", "reused", None)
    taken_over = (
        "booster_id",
        "source_run_id",
        "wave",
        "tuned_as_of",
        "weight",
        "parameters",
        "cross_selection",
        "n_fit",
        "tune_loss",
    )
    assert {name: row[name] for name in taken_over} == {name: source[name] for name in taken_over}
    # What is counted now is counted now.
    assert (row["n_rows"], row["n_target"]) == (300, 299)
    assert "seconds" not in row


def test_a_reused_group_keeps_the_reason_of_the_plan() -> None:
    source = make_ledger_row()
    earlier = EarlierRuns(before={GroupKey(2, OSLO): source})
    (row,) = rows_of("reuse", earlier, fingerprint=source["fingerprint"], reason="vanished")
    assert (row["status"], row["reason"]) == ("reused", "vanished")


@pytest.mark.parametrize("status", ["refreshed", "reused", "trained"])
def test_a_group_whose_model_is_reused_is_reused(status: str) -> None:
    source = make_ledger_row(status=status)
    (row,) = rows_of(
        "reuse", EarlierRuns(before={GroupKey(2, OSLO): source}), fingerprint=source["fingerprint"]
    )
    assert row["status"] == "reused"


@pytest.mark.parametrize(
    ("status", "reason"), [("crashed", "native_crash"), ("inherited", "constant_target")]
)
def test_a_group_without_a_model_that_is_reused_says_why_it_has_none(
    status: str, reason: str
) -> None:
    source = make_ledger_row(status=status, reason=reason, booster_id=None, error_class="SIGKILL")
    (row,) = rows_of(
        "reuse", EarlierRuns(before={GroupKey(2, OSLO): source}), fingerprint=source["fingerprint"]
    )
    assert (row["status"], row["reason"], row["error_class"], row["booster_id"]) == (
        status,
        reason,
        "SIGKILL",
        None,
    )


def test_a_group_is_reused_from_an_interrupted_run_where_that_has_its_fingerprint() -> None:
    earlier = EarlierRuns(
        before={GroupKey(2, OSLO): make_ledger_row(fingerprint="old", booster_id="old")},
        unfinished={GroupKey(2, OSLO): make_ledger_row(fingerprint="new", booster_id="new")},
    )
    (row,) = rows_of("reuse", earlier, fingerprint="new")
    assert row["booster_id"] == "new"


def test_a_group_that_its_parent_answers_has_no_wave_and_no_planned_seconds() -> None:
    (row,) = rows_of("inherit", reason="too_few_rows")
    assert (row["status"], row["reason"], row["weight"]) == ("inherited", "too_few_rows", 0.0)
    assert (row["wave"], row["planned_seconds"]) == (None, None)


def test_there_is_one_row_per_group_in_the_order_of_the_plan() -> None:
    trained = {GroupKey(0, POOLED): {"grain": 0, "group_id": POOLED, "status": "trained"}}
    earlier = EarlierRuns(kept={GroupKey(2, OSLO): make_ledger_row()})
    groups = [plan_group("train", POOLED, 0), plan_group("inherit", ROMA), plan_group("keep", OSLO)]
    rows = ledger_rows(make_planned_run(groups, earlier), SPEC, trained)
    assert [row["group_id"] for row in rows] == [POOLED, ROMA, OSLO]


def test_rows_that_are_given_out_are_nobody_elses() -> None:
    kept = make_ledger_row()
    trained = {"grain": 0, "group_id": POOLED, "status": "trained"}
    run = make_planned_run(
        [plan_group("keep"), plan_group("train", POOLED, 0)],
        EarlierRuns(kept={GroupKey(2, OSLO): kept}),
    )
    for row in ledger_rows(run, SPEC, {GroupKey(0, POOLED): trained}):
        row["status"] = "changed"
    assert (kept["status"], trained["status"]) == ("trained", "trained")


# The complete ledger


def skill(weight: float, **changes: Any) -> GroupSkill:
    return GroupSkill(weight, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, **changes)


def test_a_complete_ledger_has_weights_errors_and_measures_by_group() -> None:
    rows = [make_ledger_row(2, OSLO), make_ledger_row(0, POOLED)]
    skills = {GroupKey(2, OSLO): skill(0.25, answered_by="parent"), GroupKey(0, POOLED): skill(1.0)}
    measures = pd.DataFrame(
        [{"grain": 0, "group_id": POOLED, "rmse": 7.0}, {"grain": 2, "group_id": OSLO, "rmse": 8.0}]
    )
    ledger = complete_ledger(rows, SPEC, skills, measures)
    assert list(ledger.columns) == LEDGER.schema.names
    found = ledger.set_index("group_id")
    assert found.index.tolist() == [POOLED, OSLO]
    assert found["weight"].to_dict() == {POOLED: 1.0, OSLO: 0.25}
    assert found["rmse"].to_dict() == {POOLED: 7.0, OSLO: 8.0}
    assert found.loc[
        OSLO,
        [
            "tune_own",
            "tune_parent",
            "report_own",
            "report_parent",
            "report_blend",
            "report_constant",
        ],
    ].tolist() == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert found.loc[OSLO, "answered_by"] == "parent"


@pytest.mark.parametrize("status", ["inherited", "failed", "crashed"])
def test_a_group_without_a_model_has_no_weight_whatever_its_rows_say(status: str) -> None:
    ledger = complete_ledger(
        [make_ledger_row(status=status)], SPEC, {GroupKey(2, OSLO): skill(0.8)}, NO_MEASURES
    )
    assert ledger["weight"].tolist() == [0.0]
    assert ledger["report_blend"].tolist() == [5.0]


@pytest.mark.parametrize(("weight", "expected"), [(0.75, 0.75), (0.0, 0.0), (None, 0.0)])
def test_a_group_without_rows_that_judge_it_keeps_its_weight(
    weight: float | None, expected: float
) -> None:
    ledger = complete_ledger(
        [make_ledger_row(status="reused", weight=weight)], SPEC, {}, NO_MEASURES
    )
    assert ledger["weight"].tolist() == [expected]
    assert ledger["report_own"].isna().all()


def test_without_pooling_a_group_without_rows_that_judge_it_answers_alone() -> None:
    rows = [make_ledger_row(2, OSLO, weight=0.25), make_ledger_row(2, ROMA, status="failed")]
    ledger = complete_ledger(rows, small_spec(pooling="none"), {}, NO_MEASURES)
    assert ledger["weight"].tolist() == [1.0, 0.0]


def test_a_complete_ledger_does_not_change_the_rows_that_it_is_made_from() -> None:
    row = make_ledger_row(status="failed")
    before = dict(row)
    complete_ledger([row], SPEC, {GroupKey(2, OSLO): skill(0.8)}, NO_MEASURES)
    assert row == before


# What the ledger refers to


def test_groups_with_a_model_are_known_by_grain() -> None:
    rows = [
        make_ledger_row(0, POOLED),
        make_ledger_row(2, OSLO, status="reused"),
        make_ledger_row(2, ROMA, status="refreshed"),
        make_ledger_row(2, "crashed", status="crashed"),
        make_ledger_row(2, "failed", status="failed"),
        make_ledger_row(1, "inherited", status="inherited"),
    ]
    assert groups_with_model(rows, 3) == [{POOLED}, set(), {OSLO, ROMA}]


def test_waves_are_those_that_any_row_names_each_once() -> None:
    rows = [make_ledger_row(wave=wave) for wave in ("b", "a", None, float("nan"), "b")]
    assert waves_of(rows) == ["a", "b"]
