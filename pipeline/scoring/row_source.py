"""Where rows to score come from: a Delta table, or local files.

All of it is checked before any work is spent on the rows.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pf

from pipeline.errors import DataError
from pipeline.models.meta_model import (
    FleetModel,
    InputError,
    answer_columns,
    check_listed_once,
    filesystem_of,
)
from pipeline.reading.delta_log import is_delta, live_files, open_delta, schema_of_table
from pipeline.reading.files import ColumnTypes, RowFile, local_files, schema_of
from pipeline.reading.formats import Kind

DOUBLE = "double"
SCORED_AT, SCORED_PERIOD = "scored_at", "scored_period"
_ANSWER_TYPES = {
    DOUBLE: pa.float64(),
    "string": pa.string(),
    "array<double>": pa.list_(pa.float64()),
}
_OF_SCORING = {SCORED_AT: pa.timestamp("us", tz="UTC"), SCORED_PERIOD: pa.string()}


@dataclass(frozen=True)
class RowSource:
    """A source of rows, as it was when it was looked at.

    Args:
        address: absolute path or URL.
        kind: its format.
        schema: its columns.
        files: its files.
        version: of a Delta table; None for files.
    """

    address: str
    kind: Kind | Literal["delta"]
    schema: pa.Schema
    files: Sequence[RowFile]
    version: int | None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.address} (version {self.version})"
        return f"{self.address} ({len(self.files):,} files)"


def absolute(address: str) -> str:
    """A path as an absolute one; URLs stay as they are."""
    if "://" in address and not address.startswith("file://"):
        return address.rstrip("/")
    return str(Path.cwd() / address.removeprefix("file://")).rstrip("/")


def find_source(
    address: str, column_types: ColumnTypes, options: Mapping[str, str], *, leave_out: bool = False
) -> RowSource:
    """Look at a source: its files and columns.

    Args:
        address: absolute, as from `absolute`.
        column_types: how columns without types are read.
        options: of the object store.
        leave_out: passes over files that cannot be read, if at least one can.

    Raises:
        DataError: if there are no rows to read.
        StoreError: if a table cannot be read.
    """
    if is_delta(address, options):
        table = open_delta(address, options)
        _, root = filesystem_of(address, options)
        files = live_files(table, address, root)
        return RowSource(address, "delta", schema_of_table(table), files, table.version())
    if "://" in address:
        raise DataError(
            f"no Delta table is at {address}; files are read from local or mounted folders only: "
            "copy them, or write them as a Delta table"
        )
    files = local_files(address)
    schema = schema_of(files, column_types, pf.LocalFileSystem(), leave_out=leave_out)
    return RowSource(address, files[0].kind, schema, files, None)


def text_columns(model: FleetModel) -> frozenset[str]:
    """Keys and categories: the columns that a model takes as text, whatever their type."""
    columns: set[str] = set()
    for generation in model.generations:
        columns.update(generation.model_spec.text_columns)
    return frozenset(columns)


def choose_column_types(model: FleetModel, inputs: Mapping[str, str]) -> ColumnTypes:
    """How to read a model's columns from files without types.

    Args:
        model: that will answer.
        inputs: MLflow type (double or string) of each column, as the version was registered with.
    """
    numbers = frozenset(name for name, kind in inputs.items() if kind == DOUBLE)
    text = text_columns(model)
    return ColumnTypes(numeric=numbers - text, integer_keys=numbers & text)


def answer_schema(task: str) -> pa.Schema:
    """The columns of an answer in Arrow's types."""
    columns = answer_columns(task)
    return pa.schema([pa.field(name, _ANSWER_TYPES[kind]) for name, kind in columns.items()])


def target_schema(source: pa.Schema, task: str, added: Collection[str]) -> pa.Schema:
    """The columns of a table of answers: the source's, the answers', and scoring's own."""
    of_scoring = [pa.field(name, _OF_SCORING[name]) for name in added]
    return pa.schema([*source, *answer_schema(task), *of_scoring])


def check_source(source: RowSource, model: FleetModel, added: Collection[str]) -> None:
    """Refuse rows that a model cannot answer, or that have columns named like the answers'.

    Args:
        source: the rows.
        model: that would answer them.
        added: columns of scoring beside the answers.

    Raises:
        InputError: if a column is missing.
        DataError: if a number is text, or a name is taken.
    """
    check_columns(source.schema, source.address, model)
    taken = set(map(str.casefold, (*answer_columns(model.task), *added)))
    clash = [name for name in source.schema.names if name.casefold() in taken]
    if clash:
        raise DataError(
            f"{source.address} has columns that the answers bring: {', '.join(clash)}; rename "
            "them, or give a source without them "
            f"(the source's columns are kept beside: {', '.join(sorted(taken))})"
        )


def check_columns(schema: pa.Schema, where: str, model: FleetModel) -> None:
    """As `check_source`, but only for the columns that a model needs."""
    missing = [name for name in model.required if name not in schema.names]
    if missing:
        problem = (
            f"{where}: missing columns: {', '.join(missing)}; it has: {', '.join(schema.names)}"
        )
        raise InputError(f"{problem}; fleet {model.fleet!r} needs: {', '.join(model.required)}")
    check_listed_once(schema.names, {*model.required, *model.optional}, where)
    text = text_columns(model)
    not_numbers = []
    for name in model.required:
        kind = schema.field(name).type
        if name not in text and not _is_number(kind):
            not_numbers.append(f"{name} ({kind})")
    if not_numbers:
        raise DataError(
            f"{where}: not numbers: {', '.join(not_numbers)}; fleet {model.fleet!r} needs numbers "
            "there: cast the columns"
        )


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_boolean(kind)
    )


def check_target(
    target: str,
    present: tuple[pa.Schema, Sequence[str]],
    expected: pa.Schema,
    partition_by: Sequence[str],
) -> None:
    """Refuse a table that holds another kind of answers, before anything is written to it.

    Args:
        target: address of the table.
        present: its columns, and those that it is partitioned by.
        expected: columns of the answers.
        partition_by: how a table of such answers is partitioned.

    Raises:
        DataError: naming what differs.
    """
    schema, partitions = present
    if list(partitions) != list(partition_by):
        raise DataError(
            f"{target} is partitioned by {', '.join(partitions) or 'nothing'}, expected "
            f"{', '.join(partition_by) or 'nothing'}: `many-models score` and `many-models stream` "
            "write to tables of their own; give another --to"
        )
    difference = ""
    if "answered_by" not in schema.names:
        difference = "no column answered_by"
    lacking = [name for name in schema.names if name not in expected.names]
    if lacking:
        difference = f"columns that the new rows lack: {', '.join(lacking)}"
    if difference:
        raise DataError(
            f"{target} has {difference}: it is not a table of answers to these rows; give another "
            "--to"
        )


def check_apart(source: str, target: str) -> None:
    """Refuse answers that would become rows to score.

    Raises:
        DataError: if one address is within the other.
    """
    written = f"{target}/part.parquet"
    is_row = fnmatch(written, source) or (
        not Path(source).is_file() and written.startswith(f"{source}/")
    )
    if is_row or f"{source}/".startswith(f"{target}/"):
        raise DataError(f"--to {target} and --from {source} overlap; choose another --to")
