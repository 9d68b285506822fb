import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from pipeline.models.meta_model import group_id, inverse_link, key_text, link
from pipeline.spark.keys import (
    finite,
    group_id_column,
    inverse_link_column,
    link_column,
    text_column,
)

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
TEXTS = (
    st.none()
    | st.sampled_from(NASTY)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)
ROWS = st.tuples(
    TEXTS,
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.booleans(),
    st.none() | st.dates(dt.date(1, 1, 1)),
)


# Many rows an example, because an example is a Spark job; shrinking one would be hundreds of jobs.
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
    database=None,
)
@given(st.lists(ROWS, min_size=150, max_size=400))
def test_spark_writes_the_group_id_that_python_writes(
    spark: SparkSession, rows: list[tuple[Any, ...]]
) -> None:
    rows = [*rows, *((text, 7, True, dt.date(2020, 2, 29)) for text in NASTY)]
    frame = spark.createDataFrame(rows, "text string, number long, flag boolean, day date")
    single = [group_id_column([name]) for name in frame.columns]
    found = frame.select(
        *frame.columns,
        *(column.alias(f"id{n}") for n, column in enumerate(single)),
        group_id_column(frame.columns).alias("all"),
    )
    for row in found.collect():
        values = list(row[:4])
        assert list(row[4:8]) == [group_id([value]) for value in values]
        assert row["all"] == group_id(values)


def test_a_number_of_any_width_and_its_float_are_one_group(spark: SparkSession) -> None:
    found = spark.sql("SELECT CAST(7 AS TINYINT) a, CAST(7 AS INT) b, CAST(7 AS BIGINT) c").select(
        *(group_id_column([name]) for name in "abc")
    )
    assert set(found.collect()[0]) == {group_id([7])} == {group_id([7.0])} == {'["7"]'}


def test_the_pooled_group_needs_no_column(spark: SparkSession) -> None:
    assert spark.range(1).select(group_id_column([])).collect()[0][0] == group_id([]) == "[]"


@pytest.mark.parametrize("transform", ["none", "log", "log1p"])
def test_links_on_spark_are_those_of_the_model(spark: SparkSession, transform: str) -> None:
    values = [
        0.0,
        -0.5,
        -1.0,
        -3.0,
        1.0,
        12345.678,
        1e-9,
        float("inf"),
        float("-inf"),
        float("nan"),
        None,
    ]
    column = spark.createDataFrame([(value,) for value in values], "v double")
    linked = link_column(column["v"], transform)
    for value, found, back in column.select(
        "v", linked, inverse_link_column(linked, transform)
    ).collect():
        expected = float("nan") if value is None else float(link(value, transform))
        if expected - expected == 0:  # finite
            assert found == pytest.approx(expected, rel=1e-14)
            assert back == pytest.approx(float(inverse_link(expected, transform)), rel=1e-14)
        else:
            assert found is None


def test_what_is_not_finite_is_null(spark: SparkSession) -> None:
    frame = spark.createDataFrame(
        [(1.5,), (float("nan"),), (float("inf"),), (float("-inf"),), (None,)], "v double"
    )
    assert [row[0] for row in frame.select(finite(frame["v"])).collect()] == [
        1.5,
        None,
        None,
        None,
        None,
    ]


DOUBLES = [
    1.0,
    -0.0,
    1.5,
    0.1,
    -1e-5,
    5.684341886080802e-14,
    1e16,
    1.1e23,
    1e300,
    123456789.125,
    float("nan"),
    float("inf"),
    None,
]
DECIMALS = [
    None if text is None else Decimal(text)
    for text in ("1.00", "-1.50", "0.0000000001", "12345678901234567890.5", "0", "100", None)
]
MOMENTS = [
    None if text is None else pd.Timestamp(text).to_pydatetime()
    for text in (
        "2020-02-29",
        "2020-02-29 06:30",
        "1960-01-01 23:59:59.00012",
        "2020-01-01 00:00:10",
        None,
    )
]
CATEGORIES: dict[str, list[Any]] = {
    "double": DOUBLES,
    "decimal(38, 10)": DECIMALS,
    "timestamp": [None if moment is None else moment.replace(tzinfo=dt.UTC) for moment in MOMENTS],
    "timestamp_ntz": MOMENTS,
    "date": [dt.date(2020, 2, 29), dt.date(1, 1, 1), None],
    "boolean": [True, False, None],
    "long": [0, -7, 2**53 + 1, 2**63 - 1, -(2**63), None],
    "string": ["1.0", "01", "", " ", "é", None],
}


@pytest.mark.parametrize("kind", CATEGORIES)
def test_a_category_of_any_type_is_one_text_on_spark_and_in_pandas(
    spark: SparkSession, kind: str
) -> None:
    values = CATEGORIES[kind]
    table = spark.createDataFrame([(value,) for value in values], f"v {kind}")
    found = table.select(text_column(table["v"], table.schema["v"].dataType)).toPandas().iloc[:, 0]
    on_spark = [None if pd.isna(text) else text for text in found]
    assert on_spark == [key_text(value) for value in values]
    # And as a batch brings them, in the type that pandas has for the column.
    batch = table.toArrow().column(0)
    exact = batch.to_pandas(integer_object_nulls=True)
    assert [key_text(value) for value in exact] == on_spark


def test_equal_values_of_unlike_types_are_one_category() -> None:
    assert {key_text(value) for value in (7, 7.0, Decimal("7.00"), np.int8(7), np.float32(7))} == {
        "7"
    }
    assert {key_text(value) for value in (1.5, Decimal("1.50"), np.float32(1.5))} == {"1.5"}
    midnight = pd.Timestamp("2020-02-29")
    same = (
        midnight,
        midnight.to_pydatetime(),
        midnight.tz_localize("UTC"),
        midnight.to_datetime64(),
        midnight.date(),
    )
    assert {key_text(value) for value in same} == {"2020-02-29"}
    assert key_text(pd.Timestamp("2020-02-29 01:30", tz="Europe/Berlin")) == "2020-02-29 00:30:00"
