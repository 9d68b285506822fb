import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from pyspark.sql import SparkSession

from benchmarks.generated import GeneratedFleet
from benchmarks.rivals import (
    Problem,
    artifact_folder,
    fleet_categories,
    overall_rmse,
    plain_default,
    pooled_model,
    process_pool,
    tune_and_fit,
    tuned_per_group,
    usual_recipe,
)

FLEET = GeneratedFleet(4, 100, signal="tiny", n_features=3)
PROBLEM = FLEET.problem()


def delays(n_rows: int = 200) -> tuple[pd.DataFrame, Problem]:
    """Rows with an offset, a categorical, nulls in features and target, and moments with a zone."""
    rng = np.random.default_rng(0)
    carrier = rng.choice(["AA", "B6", "UA"], n_rows).astype(object)
    offset = 1000 * rng.normal(size=n_rows)
    rows = pd.DataFrame(
        {
            "origin": "EWR",
            "time": pd.date_range("2023-01-01", periods=n_rows, freq="D", unit="us", tz="UTC"),
            "carrier": carrier,
            "seats": pd.array(rng.integers(50, 300, n_rows), dtype="Int64"),
            "dep_delay": offset,
            "arr_delay": offset
            + np.where(carrier == "AA", 5.0, -5.0)
            + 0.1 * rng.normal(size=n_rows),
        }
    )
    rows.loc[::10, "seats"] = pd.NA
    rows.loc[1::10, "carrier"] = None
    rows.loc[2::10, "arr_delay"] = np.nan
    rows.loc[3::10, "dep_delay"] = np.nan
    problem = Problem(
        ("origin",),
        ("carrier", "seats", "dep_delay"),
        "arr_delay",
        pd.Timestamp("2023-05-01"),
        pd.Timestamp("2023-06-01"),
        offset="dep_delay",
        categories=fleet_categories(rows, ["carrier"]),
        fit_rows=50,
        tune_rows=10,
    )
    return rows, problem


def squared_error(frame: pd.DataFrame) -> float:
    trained = tune_and_fit(frame, PROBLEM, n_trials=1)
    assert trained is not None
    return trained.squared_error


def test_cutoffs_say_which_rows_are_judged() -> None:
    rows = FLEET.rows(0, 1)
    trained = tune_and_fit(rows, PROBLEM, n_trials=1)
    assert trained is not None
    assert (trained.n_fit, trained.n_tune, trained.n_report) == (70, 15, 15)
    actual = rows.sort_values("time")["y"].to_numpy()[-15:]
    assert trained.squared_error == pytest.approx(
        ((actual - trained.predictions.to_numpy()) ** 2).sum()
    )


def test_report_rows_decide_nothing() -> None:
    rows = FLEET.rows(0, 1)
    changed = rows.assign(y=rows["y"].where(rows["time"] < PROBLEM.report_start, 1e6))
    before, after = (tune_and_fit(frame, PROBLEM, n_trials=3) for frame in (rows, changed))
    assert before is not None
    assert after is not None
    assert (before.parameters, before.n_rounds) == (after.parameters, after.n_rounds)
    np.testing.assert_array_equal(before.predictions, after.predictions)


def test_rows_may_come_in_any_order() -> None:
    rows = FLEET.rows(0, 1)
    assert squared_error(rows) == squared_error(rows.sample(frac=1, random_state=1))


def test_offset_categories_and_nulls_are_handled() -> None:
    rows, problem = delays()
    trained = tune_and_fit(rows, problem, n_trials=5)
    assert trained is not None
    labelled = rows.dropna(subset=["arr_delay", "dep_delay"])
    assert trained.n_fit + trained.n_tune + trained.n_report == len(labelled)
    assert trained.model.booster_.pandas_categorical == [["AA", "B6", "UA"]]
    # The delay at departure alone leaves 5 minutes; rows without a carrier cannot do better than that.
    assert (trained.squared_error / trained.n_report) ** 0.5 < 3
    assert np.abs(trained.predictions).max() > 500


def test_a_group_with_too_few_rows_is_skipped() -> None:
    assert tune_and_fit(FLEET.rows(0, 1), replace(PROBLEM, fit_rows=71), n_trials=1) is None
    found = tuned_per_group(FLEET.rows(), replace(PROBLEM, tune_rows=16), n_trials=1)
    assert set(found["status"]) == {"too_few_rows"}
    assert found["squared_error"].isna().all()


def test_a_group_without_report_rows_has_no_error() -> None:
    rows = FLEET.rows(0, 1)
    trained = tune_and_fit(rows[rows["time"] < PROBLEM.report_start], PROBLEM, n_trials=1)
    assert trained is not None
    assert trained.n_report == 0
    assert np.isnan(trained.squared_error)


def test_defaults_are_lightgbms_own() -> None:
    found = plain_default(FLEET.rows(), PROBLEM)
    assert list(found["group"]) == list(FLEET.groups)
    trained = tune_and_fit(FLEET.rows(0, 1), PROBLEM, n_trials=0)
    assert trained is not None
    assert trained.parameters == {}
    assert {
        name: trained.model.get_params()[name]
        for name in ("learning_rate", "num_leaves", "min_child_samples")
    } == {
        "learning_rate": 0.1,
        "num_leaves": 31,
        "min_child_samples": 20,
    }
    assert found["squared_error"][0] == trained.squared_error


def test_the_overall_error_weighs_rows_alike() -> None:
    groups = pd.DataFrame({"n_report": [1, 3, 0], "squared_error": [4.0, 8.0, np.nan]})
    assert overall_rmse(groups) == pytest.approx(3**0.5)


def test_the_pooled_model_tells_groups_apart() -> None:
    found = pooled_model(FLEET.rows(), PROBLEM, n_trials=3)
    assert list(found["group"]) == list(FLEET.groups)
    assert list(found["n_report"]) == [15] * 4
    rows = FLEET.rows()
    of_one_level = rows["y"] - rows.groupby("group")["y"].transform("mean")
    assert overall_rmse(found) < of_one_level.std() < rows["y"].std()


def test_a_pooled_model_without_report_rows_is_refused() -> None:
    rows = FLEET.rows()
    with pytest.raises(ValueError, match="too few"):
        pooled_model(rows[rows["time"] < PROBLEM.report_start], PROBLEM, n_trials=0)


def test_a_pool_gives_what_a_loop_gives() -> None:
    fleet = GeneratedFleet(4, 120, skew=1.0, signal="tiny", n_features=3, minimum_rows=70)
    frames = [fleet.rows(number, number + 1) for number in (2, 0, 3, 1)]
    run = process_pool(frames, squared_error, 2)
    assert run.results == [squared_error(frame) for frame in frames]
    assert len(run.seconds) == 4
    assert max(run.seconds) <= run.wall_seconds < sum(run.seconds) + 5


def test_an_empty_pool_has_nothing_to_do() -> None:
    assert process_pool([], squared_error, 2).results == []


@pytest.mark.spark
@pytest.mark.slow
def test_the_recipe_gives_a_row_per_group_and_logs_three_files_of_each_trained_one(
    spark: SparkSession, tmp_path: Path
) -> None:
    rows = FLEET.rows().drop(columns="row_key")
    as_text = rows.assign(x2=rows["x2"].map(repr).where(rows["group"] != "g00002", "no number"))
    short = as_text[(rows["group"] != "g00003") | (rows["time"] >= PROBLEM.tune_start)]
    tracking_uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(tracking_uri=tracking_uri).create_experiment(
        "usual-recipe", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    settings = {
        name: spark.conf.get(name)
        for name in ("spark.sql.adaptive.enabled", "spark.sql.shuffle.partitions")
    }

    found = usual_recipe(
        spark, spark.createDataFrame(short), PROBLEM, tracking_uri=tracking_uri, n_trials=2
    )

    found = found.sort_values("group", ignore_index=True)
    assert list(found["group"]) == list(FLEET.groups)
    assert list(found["status"].str.split(":").str[0]) == [
        "trained",
        "trained",
        "failed",
        "too_few_rows",
    ]
    assert "no number" in found["status"][2]
    trained = found[:2]
    alone = tuned_per_group(rows, PROBLEM, n_trials=2)[:2]
    np.testing.assert_allclose(trained["squared_error"], alone["squared_error"])
    assert np.isfinite(trained["squared_error"]).all()
    assert found["squared_error"][2:].isna().all()
    assert (trained[["seconds", "log_seconds"]] > 0).all(axis=None)
    client = MlflowClient(tracking_uri=tracking_uri)
    run = client.get_run(found["run_id"][0])
    assert run.info.status == "FINISHED"
    for group in trained["group"]:
        files = client.list_artifacts(run.info.run_id, artifact_folder([group]))
        assert {Path(file.path).name for file in files} == {
            "model.txt",
            "parameters.json",
            "metrics.json",
        }
    metrics = json.loads(
        Path(client.download_artifacts(run.info.run_id, "g00000/metrics.json")).read_text()
    )
    assert metrics["rmse"] == pytest.approx((trained["squared_error"][0] / 15) ** 0.5)
    assert len(client.list_artifacts(run.info.run_id)) == 2
    assert {name: spark.conf.get(name) for name in settings} == settings
