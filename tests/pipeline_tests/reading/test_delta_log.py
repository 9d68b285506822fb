import json
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pf
import pytest
from deltalake import DeltaTable, write_deltalake

from pipeline.errors import DataError, StoreError
from pipeline.reading.delta_log import Commit, live_files, open_delta, read_commit, schema_of_table
from pipeline.reading.files import RowFile, read_rows

AWKWARD = ["a b", "ü/%", "x=y", None, "1"]


def write(
    location: Path, *values: int, name: str | None = "a", mode: str = "append", **more: object
) -> None:
    rows = pa.table(
        {"n": pa.array(values, pa.int64()), "name": pa.array([name] * len(values), pa.string())}
    )
    write_deltalake(location, rows, mode=mode, **more)


def rows_of(
    files: list[RowFile] | tuple[RowFile, ...], location: Path
) -> list[tuple[int, str | None]]:
    schema = schema_of_table(open_delta(str(location), {}))
    batches = [batch for file in files for batch in read_rows(file, schema, pf.LocalFileSystem())]
    return sorted(
        ((row["n"], row["name"]) for batch in batches for row in batch.to_pylist()), key=str
    )


def commit_of(location: Path, version: int) -> Commit:
    return read_commit(pf.LocalFileSystem(), str(location), str(location), version)


def test_a_version_adds_its_own_files_and_a_snapshot_has_all(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        write(tmp_path, value)
    assert [rows_of(commit_of(tmp_path, version).added, tmp_path) for version in range(3)] == [
        [(1, "a")],
        [(2, "a")],
        [(3, "a")],
    ]
    assert rows_of(
        live_files(open_delta(str(tmp_path), {}, 1), str(tmp_path), str(tmp_path)), tmp_path
    ) == [(1, "a"), (2, "a")]


@pytest.mark.parametrize("name", AWKWARD)
def test_partition_values_come_from_the_log(tmp_path: Path, name: str | None) -> None:
    write(tmp_path, 1, name=name, partition_by=["name"])
    expected = [(1, name)]
    assert rows_of(commit_of(tmp_path, 0).added, tmp_path) == expected
    assert (
        rows_of(live_files(open_delta(str(tmp_path), {}), str(tmp_path), str(tmp_path)), tmp_path)
        == expected
    )


def test_compaction_changes_no_rows(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    DeltaTable(tmp_path).optimize.compact()
    commit = commit_of(tmp_path, 2)
    assert (commit.operation, commit.added, commit.takes_away) == ("OPTIMIZE", (), False)


@pytest.mark.parametrize("change", ["overwrite", "delete", "update"])
def test_versions_that_remove_or_rewrite_rows_say_so(tmp_path: Path, change: str) -> None:
    write(tmp_path, 1, 2)
    if change == "overwrite":
        write(tmp_path, 3, mode="overwrite")
    elif change == "delete":
        DeltaTable(tmp_path).delete("n = 1")
    else:
        DeltaTable(tmp_path).update(updates={"n": "5"}, predicate="n = 1")
    assert commit_of(tmp_path, 1).takes_away


def test_a_version_that_left_the_log_is_told_with_the_next_step(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(
        DataError, match=r"version 7 is no longer in the table's log.*new checkpoint"
    ):
        commit_of(tmp_path, 7)


@pytest.mark.parametrize(
    "path", ["../x.parquet", "/etc/x.parquet", "s3://other/x.parquet", "%2e%2e/x.parquet"]
)
def test_files_outside_the_table_and_deletion_vectors_are_refused(
    tmp_path: Path, path: str
) -> None:
    log = tmp_path / "_delta_log"
    log.mkdir()
    (log / f"{0:020}.json").write_text(json.dumps({"add": {"path": path, "dataChange": True}}))
    with pytest.raises(StoreError, match="outside the table"):
        commit_of(tmp_path, 0)
    (log / f"{1:020}.json").write_text(
        json.dumps(
            {"add": {"path": "x", "dataChange": True, "deletionVector": {"storageType": "u"}}}
        )
    )
    with pytest.raises(DataError, match="deletion vectors"):
        commit_of(tmp_path, 1)
