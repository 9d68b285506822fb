"""`train_group`: one group's rows in, one outcome out. No Spark, Dagster, MLflow or network."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import (
    Floats,
    ModelSpec,
    design_matrix,
    group_ids,
    link,
    number_values,
    offset_and_scale,
)
from pipeline.models.start import CrossSelection, Start, Winner
from pipeline.spec import COUNTED, FleetSpec, TuningSpec
from pipeline.training.objective import learning_goal
from pipeline.training.outcome import (
    CONSTANT_TARGET,
    INFINITE_TARGET,
    NO_TARGET,
    NOT_POOLED,
    TOO_FEW_ROWS,
    UNKNOWN_CLASS,
    Outcome,
    Status,
)
from pipeline.training.splits import EARLIER, FIT, GAP, REPORT, TUNE, Cutoffs
from pipeline.training.tuner import Learner, Study, TrainingSet

POOLED = 0
NO_START = Start()
RATE = "_rate"
BASE = "_base"
# Parts of the fit rows, by time, that are predicted by models which were not fitted on them.
FOLDS = 5
# Of the fit rows, what must lie before a stretch that is held out once more.
MIN_SHARE_BEFORE = 2 / 3
# A finest group with a larger share of invalid rows is not trained.
MAX_INVALID = 0.01

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingSettings:
    """What every group of a run shares; small enough to travel to each worker.

    Args:
        run_id: the training run, also the fleet version.
        model_spec: as in a pack's spec.json: features, categories, grains, target, task,
            classes.
        goal: what LightGBM is to learn, as from `objective.learning_goal`.
        target: name of the target column.
        weight: name of the weight column, or None.
        tuning: budget per group.
        cutoffs: the run's dates.
        threads: LightGBM's threads, the same number as `spark.task.cpus`; whoever trains sets it.
        is_weighed: whether weights are chosen: not without pooling.
    """

    run_id: str
    model_spec: ModelSpec
    goal: Mapping[str, Any]
    target: str
    weight: str | None
    tuning: TuningSpec
    cutoffs: Cutoffs
    threads: int = 1
    is_weighed: bool = True

    @classmethod
    def of_fleet(
        cls, spec: FleetSpec, model_spec: ModelSpec, *, run_id: str, cutoffs: Cutoffs
    ) -> "TrainingSettings":
        """What the groups of a fleet share in a run with that model spec."""
        return cls(
            run_id=run_id,
            model_spec=model_spec,
            goal=learning_goal(spec, len(model_spec.classes)),
            target=spec.target.column,
            weight=spec.target.weight,
            tuning=spec.tuning,
            cutoffs=cutoffs,
            is_weighed=spec.pooling != "none",
        )


def train_group(
    frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start = NO_START
) -> Outcome:
    """Tune and fit one group's model.

    Args:
        frame: the group's visible rows: time, known_at (UTC), row_key, keys, features, target; in
            any order. An optional column `_rate` is the share of rows like this one that were
            sampled; an optional column `_base` is what the parent's model predicts, in link space
            less offset over scale, which the group's trees then correct.
        grain: index of the group's grain; 0 is the pooled model.
        settings: the run's.
        start: what is known from earlier runs.

    Returns:
        `trained` or `refreshed` with its booster, or `inherited` with a reason. The pooled group
        has holdout rows in either case, so that every row of the tune and report splits is judged
        once, whether or not any model was trained.
    """
    started = time.perf_counter()
    group = _GroupRows.prepare(frame, grain, settings)
    predictions = group.no_predictions()
    reason: str | None = NOT_POOLED
    if not start.judge:
        reason = group.reason_not_to_train()
    if reason is not None:
        judged = None
        if grain == POOLED:
            judged = group.holdout(predictions)
        counts = {**group.counts, "seconds": time.perf_counter() - started}
        return Outcome("inherited", reason, counts, None, judged)
    status: Status
    if start.refit is None:
        status = "trained"
        recipe = _tune(group, start, predictions)
    else:
        status = "refreshed"
        recipe = _take_over(group, start, predictions)
    group.predict_unseen(recipe, predictions)
    is_earlier = group.predict_earlier(recipe, start, predictions)
    served = group.fit(group.is_usable, recipe.parameters, recipe.n_rounds)
    booster = encode_booster(served.model_to_string())
    ledger = {
        **group.counts,
        **recipe.ledger,
        "booster_id": booster.booster_id,
        "n_rounds": recipe.n_rounds,
        "parameters": json.dumps(recipe.parameters, sort_keys=True),
        "cross_selection": recipe.cross_selection,
        "lightgbm_seconds": group.learner.clock.seconds,
    }
    holdout = group.holdout(predictions, is_earlier, every_split=group.is_corrected)
    ledger["seconds"] = time.perf_counter() - started
    return Outcome(status, None, ledger, booster, holdout)


@dataclass(frozen=True)
class _Recipe:
    """How a group's models are fitted.

    Args:
        parameters: of LightGBM, less the fixed ones.
        n_rounds: boosting rounds.
        cross: who did best on each half of the tune rows, where that is known.
        ledger: what the ledger keeps of the search.
    """

    parameters: Mapping[str, Any]
    n_rounds: int
    cross: CrossSelection | None
    ledger: Mapping[str, Any]

    @property
    def winner(self) -> Winner:
        """Its parameters and rounds."""
        return Winner(self.parameters, self.n_rounds)

    @property
    def cross_selection(self) -> str | None:
        """As the ledger has it."""
        if self.cross is None:
            return None
        return self.cross.to_json()


@dataclass(frozen=True)
class _GroupRows:
    """The rows of one group that count, in a fixed order.

    Args:
        rows: as from `_prepare`.
        grain: index of the group's grain.
        settings: the run's.
        learner: runs LightGBM.
    """

    rows: pd.DataFrame
    grain: int
    settings: TrainingSettings
    learner: Learner

    @classmethod
    def prepare(cls, frame: pd.DataFrame, grain: int, settings: TrainingSettings) -> "_GroupRows":
        """From the rows as the worker has them."""
        learner = Learner(
            settings.goal,
            settings.tuning,
            settings.model_spec.categorical_positions,
            settings.threads,
        )
        return cls(_prepare(frame, settings), grain, settings, learner)

    @cached_property
    def is_usable(self) -> Mask:
        """Rows with a valid target, an offset and a scale."""
        return self.rows["_usable"].to_numpy(dtype=bool)

    def usable_in(self, *splits: str) -> Mask:
        """The usable rows of some splits."""
        return self.is_usable & self.rows["split"].isin(splits).to_numpy()

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by split, as the ledger has them."""
        return {
            "n_fit": int(self.usable_in(FIT).sum()),
            "n_tune": int(self.usable_in(TUNE).sum()),
            "n_report": int(self.usable_in(REPORT).sum()),
            "n_invalid": int((~self.rows["_valid"]).sum()),
        }

    @property
    def is_coarse(self) -> bool:
        """Whether there are finer groups within this one."""
        return self.grain < max(1, len(self.settings.model_spec.grains) - 1)

    @property
    def is_corrected(self) -> bool:
        """Whether finer groups correct this one's predictions, and need one for every row."""
        return self.is_coarse and self.settings.model_spec.corrects

    @cached_property
    def training_set(self) -> TrainingSet:
        """All rows as LightGBM takes them."""
        matrix = design_matrix(self.rows, self.settings.model_spec)
        return TrainingSet(
            matrix, self.rows["_target"].to_numpy(), _weights(self.rows, self.settings)
        )

    def fit(self, chosen: Mask, parameters: Mapping[str, Any], n_rounds: int) -> Any:
        """A booster fitted on the chosen rows."""
        return self.learner.fit(self.training_set.rows(chosen), dict(parameters), n_rounds)

    def predict(self, booster: Any, chosen: Mask) -> Floats:
        """What a booster predicts of the chosen rows."""
        return self.learner.predict(booster, self.training_set.matrix[chosen])

    def predict_by(
        self, winner: Winner, is_learnt: Mask, chosen: Mask, predictions: Floats
    ) -> None:
        """Predict the chosen rows by a booster fitted on those that are learnt from; in place."""
        if chosen.any():
            booster = self.fit(is_learnt, winner.parameters, winner.n_rounds)
            predictions[chosen] = self.predict(booster, chosen)

    def no_predictions(self) -> Floats:
        """NaN for each row; for multiclass for each row and class."""
        shape = [len(self.rows)]
        n_classes = self.settings.goal.get("num_class")
        if n_classes:
            shape.append(n_classes)
        return np.full(shape, np.nan)

    def predict_unseen(self, recipe: _Recipe, predictions: Floats) -> None:
        """Predict report rows by a model of fit and tune rows; in place.

        Finer groups that correct this one's predictions need one for every row, made without that
        row: then fit rows are also predicted, fold by fold, and what the parent predicts is added.
        """
        later = [REPORT]
        if self.is_corrected:
            later.append(GAP)
        is_later = self.usable_in(*later)
        is_learnt = self.usable_in(FIT, TUNE)
        self.predict_by(recipe.winner, is_learnt, is_later, predictions)
        if self.is_corrected:
            self._predict_folds(recipe, predictions)
        if BASE in self.rows:
            predictions += self.rows[BASE].to_numpy(dtype=np.float64)

    def predict_earlier(self, recipe: _Recipe, start: Start, predictions: Floats) -> Mask:
        """Predict the stretches before the tune split by models of what lies before each; in place.

        A stretch with fewer rows before it than training takes, or than `MIN_SHARE_BEFORE` of the
        fit rows, is passed over: a model of much less says nothing of the one that will serve.
        So is one with no two targets before it, or without one of the classes. Where models
        correct a parent, fit rows have out-of-fold predictions already, and none is passed to the
        blend; without pooling there is no weight to choose.

        Args:
            recipe: how the group's models are fitted.
            start: of a refit, who was chosen without which tune rows: these may be fit rows by now.
            predictions: of all rows.

        Returns:
            The rows that are predicted.
        """
        is_earlier = np.zeros(len(self.rows), dtype=bool)
        if self.settings.model_spec.corrects or not self.settings.is_weighed:
            return is_earlier
        is_fit = self.usable_in(FIT)
        n_needed = max(self.settings.tuning.fit_rows, MIN_SHARE_BEFORE * is_fit.sum())
        time = self.rows["time"].to_numpy()
        known_at = self.rows["known_at"].to_numpy()
        cutoffs = self.settings.cutoffs
        starts = [
            moment.to_datetime64() for moment in (cutoffs.tune_start, *cutoffs.earlier_starts)
        ]
        for end, begin in pairwise(starts):
            is_before = is_fit & (time < begin) & (known_at < begin)
            is_within = is_fit & (time >= begin) & (time < end)
            if is_before.sum() < n_needed or not self._can_learn(is_before, is_fit):
                continue
            for winner, rows in _predictors(recipe.winner, start.cross, self.rows, is_within):
                self.predict_by(winner, is_before, rows, predictions)
            is_earlier |= is_within
        return is_earlier

    def _can_learn(self, chosen: Mask, is_fit: Mask) -> bool:
        """Whether the chosen rows have more than one target, and all classes of the fit rows."""
        targets = self.rows["_target"].to_numpy()
        distinct = np.unique(targets[chosen])
        if self.settings.model_spec.classes:
            return len(distinct) == len(np.unique(targets[is_fit]))
        return len(distinct) > 1

    def _predict_folds(self, recipe: _Recipe, predictions: Floats) -> None:
        is_fit = self.usable_in(FIT)
        for fold in np.array_split(np.flatnonzero(is_fit), FOLDS):
            if not len(fold):
                continue
            left_out = np.isin(np.arange(len(self.rows)), fold)
            self.predict_by(recipe.winner, is_fit & ~left_out, left_out, predictions)

    def reason_not_to_train(self) -> str | None:
        """Why LightGBM must not see this group; None where it may.

        It would train on such targets silently, and then predict nonsense. A coarse group is not
        lost to one bad group inside it: there, invalid rows are left out and counted.
        """
        counts, tuning = self.counts, self.settings.tuning
        if self.rows.empty:
            return NO_TARGET
        if not self.is_coarse and counts["n_invalid"] > MAX_INVALID * len(self.rows):
            if self.settings.model_spec.classes:
                return UNKNOWN_CLASS
            return INFINITE_TARGET
        if counts["n_fit"] < tuning.fit_rows or counts["n_tune"] < tuning.tune_rows:
            return TOO_FEW_ROWS
        fit_target = self.rows.loc[self.usable_in(FIT), "_target"]
        if fit_target.min() == fit_target.max():
            return CONSTANT_TARGET
        return None

    def holdout(
        self, predictions: Floats, is_earlier: Mask | None = None, *, every_split: bool = False
    ) -> pd.DataFrame:
        """The judged rows, as `_holdout` gives them.

        Args:
            predictions: of all rows.
            is_earlier: fit rows that are held out, too.
            every_split: whether all rows are.
        """
        rows = self.rows
        if is_earlier is not None:
            rows = rows.assign(split=np.where(is_earlier, EARLIER, rows["split"]))
        return _holdout(rows, predictions, self.settings, every_split=every_split)


def _tune(group: _GroupRows, start: Start, predictions: Floats) -> _Recipe:
    """Choose parameters and rounds on the tune rows, which are predicted in place."""
    is_tune, middle = group.usable_in(TUNE), group.settings.cutoffs.tune_middle
    is_first_block = (group.rows["time"] < middle).to_numpy()[is_tune]
    everything = group.training_set
    fit, tune = everything.rows(group.usable_in(FIT)), everything.rows(is_tune)
    tuned = Study(fit, tune, is_first_block, group.learner, start).run()
    predictions[is_tune] = tuned.cross_predictions
    return _Recipe(
        tuned.parameters,
        tuned.n_rounds,
        CrossSelection(middle.isoformat(), tuned.earlier, tuned.later),
        {
            "n_trials": tuned.n_trials,
            "n_pruned": tuned.n_pruned,
            "stopped_by": tuned.stopped_by,
            "tune_loss": tuned.tune_loss,
        },
    )


def _take_over(group: _GroupRows, start: Start, predictions: Floats) -> _Recipe:
    """Take the parameters of an earlier run, and predict the tune rows in place."""
    chosen, is_fit = Winner(start.refit or {}, start.n_rounds), group.usable_in(FIT)
    for winner, rows in _predictors(chosen, start.cross, group.rows, group.usable_in(TUNE)):
        group.predict_by(winner, is_fit, rows, predictions)
    nothing_tried = {"n_trials": 0, "n_pruned": 0}
    return _Recipe(dict(start.refit or {}), start.n_rounds, start.cross, nothing_tried)


def _predictors(
    chosen: Winner, cross: CrossSelection | None, rows: pd.DataFrame, is_held_out: Mask
) -> list[tuple[Winner, Mask]]:
    """Who predicts which held-out rows: never a winner that the row itself helped to choose.

    Rows have moved on since a refit's parameters were chosen, so the halves are cut where they were
    cut then.

    Args:
        chosen: on all tune rows of that time.
        cross: who was chosen on each half of them; None where that is not known, or where the rows
            chose nothing.
        rows: of the group.
        is_held_out: of them.
    """
    if cross is None:
        return [(chosen, is_held_out)]
    is_before = (rows["time"] < pd.Timestamp(cross.middle)).to_numpy()
    return [
        (cross.predicts_before or chosen, is_held_out & is_before),
        (cross.predicts_after or chosen, is_held_out & ~is_before),
    ]


def fit_twin(
    frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start = NO_START
) -> Outcome:
    """Judge a recipe as `train_group` judges its own; nothing is served.

    It is fitted on fit and tune rows, and predicts the report rows.

    Args:
        frame: as for `train_group`.
        grain: index of the group's grain.
        settings: those of the run whose rows these are, with the model spec that the recipe belongs
            to.
        start: parameters and rounds of the recipe, as `refit`.
    """
    if settings.model_spec.corrects:  # finer groups correct predictions of all its rows
        return train_group(frame, grain, settings, start)
    group = _GroupRows.prepare(frame, grain, settings)
    is_learnt, is_report = group.usable_in(FIT, TUNE), group.usable_in(REPORT)
    predictions = group.no_predictions()
    if is_learnt.any():
        recipe = Winner(start.refit or {}, start.n_rounds)
        group.predict_by(recipe, is_learnt, is_report, predictions)
    holdout = group.holdout(predictions)
    return Outcome("refreshed", None, {}, None, holdout[holdout["split"] == REPORT])


def judged_without_model(frame: pd.DataFrame, settings: TrainingSettings) -> pd.DataFrame:
    """Holdout rows of a pooled group without a model: the fleet's answers are judged anyway."""
    group = _GroupRows.prepare(frame, POOLED, settings)
    return group.holdout(group.no_predictions())


def _prepare(frame: pd.DataFrame, settings: TrainingSettings) -> pd.DataFrame:
    """Rows in a fixed order, with their split and link-space target.

    A row is valid if its target is finite and the transform and the objective take it, or it is one
    of the fleet's classes; usable if it also has an offset and a scale. Rows with a null target, or
    without a positive weight, are dropped.
    """
    target = frame[settings.target]
    if not settings.model_spec.classes:
        target = pd.to_numeric(target, errors="coerce")
    is_kept = target.notna().to_numpy()
    if settings.weight is not None:
        is_kept &= _row_weights(frame, settings.weight) > 0
    rows = frame[is_kept].sort_values(["time", "row_key"], ignore_index=True)
    values, linked = _read_target(rows, settings)
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


def _read_target(rows: pd.DataFrame, settings: TrainingSettings) -> tuple[Floats, Floats]:
    """The target of every row: in its own units (for a class its number), and in link space."""
    model_spec = settings.model_spec
    if model_spec.classes:
        values = number_values(rows[settings.target], model_spec.classes)
        return values, values
    values = pd.to_numeric(rows[settings.target]).to_numpy(dtype=np.float64)
    linked = link(values, model_spec.target.transform)
    if settings.goal["objective"] in COUNTED:
        linked = np.where(values < 0, np.nan, linked)
    return values, linked


def _weights(rows: pd.DataFrame, settings: TrainingSettings) -> Floats | None:
    """Row weights, times the number of rows that a sampled one stands for.

    None where all count alike.
    """
    weights = None
    if settings.weight is not None:
        weights = _row_weights(rows, settings.weight)
    if RATE not in rows:
        return weights
    rate: Floats = rows[RATE].to_numpy(dtype=np.float64)
    if weights is None:
        return 1.0 / rate
    return weights / rate


def _row_weights(rows: pd.DataFrame, name: str) -> Floats:
    """The column of row weights; what is not a finite number above 0 is 0."""
    numbers = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    weights: Floats = np.where(np.isfinite(numbers) & (numbers > 0), numbers, 0.0)
    return weights


def _holdout(
    rows: pd.DataFrame,
    predictions: Floats,
    settings: TrainingSettings,
    *,
    every_split: bool = False,
) -> pd.DataFrame:
    """The judged rows, whose target is valid: all but those of the splits fit and gap, or all.

    For multiclass one per class.
    """
    is_judged = rows["_valid"].to_numpy()
    if not every_split:
        is_judged = is_judged & ~rows["split"].isin([FIT, GAP]).to_numpy()
    judged, predicted = rows[is_judged], predictions[is_judged]
    ids = np.empty((0, 1), dtype=object)
    if len(judged):
        ids = np.stack([group_ids(judged, keys) for keys in settings.model_spec.grains], axis=1)
    weight = _weights(judged, settings)
    if weight is None:
        weight = np.ones(len(judged))
    actual = judged["_actual"].to_numpy()
    holdout = pd.DataFrame(
        {
            "row_key": judged["row_key"].to_numpy(),
            "class_name": None,
            "time": judged["time"].to_numpy(),
            "split": judged["split"].to_numpy(),
            "actual": actual,
            "offset": judged["_offset"].to_numpy(),
            "scale": judged["_scale"].to_numpy(),
            "weight": weight,
            "prediction": predicted if predicted.ndim == 1 else np.nan,
            "group_ids": list(ids),
        }
    )
    if not settings.model_spec.is_multiclass:
        return holdout
    by_class = []
    for number, name in enumerate(settings.model_spec.classes):
        is_class = np.where(actual == number, 1.0, 0.0)
        by_class.append(
            holdout.assign(class_name=name, actual=is_class, prediction=predicted[:, number])
        )
    return pd.concat(by_class, ignore_index=True)
