"""Answers on Spark: the pack travels to every worker, which opens it once.

Rows are answered in Arrow batches, without a shuffle.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from pipeline.models.meta_model import FleetModel
from pipeline.reading.files import ColumnTypes
from pipeline.scoring.row_source import (
    SCORED_AT,
    SCORED_PERIOD,
    RowSource,
    answer_schema,
    text_columns,
)
from pipeline.spark.archives import share_pack
from pipeline.spark.execution import keep_imports
from pipeline.spark.files import Batches, nullable, rows_reader
from pipeline.spark.keys import quoted

# Limits of the rows that are answered at once: each group's models are asked once for all of its
# rows among them.
ROWS_AT_ONCE, BYTES_AT_ONCE = 50_000, 64 << 20
# With more tasks, starting them costs more than sharing out the work saves.
MAX_TASKS = 1_000
# Of this Python worker: per fleet the name of the pack that it answers from, and its model.
packs_of_worker: dict[str, tuple[str, FleetModel]] = {}


def answer_rows(
    spark: SparkSession,
    rows: DataFrame,
    model: FleetModel,
    options: Mapping[str, str],
    *,
    kept: Sequence[str] | None = None,
    interval: float | None = None,
) -> DataFrame:
    """Answer rows of any table that has the model's columns.

    Args:
        spark: the session.
        rows: with the model's columns, in any order and of any widths.
        model: opened from a local folder under a name of its own.
        options: of the object store that a shared pack is in.
        kept: columns of the rows that stay beside the answers, untouched; by default all.
        interval: level of lower and upper; by default the version's.

    Returns:
        One row per row: the columns kept, then those of `meta_model.answer_columns`.
    """
    name = share_pack(spark.sparkContext, model.folder)
    fleet = model.fleet
    storage_options = dict(options)
    answers = answer_schema(model.task)
    if kept is None:
        kept = rows.columns
    staying = list(kept)

    def answer(batches: Batches) -> Batches:
        keep_imports()
        opened = opened_pack(fleet, name, storage_options)
        for part in gather_batches(batches):
            yield from _answer_part(part, opened, staying, answers, interval)

    columns = nullable(rows.select(*quoted(staying)).schema)
    return rows.mapInArrow(answer, StructType([*columns, *from_arrow_schema(answers)]))


def opened_pack(fleet: str, name: str, options: Mapping[str, str]) -> FleetModel:
    """The pack of that name in this worker, opened once; the fleet's earlier one is closed.

    Tasks must call it as a function of this module: Spark copies for each task whatever a task's
    own function refers to.
    """
    if fleet not in packs_of_worker or packs_of_worker[fleet][0] != name:
        packs_of_worker.pop(fleet, None)
        packs_of_worker[fleet] = name, FleetModel(SparkFiles.get(name), options=options)
    return packs_of_worker[fleet][1]


def gather_batches(
    batches: Iterable[pa.RecordBatch], n_rows: int = ROWS_AT_ONCE, n_bytes: int = BYTES_AT_ONCE
) -> Iterator[pa.Table]:
    """Combine batches, in their order, until they reach a number of rows or of bytes.

    No batch is divided.
    """
    waiting: list[pa.RecordBatch] = []
    rows_waiting = bytes_waiting = 0
    for batch in batches:
        waiting.append(batch)
        rows_waiting += batch.num_rows
        bytes_waiting += batch.nbytes
        if rows_waiting >= n_rows or bytes_waiting >= n_bytes:
            yield pa.Table.from_batches(waiting)
            waiting = []
            rows_waiting = bytes_waiting = 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def _answer_part(
    rows: pa.Table,
    model: FleetModel,
    kept: Sequence[str],
    answers: pa.Schema,
    interval: float | None,
) -> list[pa.RecordBatch]:
    """The rows' columns kept, and beside them the answers."""
    predicted = model.predict(asked_rows(rows, model), interval=interval)
    answered = pa.Table.from_pandas(predicted, schema=answers, preserve_index=False)
    both = pa.Table.from_arrays(
        [*rows.select(kept).columns, *answered.columns], names=[*kept, *answers.names]
    )
    batches: list[pa.RecordBatch] = both.combine_chunks().to_batches()
    return batches


def asked_rows(rows: pa.Table, model: FleetModel) -> pd.DataFrame:
    """Rows as the model takes them: integer keys as text, and decimals as floats.

    In pandas, integers beside nulls would be rounded.
    """
    text = text_columns(model)
    optional = [name for name in model.optional if name in rows.column_names]
    columns = {}
    for name in (*model.required, *optional):
        column = rows.column(name)
        if name in text and pa.types.is_integer(column.type):
            column = column.cast(pa.string())
        elif name not in text and pa.types.is_decimal(column.type):
            column = column.cast(pa.float64())
        columns[name] = column
    frame: pd.DataFrame = pa.Table.from_pydict(columns).to_pandas()
    return frame


def score_source(
    spark: SparkSession,
    source: RowSource,
    model: FleetModel,
    column_types: ColumnTypes,
    period: str,
    options: Mapping[str, str],
) -> DataFrame:
    """Answer all rows of a source, which tasks read one file at a time.

    Args:
        spark: the session.
        source: as from `row_source.find_source`.
        model: that answers.
        column_types: as the source was found with.
        period: name of the rows, for the column `SCORED_PERIOD`.
        options: of the object store.

    Returns:
        One row per row: the source's columns, the answers, when it was answered, and the period.
    """
    rows = _rows_of(spark, source, column_types, options)
    answers = answer_rows(spark, rows, model, options)
    return answers.withColumn(SCORED_AT, sf.current_timestamp()).withColumn(
        SCORED_PERIOD, sf.lit(period)
    )


def _rows_of(
    spark: SparkSession,
    source: RowSource,
    column_types: ColumnTypes,
    options: Mapping[str, str],
) -> DataFrame:
    """The rows of a source's files."""
    shape = from_arrow_schema(source.schema)
    if not source.files:
        return spark.createDataFrame([], shape)
    files = list(source.files)
    read_file = rows_reader(shape, source.address, options, column_types)

    def read(batches: Batches) -> Batches:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from read_file(files[number])

    return spark.range(0, len(files), 1, min(len(files), MAX_TASKS)).mapInArrow(read, shape)
