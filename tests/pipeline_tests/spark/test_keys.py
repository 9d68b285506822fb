import datetime as dt
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from pipeline.models.meta_model import group_id, inverse_link, link
from pipeline.spark.keys import finite, group_id_column, inverse_link_column, link_column

pytestmark = pytest.mark.spark

NASTY = [
    "../x",
    "a/b",
    "🐟",
    "",
    None,
    '"',
    "\\",
    "\\u2028",
    "a\nb",
    "\x00",
    "\x1f",
    "\x7f",
    "\x80",
    "\u2028\u2029",
    "null",
    "[]",
    "é",
    "Ω",
    "'",
    "`",
    " ",
]
# Spark's strings are UTF-8, which has no lone surrogates.
TEXTS = st.none() | st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.tuples(TEXTS, st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.booleans(), st.none() | st.dates(dt.date(1, 1, 1)))


# Many rows an example, because an example is a Spark job; shrinking one would be hundreds of jobs.
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate], database=None)
@given(st.lists(ROWS, min_size=150, max_size=400))
def test_spark_writes_the_group_id_that_python_writes(spark: SparkSession, rows: list[tuple[Any, ...]]) -> None:
    rows = [*rows, *((text, 7, True, dt.date(2020, 2, 29)) for text in NASTY)]
    frame = spark.createDataFrame(rows, "text string, number long, flag boolean, day date")
    single = [group_id_column([name]) for name in frame.columns]
    found = frame.select(*frame.columns, *(column.alias(f"id{n}") for n, column in enumerate(single)), group_id_column(frame.columns).alias("all"))
    for row in found.collect():
        values = list(row[:4])
        assert list(row[4:8]) == [group_id([value]) for value in values]
        assert row["all"] == group_id(values)


def test_a_number_of_any_width_and_its_float_are_one_group(spark: SparkSession) -> None:
    found = spark.sql("SELECT CAST(7 AS TINYINT) a, CAST(7 AS INT) b, CAST(7 AS BIGINT) c").select(*(group_id_column([name]) for name in "abc"))
    assert set(found.collect()[0]) == {group_id([7])} == {group_id([7.0])} == {'["7"]'}


def test_the_pooled_group_needs_no_column(spark: SparkSession) -> None:
    assert spark.range(1).select(group_id_column([])).collect()[0][0] == group_id([]) == "[]"


@pytest.mark.parametrize("transform", ["none", "log", "log1p"])
def test_links_on_spark_are_those_of_the_model(spark: SparkSession, transform: str) -> None:
    values = [0.0, -0.5, -1.0, -3.0, 1.0, 12345.678, 1e-9, float("inf"), float("-inf"), float("nan"), None]
    column = spark.createDataFrame([(value,) for value in values], "v double")
    linked = link_column(column["v"], transform)
    for value, found, back in column.select("v", linked, inverse_link_column(linked, transform)).collect():
        expected = float("nan") if value is None else float(link(value, transform))
        if expected - expected == 0:  # finite
            assert found == pytest.approx(expected, rel=1e-14)
            assert back == pytest.approx(float(inverse_link(expected, transform)), rel=1e-14)
        else:
            assert found is None


def test_what_is_not_finite_is_null(spark: SparkSession) -> None:
    frame = spark.createDataFrame([(1.5,), (float("nan"),), (float("inf"),), (float("-inf"),), (None,)], "v double")
    assert [row[0] for row in frame.select(finite(frame["v"])).collect()] == [1.5, None, None, None, None]
