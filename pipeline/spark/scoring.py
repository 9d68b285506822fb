"""The rows that a launch answers, and counts of the answers."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.errors import SpecError
from pipeline.models.meta_model import FleetModel, check_listed_once
from pipeline.spark.answers import answer_rows
from pipeline.spark.features import newest_time
from pipeline.spark.keys import finite, moment_column, quoted
from pipeline.spark.rows import visible_rows
from pipeline.spec import FleetSpec

PLOTTED_ROWS = 20_000


def rows_to_score(features: DataFrame, spec: FleetSpec, as_of: pd.Timestamp) -> DataFrame:
    """The rows a launch answers.

    For `new`, the data's rows with a time after the as-of; for `future`, the rows of the horizon
    after the newest visible time.
    """
    if spec.scoring.score == "new":
        return features.where((sf.col("time") > moment_column(as_of)) & ~sf.col("is_future"))
    newest = newest_time(visible_rows(features, as_of))
    if newest is None:
        return features.limit(0)
    end = spec.horizon_end(newest)
    return features.where(
        (sf.col("time") > moment_column(newest)) & (sf.col("time") <= moment_column(end))
    )


def score_rows(
    spark: SparkSession,
    rows: DataFrame,
    spec: FleetSpec,
    model: FleetModel,
    as_of: pd.Timestamp,
    options: Mapping[str, str],
) -> DataFrame:
    """Answer every row; no shuffle.

    Args:
        spark: the session.
        rows: as from `rows_to_score`.
        spec: the fleet.
        model: the champion's, opened from a local folder under a name of its own.
        as_of: the launch's.
        options: of the object store that a shared pack is in.

    Returns:
        One row per row: the columns of `tables.PREDICTIONS` and the fleet's keys; lower and upper
        at the spec's level.

    Raises:
        SpecError: if the version has no intervals of that level.
        InputError: if a column that is read is listed twice.
    """
    kept = list(dict.fromkeys(["row_key", "time", *spec.key_columns]))
    needed = [*kept, *model.required, *model.optional]
    check_listed_once(rows.columns, set(needed))
    # The version may have been trained when the spec listed other columns.
    available = {*kept, *rows.columns}
    read = [column for column in dict.fromkeys(needed) if column in available]
    answered = answer_rows(
        spark,
        rows.select(*quoted(read)),
        model,
        options,
        kept=kept,
        interval=_level_of(model, spec),
    )
    return answered.withColumn("as_of", sf.lit(as_of.isoformat())).withColumn(
        "scored_at", sf.current_timestamp()
    )


def _level_of(model: FleetModel, spec: FleetSpec) -> float | None:
    """The level that the spec asks for now; None for a version without intervals.

    The version may have been trained when the spec asked for other levels.
    """
    if not model.intervals:
        return None
    if spec.scoring.interval not in model.intervals:
        raise SpecError(
            f"scoring.interval: {spec.scoring.interval!r} is not a level of the version that "
            f"serves ({model.fleet_version}), which has intervals of "
            f"{', '.join(map(repr, model.intervals))}; choose one of them, or materialise models, "
            "meta_model and champion again"
        )
    return spec.scoring.interval


@dataclass(frozen=True)
class AnswerCounts:
    """What a scoring run wrote.

    Args:
        n_rows: answers.
        n_missing: answers without a finite prediction or, for multiclass, without a class.
        n_doubled: row keys answered more than once.
        answered_by: rows per grain that answered, most first.
        sample: some predictions, for a plot.
    """

    n_rows: int
    n_missing: int
    n_doubled: int
    answered_by: dict[str, int]
    sample: list[float] | list[str]


def count_answers(written: DataFrame, as_of: pd.Timestamp) -> AnswerCounts:
    """Count the answers of one as-of, as they stand in the table."""
    answers = written.where(sf.col("as_of") == as_of.isoformat())
    answer = sf.col("prediction")
    if dict(answers.dtypes)["prediction"] != "string":
        answer = finite(answer)
    per_grain = answers.groupBy("answered_by").agg(
        sf.count("*").alias("n"), sf.sum(answer.isNull().cast("long")).alias("n_missing")
    )
    counts = sorted(per_grain.collect(), key=lambda row: (-row["n"], row["answered_by"]))
    answered_by = {row["answered_by"]: int(row["n"]) for row in counts}
    # By key alone: a row may have been answered twice by different grains.
    n_doubled = answers.groupBy("row_key").count().where("count > 1").count()
    predictions = answers.select("prediction").where("prediction IS NOT NULL").limit(PLOTTED_ROWS)
    return AnswerCounts(
        n_rows=sum(answered_by.values()),
        n_missing=sum(row["n_missing"] for row in counts),
        n_doubled=n_doubled,
        answered_by=answered_by,
        sample=[row["prediction"] for row in predictions.collect()],
    )
