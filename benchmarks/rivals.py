"""What a team would write instead: the usual notebook on Spark, a process pool, one pooled model, LightGBM's defaults.

Written as good examples of their kind, and slowed by nothing: they are what our figures are
compared with.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

N_TRIALS = 20
MAX_ROUNDS = 1000
PATIENCE_ROUNDS = 50
GROUP = "_group"
EXPERIMENT = "usual-recipe"
TRAINED, TOO_FEW_ROWS = "trained", "too_few_rows"


@dataclass(frozen=True)
class Problem:
    """What every rival is told about a feature table.

    Args:
        keys: columns that name a group.
        features: columns that a model sees, in order; those without an entry in `categories` are
            numbers.
        target: column to predict; rows where it is null are dropped.
        tune_start: the first moment of the tune rows, UTC without a zone.
        report_start: the first moment of the report rows, UTC without a zone.
        offset: column subtracted from the target before learning and added to every prediction;
            rows where it is null are dropped.
        categories: per categorical feature the values that the fleet has, as text; see
            `fleet_categories`.
        fit_rows: a group with fewer fit rows is skipped.
        tune_rows: a group with fewer tune rows is skipped.
        time: column of the moments by which rows are split.
    """

    keys: tuple[str, ...]
    features: tuple[str, ...]
    target: str
    tune_start: pd.Timestamp
    report_start: pd.Timestamp
    offset: str | None = None
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fit_rows: int = 100
    tune_rows: int = 20
    time: str = "time"

    @property
    def columns(self) -> list[str]:
        """The columns of a feature table that a rival reads, each once."""
        return list(
            dict.fromkeys(
                [
                    *self.keys,
                    self.time,
                    *self.features,
                    self.target,
                    *([self.offset] if self.offset else []),
                ]
            )
        )


@dataclass(frozen=True)
class Trained:
    """One group's model.

    Args:
        model: fitted on all rows of the group.
        parameters: what was chosen, without the number of rounds; empty for LightGBM's defaults.
        n_rounds: boosting rounds.
        n_fit: fit rows.
        n_tune: tune rows.
        n_report: report rows.
        squared_error: sum over the report rows of the model fitted on fit and tune rows, in squared
            units of the target.
        predictions: of the report rows, in the target's units.
    """

    model: lgb.LGBMRegressor
    parameters: dict[str, Any]
    n_rounds: int
    n_fit: int
    n_tune: int
    n_report: int
    squared_error: float
    predictions: pd.Series


@dataclass(frozen=True)
class _Part:
    """Rows as LightGBM's scikit-learn interface takes them: features, and the target less its offset."""

    features: pd.DataFrame
    label: pd.Series

    def where(self, chosen: pd.Series) -> "_Part":
        return _Part(self.features[chosen], self.label[chosen])


def fleet_categories(rows: pd.DataFrame, columns: Sequence[str]) -> dict[str, list[str]]:
    """The values of each categorical column over the whole fleet, in alphabetical order.

    Null is not a value.
    """
    return {name: sorted(rows[name].dropna().astype(str).unique()) for name in columns}


def overall_rmse(groups: pd.DataFrame) -> float:
    """Root of the mean squared error over all report rows, target units.

    Args:
        groups: what a rival returns: n_report and squared_error per group; groups without an answer
            count for nothing.
    """
    answered = groups[groups["squared_error"].notna()]
    return float(np.sqrt(answered["squared_error"].sum() / answered["n_report"].sum()))


def tune_and_fit(
    frame: pd.DataFrame,
    problem: Problem,
    *,
    n_trials: int = N_TRIALS,
    seed: int = 1,
    n_jobs: int = 1,
) -> Trained | None:
    """What the usual notebook does for one group.

    Every trial fits anew on the fit rows and stops early on the tune rows; the best parameters,
    with the rounds they stopped at, are fitted on fit and tune rows to answer the report rows, and
    on all rows for the model that is kept.

    Args:
        frame: the group's rows, in any order, with `problem.columns`.
        problem: columns and cutoffs.
        n_trials: of Optuna's TPE; 0 takes LightGBM's default parameters, stopped early just the
            same.
        seed: of the sampler and of LightGBM; one seed gives one model.
        n_jobs: LightGBM's threads.

    Returns:
        The model, or None where there are too few rows.
    """
    rows = _labelled(frame, problem)
    moments = rows[problem.time]
    is_report = moments >= problem.report_start
    is_fit = moments < problem.tune_start
    is_tune = ~is_fit & ~is_report
    if is_fit.sum() < problem.fit_rows or is_tune.sum() < problem.tune_rows:
        return None
    everything = _Part(_design(rows, problem), rows["_label"])
    fixed = {"n_jobs": n_jobs, "random_state": seed, "verbosity": -1}
    parameters, n_rounds = _choose(
        everything.where(is_fit), everything.where(is_tune), fixed, n_trials, seed
    )
    final = {**fixed, **_sklearn_parameters(parameters), "n_estimators": n_rounds}
    report = everything.where(is_report)
    predictions = pd.Series(dtype=float)
    squared_error = float("nan")
    if len(report.label):
        judged = _fitted(everything.where(~is_report), final)
        learnt = pd.Series(judged.predict(report.features), index=report.label.index)
        squared_error = float(((report.label - learnt) ** 2).sum())
        predictions = learnt + (
            rows.loc[is_report, problem.offset].astype("float64") if problem.offset else 0.0
        )
    return Trained(
        model=_fitted(everything, final),
        parameters=parameters,
        n_rounds=n_rounds,
        n_fit=int(is_fit.sum()),
        n_tune=int(is_tune.sum()),
        n_report=len(report.label),
        squared_error=squared_error,
        predictions=predictions,
    )


def _labelled(frame: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """The rows with a label, in the order of their times."""
    label = frame[problem.target].astype("float64")
    if problem.offset is not None:
        label = label - frame[problem.offset].astype("float64")
    moments = pd.to_datetime(frame[problem.time])
    if moments.dt.tz is not None:
        moments = moments.dt.tz_convert("UTC").dt.tz_localize(None)
    rows = frame.assign(_label=label)
    rows[problem.time] = moments
    return rows[label.notna()].sort_values(problem.time, ignore_index=True, kind="stable")


def _design(rows: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """Features as pandas columns: numbers, and categories that are the fleet's in every group."""
    columns = {}
    for name in problem.features:
        if name in problem.categories:
            values = rows[name].astype("string").astype("object")
            columns[name] = pd.Series(
                pd.Categorical(values, categories=list(problem.categories[name])), index=rows.index
            )
        else:
            columns[name] = rows[name].astype("float64")
    return pd.DataFrame(columns)


def _choose(
    fit: _Part, tune: _Part, fixed: Mapping[str, Any], n_trials: int, seed: int
) -> tuple[dict[str, Any], int]:
    """The best parameters on the tune rows, and the rounds they stopped at."""
    if n_trials == 0:
        return {}, _stopped_early(fit, tune, fixed)[1]
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        loss, n_rounds = _stopped_early(
            fit, tune, {**fixed, **_sklearn_parameters(_suggested(trial))}
        )
        trial.set_user_attr("n_rounds", n_rounds)
        return loss

    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=n_trials)
    return dict(study.best_params), int(study.best_trial.user_attrs["n_rounds"])


def _suggested(trial: optuna.Trial) -> dict[str, Any]:
    """The usual wide search space."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 8, 128, log=True),
        "min_child_samples": trial.suggest_int("min_child_samples", 5, 100),
        "subsample": trial.suggest_float("subsample", 0.5, 1.0),
        "colsample_bytree": trial.suggest_float("colsample_bytree", 0.3, 1.0),
        "reg_lambda": trial.suggest_float("reg_lambda", 1e-3, 10.0, log=True),
    }


def _sklearn_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """With `subsample` also the frequency without which LightGBM ignores it."""
    return {**parameters, **({"subsample_freq": 1} if "subsample" in parameters else {})}


def _stopped_early(fit: _Part, tune: _Part, parameters: Mapping[str, Any]) -> tuple[float, int]:
    """Mean squared error on the tune rows, and the rounds that gave it."""
    model = lgb.LGBMRegressor(n_estimators=MAX_ROUNDS, **parameters)
    stop = lgb.early_stopping(PATIENCE_ROUNDS, verbose=False)
    model.fit(
        fit.features,
        fit.label,
        eval_X=(tune.features,),
        eval_y=(tune.label,),
        eval_metric="l2",
        callbacks=[stop],
    )
    return float(model.best_score_["valid_0"]["l2"]), max(1, int(model.best_iteration_))


def _fitted(part: _Part, parameters: Mapping[str, Any]) -> lgb.LGBMRegressor:
    return lgb.LGBMRegressor(**parameters).fit(part.features, part.label)


def _per_group(
    rows: pd.DataFrame, problem: Problem
) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Every group's keys and rows, in the order of the keys."""
    yield from rows.groupby(list(problem.keys), dropna=False)


def plain_default(rows: pd.DataFrame, problem: Problem, *, seed: int = 1) -> pd.DataFrame:
    """One model per group with LightGBM's default parameters and early stopping.

    In this process, one thread.

    Returns:
        As `tuned_per_group`.
    """
    return tuned_per_group(rows, problem, n_trials=0, seed=seed)


def tuned_per_group(
    rows: pd.DataFrame, problem: Problem, *, n_trials: int = N_TRIALS, seed: int = 1
) -> pd.DataFrame:
    """What the usual notebook does for every group, without Spark and MLflow: in this process, one thread.

    Returns:
        One row per group: its keys, status (trained or too_few_rows), n_fit, n_tune, n_report
        (rows), squared_error (sum over the report rows, squared target units; null where there is
        none), n_rounds, seconds.
    """
    found = []
    for keys, frame in _per_group(rows, problem):
        started = time.perf_counter()
        trained = tune_and_fit(frame, problem, n_trials=n_trials, seed=seed)
        found.append(
            {
                **dict(zip(problem.keys, keys, strict=True)),
                **_result(trained),
                "seconds": time.perf_counter() - started,
            }
        )
    return pd.DataFrame(found)


def _result(trained: Trained | None) -> dict[str, Any]:
    if trained is None:
        return {
            "status": TOO_FEW_ROWS,
            "n_fit": 0,
            "n_tune": 0,
            "n_report": 0,
            "squared_error": float("nan"),
            "n_rounds": 0,
        }
    counts = {
        name: getattr(trained, name)
        for name in ("n_fit", "n_tune", "n_report", "squared_error", "n_rounds")
    }
    return {"status": TRAINED, **counts}


def pooled_model(
    rows: pd.DataFrame,
    problem: Problem,
    *,
    n_trials: int = N_TRIALS,
    seed: int = 1,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """One model over all rows, tuned as the usual notebook tunes a group, with the group as a categorical feature.

    Args:
        rows: rows of every group, with `problem.columns`.
        problem: columns and cutoffs.
        n_trials: of Optuna's TPE; 0 takes LightGBM's default parameters.
        seed: of the sampler and of LightGBM.
        n_jobs: LightGBM's threads.

    Returns:
        One row per group that has report rows: its keys, n_report (rows), squared_error (sum over
        them, squared target units). The error over all of them is `overall_rmse` of it.

    Raises:
        ValueError: if there are too few rows to train one model, or none to report on.
    """
    ids = rows[list(problem.keys)].astype("string").fillna("").agg("\x1f".join, axis=1)
    named = rows.assign(**{GROUP: ids})
    pooled = replace(
        problem,
        features=(*problem.features, GROUP),
        categories={**problem.categories, **fleet_categories(named, [GROUP])},
    )
    trained = tune_and_fit(named, pooled, n_trials=n_trials, seed=seed, n_jobs=n_jobs)
    if trained is None or not trained.n_report:
        raise ValueError(
            f"{len(rows)} rows leave too few to fit, tune and report on; expected "
            f"{problem.fit_rows}, {problem.tune_rows} and 1"
        )
    labelled = _labelled(named, pooled).loc[trained.predictions.index]
    squared = (labelled[problem.target].astype("float64") - trained.predictions) ** 2
    judged = labelled[list(problem.keys)].assign(n_report=1, squared_error=squared)
    return judged.groupby(list(problem.keys), dropna=False, as_index=False).sum()


@dataclass(frozen=True)
class PoolRun:
    """What a process pool did.

    Args:
        results: what the function returned, in the order of the frames.
        seconds: per frame, in the worker.
        wall_seconds: of all frames, with warm workers.
    """

    results: list[Any]
    seconds: list[float]
    wall_seconds: float


def process_pool(
    frames: Sequence[pd.DataFrame], train: Callable[[pd.DataFrame], Any], n_jobs: int
) -> PoolRun:
    """Train every group in a pool of processes, one thread each, the longest frames first.

    No Spark.

    Args:
        frames: each group's rows.
        train: a picklable function of one frame, such as `functools.partial(train_group, grain=2,
            settings=settings)`.
        n_jobs: processes; each has imported what `train` needs, and trained the shortest frame,
            before the clock starts.
    """
    order = sorted(range(len(frames)), key=lambda number: -len(frames[number]))
    with (
        joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1),
        joblib.Parallel(max_nbytes=None) as pool,
    ):
        if order:
            pool(joblib.delayed(_warmed)(train, frames[order[-1]]) for _ in range(2 * n_jobs))
        started = time.perf_counter()
        timed = pool(joblib.delayed(_timed)(train, frames[number]) for number in order)
        wall_seconds = time.perf_counter() - started
    by_frame = dict(zip(order, timed, strict=True))
    return PoolRun(
        [by_frame[number][0] for number in range(len(frames))],
        [by_frame[number][1] for number in range(len(frames))],
        wall_seconds,
    )


def _warmed(train: Callable[[pd.DataFrame], Any], frame: pd.DataFrame) -> None:
    """Train once, and stay busy long enough that the next task goes to another process."""
    train(frame)
    time.sleep(0.2)


def _timed(train: Callable[[pd.DataFrame], Any], frame: pd.DataFrame) -> tuple[Any, float]:
    started = time.perf_counter()
    result = train(frame)
    return result, time.perf_counter() - started


def usual_recipe(
    spark: "SparkSession",
    features: "DataFrame",
    problem: Problem,
    *,
    tracking_uri: str,
    n_trials: int = N_TRIALS,
    seed: int = 1,
) -> pd.DataFrame:
    """The usual notebook: `groupBy(keys).applyInPandas`, Optuna and LightGBM in the worker, artifacts logged from there.

    Adaptive execution is off, as notebooks have it lest it puts all groups into one task, and there
    are as many shuffle partitions as Spark has by default. Groups with too few rows, and those that
    LightGBM refuses, are skipped. A failure to log fails the job.

    Args:
        spark: the session; its two settings are put back at the end.
        features: rows of a feature table, with `problem.columns`; moments in a session whose time
            zone is UTC. The caller has left out what a run must not see.
        problem: columns and cutoffs.
        tracking_uri: of the MLflow server, or sqlite:///path; all artifacts go to one new run.
        n_trials: of Optuna's TPE per group.
        seed: of the sampler and of LightGBM.

    Returns:
        One row per group: its keys, status (trained, too_few_rows, or failed: and why), n_fit,
        n_tune, n_report (rows), squared_error (sum over the report rows, squared target units; null
        where there is none), n_rounds, seconds (of training), log_seconds (of logging), run_id (of
        MLflow).
    """
    from pyspark.sql import types as st

    run_id = _new_run(tracking_uri)
    counts = [st.StructField(name, st.LongType()) for name in ("n_fit", "n_tune", "n_report")]
    measures = [
        st.StructField("squared_error", st.DoubleType()),
        st.StructField("n_rounds", st.LongType()),
    ]
    seconds = [st.StructField(name, st.DoubleType()) for name in ("seconds", "log_seconds")]
    keys = [features.schema[key] for key in problem.keys]
    schema = st.StructType(
        [*keys, st.StructField("status", st.StringType()), *counts, *measures, *seconds]
    )

    def train_one(values: tuple[Any, ...], frame: pd.DataFrame) -> pd.DataFrame:
        started = time.perf_counter()
        try:
            trained = tune_and_fit(frame, problem, n_trials=n_trials, seed=seed)
            result = _result(trained)
        except (ValueError, lgb.basic.LightGBMError) as error:
            trained, result = None, {**_result(None), "status": f"failed: {error}"}
        trained_at = time.perf_counter()
        if trained is not None:
            _log_artifacts(trained, values, tracking_uri, run_id)
        times = {"seconds": trained_at - started, "log_seconds": time.perf_counter() - trained_at}
        return pd.DataFrame([{**dict(zip(problem.keys, values, strict=True)), **result, **times}])

    with notebook_settings(spark):
        grouped = features.select(*problem.columns).groupBy(*problem.keys)
        found = grouped.applyInPandas(train_one, schema).toPandas()
    _end_run(tracking_uri, run_id)
    return found.assign(run_id=run_id)


@contextmanager
def notebook_settings(spark: "SparkSession") -> Iterator[None]:
    """Adaptive execution off and 200 shuffle partitions, while the block lasts."""
    settings = {"spark.sql.adaptive.enabled": "false", "spark.sql.shuffle.partitions": "200"}
    before = {name: str(spark.conf.get(name)) for name in settings}
    try:
        for name, value in settings.items():
            spark.conf.set(name, value)
        yield
    finally:
        for name, value in before.items():
            spark.conf.set(name, value)


def _client(tracking_uri: str) -> Any:
    # From workers too, nothing is sent to MLflow's makers, and neither addresses nor bars are
    # printed.
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def _new_run(tracking_uri: str) -> str:
    client = _client(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    # Beside a database; a server knows where its artifacts go.
    location = (
        f"{tracking_uri.removeprefix('sqlite:///')}-artifacts"
        if tracking_uri.startswith("sqlite:///")
        else None
    )
    return str(
        client.create_run(
            experiment.experiment_id
            if experiment
            else client.create_experiment(EXPERIMENT, location)
        ).info.run_id
    )


def _end_run(tracking_uri: str, run_id: str) -> None:
    _client(tracking_uri).set_terminated(run_id)


def artifact_folder(values: Sequence[object]) -> str:
    """Where a group's artifacts lie in the run, e.g. `EWR_IAH`."""
    return "_".join(map(str, values))


def _log_artifacts(
    trained: Trained, values: Sequence[object], tracking_uri: str, run_id: str
) -> None:
    """The model's text, the parameters and the metrics of one group: three files."""
    client = _client(tracking_uri)
    rmse = (trained.squared_error / trained.n_report) ** 0.5 if trained.n_report else None
    texts = {
        "model.txt": trained.model.booster_.model_to_string(),
        "parameters.json": json.dumps(
            {**_sklearn_parameters(trained.parameters), "n_estimators": trained.n_rounds}
        ),
        "metrics.json": json.dumps({"rmse": rmse, "n_report": trained.n_report}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            client.log_artifact(run_id, str(path), artifact_path=artifact_folder(values))


def log_group_models(
    models: Iterable[tuple[Sequence[object], lgb.Booster]], *, tracking_uri: str
) -> str:
    """Leave a run as the usual notebook does: one MLflow model per group among its artifacts.

    Args:
        models: a group's keys, and its model.
        tracking_uri: of the MLflow server, or sqlite:///path.

    Returns:
        The run's id.
    """
    client, run_id = _client(tracking_uri), _new_run(tracking_uri)
    import mlflow.lightgbm

    for values, booster in models:
        with tempfile.TemporaryDirectory() as folder:
            # Named, so that MLflow does not look for what the model might need, which takes
            # seconds.
            mlflow.lightgbm.save_model(booster, f"{folder}/model", pip_requirements=["lightgbm"])
            client.log_artifacts(run_id, f"{folder}/model", artifact_folder(values))
    _end_run(tracking_uri, run_id)
    return run_id


@dataclass(frozen=True)
class LoggedModels:
    """Where a notebook's models are.

    Args:
        tracking_uri: of the MLflow server, or sqlite:///path.
        run_id: as from `log_group_models`.
    """

    tracking_uri: str
    run_id: str

    def load(self, values: Sequence[object]) -> lgb.Booster:
        """A group's model, as notebooks load it."""
        _client(self.tracking_uri)
        import mlflow.lightgbm

        mlflow.set_tracking_uri(self.tracking_uri)
        return mlflow.lightgbm.load_model(f"runs:/{self.run_id}/{artifact_folder(values)}")


# Of this process, which on a worker is one of Spark's.
_kept: dict[tuple[str, str], lgb.Booster] = {}


def _keep(logged: LoggedModels, values: Sequence[object]) -> lgb.Booster:
    name = logged.run_id, artifact_folder(values)
    if name not in _kept:
        _kept[name] = logged.load(values)
    return _kept[name]


def usual_scoring(
    rows: "DataFrame",
    keys: Sequence[str],
    features: Sequence[str],
    logged: LoggedModels,
    *,
    keeps: bool = False,
) -> "DataFrame":
    """Answer rows with the usual notebook: a pandas function per group that loads the group's model and predicts.

    Args:
        rows: with row_key, keys and features.
        keys: columns that name a group.
        features: columns that a model sees, in order; numbers.
        logged: the models.
        keeps: whether a worker keeps each model that it has loaded; a notebook does not.

    Returns:
        row_key, keys and prediction; not computed yet.
    """

    def answer(values: tuple[Any, ...], frame: pd.DataFrame) -> pd.DataFrame:
        model = _keep(logged, values) if keeps else logged.load(values)
        return frame[["row_key", *keys]].assign(
            prediction=model.predict(frame[list(features)], num_threads=1)
        )

    types = {field.name: field.dataType.simpleString() for field in rows.schema}
    schema = ", ".join(
        [*(f"`{name}` {types[name]}" for name in ("row_key", *keys)), "prediction double"]
    )
    return rows.select("row_key", *keys, *features).groupBy(*keys).applyInPandas(answer, schema)


def load_everywhere(
    spark: "SparkSession", groups: Sequence[Sequence[object]], logged: LoggedModels, slots: int
) -> None:
    """Let as many workers as there are slots load and keep every group's model."""

    def load(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            for values in groups:
                _keep(logged, values)
            yield batch

    spark.range(0, slots, 1, slots).mapInPandas(load, "id long").collect()


@dataclass(frozen=True)
class PlainGroup:
    """One group's rows and models, as plain LightGBM code holds them.

    Args:
        matrix: one row per row, float32, in the order of the models' features.
        texts: names of its models in a dict of texts, coarse to fine.
        weights: of each model against the coarser ones' answer.
    """

    matrix: npt.NDArray[np.float32]
    texts: tuple[str, ...]
    weights: tuple[float, ...]


_plain: dict[str, Any] = {}


def hold_plain(groups: Sequence[PlainGroup], texts: Mapping[str, str]) -> None:
    """Let this process hold groups and models."""
    _plain["groups"] = groups
    _plain["boosters"] = {name: lgb.Booster(model_str=text) for name, text in texts.items()}


def predict_plain(constant: float) -> list[npt.NDArray[np.float64]]:
    """Blend the models of every group that this process holds: LightGBM and nothing else, one thread.

    Args:
        constant: the answer before any model.

    Returns:
        Answers per group.
    """
    boosters = _plain["boosters"]
    answers = []
    for group in _plain["groups"]:
        answer = np.full(len(group.matrix), constant)
        for name, weight in zip(group.texts, group.weights, strict=True):
            answer = (
                weight * boosters[name].predict(group.matrix, num_threads=1) + (1 - weight) * answer
            )
        answers.append(answer)
    return answers
