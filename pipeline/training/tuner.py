"""Choosing one group's parameters and rounds on its tune rows."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import optuna

from pipeline.models.start import Start, Winner
from pipeline.spec import TuningSpec
from pipeline.training.objective import (
    MAX_BIN,
    Parameters,
    default_parameters,
    early_stopping_rounds,
    fixed_parameters,
    inside,
    row_losses,
    search_space,
    suggest_parameters,
)

Floats = npt.NDArray[np.float64]
REPORT_EVERY = 10


class Clock:
    """Adds up the seconds of the blocks it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._entered


@dataclass(frozen=True)
class TrainingSet:
    """What LightGBM is given of some rows.

    Args:
        matrix: one row per row, one column per feature, float32.
        target: in link space, less the offset, over the scale; for classes their number.
        weight: row weights, or None for equal ones.
    """

    matrix: npt.NDArray[np.float32]
    target: Floats
    weight: Floats | None

    def rows(self, chosen: npt.NDArray[Any]) -> "TrainingSet":
        """The chosen rows (a mask or positions)."""
        weight = None
        if self.weight is not None:
            weight = self.weight[chosen]
        return TrainingSet(self.matrix[chosen], self.target[chosen], weight)

    def dataset(
        self, categoricals: list[int], *, reference: lgb.Dataset | None = None
    ) -> lgb.Dataset:
        """A LightGBM data set; with a reference its bins are the reference's."""
        settings = {"verbosity": -1, "feature_pre_filter": False, "max_bin": MAX_BIN}
        return lgb.Dataset(
            self.matrix,
            self.target,
            weight=self.weight,
            categorical_feature=categoricals,
            reference=reference,
            params=settings,
        )

    def __len__(self) -> int:
        return len(self.target)

    @property
    def total_weight(self) -> float:
        """Sum of the row weights."""
        if self.weight is None:
            return float(len(self))
        return float(self.weight.sum())


@dataclass(frozen=True)
class Learner:
    """How LightGBM is run for a group, whatever the trial.

    Args:
        goal: what is learnt, see `objective.learning_goal`.
        tuning: the fleet's budget and search space.
        categoricals: positions of categorical features.
        threads: LightGBM's.
        clock: adds up the seconds inside LightGBM.
    """

    goal: Mapping[str, Any]
    tuning: TuningSpec
    categoricals: list[int] = field(default_factory=list)
    threads: int = 1
    clock: Clock = field(default_factory=Clock)

    def fit(self, rows: TrainingSet, parameters: Parameters, n_rounds: int) -> lgb.Booster:
        """Fit once, with given parameters and rounds."""
        with self.clock:
            return lgb.train(
                {**self.fixed_parameters, **parameters},
                rows.dataset(self.categoricals),
                num_boost_round=n_rounds,
                keep_training_booster=True,  # else it is written out and read back
            )

    def predict(
        self, booster: lgb.Booster, matrix: npt.NDArray[np.float32], n_rounds: int | None = None
    ) -> Floats:
        """What a booster, or its first rounds, gives for rows; for multiclass one per class."""
        with self.clock:
            answers = booster.predict(matrix, num_iteration=n_rounds, num_threads=self.threads)
        return np.asarray(answers)

    @property
    def fixed_parameters(self) -> Parameters:
        """LightGBM parameters that no trial changes."""
        return fixed_parameters(self.tuning, self.goal, threads=self.threads)


@dataclass(frozen=True)
class TuningResult:
    """What a study found.

    Args:
        parameters: the best trial's, less the fixed ones.
        n_rounds: boosting rounds of the best trial, at least 1.
        tune_loss: its loss on all tune rows: the goal's metric, in link space.
        cross_predictions: per tune row the prediction (for multiclass one per class) of the (trial,
            round) that did best on the other block of tune rows.
        earlier: the (trial, round) that did best on the first block; None where it has no rows.
        later: the same of the second block.
        n_trials: trials that ended, those given up early among them.
        n_pruned: trials given up early.
        stopped_by: max_trials, patience or timeout.
    """

    parameters: Parameters
    n_rounds: int
    tune_loss: float
    cross_predictions: Floats
    earlier: Winner | None
    later: Winner | None
    n_trials: int
    n_pruned: int
    stopped_by: str


@dataclass(eq=False)
class _Boosting:
    """Follows one trial round by round: stops it early and lets the pruner see it."""

    trial: optuna.Trial
    shares: list[float]
    patience: int
    losses: list[list[float]] = field(default_factory=list)
    best_round: int = 0
    best_loss: float = np.inf
    order: int = 20  # LightGBM calls callbacks in this order, after its own
    before_iteration: bool = False

    def __call__(self, env: Any) -> None:
        blocks = [entry[2] for entry in env.evaluation_result_list]
        loss = sum(share * value for share, value in zip(self.shares, blocks, strict=True))
        self.losses.append(blocks)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best_round = env.iteration
        if env.iteration % REPORT_EVERY == REPORT_EVERY - 1:
            self.trial.report(self.best_loss, env.iteration)
            if self.trial.should_prune():
                raise optuna.TrialPruned
        if env.iteration - self.best_round >= self.patience:
            # LightGBM drops the trees after the iteration named here; a block's own best round may
            # be among them.
            raise lgb.callback.EarlyStopException(env.iteration, [("tune", "loss", loss, False)])


@dataclass(eq=False)
class _Block:
    """One of the two blocks of cross-selection, and the (trial, round) that does best on it."""

    rows: npt.NDArray[np.bool_]
    best_loss: float = np.inf
    winner: Winner | None = None


class Study:
    """One group's search: the data set is built once, trials share it.

    Args:
        fit: rows that trees are grown on.
        tune: rows that stop boosting and choose.
        blocks: which tune rows belong to the first of the two blocks of cross-selection.
        learner: runs LightGBM.
        start: parameters to try first, and perhaps a smaller budget.
    """

    def __init__(
        self,
        fit: TrainingSet,
        tune: TrainingSet,
        blocks: npt.NDArray[np.bool_],
        learner: Learner,
        start: Start,
    ) -> None:
        tuning = learner.tuning
        self._space = search_space(len(fit), tuning)
        self._firsts = [*start.trials, default_parameters(len(fit))]
        self._learner = learner
        self._tuning = tuning
        self._max_trials = min(tuning.max_trials, start.max_trials or tuning.max_trials)
        self._fixed = learner.fixed_parameters
        self._tune = tune
        self._earlier = _Block(blocks)
        self._later = _Block(~blocks)
        self._blocks = [block for block in (self._earlier, self._later) if block.rows.any()]
        parts = [tune.rows(block.rows) for block in self._blocks]
        with learner.clock:
            self._fit_set = fit.dataset(learner.categoricals)
            self._tune_sets = [
                part.dataset(learner.categoricals, reference=self._fit_set) for part in parts
            ]
        weights = [part.total_weight for part in parts]
        total_weight = max(sum(weights), 1e-300)
        self._shares = [weight / total_weight for weight in weights]
        self._best: tuple[Parameters, int, float] | None = None
        self._best_misses: Floats | None = None
        self._since_best = 0
        shape = [len(tune)]
        if "num_class" in learner.goal:
            shape.append(learner.goal["num_class"])
        self._cross = np.zeros(shape)
        self._stopped_by = "max_trials"
        self._deadline = time.monotonic() + (tuning.timeout_seconds or np.inf)

    def run(self) -> TuningResult:
        """Search, and return the best of what was tried.

        Earlier runs' parameters are tried first, then the defaults.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=self._tuning.seed, n_startup_trials=4, multivariate=True
        )
        pruner = optuna.pruners.PercentilePruner(
            50.0, n_startup_trials=1, n_warmup_steps=2 * REPORT_EVERY
        )
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        for first in self._firsts:
            study.enqueue_trial(inside(first, self._space), skip_if_exists=True)
        study.optimize(self._run_trial, n_trials=self._max_trials, callbacks=[self._maybe_stop])
        if self._best is None:
            raise RuntimeError(f"none of {len(study.trials)} trials finished")
        parameters, n_rounds, loss = self._best
        state = optuna.trial.TrialState
        pruned = study.get_trials(deepcopy=False, states=[state.PRUNED])
        ended = study.get_trials(deepcopy=False, states=[state.COMPLETE, state.PRUNED, state.FAIL])
        return TuningResult(
            parameters=parameters,
            n_rounds=n_rounds,
            tune_loss=loss,
            cross_predictions=self._cross,
            earlier=self._earlier.winner,
            later=self._later.winner,
            n_trials=len(ended),
            n_pruned=len(pruned),
            stopped_by=self._stopped_by,
        )

    def _run_trial(self, trial: optuna.Trial) -> float:
        parameters = suggest_parameters(trial, self._space)
        self._since_best += 1
        boosting = _Boosting(
            trial, self._shares, early_stopping_rounds(parameters["learning_rate"])
        )
        with self._learner.clock:
            booster = lgb.train(
                {**self._fixed, **parameters},
                self._fit_set,
                num_boost_round=self._tuning.max_rounds,
                valid_sets=self._tune_sets,
                callbacks=[boosting],
                keep_training_booster=True,  # else it is written out and read back
            )
        if self._best is None or boosting.best_loss < self._best[2]:
            misses = self._misses(booster, boosting.best_round + 1)
            if self._is_clear_gain(misses):
                self._since_best = 0
            self._best = parameters, boosting.best_round + 1, boosting.best_loss
            self._best_misses = misses
        self._cross_select(booster, parameters, np.asarray(boosting.losses))
        return boosting.best_loss

    def _is_clear_gain(self, misses: Floats) -> bool:
        """Whether a new best trial beats the one before by more than noise."""
        if self._best_misses is None:
            return True
        return is_beyond_noise(self._best_misses - misses, self._tune.weight)

    def _misses(self, booster: lgb.Booster, n_rounds: int) -> Floats:
        """Loss of each tune row."""
        predictions = self._learner.predict(booster, self._tune.matrix, n_rounds)
        return row_losses(self._learner.goal, self._tune.target, predictions)

    def _cross_select(self, booster: lgb.Booster, parameters: Parameters, losses: Floats) -> None:
        """Predict each block of tune rows by the (trial, round) best on the other block."""
        for number, block in enumerate(self._blocks):
            best_round = int(losses[:, number].argmin())
            best_loss = float(losses[best_round, number])
            if best_loss < block.best_loss:
                block.best_loss = best_loss
                block.winner = Winner(parameters, best_round + 1)
                others = self._blocks[number - 1].rows  # with one block, itself
                matrix = self._tune.matrix[others]
                self._cross[others] = self._learner.predict(booster, matrix, best_round + 1)

    def _maybe_stop(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:  # noqa: ARG002
        if self._since_best >= self._tuning.patience:
            self._stopped_by = "patience"
            study.stop()
        elif time.monotonic() > self._deadline:
            self._stopped_by = "timeout"
            study.stop()


def is_beyond_noise(gains: Floats, weight: Floats | None) -> bool:
    """Whether a gain, given per tune row, is larger than its own standard error.

    One row alone never shows a gain.
    """
    if weight is None:
        shares = np.full(len(gains), 1 / len(gains))
    else:
        shares = weight / max(float(weight.sum()), 1e-300)
    mean = float(shares @ gains)
    n_counting = int((shares > 0).sum())
    if n_counting < 2:  # noqa: PLR2004 - of one row there is no variance
        return False
    variance = n_counting / (n_counting - 1) * float((shares**2) @ (gains - mean) ** 2)
    return bool(mean > np.sqrt(variance))
