"""Files with rows to score: which there are, what columns they have, and their rows under one schema, by name.

Rows are read by pyarrow wherever they are needed, on the driver or in a task, so that every way to score reads a file alike.
"""

import glob
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.fs as pf
import pyarrow.json as pj
import pyarrow.parquet as pq

from pipeline.errors import DataError

Kind = Literal["parquet", "csv", "json"]
SUFFIXES: Mapping[str, Kind] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
}
# As in a fleet's own CSV sources, unless it says otherwise.
NULL_TEXTS = ("", "NA", "NaN", "null", "NULL")
ROWS_PER_BATCH = 10_000
JSON_BLOCK_BYTES = 16 << 20
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
        kind: its format.
        constants: values of columns that its folders (`day=2024-01-01`) or its table's log give; text, or as the log has them.
    """

    path: str
    kind: Kind
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How columns without a type of their own, those of CSV and JSON, are to be read.

    Args:
        numbers: columns that are numbers.
        whole: columns of text that training knew as numbers: `7.0`, as pandas writes an integer beside nulls, is `7`.
    """

    numbers: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def suffix_of(path: str) -> str:
    """The ending that tells a file's format, `.csv.gz` whole; empty if it tells none."""
    name = PurePosixPath(path).name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder around it, is another program's business."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).parts)


def local_files(address: str) -> list[RowFile]:
    """The files of an address on this machine.

    Args:
        address: a file, a folder (with those below it), or a glob.

    Raises:
        DataError: if there are none, or they are of several formats.
    """
    root = root_of(address)
    if Path(address).is_dir():
        paths = sorted(str(path) for path in Path(address).rglob("*") if path.is_file() and not is_hidden(str(path.relative_to(address))))
    else:
        # A file whose own name holds glob characters is meant literally.
        paths = [address] if Path(address).is_file() else sorted(path for path in glob.glob(address, recursive=True) if Path(path).is_file())  # noqa: PTH207 - Path.glob takes no absolute pattern
    told = sorted({suffix_of(path) for path in paths} - {""})
    kinds = {SUFFIXES[suffix] for suffix in told}
    if len(kinds) > 1:
        raise DataError(f"{address} has files of several formats ({', '.join(told)}); expected one: name them by a glob such as {address}/*{told[0]}")
    found = [row_file(path, root) for path in paths if suffix_of(path)]
    if not found:
        raise DataError(
            f"no rows are at {address}; expected a Delta table, or a file, folder or glob of {', '.join(SUFFIXES)}"
            + (f"; there is: {', '.join(paths[:3])}" if paths else "")
        )
    return found


def root_of(address: str) -> str:
    """The folder of an address, below which the names of folders may give columns."""
    if Path(address).is_dir():
        return address
    if Path(address).is_file():
        return str(Path(address).parent)
    parts = PurePosixPath(address).parts
    fixed = next((number for number, part in enumerate(parts) if any(character in part for character in "*?[")), len(parts) - 1)
    return str(PurePosixPath(*parts[:fixed])) if fixed else ""


def row_file(path: str, root: str) -> RowFile:
    """A local file of a known format, with what the folders between it and a root say."""
    within = PurePosixPath(path).relative_to(root) if root and path.startswith(f"{root.rstrip('/')}/") else PurePosixPath(PurePosixPath(path).name)
    pairs = (part.partition("=") for part in within.parts[:-1] if "=" in part)
    constants = {unquote(name): None if value == _NO_PARTITION else unquote(value) for name, _, value in pairs}
    return RowFile(path, SUFFIXES[suffix_of(path)], constants)


def schema_of(
    files: Sequence[RowFile],
    reading: Reading,
    filesystem: pf.FileSystem,
    *,
    leave_out: bool = False,
) -> pa.Schema:
    """The columns that any of the files has.

    Columns of CSV are text unless they are to be read as numbers; JSON tells numbers and text, but no moments.

    Args:
        files: at least one.
        reading: how columns without types are read.
        filesystem: that holds the files.
        leave_out: passes over files that cannot be read, as long as one can.

    Raises:
        DataError: naming a file that cannot be read, or a column that is of types that do not go together.
    """
    schemas, failures = [], []
    for file in files:
        try:
            schemas.append(_own_schema(file, reading, filesystem))
        except DataError as error:
            failures.append(error)
    if failures and not (leave_out and schemas):
        raise failures[0]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{files[0].path} and {len(files) - 1} other files have no schema in common: {error}; cast the column in the files"
        ) from error


def _own_schema(file: RowFile, reading: Reading, filesystem: pf.FileSystem) -> pa.Schema:
    """Of one file, with the columns that its folders give."""
    try:
        if file.kind == "parquet":
            with filesystem.open_input_file(file.path) as opened:
                found = pq.read_schema(opened)
            fields = [pa.field(one.name, plain_type(one.type)) for one in found]
        else:
            with _opened(file, filesystem) as stream:
                found = pv.open_csv(stream).schema if file.kind == "csv" else pj.open_json(stream, pj.ReadOptions(block_size=JSON_BLOCK_BYTES)).schema
            fields = [pa.field(one.name, _told_type(one, file.kind, reading)) for one in found]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file, error) from error
    there = {one.name for one in fields}
    constants = [pa.field(name, pa.float64() if name in reading.numbers else pa.string()) for name in file.constants if name not in there]
    return pa.schema([*fields, *constants])


def _told_type(column: pa.Field, kind: Kind, reading: Reading) -> pa.DataType:
    if column.name in reading.numbers:
        return pa.float64()
    if kind == "csv" or pa.types.is_timestamp(column.type):
        return pa.string()
    return plain_type(column.type)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that Spark and Delta have for it: wider where there is none of its own."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", tz="UTC" if kind.tz else None)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    return _WIDER.get(kind, kind)


def read_rows(
    file: RowFile, schema: pa.Schema, filesystem: pf.FileSystem, *, required: Collection[str] = (), reading: Reading | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file under a schema: columns by name in whatever order the file has them.

    Args:
        file: to be read.
        schema: of the rows given; a column that the file lacks is null, one that it has more is left out.
        filesystem: that holds it.
        required: columns that it must have.
        reading: as its schema was made with.

    Raises:
        DataError: if a required column is missing, the file cannot be read, or a value is not of its column's type.
    """
    whole = (reading or Reading()).whole
    try:
        for batch in _batches(file, schema, filesystem):
            _check_columns(required, batch, file)
            arrays = [_column(batch, one, file, is_whole=one.name in whole) for one in schema]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file, error) from error


def _check_columns(columns: Collection[str], batch: pa.RecordBatch, file: RowFile) -> None:
    lacking = [name for name in columns if name not in batch.schema.names and name not in file.constants]
    if lacking:
        raise DataError(f"{file.path}: missing columns: {', '.join(lacking)}; it has: {', '.join(batch.schema.names)}")


def unreadable(file: RowFile, error: Exception) -> DataError:
    """What is said of a file that cannot be read."""
    return DataError(f"{file.path} cannot be read as {file.kind} ({error}); repair or remove the file")


def _opened(file: RowFile, filesystem: pf.FileSystem) -> pa.NativeFile:
    return filesystem.open_input_stream(file.path, compression="gzip" if file.path.lower().endswith(".gz") else None)


def _batches(file: RowFile, schema: pa.Schema, filesystem: pf.FileSystem) -> Iterator[pa.RecordBatch]:
    if file.kind == "parquet":
        with pq.ParquetFile(file.path, filesystem=filesystem, coerce_int96_timestamp_unit="us") as opened:
            yield from opened.iter_batches(batch_size=ROWS_PER_BATCH)
        return
    with _opened(file, filesystem) as stream:
        if file.kind == "csv":
            convert = pv.ConvertOptions(column_types=schema, null_values=list(NULL_TEXTS), strings_can_be_null=True)
            batches = pv.open_csv(stream, convert_options=convert, parse_options=pv.ParseOptions(newlines_in_values=True))
        else:
            parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            batches = pj.open_json(stream, pj.ReadOptions(block_size=JSON_BLOCK_BYTES), parse)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(start, ROWS_PER_BATCH)


def _column(batch: pa.RecordBatch, wanted: pa.Field, file: RowFile, *, is_whole: bool) -> pa.Array:
    if wanted.name in batch.schema.names:
        column = batch.column(wanted.name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # Finer than a microsecond neither Spark nor Delta can keep.
        column = column.cast(wanted.type, safe=not pa.types.is_timestamp(wanted.type))
    elif file.constants.get(wanted.name) is not None:
        column = pa.repeat(constant_of(file.constants[wanted.name], wanted.type), batch.num_rows)
    else:
        column = pa.nulls(batch.num_rows, wanted.type)
    if is_whole and pa.types.is_string(column.type):
        column = pc.replace_substring_regex(column, r"^(-?\d+)\.0*$", r"\1")
    return column


def constant_of(value: Any, kind: pa.DataType) -> pa.Scalar:
    """A value that a folder or a log gives, in a column's type; a moment without a zone is UTC."""
    scalar = pa.scalar(value)
    if pa.types.is_string(scalar.type) and pa.types.is_timestamp(kind):
        try:
            return scalar.cast(kind)
        except pa.ArrowInvalid:
            scalar = scalar.cast(pa.timestamp("us"))
    return scalar.cast(kind)
