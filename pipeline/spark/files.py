"""Parquet files between Spark and Delta: written by tasks, committed by the driver."""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructField, StructType

from pipeline.models.meta_model import filesystem_of
from pipeline.reading.files import ColumnTypes, RowFile, read_rows
from pipeline.storage import WrittenFile

Batches = Iterator[pa.RecordBatch]
FILE_COLUMNS = "path string, size long, n_rows long"
# About the size of a row group; many small ones cost more than the rows.
ROW_GROUP_BYTES = 16 << 20


class FileWriter:
    """Writes record batches to one new Parquet file below a root; without rows there is no file."""

    def __init__(self, root: str, options: Mapping[str, str], schema: pa.Schema) -> None:
        self._filesystem, self._root = filesystem_of(root, options)
        self._schema = schema
        self._path = f"part-{uuid.uuid4()}.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._n_rows = 0
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Append rows; their columns are brought into the schema's order and types."""
        if rows.num_rows == 0:
            return
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        self._waiting.append(rows.select(self._schema.names).cast(self._schema))
        self._waiting_bytes += rows.nbytes
        self._n_rows += rows.num_rows
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._filesystem.create_dir(self._root, recursive=True)
            self._writer = pq.ParquetWriter(
                f"{self._root}/{self._path}",
                self._schema,
                filesystem=self._filesystem,
                compression="zstd",
            )
        self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting = []
        self._waiting_bytes = 0

    def close(self) -> WrittenFile | None:
        """Finish the file, which can then be committed; None if no rows were written."""
        if self._waiting:
            self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        size = self._filesystem.get_file_info(f"{self._root}/{self._path}").size
        return WrittenFile(self._path, size, self._n_rows)


def write_files(
    frame: DataFrame, root: str, options: Mapping[str, str]
) -> tuple[list[WrittenFile], pa.Schema]:
    """Write a data frame's partitions below a root, each as one file, without committing them.

    Runs one Spark job.

    Returns:
        The files, and the schema they share.
    """
    schema = to_arrow_schema(frame.schema, timezone="UTC")

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        writer = FileWriter(root, options, schema)
        for batch in batches:
            writer.write(batch)
        written = writer.close()
        if written is not None:
            yield pa.RecordBatch.from_pylist([vars(written)])

    rows = frame.mapInArrow(write, FILE_COLUMNS).collect()
    return [WrittenFile(**row.asDict()) for row in rows], schema


def read_files(
    spark: SparkSession,
    root: str,
    paths: Sequence[str],
    schema: pa.Schema,
    options: Mapping[str, str],
) -> DataFrame:
    """A data frame over listed files of a table.

    Args:
        spark: the session.
        root: the table's root.
        paths: relative to the root.
        schema: columns to read; one that a file lacks is null there.
        options: storage options.
    """
    spark_schema = from_arrow_schema(schema)
    if not paths:
        return spark.createDataFrame([], spark_schema)
    if "://" not in root:
        addresses = [escaped(f"{root}/{path}") for path in paths]
        return spark.read.schema(spark_schema).parquet(*addresses)

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        filesystem, base = filesystem_of(root, options)
        for batch in batches:
            for path in batch.column(0).to_pylist():
                # Stock Spark has no connector for object stores; Arrow has.
                with pq.ParquetFile(f"{base}/{path}", filesystem=filesystem) as file:
                    for rows in file.iter_batches():
                        yield _completed(pa.Table.from_batches([rows]), schema)

    listed = spark.createDataFrame([(path,) for path in paths], "path string")
    return listed.repartition(len(paths)).mapInArrow(read, spark_schema)


def _completed(rows: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """The rows under a schema; a column that they lack is null."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(schema.names).cast(schema).combine_chunks().to_batches()[0]


def escaped(path: str) -> str:
    """A local path whose glob characters mean themselves."""
    return re.sub(r"([*?\[\]{}\\])", r"\\\1", path)


def file_json(table: str, file: WrittenFile) -> str:
    """A written file as a line for the driver."""
    return json.dumps({"table": table, **vars(file)})


def file_of_json(line: Mapping[str, Any]) -> WrittenFile:
    """The inverse of `file_json`."""
    return WrittenFile(line["path"], line["size"], line["n_rows"])


def nullable(shape: StructType) -> StructType:
    """Columns of the same names and types, any of which may be null."""
    return StructType([StructField(field.name, field.dataType) for field in shape])


def rows_reader(
    shape: StructType,
    location: str,
    options: Mapping[str, str],
    column_types: ColumnTypes,
    required: Sequence[str] = (),
) -> Callable[[RowFile], Batches]:
    """A function that reads a file's rows in a task, in the types that Spark wants.

    Args:
        shape: of the rows.
        location: address that tells the file system.
        options: of the object store.
        column_types: how columns without types are read.
        required: columns that every file must have.
    """
    schema = to_arrow_schema(shape, timezone="UTC")

    def rows(file: RowFile) -> Batches:
        filesystem, _ = filesystem_of(location, options)
        return read_rows(file, schema, filesystem, required=required, column_types=column_types)

    return rows
