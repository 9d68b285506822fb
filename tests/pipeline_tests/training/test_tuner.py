from collections.abc import Sequence
from typing import Any

import lightgbm as lgb
import numpy as np
import optuna
import pytest

from pipeline.models.start import Start
from pipeline.spec import SearchRange, TuningSpec
from pipeline.testing.data import small_spec
from pipeline.training import tuner as module
from pipeline.training.objective import (
    default_parameters,
    early_stopping_rounds,
    fixed_parameters,
    inside,
    learning_goal,
    row_losses,
    search_space,
    suggest_parameters,
)
from pipeline.training.tuner import Clock, Learner, Study, TrainingSet, TuningResult

RNG = np.random.default_rng(7)
N_TUNE = 80


def learnable(n: int, *, seed: int, noise: float = 1.0, weight: bool = False) -> TrainingSet:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, 4)).astype(np.float32)
    target = 3 * matrix[:, 0] + 2 * np.sin(3 * matrix[:, 1]) + noise * rng.normal(size=n)
    return TrainingSet(matrix, target, rng.uniform(0.1, 3, n) if weight else None)


FIT_ROWS, TUNE_ROWS = learnable(300, seed=1), learnable(N_TUNE, seed=2)
BLOCKS = np.arange(N_TUNE) < N_TUNE // 2
SQUARES = learning_goal(small_spec())


class Recorder:
    """Keeps every trial's booster with its losses per block and round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trials: list[tuple[lgb.Booster, np.ndarray[Any, Any]]] = []
        self.parameters: list[dict[str, Any]] = []
        select, train = Study._cross_select, lgb.train

        def recorded(study: Study, booster: lgb.Booster, parameters: Any, losses: Any) -> None:
            self.trials.append((booster, losses.copy()))
            select(study, booster, parameters, losses)

        def recorded_train(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> lgb.Booster:
            self.parameters.append(parameters)
            return train(parameters, *args, **kwargs)

        monkeypatch.setattr(Study, "_cross_select", recorded)
        monkeypatch.setattr(lgb, "train", recorded_train)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def studied(
    fit: TrainingSet = FIT_ROWS,
    tune: TrainingSet = TUNE_ROWS,
    blocks: Any = BLOCKS,
    goal: Any = SQUARES,
    start: Start | None = None,
    **tuning: Any,
) -> TuningResult:
    settings = {"max_trials": 5, "patience": 5, "max_rounds": 120, **tuning}
    learner = Learner(goal, TuningSpec(**settings))
    return Study(fit, tune, blocks, learner, start or Start()).run()


def mean_squares(booster: lgb.Booster, rows: TrainingSet, n_rounds: int) -> float:
    return float(
        np.average(
            (rows.target - booster.predict(rows.matrix, num_iteration=n_rounds)) ** 2,
            weights=rows.weight,
        )
    )


def test_the_best_rounds_are_the_best_round_and_one(recorder: Recorder) -> None:
    found = studied(max_trials=1)
    [(booster, _)] = recorder.trials
    losses = [
        mean_squares(booster, TUNE_ROWS, rounds)
        for rounds in range(1, booster.current_iteration() + 1)
    ]
    assert found.n_rounds == 1 + int(np.argmin(losses))
    assert found.tune_loss == pytest.approx(min(losses))
    assert 1 < found.n_rounds < 120


def test_a_model_that_gets_worse_from_the_first_round_on_has_one_round() -> None:
    backwards = TrainingSet(
        TUNE_ROWS.matrix, -FIT_ROWS.target.mean() - 5 * TUNE_ROWS.matrix[:, 0], None
    )
    found = studied(tune=backwards, max_trials=1)
    assert found.n_rounds == 1


def test_boosting_stops_after_rounds_without_improvement(recorder: Recorder) -> None:
    found = studied(max_trials=1, max_rounds=5000)
    [(booster, losses)] = recorder.trials
    patience = early_stopping_rounds(default_parameters(len(FIT_ROWS))["learning_rate"])
    assert booster.current_iteration() == len(losses) == found.n_rounds + patience


@pytest.mark.parametrize("weight", [False, True])
def test_each_block_is_predicted_by_the_winner_on_the_other(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, weight: bool
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: False)
    tune = learnable(N_TUNE, seed=2, weight=weight)
    found = studied(tune=tune, max_trials=6, patience=6)
    assert len(recorder.trials) > 1
    for own, other in ((BLOCKS, ~BLOCKS), (~BLOCKS, BLOCKS)):
        errors = {
            (number, rounds): mean_squares(booster, tune.rows(other), rounds)
            for number, (booster, _) in enumerate(recorder.trials)
            for rounds in range(1, booster.current_iteration() + 1)
        }
        number, rounds = min(errors, key=lambda key: errors[key])
        expected = recorder.trials[number][0].predict(tune.matrix[own], num_iteration=rounds)
        assert found.cross_predictions[own] == pytest.approx(expected)
        winner = found.later if own is BLOCKS else found.earlier
        assert winner is not None
        assert (
            winner.n_rounds,
            winner.parameters.items() <= recorder.parameters[number].items(),
        ) == (rounds, True)


def test_a_half_without_tune_rows_has_no_winner() -> None:
    found = studied(blocks=np.zeros(N_TUNE, dtype=bool), max_trials=1)
    assert found.earlier is None
    assert found.later is not None


def test_a_blocks_own_outcomes_do_not_choose_its_predictions() -> None:
    found = studied(max_trials=1)
    changed = TrainingSet(
        TUNE_ROWS.matrix,
        np.where(BLOCKS, TUNE_ROWS.target + RNG.normal(size=N_TUNE), TUNE_ROWS.target),
        None,
    )
    again = studied(tune=changed, max_trials=1, max_rounds=120)
    assert np.array_equal(found.cross_predictions[BLOCKS], again.cross_predictions[BLOCKS])


def test_the_loss_of_all_tune_rows_weighs_both_blocks_by_their_weight(recorder: Recorder) -> None:
    tune = learnable(N_TUNE, seed=2, weight=True)
    found = studied(tune=tune, blocks=np.arange(N_TUNE) < 15, max_trials=1)
    [(booster, _)] = recorder.trials
    assert found.tune_loss == pytest.approx(
        min(
            mean_squares(booster, tune, rounds)
            for rounds in range(1, booster.current_iteration() + 1)
        )
    )


@pytest.mark.parametrize("blocks", [np.ones(N_TUNE, dtype=bool), np.zeros(N_TUNE, dtype=bool)])
def test_tune_rows_of_one_block_only_are_predicted_all_the_same(blocks: Any) -> None:
    found = studied(blocks=blocks, max_trials=2)
    assert np.isfinite(found.cross_predictions).all()
    assert np.corrcoef(found.cross_predictions, TUNE_ROWS.target)[0, 1] > 0.5


def test_the_defaults_are_tried_first(recorder: Recorder) -> None:
    studied(max_trials=2)
    expected = default_parameters(len(FIT_ROWS))
    assert {name: recorder.parameters[0][name] for name in expected} == expected
    assert {name: recorder.parameters[1][name] for name in expected} != expected


def test_a_study_ends_at_max_trials() -> None:
    found = studied(max_trials=3, patience=99)
    assert (found.n_trials, found.stopped_by) == (3, "max_trials")


def test_a_study_ends_after_trials_without_improvement() -> None:
    found = studied(max_trials=40, patience=2, max_rounds=30)
    assert found.n_trials < 40
    assert found.stopped_by == "patience"


def test_a_study_ends_at_its_time_limit_with_what_it_has() -> None:
    found = studied(max_trials=50, patience=50, timeout_seconds=1e-6)
    assert (found.n_trials, found.stopped_by) == (1, "timeout")
    assert found.n_rounds >= 1


def test_trials_that_are_given_up_are_counted_and_do_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def prune(trial: optuna.Trial) -> bool:
        calls.append(trial.number)
        return trial.number > 0

    alone = studied(max_trials=1)
    monkeypatch.setattr(optuna.Trial, "should_prune", prune)
    found = studied(max_trials=4, patience=10)
    assert (found.n_trials, found.n_pruned, found.stopped_by) == (4, 3, "max_trials")
    assert (found.parameters, found.n_rounds, found.tune_loss) == (
        alone.parameters,
        alone.n_rounds,
        alone.tune_loss,
    )
    assert np.array_equal(found.cross_predictions, alone.cross_predictions)


def test_trials_that_are_given_up_count_against_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number > 0)
    found = studied(max_trials=9, patience=2)
    assert (found.n_trials, found.n_pruned, found.stopped_by) == (3, 2, "patience")


def test_a_study_is_the_same_for_the_same_seed() -> None:
    one, other = (studied(max_trials=4) for _ in range(2))
    assert np.array_equal(one.cross_predictions, other.cross_predictions)
    assert (one.parameters, one.n_rounds, one.tune_loss) == (
        other.parameters,
        other.n_rounds,
        other.tune_loss,
    )


def test_the_data_set_is_built_once_for_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    dataset = TrainingSet.dataset
    monkeypatch.setattr(
        TrainingSet,
        "dataset",
        lambda rows, *args, **kwargs: built.append(len(rows)) or dataset(rows, *args, **kwargs),
    )
    studied(max_trials=4)
    assert built == [300, 40, 40]


def test_a_study_leaves_optuna_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    studied(max_trials=3)
    assert capfd.readouterr() == ("", "")


GOALS: dict[str, dict[str, Any]] = {
    "l2": {},
    "l1": {"tuning": {"objective": "l1"}},
    "huber": {"tuning": {"objective": "huber", "alpha": 2.0}},
    "quantile": {"tuning": {"objective": "quantile", "alpha": 0.8}},
    "poisson": {"tuning": {"objective": "poisson"}},
    "tweedie": {"tuning": {"objective": "tweedie", "variance_power": 1.3}},
    "binary": {"task": "binary"},
    "multiclass": {"task": "multiclass"},
}


def goal_of(name: str) -> dict[str, Any]:
    return learning_goal(small_spec(baselines=None, **GOALS[name]), n_classes=3)


def suited(rows: TrainingSet, name: str) -> TrainingSet:
    """The rows with a target that the goal takes."""
    steps = np.digitize(rows.target, [-2.0, 2.0]).astype(float)
    target = {
        "binary": (rows.target > 0).astype(float),
        "multiclass": steps,
        "poisson": steps,
        "tweedie": steps,
    }.get(name, rows.target)
    return TrainingSet(rows.matrix, target, rows.weight)


@pytest.mark.parametrize("name", GOALS)
def test_every_goal_learns(name: str) -> None:
    tune = suited(TUNE_ROWS, name)
    found = studied(
        suited(FIT_ROWS, name), tune, goal=goal_of(name), max_trials=1
    ).cross_predictions
    if name == "multiclass":
        assert found.shape == (N_TUNE, 3)
        assert found.sum(axis=1) == pytest.approx(1.0)
        assert (found.argmax(axis=1) == tune.target).mean() > 0.6
    else:
        assert found.shape == (N_TUNE,)
        assert np.corrcoef(found, tune.target)[0, 1] > 0.6


@pytest.mark.parametrize("name", GOALS)
def test_losses_of_rows_rank_models_as_lightgbm_does(name: str) -> None:
    fit, goal, stated, told = suited(FIT_ROWS, name), goal_of(name), {}, {}
    # Less a term that no prediction changes: from one round to another the losses differ by the same.
    booster = lgb.train(
        fixed_parameters(TuningSpec(), goal, threads=1),
        (data := fit.dataset([])),
        20,
        valid_sets=[data],
        callbacks=[lgb.record_evaluation(stated)],
    )
    for n_rounds in (5, 20):
        losses = row_losses(goal, fit.target, booster.predict(fit.matrix, num_iteration=n_rounds))
        assert losses.shape == (len(fit),)
        told[n_rounds] = float(losses.mean())
    (curve,) = next(iter(stated.values())).values()
    assert told[5] - told[20] == pytest.approx(curve[4] - curve[19], rel=1e-6)
    assert told[5] > told[20]


def test_a_goal_says_what_lightgbm_needs_to_know() -> None:
    assert goal_of("quantile") == {"objective": "quantile", "metric": "quantile", "alpha": 0.8}
    assert goal_of("tweedie") == {
        "objective": "tweedie",
        "metric": "tweedie",
        "tweedie_variance_power": 1.3,
    }
    assert goal_of("binary") == {"objective": "binary", "metric": "binary_logloss"}
    assert goal_of("multiclass") == {
        "objective": "multiclass",
        "metric": "multi_logloss",
        "num_class": 3,
    }
    assert learning_goal(small_spec(tuning={"objective": "quantile"}))["alpha"] == 0.5
    assert learning_goal(small_spec(tuning={"objective": "huber"}))["alpha"] == 0.9
    assert (
        learning_goal(small_spec(tuning={"objective": "tweedie"}))["tweedie_variance_power"] == 1.5
    )


def test_constraints_stand_in_the_order_of_the_features() -> None:
    spec = small_spec(features={"monotone": {"promotion": 1, "price": -1}})
    constraints = dict(
        zip(spec.feature_columns, learning_goal(spec)["monotone_constraints"], strict=True)
    )
    assert constraints == {"price": -1, "promotion": 1, "day_of_week": 0, "kind": 0}
    assert "monotone_constraints" not in learning_goal(
        small_spec(features={"monotone": {"price": 0}})
    )


def test_no_trial_changes_what_is_fixed(recorder: Recorder) -> None:
    studied(max_trials=3)
    fixed = fixed_parameters(TuningSpec(), SQUARES, threads=1)
    assert all(parameters | fixed == parameters for parameters in recorder.parameters)


@pytest.mark.parametrize("n_rows", [10, 999, 1_000, 19_999, 20_000, 10**6])
def test_the_defaults_lie_within_what_is_searched(n_rows: int) -> None:
    study = optuna.create_study()
    study.enqueue_trial(default_parameters(n_rows))
    found: list[dict[str, Any]] = []
    study.optimize(
        lambda trial: (
            found.append(suggest_parameters(trial, search_space(n_rows, TuningSpec()))) or 0.0
        ),
        n_trials=1,
    )
    assert found == [default_parameters(n_rows)]


# Earlier runs


GOOD = {
    "learning_rate": 0.07,
    "num_leaves": 5,
    "min_data_in_leaf": 9,
    "lambda_l2": 2.0,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
}
PARENTS = {**GOOD, "num_leaves": 7}


def tried(recorder: Recorder) -> list[dict[str, Any]]:
    return [{name: found[name] for name in GOOD} for found in recorder.parameters]


def test_parameters_of_earlier_runs_are_tried_first_then_the_defaults(recorder: Recorder) -> None:
    studied(start=Start(trials=(GOOD, PARENTS)), max_trials=4)
    assert tried(recorder)[:3] == [GOOD, PARENTS, default_parameters(len(FIT_ROWS))]


def test_equal_starts_are_tried_once(recorder: Recorder) -> None:
    studied(start=Start(trials=(GOOD, GOOD)), max_trials=3)
    assert tried(recorder)[:2] == [GOOD, default_parameters(len(FIT_ROWS))]
    assert tried(recorder).count(GOOD) == 1


def test_parameters_from_elsewhere_come_to_the_edge_of_the_space(recorder: Recorder) -> None:
    far = {
        "learning_rate": 0.9,
        "num_leaves": 127,
        "min_data_in_leaf": 1,
        "lambda_l2": 0.0,
        "gone": 3,
        **dict.fromkeys(["bagging_fraction"], 1.0),
    }
    studied(start=Start(trials=(far,)), max_trials=1)
    [first] = tried(recorder)
    clipped = {
        "learning_rate": 0.1,
        "num_leaves": 8,
        "min_data_in_leaf": 5,
        "lambda_l2": 1.0,
        "bagging_fraction": 0.9,
    }
    assert {name: first[name] for name in clipped} == clipped
    assert 0.3 <= first["feature_fraction"] <= 0.8
    assert "gone" not in recorder.parameters[0]


def test_a_first_pass_tries_no_more_than_it_may() -> None:
    found = studied(start=Start(max_trials=1), max_trials=9)
    assert (found.n_trials, found.stopped_by) == (1, "max_trials")
    assert studied(start=Start(max_trials=9), max_trials=2).n_trials == 2


def test_what_is_found_begins_the_next_study_no_worse() -> None:
    first = studied(max_trials=4)
    again = studied(start=Start(trials=(first.parameters,)), max_trials=1)
    assert (again.tune_loss, again.n_rounds, again.parameters) == (
        first.tune_loss,
        first.n_rounds,
        first.parameters,
    )


# The search space


def test_a_parameter_may_be_fixed_or_its_range_widened(recorder: Recorder) -> None:
    search = {
        "num_leaves": 100,
        "path_smooth": {"low": 0.5, "high": 2.5},
        "max_depth": {"low": 3, "high": 4},
    }
    studied(search=search, max_trials=6, patience=9)
    assert len(recorder.parameters) == 6
    for found in recorder.parameters:
        assert found["num_leaves"] == 100
        assert 0.5 <= found["path_smooth"] <= 2.5
        assert found["max_depth"] in (3, 4)
        assert isinstance(found["max_depth"], int)
    assert len({found["path_smooth"] for found in recorder.parameters}) > 2


def test_a_fixed_parameter_stays_fixed_whatever_earlier_runs_found(recorder: Recorder) -> None:
    studied(start=Start(trials=(GOOD,)), search={"num_leaves": 3}, max_trials=1)
    assert tried(recorder) == [{**GOOD, "num_leaves": 3}]


@pytest.mark.parametrize("n_rows", [10, 5_000, 10**6])
def test_a_search_of_the_spec_wins_over_the_default_and_leaves_the_rest(n_rows: int) -> None:
    tuning = TuningSpec(search={"num_leaves": {"low": 2, "high": 900, "log": True}})
    space = search_space(n_rows, tuning)
    assert space["num_leaves"] == SearchRange(low=2, high=900, log=True)
    assert {**space, "num_leaves": None} == {
        **search_space(n_rows, TuningSpec()),
        "num_leaves": None,
    }
    assert inside({"num_leaves": 1000, "other": 1}, space) == {"num_leaves": 900}


# Noise


def shifted(misses: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each trial be a little better than the last, and the tune rows be missed by these."""
    left, best = list(misses), iter(np.arange(1.0, 0.0, -0.001))
    loss = next(best)

    def run(boosting: Any, env: Any) -> None:
        boosting.losses.append([loss, loss])
        boosting.best_loss, boosting.best_round = next(best), 0
        raise lgb.callback.EarlyStopException(env.iteration, [("tune", "loss", loss, False)])

    monkeypatch.setattr(module._Boosting, "__call__", run)
    monkeypatch.setattr(Study, "_misses", lambda *_: left.pop(0))


SIGNS = np.where(np.arange(N_TUNE) % 2, 1.0, -1.0)
STANDARD_ERROR = float(SIGNS.std(ddof=1)) / np.sqrt(N_TUNE)


@pytest.mark.parametrize(("gain", "n_trials"), [(0.9, 4), (1.1, 8)])
def test_a_gain_within_the_noise_does_not_prolong_the_study(
    monkeypatch: pytest.MonkeyPatch, gain: float, n_trials: int
) -> None:
    # Each trial's rows are missed by a little less than the last one's, with an error of just one.
    misses = [
        np.cumsum(np.full(9, -gain * STANDARD_ERROR))[number] + SIGNS * (number % 2)
        for number in range(9)
    ]
    shifted(misses, monkeypatch)
    found = studied(max_trials=8, patience=3)
    assert found.n_trials == n_trials
    assert found.stopped_by == ("patience" if n_trials < 8 else "max_trials")


def test_a_gain_within_the_noise_is_taken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted([SIGNS * 0 for _ in range(9)], monkeypatch)
    assert studied(max_trials=3, patience=9).tune_loss == pytest.approx(0.997)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [([1.0], False), ([1.0, 1.0], True), ([0.0, 0.0], False), ([3.0, -1.0], False)],
)
def test_one_row_tells_nothing_of_noise(gains: list[float], expected: bool) -> None:
    values, ones, zeros = np.array(gains), np.ones(len(gains)), np.zeros(len(gains))
    assert bool(module._is_beyond_noise(values, None)) is expected
    assert bool(module._is_beyond_noise(values, 3.0 * ones)) is expected
    # Rows of no weight are as if they were not there.
    beside = np.concatenate([values, 9.0 * ones]), np.concatenate([ones, zeros])
    assert bool(module._is_beyond_noise(*beside)) is expected
    assert not module._is_beyond_noise(values, zeros)


def test_the_clock_counts_what_is_inside_lightgbm() -> None:
    clock = Clock()
    Study(
        FIT_ROWS,
        TUNE_ROWS,
        BLOCKS,
        Learner(goal_of("l2"), TuningSpec(max_trials=1, max_rounds=20), clock=clock),
        Start(),
    ).run()
    assert clock.seconds > 0
