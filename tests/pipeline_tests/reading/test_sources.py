import gzip
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from pipeline.errors import DataError, SpecError
from pipeline.reading.sources import read_source
from pipeline.spec import SourceSpec

CSV = "city,sales\noslo,1.5\nroma,NA\n"
ROWS = [{"city": "oslo", "sales": 1.5}, {"city": "roma", "sales": None}]


def read(folder: Path, uri: str, **options: Any) -> list[dict[str, Any]]:
    tables = [
        table for _, table in read_source(SourceSpec(name="sales", uri=uri, **options), folder)
    ]
    return [row for table in tables for row in table.to_pylist()]


def written(path: Path, text: str = CSV) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def zipped(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_csv(tmp_path: Path) -> None:
    written(tmp_path / "sales.csv")
    assert read(tmp_path, "sales.csv") == ROWS


def test_a_path_may_be_absolute_or_a_file_url(tmp_path: Path) -> None:
    path = written(tmp_path / "sales.csv")
    assert read(Path("/nowhere"), str(path)) == ROWS
    assert read(Path("/nowhere"), f"file://{path}") == ROWS


def test_tabs_separate_a_tsv(tmp_path: Path) -> None:
    written(tmp_path / "sales.tsv", CSV.replace(",", "\t"))
    assert read(tmp_path, "sales.tsv") == ROWS


def test_zipped_csv(tmp_path: Path) -> None:
    zipped(tmp_path / "sales.csv.zip", **{"sales.csv": CSV})
    assert read(tmp_path, "sales.csv.zip") == ROWS


def test_what_macs_and_editors_leave_in_an_archive_does_not_count(tmp_path: Path) -> None:
    zipped(
        tmp_path / "sales.csv.zip",
        **{"data/": "", "data/sales.csv": CSV, "__MACOSX/data/sales.csv": "x", ".DS_Store": "x"},
    )
    assert read(tmp_path, "sales.csv.zip") == ROWS


@pytest.mark.parametrize("files", [{"data/": ""}, {"a.csv": CSV, "b.csv": CSV}])
def test_an_archive_of_any_other_number_of_files_is_refused(
    tmp_path: Path, files: dict[str, str]
) -> None:
    zipped(tmp_path / "sales.csv.zip", **files)
    with pytest.raises(
        DataError, match=f"the archive holds {sum(map(bool, files.values()))} files, expected one"
    ):
        read(tmp_path, "sales.csv.zip")


def test_gzipped_csv(tmp_path: Path) -> None:
    (tmp_path / "sales.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    assert read(tmp_path, "sales.csv.gz") == ROWS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "sales.parquet")
    assert read(tmp_path, "sales.parquet") == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / f"sales.{ending}").write_bytes(
        gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()
    )
    assert read(tmp_path, f"sales.{ending}") == ROWS


def test_delta(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "sales"), pa.Table.from_pylist(ROWS))
    assert read(tmp_path, "sales", format="delta") == ROWS
    assert read(tmp_path, "sales", format="delta", types={"sales": "string"})[0] == {
        "city": "oslo",
        "sales": "1.5",
    }


def test_a_folder_that_is_no_delta_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere' cannot be read as a Delta table"):
        read(tmp_path, "nowhere", format="delta")


def test_a_glob_is_read_in_the_order_of_names_each_file_with_its_address(tmp_path: Path) -> None:
    for name in ("sales-2.csv", "sales-1.csv", "other.csv"):
        written(tmp_path / name)
    found = list(read_source(SourceSpec(name="sales", uri="sales-*.csv"), tmp_path))
    assert [Path(path).name for path, _ in found] == ["sales-1.csv", "sales-2.csv"]
    assert [table.num_rows for _, table in found] == [2, 2]


def test_a_glob_reaches_into_folders(tmp_path: Path) -> None:
    written(tmp_path / "2024" / "01" / "sales.csv")
    assert read(tmp_path, "**/sales.csv") == ROWS
    assert read(tmp_path, "20*/*/sales.csv") == ROWS


def test_a_folder_is_read_without_hidden_files(tmp_path: Path) -> None:
    written(tmp_path / "sales" / "a" / "1.csv")
    for hidden in (
        ".part.crc",
        "_SUCCESS",
        ".ipynb_checkpoints/1-checkpoint.csv",
        "_temporary/2.csv",
    ):
        written(tmp_path / "sales" / hidden, "damaged\n1\n")
    assert read(tmp_path, "sales", format="csv") == ROWS


def test_a_project_in_a_hidden_folder_is_read(tmp_path: Path) -> None:
    written(tmp_path / ".project" / "_sales" / "1.csv")
    assert read(tmp_path / ".project", "_sales", format="csv") == ROWS


@pytest.mark.parametrize(
    "name",
    [
        "sales [1].csv",
        "sal*es.csv",
        "what?.csv",
        "a b.csv",
        "Verkäufe.csv",
        "100%20.csv",
        "a#b.csv",
    ],
)
def test_a_file_whose_name_holds_odd_characters_is_meant_literally(
    tmp_path: Path, name: str
) -> None:
    written(tmp_path / name)
    assert read(tmp_path, name) == ROWS


@pytest.mark.parametrize("folder", ["a [b]", "100*", "Ordner für x", "a?"])
def test_a_project_folder_whose_name_holds_odd_characters_is_no_glob(
    tmp_path: Path, folder: str
) -> None:
    written(tmp_path / folder / "sales-1.csv")
    assert read(tmp_path / folder, "sales-*.csv") == ROWS
    assert read(tmp_path / folder, "sales-1.csv") == ROWS


def test_a_file_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "somepackage" / "data" / "sales.csv")
    written(tmp_path / "somepackage" / "__init__.py", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read(Path("/nowhere"), "package://somepackage/data/sales.csv") == ROWS
    assert read(Path("/nowhere"), "package://somepackage/data/*.csv") == ROWS
    assert "somepackage" not in sys.modules


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.inner", ""])
def test_a_package_that_is_not_installed_is_named(tmp_path: Path, package: str) -> None:
    with pytest.raises(
        SpecError, match=f"package '{package}' of 'package://{package}/x.csv' is not installed"
    ):
        read(tmp_path, f"package://{package}/x.csv")


def test_types_override_what_would_be_guessed(tmp_path: Path) -> None:
    written(tmp_path / "x.csv", "zip,n,day\n01234,1,2024-01-31\n")
    assert read(tmp_path, "x.csv")[0]["zip"] == 1234
    typed = read(tmp_path, "x.csv", types={"zip": "string", "n": "double", "day": "timestamp"})[0]
    assert typed == {"zip": "01234", "n": 1.0, "day": pd.Timestamp("2024-01-31", tz="UTC")}


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-31 12:30:00",
        "2024-01-31T12:30:00Z",
        "2024-01-31T14:30:00+02:00",
        "2024-01-31 12:30:00.000001",
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_timestamps_without_a_zone_are_utc(tmp_path: Path, text: str, ending: str) -> None:
    written(
        tmp_path / f"x.{ending}", f"at\n{text}\n" if ending == "csv" else json.dumps({"at": text})
    )
    [row] = read(tmp_path, f"x.{ending}", types={"at": "timestamp"})
    assert row["at"].replace(microsecond=0) == pd.Timestamp("2024-01-31 12:30", tz="UTC")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_types_are_cast_in_typed_formats(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"n": [1, 2]}), path)
    else:
        path.write_text('{"n": 1}\n{"n": 2}\n')
    assert read(tmp_path, path.name, types={"n": "string"}) == [{"n": "1"}, {"n": "2"}]


def test_a_value_that_is_not_of_its_type_is_told_with_the_file(tmp_path: Path) -> None:
    written(tmp_path / "x.csv")
    with pytest.raises(
        DataError, match=r"source 'sales': .*x\.csv cannot be read as csv"
    ) as caught:
        read(tmp_path, "x.csv", types={"city": "long"})
    assert "oslo" in str(caught.value)


def test_texts_that_mean_null_are_chosen_by_the_source(tmp_path: Path) -> None:
    written(tmp_path / "x.csv", "a,b\n-,NA\n")
    assert read(tmp_path, "x.csv", null_values=["-"]) == [{"a": None, "b": "NA"}]


def test_quoted_line_breaks_stay_in_their_cell(tmp_path: Path) -> None:
    written(tmp_path / "x.csv", 'a,b\n"one\ntwo",3\n')
    assert read(tmp_path, "x.csv") == [{"a": "one\ntwo", "b": 3}]


def test_a_header_alone_is_an_empty_table_with_its_columns(tmp_path: Path) -> None:
    written(tmp_path / "x.csv", "city,sales\n")
    [(_, table)] = read_source(SourceSpec(name="sales", uri="x.csv"), tmp_path)
    assert (table.num_rows, table.column_names) == (0, ["city", "sales"])


def test_a_file_of_no_bytes_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "x.csv", "")
    with pytest.raises(DataError, match=r"x\.csv cannot be read as csv"):
        read(tmp_path, "x.csv")


@pytest.mark.parametrize("uri", ["nowhere.csv", "nowhere-*.csv", "no/where.parquet"])
def test_nothing_at_the_address_is_told(tmp_path: Path, uri: str) -> None:
    with pytest.raises(DataError, match="source 'sales': nothing is at") as caught:
        read(tmp_path, uri)
    assert repr(uri) in str(caught.value)
    assert f"tried: {tmp_path}/{uri}" in str(caught.value)


def test_a_relative_path_counts_from_the_fleet_first_and_then_from_the_repository(
    tmp_path: Path,
) -> None:
    fleet = tmp_path / "pipeline" / "defs" / "shop"
    (tmp_path / "data").mkdir()
    fleet.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "data" / "x.csv").write_text(CSV)
    assert len(read(fleet, "data/x.csv")) == 2
    with pytest.raises(DataError) as caught:
        read(fleet, "data/y.csv")
    assert f"tried: {fleet}/data/y.csv" in str(caught.value)
    assert f"tried: {tmp_path}/data/y.csv" in str(caught.value)
    (fleet / "data").mkdir()
    (fleet / "data" / "x.csv").write_text(CSV.splitlines()[0] + "\n")
    assert len(read(fleet, "data/x.csv")) == 0


def test_a_delta_table_too_is_found_from_the_repository(tmp_path: Path) -> None:
    fleet = tmp_path / "pipeline" / "defs" / "shop"
    fleet.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    write_deltalake(str(tmp_path / "table"), pa.table({"a": [1]}))
    assert len(read(fleet, "table", format="delta")) == 1


def test_a_value_that_is_not_a_timestamp_is_told_with_its_column(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("day\n2024-01-01\n14.03.2024\n")
    with pytest.raises(DataError, match=r"column 'day' as timestamp: .*14\.03\.2024"):
        read(tmp_path, "x.csv", types={"day": "timestamp"})


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is at"):
        read(tmp_path, ".", format="csv")


@pytest.mark.parametrize("uri", ["sales.xlsx", "sales", "sales.zip", "data/"])
def test_a_format_that_cannot_be_told_must_be_set(tmp_path: Path, uri: str) -> None:
    with pytest.raises(SpecError, match="set format to csv, parquet, delta or jsonl"):
        read(tmp_path, uri)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.parquet", b"not parquet at all"),
        ("x.parquet", b"PAR1"),
        ("x.jsonl", b'{"a": 1'),
        ("x.csv", b"a,b\n1,2,3\n"),
        ("x.csv", b"a\n\xff\xfe\n"),
        ("x.csv.gz", b"not gzip"),
        ("x.csv.gz", gzip.compress(CSV.encode() * 100)[:-20]),
        (
            "x.csv.gz",
            gzip.compress(CSV.encode() * 100)[:15]
            + b"\xff" * 9
            + gzip.compress(CSV.encode() * 100)[24:],
        ),
        ("x.csv.zip", b"PK\x03\x04 truncated"),
    ],
)
def test_a_damaged_or_wrong_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read as") as caught:
        read(tmp_path, name)
    assert "correct the file, or the source's format or types" in str(caught.value)
