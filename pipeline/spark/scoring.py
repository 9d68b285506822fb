"""Batch scoring on Spark: the pack travels to every worker, which opens it once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.models.meta_model import FleetModel, answer_columns, index_digest, read_index
from pipeline.spark.features import newest_time
from pipeline.spark.keys import finite, moment_column
from pipeline.spark.training import keep_imports, visible_rows
from pipeline.spec import FleetSpec

PLOTTED_ROWS = 20_000
# Rows are answered so many at once, or those of so many bytes: a group's models are asked once for all of its rows among them.
ROWS_AT_ONCE, BYTES_AT_ONCE = 50_000, 64 << 20
_ARROW_TYPES = {"double": pa.float64(), "string": pa.string(), "array<double>": pa.list_(pa.float64())}
# Of this process, which on a worker is one of Spark's and runs many tasks; by digest, and one at most.
_opened: dict[str, FleetModel] = {}


def opened_model(name: str, digest: str, options: Mapping[str, str]) -> FleetModel:
    """A pack that has been sent to this worker, opened once in this process; the one that was open before goes.

    A function of the module: what a nested one refers to travels with every task, and a cache in it would always be empty.

    Args:
        name: of its folder.
        digest: of its index.
        options: of the object store that a shared pack is in.
    """
    if digest not in _opened:
        _opened.clear()
        _opened[digest] = FleetModel(SparkFiles.get(name), digest=digest, options=options)
    return _opened[digest]


def rows_to_score(features: DataFrame, spec: FleetSpec, as_of: pd.Timestamp) -> DataFrame:
    """The rows a launch answers.

    `new`: rows of the data with a time after the as-of; `future`: those of the horizon after the newest visible time.
    """
    if spec.scoring.score == "new":
        return features.where((sf.col("time") > moment_column(as_of)) & ~sf.col("is_future"))
    newest = newest_time(visible_rows(features, as_of))
    if newest is None:
        return features.limit(0)
    end = spec.horizon_period.add(newest)
    return features.where((sf.col("time") > moment_column(newest)) & (sf.col("time") <= moment_column(end)))


def score_rows(spark: SparkSession, rows: DataFrame, spec: FleetSpec, pack: Path, as_of: pd.Timestamp, options: Mapping[str, str]) -> DataFrame:
    """Answer every row; no shuffle.

    Args:
        spark: the session.
        rows: as from `rows_to_score`.
        spec: the fleet.
        pack: local folder of the champion's pack, under a name of its own.
        as_of: the launch's.
        options: of the object store that a shared pack is in.

    Returns:
        One row per row: the columns of `tables.PREDICTIONS` and the fleet's keys.
    """
    spark.sparkContext.addFile(str(pack), recursive=True)
    name, digest, stored = pack.name, index_digest(read_index(pack)), dict(options)

    def answer(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        keep_imports()
        model = opened_model(name, digest, stored)
        for part in gathered(batches):
            answers = pa.Table.from_pandas(model.predict(in_pandas(part, texts)), schema=given, preserve_index=False)
            both = pa.Table.from_arrays([*part.select(kept).columns, *answers.columns], names=[*kept, *given.names])
            yield from both.combine_chunks().to_batches()

    kept = list(dict.fromkeys(["row_key", "time", *spec.key_columns]))
    needed = dict.fromkeys([*kept, *spec.feature_columns, *(name_ for name_ in (spec.target.offset, spec.target.scale) if name_)])
    narrow = rows.select(*(f"`{column}`" for column in needed))
    types = {field.name: field.dataType.simpleString() for field in narrow.schema}
    schema = ", ".join(
        [*(f"`{column}` {types[column]}" for column in kept), *(f"{column} {kind}" for column, kind in answer_columns(spec.task).items())]
    )
    given = pa.schema([(column, _ARROW_TYPES[kind]) for column, kind in answer_columns(spec.task).items()])
    texts = [*spec.finest, *spec.features.categoricals]
    answered = narrow.mapInArrow(answer, schema)
    return answered.withColumn("as_of", sf.lit(as_of.isoformat())).withColumn("scored_at", sf.current_timestamp())


def gathered(batches: Iterable[pa.RecordBatch], n_rows: int = ROWS_AT_ONCE, n_bytes: int = BYTES_AT_ONCE) -> Iterator[pa.Table]:
    """Batches put together until they have so many rows or bytes; none is divided, and their order stays."""
    waiting: list[pa.RecordBatch] = []
    rows_waiting = bytes_waiting = 0
    for batch in batches:
        waiting.append(batch)
        rows_waiting, bytes_waiting = rows_waiting + batch.num_rows, bytes_waiting + batch.nbytes
        if rows_waiting >= n_rows or bytes_waiting >= n_bytes:
            yield pa.Table.from_batches(waiting)
            waiting, rows_waiting, bytes_waiting = [], 0, 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def in_pandas(rows: pa.Table, texts: Sequence[str]) -> pd.DataFrame:
    """Rows as the meta model takes them: times in UTC without a zone; null makes no float of a whole number that is a key or a category.

    Args:
        rows: of Spark.
        texts: columns that are read as text.
    """
    for position, field in enumerate(rows.schema):
        if pa.types.is_timestamp(field.type) and field.type.tz:
            rows = rows.set_column(position, field.name, rows.column(position).cast(pa.timestamp("us")))
    frame: pd.DataFrame = rows.to_pandas()
    for name in texts:
        if pa.types.is_integer(rows.schema.field(name).type) and rows[name].null_count:
            frame[name] = rows[name].to_pandas(integer_object_nulls=True)
    return frame


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


def count_answers(predictions: DataFrame, as_of: pd.Timestamp) -> AnswerCounts:
    """Count the answers of one as-of, as they stand in the table."""
    answers = predictions.where(sf.col("as_of") == as_of.isoformat())
    is_text = dict(answers.dtypes)["prediction"] == "string"
    answer = sf.col("prediction") if is_text else finite(sf.col("prediction"))
    per_grain = answers.groupBy("answered_by").agg(sf.count("*").alias("n"), sf.sum(answer.isNull().cast("long")).alias("n_missing"))
    found = sorted(per_grain.collect(), key=lambda row: (-row["n"], row["answered_by"]))
    # By key alone: a row may have been answered twice by different grains.
    n_doubled = answers.groupBy("row_key").count().where("count > 1").count()
    sample = [row[0] for row in answers.select("prediction").where("prediction IS NOT NULL").limit(PLOTTED_ROWS).collect()]
    return AnswerCounts(
        n_rows=sum(row["n"] for row in found),
        n_missing=sum(row["n_missing"] for row in found),
        n_doubled=n_doubled,
        answered_by={row["answered_by"]: int(row["n"]) for row in found},
        sample=sample,
    )
