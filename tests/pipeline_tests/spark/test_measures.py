"""Errors of single rows, where a rule has an edge."""

import math
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipeline.spark.measures import row_errors, row_means, row_measures
from pipeline.testing.data import small_spec

pytestmark = pytest.mark.spark

COLUMNS = (
    "row_key string, class_name string, actual double, group_ids array<string>, miss double, "
    "fleet double, b0 double"
)
CHANGES: dict[str, dict[str, Any]] = {
    "binary": {"task": "binary"},
    "multiclass": {"task": "multiclass"},
    "quantile": {"tuning": {"objective": "quantile", "alpha": 0.9}},
    "poisson": {"tuning": {"objective": "poisson"}},
    "tweedie": {"tuning": {"objective": "tweedie"}},
}


def measured(
    spark: SparkSession, task: str, *rows: tuple[str | None, float, float | None, float | None]
) -> dict[str, float | None]:
    """Measures over rows of: class, actual, the fleet's answer, a baseline's answer."""
    spec, classes = small_spec(baselines=None, **CHANGES[task]), ["a", "b", "c"]
    keys = [str(number // 3 if task == "multiclass" else number) for number in range(len(rows))]
    frame = spark.createDataFrame(
        [
            (key, name, actual, ["[]"], None, *answers)
            for key, (name, actual, *answers) in zip(keys, rows, strict=True)
        ],
        COLUMNS,
    )
    found = (
        row_errors(frame, spec, ["fleet", "b0"], classes)
        .agg(*row_means(spec, ["fleet", "b0"]))
        .collect()[0]
        .asDict()
    )
    assert set(found) == {f"{way}_{name}" for way in ("fleet", "b0") for name in row_measures(spec)}
    return found


def test_of_equal_probabilities_the_first_class_is_the_answer(spark: SparkSession) -> None:
    first = measured(
        spark, "multiclass", ("c", 0.0, 0.2, 0.2), ("b", 0.0, 0.4, 0.4), ("a", 1.0, 0.4, 0.4)
    )
    second = measured(
        spark, "multiclass", ("c", 0.0, 0.2, 0.2), ("b", 1.0, 0.4, 0.4), ("a", 0.0, 0.4, 0.4)
    )
    assert (first["fleet_accuracy"], second["fleet_accuracy"]) == (1.0, 0.0)


def test_a_coin_is_no_answer_for_the_positive_class(spark: SparkSession) -> None:
    assert measured(spark, "binary", (None, 1.0, 0.5, None))["fleet_accuracy"] == 0.0
    assert measured(spark, "binary", (None, 0.0, 0.5, None))["fleet_accuracy"] == 1.0


@pytest.mark.parametrize(
    "rows",
    [[(None, 1.0, 0.0, 1.0)], [("a", 1.0, 0.0, 1.0), ("b", 0.0, 1.0, 0.0), ("c", 0.0, 0.0, 0.0)]],
)
def test_the_log_loss_of_what_was_thought_impossible_is_bounded(
    spark: SparkSession, rows: list[Any]
) -> None:
    found = measured(spark, "binary" if len(rows) == 1 else "multiclass", *rows)
    assert found["fleet_log_loss"] == pytest.approx(-math.log(1e-15))
    assert found["b0_log_loss"] == 0.0


@pytest.mark.parametrize("task", CHANGES)
def test_rows_that_a_way_does_not_answer_do_not_count_for_it(
    spark: SparkSession, task: str
) -> None:
    one: list[Any] = (
        [("a", 1.0, 0.6, 0.6), ("b", 0.0, 0.3, 0.3), ("c", 0.0, 0.1, 0.1)]
        if task == "multiclass"
        else [(None, 1.0, 0.6, 0.6)]
    )
    unanswered = [(name, actual, 0.2, None) for name, actual, *_ in one]
    alone, beside, never = (
        measured(spark, task, *one),
        measured(spark, task, *one, *unanswered),
        measured(spark, task, *unanswered),
    )
    for name in row_measures(small_spec(**CHANGES[task])):
        assert beside[f"b0_{name}"] == pytest.approx(alone[f"b0_{name}"])
        assert never[f"b0_{name}"] is None


@pytest.mark.parametrize("task", ["poisson", "tweedie"])
def test_deviance_is_nought_for_a_right_answer_and_a_number_for_none(
    spark: SparkSession, task: str
) -> None:
    found = measured(spark, task, (None, 3.0, 3.0, 0.0))
    assert found["fleet_deviance"] == pytest.approx(0.0, abs=1e-12)
    assert found["b0_deviance"] is not None
    assert 0 < found["b0_deviance"] < math.inf
    nothing = measured(spark, task, (None, 0.0, 2.0, 2.0))
    assert nothing["fleet_deviance"] == pytest.approx(
        4.0 if task == "poisson" else 4 * math.sqrt(2)
    )


def test_pinball_loss_weighs_what_lies_above_by_alpha(spark: SparkSession) -> None:
    assert measured(spark, "quantile", (None, 10.0, 8.0, None))["fleet_pinball"] == pytest.approx(
        1.8
    )
    assert measured(spark, "quantile", (None, 8.0, 10.0, None))["fleet_pinball"] == pytest.approx(
        0.2
    )
