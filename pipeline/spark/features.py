"""Building a feature table on Spark: SQL, future rows, features of the past, derived columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as sf
from pyspark.sql import types as st
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from pipeline.errors import DataError, SpecError
from pipeline.features.future import future_times
from pipeline.features.history import (
    ON_LAST_DAYS,
    HistoryPass,
    add_history,
    flags_of,
    plan_passes,
    times_of,
)
from pipeline.features.sql import parse_derived
from pipeline.spark.keys import group_id_column, latest_moment, moment_of, quoted, text_column
from pipeline.spark.sql_plans import derived_column, select_rows
from pipeline.spec import MAX_CLASSES, MULTICLASS, FleetSpec

_CALENDAR = {
    "year": sf.year,
    "quarter": sf.quarter,
    "month": sf.month,
    "week": sf.weekofyear,
    "day_of_year": sf.dayofyear,
    "day": sf.dayofmonth,
    "day_of_week": sf.weekday,
    "hour": sf.hour,
    "minute": sf.minute,
}
_KEY_TYPES = (st.StringType, st.IntegralType, st.BooleanType, st.DateType)
_CATEGORY_TYPES = (*_KEY_TYPES, st.FractionalType, st.TimestampType, st.TimestampNTZType)


def build_features(
    spark: SparkSession, spec: FleetSpec, sql: str, raw: Mapping[str, DataFrame]
) -> DataFrame:
    """The feature table of a fleet, not yet written.

    Args:
        spark: the session.
        spec: the fleet.
        sql: the text of its SQL file; what runs is rendered from the checked statement.
        raw: the raw tables by source name.

    Returns:
        One row per entity and time, with the columns of `tables.FEATURES`, keys, target, and every
        feature; numbers as double, categoricals and classes as text. Ordered by the finest grain
        and time within each partition.

    Raises:
        SpecError: if Spark cannot make sense of the SQL or a derived column.
        DataError: if a key, the time or the target has a type that cannot serve.
    """
    rows = _select_columns(spark, spec, sql, raw)
    _check_types(spec, rows)
    rows = _with_last_days(spec, _canonical(spec, rows))
    if spec.scoring.score == "future":
        rows = rows.unionByName(_future_rows(spec, rows), allowMissingColumns=True)
    for features in plan_passes(spec):
        rows = _with_history(rows, spec, features)
    rows = _with_derived(spark, rows.drop(ON_LAST_DAYS), spec)
    keys = quoted(spec.finest)
    if keys:
        rows = rows.repartition(*keys)
    return rows.sortWithinPartitions(*keys, "time")


def _select_columns(
    spark: SparkSession, spec: FleetSpec, sql: str, raw: Mapping[str, DataFrame]
) -> DataFrame:
    """The rows of the fleet's SQL, with the columns that the spec names."""
    rows = select_rows(spark, sql, raw, file=spec.features.sql, functions=spec.sql.functions)
    available = set(map(str.lower, rows.columns))
    columns = []
    for name, field in spec.sql_columns.items():
        if name.lower() not in available:
            raise SpecError(
                f"{field}: {spec.features.sql} gives no column {name!r}; it gives: "
                f"{', '.join(rows.columns)}"
            )
        columns.append(sf.col(f"`{name}`").alias(name))
    return rows.select(*columns)


def _types_of(rows: DataFrame) -> dict[str, st.DataType]:
    return {field.name: field.dataType for field in rows.schema}


def _check_types(spec: FleetSpec, rows: DataFrame) -> None:
    """Refuse columns of a type that cannot serve."""
    types = _types_of(rows)
    remedy = f"cast it in {spec.features.sql}"
    for key in spec.key_columns:
        if not isinstance(types[key], _KEY_TYPES):
            expected = "text, a whole number, a boolean or a date"
            raise _wrong_type(f"key {key!r}", types[key], expected, remedy)
    for name in filter(None, (spec.time, spec.known_at)):
        if not isinstance(types[name], st.DateType | st.TimestampType | st.TimestampNTZType):
            raise _wrong_type(repr(name), types[name], "a date or timestamp", remedy)
    target = spec.target.column
    if spec.is_class_task:
        if not isinstance(types[target], st.StringType | st.IntegralType | st.BooleanType):
            expected = f"text, a boolean or a whole number for task {spec.task!r}"
            raise _wrong_type(f"target {target!r}", types[target], expected, remedy)
    elif not isinstance(types[target], st.NumericType):
        raise DataError(_not_a_number(spec, rows, types[target].simpleString()))
    _check_feature_types(spec, types)


def _check_feature_types(spec: FleetSpec, types: Mapping[str, st.DataType]) -> None:
    for name in spec.features.categoricals:
        if not isinstance(types[name], _CATEGORY_TYPES):
            expected = "text, a number, a boolean, a date or a timestamp"
            remedy = f"cast it in {spec.features.sql}"
            raise _wrong_type(f"categorical {name!r}", types[name], expected, remedy)
    not_numeric = {*spec.key_columns, spec.time, spec.known_at, *_text_columns(spec)}
    for name in spec.sql_columns:
        is_number = isinstance(types[name], st.NumericType | st.BooleanType)
        if name not in not_numeric and not is_number:
            remedy = "cast it, or list it under features.categoricals"
            raise _wrong_type(f"feature {name!r}", types[name], "a number", remedy)


def _wrong_type(column: str, kind: st.DataType, expected: str, remedy: str) -> DataError:
    return DataError(f"{column} is {kind.simpleString()}; expected {expected}: {remedy}")


def _not_a_number(spec: FleetSpec, rows: DataFrame, kind: str) -> str:
    """What to do about a target that is not a number; one Spark job looks at its values."""
    target = spec.target.column
    distinct = rows.select(sf.col(f"`{target}`").cast("string")).dropna().distinct()
    values = sorted(row[0] for row in distinct.limit(MAX_CLASSES + 1).collect())
    message = f"target {target!r} is {kind}; expected a number: cast it in {spec.features.sql}, "
    message += "or name in the source's null_values the texts that mean null"
    if len(values) == 2:  # noqa: PLR2004
        return (
            f"{message}; it has two values, {values[0]!r} and {values[1]!r}: "
            "to predict them, set task: binary"
        )
    if 2 < len(values) <= MAX_CLASSES:  # noqa: PLR2004
        first = ", ".join(map(repr, values[:3]))
        return f"{message}; to predict its {len(values)} values ({first} ...), set task: multiclass"
    return message


def _text_columns(spec: FleetSpec) -> set[str]:
    """Text columns of the feature table: categoricals, classes, baselines that name a class."""
    columns = set(spec.features.categoricals)
    if spec.is_class_task:
        columns.add(spec.target.column)
    if spec.task == MULTICLASS:
        columns.update(spec.baselines.values())
    return columns


def _canonical(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """Time columns under their canonical names, numbers as double, and the row key."""
    types = _types_of(rows)
    # Milliseconds are the resolution of time, so that every window has an exact start.
    time = sf.date_trunc("millisecond", _moment(spec, spec.time, types))
    known_at = time
    if spec.known_at:
        known_at = sf.date_trunc("millisecond", _moment(spec, spec.known_at, types))
    renamed = {spec.time, spec.known_at}.difference(spec.key_columns)
    text_columns = _text_columns(spec)
    kept = []
    for name in spec.sql_columns:
        if name in renamed:
            continue
        column = sf.col(f"`{name}`")
        if name in text_columns and name not in spec.key_columns:
            column = text_column(column, types[name])
        elif name not in spec.key_columns:
            column = column.cast("double")
        kept.append(column.alias(name))
    rows = rows.select(
        *kept,
        time.alias("time"),
        sf.coalesce(known_at, time).alias("known_at"),
        sf.lit(False).alias("is_future"),
    )
    return rows.withColumn("row_key", group_id_column([*spec.entity, "time"]))


def _moment(spec: FleetSpec, name: str, types: Mapping[str, st.DataType]) -> Column:
    """A column of times as moments.

    Where the fleet has a time zone, dates and times without a zone are its local times.
    """
    moment = sf.col(f"`{name}`").cast("timestamp")
    if spec.timezone is None or isinstance(types[name], st.TimestampType):
        return moment
    return sf.to_utc_timestamp(moment, spec.timezone)


def _local_time(spec: FleetSpec) -> Column:
    """A row's time as clocks in the fleet's time zone show it."""
    if spec.timezone is None:
        return sf.col("time")
    return sf.from_utc_timestamp("time", spec.timezone)


def _with_last_days(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """Mark the rows of series that have all their rows on last days of months.

    Such a series goes from 28 February to 31 March. Taken as the 28th of each month, its last row
    would not be known a month before its next. Only calendar periods need the mark.
    """
    if not spec.has_calendar_period:
        return rows
    time = _local_time(spec)
    is_last = sf.coalesce(sf.last_day(time) == sf.to_date(time), sf.lit(False))
    series = Window.partitionBy(*quoted(spec.entity))
    return rows.withColumn(ON_LAST_DAYS, sf.min(is_last).over(series))


def _future_rows(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """The rows of the horizon after the newest time of the fleet, for every entity."""
    newest = newest_time(rows)
    if newest is None:
        return rows.limit(0)
    period = spec.step
    end = spec.horizon_end(newest)
    carried = [key for key in spec.key_columns if key not in spec.entity]
    if ON_LAST_DAYS in rows.columns:
        carried.append(ON_LAST_DAYS)
    newest_values = [sf.max_by(f"`{name}`", "time").alias(name) for name in carried]
    entities = rows.groupBy(*quoted(spec.entity)).agg(*newest_values, sf.max("time").alias("time"))

    def in_the_horizon(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            newest_of_entity = times_of(batch.column("time"))
            places, times = future_times(period, newest, end, newest_of_entity, flags_of(batch))
            at = batch.schema.get_field_index("time")
            field = batch.schema.field(at)
            entity_rows = batch.take(pa.array(places))
            yield entity_rows.set_column(at, field, pa.array(times).cast(field.type))

    future = entities.mapInArrow(in_the_horizon, entities.schema)
    future = future.withColumn("known_at", sf.col("time")).withColumn("is_future", sf.lit(True))
    return future.withColumn("row_key", group_id_column([*spec.entity, "time"]))


def _with_history(rows: DataFrame, spec: FleetSpec, features: HistoryPass) -> DataFrame:
    """The rows with lags and windows of one pass, computed series by series."""
    before = to_arrow_schema(rows.schema, timezone="UTC")
    # What it adds to no rows tells the columns.
    empty = add_history(before.empty_table(), spec, features)
    after = from_arrow_schema(empty.schema)

    def compute(table: pa.Table) -> pa.Table:
        return add_history(table, spec, features)

    return rows.groupBy(*quoted(features.keys)).applyInArrow(compute, after)


def _with_derived(spark: SparkSession, rows: DataFrame, spec: FleetSpec) -> DataFrame:
    for part in spec.features.calendar:
        rows = rows.withColumn(part, _CALENDAR[part](_local_time(spec)).cast("double"))
    for name, tree in parse_derived(spec).items():
        where = f"features.derived.{name}"
        text = spec.features.derived[name]
        column = derived_column(spark, text, tree, where=where, functions=spec.sql.functions)
        try:
            rows = rows.withColumn(name, column.cast("double"))
        except AnalysisException as error:
            raise SpecError(f"{where}: {text!r}: {error.getMessage() or error}") from error
    return rows


def check_feature_table(rows: DataFrame, spec: FleetSpec) -> dict[str, int]:
    """Enforce the contract on files that are written but not committed; one Spark job.

    Returns:
        Counts: n_rows, n_targets, n_future.

    Raises:
        DataError: if there are no rows, a time is null, a known_at lies before its time, or an
            entity key occurs more than once.
    """
    per_key = _count_per_key(rows, spec)
    counted = {name: sf.col(name) for name in per_key.columns if name != "row_key"}
    counted["n_doubled"] = (sf.col("n") > 1).cast("long")
    totals = []
    for name, count in counted.items():
        totals.append(sf.coalesce(sf.sum(count), sf.lit(0)).alias(name))
    counts = per_key.agg(*totals).collect()[0]
    where = spec.features.sql
    if counts["n"] - counts["n_future"] == 0:
        raise DataError(
            f"{where} gives no row; check that the sources "
            f"{', '.join(source.name for source in spec.sources)} are not empty and its joins match"
        )
    if counts["n_timeless"]:
        raise DataError(
            f"{counts['n_timeless']} of {counts['n']} rows have no {spec.time!r} (time); leave "
            f"them out in {where}"
        )
    if counts["n_early"]:
        raise DataError(
            f"{counts['n_early']} of {counts['n']} rows have a {spec.known_at!r} (known_at) before "
            f"their {spec.time!r} (time): "
            "a target cannot be known before it is realised, and windows would see it; correct "
            f"one of them in {where}"
        )
    if counts["n_doubled"]:
        doubled = per_key.where("n > 1").orderBy("row_key").limit(5).collect()
        examples = "  ".join(row["row_key"] for row in doubled)
        raise DataError(
            f"{counts['n_doubled']} entity keys occur more than once, e.g. {examples}; "
            f"entity {list(spec.entity)} and {spec.time!r} must identify a row: add a column to "
            f"entity, or deduplicate in {where}"
        )
    return {
        "n_rows": int(counts["n"]),
        "n_targets": int(counts["n_targets"]),
        "n_future": int(counts["n_future"]),
    }


def _count_per_key(rows: DataFrame, spec: FleetSpec) -> DataFrame:
    """One row per row key with counts of its rows: all (n), and those of each kind."""
    kinds = {
        "n_timeless": sf.col("time").isNull(),
        "n_early": sf.col("known_at") < sf.col("time"),
        "n_targets": sf.col(f"`{spec.target.column}`").isNotNull(),
        "n_future": sf.col("is_future"),
    }
    counts = [sf.sum(is_kind.cast("long")).alias(name) for name, is_kind in kinds.items()]
    return rows.groupBy("row_key").agg(sf.count("*").alias("n"), *counts)


def newest_known(features: DataFrame, target: str) -> pd.Timestamp:
    """Latest known_at of a row that has a target: the as-of of a launch that names none.

    Rows that wait for their outcome may be known long after the last outcome, and must not move it.
    Where no row has a target, all rows count but those of the horizon, which always lie later.

    Args:
        features: the feature table.
        target: its target column.
    """
    return moment_of(_newest_micros(features.where("NOT is_future"), "known_at", target))


def newest_time(rows: DataFrame, target: str | None = None) -> pd.Timestamp | None:
    """Latest time of visible rows; None if there are none.

    Args:
        rows: the visible rows.
        target: where given, only rows that have it count, unless none has.
    """
    newest = _newest_micros(rows, "time", target)
    if newest is None:
        return None
    return moment_of(newest)


def _newest_micros(rows: DataFrame, time: str, target: str | None) -> Any:
    """The latest moment of the rows with a target, or else of all, in microseconds; one Spark job.

    None where there is no moment.
    """
    newest = latest_moment(sf.col(time))
    if target is not None:
        has_target = sf.col(f"`{target}`").isNotNull()
        newest = sf.coalesce(latest_moment(sf.when(has_target, sf.col(time))), newest)
    return rows.agg(newest).collect()[0][0]


def all_null_columns(rows: DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns that are null in every row; one Spark job."""
    counts = rows.agg(*(sf.count(f"`{name}`").alias(name) for name in columns)).collect()[0]
    return [name for name in columns if counts[name] == 0]


def rows_of_some_entities(
    rows: DataFrame, spec: FleetSpec, columns: Sequence[str], n_rows: int, n_wanted: int = 50_000
) -> pa.Table:
    """All rows of some entities, chosen by hash; at least one entity's.

    Args:
        rows: a feature table.
        spec: the fleet.
        columns: to read.
        n_rows: of the table.
        n_wanted: rows to read, about; a smaller table is read as a whole.
    """
    n_shares = -(-n_rows // n_wanted)
    if n_shares > 1:
        share = sf.pmod(sf.xxhash64(*quoted(spec.entity)), sf.lit(n_shares))
        rows = rows.where(share == rows.select(share).limit(1).collect()[0][0])
    table: pa.Table = rows.select(*quoted(columns)).toArrow()
    return table
