"""Every file that can be trained on can be scored: both readers agree."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.reading.files import ColumnTypes, local_files, read_rows, schema_of
from pipeline.reading.formats import FORMATS, KNOWN_ENDINGS, Format, format_as, format_of, is_hidden
from pipeline.reading.sources import read_source
from pipeline.spec import NULL_TEXTS, SourceSpec

LOCAL = pf.LocalFileSystem()
COLUMN_TYPES = ColumnTypes(numeric=frozenset({"sales"}))
TEXT_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
ROWS = [
    {"city": "oslo, north", "sales": 1.5},
    {"city": "roma", "sales": None},
    {"city": None, "sales": 3.0},
]


def text_of(ending: str) -> str:
    if ending.startswith((".csv", ".tsv")):
        delimiter = "\t" if ending.startswith(".tsv") else ","
        cells = [("city", "sales"), ('"oslo, north"', "1.5"), ("roma", "NA"), ("null", "3.0")]
        return "".join(f"{delimiter.join(row)}\n" for row in cells)
    return "".join(f"{json.dumps(row)}\n" for row in ROWS)


def write(path: Path, ending: str, *, text: str | None = None) -> None:
    """Write ROWS, or a text, in the format that an ending tells."""
    if ending.startswith((".parquet", ".pq")):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return
    content = (text if text is not None else text_of(ending)).encode()
    if ending.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif ending.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data/rows", content)
            archive.writestr("__MACOSX/data/._rows", "x")
    else:
        path.write_bytes(content)


def read_to_train(folder: Path, uri: str, **options: Any) -> list[dict[str, Any]]:
    source = SourceSpec(name="sales", uri=uri, **options)
    return [row for _, table in read_source(source, folder) for row in table.to_pylist()]


def read_to_score(address: Path | str) -> list[dict[str, Any]]:
    files = local_files(str(address))
    schema = schema_of(files, COLUMN_TYPES, LOCAL)
    rows = []
    for file in files:
        for batch in read_rows(file, schema, LOCAL, column_types=COLUMN_TYPES):
            rows.extend(batch.to_pylist())
    return rows


def test_the_table_of_formats_has_every_ending_that_is_documented() -> None:
    compressed = [
        f"{ending}{compression}" for ending in TEXT_ENDINGS for compression in (".gz", ".zip")
    ]
    assert {*TEXT_ENDINGS, *compressed, ".parquet", ".pq"} <= set(FORMATS)
    assert all(
        ending in KNOWN_ENDINGS for ending in (*TEXT_ENDINGS, ".parquet", ".pq", ".gz", ".zip")
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_training_and_scoring_read_the_same_rows(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"rows{ending}", ending)
    assert read_to_train(tmp_path, f"rows{ending}") == ROWS
    assert read_to_score(tmp_path / f"rows{ending}") == ROWS
    assert read_to_score(tmp_path) == ROWS


@pytest.mark.parametrize("ending", FORMATS)
def test_endings_may_be_written_in_capitals(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"ROWS{ending.upper()}", ending)
    assert read_to_train(tmp_path, f"ROWS{ending.upper()}") == read_to_score(tmp_path) == ROWS


def test_files_of_one_kind_are_read_together_each_as_its_own_name_tells(tmp_path: Path) -> None:
    endings = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".tsv.zip")
    for ending in endings:
        write(tmp_path / f"rows{ending}", ending)
    expected = ROWS * len(endings)
    assert read_to_score(tmp_path) == expected
    assert read_to_train(tmp_path, ".", format="csv") == expected


@pytest.mark.parametrize("text", [*NULL_TEXTS, "na", "None", " "])
@pytest.mark.parametrize("ending", [".csv", ".tsv.gz"])
def test_the_same_texts_mean_null(tmp_path: Path, ending: str, text: str) -> None:
    delimiter = "\t" if ending.startswith(".tsv") else ","
    write(tmp_path / f"rows{ending}", ending, text=f"city{delimiter}sales\n{text}{delimiter}1\n")
    expected = [{"city": None if text in NULL_TEXTS else text, "sales": 1}]
    assert read_to_train(tmp_path, f"rows{ending}") == read_to_score(tmp_path) == expected


def test_a_folder_that_is_called_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    (tmp_path / "sales.tsv").mkdir()
    write(tmp_path / "sales.tsv" / "part-0", ".tsv")
    assert read_to_train(tmp_path, "sales.tsv") == ROWS


@pytest.mark.parametrize(
    "ending", [".csv.gz", ".csv.zip", ".jsonl.gz", ".jsonl.zip", ".parquet", ".json"]
)
def test_a_damaged_file_is_named_by_both_readers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    write(path, ending)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" * 9)
    with pytest.raises(
        DataError,
        match=r"source 'sales': .*rows\S+ cannot be read as .*; correct the file, or the source's",
    ):
        read_to_train(tmp_path, path.name)
    with pytest.raises(DataError, match=r"rows\S+ cannot be read as .*; repair or remove the file"):
        read_to_score(path)


def test_an_archive_of_several_files_is_refused_by_both_readers(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.csv.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, text_of(".csv"))
    for read in (lambda: read_to_train(tmp_path, "rows.csv.zip"), lambda: read_to_score(tmp_path)):
        with pytest.raises(
            DataError, match=r"the archive holds 2 files, expected one: a\.csv, b\.csv"
        ):
            read()


def test_json_that_is_not_lines_is_told_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    for read in (lambda: read_to_train(tmp_path, "rows.json"), lambda: read_to_score(tmp_path)):
        with pytest.raises(
            DataError, match=r"rows\.json cannot be read as JSON lines \(one object per line\)"
        ):
            read()


def test_a_json_object_may_be_longer_than_a_megabyte(tmp_path: Path) -> None:
    rows = [{"city": "x" * (3 << 20), "sales": 1.5}, {"city": "y", "sales": 2.5}]
    write(tmp_path / "rows.json.gz", ".json.gz", text="\n".join(map(json.dumps, rows)))
    assert read_to_train(tmp_path, "rows.json.gz") == read_to_score(tmp_path) == rows


def test_a_kind_that_is_known_from_elsewhere_leaves_compression_and_delimiter_to_the_name() -> None:
    assert format_as("a/rows.txt.gz", "csv") == Format("csv", compression="gzip")
    assert format_as("a/rows.TSV.ZIP", "csv") == Format("csv", delimiter="\t", compression="zip")
    assert format_as("a/rows.csv.gz", "json") == Format("json", compression="gzip")
    assert format_as("a/part-0.gz", "parquet") == Format("parquet")
    assert format_as("a/part-0", "csv") == Format("csv")


@pytest.mark.parametrize(
    "name", ["rows", "rows.zip", "rows.gz", "rows.txt", "rows.xlsx", "csv", "rows.csv.bak"]
)
def test_other_names_tell_no_format(name: str) -> None:
    assert format_of(f"folder.csv/{name}") is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a/b.csv", False), (".a.csv", True), ("_temporary/b.csv", True), ("a_b/c.csv", False)],
)
def test_names_with_a_dot_or_an_underscore_in_front_are_hidden(path: str, expected: bool) -> None:
    assert is_hidden(path) is expected
