"""Raw data as its owner left it: read from a path, a glob, an object store or an installed package, as Arrow tables."""

import glob
import gzip
import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.fs as pf
import pyarrow.json as pj
import pyarrow.parquet as pq

from pipeline.errors import DataError, SpecError
from pipeline.spec import SourceSpec

PACKAGE = "package://"
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
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
        folder: folder of the defs.yaml, from which a relative path counts.

    Yields:
        The file's address and its rows; all tables of one source share a schema only as far as the files do.

    Raises:
        SpecError: if the uri names no package, or the format cannot be told.
        DataError: if no file is found, or one cannot be read as its format.
    """
    kind = source.format or _format_of(source)
    if kind == "delta":
        yield source.uri, _read_delta(source, folder)
        return
    filesystem, paths = _locate(source, folder)
    for path in paths:
        try:
            with filesystem.open_input_file(path) as stream:
                yield path, _readers()[kind](_plain_bytes(stream, path, kind), source)
        except (pa.ArrowException, OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"source {source.name!r}: {path} cannot be read as {kind} ({error}); correct the file or the source's format") from error


def _format_of(source: SourceSpec) -> str:
    name = source.uri.removesuffix(".gz").removesuffix(".zip")
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise SpecError(
            f"source {source.name!r}: format of {source.uri!r} cannot be told from its ending; set format to csv, parquet, delta or jsonl"
        )
    return SUFFIXES[suffix]


def _locate(source: SourceSpec, folder: Path) -> tuple[pf.FileSystem, list[str]]:
    """The file system and the sorted files of a uri."""
    uri = source.uri
    if "://" in uri and not uri.startswith((PACKAGE, "file://")):
        filesystem, path = pf.FileSystem.from_uri(uri)
        info = filesystem.get_file_info(path)
        if info.type == pf.FileType.Directory:
            found = filesystem.get_file_info(pf.FileSelector(path, recursive=True))
            return filesystem, _found(source, sorted(entry.path for entry in found if entry.is_file and not _hidden(entry.path)))
        return filesystem, _found(source, [path] if info.type == pf.FileType.File else [])
    local = str(_package_file(source) if uri.startswith(PACKAGE) else folder / uri.removeprefix("file://"))
    if Path(local).is_dir():
        return pf.LocalFileSystem(), _found(source, sorted(str(path) for path in Path(local).rglob("*") if path.is_file() and not _hidden(str(path))))
    # A file whose own name holds glob characters is meant literally.
    paths = [local] if Path(local).is_file() else sorted(glob.glob(local, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    return pf.LocalFileSystem(), _found(source, paths)


def _hidden(path: str) -> bool:
    return Path(path).name.startswith((".", "_"))


def _found(source: SourceSpec, paths: list[str]) -> list[str]:
    if not paths:
        raise DataError(f"source {source.name!r}: nothing is at {source.uri!r}; expected a file, a folder or a glob that matches something")
    return paths


def _package_file(source: SourceSpec) -> Path:
    """A file inside an installed package, which is not imported."""
    package, _, file = source.uri.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SpecError(f"source {source.name!r}: package {package!r} of {source.uri!r} is not installed; add it to the project's dependencies")
    return Path(next(iter(found.submodule_search_locations))) / file


def _plain_bytes(stream: pa.NativeFile, path: str, kind: str) -> io.IOBase | pa.NativeFile:
    if kind == "parquet":
        return stream
    if path.endswith(".gz"):
        return gzip.open(stream)
    if path.endswith(".zip"):
        archive = zipfile.ZipFile(stream)
        files = [name for name in archive.namelist() if not name.endswith("/") and not _hidden(name) and "__MACOSX" not in name]
        if len(files) != 1:
            raise ValueError(f"the archive holds {len(files)} files, expected one: {', '.join(files)}")
        return io.BytesIO(archive.read(files[0]))
    return stream


def _readers() -> dict[str, Callable[..., pa.Table]]:
    return {"csv": _read_csv, "parquet": _read_parquet, "jsonl": _read_jsonl}


def _read_csv(stream: io.IOBase, source: SourceSpec) -> pa.Table:
    options = pc.ConvertOptions(
        column_types={name: _TYPES[kind] for name, kind in source.types.items()}, null_values=list(source.null_values), strings_can_be_null=True
    )
    delimiter = "\t" if ".tsv" in source.uri else ","
    return pc.read_csv(stream, convert_options=options, parse_options=pc.ParseOptions(delimiter=delimiter, newlines_in_values=True))


def _read_parquet(stream: pa.NativeFile, source: SourceSpec) -> pa.Table:
    return _typed(pq.read_table(stream), source)


def _read_jsonl(stream: io.IOBase, source: SourceSpec) -> pa.Table:
    return _typed(pj.read_json(stream), source)


def _read_delta(source: SourceSpec, folder: Path) -> pa.Table:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    uri = str(_package_file(source)) if source.uri.startswith(PACKAGE) else source.uri
    try:
        return _typed(DeltaTable(uri if "://" in uri else str(folder / uri)).to_pyarrow_table(), source)
    except (DeltaError, OSError) as error:
        raise DataError(f"source {source.name!r}: {source.uri!r} cannot be read as a Delta table ({error})") from error


def _typed(table: pa.Table, source: SourceSpec) -> pa.Table:
    for name, kind in source.types.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(_TYPES[kind]))
    return table
