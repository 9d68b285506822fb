"""Building a feature table on Spark: SQL, future rows, features of the past, derived columns."""

from collections.abc import Iterator, Mapping, Sequence

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
from pipeline.spark.keys import group_id_column, latest_moment, moment_of, text_column
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
    rows = _selected(spark, spec, sql, raw)
    _check_types(spec, rows)
    rows = _with_last_days(spec, _canonical(spec, rows))
    if spec.scoring.score == "future":
        rows = rows.unionByName(_future_rows(spec, rows), allowMissingColumns=True)
    for features in plan_passes(spec):
        rows = _with_history(rows, spec, features)
    rows = _with_derived(spark, rows.drop(ON_LAST_DAYS), spec)
    keys = [f"`{key}`" for key in spec.finest]
    return (rows.repartition(*keys) if keys else rows).sortWithinPartitions(*keys, "time")


def _selected(
    spark: SparkSession, spec: FleetSpec, sql: str, raw: Mapping[str, DataFrame]
) -> DataFrame:
    rows = select_rows(spark, sql, raw, file=spec.features.sql, functions=spec.sql.functions)
    there = {name.lower() for name in rows.columns}
    for name, field in spec.sql_columns.items():
        if name.lower() not in there:
            raise SpecError(
                f"{field}: {spec.features.sql} gives no column {name!r}; it gives: "
                f"{', '.join(rows.columns)}"
            )
    return rows.select(*(sf.col(f"`{name}`").alias(name) for name in spec.sql_columns))


def _check_types(spec: FleetSpec, rows: DataFrame) -> None:
    types = {field.name: field.dataType for field in rows.schema}
    for key in spec.key_columns:
        if not isinstance(types[key], _KEY_TYPES):
            raise DataError(
                f"key {key!r} is {types[key].simpleString()}; expected text, a whole number, a "
                f"boolean or a date: cast it in {spec.features.sql}"
            )
    for name in filter(None, (spec.time, spec.known_at)):
        if not isinstance(types[name], st.DateType | st.TimestampType | st.TimestampNTZType):
            raise DataError(
                f"{name!r} is {types[name].simpleString()}; expected a date or timestamp: cast it "
                f"in {spec.features.sql}"
            )
    if spec.is_class_task:
        if not isinstance(
            types[spec.target.column], st.StringType | st.IntegralType | st.BooleanType
        ):
            raise DataError(
                f"target {spec.target.column!r} is {types[spec.target.column].simpleString()}; "
                "expected text, a boolean or a whole number "
                f"for task {spec.task!r}: cast it in {spec.features.sql}"
            )
    elif not isinstance(types[spec.target.column], st.NumericType):
        raise DataError(_not_a_number(spec, rows, types[spec.target.column].simpleString()))
    _check_feature_types(spec, types)


def _check_feature_types(spec: FleetSpec, types: Mapping[str, st.DataType]) -> None:
    for name in spec.features.categoricals:
        if not isinstance(types[name], _CATEGORY_TYPES):
            raise DataError(
                f"categorical {name!r} is {types[name].simpleString()}; expected text, a number, a "
                "boolean, a date or a timestamp: "
                f"cast it in {spec.features.sql}"
            )
    no_numbers = {*spec.key_columns, spec.time, spec.known_at, *_text_columns(spec)}
    numeric = [name for name in spec.sql_columns if name not in no_numbers]
    for name in numeric:
        if not isinstance(types[name], st.NumericType | st.BooleanType):
            raise DataError(
                f"feature {name!r} is {types[name].simpleString()}; expected a number: cast it, or "
                "list it under features.categoricals"
            )


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
        shown = ", ".join(repr(value) for value in values[:3])
        return f"{message}; to predict its {len(values)} values ({shown} ...), set task: multiclass"
    return message


def _text_columns(spec: FleetSpec) -> set[str]:
    """Text columns of the feature table: categoricals, classes, baselines that name a class."""
    classes = [spec.target.column] if spec.is_class_task else []
    return {
        *spec.features.categoricals,
        *classes,
        *(spec.baselines.values() if spec.task == MULTICLASS else []),
    }


def _canonical(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """Time columns under their canonical names, numbers as double, and the row key."""
    # Milliseconds are the resolution of time, so that every window has an exact start.
    types = {field.name: field.dataType for field in rows.schema}
    time = sf.date_trunc("millisecond", _moment(spec, spec.time, types))
    known_at = (
        sf.date_trunc("millisecond", _moment(spec, spec.known_at, types)) if spec.known_at else time
    )
    kept = []
    for name in spec.sql_columns:
        column = sf.col(f"`{name}`")
        if name in (spec.time, spec.known_at) and name not in spec.key_columns:
            continue
        if name in spec.key_columns:
            kept.append(column.alias(name))
        elif name in _text_columns(spec):
            kept.append(text_column(column, types[name]).alias(name))
        else:
            kept.append(column.cast("double").alias(name))
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


def _shown(spec: FleetSpec, time: str = "time") -> Column:
    """What the clocks of the fleet's time zone show."""
    return sf.col(time) if spec.timezone is None else sf.from_utc_timestamp(time, spec.timezone)


def _with_last_days(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """Mark the rows of series that always lie on last days of months.

    Only where the period is a calendar one.

    Such a series goes from 28 February to 31 March. Taken as the 28th of each month, its last row
    would not be known a month before its next.
    """
    if not spec.has_calendar_period:
        return rows
    is_last = sf.coalesce(sf.last_day(_shown(spec)) == sf.to_date(_shown(spec)), sf.lit(False))
    series = Window.partitionBy(*(f"`{key}`" for key in spec.entity))
    return rows.withColumn(ON_LAST_DAYS, sf.min(is_last).over(series))


def _future_rows(spec: FleetSpec, rows: DataFrame) -> DataFrame:
    """The rows of the horizon after the newest time of the fleet, for every entity."""
    newest = newest_time(rows)
    if newest is None:
        return rows.limit(0)
    period = spec.step
    end = spec.horizon_end(newest)
    marks = [ON_LAST_DAYS] if ON_LAST_DAYS in rows.columns else []
    others = [*(key for key in spec.key_columns if key not in spec.entity), *marks]
    entities = rows.groupBy(*(f"`{key}`" for key in spec.entity)).agg(
        *(sf.max_by(f"`{name}`", "time").alias(name) for name in others),
        sf.max("time").alias("time"),
    )

    def in_the_horizon(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            newest_of_entity = times_of(batch.column("time"))
            places, times = future_times(period, newest, end, newest_of_entity, flags_of(batch))
            made_up = batch.take(pa.array(places))
            at = batch.schema.get_field_index("time")
            yield made_up.set_column(
                at, batch.schema.field(at), pa.array(times).cast(batch.schema.field(at).type)
            )

    made_up = entities.mapInArrow(in_the_horizon, entities.schema)
    made_up = made_up.withColumn("known_at", sf.col("time")).withColumn("is_future", sf.lit(True))
    return made_up.withColumn("row_key", group_id_column([*spec.entity, "time"]))


def _with_history(rows: DataFrame, spec: FleetSpec, features: HistoryPass) -> DataFrame:
    before = to_arrow_schema(rows.schema, timezone="UTC")
    empty = add_history(before.empty_table(), spec, features)
    after = from_arrow_schema(empty.schema)

    def compute(table: pa.Table) -> pa.Table:
        return add_history(table, spec, features)

    return rows.groupBy(*(f"`{key}`" for key in features.keys)).applyInArrow(compute, after)


def _with_derived(spark: SparkSession, rows: DataFrame, spec: FleetSpec) -> DataFrame:
    for part in spec.features.calendar:
        rows = rows.withColumn(part, _CALENDAR[part](_shown(spec)).cast("double"))
    for name, tree in parse_derived(spec).items():
        where, text = f"features.derived.{name}", spec.features.derived[name]
        column = derived_column(spark, text, tree, where=where, functions=spec.sql.functions)
        try:
            rows = rows.withColumn(name, column.cast("double"))
        except AnalysisException as error:
            raise SpecError(f"{where}: {text!r}: {error.getMessage() or error}") from error
    return rows


def check_feature_table(rows: DataFrame, spec: FleetSpec) -> dict[str, int]:
    """Enforce the contract on files that are written but not committed; runs one Spark job.

    Returns:
        Counts: n_rows, n_targets, n_future.

    Raises:
        DataError: if there are no rows, a time is null, or an entity key is listed twice, with
            examples.
    """
    target = sf.col(f"`{spec.target.column}`")
    per_key = rows.groupBy("row_key").agg(
        sf.count("*").alias("n"),
        sf.sum(sf.col("time").isNull().cast("long")).alias("n_timeless"),
        sf.sum((sf.col("known_at") < sf.col("time")).cast("long")).alias("n_early"),
        sf.sum(target.isNotNull().cast("long")).alias("n_targets"),
        sf.sum(sf.col("is_future").cast("long")).alias("n_future"),
    )
    counts = per_key.agg(
        *(
            sf.coalesce(sf.sum(name), sf.lit(0)).alias(name)
            for name in ("n", "n_timeless", "n_early", "n_targets", "n_future")
        ),
        sf.coalesce(sf.sum((sf.col("n") > 1).cast("long")), sf.lit(0)).alias("n_doubled"),
    ).collect()[0]
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
        examples = [
            row["row_key"] for row in per_key.where("n > 1").orderBy("row_key").limit(5).collect()
        ]
        raise DataError(
            f"{counts['n_doubled']} entity keys occur more than once, e.g. "
            f"{'  '.join(examples)}; "
            f"entity {list(spec.entity)} and {spec.time!r} must identify a row: add a column to "
            f"entity, or deduplicate in {where}"
        )
    return {
        "n_rows": int(counts["n"]),
        "n_targets": int(counts["n_targets"]),
        "n_future": int(counts["n_future"]),
    }


def newest_known(features: DataFrame, target: str) -> pd.Timestamp:
    """Latest known_at of a row that has a target: the as-of of a launch that names none.

    Rows that wait for their answer may be known long after the last outcome, and must not move it.
    Where no row has a target, every row counts but the made-up ones, of which there is always
    another.

    Args:
        features: the feature table.
        target: its target column.
    """
    known_at = sf.col("known_at")
    has_target = sf.col(f"`{target}`").isNotNull()
    learnable = latest_moment(sf.when(has_target, known_at))
    row = features.where("NOT is_future").agg(learnable, latest_moment(known_at)).collect()[0]
    return moment_of(row[1] if row[0] is None else row[0])


def newest_time(rows: DataFrame, target: str | None = None) -> pd.Timestamp | None:
    """Latest time of visible rows; None if there are none.

    Args:
        rows: the visible rows.
        target: where given, rows that have one decide, unless none has.
    """
    latest = latest_moment(sf.col("time"))
    learnable = (
        latest
        if target is None
        else latest_moment(sf.when(sf.col(f"`{target}`").isNotNull(), sf.col("time")))
    )
    row = rows.agg(learnable, latest).collect()[0]
    newest = row[1] if row[0] is None else row[0]
    return None if newest is None else moment_of(newest)


def all_null_columns(rows: DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns that are null in every row; one Spark job."""
    counts = rows.agg(*(sf.count(f"`{name}`").alias(name) for name in columns)).collect()[0]
    return [name for name in columns if counts[name] == 0]


def rows_of_some_entities(
    rows: DataFrame, spec: FleetSpec, columns: Sequence[str], n_rows: int, n_wanted: int = 50_000
) -> pa.Table:
    """All rows of some entities, chosen by hash: about so many rows, at least one entity's.

    Args:
        rows: a feature table.
        spec: the fleet.
        columns: that are wanted.
        n_rows: of the table.
        n_wanted: rows; fewer are all taken.
    """
    n_shares = -(-n_rows // n_wanted)
    if n_shares > 1:
        share = sf.pmod(sf.xxhash64(*(f"`{key}`" for key in spec.entity)), sf.lit(n_shares))
        rows = rows.where(share == rows.select(share).limit(1).collect()[0][0])
    table: pa.Table = rows.select(*(f"`{name}`" for name in columns)).toArrow()
    return table
