"""Which columns a batch may lack: those that training saw nulls in; nothing that decides a booster depends on it."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.runs.planned_run import CountedRows
from pipeline.spark.counting import MASK_BITS, count_groups
from pipeline.spec import FleetSpec
from pipeline.testing.data import feature_rows, small_spec
from pipeline.training.splits import resolve_cutoffs

pytestmark = pytest.mark.spark

CATEGORIES = {"kind": ["large", "small"]}


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(**{name: rows[name].dt.tz_localize("UTC") for name in ("time", "known_at")})
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def counted(spark: SparkSession, rows: pd.DataFrame, spec: FleetSpec) -> CountedRows:
    newest = pd.Timestamp(rows["time"].max())
    return count_groups(
        in_spark(spark, rows), spec, resolve_cutoffs(spec.splits, newest, newest), CATEGORIES
    )


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return feature_rows(120)


@pytest.mark.parametrize(
    ("name", "row", "value", "also", "found"),
    [
        (None, 0, None, {}, ()),
        ("price", 0, None, {}, ("price",)),
        ("price", -1, None, {}, ("price",)),  # a report row: the served booster learns from it, too
        ("price", 50, np.nan, {}, ("price",)),
        ("kind", 50, None, {}, ("kind",)),
        ("kind", 50, "unheard of", {}, ()),  # a category that is not in the list is no null
        ("price", 50, np.inf, {}, ()),
        ("usual_sales", 50, None, {}, ()),  # no feature
        # Rows that nothing is learnt from.
        ("price", 50, None, {"sales": None}, ()),
        ("price", 50, None, {"usual_sales": 0.0}, ()),
        ("price", 50, None, {"usual_sales": None}, ()),
    ],
)
def test_a_feature_has_nulls_if_a_row_that_is_learnt_from_has_one(
    spark: SparkSession,
    rows: pd.DataFrame,
    name: str | None,
    row: int,
    value: Any,
    also: dict[str, Any],
    found: tuple[str, ...],
) -> None:
    changed = rows.copy()
    for column, cell in {**({} if name is None else {name: value}), **also}.items():
        changed.loc[changed.index[row], column] = cell
    assert counted(spark, changed, small_spec(target={"weight": "usual_sales"})).nullable == found


def test_features_of_any_number_are_looked_at(spark: SparkSession, rows: pd.DataFrame) -> None:
    names = [f"x{number}" for number in range(2 * MASK_BITS + 5)]
    with_nulls = [
        0,
        1,
        MASK_BITS - 1,
        MASK_BITS,
        MASK_BITS + 1,
        2 * MASK_BITS - 1,
        2 * MASK_BITS,
        len(names) - 1,
    ]
    many = pd.DataFrame(1.0, index=rows.index, columns=names)
    for number in with_nulls:
        many.iloc[number, number] = np.nan
    spec = small_spec(features={"columns": names, "calendar": [], "categoricals": []})
    assert counted(spark, pd.concat([rows, many], axis=1), spec).nullable == tuple(
        names[number] for number in with_nulls
    )


def test_hashes_of_rows_are_those_of_earlier_releases(spark: SparkSession) -> None:
    """Another hash would train every group of every fleet again."""
    data = counted(
        spark, pd.DataFrame(ROWS), small_spec(grains=[[], ["region"]], entity=["region", "city"])
    )
    assert data.counts.set_index("group_id")["rows_hash"].to_dict() == HASHES


ROWS: dict[str, Any] = {
    "region": ["north", "north", "south"],
    "city": ["oslo", "bergen", "roma"],
    "time": pd.to_datetime(["2024-01-01", "2024-02-01", "2024-03-01"]).as_unit("us"),
    "known_at": pd.to_datetime(["2024-01-01", "2024-02-01", "2024-03-01"]).as_unit("us"),
    "row_key": ["1", "2", "3"],
    "is_future": False,
    "price": [1.5, None, 3.25],
    "promotion": [0.0, 1.0, None],
    "day_of_week": [1.0, 2.0, 3.0],
    "kind": ["small", "large", None],
    "usual_sales": [10.0, 20.0, 30.0],
    "sales": [11.0, 19.5, 31.25],
    "sales_lag_7": [None, 10.5, 30.0],
}
HASHES = {
    "[]": "3-179537e44-15f6818b2",
    '["north"]': "2-db45f39f-c0ba2b20",
    '["south"]': "1-4dfe169f-1007d86c",
}
