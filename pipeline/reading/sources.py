"""Raw data as its owner left it, read as Arrow tables.

It may be at a path, a glob, in an object store or in an installed package.
"""

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.fs as pf
import pyarrow.json as pj
import pyarrow.parquet as pq

from pipeline.errors import DataError, SpecError
from pipeline.reading.formats import (
    UNREADABLE,
    Format,
    Kind,
    csv_conversion,
    csv_parsing,
    format_as,
    format_of,
    is_hidden,
    json_blocks,
    list_local,
    open_file,
    unreadable,
)
from pipeline.spec import SourceSpec

PACKAGE = "package://"
# Seconds after a change in which a file may change again and keep its time. Object stores count in
# seconds, by a clock of their own.
LOCAL_DOUBT_SECONDS, REMOTE_DOUBT_SECONDS = 2.0, 60.0
_TYPES = {
    "string": pa.string(),
    "long": pa.int64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def read_source(source: SourceSpec, folder: Path) -> Iterator[tuple[str, pa.Table]]:
    """The source's files, one after the other.

    Args:
        source: what to read.
        folder: of the defs.yaml; a relative path counts from there, or from the repository's root.

    Yields:
        The file's address and its rows; the tables of one source may have different schemas, if its
        files have.

    Raises:
        SpecError: if the uri names no package, or the format cannot be told.
        DataError: if no file is found, or one cannot be read as its format.
    """
    kind = _kind_of(source)
    if kind == "delta":
        yield source.uri, _read_delta(source, folder)
        return
    filesystem, paths = _locate(source, folder)
    for path in paths:
        file_format = _format_of_file(source, path, kind)
        try:
            with open_file(path, file_format, filesystem) as stream:
                yield path, _typed(_read_file(stream, file_format, source), source)
        except UNREADABLE as error:
            raise unreadable(
                f"source {source.name!r}: {path}",
                kind,
                error,
                "correct the file, or the source's format or types",
            ) from error


def source_state(source: SourceSpec, folder: Path) -> str | None:
    """The state of a source's files, to tell whether they have changed without reading them.

    Of a file on this machine: path, size, inode, and when its content and its entry were changed;
    in an object store: path, size and time; of a Delta table: its id and version.

    Args:
        source: what to look at.
        folder: of the defs.yaml; a relative path counts from there, or from the repository's root.

    Returns:
        Text that differs if any file does. None where that is doubtful: a store keeps no times, or
        a file was changed so recently that it could change again within the resolution of its
        time.

    Raises:
        SpecError, DataError: as `read_source`.
    """
    if _kind_of(source) == "delta":
        return _delta_state(source, folder)
    filesystem, paths = _locate(source, folder)
    newest = 0.0
    states: list[list[Any]] = []
    if isinstance(filesystem, pf.LocalFileSystem):
        window = LOCAL_DOUBT_SECONDS
        for path in paths:
            stat = Path(path).stat()
            newest = max(newest, stat.st_mtime, stat.st_ctime)
            states.append([path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    else:
        window = REMOTE_DOUBT_SECONDS
        for info in filesystem.get_file_info(paths):
            if info.mtime_ns is None:
                return None
            newest = max(newest, info.mtime_ns / 1e9)
            states.append([info.path, info.size, info.mtime_ns])
    if time.time() - newest < window:
        return None
    return json.dumps(states)


def _delta_state(source: SourceSpec, folder: Path) -> str | None:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        table = DeltaTable(_first_table(_delta_uris(source, folder)))
        return json.dumps([table.metadata().id, table.version()])
    except (DeltaError, OSError):
        # Reading the table says what is wrong.
        return None


def _kind_of(source: SourceSpec) -> Kind | Literal["delta"]:
    """The kind of a source's files: as its format says, or else the ending of its uri."""
    if source.format == "jsonl":
        return "json"
    if source.format is not None:
        return source.format
    file_format = format_of(source.uri)
    if file_format is None:
        raise SpecError(
            f"source {source.name!r}: the ending of {source.uri!r} does not tell its format; "
            "set format to csv, parquet, delta or jsonl"
        )
    return file_format.kind


def _format_of_file(source: SourceSpec, path: str, kind: Kind) -> Format:
    """How one of a source's files is to be read."""
    file_format = format_as(path, kind)
    # Spark writes sales.tsv as a folder of files whose own names do not tell the delimiter.
    if ".tsv" in source.uri:
        return replace(file_format, delimiter="\t")
    return file_format


def _locate(source: SourceSpec, folder: Path) -> tuple[pf.FileSystem, list[str]]:
    """The file system and the sorted files of a uri.

    Raises:
        DataError: if there are none.
    """
    if _is_remote(source):
        return _locate_remote(source)
    tried = []
    for root, name in _places(source, folder):
        paths = list_local(root, name)
        if paths:
            return pf.LocalFileSystem(), paths
        tried.append(root / name)
    raise _nothing_found(source, tried)


def _locate_remote(source: SourceSpec) -> tuple[pf.FileSystem, list[str]]:
    filesystem, path = pf.FileSystem.from_uri(source.uri)
    paths = []
    info = filesystem.get_file_info(path)
    if info.type == pf.FileType.File:
        paths.append(path)
    elif info.type == pf.FileType.Directory:
        for entry in filesystem.get_file_info(pf.FileSelector(path, recursive=True)):
            if entry.is_file and not is_hidden(entry.path.removeprefix(path)):
                paths.append(entry.path)
    if not paths:
        raise _nothing_found(source)
    return filesystem, sorted(paths)


def _nothing_found(source: SourceSpec, tried: Sequence[Path] = ()) -> DataError:
    places = "".join(f"\n  tried: {place}" for place in tried)
    return DataError(
        f"source {source.name!r}: nothing is at {source.uri!r}; expected a file, a folder or a "
        f"glob that matches something{places}"
    )


def _is_remote(source: SourceSpec) -> bool:
    """Whether a uri is an address of an object store."""
    return "://" in source.uri and not source.uri.startswith((PACKAGE, "file://"))


def _places(source: SourceSpec, folder: Path) -> list[tuple[Path, str]]:
    """Where a local uri may be: a folder, and a path from there."""
    if source.uri.startswith(PACKAGE):
        return [(_package_folder(source), _package_parts(source)[1])]
    name = source.uri.removeprefix("file://")
    places = [(folder, name)]
    repository = _repository(folder)
    if repository is not None and not Path(name).is_absolute():
        places.append((repository, name))
    return places


def _repository(folder: Path) -> Path | None:
    """The nearest folder around a fleet's that has a pyproject.toml."""
    for parent in folder.absolute().parents:
        if (parent / "pyproject.toml").is_file():
            return parent
    return None


def _package_parts(source: SourceSpec) -> tuple[str, str]:
    """The package of a uri, and the path within it."""
    package, _, file = source.uri.removeprefix(PACKAGE).partition("/")
    return package, file


def _package_folder(source: SourceSpec) -> Path:
    """The folder of an installed package, which is not imported."""
    package, _ = _package_parts(source)
    try:
        module = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        module = None
    if module is None or not module.submodule_search_locations:
        raise SpecError(
            f"source {source.name!r}: package {package!r} of {source.uri!r} is not installed; add "
            "it to the project's dependencies"
        )
    return Path(next(iter(module.submodule_search_locations)))


def _read_file(stream: pa.NativeFile, file_format: Format, source: SourceSpec) -> pa.Table:
    """All rows of one opened file, in the types that its reader guesses or knows."""
    if file_format.kind == "parquet":
        return pq.read_table(stream)
    if file_format.kind == "csv":
        return _read_csv(stream, file_format, source)
    return pj.read_json(stream, json_blocks())


def _read_csv(stream: pa.NativeFile, file_format: Format, source: SourceSpec) -> pa.Table:
    types = {}
    for name, kind in source.types.items():
        types[name] = _TYPES[kind]
        if kind == "timestamp":
            # As text first, as it may have a zone or none.
            types[name] = pa.string()
    table = pv.read_csv(
        stream,
        convert_options=csv_conversion(types, source.null_values),
        parse_options=csv_parsing(file_format),
    )
    binary = [field.name for field in table.schema if pa.types.is_binary(field.type)]
    if binary:
        raise ValueError(f"text of {', '.join(binary)} is not UTF-8")
    return table


def _read_delta(source: SourceSpec, folder: Path) -> pa.Table:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    uris = _delta_uris(source, folder)
    try:
        return _typed(DeltaTable(_first_table(uris)).to_pyarrow_table(), source)
    except (DeltaError, OSError) as error:
        raise DataError(
            f"source {source.name!r}: {source.uri!r} cannot be read as a Delta table ({error}); "
            f"tried: {', '.join(uris)}"
        ) from error


def _delta_uris(source: SourceSpec, folder: Path) -> list[str]:
    """Where the table may be: a relative path counts from several folders."""
    if _is_remote(source):
        return [source.uri]
    return [str(root / name) for root, name in _places(source, folder)]


def _first_table(uris: Sequence[str]) -> str:
    """The first address that has a table; the first of all if none has."""
    for uri in uris:
        if Path(uri, "_delta_log").is_dir():
            return uri
    return uris[0]


def _typed(table: pa.Table, source: SourceSpec) -> pa.Table:
    """The table with columns in the types that the source declares."""
    for name, kind in source.types.items():
        if name in table.column_names:
            try:
                typed = _cast(table[name], kind)
            except pa.ArrowException as error:
                raise ValueError(f"column {name!r} as {kind}: {error}") from error
            table = table.set_column(table.column_names.index(name), name, typed)
    return table


def _cast(column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray:
    if kind == "timestamp" and pa.types.is_string(column.type):
        try:
            return column.cast(_TYPES[kind])
        except pa.ArrowInvalid:  # without a zone; then it is UTC, as everywhere
            column = column.cast(pa.timestamp("us"))
    return column.cast(_TYPES[kind])
