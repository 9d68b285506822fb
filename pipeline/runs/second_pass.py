"""Which groups get a longer search after a short one of all groups, within a budget of seconds."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.models.start import Start
from pipeline.runs.fingerprints import fingerprint, shared_digest
from pipeline.runs.history import by_group
from pipeline.runs.plan import REFITS, TrainingPlan
from pipeline.runs.planned_run import FIRST_PASS_TRIALS, PlannedRun
from pipeline.spec import FleetSpec


def plan_second_pass(
    run: PlannedRun, spec: FleetSpec, trained: dict[GroupKey, dict[str, Any]]
) -> Iterator[TrainingPlan]:
    """Plans of about one wave each, largest rows x error first, until the budget is spent.

    Without a budget there are none.

    Args:
        run: as planned.
        spec: the fleet.
        trained: ledger rows of what has been trained; the caller adds those of each plan before
            asking for the next. Groups that could be tuned further are marked as stopped by the
            budget.
    """
    budget = spec.tuning.budget_seconds
    if budget is None:
        return
    longer = (spec.tuning.expected_trials + REFITS) / (FIRST_PASS_TRIALS + REFITS)
    planned = by_group(run.plan.to_train)
    left = set()
    if spec.tuning.max_trials > FIRST_PASS_TRIALS:
        for key, row in trained.items():
            if row["status"] == "trained":
                row["stopped_by"] = "budget"
                left.add(key)
    # All seconds count, even those of both trainings of a group.
    spent = sum(_seconds(row) for row in trained.values())
    wave_seconds = spec.tuning.checkpoint_seconds * run.plan.slots
    shared = shared_digest(run.settings)
    while left:
        candidates = {key: trained[key] for key in left}
        chosen = _next_groups(candidates, budget - spent, wave_seconds, longer)
        if not chosen:
            return
        left -= set(chosen)
        rows = []
        for key, seconds in chosen.items():
            start = Start(trials=(json.loads(trained[key]["parameters"]),)).to_json()
            again = fingerprint(str(planned[key]["rows_hash"]), shared, start)
            rows.append(
                {
                    **planned[key],
                    "started_from": start,
                    "fingerprint": again,
                    "cost_seconds": seconds,
                }
            )
        groups = pd.DataFrame(rows).sort_values("cost_seconds", ascending=False, ignore_index=True)
        # The seconds are learnt from the first pass.
        yield TrainingPlan(groups, run.plan.slots, learnt_from=len(planned))
        spent += sum(_seconds(trained[key]) for key in chosen)


def _next_groups(
    left: Mapping[GroupKey, Mapping[str, Any]],
    seconds_left: float,
    wave_seconds: float,
    longer: float,
) -> dict[GroupKey, float]:
    """The groups of the next wave with their expected seconds, largest rows x error first."""
    chosen: dict[GroupKey, float] = {}
    cost = 0.0
    for key in sorted(left, key=lambda key: (-left[key]["n_tune"] * left[key]["tune_loss"], key)):
        seconds = float(left[key]["seconds"]) * longer
        # A group that takes longer than a wave becomes a wave of its own.
        if cost + seconds <= min(seconds_left, max(wave_seconds, seconds)):
            chosen[key] = seconds
            cost += seconds
    return chosen


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["seconds"] or 0.0)
