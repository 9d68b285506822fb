"""Raw data as its owner left it: read from a path, a glob, an object store or an installed package, as Arrow tables."""

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

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
# A file changed within so many seconds may change again without a new time; stores count in
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
        The file's address and its rows; all tables of one source share a schema only as far as the
        files do.

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
    """What tells that a source's files are those of another time, without reading them.

    Of a file on this machine: path, size, inode, and when its content and its entry were changed;
    in an object store: path, size and time; of a Delta table: its id and version.

    Args:
        source: what is to be read.
        folder: folder of the defs.yaml, from which a relative path counts.

    Returns:
        Text that differs wherever a file does. None where that is doubtful: a store that keeps no
        times, or a file changed so lately that it could be changed once more within the resolution
        of its time.

    Raises:
        SpecError, DataError: as `read_source`.
    """
    if _kind_of(source) == "delta":
        return _delta_state(source, folder)
    filesystem, paths = _locate(source, folder)
    if isinstance(filesystem, pf.LocalFileSystem):
        stats = [Path(path).stat() for path in paths]
        newest, window = (
            max(max(stat.st_mtime, stat.st_ctime) for stat in stats),
            LOCAL_DOUBT_SECONDS,
        )
        states = [
            [path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
            for path, stat in zip(paths, stats, strict=True)
        ]
    else:
        infos = filesystem.get_file_info(paths)
        if any(info.mtime_ns is None for info in infos):
            return None
        newest, window = max(info.mtime_ns for info in infos) / 1e9, REMOTE_DOUBT_SECONDS
        states = [[info.path, info.size, info.mtime_ns] for info in infos]
    return None if time.time() - newest < window else json.dumps(states)


def _delta_state(source: SourceSpec, folder: Path) -> str | None:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        table = DeltaTable(_first_table(_delta_uris(source, folder)))
        return json.dumps([table.metadata().id, table.version()])
    except (DeltaError, OSError):
        # Reading it says what is wrong.
        return None


def _kind_of(source: SourceSpec) -> Kind | Literal["delta"]:
    """What a source's files are: as it says, or else as the ending of its uri tells."""
    if source.format is not None:
        return "json" if source.format == "jsonl" else source.format
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
    return replace(file_format, delimiter="\t") if ".tsv" in source.uri else file_format


def _locate(source: SourceSpec, folder: Path) -> tuple[pf.FileSystem, list[str]]:
    """The file system and the sorted files of a uri."""
    uri = source.uri
    if "://" in uri and not uri.startswith((PACKAGE, "file://")):
        filesystem, path = pf.FileSystem.from_uri(uri)
        info = filesystem.get_file_info(path)
        if info.type == pf.FileType.Directory:
            found = filesystem.get_file_info(pf.FileSelector(path, recursive=True))
            return filesystem, _found(
                source,
                sorted(
                    entry.path
                    for entry in found
                    if entry.is_file and not is_hidden(entry.path.removeprefix(path))
                ),
            )
        return filesystem, _found(source, [path] if info.type == pf.FileType.File else [])
    tried = []
    for root, name in _places(source, folder):
        paths = list_local(root, name)
        if paths:
            return pf.LocalFileSystem(), paths
        tried.append(str(root / name))
    return pf.LocalFileSystem(), _found(source, [], tried)


def _places(source: SourceSpec, folder: Path) -> list[tuple[Path, str]]:
    """Where a local uri may be: a folder, and a path from there."""
    if source.uri.startswith(PACKAGE):
        return [(_package_folder(source), _package_parts(source)[1])]
    name = source.uri.removeprefix("file://")
    root = _repository(folder)
    is_relative = not Path(name).is_absolute()
    return [(folder, name), *([(root, name)] if is_relative and root else [])]


def _repository(folder: Path) -> Path | None:
    """The nearest folder around a fleet's that has a pyproject.toml."""
    around = (
        parent for parent in folder.absolute().parents if (parent / "pyproject.toml").is_file()
    )
    return next(around, None)


def _found(source: SourceSpec, paths: list[str], tried: Sequence[str] = ()) -> list[str]:
    if not paths:
        places = "".join(f"\n  tried: {place}" for place in tried)
        raise DataError(
            f"source {source.name!r}: nothing is at {source.uri!r}; expected a file, a folder or a "
            f"glob that matches something{places}"
        )
    return paths


def _package_parts(source: SourceSpec) -> tuple[str, str]:
    package, _, file = source.uri.removeprefix(PACKAGE).partition("/")
    return package, file


def _package_folder(source: SourceSpec) -> Path:
    """The folder of an installed package, which is not imported."""
    package, _ = _package_parts(source)
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise SpecError(
            f"source {source.name!r}: package {package!r} of {source.uri!r} is not installed; add "
            "it to the project's dependencies"
        )
    return Path(next(iter(found.submodule_search_locations)))


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
        # Timestamps are read as text first: with a zone or without one.
        types[name] = pa.string() if kind == "timestamp" else _TYPES[kind]
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
    if "://" in source.uri and not source.uri.startswith((PACKAGE, "file://")):
        return [source.uri]
    return [str(root / name) for root, name in _places(source, folder)]


def _first_table(uris: Sequence[str]) -> str:
    return next((uri for uri in uris if Path(uri, "_delta_log").is_dir()), uris[0])


def _typed(table: pa.Table, source: SourceSpec) -> pa.Table:
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
