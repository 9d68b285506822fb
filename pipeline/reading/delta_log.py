"""A Delta table's log: the files of a version, and what single versions added or removed."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pf
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipeline.errors import DataError, StoreError
from pipeline.reading.files import RowFile, plain_type

READABLE_FEATURES = frozenset(
    {
        "appendOnly",
        "invariants",
        "timestampNtz",
        "checkConstraints",
        "generatedColumns",
        "v2Checkpoint",
    }
)


def refuse_strange_features(table: DeltaTable, location: str) -> None:
    """Refuse a table that uses features that are not read here, such as deletion vectors.

    Raises:
        StoreError: naming them.
    """
    strange = set(table.protocol().reader_features or ()) - READABLE_FEATURES
    # Older tables name no features.
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        strange.add("columnMapping")
    if strange:
        raise StoreError(
            f"{location} uses Delta features that are not read here: {', '.join(sorted(strange))}; "
            "rewrite the table without them"
        )


def is_delta(location: str, options: Mapping[str, str]) -> bool:
    """Whether there is a Delta table at a location."""
    try:
        return bool(DeltaTable.is_deltatable(location, dict(options) or None))
    except (DeltaError, OSError, ValueError):
        return False


def open_delta(location: str, options: Mapping[str, str], version: int | None = None) -> DeltaTable:
    """A table at its newest or a given version.

    Raises:
        StoreError: if it cannot be read, or uses features that are not read here.
    """
    try:
        table = DeltaTable(location, version=version, storage_options=dict(options) or None)
    except (DeltaError, OSError) as error:
        raise StoreError(
            f"{location}: {error}; check that the table is there and can be reached, then run again"
        ) from error
    refuse_strange_features(table, location)
    return table


def schema_of_table(table: DeltaTable) -> pa.Schema:
    """A table's columns, in types that Spark has."""
    columns = pa.schema(table.schema().to_arrow())
    return pa.schema([pa.field(column.name, plain_type(column.type)) for column in columns])


def file_actions(table: DeltaTable) -> pa.Table:
    """The files of a table's version, as its log lists them.

    Returns:
        One row per file: `path` (relative to the table, special characters escaped), `size_bytes`,
        `num_records` (null if its writer did not count), and `partition.<column>`.
    """
    return pa.table(table.get_add_actions(flatten=True))


def live_files(table: DeltaTable, location: str, root: str) -> list[RowFile]:
    """The files of a table's version, with the values of its partition columns.

    Args:
        table: opened at that version.
        location: its address, for messages.
        root: its path on its file system, below which the files are.
    """
    names = table.metadata().partition_columns
    actions = file_actions(table).to_pylist()
    files = []
    for action in sorted(actions, key=lambda action: str(action["path"])):
        path = within(unquote(action["path"]), location)
        values = {name: action[f"partition.{name}"] for name in names}
        files.append(RowFile(f"{root}/{path}", "parquet", values))
    return files


def within(path: str, location: str) -> str:
    """The path that a log names, which must be within the table.

    Raises:
        StoreError: if it leads out of the table.
    """
    if "://" in path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise StoreError(
            f"{location}: a commit names a file outside the table: {path}; the table's log is not "
            "to be trusted"
        )
    return path


@dataclass(frozen=True)
class Commit:
    """What one version changed.

    Args:
        version: of the table.
        operation: what its writer calls it; empty if it does not say.
        added: files with new rows.
        takes_away: whether rows of earlier versions were removed or rewritten.
    """

    version: int
    operation: str
    added: tuple[RowFile, ...]
    takes_away: bool


def read_commit(filesystem: pf.FileSystem, root: str, location: str, version: int) -> Commit:
    """What one version changed; files that compaction merely rewrote do not count.

    Args:
        filesystem: that holds the table.
        root: its path there.
        location: its address, for messages.
        version: of the table.

    Raises:
        DataError: if the version is no longer in the log, or uses deletion vectors.
        StoreError: if the log cannot be read.
    """
    added: list[RowFile] = []
    takes_away = False
    operation = ""
    for action in _actions(filesystem, root, version, location):
        if "commitInfo" in action:
            operation = str(action["commitInfo"].get("operation", ""))
        elif (add := action.get("add")) is not None and add.get("dataChange", True):
            if add.get("deletionVector"):
                raise DataError(
                    f"{location}: version {version} uses deletion vectors, which are not read "
                    "here; rewrite the table without them"
                )
            path = within(unquote(add["path"]), location)
            values = dict(add.get("partitionValues") or {})
            added.append(RowFile(f"{root}/{path}", "parquet", values))
        elif (remove := action.get("remove")) is not None and remove.get("dataChange", True):
            takes_away = True
    return Commit(version, operation, tuple(added), takes_away)


def read_actions(filesystem: pf.FileSystem, path: str) -> list[dict[str, Any]]:
    """The actions of one commit, each under its name (`add`, `remove`, `commitInfo`).

    Args:
        filesystem: that holds the table.
        path: of a JSON file in a table's log.

    Raises:
        OSError: if the file cannot be read; FileNotFoundError if it is gone.
        ValueError: if it is not lines of JSON.
    """
    with filesystem.open_input_stream(path) as stream:
        lines = stream.read().decode().splitlines()
    return list(map(json.loads, filter(str.strip, lines)))


def _actions(
    filesystem: pf.FileSystem, root: str, version: int, location: str
) -> Iterator[dict[str, Any]]:
    path = f"{root}/_delta_log/{version:020}.json"
    try:
        yield from read_actions(filesystem, path)
    except FileNotFoundError as error:
        raise DataError(
            f"{location}: version {version} is no longer in the table's log, so the rows that it "
            "added are unknown; start again with a new checkpoint and a new target, which answers "
            "the table as it is now"
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path}: {error}; check that the table can be reached, then run again"
        ) from error
