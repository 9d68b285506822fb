"""Every task from rows to answers, on Spark: what the ledger states is computed again in pandas."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import DataError
from pipeline.models.meta_model import FleetModel, answer_columns
from pipeline.models.pack import PackedRun, write_pack
from pipeline.models.promotion import judge_challenger
from pipeline.reporting.plots import prediction_plot, training_plot
from pipeline.reporting.summary import fleet_errors, summarise
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.spark.counting import count_classes
from pipeline.spark.evaluation import judged_rows
from pipeline.spark.planning import plan_run
from pipeline.spark.scoring import count_answers, rows_to_score, score_rows
from pipeline.spec import FleetSpec
from pipeline.testing.blending import learn_weights_in_pandas
from pipeline.testing.data import feature_rows, small_spec, with_classes
from pipeline.testing.doubles import MemoryTables
from pipeline.testing.runs import own_tables, quiet_context, train_quietly
from pipeline.training.blend import Moments, describe_groups
from pipeline.training.splits import EARLIER, REPORT
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark

THREE = ("low", "mid", "top")
CITIES = {"north": ("oslo", "bergen", "lopsided"), "south": ("roma", "alone")}
OBJECTIVES: Mapping[str, dict[str, Any]] = {
    "binary": {
        "task": "binary",
        "target": {"column": "label"},
        "baselines": {"share": "promotion"},
    },
    "multiclass": {
        "task": "multiclass",
        "target": {"column": "label"},
        "baselines": {"yesterday": "label_before"},
    },
    "quantile": {"tuning": {"objective": "quantile", "alpha": 0.9}},
    "poisson": {"tuning": {"objective": "poisson"}, "target": {"column": "count"}},
    "tweedie": {"tuning": {"objective": "tweedie"}, "target": {"column": "count"}},
}


@dataclass(frozen=True)
class Trained:
    """A finished run of one task, and what it left."""

    task: str
    spec: FleetSpec
    features: DataFrame
    run: PlannedRun
    ledger: pd.DataFrame
    manifest: Mapping[str, Any]
    holdout: pd.DataFrame
    held_out: DataFrame
    pack: Path


def rows_of(task: str) -> pd.DataFrame:
    """Rows of five cities: one lacks a class, one has but one; some features are null, some categories only in late rows."""
    rows = with_classes(
        feature_rows(300, cities=CITIES, noise=4.0), ("no", "yes") if task == "binary" else THREE
    )
    if task == "multiclass":
        rows.loc[(rows["city"] == "lopsided") & (rows["label"] == "top"), "label"] = "mid"
        rows.loc[3, "label"] = "odd"
    rows.loc[rows["city"] == "alone", "label"] = rows["label"].iloc[0]
    rows["label_before"] = rows.groupby("city")["label"].shift(1)
    rows["count"] = (
        np.random.default_rng(3)
        .poisson(np.exp((rows["sales"] - rows["sales"].mean()) / 40))
        .astype(float)
    )
    rows["count_lag_7"] = rows.groupby("city")["count"].shift(7)
    rows.loc[5, "count"] = -1.0
    rows.loc[::9, "price"] = np.nan
    rows.loc[rows["time"] > "2024-10-10", "kind"] = "new"
    return rows


def spec_of(task: str) -> FleetSpec:
    changes = dict(OBJECTIVES[task])
    if task == "multiclass":
        changes["target"] = {"column": "label", "classes": list(THREE)}
    return small_spec(**changes)


def frame_of(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(
        time=rows["time"].dt.tz_localize("UTC"), known_at=rows["known_at"].dt.tz_localize("UTC")
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def planned(features: DataFrame, spec: FleetSpec) -> PlannedRun:
    return plan_run(
        quiet_context(features.sparkSession),
        features,
        spec,
        Request("run-1"),
        History.read(own_tables(MemoryTables(), spec.name)),
    )


@pytest.fixture(scope="module")
def trained(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """Trains a task once."""
    runs: dict[str, Trained] = {}

    def train(task: str) -> Trained:
        if task not in runs:
            folder, spec = tmp_path_factory.mktemp(task), spec_of(task)
            tables = DeltaTables(root=str(folder))
            features = frame_of(spark, rows_of(task))
            run = planned(features, spec)
            ledger = train_quietly(spark, own_tables(tables, spec.name), run, spec)
            at = {
                name: tables.location(spec.name, name) for name in ("runs", "boosters", "holdout")
            }
            (manifest,) = tables.read_arrow(at["runs"]).to_pylist()
            generation = RunManifest.from_row(manifest).generation
            write_pack(
                folder / f"pack-{task}",
                [PackedRun(generation, ledger)],
                lambda _: tables.read_arrow(at["boosters"]).to_pylist(),
            )
            held_out = tables.read_spark(spark, at["holdout"])
            holdout = tables.read_pandas(at["holdout"])
            runs[task] = Trained(
                task,
                spec,
                features,
                run,
                ledger,
                manifest,
                holdout,
                held_out,
                folder / f"pack-{task}",
            )
        return runs[task]

    return train


def row_of(found: Trained, grain: int, group: str) -> "pd.Series[Any]":
    ledger = found.ledger
    (row,) = [
        row
        for _, row in ledger[(ledger["grain"] == grain) & (ledger["group_id"] == group)].iterrows()
    ]
    return row


KEY = ["row_key", "class_name"]


def answers_of(found: Trained, split: str = REPORT) -> pd.DataFrame:
    """One row per judged row (and class): actual, and the answers of fleet, pooled model and constant, from holdout and weights."""
    held = found.holdout.assign(class_name=found.holdout["class_name"].fillna(""))
    held = held[held["split"] == split]
    weights = {
        (row["grain"], row["group_id"]): row["weight"] for row in found.ledger.to_dict("records")
    }
    rows = held[held["grain"] == 0].set_index(KEY)
    constants = found.run.constants
    classes = found.run.settings.model_spec.classes
    names = rows.index.get_level_values("class_name")
    rows["constant"] = (
        [constants.prior[classes.index(name)] for name in names]
        if constants.prior
        else constants.with_offset
    )
    rows["fleet"], rows["pooled"] = rows["constant"], rows["prediction"].fillna(rows["constant"])
    for grain in range(3):
        own = held[held["grain"] == grain].set_index(KEY)["prediction"].reindex(rows.index)
        weight = np.array([weights[grain, ids[grain]] for ids in rows["group_ids"]])
        rows["fleet"] = rows["fleet"].where(own.isna(), weight * own + (1 - weight) * rows["fleet"])
    return rows.reset_index()


def metrics_in_pandas(rows: pd.DataFrame, way: str, found: Trained) -> dict[str, float]:
    actual, answer = rows["actual"].to_numpy(float), rows[way].to_numpy(float)
    if found.task == "binary":
        of_actual = np.where(actual > 0, answer, 1 - answer)
        loss = -np.log(np.maximum(of_actual, 1e-15)).mean()
        return {
            "log_loss": loss,
            "brier": ((actual - answer) ** 2).mean(),
            "accuracy": ((answer > 0.5) == (actual > 0)).mean(),
        }
    if found.task == "multiclass":
        wide = {
            name: rows.pivot_table(index="row_key", columns="class_name", values=name)[
                list(THREE)
            ].to_numpy()
            for name in ("actual", way)
        }
        of_actual = wide[way][wide["actual"] > 0]
        hits = wide[way].argmax(axis=1) == wide["actual"].argmax(axis=1)
        squares = ((wide["actual"] - wide[way]) ** 2).sum(axis=1)
        return {
            "log_loss": -np.log(np.maximum(of_actual, 1e-15)).mean(),
            "brier": squares.mean(),
            "accuracy": hits.mean(),
        }
    error = actual - answer
    known = actual != 0
    measures = {
        "rmse": np.sqrt((error**2).mean()),
        "mae": np.abs(error).mean(),
        "mape": np.abs(error[known] / actual[known]).mean() * 100,
    }
    if found.task == "quantile":
        measures["pinball"] = np.maximum(0.9 * error, -0.1 * error).mean()
    if found.task == "poisson":
        measures["deviance"] = (
            2
            * (np.where(known, actual * np.log(np.where(known, actual, 1.0) / answer), 0.0) - error)
        ).mean()
    if found.task == "tweedie":
        p = 1.5
        parts = (
            actual ** (2 - p) / ((1 - p) * (2 - p))
            - actual * answer ** (1 - p) / (1 - p)
            + answer ** (2 - p) / (2 - p)
        )
        measures["deviance"] = (2 * parts).mean()
    return measures


@pytest.mark.parametrize("task", OBJECTIVES)
def test_metrics_are_those_of_the_answers(trained: Callable[[str], Trained], task: str) -> None:
    found = trained(task)
    rows = answers_of(found)
    checked = 0
    for row in found.ledger[found.ledger["report_rows"].notna()].to_dict("records"):
        of = rows[[ids[row["grain"]] == row["group_id"] for ids in rows["group_ids"]]]
        metrics = json.loads(row["metrics"])
        assert row["report_rows"] == of["row_key"].nunique()
        for way in ("fleet", "pooled", "constant"):
            assert metrics[way] == pytest.approx(metrics_in_pandas(of, way, found)), (
                row["group_id"],
                way,
            )
            checked += 1
        assert list(metrics)[3:] == list(found.spec.all_baselines)
    assert checked == 3 * (1 + 2 + 5)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_the_fleet_learns_and_is_promoted(trained: Callable[[str], Trained], task: str) -> None:
    found = trained(task)
    metrics = json.loads(row_of(found, 0, "[]")["metrics"])
    judged_by = {"quantile": "pinball", "poisson": "deviance", "tweedie": "deviance"}.get(
        task, "log_loss"
    )
    assert metrics["fleet"][judged_by] < 0.95 * metrics["constant"][judged_by]
    assert all(
        gate.passed for gate in judge_challenger(found.ledger, FleetModel(found.pack).groups())
    )
    assert set(found.ledger["status"]) <= {"trained", "inherited"}
    assert found.ledger["weight"].between(0, 1).all()
    assert (found.ledger.loc[found.ledger["grain"] > 0, "weight"] > 0).any()


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_columns_of_regression_are_null_for_classes(
    trained: Callable[[str], Trained], task: str
) -> None:
    assert (
        trained(task)
        .ledger[["rmse", "mae", "mape", "pooled_rmse", "pooled_mape", "intervals"]]
        .isna()
        .all(axis=None)
    )


@pytest.mark.parametrize(
    ("task", "group"), [("multiclass", '["north","oslo"]'), ("poisson", '["north","oslo"]')]
)
def test_what_the_task_does_not_take_is_left_out_and_counted(
    trained: Callable[[str], Trained], task: str, group: str
) -> None:
    found = trained(task)
    assert row_of(found, 2, group)["n_invalid"] == row_of(found, 0, "[]")["n_invalid"] == 1
    assert row_of(found, 2, group)["status"] == "trained"
    plan = found.run.plan.groups
    merged = plan.merge(found.ledger, on=["grain", "group_id"], suffixes=("_planned", ""))
    for name in ("n_fit", "n_tune", "n_report"):
        assert (merged[name] == merged[f"{name}_planned"]).all()


def test_each_row_is_held_out_once_per_class_and_its_probabilities_add_up_to_one(
    trained: Callable[[str], Trained],
) -> None:
    held = trained("multiclass").holdout
    assert not held.duplicated(["grain", "group_id", "row_key", "class_name"]).any()
    of_row = held.groupby(["grain", "group_id", "row_key"])
    assert (of_row.size() == 3).all()
    assert (of_row["actual"].sum() == 1).all()
    assert of_row["prediction"].sum(min_count=3).dropna().to_numpy() == pytest.approx(1.0)


def test_the_prior_is_each_classes_share_of_fit_rows(trained: Callable[[str], Trained]) -> None:
    found, rows = trained("multiclass"), rows_of("multiclass")
    fit = rows[(rows["time"] < found.run.cutoffs.tune_start) & rows["label"].isin(THREE)]
    expected = fit["label"].value_counts(normalize=True)
    assert found.run.constants.prior == pytest.approx([expected[name] for name in THREE])
    assert found.run.settings.model_spec.prior == found.run.constants.prior
    assert found.manifest["constant"] is found.manifest["constant_without_offset"] is None


def test_the_constant_of_a_quantile_is_that_quantile_of_fit_rows(
    trained: Callable[[str], Trained],
) -> None:
    found, rows = trained("quantile"), rows_of("quantile")
    fit = rows.loc[rows["time"] < found.run.cutoffs.tune_start, "sales"]
    assert found.run.constants.with_offset == pytest.approx(fit.quantile(0.9), rel=0.01)


def test_the_constant_of_two_classes_is_the_share_of_the_last(
    trained: Callable[[str], Trained],
) -> None:
    found, rows = trained("binary"), rows_of("binary")
    fit = rows.loc[rows["time"] < found.run.cutoffs.tune_start, "label"]
    assert found.run.settings.model_spec.classes == ("no", "yes")
    assert found.run.constants.with_offset == pytest.approx((fit == "yes").mean())


@pytest.mark.parametrize("task", ["binary", "multiclass", "quantile"])
def test_weights_are_those_learnt_from_the_rows_themselves(
    trained: Callable[[str], Trained], task: str
) -> None:
    found = trained(task)
    rows = judged_rows(found.held_out, found.spec, found.run.cutoffs).toPandas()
    classes, constants = found.run.settings.model_spec.classes, found.run.constants
    prior = (
        rows["class_name"].map(dict(zip(classes, constants.prior, strict=True))).to_numpy(float)
        if constants.prior
        else np.zeros(len(rows))
    )
    ledger = found.ledger
    has_model = [
        set(ledger.loc[(ledger["grain"] == grain) & (ledger["status"] == "trained"), "group_id"])
        for grain in range(3)
    ]
    constant = prior
    if not constants.prior:
        constant = np.full(len(rows), constants.with_offset)
    weights = learn_weights_in_pandas(rows, found.spec, has_model, constant)
    is_judged = rows["split"] != EARLIER
    rows, prior = rows[is_judged], prior[is_judged]
    own = rows[["p0", "p1", "p2"]].to_numpy(float) - prior[:, None]
    ids = np.array([list(of) for of in rows["group_ids"]], dtype=object)
    moments = Moments.of_rows(
        rows["split"].tolist(),
        ids,
        rows["residual"].to_numpy(float) - prior,
        own,
        rows["weight"].to_numpy(float),
    )
    skills = describe_groups(moments, weights, constants.with_offset)
    for row in ledger[ledger["status"] == "trained"].to_dict("records"):
        skill = skills[row["grain"], row["group_id"]]
        assert row["weight"] == pytest.approx(skill.weight, abs=1e-9)
        assert (row["tune_own"], row["report_blend"]) == (
            pytest.approx(skill.tune_own),
            pytest.approx(skill.report_blend),
        )


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_errors_in_link_space_are_those_of_probabilities(
    trained: Callable[[str], Trained], task: str
) -> None:
    found = trained(task)
    rows = answers_of(found)
    pooled = row_of(found, 0, "[]")
    for column, way in (("report_blend", "pooled"), ("report_constant", "constant")):
        wanted = (
            rows[way]
            if way == "constant"
            else pooled["weight"] * rows["pooled"] + (1 - pooled["weight"]) * rows["constant"]
        )
        assert pooled[column] == pytest.approx(np.sqrt(((rows["actual"] - wanted) ** 2).mean())), (
            column
        )


def test_a_multiclass_baseline_names_a_class(trained: Callable[[str], Trained]) -> None:
    found, rows = trained("multiclass"), rows_of("multiclass")
    report = rows[
        (rows["time"] >= found.run.cutoffs.report_start)
        & rows["label"].isin(THREE)
        & rows["label_before"].notna()
    ]
    stated = json.loads(row_of(found, 0, "[]")["metrics"])["yesterday"]
    hits = (report["label"] == report["label_before"]).mean()
    assert stated["accuracy"] == pytest.approx(hits)
    assert stated["brier"] == pytest.approx(2 * (1 - hits))
    compared = json.loads(row_of(found, 0, "[]")["baselines"])["yesterday"]
    assert compared["n"] == len(report)
    assert compared["fleet_accuracy"] == pytest.approx(
        json.loads(row_of(found, 0, "[]")["metrics"])["fleet"]["accuracy"]
    )


@pytest.mark.parametrize("task", OBJECTIVES)
def test_spark_answers_as_the_meta_model_does(
    spark: SparkSession, trained: Callable[[str], Trained], task: str
) -> None:
    found = trained(task)
    moment = pd.Timestamp("2024-10-20")
    rows = rows_to_score(found.features, found.spec, moment)
    answers = score_rows(spark, rows, found.spec, FleetModel(found.pack), moment, {}).persist()
    assert dict(answers.dtypes)["prediction"] == answer_columns(found.spec.task)["prediction"]
    counts = count_answers(answers, moment)
    assert (counts.n_rows, counts.n_missing, counts.n_doubled) == (rows.count(), 0, 0)
    assert counts.n_rows > 20
    table = answers.toPandas().sort_values("row_key", ignore_index=True)
    # Every one of these rows has a category that no training row had, and some have no price.
    alone = FleetModel(found.pack).predict(
        rows.toPandas().sort_values("row_key", ignore_index=True)
    )
    for name in ("prediction", "answered_by"):
        assert table[name].tolist() == alone[name].tolist()
    if found.spec.is_class_task:
        probabilities = np.stack(table["probabilities"].to_list())
        assert np.array_equal(probabilities, np.stack(alone["probabilities"].to_list()))
        assert probabilities.sum(axis=1) == pytest.approx(1.0)
        assert table[["lower", "upper"]].isna().all(axis=None)
        if task == "binary":
            assert table["prediction"].tolist() == probabilities[:, 1].tolist()
        else:
            assert table["prediction"].tolist() == [
                THREE[number] for number in probabilities.argmax(axis=1)
            ]
    else:
        assert (table["lower"] < table["upper"]).all()
    assert prediction_plot(counts.sample, counts.answered_by, found.spec).startswith(b"\x89PNG")
    answers.unpersist()


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_people_are_shown_log_loss_and_accuracy(
    trained: Callable[[str], Trained], task: str
) -> None:
    found = trained(task)
    text = summarise(found.ledger, found.spec, {})
    assert "log loss" in text
    assert "accuracy" in text
    assert "RMSE" not in text
    assert "nan" not in text
    names = [error.name for error in fleet_errors(found.ledger, found.spec)]
    assert names == ["fleet", "pooled model", "constant", *found.spec.baselines]
    assert training_plot(found.ledger, found.spec).startswith(b"\x89PNG")


def test_classes_are_found_in_fit_rows_and_sorted(spark: SparkSession) -> None:
    spec = small_spec(task="multiclass", target={"column": "label"}, baselines=None)
    rows = rows_of("multiclass")
    rows.loc[rows["time"] >= "2024-10-01", "label"] = "late"
    run = planned(frame_of(spark, rows), spec)
    assert run.settings.model_spec.classes == ("low", "mid", "odd", "top")


@pytest.mark.parametrize(
    ("task", "names", "message"),
    [
        (
            "binary",
            ("a", "b", "c"),
            (
                r"'label': the fit rows \(before .*\) hold the classes 'a', 'b', 'c'; "
                r"task 'binary' needs exactly two"
            ),
        ),
        (
            "binary",
            ("a",),
            "hold the classes 'a'; task 'binary' needs exactly two: set target.classes",
        ),
        (
            "multiclass",
            tuple(f"c{number:03d}" for number in range(101)),
            "hold more than 100 classes, e.g. 'c000', 'c001'",
        ),
    ],
)
def test_classes_that_the_task_cannot_use_are_refused_before_work(
    spark: SparkSession, task: str, names: tuple[str, ...], message: str
) -> None:
    rows = feature_rows(200).assign(
        label=lambda frame: [names[number % len(names)] for number in range(len(frame))]
    )
    spec = small_spec(task=task, target={"column": "label"}, baselines=None)
    with pytest.raises(DataError, match=message):
        planned(frame_of(spark, rows), spec)


def test_declared_classes_need_no_row(spark: SparkSession) -> None:
    spec = small_spec(
        task="multiclass",
        target={"column": "label", "classes": ["top", "low", "never"]},
        baselines=None,
    )
    features = frame_of(spark, with_classes(feature_rows(200), THREE))
    run = planned(features, spec)
    counts = count_classes(run.rows, spec, run.cutoffs)
    assert list(counts) == ["top", "low", "never"]
    assert counts["never"] == 0
    assert run.constants.prior == pytest.approx(
        [counts["top"] / sum(counts.values()), counts["low"] / sum(counts.values()), 0.0]
    )
