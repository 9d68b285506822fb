"""Files with rows to score: their paths, their columns, and their rows under one schema.

Rows are read by pyarrow wherever they are needed, on the driver or in a task, so that every way of
scoring reads a file alike.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.fs as pf
import pyarrow.json as pj
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.reading.formats import (
    KNOWN_ENDINGS,
    UNREADABLE,
    Format,
    Kind,
    csv_conversion,
    csv_parsing,
    format_as,
    format_of,
    is_glob,
    json_blocks,
    list_local,
    open_file,
    suffix_of,
    unreadable,
)

ROWS_PER_BATCH = 10_000
MAX_PATHS_SHOWN = 3
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.date64(): pa.date32(),
    pa.null(): pa.string(),
}


@dataclass(frozen=True)
class RowFile:
    """A file with rows.

    Args:
        path: on its file system.
        kind: parquet, csv or json; the path tells the delimiter and the compression.
        partition_values: values of columns that its folders (`day=2024-01-01`) or its table's log
            give; text, or as the log has them.
    """

    path: str
    kind: Kind
    partition_values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """How it is to be read."""
        return format_as(self.path, self.kind)


@dataclass(frozen=True)
class ColumnTypes:
    """How columns without a type of their own, those of CSV and JSON, are to be read.

    Args:
        numeric: columns of numbers.
        integer_keys: columns of text that were numbers in training: `7.0`, as pandas writes an
            integer beside nulls, is read as `7`.
    """

    numeric: frozenset[str] = frozenset()
    integer_keys: frozenset[str] = frozenset()


def local_files(address: str) -> list[RowFile]:
    """The files of an address on this machine.

    Args:
        address: a file, a folder (with those below it), or a glob.

    Raises:
        DataError: if there are none, or they are of several kinds.
    """
    root = root_of(address)
    paths = list_local(Path(), address)
    files = [row_file(path, root) for path in filter(suffix_of, paths)]
    if not files:
        message = (
            f"no rows are at {address}; expected a Delta table, or a file, folder or glob of "
            f"{KNOWN_ENDINGS}"
        )
        if paths:
            message += f"; found: {', '.join(paths[:MAX_PATHS_SHOWN])}"
        raise DataError(message)
    if len({file.kind for file in files}) > 1:
        endings = sorted({suffix_of(file.path) for file in files})
        raise DataError(
            f"{address} has files of several formats ({', '.join(endings)}); "
            f"expected one: name them by a glob such as {address}/*{endings[0]}"
        )
    return files


def root_of(address: str) -> str:
    """The folder of an address, below which the names of folders may give columns.

    Of a glob, it is the last folder above the first glob character.
    """
    if Path(address).is_dir():
        return address
    if Path(address).is_file():
        return str(Path(address).parent)
    fixed = []
    for part in PurePosixPath(address).parent.parts:
        if is_glob(part):
            break
        fixed.append(part)
    if not fixed:
        return ""
    return str(PurePosixPath(*fixed))


def row_file(path: str, root: str) -> RowFile:
    """A local file of a known format, with the values that the folders between it and a root give.

    Raises:
        ValueError: if its name tells no format.
    """
    file_format = format_of(path)
    if file_format is None:
        raise ValueError(f"{path} has none of the known endings: {KNOWN_ENDINGS}")
    folders: tuple[str, ...] = ()
    if root and path.startswith(f"{root.rstrip('/')}/"):
        folders = PurePosixPath(path).relative_to(root).parts[:-1]
    values: dict[str, str | None] = {}
    for folder in folders:
        name, separator, value = folder.partition("=")
        if separator:
            values[unquote(name)] = _partition_value(value)
    return RowFile(path, file_format.kind, values)


def _partition_value(text: str) -> str | None:
    if text == _NO_PARTITION:
        return None
    return unquote(text)


def schema_of(
    files: Sequence[RowFile],
    column_types: ColumnTypes,
    filesystem: pf.FileSystem,
    *,
    leave_out: bool = False,
) -> pa.Schema:
    """The columns that any of the files has.

    Columns of CSV are text unless they are to be read as numbers. JSON has numbers and text, but no
    moments.

    Args:
        files: at least one.
        column_types: how columns without types are read.
        filesystem: that holds the files.
        leave_out: passes over files that cannot be read, if at least one can.

    Raises:
        DataError: naming a file that cannot be read, or a column whose types do not go together.
    """
    schemas = []
    failures = []
    for file in files:
        try:
            schemas.append(_schema_of_file(file, column_types, filesystem))
        except DataError as error:
            failures.append(error)
    if failures and not (leave_out and schemas):
        raise failures[0]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{files[0].path} and {len(files) - 1} other files have no schema in common: {error}; "
            "cast the column in the files"
        ) from error


def _schema_of_file(
    file: RowFile, column_types: ColumnTypes, filesystem: pf.FileSystem
) -> pa.Schema:
    """The columns of one file, with those that its folders give."""
    try:
        with open_file(file.path, file.format, filesystem) as stream:
            own_schema = _own_schema(stream, file.format)
    except UNREADABLE as error:
        raise unreadable(file.path, file.kind, error) from error
    fields = [
        pa.field(column.name, _type_to_read(column, file.kind, column_types))
        for column in own_schema
    ]
    for name in file.partition_values:
        if name not in own_schema.names:
            kind = pa.string()
            if name in column_types.numeric:
                kind = pa.float64()
            fields.append(pa.field(name, kind))
    return pa.schema(fields)


def _own_schema(stream: pa.NativeFile, file_format: Format) -> pa.Schema:
    """The columns of a file as its reader guesses or knows them."""
    if file_format.kind == "parquet":
        return pq.read_schema(stream)
    if file_format.kind == "csv":
        return pv.open_csv(stream, parse_options=csv_parsing(file_format)).schema
    return pj.open_json(stream, json_blocks()).schema


def _type_to_read(column: pa.Field, kind: Kind, column_types: ColumnTypes) -> pa.DataType:
    if kind == "parquet":
        return plain_type(column.type)
    if column.name in column_types.numeric:
        return pa.float64()
    if kind == "csv" or pa.types.is_timestamp(column.type):
        return pa.string()
    return plain_type(column.type)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that Spark and Delta have for it, or else the next wider one."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_timestamp(kind) and kind.tz:
        return pa.timestamp("us", tz="UTC")
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us")
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if (
        pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        return pa.binary()
    return _WIDER.get(kind, kind)


def read_rows(
    file: RowFile,
    schema: pa.Schema,
    filesystem: pf.FileSystem,
    *,
    required: Collection[str] = (),
    column_types: ColumnTypes | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows of a file under a schema: columns by name in whatever order the file has them.

    Args:
        file: to read.
        schema: of the rows yielded; a column that the file lacks is null, and further columns of
            the file are left out.
        filesystem: that holds it.
        required: columns that it must have.
        column_types: as its schema was made with.

    Raises:
        DataError: if a required column is missing, the file cannot be read, or a value is not of
            its column's type.
    """
    integer_keys = (column_types or ColumnTypes()).integer_keys
    try:
        for batch in _batches(file, schema, filesystem):
            _check_columns(required, batch, file)
            arrays = []
            for column in schema:
                is_integer_key = column.name in integer_keys
                arrays.append(_column(batch, column, file, is_integer_key=is_integer_key))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
    except DataError:
        raise
    except UNREADABLE as error:
        raise unreadable(file.path, file.kind, error) from error


def _check_columns(required: Collection[str], batch: pa.RecordBatch, file: RowFile) -> None:
    available = {*batch.schema.names, *file.partition_values}
    missing = [name for name in required if name not in available]
    if missing:
        raise DataError(
            f"{file.path}: missing columns: {', '.join(missing)}; "
            f"it has: {', '.join(batch.schema.names)}"
        )


def _batches(
    file: RowFile, schema: pa.Schema, filesystem: pf.FileSystem
) -> Iterator[pa.RecordBatch]:
    """The rows of a file as its reader gives them, in batches of at most ROWS_PER_BATCH."""
    if file.kind == "parquet":
        with pq.ParquetFile(
            file.path, filesystem=filesystem, coerce_int96_timestamp_unit="us"
        ) as opened:
            yield from opened.iter_batches(batch_size=ROWS_PER_BATCH)
        return
    with open_file(file.path, file.format, filesystem) as stream:
        for batch in _text_batches(stream, file.format, schema):
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(start, ROWS_PER_BATCH)


def _text_batches(
    stream: pa.NativeFile, file_format: Format, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The rows of a file of text, its columns in the types of a schema."""
    if file_format.kind == "csv":
        # Processes that only read Parquet, as a stream over a Delta table has, need no spec.
        from pipeline.spec import NULL_TEXTS

        conversion = csv_conversion(schema, NULL_TEXTS)
        reader = pv.open_csv(
            stream, convert_options=conversion, parse_options=csv_parsing(file_format)
        )
    else:
        parsing = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        reader = pj.open_json(stream, json_blocks(), parsing)
    yield from reader


def _column(
    batch: pa.RecordBatch, field_to_fill: pa.Field, file: RowFile, *, is_integer_key: bool
) -> pa.Array:
    """A column of a schema: from the file, from its partition values, or null."""
    name = field_to_fill.name
    kind = field_to_fill.type
    if name in batch.schema.names:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # Spark and Delta keep nothing finer than a microsecond.
        column = column.cast(kind, safe=not pa.types.is_timestamp(kind))
    elif file.partition_values.get(name) is not None:
        column = pa.repeat(constant_of(file.partition_values[name], kind), batch.num_rows)
    else:
        column = pa.nulls(batch.num_rows, kind)
    if is_integer_key and pa.types.is_string(column.type):
        column = pc.replace_substring_regex(column, r"^(-?\d+)\.0*$", r"\1")
    return column


def constant_of(value: Any, kind: pa.DataType) -> pa.Scalar:
    """A partition value in a column's type; a moment without a zone is UTC."""
    scalar = pa.scalar(value)
    if pa.types.is_string(scalar.type) and pa.types.is_timestamp(kind):
        try:
            return scalar.cast(kind)
        except pa.ArrowInvalid:
            scalar = scalar.cast(pa.timestamp("us"))
    return scalar.cast(kind)
