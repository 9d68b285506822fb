"""The ledger rows of a training run: one per group of every grain, whatever happened to it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.models.meta_model import GroupKey, ModelSpec, grain_name
from pipeline.runs.history import LedgerRow, by_group
from pipeline.runs.plan import INHERIT, KEEP, REFRESH, REUSE, TRAIN
from pipeline.runs.planned_run import PlannedRun
from pipeline.spec import FleetSpec
from pipeline.tables import LEDGER, records
from pipeline.training.blend import GroupSkill
from pipeline.training.outcome import ERROR, NATIVE_CRASH, WITH_BOOSTER

# Columns of the plan that the ledger does not have, or fills differently.
_PLAN_ONLY = ("action", "rows_hash", "exponent", "wave")
# Columns that a reused group takes from its row in an earlier run's ledger.
_TAKEN_OVER = (
    "booster_id",
    "n_fit",
    "n_tune",
    "n_report",
    "n_invalid",
    "n_trials",
    "n_pruned",
    "n_rounds",
    "parameters",
    "cross_selection",
    "stopped_by",
    "tune_loss",
    "source_run_id",
    "wave",
    "tuned_as_of",
    "error_class",
    "error_message",
    "weight",
)
LOST: LedgerRow = {
    "status": "failed",
    "reason": ERROR,
    "error_class": "LostOutcome",
    "error_message": "the worker gave no outcome for this group",
}
CRASHED_ALONE: LedgerRow = {
    "status": "crashed",
    "reason": NATIVE_CRASH,
    "error_class": "ExecutorLost",
    "error_message": (
        "every Spark worker that trained it was lost; see the executors' logs, "
        "and give it more memory or fewer rows (tuning.max_rows)"
    ),
}


def trained_row(
    planned: Mapping[str, Any],
    outcome: LedgerRow | None,
    wave: str,
    run: PlannedRun,
    spec: FleetSpec,
) -> dict[str, Any]:
    """The row of a group that was sent to a worker, weights and errors still missing.

    Args:
        planned: its row of the plan.
        outcome: as the worker reported it; None, where nothing came back, makes it `failed`.
        wave: that it was in.
        run: as planned.
        spec: the fleet.
    """
    outcome = outcome or LOST
    tuned_as_of = run.cutoffs.as_of
    if outcome["status"] == "refreshed":
        chosen_by = run.earlier.before[GroupKey.of(planned)]
        tuned_as_of = pd.Timestamp(chosen_by["tuned_as_of"]).tz_localize(None)
    return {
        **_planned_row(planned, run, spec),
        "source_run_id": run.run_id,
        "wave": wave,
        "tuned_as_of": tuned_as_of.tz_localize("UTC"),
        **outcome,
        "reason": planned["reason"] or outcome["reason"],
    }


def ledger_rows(
    run: PlannedRun, spec: FleetSpec, trained: Mapping[GroupKey, LedgerRow]
) -> list[dict[str, Any]]:
    """One row per group that is done or needs no training, weights and errors still missing.

    Args:
        run: as planned.
        spec: the fleet.
        trained: rows of what this launch has trained so far, as from `trained_row`.
    """
    rows = []
    for planned in records(run.plan.groups):
        key, action = GroupKey.of(planned), planned["action"]
        if action in (TRAIN, REFRESH):
            if key in trained:
                rows.append(dict(trained[key]))
        elif action == KEEP:
            rows.append(dict(run.earlier.kept[key]))
        elif action == REUSE:
            source = run.earlier.source_of(key, planned["fingerprint"])
            rows.append({**_planned_row(planned, run, spec), **_reused(source)})
        elif action == INHERIT:
            rows.append(
                {**_planned_row(planned, run, spec), "status": "inherited", "planned_seconds": None}
            )
    return rows


def _planned_row(planned: Mapping[str, Any], run: PlannedRun, spec: FleetSpec) -> dict[str, Any]:
    """What the ledger keeps of a group's row of the plan."""
    kept = {name: value for name, value in planned.items() if name not in _PLAN_ONLY}
    return {
        **kept,
        "run_id": run.run_id,
        "grain_name": grain_name(spec.grains[int(planned["grain"])]),
        "planned_seconds": planned["cost_seconds"],
        "weight": 0.0,
        "wave": None,
    }


def _reused(source: LedgerRow) -> dict[str, Any]:
    """What a reused group takes over; one without a model keeps its status and reason."""
    row = {name: source[name] for name in _TAKEN_OVER}
    if source["status"] in WITH_BOOSTER:
        return {**row, "status": "reused"}
    return {**row, "status": source["status"], "reason": source["reason"]}


def complete_ledger(
    rows: Sequence[LedgerRow],
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    measures: pd.DataFrame,
) -> pd.DataFrame:
    """The complete ledger, one row per group: what became of it, its weight, and its errors.

    Args:
        rows: as from `ledger_rows`.
        spec: the fleet.
        skills: weights and what they were learnt from.
        measures: errors on report rows, one row per group.
    """
    measured = by_group(measures)
    complete = []
    for row in rows:
        key = GroupKey.of(row)
        full = dict(row)
        if key in skills:
            full |= vars(skills[key])
        full |= measured.get(key, {})
        if row["status"] not in WITH_BOOSTER:
            full["weight"] = 0.0
        elif key not in skills and spec.pooling == "none":
            full["weight"] = 1.0
        elif key not in skills:
            # Nothing of the run is held out.
            full["weight"] = float(row["weight"] or 0.0)
        complete.append(full)
    ledger = pd.DataFrame(complete).reindex(columns=LEDGER.schema.names)
    return ledger.sort_values(["grain", "group_id"], ignore_index=True)


def models_that_answer(ledger: pd.DataFrame, model_spec: ModelSpec) -> pd.DataFrame:
    """The ledger's rows of groups whose own model counts in some answer."""
    is_needed = ledger["weight"].map(model_spec.needs).astype(bool)
    return ledger[ledger["booster_id"].notna() & is_needed]


def groups_with_model(rows: Iterable[LedgerRow], n_grains: int) -> list[set[str]]:
    """Per grain the groups that have a model, as their ledger rows say."""
    groups: list[set[str]] = [set() for _ in range(n_grains)]
    for row in rows:
        if row["status"] in WITH_BOOSTER:
            groups[int(row["grain"])].add(str(row["group_id"]))
    return groups


def waves_of(rows: Iterable[LedgerRow]) -> list[str]:
    """The waves whose boosters and held-out rows some ledger rows refer to, in order."""
    return sorted({row["wave"] for row in rows if isinstance(row["wave"], str)})
