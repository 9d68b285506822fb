"""File formats: the table of known endings, hidden names, and one way to list, open and parse.

Sources of a fleet and rows to score are read through this module, so that whatever a fleet was
trained on can be scored, too.
"""

import glob
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.fs as pf
import pyarrow.json as pj

from pipeline.errors import UnreadableFile

Kind = Literal["parquet", "csv", "json"]
Compression = Literal["gzip", "zip"]

JSON_BLOCK_BYTES = 16 << 20  # an object must fit into one block
# What a damaged file, or one of another format, makes its reader raise. RuntimeError is what
# zipfile raises for an encrypted archive or an unknown compression method.
UNREADABLE = (
    pa.ArrowException,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Format:
    """How a file is to be read.

    Args:
        kind: Parquet, separated text, or one JSON object per line.
        delimiter: between the columns of separated text.
        compression: around the whole file; None for Parquet, which compresses its own pages.
    """

    kind: Kind
    delimiter: str = ","
    compression: Compression | None = None


_PARQUET = Format("parquet")
_TEXT_FORMATS: Mapping[str, Format] = {
    ".csv": Format("csv"),
    ".tsv": Format("csv", delimiter="\t"),
    ".json": Format("json"),
    ".jsonl": Format("json"),
    ".ndjson": Format("json"),
}
_COMPRESSIONS: Mapping[str, Compression] = {".gz": "gzip", ".zip": "zip"}


def _known_formats() -> dict[str, Format]:
    # Some writers put the codec of a Parquet file's pages into its name: x.parquet.gz is Parquet.
    formats = dict.fromkeys((".parquet", ".pq", ".parquet.gz", ".pq.gz"), _PARQUET)
    for ending, text_format in _TEXT_FORMATS.items():
        formats[ending] = text_format
        for compressed, compression in _COMPRESSIONS.items():
            formats[f"{ending}{compressed}"] = replace(text_format, compression=compression)
    return formats


FORMATS: Mapping[str, Format] = _known_formats()
KNOWN_ENDINGS = ".parquet, .pq, .csv, .tsv, .json, .jsonl, .ndjson (text also as .gz or .zip)"
_KIND_NAMES: Mapping[Kind, str] = {
    "parquet": "parquet",
    "csv": "csv",
    "json": "JSON lines (one object per line)",
}


def suffix_of(path: str) -> str:
    """The known ending of a file's name, `.csv.gz` as a whole; empty if the name has none."""
    name = PurePosixPath(path).name.lower()
    return max(filter(name.endswith, FORMATS), key=len, default="")


def format_of(path: str) -> Format | None:
    """The format that a file's name tells; None if it tells none."""
    return FORMATS.get(suffix_of(path))


def format_as(path: str, kind: Kind) -> Format:
    """The format of a file whose kind is known from elsewhere, whatever its name.

    Args:
        path: its name still tells the compression and, for separated text, the delimiter.
        kind: overrides the kind that the name would tell.
    """
    if kind == "parquet":
        return _PARQUET
    by_name = format_of(path)
    if by_name is not None and by_name.kind == kind:
        return by_name
    ending = PurePosixPath(path).suffix.lower()
    return Format(kind, compression=_COMPRESSIONS.get(ending))


def is_glob(address: str) -> bool:
    """Whether an address holds glob characters."""
    return not set(address).isdisjoint("*?[")


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder around it, belongs to another program (`.part`, `_temporary`)."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(path).parts)


def list_local(folder: Path, name: str) -> list[str]:
    """The files at an address on this machine, in the order of their paths.

    Args:
        folder: that a relative name starts from; its own glob characters are literal.
        name: a file, a folder (read with everything below it, except hidden files), or a glob.
    """
    address = folder / name
    if address.is_dir():
        paths = []
        for path in address.rglob("*"):
            if path.is_file() and not is_hidden(str(path.relative_to(address))):
                paths.append(str(path))
        return sorted(paths)
    # A file whose own name holds glob characters is meant literally.
    if address.is_file():
        return [str(address)]
    pattern = str(Path(glob.escape(str(folder))) / name)
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return sorted(path for path in matches if Path(path).is_file())


def open_file(path: str, file_format: Format, filesystem: pf.FileSystem) -> pa.NativeFile:
    """A file's uncompressed bytes, as a stream; Parquet can be read at any position.

    Raises:
        ValueError: if a zip archive does not hold exactly one file.
        Exception: any of `UNREADABLE`, here or while reading, if the file is damaged.
    """
    if file_format.kind == "parquet":
        return filesystem.open_input_file(path)
    if file_format.compression == "zip":
        with filesystem.open_input_file(path) as opened:
            return pa.BufferReader(_only_member(opened))
    return filesystem.open_input_stream(path, compression=file_format.compression)


def _only_member(opened: pa.NativeFile) -> bytes:
    """The content of the one file in an archive, beside what operating systems leave there."""
    with zipfile.ZipFile(opened) as archive:
        names = []
        for name in archive.namelist():
            if not name.endswith("/") and not is_hidden(name):
                names.append(name)
        if len(names) > 1:
            raise ValueError(
                f"the archive holds {len(names)} files, expected one: {', '.join(names)}"
            )
        if not names:
            raise ValueError("the archive holds 0 files, expected one")
        return archive.read(names[0])


def csv_parsing(file_format: Format) -> pv.ParseOptions:
    """How separated text is taken apart; a quoted cell may hold line breaks."""
    return pv.ParseOptions(delimiter=file_format.delimiter, newlines_in_values=True)


def csv_conversion(
    types: Mapping[str, pa.DataType] | pa.Schema, nulls: Sequence[str]
) -> pv.ConvertOptions:
    """How the cells of separated text become values.

    Args:
        types: of columns whose type is not to be guessed.
        nulls: texts that mean null, in columns of text, too.
    """
    return pv.ConvertOptions(column_types=types, null_values=list(nulls), strings_can_be_null=True)


def json_blocks() -> pj.ReadOptions:
    """How much of a file of JSON lines is parsed at once."""
    return pj.ReadOptions(block_size=JSON_BLOCK_BYTES)


def unreadable(
    name: str, kind: Kind, error: Exception, next_step: str = "repair or remove the file"
) -> UnreadableFile:
    """The error about a file that cannot be read.

    Args:
        name: of the file, as people know it.
        kind: that it was read as.
        error: of the reader.
        next_step: what to do about it.
    """
    return UnreadableFile(f"{name} cannot be read as {_KIND_NAMES[kind]} ({error}); {next_step}")
