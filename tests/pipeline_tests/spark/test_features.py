import copy
import datetime as dt
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.errors import DataError, SpecError
from pipeline.features.history import add_history, plan_passes
from pipeline.models.meta_model import design_matrix, group_id
from pipeline.models.pack import build_model_spec
from pipeline.runs.history import History
from pipeline.runs.request import Request
from pipeline.spark.data_errors import readable_spark_errors
from pipeline.spark.features import (
    all_null_columns,
    build_features,
    check_feature_table,
    newest_known,
    newest_time,
)
from pipeline.spark.planning import plan_run
from pipeline.spark.rows import visible_rows
from pipeline.spark.scoring import rows_to_score
from pipeline.spec import FleetSpec, parse_spec
from pipeline.tables import LEDGER, RUNS
from pipeline.testing.data import feature_rows, small_spec
from pipeline.testing.runs import quiet_context

pytestmark = pytest.mark.spark

SQL = "SELECT region, store, sold_on, known_on, amount, size FROM sales"
CHANGES = {
    "known_at": "known_on",
    "features": {
        "columns": ["size"],
        "lags": [{"column": "amount", "periods": [1, 2, 12]}],
        "rolling": [
            {
                "column": "amount",
                "window": "3 months",
                "statistics": ["mean", "sum", "count", "std", "min", "max", "last"],
            },
            {"column": "amount", "window": "40 days", "over": ["region"]},
            {"column": "amount", "window": "1 year", "over": []},
        ],
        "calendar": ["month", "day_of_week"],
        "categoricals": ["region"],
        "derived": {
            "change": "amount_lag_1 - amount_lag_2",
            "share": "change / amount_mean_3_months",
        },
    },
}


def built(attributes: dict[str, Any], **changes: Any) -> FleetSpec:
    return parse_spec({**copy.deepcopy(attributes), **changes}, file="shop/defs.yaml")


@pytest.fixture(scope="module")
def spec(shop_attributes: dict[str, Any]) -> FleetSpec:
    return built(shop_attributes, **CHANGES)


@pytest.fixture(scope="module")
def sales() -> pd.DataFrame:
    """Three years of five shops, some months missing, some amounts null or infinite, most known some weeks late."""
    random = np.random.default_rng(7)
    shops = [("north", "a"), ("north", "../x"), ("north", None), ("süd", "a"), ("süd", "")]
    months = pd.date_range("2020-01-01", periods=36, freq="MS")
    rows = pd.DataFrame(
        [(region, store, month) for region, store in shops for month in months],
        columns=["region", "store", "sold_on"],
    )
    rows = rows[random.random(len(rows)) > 0.1].reset_index(drop=True)
    rows["known_on"] = rows["sold_on"] + pd.to_timedelta(
        random.integers(0, 70, len(rows)), unit="D"
    )
    rows.loc[::11, "known_on"] = pd.NaT
    rows["amount"] = random.normal(100, 10, len(rows)).round(2)
    rows.loc[::13, "amount"] = None
    rows.loc[5, "amount"] = np.inf
    rows["size"] = random.integers(1, 100, len(rows))
    return rows


def frame_of(spark: SparkSession, sales: pd.DataFrame) -> DataFrame:
    zoned = sales.assign(
        **{name: sales[name].dt.tz_localize("UTC") for name in ("sold_on", "known_on")}
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def through_spark(
    spark: SparkSession, spec: FleetSpec, sales: pd.DataFrame, sql: str = SQL
) -> pd.DataFrame:
    return (
        build_features(spark, spec, sql, {"sales": frame_of(spark, sales)})
        .toPandas()
        .sort_values("row_key", ignore_index=True)
    )


def through_pandas(spec: FleetSpec, sales: pd.DataFrame) -> pd.DataFrame:
    table = sales.assign(time=sales["sold_on"], known_at=sales["known_on"].fillna(sales["sold_on"]))
    table["row_key"] = [
        group_id([row.region, row.store, row.sold_on.strftime("%Y-%m-%d %H:%M:%S")])
        for row in sales.itertuples()
    ]
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    for features in plan_passes(spec):
        arrow = add_history(arrow, spec, features)
    found = arrow.to_pandas()
    found["month"] = found["time"].dt.month.astype(float)
    found["day_of_week"] = found["time"].dt.weekday.astype(float)
    found["change"] = found["amount_lag_1"] - found["amount_lag_2"]
    found["share"] = found["change"] / found["amount_mean_3_months"]
    return found.sort_values("row_key", ignore_index=True)


def test_spark_builds_the_features_that_pandas_builds(
    spark: SparkSession, spec: FleetSpec, sales: pd.DataFrame
) -> None:
    on_spark, in_pandas = through_spark(spark, spec, sales), through_pandas(spec, sales)
    assert list(on_spark["row_key"]) == list(in_pandas["row_key"])
    assert not on_spark["is_future"].any()
    assert {"time", "known_at", *spec.feature_columns, *spec.key_columns, "amount"} <= set(
        on_spark.columns
    )
    for name in ["time", "known_at"]:
        assert (on_spark[name].to_numpy() == in_pandas[name].to_numpy()).all()
    for name in [column for column in spec.feature_columns if column != "region"]:
        np.testing.assert_array_equal(
            on_spark[name].to_numpy(float), in_pandas[name].to_numpy(float), err_msg=name
        )
    assert in_pandas["amount_lag_12"].notna().sum() > 20
    assert in_pandas["amount_mean_1_year_by_all"].notna().sum() > 100


def test_a_changed_future_changes_no_feature_of_the_past(
    spark: SparkSession, spec: FleetSpec, sales: pd.DataFrame
) -> None:
    moment = pd.Timestamp("2021-09-01")
    late = sales["known_on"].fillna(sales["sold_on"]) > moment
    changed = sales.assign(amount=sales["amount"].mask(late, 9e6))
    before, after = through_spark(spark, spec, sales), through_spark(spark, spec, changed)
    # A row is predicted a month (the horizon) before its time: until then, nothing that is known later may show.
    past = (before["time"] - pd.DateOffset(months=1) <= moment).to_numpy()
    assert 50 < past.sum() < len(past)
    pd.testing.assert_frame_equal(
        before.loc[past, list(spec.feature_columns)], after.loc[past, list(spec.feature_columns)]
    )
    assert not before["amount_max_3_months"].equals(after["amount_max_3_months"])


def test_rows_to_come_are_made_up_for_every_entity(
    spark: SparkSession, shop_attributes: dict[str, Any], sales: pd.DataFrame
) -> None:
    attributes = copy.deepcopy(
        {**shop_attributes, "horizon": "3 months", "baselines": {}, "scoring": {"score": "future"}}
    )
    attributes["features"] = {"lags": [{"column": "amount", "periods": [3]}], "calendar": ["month"]}
    spec = built(attributes)
    sales = sales.assign(size=1, amount=np.arange(len(sales), dtype=float))
    found = through_spark(spark, spec, sales, "SELECT region, store, sold_on, amount FROM sales")
    future = found[found["is_future"]]
    newest = sales["sold_on"].max()
    assert sorted(future["time"].unique()) == [newest + pd.DateOffset(months=n) for n in (1, 2, 3)]
    entities = sales[["region", "store"]].drop_duplicates()
    assert len(future) == 3 * len(entities)
    assert future["amount"].isna().all()
    assert set(future["row_key"]) == {
        group_id([region, store, (newest + pd.DateOffset(months=n)).strftime("%Y-%m-%d %H:%M:%S")])
        for region, store in entities.to_numpy(dtype=object)
        for n in (1, 2, 3)
    }
    known = {(row.region, row.store, row.sold_on): row.amount for row in sales.itertuples()}
    for row in future.itertuples():
        expected = known.get((row.region, row.store, row.time - pd.DateOffset(months=3)))
        assert (np.isnan(row.amount_lag_3) and expected is None) or row.amount_lag_3 == expected
    assert future["amount_lag_3"].notna().any()


def months(*texts: str) -> list[pd.Timestamp]:
    return [pd.Timestamp(text) for text in texts]


def series_spec(
    shop_attributes: dict[str, Any], horizon: str = "3 months", **changes: Any
) -> FleetSpec:
    features = {
        "lags": [{"column": "amount", "periods": [3]}],
        "rolling": [{"column": "amount", "window": "2 months", "statistics": ["last", "count"]}],
    }
    attributes = copy.deepcopy(
        {**shop_attributes, "horizon": horizon, "baselines": {}, "scoring": {"score": "future"}}
    )
    attributes["features"] = features
    return built(attributes, **changes)


def series_rows(**series: Any) -> pd.DataFrame:
    """Rows of shops in one region: by shop its months and amounts."""
    parts = [
        pd.DataFrame(
            {
                "region": "n",
                "store": store,
                "sold_on": pd.to_datetime(list(of)),
                "amount": list(of.values()),
            }
        )
        for store, of in series.items()
    ]
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(known_on=rows["sold_on"])


def test_a_horizon_of_several_steps_gives_each_entity_one_row_per_step(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = series_spec(shop_attributes)
    whole = {f"2020-{month:02d}-01": float(month) for month in range(1, 13)}
    gone = {"2020-02-01": 50.0, "2020-03-01": 60.0}
    rows = series_rows(a=whole, gone=gone)
    found = through_spark(
        spark, spec, rows, "SELECT region, store, sold_on, amount FROM sales"
    ).set_index(["store", "time"])
    future = found[found["is_future"]]
    steps = months("2021-01-01", "2021-02-01", "2021-03-01")
    # The shop that ended in spring is asked for the same steps as all others.
    assert sorted(future.index) == sorted(
        (store, step) for store in ("a", "gone") for step in steps
    )
    # Three months before each step lies the newest that is known then.
    assert future.loc["a", "amount_lag_3"].tolist() == [10.0, 11.0, 12.0]
    assert future.loc["a", "amount_last_2_months"].tolist() == [10.0, 11.0, 12.0]
    assert future.loc["a", "amount_count_2_months"].tolist() == [2.0, 2.0, 2.0]
    assert future.loc["gone", ["amount_lag_3", "amount_last_2_months"]].isna().all(axis=None)
    scored = rows_to_score(
        build_features(
            spark,
            spec,
            "SELECT region, store, sold_on, amount FROM sales",
            {"sales": frame_of(spark, rows)},
        ),
        spec,
        rows["sold_on"].max(),
    )
    assert scored.count() == len(future)


def test_gaps_in_a_series_are_gaps_and_not_shifts(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = series_spec(shop_attributes, horizon="1 month")
    with_gap = {f"2020-{month:02d}-01": float(month) for month in (1, 2, 3, 7, 8, 9)}
    found = through_spark(
        spark, spec, series_rows(a=with_gap), "SELECT region, store, sold_on, amount FROM sales"
    ).set_index("time")
    lags = {month.month: found["amount_lag_3"][month] for month in found.index}
    # April to June are not there: three months before July to September nothing is known.
    assert {month: lag for month, lag in lags.items() if not np.isnan(lag)} == {10: 7.0}
    counts = {month.month: found["amount_count_2_months"][month] for month in found.index}
    assert counts == {1: 0, 2: 1, 3: 2, 7: 0, 8: 1, 9: 2, 10: 2}


def test_irregular_times_are_seen_as_of_what_was_known(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = series_spec(shop_attributes, horizon="1 month")
    irregular = {
        "2020-01-03": 1.0,
        "2020-01-30": 2.0,
        "2020-02-29": 3.0,
        "2020-03-30": 4.0,
        "2020-04-30": 5.0,
    }
    found = through_spark(
        spark, spec, series_rows(a=irregular), "SELECT region, store, sold_on, amount FROM sales"
    ).set_index("time")
    last = found["amount_last_2_months"].fillna(-1)
    # A month before 29 February is 29 January, before 30 March it is 29 February, before 30 April 30 March.
    assert last.to_dict() == {
        pd.Timestamp("2020-01-03"): -1,
        pd.Timestamp("2020-01-30"): -1,
        pd.Timestamp("2020-02-29"): 1.0,
        pd.Timestamp("2020-03-30"): 3.0,
        pd.Timestamp("2020-04-30"): 4.0,
        pd.Timestamp("2020-05-30"): 5.0,
    }
    # Lags ask for exactly that day: three months before 30 April is 30 January, before 30 May the last day of February.
    assert found["amount_lag_3"].dropna().to_dict() == {
        pd.Timestamp("2020-04-30"): 2.0,
        pd.Timestamp("2020-05-30"): 3.0,
    }


def test_a_series_of_month_ends_stays_on_month_ends(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = series_spec(shop_attributes, horizon="1 month", period="1 month")
    spec = built(
        spec.model_dump(),
        features={
            "lags": [{"column": "amount", "periods": [1]}],
            "rolling": spec.features.model_dump()["rolling"],
        },
    )
    ends = [str(day.date()) for day in pd.date_range("2021-08-31", periods=19, freq="ME")]
    first_days = [f"{day[:8]}01" for day in ends]
    # One shop reports on last days; one on the 28th, which is a last day only in the newest month.
    of_28th = [f"{day[:8]}28" for day in ends]
    rows = series_rows(
        end=dict(zip(ends, range(19), strict=True)),
        start=dict(zip(first_days, range(19), strict=True)),
        of_28th=dict(zip(of_28th, range(19), strict=True)),
    )
    sql = "SELECT region, store, sold_on, amount FROM sales"
    features = build_features(spark, spec, sql, {"sales": frame_of(spark, rows)})
    assert not [name for name in features.columns if name.startswith("_")]
    found = features.toPandas().sort_values("time").set_index("store")
    for store in ("end", "start", "of_28th"):
        assert found.loc[store, "amount_lag_1"].fillna(-1).tolist() == list(range(-1, 19)), store
        assert found.loc[store, "amount_count_2_months"].tolist() == [0, 1, *[2] * 18], store
    future = found[found["is_future"]]["time"].astype(str).to_dict()
    assert future == {"end": "2023-03-31", "of_28th": "2023-03-28", "start": "2023-03-01"}
    # All of them are answered, also as of a month end in the past.
    assert rows_to_score(features, spec, rows["sold_on"].max()).count() == 3
    asked = (
        rows_to_score(features, spec, pd.Timestamp("2022-02-28"))
        .select("store", sf.to_date("time").cast("string"))
        .collect()
    )
    assert {tuple(row) for row in asked} == {
        ("end", "2022-03-31"),
        ("of_28th", "2022-03-28"),
        ("start", "2022-03-01"),
    }


def test_the_last_season_is_in_the_table_for_the_baseline_alone(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = series_spec(shop_attributes)
    assert spec.all_baselines == {"seasonal naive": "amount_lag_12"}
    assert "amount_lag_12" not in spec.feature_columns
    series = {
        str(month.date()): float(number)
        for number, month in enumerate(pd.date_range("2020-01-01", periods=24, freq="MS"))
    }
    del series["2020-06-01"]
    found = through_spark(
        spark, spec, series_rows(a=series), "SELECT region, store, sold_on, amount FROM sales"
    ).set_index("time")
    assert found["amount_lag_12"].loc["2021-01-01":"2021-05-01"].tolist() == [
        0.0,
        1.0,
        2.0,
        3.0,
        4.0,
    ]
    assert np.isnan(found["amount_lag_12"]["2021-06-01"])
    assert found["amount_lag_12"]["2022-01-01"] == 12.0


@pytest.mark.parametrize(
    ("label", "texts"),
    [
        ("CASE WHEN size > 1 THEN 'big' ELSE 'small' END", ["big", "small"]),
        ("size > 1", ["false", "true"]),
        ("size", ["1", "2"]),
    ],
)
def test_classes_are_text_in_the_feature_table(
    spark: SparkSession, shop_attributes: dict[str, Any], label: str, texts: list[str]
) -> None:
    spec = built(shop_attributes, task="binary", target={"column": "label"}, baselines={})
    sql = (
        "SELECT 'n' region, s store, date'2020-01-01' sold_on, 1 amount, size, "
        f"{label} label FROM VALUES ('a', 1), ('b', 2) AS t(s, size)"
    )
    found = build_features(spark, spec, sql, {})
    assert dict(found.dtypes)["label"] == "string"
    assert sorted(row["label"] for row in found.collect()) == texts


def test_raw_categories_are_those_of_the_feature_table(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    attributes = copy.deepcopy(shop_attributes)
    attributes["features"]["categoricals"] = ["level", "since"]
    spec = built(attributes)
    raw = (
        "SELECT 'n' region, s store, date'2020-01-01' sold_on, 1 amount, 1 size, level, "
        "timestampadd(MINUTE, 90, timestamp'2020-01-01') AS since"
    )
    sql = f"{raw} FROM VALUES ('a', 1.0D), ('b', 2.5D), ('c', null) AS t(s, level)"
    found = build_features(spark, spec, sql, {}).select("level", "since").toPandas()
    assert sorted(found["level"].dropna()) == ["1", "2.5"]
    assert set(found["since"]) == {"2020-01-01 01:30:00"}
    batch = spark.sql(sql).select("level", "since").toPandas()
    categories = {name: sorted(found[name].dropna().unique()) for name in found}
    model_spec = replace(build_model_spec(spec, categories), features=("level", "since"))
    numbers = design_matrix(batch, model_spec)
    assert sorted(numbers[~np.isnan(numbers[:, 0]), 0]) == [0.0, 1.0]
    assert set(numbers[:, 1]) == {0.0}
    with pytest.raises(
        DataError,
        match=(
            r"categorical 'level' is array<int>; expected text, a number, .*: "
            r"cast it in features.sql"
        ),
    ):
        build_features(spark, spec, sql.replace("size, level", "size, array(1) AS level"), {})


def test_a_class_that_is_no_class_is_refused(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = built(shop_attributes, task="multiclass", target={"column": "label"}, baselines={})
    with pytest.raises(
        DataError,
        match=(
            r"target 'label' is double; expected text, a boolean or a whole number for task "
            r"'multiclass': cast it"
        ),
    ):
        build_features(spark, spec, ROW + ", 1.5D label", {})


@pytest.fixture
def new_york() -> Iterator[None]:
    """A machine that does not keep UTC."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "America/New_York"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


def test_moments_do_not_depend_on_the_zone_of_the_machine(
    spark: SparkSession, shop_attributes: dict[str, Any], new_york: None
) -> None:
    attributes = copy.deepcopy({**shop_attributes, "scoring": {"score": "future"}})
    attributes["features"] = {"lags": [{"column": "amount", "periods": [1]}]}
    spec = built(attributes)
    raw = spark.sql(
        "SELECT 'n' region, 'a' store, timestamp'2020-01-01' sold_on, "
        "1 amount UNION ALL SELECT 'n', 'a', timestamp'2020-02-01', 2"
    )
    found = build_features(spark, spec, "SELECT * FROM sales", {"sales": raw})
    assert newest_known(found, "amount") == pd.Timestamp("2020-02-01")
    assert newest_time(found.where("NOT is_future")) == pd.Timestamp("2020-02-01")
    assert [row[0] for row in found.where("is_future").selectExpr("string(time)").collect()] == [
        "2020-03-01 00:00:00"
    ]
    assert visible_rows(found, pd.Timestamp("2020-01-31 23:59")).count() == 1
    assert visible_rows(found, pd.Timestamp("2020-02-01")).count() == 2


def test_rows_that_wait_for_their_answer_move_neither_the_as_of_nor_the_splits(
    spark: SparkSession,
) -> None:
    rows = feature_rows(200)
    last = rows["time"].max()
    waiting = rows[rows["time"] > last - pd.Timedelta(days=40)]
    later = waiting["time"] + pd.Timedelta(days=40)
    waiting = waiting.assign(
        time=later, known_at=later, sales=np.nan, row_key=waiting["row_key"] + "w"
    )
    zoned = pd.concat([rows, waiting])
    zoned = zoned.assign(
        time=zoned["time"].dt.tz_localize("UTC"), known_at=zoned["known_at"].dt.tz_localize("UTC")
    )
    table = pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    features = spark.createDataFrame(table)
    spec = small_spec(scoring={"score": "new"})
    history = History(
        RUNS.schema.empty_table().to_pandas(), lambda _: LEDGER.schema.empty_table().to_pandas()
    )
    default = plan_run(
        quiet_context(features.sparkSession), features, spec, Request("run"), history
    )
    assert default.cutoffs.as_of == last
    # An as-of that lets the waiting rows be seen leaves the splits where outcomes are.
    late = plan_run(
        quiet_context(features.sparkSession),
        features,
        spec,
        Request("run", as_of=later.max()),
        history,
    )
    assert late.cutoffs.report_start == default.cutoffs.report_start == pd.Timestamp("2024-07-01")
    assert len(default.plan.to_train) == len(late.plan.to_train) == 7
    assert rows_to_score(features, spec, default.cutoffs.as_of).count() == len(waiting)


def test_a_doubled_key_is_refused_with_examples(spark: SparkSession, shop: FleetSpec) -> None:
    raw = spark.sql(
        "SELECT 'n' region, s store, date'2020-01-01' sold_on, 1 amount, 1 size FROM VALUES ('a'), ('a'), ('b'), (null), (null) AS t(s)"
    )
    rows = build_features(spark, shop, "SELECT * FROM sales", {"sales": raw})
    with pytest.raises(DataError) as told:
        check_feature_table(rows, shop)
    message = str(told.value)
    assert message.startswith("2 entity keys occur more than once")
    for part in (
        '["n","a","2020-01-01 00:00:00"]',
        '["n",null,"2020-01-01 00:00:00"]',
        "['region', 'store']",
        "sold_on",
        "deduplicate in features.sql",
    ):
        assert part in message
    assert '"b"' not in message


def test_counts_of_a_sound_table(spark: SparkSession, shop_attributes: dict[str, Any]) -> None:
    attributes = copy.deepcopy({**shop_attributes, "scoring": {"score": "future"}})
    attributes["features"] = {"lags": [{"column": "amount", "periods": [1]}]}
    spec = built(attributes)
    raw = spark.sql(
        "SELECT 'n' region, s store, date'2020-01-01' sold_on, a amount FROM VALUES ('a', 1), "
        "('b', null), ('c', 3) AS t(s, a)"
    )
    rows = build_features(spark, spec, "SELECT * FROM sales", {"sales": raw})
    assert check_feature_table(rows, spec) == {"n_rows": 6, "n_targets": 2, "n_future": 3}
    assert all_null_columns(rows, ["amount_lag_1"]) == []
    assert all_null_columns(rows.where("NOT is_future"), ["amount_lag_1"]) == ["amount_lag_1"]


ROW = "SELECT 'n' region, 'a' store, date'2020-01-01' sold_on, 1 amount, 1 size"


@pytest.mark.parametrize(
    ("sql", "error", "parts"),
    [
        (
            ROW.replace("'a' store", "1.5D store"),
            DataError,
            ["key 'store' is double", "cast it in features.sql"],
        ),
        (
            ROW.replace("'a' store", "array('a') store"),
            DataError,
            ["key 'store' is array<string>", "text, a whole number, a boolean or a date"],
        ),
        (
            ROW.replace("1 amount", "'1' amount"),
            DataError,
            ["target 'amount' is string", "expected a number", "null_values"],
        ),
        (
            ROW.replace("1 amount", "explode(array('yes', 'no', 'no')) amount"),
            DataError,
            ["two values, 'no' and 'yes'", "set task: binary"],
        ),
        (
            ROW.replace("1 size", "'big' size"),
            DataError,
            ["feature 'size' is string", "features.categoricals"],
        ),
        (
            ROW.replace("date'2020-01-01' sold_on", "'2020-01-01' sold_on"),
            DataError,
            ["'sold_on' is string", "date or timestamp"],
        ),
        (
            ROW.replace(", 1 size", ""),
            SpecError,
            [
                "features.columns",
                "features.sql gives no column 'size'",
                "region, store, sold_on, amount",
            ],
        ),
        (
            ROW.replace("1 size", "no_such_function(1) size"),
            SpecError,
            ["features.sql", "no_such_function"],
        ),
    ],
)
def test_what_cannot_serve_is_refused_before_work(
    spark: SparkSession, shop: FleetSpec, sql: str, error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as told:
        build_features(spark, shop, sql, {})
    assert [part for part in parts if part not in str(told.value)] == []


@pytest.mark.parametrize(
    ("select", "error", "parts"),
    [
        (
            "CAST(sold_on AS DATE)",
            DataError,
            ["source 'sales', column 'sold_on' (/raw/a.csv)", "'14.03.2024' is not a DATE", "try_to_timestamp(sold_on", "types:"],
        ),
        ("to_timestamp(sold_on)", DataError, ["column 'sold_on'", "'14.03.2024'", "try_to_timestamp"]),
        ("CAST(sold_on AS DOUBLE)", DataError, ["column 'sold_on'", "try_cast(sold_on AS DOUBLE)"]),
        ("CAST(concat(sold_on, '!') AS INT)", DataError, ["a computed value", "'14.03.2024!'"]),
        ("1 / (length(sold_on) - 10)", SpecError, ["features.sql: Division by zero", "correct the expression"]),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_told_with_its_source_and_column(
    spark: SparkSession, select: str, error: type[Exception], parts: list[str]
) -> None:
    raw = {"sales": spark.sql("SELECT '/raw/a.csv' _source, '14.03.2024' sold_on, 1 n")}
    with pytest.raises(error) as told, readable_spark_errors("features.sql", raw):
        raw["sales"].selectExpr(select).collect()
    assert [part for part in parts if part not in str(told.value)] == []
    assert len(str(told.value).splitlines()) <= 4


def test_a_derived_column_that_spark_refuses_names_itself(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    attributes = copy.deepcopy(shop_attributes)
    attributes["features"]["derived"] = {"change": "amount_lag_1 - map_keys(size)"}
    with pytest.raises(
        SpecError, match=r"features\.derived\.change: 'amount_lag_1 - map_keys\(size\)'.*map_keys"
    ):
        build_features(spark, built(attributes), ROW, {})


def test_rows_without_a_time_are_refused(spark: SparkSession, shop: FleetSpec) -> None:
    rows = build_features(
        spark, shop, ROW + " UNION ALL " + ROW.replace("date'2020-01-01'", "cast(null as date)"), {}
    )
    with pytest.raises(
        DataError, match=r"1 of 2 rows have no 'sold_on' \(time\); leave them out in features\.sql"
    ):
        check_feature_table(rows, shop)


def test_a_target_that_is_known_before_its_time_is_refused(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    spec = built({**shop_attributes, "known_at": "told_on"})
    told_early = ROW.replace(
        "date'2020-01-01'", "date'2020-01-01' - INTERVAL 1 DAY told_on, date'2020-01-01'"
    )
    with pytest.raises(
        DataError,
        match=r"1 of 1 rows have a 'told_on' \(known_at\) before their 'sold_on' \(time\)",
    ):
        check_feature_table(build_features(spark, spec, told_early, {}), spec)


@pytest.mark.parametrize("score", ["new", "future"])
def test_no_row_is_refused(
    spark: SparkSession, shop_attributes: dict[str, Any], score: str
) -> None:
    attributes = copy.deepcopy({**shop_attributes, "scoring": {"score": score}})
    attributes["features"] = {"lags": [{"column": "amount", "periods": [1]}]}
    spec = built(attributes)
    rows = build_features(spark, spec, ROW + " WHERE false", {})
    with pytest.raises(
        DataError, match=r"features\.sql gives no row; check that the sources sales are not empty"
    ):
        check_feature_table(rows, spec)


def test_times_are_kept_to_the_millisecond(spark: SparkSession, shop: FleetSpec) -> None:
    sql = ROW.replace("date'2020-01-01'", "timestamp'2020-01-01 10:00:00.123456'")
    assert build_features(spark, shop, sql, {}).toPandas()["time"][0] == pd.Timestamp(
        "2020-01-01 10:00:00.123"
    )


def test_no_view_of_a_source_is_left_behind(spark: SparkSession, shop: FleetSpec) -> None:
    build_features(spark, shop, "SELECT * FROM sales", {"sales": spark.sql(ROW)})
    assert "sales" not in [table.name for table in spark.catalog.listTables()]


def test_dates_are_keys(spark: SparkSession, shop_attributes: dict[str, Any]) -> None:
    spec = built(shop_attributes)
    rows = build_features(
        spark, spec, ROW.replace("'a' store", "date'2021-03-04' store"), {}
    ).collect()
    assert rows[0]["row_key"] == group_id(["n", dt.date(2021, 3, 4), "2020-01-01 00:00:00"])


def test_dates_of_a_fleet_with_a_time_zone_are_its_local_days(
    spark: SparkSession, shop_attributes: dict[str, Any]
) -> None:
    days = pd.date_range("2024-03-25", "2024-04-05", freq="D")
    rows = pd.DataFrame(
        {"region": "n", "store": "a", "sold_on": days, "amount": np.arange(len(days), dtype=float)}
    ).assign(known_on=days)
    attributes = copy.deepcopy(
        {
            **shop_attributes,
            "baselines": {},
            "period": "1 day",
            "horizon": "1 day",
            "scoring": {"score": "future"},
        }
    )
    attributes["features"] = {
        "lags": [{"column": "amount", "periods": [1]}],
        "calendar": ["day_of_week", "day"],
    }
    sql = (
        "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, "
        "CAST(known_on AS DATE) AS known_on, amount FROM sales"
    )
    plain, local = (
        through_spark(spark, built({**attributes, **zone}), rows, sql)
        for zone in ({}, {"timezone": "Europe/Berlin"})
    )
    # The same days, and the same features of them, whatever the zone; only the moments differ.
    wall_clock = (
        local["time"].dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin").dt.tz_localize(None)
    )
    assert wall_clock.tolist() == plain["time"].tolist()
    assert (local["time"] != plain["time"]).all()
    columns = ["amount_lag_1", "day_of_week", "day", "is_future"]
    pd.testing.assert_frame_equal(local[columns], plain[columns])
    assert plain["is_future"].sum() == 1
