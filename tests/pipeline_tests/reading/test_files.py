import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.reading.files import (
    ColumnTypes,
    RowFile,
    constant_of,
    local_files,
    plain_type,
    read_rows,
    row_file,
    schema_of,
)

COLUMN_TYPES = ColumnTypes(numeric=frozenset({"price"}), integer_keys=frozenset({"store"}))
LOCAL = pf.LocalFileSystem()


def read(
    address: Path | str, column_types: ColumnTypes = COLUMN_TYPES, **more: Any
) -> pd.DataFrame:
    files = local_files(str(address))
    schema = schema_of(files, column_types, LOCAL)
    batches = [
        batch
        for file in files
        for batch in read_rows(file, schema, LOCAL, column_types=column_types, **more)
    ]
    return pa.Table.from_batches(batches, schema=schema).to_pandas()


def test_csv_columns_are_found_by_name_in_whatever_order_each_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("store,price\nx,1.5\n")
    (tmp_path / "b.csv").write_text("price,extra,store\n2,e,y\n")
    assert read(tmp_path).to_dict("list") == {
        "store": ["x", "y"],
        "price": [1.5, 2.0],
        "extra": [None, "e"],
    }


def test_csv_text_stays_text_and_what_training_took_for_null_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'code,price,when\n007,NA,2024-01-01T00:00:00\nNA,,\n"a\nb",1e3,x\n'
    )
    found = read(tmp_path / "a.csv")
    assert found["code"].tolist() == ["007", None, "a\nb"]
    assert found["when"].tolist() == ["2024-01-01T00:00:00", None, "x"]
    assert found["price"].isna().tolist() == [True, True, False]


def test_an_integer_key_that_pandas_wrote_beside_nulls_is_that_integer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("store,price,text\n1.0,1,1.0\n,1,1.0\n9007199254740993,1,1.0\n")
    (tmp_path / "b.csv").write_text("store,price,text\n7.0,1,7.0\n-3.00,1,\n1.5,1,\nv1.0,1,\n")
    found = read(tmp_path)
    assert found["store"].tolist() == ["1", None, "9007199254740993", "7", "-3", "1.5", "v1.0"]
    assert found["text"].tolist()[:4] == ["1.0", "1.0", "1.0", "7.0"]


@pytest.mark.parametrize(
    "value", [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.123456789]
)
def test_numbers_of_text_are_read_to_the_last_bit(tmp_path: Path, value: float) -> None:
    (tmp_path / "a.csv").write_text(f"price\n{value!r}\n")
    (tmp_path / "b.jsonl").write_text(f'{{"price": {value!r}}}\n')
    for name in ("a.csv", "b.jsonl"):
        assert read(tmp_path / name)["price"].to_numpy().tobytes() == np.float64(value).tobytes()


def test_a_number_that_is_none_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("price\n1\nabc\n")
    with pytest.raises(
        DataError, match=r"a\.csv cannot be read as csv .*abc.*repair or remove the file"
    ):
        read(tmp_path)


def test_json_lines_keep_text_that_looks_like_a_moment(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(
            '{"price": 1, "when": "2024-01-01T00:00:00", "n": 3}\n{"price": null, '
            '"other": [1, 2]}\n'
        )
    found = read(tmp_path)
    assert found["when"].tolist() == ["2024-01-01T00:00:00", None]
    assert found["price"].tolist()[0] == 1.0


@pytest.mark.parametrize(
    "kind",
    [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float32",
        "float64",
    ],
)
def test_numbers_of_any_width_are_read(tmp_path: Path, kind: str) -> None:
    pq.write_table(
        pa.table({"n": pa.array([1, None, 100], pa.type_for_alias(kind))}), tmp_path / "a.parquet"
    )
    found = read(tmp_path)["n"]
    assert [None if pd.isna(value) else int(value) for value in found] == [1, None, 100]


def test_widths_that_differ_between_files_become_the_wider_one(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"n": pa.array([1], pa.int32()), "x": pa.array([1.5], pa.float32())}),
        tmp_path / "a.parquet",
    )
    pq.write_table(
        pa.table({"x": pa.array([2], pa.int64()), "n": pa.array([1 << 40], pa.int64())}),
        tmp_path / "b.parquet",
    )
    assert read(tmp_path).to_dict("list") == {"n": [1, 1 << 40], "x": [1.5, 2.0]}


def test_types_that_spark_lacks_become_those_that_hold_them() -> None:
    assert plain_type(pa.dictionary(pa.int8(), pa.large_string())) == pa.string()
    assert plain_type(pa.timestamp("ns", tz="Europe/Berlin")) == pa.timestamp("us", tz="UTC")
    assert plain_type(pa.timestamp("s")) == pa.timestamp("us")
    assert plain_type(pa.null()) == pa.string()
    assert plain_type(pa.int64()) == pa.int64()


def test_folders_give_the_columns_that_their_names_say(tmp_path: Path) -> None:
    for part, value in (("store=a%20b", 1), ("store=__HIVE_DEFAULT_PARTITION__", 2)):
        (tmp_path / part / "_temporary").mkdir(parents=True)
        pq.write_table(pa.table({"n": [value]}), tmp_path / part / "x.parquet")
        (tmp_path / part / "_temporary" / "y.parquet").write_bytes(b"half")
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    assert sorted(read(tmp_path)[["n", "store"]].to_numpy().tolist(), key=str) == [
        [1, "a b"],
        [2, None],
    ]
    assert row_file(f"{tmp_path}/price=2/x.parquet", str(tmp_path)) == RowFile(
        f"{tmp_path}/price=2/x.parquet", "parquet", {"price": "2"}
    )


def test_a_file_that_lacks_a_required_column_is_named_with_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("store,price\nx,1\n")
    (tmp_path / "b.csv").write_text("store,cost\nx,1\n")
    with pytest.raises(DataError, match=r"b\.csv: missing columns: price; it has: store, cost"):
        read(tmp_path, required=["price"])


def test_addresses_with_nothing_or_too_much_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no rows are at .*; expected a Delta table, or a file, folder or glob of \.parquet",
    ):
        local_files(str(tmp_path / "gone"))
    (tmp_path / "README.txt").touch()
    with pytest.raises(DataError, match=r"README\.txt"):
        local_files(str(tmp_path))
    (tmp_path / "a.csv").write_text("x\n1\n")
    assert [file.path for file in local_files(str(tmp_path))] == [str(tmp_path / "a.csv")]
    (tmp_path / "b.json").write_text("{}\n")
    with pytest.raises(DataError, match=r"several formats \(\.csv, \.json\)"):
        local_files(str(tmp_path))
    assert [file.kind for file in local_files(f"{tmp_path}/*.json")] == ["json"]


def test_a_name_with_glob_characters_is_meant_literally(tmp_path: Path) -> None:
    folder = tmp_path / "a [x]"
    folder.mkdir()
    (folder / "b[1].csv").write_text("x\n1\n")
    assert (
        local_files(str(folder))
        == local_files(str(folder / "b[1].csv"))
        == [RowFile(str(folder / "b[1].csv"), "csv")]
    )


def test_a_moment_without_a_zone_is_utc() -> None:
    kind = pa.timestamp("us", tz="UTC")
    assert constant_of("2024-01-01 00:00:00", kind) == constant_of(
        "2024-01-01T01:00:00+01:00", kind
    )
    assert constant_of("5", pa.int32()).as_py() == 5
    assert constant_of("true", pa.bool_()).as_py() is True
