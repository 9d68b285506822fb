"""Weights are chosen in the fleet's own loss, and Spark adds up what pandas would."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.spark.weights import learn_weights, sum_gains
from pipeline.spec import FleetSpec
from pipeline.testing.blending import learn_weights_in_pandas, own_losses
from pipeline.testing.data import small_spec
from pipeline.training.blend import WEIGHTS, Gains
from pipeline.training.splits import EARLIER, REPORT, TUNE

pytestmark = pytest.mark.spark

CITIES = [f"c{number}" for number in range(6)]
HAS_MODEL = [{"[]"}, {f'["{city}"]' for city in CITIES[:5]}]
CONSTANT = 1.5
SPECS: dict[str, dict[str, Any]] = {
    "l2": {},
    "l1": {"tuning": {"objective": "l1"}},
    "quantile": {"tuning": {"objective": "quantile", "alpha": 0.9}},
    "huber": {"tuning": {"objective": "huber", "alpha": 0.5}},
    "poisson": {"tuning": {"objective": "poisson"}},
    "tweedie": {"tuning": {"objective": "tweedie"}},
    "log target": {"target": {"column": "sales", "transform": "log"}},
    "binary": {"task": "binary", "target": {"column": "kind"}, "features": {"categoricals": []}},
}


def spec_of(name: str, **changes: Any) -> FleetSpec:
    return small_spec(grains=[[], ["city"]], entity=["city"], **{**SPECS[name], **changes})


def judged_rows(name: str, n: int = 800, seed: int = 0) -> pd.DataFrame:
    """Rows as `evaluation.judged_rows` gives them; the sixth city has no model."""
    rng = np.random.default_rng(seed)
    cities = rng.choice(CITIES, n)
    stretch = rng.integers(-1, 4, n).astype(float)
    stretch[stretch < 0] = np.nan
    split = np.select([stretch >= 2, stretch >= 0], [EARLIER, TUNE], REPORT)
    actual = rng.gamma(2.0, 1.0, n) + 0.1
    predictions = [actual + rng.normal(0, scale, n) for scale in (0.8, 0.6)]
    if name == "binary":
        actual = (actual > 2).astype(float)
        predictions = [
            np.clip(0.3 + 0.4 * actual + rng.normal(0, 0.1, n), 0.01, 0.99) for _ in "ab"
        ]
    predictions = [np.maximum(prediction, 0.01) for prediction in predictions]
    rows = pd.DataFrame(
        {
            "split": split,
            "stretch": stretch,
            "actual": actual,
            "offset": 0.0,
            "scale": 1.0,
            "weight": rng.uniform(0.5, 2.0, n),
            "residual": actual,
            "class_name": None,
            "p0": predictions[0],
            "p1": np.where(cities == CITIES[5], np.nan, predictions[1]),
            "has_model0": True,
            "has_model1": cities != CITIES[5],
        }
    )
    rows["group_ids"] = [["[]", f'["{city}"]'] for city in cities]
    # Groups that are too short for it are not predicted before the tune split.
    rows.loc[(rows["split"] == EARLIER) & (rng.uniform(size=n) < 0.2), "p0"] = np.nan
    return rows


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    missing = {name: rows[name].astype(object).where(rows[name].notna()) for name in ("p0", "p1")}
    stretch = rows["stretch"].astype("Int32").astype(object).where(rows["stretch"].notna())
    schema = (
        "split string, stretch int, actual double, offset double, scale double, weight double, "
        "residual double, class_name string, p0 double, p1 double, has_model0 boolean, "
        "has_model1 boolean, group_ids array<string>"
    )
    return spark.createDataFrame(rows.assign(**missing, stretch=stretch), schema)


@pytest.mark.parametrize("name", SPECS)
def test_gains_are_sums_of_the_fleets_own_loss(spark: SparkSession, name: str) -> None:
    spec, rows = spec_of(name), judged_rows(name)
    rows = rows[rows["p0"].notna() & rows["p1"].notna() & rows["stretch"].notna()]
    found = sum_gains(in_spark(spark, rows), spec, 1, sf.col("p0"), 0.0)
    losses = []
    for weight in WEIGHTS:
        answers = weight * rows["p1"].to_numpy() + (1 - weight) * rows["p0"].to_numpy()
        losses.append(own_losses(spec, rows, answers))
    groups = rows["group_ids"].str[1].to_numpy()
    stretches = rows["stretch"].to_numpy()
    expected = Gains.of_rows(np.stack(losses, axis=1), groups, stretches, 0.0)
    assert found.loss == pytest.approx(expected.loss)
    np.testing.assert_array_equal(found.n_groups, expected.n_groups)
    np.testing.assert_allclose(found.by_stretch, expected.by_stretch, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.products, expected.products, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", ["blend", "select", "none"])
@pytest.mark.parametrize("name", ["l2", "quantile", "binary"])
def test_weights_are_those_of_pandas(spark: SparkSession, name: str, pooling: str) -> None:
    spec, rows = spec_of(name, pooling=pooling), judged_rows(name)
    found = learn_weights(in_spark(spark, rows), spec, HAS_MODEL, sf.lit(CONSTANT))
    constant = np.full(len(rows), CONSTANT)
    assert found == learn_weights_in_pandas(rows, spec, HAS_MODEL, constant)
    assert [set(weights) for weights in found] == HAS_MODEL


def test_report_rows_choose_no_weight(spark: SparkSession) -> None:
    spec, rows = spec_of("l2"), judged_rows("l2")
    found = learn_weights(in_spark(spark, rows), spec, HAS_MODEL, sf.lit(CONSTANT))
    rows.loc[rows["split"] == REPORT, "actual"] = 1000.0
    assert learn_weights(in_spark(spark, rows), spec, HAS_MODEL, sf.lit(CONSTANT)) == found


def test_without_evidence_only_the_pooled_model_counts(spark: SparkSession) -> None:
    spec, rows = spec_of("l2"), judged_rows("l2")
    rows = rows[rows["split"] == REPORT]
    pooled, cities = learn_weights(in_spark(spark, rows), spec, HAS_MODEL, sf.lit(CONSTANT))
    assert (set(pooled.values()), set(cities.values())) == ({1.0}, {0.0})


@pytest.mark.parametrize("pooling", ["blend", "select"])
def test_answers_that_no_double_holds_decide_nothing(spark: SparkSession, pooling: str) -> None:
    spec, rows = spec_of("log target", pooling=pooling), judged_rows("log target")
    is_lost = rows.index[rows["split"] == TUNE][:5]
    rows.loc[is_lost, "p1"] = 1e4
    with np.errstate(over="ignore"):
        constant = np.full(len(rows), CONSTANT)
        expected = learn_weights_in_pandas(rows, spec, HAS_MODEL, constant)
    found = learn_weights(in_spark(spark, rows), spec, HAS_MODEL, sf.lit(CONSTANT))
    assert found == expected
    without = rows.drop(index=is_lost)
    assert learn_weights(in_spark(spark, without), spec, HAS_MODEL, sf.lit(CONSTANT)) == found
