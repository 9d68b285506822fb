"""One training run of a fleet: plan it, train it, blend it, account for every group."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

import pandas as pd
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import DataError
from pipeline.features.encoding import choose_categories
from pipeline.grouping.plan import TrainingPlan, build_plan
from pipeline.grouping.splits import Cutoffs, resolve_cutoffs
from pipeline.models.meta_model import grain_name
from pipeline.models.pack import model_spec
from pipeline.spark.evaluation import judged_rows, measure_groups, sum_moments
from pipeline.spark.features import newest_known, newest_time
from pipeline.spark.files import read_files
from pipeline.spark.training import (
    Report,
    TrainedFiles,
    count_categories,
    count_classes,
    count_groups,
    limited_rows,
    placed_rows,
    train_groups,
    visible_rows,
)
from pipeline.spec import FleetSpec
from pipeline.tables import HOLDOUT, LEDGER
from pipeline.training.blend import Constants, GroupSkill, learn_blend
from pipeline.training.objective import learning_goal
from pipeline.training.trainer import TrainingSettings
from pipeline.training.worker import TrainGroup

# Fits per trial, in the plan's arithmetic: the trials of the budget that usually run in full, and two refits.
_REFITS = 2


@dataclass(frozen=True)
class PlannedRun:
    """All that a run pins before it trains.

    Args:
        run_id: of the run.
        rows: the visible rows.
        cutoffs: its dates.
        plan: which group trains where.
        settings: what every group shares.
        constants: what answers without a model.
    """

    run_id: str
    rows: DataFrame
    cutoffs: Cutoffs
    plan: TrainingPlan
    settings: TrainingSettings
    constants: Constants


@dataclass(frozen=True)
class FinishedRun:
    """What a run leaves: the ledger, and files not yet committed."""

    ledger: pd.DataFrame
    files: TrainedFiles


def plan_run(
    features: DataFrame, spec: FleetSpec, *, run_id: str, as_of: pd.Timestamp | None, limit_groups: int | None, slots: int, threads: int
) -> PlannedRun:
    """Count the groups, fix the dates, and lay out the work; nothing is trained.

    Raises:
        DataError: if no row is visible at the as-of, or no row has a target to fit on, or the classes are not what the task needs.
    """
    moment = as_of if as_of is not None else newest_known(features)
    rows = limited_rows(visible_rows(features, moment), spec, limit_groups)
    newest = newest_time(rows)
    if newest is None:
        earliest, latest = features.where("NOT is_future").selectExpr("string(min(known_at))", "string(max(known_at))").collect()[0]
        raise DataError(f"as of {moment} no row is known yet; known_at runs from {earliest} to {latest}: choose an as-of within or after it")
    cutoffs = resolve_cutoffs(spec.splits, moment, newest)
    classes = count_classes(rows, spec, cutoffs)
    data = count_groups(rows, spec, cutoffs, classes)
    categories = choose_categories(count_categories(rows, spec, cutoffs), spec.features.max_categories)
    tuning = spec.tuning
    plan = build_plan(
        data.counts,
        n_features=len(spec.feature_columns),
        n_fits=min(tuning.max_trials, tuning.patience + 1) + _REFITS,
        fit_rows=tuning.fit_rows,
        tune_rows=tuning.tune_rows,
        slots=slots,
    )
    settings = TrainingSettings(
        run_id=run_id,
        model=model_spec(spec, categories, list(classes), data.constants.prior),
        goal=learning_goal(spec, len(classes)),
        target=spec.target.column,
        weight=spec.target.weight,
        baselines=tuple(spec.all_baselines.values()),
        tuning=tuning,
        cutoffs=cutoffs,
        threads=threads,
    )
    return PlannedRun(run_id, rows, cutoffs, plan, settings, data.constants)


def train_run(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    *,
    roots: Mapping[str, str],
    options: Mapping[str, str],
    report: Report,
    train: TrainGroup | None = None,
) -> FinishedRun:
    """Train every planned group, learn the blend, and write one ledger row per group.

    Args:
        spark: the session.
        run: as planned.
        spec: the fleet.
        roots: roots of the tables boosters and holdout.
        options: storage options.
        report: called now and then with groups done, groups failed, planned seconds done.
        train: what trains a group; another function only in tests.
    """
    trained = run.plan.to_train
    costs = {(int(g), str(i)): float(c) for g, i, c in zip(trained["grain"], trained["group_id"], trained["cost_seconds"], strict=True)}
    placed = placed_rows(spark, run.rows, spec, run.plan)
    files = train_groups(spark, placed, run.settings, roots, options, costs, report, train)
    has_model: list[set[str]] = [set() for _ in spec.grains]
    for outcome in files.outcomes:
        if outcome["status"] == "trained":
            has_model[outcome["grain"]].add(outcome["group_id"])
    holdout = read_files(spark, roots["holdout"], [file.path for file in files.holdout], HOLDOUT.schema, options)
    judged = judged_rows(holdout, spec, run.cutoffs, run.constants).persist()
    classes = run.settings.model["classes"]
    try:
        skills = learn_blend(sum_moments(judged, len(spec.grains), run.constants, classes), has_model, run.constants[0], spec.pooling)
        measures = measure_groups(spark, judged, spec, skills, run.constants, has_model, classes)
    finally:
        judged.unpersist()
    return FinishedRun(build_ledger(run, spec, files.outcomes, skills, measures), files)


def build_ledger(
    run: PlannedRun, spec: FleetSpec, outcomes: list[dict[str, Any]], skills: Mapping[tuple[int, str], GroupSkill], measures: pd.DataFrame
) -> pd.DataFrame:
    """Exactly one row per planned group, whatever came back for it.

    A group that was sent to a worker and of which nothing came back is `failed`.
    """
    by_group = {(int(outcome["grain"]), outcome["group_id"]): outcome for outcome in outcomes}
    measured = {(int(row["grain"]), row["group_id"]): row for row in _records(measures)}
    rows = []
    for planned in _records(run.plan.groups):
        key = int(planned["grain"]), planned["group_id"]
        row: dict[str, Any] = {**planned, "planned_seconds": planned["cost_seconds"], "run_id": run.run_id, "weight": 0.0}
        if planned["status"] == "train":
            lost = {"status": "failed", "reason": "error", "error_class": "LostOutcome", "error_message": "the worker gave no outcome for this group"}
            row |= by_group.get(key, lost)
        row["grain_name"] = grain_name(spec.grains[key[0]])
        if key in skills:
            row |= vars(skills[key])
        if row["status"] != "trained":
            row["weight"] = 0.0
        elif key not in skills:
            row["weight"] = 1.0 if spec.pooling == "none" else 0.0
        rows.append({**row, **measured.get(key, {})})
    ledger = pd.DataFrame(rows).reindex(columns=LEDGER.schema.names)
    return ledger.sort_values(["grain", "group_id"], ignore_index=True)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts by column name."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def manifest(run: PlannedRun, spec: FleetSpec, *, started_at: pd.Timestamp, features_version: int) -> dict[str, Any]:
    """The row of `tables.RUNS` that says what the run pinned."""
    packages = ("many-models", "pyspark", "lightgbm", "optuna", "pandas", "pyarrow", "numpy")
    versions = {"python": platform.python_version(), **{package: installed_version(package) for package in packages}}
    return {
        "run_id": run.run_id,
        "started_at": started_at,
        "as_of": run.cutoffs.as_of,
        "tune_start": run.cutoffs.tune_start,
        "report_start": run.cutoffs.report_start,
        "features_version": features_version,
        "spec_digest": spec.training_digest,
        "constant": None if run.constants.prior else run.constants.with_offset,
        "constant_without_offset": None if run.constants.prior else run.constants.without_offset,
        "n_groups": len(run.plan.groups),
        "model_spec": json.dumps(run.settings.model, ensure_ascii=False),
        "versions": json.dumps(versions),
    }
