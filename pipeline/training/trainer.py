"""`train_group`: one group's rows in, one outcome out. No Spark, Dagster, MLflow or network."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import Floats, ModelSpec, design_matrix, group_ids, key_text, link, offset_and_scale
from pipeline.models.start import CrossSelection, Start, Winner
from pipeline.spec import COUNTED, TuningSpec
from pipeline.training.outcome import CONSTANT_TARGET, INFINITE_TARGET, NO_TARGET, NOT_POOLED, TOO_FEW_ROWS, UNKNOWN_CLASS, Outcome
from pipeline.training.splits import FIT, GAP, REPORT, TUNE, Cutoffs
from pipeline.training.tuner import Clock, Learnable, Study, fit_booster

POOLED = 0
NO_START = Start()
RATE = "_rate"
BASE = "_base"
# Parts of the fit rows, by time, that are predicted by models which were not fitted on them.
FOLDS = 5


@dataclass(frozen=True)
class TrainingSettings:
    """What every group of a run shares; small enough to travel to each worker.

    Args:
        run_id: the training run, also the fleet version.
        model: the model spec, as in a pack's spec.json: features, categories, grains, target, task, classes.
        goal: what LightGBM is to learn, as from `objective.learning_goal`.
        target: name of the target column.
        weight: name of the weight column, or None.
        tuning: budget per group.
        cutoffs: the run's dates.
        threads: LightGBM's threads, the same number as `spark.task.cpus`.
    """

    run_id: str
    model_spec: ModelSpec
    goal: Mapping[str, Any]
    target: str
    weight: str | None
    tuning: TuningSpec
    cutoffs: Cutoffs
    threads: int = 1


def train_group(frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start = NO_START) -> Outcome:
    """Tune and fit one group's model.

    Args:
        frame: the group's visible rows: time, known_at (UTC), row_key, keys, features, target; in any order. A column `_rate`,
            where there is one, is the share of rows like this one that were sampled; a column `_base` what the parent's model
            predicts, link space less offset over scale, which the group's trees then correct.
        grain: index of the group's grain; 0 is the pooled model.
        settings: the run's.
        start: what is known from earlier runs.

    Returns:
        `trained` or `refreshed` with its booster, or `inherited` with a reason. The pooled group has holdout rows in either case,
        so that every row of the tune and report splits is judged once, whether or not any model was trained.
    """
    started = time.perf_counter()
    rows = _prepare(frame, settings)
    split = rows["split"].to_numpy()
    target, usable, weight = rows["_target"].to_numpy(), rows["_usable"].to_numpy(), _weights(rows, settings)
    ledger: dict[str, Any] = {
        "n_fit": int((usable & (split == FIT)).sum()),
        "n_tune": int((usable & (split == TUNE)).sum()),
        "n_report": int((usable & (split == REPORT)).sum()),
        "n_invalid": int((~rows["_valid"]).sum()),
    }
    is_coarse, has_classes = grain < max(1, len(settings.model_spec.grains) - 1), bool(settings.model_spec.classes)
    reason = NOT_POOLED if start.judge else _reason_not_to_train(rows, ledger, settings.tuning, is_coarse=is_coarse, has_classes=has_classes)
    if reason is not None:
        holdout = _holdout(rows, np.full(len(rows), np.nan), settings) if grain == POOLED else None
        return Outcome("inherited", reason, {**ledger, "seconds": time.perf_counter() - started}, None, holdout)

    clock = Clock()
    matrix = design_matrix(rows, settings.model_spec)
    everything = Learnable(matrix, target, weight)
    categoricals = settings.model_spec.categorical_positions
    is_fit, is_tune, is_report = (usable & (split == name) for name in (FIT, TUNE, REPORT))
    goal, n_classes = settings.goal, settings.goal.get("num_class")

    def fitted_on(chosen: npt.NDArray[np.bool_], parameters: Mapping[str, Any], n_rounds: int) -> Any:
        with clock:
            return fit_booster(everything.rows(chosen), categoricals, dict(parameters), n_rounds, settings.tuning, settings.threads, goal)

    def predicted(booster: Any, chosen: npt.NDArray[np.bool_]) -> Floats:
        with clock:
            found: Floats = booster.predict(matrix[chosen], num_threads=settings.threads)
        return found

    predictions = np.full((len(rows), n_classes) if n_classes else len(rows), np.nan)
    if start.refit is not None:
        parameters, n_rounds = dict(start.refit), start.n_rounds
        for winner, chosen in _tune_predictors(start, rows["time"], is_tune):
            predictions[chosen] = predicted(fitted_on(is_fit, winner.parameters, winner.n_rounds), chosen)
        cross = start.cross
        found: dict[str, Any] = {"n_trials": 0, "n_pruned": 0}
    else:
        first_block = (rows["time"] < settings.cutoffs.tune_middle).to_numpy()[is_tune]
        fit, tune = everything.rows(is_fit), everything.rows(is_tune)
        tuned = Study(fit, tune, first_block, categoricals, settings.tuning, settings.threads, goal, start, clock).run()
        parameters, n_rounds = tuned.parameters, tuned.n_rounds
        predictions[is_tune] = tuned.cross_predictions
        cross = CrossSelection(settings.cutoffs.tune_middle.isoformat(), tuned.earlier, tuned.later)
        found = {"n_trials": tuned.n_trials, "n_pruned": tuned.n_pruned, "stopped_by": tuned.stopped_by, "tune_loss": tuned.tune_loss}
    # Finer groups that correct this one's predictions need one for every row, made without that row.
    is_corrected = is_coarse and settings.model_spec.corrects
    is_later = is_report | (usable & (split == GAP)) if is_corrected else is_report
    if is_later.any():
        predictions[is_later] = predicted(fitted_on(is_fit | is_tune, parameters, n_rounds), is_later)
    for fold in np.array_split(np.flatnonzero(is_fit), FOLDS) if is_corrected else ():
        left_out = np.isin(np.arange(len(rows)), fold)
        if len(fold):
            predictions[left_out] = predicted(fitted_on(is_fit & ~left_out, parameters, n_rounds), left_out)
    if BASE in rows:
        predictions += rows[BASE].to_numpy(dtype=np.float64)
    booster = encode_booster(fitted_on(usable, parameters, n_rounds).model_to_string())
    ledger |= {
        **found,
        "booster_id": booster.booster_id,
        "n_rounds": n_rounds,
        "parameters": json.dumps(parameters, sort_keys=True),
        "cross_selection": None if cross is None else cross.to_json(),
        "lightgbm_seconds": clock.seconds,
    }
    holdout = _holdout(rows, predictions, settings, every_split=is_corrected)
    return Outcome("trained" if start.refit is None else "refreshed", None, {**ledger, "seconds": time.perf_counter() - started}, booster, holdout)


def _tune_predictors(start: Start, time: "pd.Series[Any]", is_tune: npt.NDArray[np.bool_]) -> list[tuple[Winner, npt.NDArray[np.bool_]]]:
    """Who predicts which tune rows of a refit: never a winner that the row itself helped to choose.

    Tune rows may have moved on since the parameters were chosen, so the halves are cut where they were cut then.
    """
    chosen = Winner(start.refit or {}, start.n_rounds)
    if start.cross is None:
        return [(chosen, is_tune)]
    is_before = (time < pd.Timestamp(start.cross.middle)).to_numpy()
    parts = [
        (start.cross.predicts_before or chosen, is_tune & is_before),
        (start.cross.predicts_after or chosen, is_tune & ~is_before),
    ]
    return [(winner, rows) for winner, rows in parts if rows.any()]


def fit_twin(frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start = NO_START) -> Outcome:
    """Judge a recipe as `train_group` judges its own: fit it on fit and tune rows, and predict the report rows; nothing is served.

    Args:
        frame: as for `train_group`.
        grain: index of the group's grain.
        settings: those of the run whose rows these are, with the model spec that the recipe belongs to.
        start: parameters and rounds of the recipe, as `refit`.
    """
    if settings.model_spec.corrects:  # finer groups correct predictions of all its rows
        return train_group(frame, grain, settings, start)
    rows = _prepare(frame, settings)
    usable, split = rows["_usable"].to_numpy(), rows["split"].to_numpy()
    everything = Learnable(design_matrix(rows, settings.model_spec), rows["_target"].to_numpy(), _weights(rows, settings))
    categoricals = settings.model_spec.categorical_positions
    learnt, is_report = usable & np.isin(split, [FIT, TUNE]), usable & (split == REPORT)
    n_classes = settings.goal.get("num_class")
    predictions = np.full((len(rows), n_classes) if n_classes else len(rows), np.nan)
    if learnt.any() and is_report.any():
        fitted = fit_booster(
            everything.rows(learnt), categoricals, dict(start.refit or {}), start.n_rounds, settings.tuning, settings.threads, settings.goal
        )
        predictions[is_report] = fitted.predict(everything.matrix[is_report], num_threads=settings.threads)
    holdout = _holdout(rows, predictions, settings)
    return Outcome("refreshed", None, {}, None, holdout[holdout["split"] == REPORT])


def judged_without_model(frame: pd.DataFrame, settings: TrainingSettings) -> pd.DataFrame:
    """Holdout rows of a pooled group that has no model, so that the fleet's answers are judged anyway."""
    rows = _prepare(frame, settings)
    return _holdout(rows, np.full(len(rows), np.nan), settings)


def _prepare(frame: pd.DataFrame, settings: TrainingSettings) -> pd.DataFrame:
    """Rows in a fixed order, with their split and link-space target.

    A row is valid if its target is finite and the transform and the objective take it, or it is one of the fleet's classes; usable
    if it also has an offset and a scale. Rows with a null target, or without a positive weight, are dropped.
    """
    classes = settings.model_spec.classes
    known = (frame[settings.target] if classes else pd.to_numeric(frame[settings.target], errors="coerce")).notna().to_numpy()
    if settings.weight is not None:
        known &= _row_weights(frame, settings.weight) > 0
    rows = frame[known].sort_values(["time", "row_key"], ignore_index=True)
    if classes:
        values = linked = _class_numbers(rows[settings.target], classes)
    else:
        values = pd.to_numeric(rows[settings.target]).to_numpy(dtype=np.float64)
        linked = link(values, settings.model_spec.target.transform)
    if settings.goal["objective"] in COUNTED:
        linked = np.where(values < 0, np.nan, linked)
    offset, scale = offset_and_scale(rows, settings.model_spec.target)
    with np.errstate(invalid="ignore"):
        residual = (linked - offset) / scale
    if BASE in rows:
        residual = residual - rows[BASE].to_numpy(dtype=np.float64)
    return rows.assign(
        split=settings.cutoffs.assign(rows["time"].to_numpy(), rows["known_at"].to_numpy()),
        _actual=values,
        _offset=offset,
        _scale=scale,
        _target=residual,
        _valid=np.isfinite(linked),
        _usable=np.isfinite(residual),
    )


def _class_numbers(labels: pd.Series, classes: Sequence[str]) -> Floats:
    """Each label's place among the classes; NaN for one that is not there."""
    codes, distinct = pd.factorize(labels)
    places = {name: float(number) for number, name in enumerate(classes)}
    numbers: Floats = np.array([places.get(key_text(label) or "", np.nan) for label in distinct], dtype=np.float64)[codes]
    return numbers


def _reason_not_to_train(rows: pd.DataFrame, ledger: Mapping[str, int], tuning: TuningSpec, *, is_coarse: bool, has_classes: bool) -> str | None:
    """Why LightGBM must not see this group: it trains on such targets silently and then predicts nonsense.

    A coarse group is not lost to one bad group inside it: there, invalid rows are left out and counted.
    """
    if not len(rows):
        return NO_TARGET
    if not is_coarse and ledger["n_invalid"] > 0.01 * len(rows):
        return UNKNOWN_CLASS if has_classes else INFINITE_TARGET
    if ledger["n_fit"] < tuning.fit_rows or ledger["n_tune"] < tuning.tune_rows:
        return TOO_FEW_ROWS
    fit_target = rows.loc[rows["_usable"] & (rows["split"] == FIT), "_target"]
    return CONSTANT_TARGET if fit_target.min() == fit_target.max() else None


def _weights(rows: pd.DataFrame, settings: TrainingSettings) -> Floats | None:
    """Row weights, times the number of rows that a sampled one stands for; None where all count alike."""
    rate = rows[RATE].to_numpy(dtype=np.float64) if RATE in rows else None
    if settings.weight is None:
        return None if rate is None else 1.0 / rate
    weights = _row_weights(rows, settings.weight)
    return weights if rate is None else weights / rate


def _row_weights(rows: pd.DataFrame, name: str) -> Floats:
    """The column of row weights; what is not a finite number above 0 is 0."""
    weights = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    found: Floats = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    return found


def _holdout(rows: pd.DataFrame, predictions: Floats, settings: TrainingSettings, *, every_split: bool = False) -> pd.DataFrame:
    """The judged rows: those of the tune and report splits (or of all) whose target is valid; for multiclass one per class."""
    judged = rows["_valid"].to_numpy() & (every_split | ~rows["split"].isin([FIT, GAP]).to_numpy())
    kept, predicted = rows[judged], predictions[judged]
    ids = np.stack([group_ids(kept, keys) for keys in settings.model_spec.grains], axis=1) if len(kept) else np.empty((0, 1), dtype=object)
    weight = _weights(kept, settings)
    found = pd.DataFrame(
        {
            "row_key": kept["row_key"].to_numpy(),
            "class_name": None,
            "time": kept["time"].to_numpy(),
            "split": kept["split"].to_numpy(),
            "actual": kept["_actual"].to_numpy(),
            "offset": kept["_offset"].to_numpy(),
            "scale": kept["_scale"].to_numpy(),
            "weight": np.ones(len(kept)) if weight is None else weight,
            "prediction": predicted if predicted.ndim == 1 else np.nan,
            "group_ids": list(ids),
        }
    )
    if not settings.model_spec.is_multiclass:
        return found
    codes = kept["_actual"].to_numpy()
    of_classes = [
        found.assign(
            class_name=name,
            actual=np.where(codes == number, 1.0, 0.0),
            prediction=predicted[:, number] if predicted.ndim > 1 else np.nan,
        )
        for number, name in enumerate(settings.model_spec.classes)
    ]
    return pd.concat(of_classes, ignore_index=True)
