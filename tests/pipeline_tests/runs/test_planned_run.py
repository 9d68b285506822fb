"""One run laid out by hand: what is resumed, what is pinned, and who chooses the model form."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.models.meta_model import CORRECTION, INDEPENDENT, GroupKey
from pipeline.models.start import Start
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.planned_run import PACKAGES, CountedRows, PlannedRun, known_categories
from pipeline.runs.request import Request
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec
from pipeline.testing.run_parts import (
    CATEGORIES,
    CUTOFFS,
    count_rows,
    lay_out,
    make_history,
    make_ledger_row,
)
from pipeline.training.blend import Constants
from pipeline.training.splits import Cutoffs

POOLED, NORTH, OSLO, NAPOLI = "[]", '["north"]', '["north","oslo"]', '["south","napoli"]'
STARTED = pd.Timestamp("2024-10-27 08:00", tz="UTC")
FINISHED = pd.Timestamp("2024-10-27 09:00", tz="UTC")


def pin(run: PlannedRun, spec: FleetSpec | None = None, **changes: Any) -> RunManifest:
    """The manifest that a run leaves at its start."""
    return replace(
        run.manifest(spec or small_spec(), started_at=STARTED, features_version=3), **changes
    )


def ledger_of(run: PlannedRun, **changes: Any) -> list[dict[str, Any]]:
    """Ledger rows of a run that trained every group it planned."""
    return [
        make_ledger_row(
            group["grain"],
            group["group_id"],
            fingerprint=group["fingerprint"],
            started_from=group["started_from"],
            **changes,
        )
        for group in run.plan.to_train.to_dict("records")
    ]


def by_group_id(run: PlannedRun, column: str) -> dict[str, Any]:
    return dict(zip(run.plan.groups["group_id"], run.plan.groups[column], strict=True))


def history_after(run: PlannedRun, spec: FleetSpec | None = None, **changes: Any) -> History:
    """A fleet's history of this one run, interrupted after the last group unless told otherwise."""
    manifest = pin(run, spec, **changes)
    return make_history([manifest], {run.run_id: ledger_of(run)})


def with_changed_rows(*groups: str) -> CountedRows:
    """Rows where a row of these groups changed."""
    counts = count_rows().counts
    counts.loc[counts["group_id"].isin(groups), "rows_hash"] += "!"
    return count_rows(counts=counts)


# A first run


def test_a_first_run_trains_every_group_and_pins_where_it_begins() -> None:
    run = lay_out(request=Request("run-1"))
    assert (run.run_id, run.previous_run_id, run.is_resumed, run.must_choose) == (
        "run-1",
        None,
        False,
        False,
    )
    assert set(by_group_id(run, "action").values()) == {"train"}
    assert (run.settings.run_id, run.plan.slots) == ("run-1", 2)
    assert run.settings.model_spec.categories == {"kind": ("large", "small")}
    assert (run.cutoffs, run.constants) == (CUTOFFS, Constants(97.5, 97.5))


def test_a_manifest_says_what_the_run_pinned_and_that_it_is_not_finished() -> None:
    request = Request("run-1", retrain="stale", limit_groups=4)
    run = lay_out(request=request)
    manifest = pin(run)
    assert (manifest.run_id, manifest.started_at, manifest.finished_at) == ("run-1", STARTED, None)
    assert (manifest.request, manifest.data_digest) == (request.text, run.data_digest)
    assert (manifest.cutoffs, manifest.features_version, manifest.n_groups) == (CUTOFFS, 3, 7)
    assert manifest.spec_digest == small_spec().training_digest
    assert manifest.model_spec == run.settings.model_spec
    assert set(manifest.versions) == {"python", *PACKAGES}
    assert (manifest.waves, manifest.unknown_groups) == ((), ())


def test_a_listed_group_that_does_not_exist_is_refused() -> None:
    request = Request("run-1", retrain="listed", listed=('["north","oslp"]',))
    with pytest.raises(
        DataError, match=r"there is no group .*oslp.*; did you mean \[\"north\",\"oslo\"\]"
    ):
        lay_out(request=request)


def test_a_listed_group_is_trained_and_the_others_are_not() -> None:
    run = lay_out(request=Request("run-1", retrain="listed", listed=(OSLO,)))
    assert by_group_id(run, "action") == dict.fromkeys(by_group_id(run, "action"), "inherit") | {
        POOLED: "train",
        OSLO: "train",
    }
    starts = by_group_id(run, "started_from")
    assert Start.from_json(starts[POOLED]).judge
    assert not Start.from_json(starts[OSLO]).judge


# What is resumed

LATER = Cutoffs(CUTOFFS.as_of + pd.Timedelta(days=1), CUTOFFS.tune_start, CUTOFFS.report_start)


def test_an_interrupted_run_of_the_same_is_resumed_under_its_own_id() -> None:
    interrupted = lay_out(request=Request("run-1"))
    left = ledger_of(interrupted)[:3]
    history = make_history([pin(interrupted)], {"run-1": left})
    run = lay_out(request=Request("run-2"), history=history)
    assert (run.is_resumed, run.run_id, run.settings.run_id) == (True, "run-1", "run-1")
    actions = by_group_id(run, "action")
    assert {group for group, action in actions.items() if action == "keep"} == {
        row["group_id"] for row in left
    }
    assert set(actions.values()) == {"keep", "train"}
    assert run.earlier.unfinished == {}
    assert run.data_digest == interrupted.data_digest


@pytest.mark.parametrize(
    "launch",
    [
        {"request": Request("run-2", retrain="stale")},
        {"request": Request("run-2", limit_groups=3)},
        {"request": Request("run-2", retrain="listed", listed=(OSLO,))},
        {"request": Request("run-2", recipes={(0, POOLED): Start(judge=True)})},
        {"spec": small_spec(tuning={"seed": 9})},
        {"spec": small_spec(tuning={"max_rounds": 41})},
        {"counted": with_changed_rows(POOLED)},
        {"counted": count_rows(cutoffs=LATER)},
    ],
    ids=["retrain", "limit", "listed", "recipes", "seed", "search space", "data", "as of"],
)
def test_an_interrupted_run_of_anything_else_is_not_resumed(launch: dict[str, Any]) -> None:
    history = history_after(lay_out(request=Request("run-1")))
    run = lay_out(**{"request": Request("run-2"), "history": history, **launch})
    assert (run.is_resumed, run.run_id, run.settings.run_id) == (False, "run-2", "run-2")
    assert run.earlier.kept == {}
    assert len(run.earlier.unfinished) == 7


def test_an_interrupted_run_that_built_on_another_run_is_not_resumed() -> None:
    interrupted = pin(lay_out(request=Request("run-1")), previous_run_id="run-0")
    run = lay_out(history=make_history([interrupted]))
    assert (run.is_resumed, run.run_id) == (False, "run-2")


def test_an_interrupted_run_is_not_resumed_once_another_has_finished() -> None:
    first = lay_out(request=Request("run-1"))
    finished = pin(first, run_id="run-b", started_at=FINISHED, finished_at=FINISHED)
    history = make_history([pin(first), finished], {"run-b": ledger_of(first)})
    run = lay_out(history=history)
    assert (run.is_resumed, run.run_id, run.previous_run_id) == (False, "run-2", "run-b")


def test_another_budget_alone_does_not_keep_a_run_from_being_resumed() -> None:
    history = history_after(lay_out(request=Request("run-1")))
    run = lay_out(spec=small_spec(tuning={"checkpoint_seconds": 7}), history=history)
    assert (run.is_resumed, set(by_group_id(run, "action").values())) == (True, {"keep"})


def test_of_two_interrupted_runs_of_the_same_the_newer_is_resumed() -> None:
    first = lay_out(request=Request("run-1"))
    runs = [
        pin(first),
        pin(first, run_id="run-b"),
        pin(first, run_id="run-c", data_digest="another"),
    ]
    assert lay_out(history=make_history(runs)).run_id == "run-b"


def test_a_run_that_is_not_resumed_reuses_what_an_interrupted_one_trained() -> None:
    history = history_after(lay_out(request=Request("run-1")))
    run = lay_out(request=Request("run-2", retrain="stale"), history=history)
    assert set(by_group_id(run, "action").values()) == {"reuse"}


# What is reused


def test_an_unchanged_fleet_is_reused_as_a_whole() -> None:
    first = lay_out(request=Request("run-1"))
    run = lay_out(history=history_after(first, finished_at=FINISHED))
    assert set(by_group_id(run, "action").values()) == {"reuse"}
    assert by_group_id(run, "fingerprint") == by_group_id(first, "fingerprint")
    assert (run.previous_run_id, run.is_resumed) == ("run-1", False)
    assert len(run.earlier.before) == 7


def test_only_groups_whose_rows_changed_are_trained_again() -> None:
    history = history_after(lay_out(request=Request("run-1")), finished_at=FINISHED)
    run = lay_out(history=history, counted=with_changed_rows(POOLED, NORTH, OSLO))
    actions = by_group_id(run, "action")
    assert {group for group, action in actions.items() if action == "train"} == {
        POOLED,
        NORTH,
        OSLO,
    }
    assert set(actions.values()) == {"train", "reuse"}


def test_a_run_of_an_earlier_as_of_does_not_build_on_what_saw_more() -> None:
    later = lay_out(request=Request("run-1"), counted=count_rows(cutoffs=LATER))
    run = lay_out(history=history_after(later, finished_at=FINISHED))
    assert (run.previous_run_id, run.earlier.before) == (None, {})
    assert {Start.from_json(text) for text in by_group_id(run, "started_from").values()} == {
        Start()
    }


def test_groups_under_another_spec_begin_with_what_was_found_under_the_last() -> None:
    history = history_after(lay_out(request=Request("run-1")), finished_at=FINISHED)
    run = lay_out(spec=small_spec(tuning={"seed": 9}), history=history)
    assert not run.earlier.same_spec
    assert set(by_group_id(run, "action").values()) == {"train"}
    starts = by_group_id(run, "started_from")
    n_trials = {group: len(Start.from_json(starts[group]).trials) for group in (POOLED, OSLO)}
    assert n_trials == {POOLED: 1, OSLO: 2}


# The form of the groups' models

AUTO = small_spec(own="auto")


def test_a_spec_that_says_the_form_is_obeyed_whatever_the_caller_says() -> None:
    run = lay_out(spec=small_spec(own=CORRECTION), own=INDEPENDENT)
    assert (run.settings.model_spec.own, run.must_choose) == (CORRECTION, False)


def test_where_nobody_has_chosen_the_plan_is_that_of_independent_models() -> None:
    run = lay_out(spec=AUTO)
    assert (run.settings.model_spec.own, run.must_choose) == (INDEPENDENT, True)


@pytest.mark.parametrize("own", [INDEPENDENT, CORRECTION])
def test_what_the_caller_chooses_is_taken(own: str) -> None:
    run = lay_out(spec=AUTO, own=own)
    assert (run.settings.model_spec.own, run.must_choose) == (own, False)


@pytest.mark.parametrize("own", [INDEPENDENT, CORRECTION])
@pytest.mark.parametrize("end", [{}, {"finished_at": FINISHED}], ids=["interrupted", "finished"])
def test_what_an_earlier_run_of_the_spec_chose_stays(own: str, end: dict[str, Any]) -> None:
    history = history_after(lay_out(spec=AUTO, request=Request("run-1"), own=own), AUTO, **end)
    run = lay_out(spec=AUTO, history=history)
    assert (run.settings.model_spec.own, run.must_choose) == (own, False)
    turned = INDEPENDENT if own == CORRECTION else CORRECTION
    assert lay_out(spec=AUTO, history=history, own=turned).settings.model_spec.own == turned


def test_the_newest_choice_counts() -> None:
    old = pin(
        lay_out(spec=AUTO, request=Request("run-1"), own=CORRECTION), AUTO, finished_at=FINISHED
    )
    new = pin(
        lay_out(spec=AUTO, request=Request("run-b"), own=INDEPENDENT), AUTO, started_at=FINISHED
    )
    assert (
        lay_out(spec=AUTO, history=make_history([old, new])).settings.model_spec.own == INDEPENDENT
    )


def test_what_was_chosen_under_another_spec_is_chosen_again() -> None:
    other = small_spec(own="auto", tuning={"seed": 9})
    history = history_after(
        lay_out(spec=other, request=Request("run-1"), own=CORRECTION), other, finished_at=FINISHED
    )
    run = lay_out(spec=AUTO, history=history)
    assert (run.settings.model_spec.own, run.must_choose) == (INDEPENDENT, True)


def test_a_group_that_corrects_its_parent_changes_with_it() -> None:
    spec = small_spec(own=CORRECTION)
    first = lay_out(spec=spec, request=Request("run-1"))
    history = history_after(first, spec, finished_at=FINISHED)
    run = lay_out(spec=spec, history=history, counted=with_changed_rows(NORTH))
    anew = {group for group, action in by_group_id(run, "action").items() if action == "train"}
    assert anew == {NORTH, OSLO, '["north","bergen"]'}


# Samples and budgets


def test_groups_that_are_too_large_are_sampled_and_their_hash_says_so() -> None:
    spec = small_spec()
    sampled = spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"max_rows": 400})})
    run = lay_out(spec=sampled)
    exponents = by_group_id(run, "exponent")
    hashes = by_group_id(run, "rows_hash")
    assert (exponents[POOLED], exponents[NORTH], exponents[OSLO]) == (2, 1, 0)
    assert hashes[POOLED] == "rows of /2"
    assert hashes[NORTH] == "rows of north/1"
    assert hashes[OSLO] == "rows of north/oslo"


@pytest.mark.parametrize(("budget", "expected"), [(None, None), (60.0, 1)])
def test_a_fleet_with_a_budget_of_seconds_begins_with_one_trial_per_group(
    budget: float | None, expected: int | None
) -> None:
    run = lay_out(
        spec=small_spec(tuning={"budget_seconds": budget, "max_trials": 9, "patience": 9})
    )
    starts = {
        Start.from_json(text).max_trials for text in by_group_id(run, "started_from").values()
    }
    assert starts == {expected}


def test_a_first_pass_is_expected_to_be_shorter() -> None:
    tuning = {"max_trials": 9, "patience": 9}
    whole = lay_out(spec=small_spec(tuning=tuning)).plan.predicted_seconds
    first_pass = lay_out(
        spec=small_spec(tuning={**tuning, "budget_seconds": 60.0})
    ).plan.predicted_seconds
    # One trial and four refits, instead of nine and four.
    assert first_pass == pytest.approx(whole * 5 / 13)


def test_a_run_that_refits_recipes_trains_nothing_else() -> None:
    recipe = Start(refit={"num_leaves": 7}, n_rounds=5)
    run = lay_out(request=Request("run-2", recipes={(2, OSLO): recipe}))
    actions = by_group_id(run, "action")
    assert {group for group, action in actions.items() if action != "inherit"} == {OSLO}
    assert Start.from_json(by_group_id(run, "started_from")[OSLO]) == recipe


def test_seconds_of_the_run_before_foresee_those_of_this_one() -> None:
    counts = count_rows().counts
    many = pd.concat(
        [counts, counts.assign(group_id=counts["group_id"] + "'").query("grain == 2")],
        ignore_index=True,
    )
    first = lay_out(request=Request("run-1"), counted=count_rows(counts=many))
    history = make_history(
        [pin(first, finished_at=FINISHED)], {"run-1": ledger_of(first, seconds=2.0)}
    )
    run = lay_out(history=history, request=Request("run-2", retrain="all"))
    assert run.plan.learnt_from == len(many)


def test_a_group_that_is_gone_is_in_the_plan_and_keeps_its_booster() -> None:
    history = history_after(lay_out(request=Request("run-1")), finished_at=FINISHED)
    counts = count_rows().counts
    left = count_rows(counts=counts[counts["group_id"] != NAPOLI].reset_index(drop=True))
    run = lay_out(history=history, counted=left)
    gone = run.plan.groups.set_index("group_id").loc[NAPOLI]
    assert (gone["action"], gone["reason"], gone["n_rows"], gone["exponent"]) == (
        "reuse",
        "vanished",
        0,
        0,
    )
    assert run.earlier.source_of(GroupKey(2, NAPOLI), gone["fingerprint"])["group_id"] == NAPOLI


# Categories


def test_categories_keep_their_order_as_long_as_the_spec_stays() -> None:
    before = pin(lay_out(request=Request("run-1")))
    assert known_categories(small_spec(), before) == CATEGORIES
    assert known_categories(small_spec(tuning={"seed": 9}), before) == {}
    assert known_categories(small_spec(), None) == {}
