"""One contract, every place that tables are kept in: awkward local roots, an object store, and the double in memory."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import StoreError
from pipeline.storage import AppTransaction, WrittenFile
from pipeline.tables import ALL, Column, TableContract, in_format
from pipeline.testing.doubles import FailingTables, MemoryTables
from pipeline.testing.tables import write_arrow
from resources.delta_tables import DeltaTables, contract_metadata

SCHEMA = pa.schema([("x", pa.int64()), ("name", pa.string())])
LOCAL = ["plain", "a space", "glob[x]*?{y}", "Ümläut 🐟", "50% off? #1"]
BUCKET = "fleets"


@pytest.fixture(params=[*LOCAL, "s3"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> DeltaTables:
    if request.param == "s3":
        options = request.getfixturevalue("object_store")
        return DeltaTables(root=f"s3://{BUCKET}/{tmp_path.name}", storage_options=options)
    return DeltaTables(root=str(tmp_path / request.param))


@pytest.fixture(params=["plain", "s3", "memory"])
def any_tables(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return MemoryTables()
    if request.param == "s3":
        return DeltaTables(
            root=f"s3://{BUCKET}/{tmp_path.name}",
            storage_options=request.getfixturevalue("object_store"),
        )
    return DeltaTables(root=str(tmp_path))


@pytest.fixture
def local(tmp_path: Path) -> DeltaTables:
    return DeltaTables(root=str(tmp_path))


def rows(*values: int, name: str | None = "a") -> pa.Table:
    return pa.table(
        {"x": pa.array(values, pa.int64()), "name": pa.array([name] * len(values), pa.string())}
    )


def values(tables: Any, location: str) -> list[int]:
    return sorted(tables.read_arrow(location).column("x").to_pylist())


def spark_rows(spark: SparkSession, *pairs: tuple[int | None, str | None]) -> DataFrame:
    return spark.createDataFrame(list(pairs), "x long, name string")


def as_set(frame: DataFrame) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in frame.collect()}


# The contract, from the driver.


def test_what_is_written_is_read(any_tables: Any) -> None:
    location = any_tables.location("shop", "raw", "sales")
    assert location == f"{any_tables.root}/shop/raw/sales"
    assert not any_tables.exists(location)
    assert (
        write_arrow(
            any_tables, [rows(1, 2), rows(), rows(3, name=None)], SCHEMA, location, mode="overwrite"
        )
        == 0
    )
    assert any_tables.exists(location)
    assert any_tables.version(location) == 0
    found = any_tables.read_arrow(location)
    assert sorted(found.to_pylist(), key=lambda row: row["x"]) == [
        {"x": 1, "name": "a"},
        {"x": 2, "name": "a"},
        {"x": 3, "name": None},
    ]
    assert any_tables.read_arrow(location, where={"name": "a"}, columns=["x"]).num_rows == 2
    assert list(any_tables.read_pandas(location, where={"name": "none such"}).columns) == [
        "x",
        "name",
    ]


def test_append_adds_and_overwrite_replaces(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    write_arrow(any_tables, [rows(1)], SCHEMA, location, mode="append")
    assert write_arrow(any_tables, [rows(2)], SCHEMA, location, mode="append") == 1
    assert values(any_tables, location) == [1, 2]
    assert write_arrow(any_tables, [rows(3)], SCHEMA, location, mode="overwrite") == 2
    assert values(any_tables, location) == [3]


def test_a_commit_of_one_transaction_happens_once(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    for number, expected in [
        (0, [0]),
        (0, [0]),
        (1, [0, 1]),
        (1, [0, 1]),
        (0, [0, 1]),
        (2, [0, 1, 2]),
    ]:
        file = any_tables.write_file(rows(number), SCHEMA, location)
        any_tables.commit(
            location, [file], SCHEMA, mode="append", app=AppTransaction("run-1/ledger", number)
        )
        assert values(any_tables, location) == expected
    file = any_tables.write_file(rows(9), SCHEMA, location)
    any_tables.commit(
        location, [file], SCHEMA, mode="append", app=AppTransaction("run-2/ledger", 0)
    )
    assert values(any_tables, location) == [0, 1, 2, 9]


def test_what_an_application_committed_last_is_known(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    assert any_tables.transaction(location, "stream") is None
    any_tables.create(location, SCHEMA)
    any_tables.create(location, SCHEMA)
    assert any_tables.transaction(location, "stream") is None
    assert (
        any_tables.version(location),
        values(any_tables, location),
        any_tables.layout(location)[0].names,
    ) == (0, [], ["x", "name"])
    for number in (0, 3):
        any_tables.commit(
            location,
            [any_tables.write_file(rows(number), SCHEMA, location)],
            SCHEMA,
            mode="append",
            app=AppTransaction("stream", number),
        )
        assert any_tables.transaction(location, "stream") == number
    any_tables.create(location, SCHEMA)
    assert values(any_tables, location) == [0, 3]
    assert any_tables.transaction(location, "another") is None


def test_of_two_commits_of_one_transaction_that_race_one_lands(local: DeltaTables) -> None:
    location = local.location("shop", "t")
    local.create(location, SCHEMA)
    for number in range(6):
        files = [local.write_file(rows(number), SCHEMA, location) for _ in range(3)]
        start = threading.Barrier(3)

        def commit(file: Any, number: int = number, start: threading.Barrier = start) -> int:
            start.wait()
            app = AppTransaction("stream", number)
            return local.commit(location, [file], SCHEMA, mode="append", app=app)

        with ThreadPoolExecutor(3) as pool:
            assert len(list(pool.map(commit, files))) == 3
    assert values(local, location) == list(range(6))


def test_transactions_of_two_applications_that_race_both_land(local: DeltaTables) -> None:
    location = local.location("shop", "t")
    local.create(location, SCHEMA)

    def commit(name: str) -> None:
        for number in range(5):
            local.commit(
                location,
                [local.write_file(rows(number), SCHEMA, location)],
                SCHEMA,
                mode="append",
                app=AppTransaction(name, number),
            )

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(commit, ["one", "two", "three"]))
    assert values(local, location) == sorted([*range(5)] * 3)


def test_overwriting_one_partition_leaves_the_others(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")

    def put(name: str, *numbers: int) -> None:
        file = any_tables.write_file(rows(*numbers, name=name), SCHEMA, location)
        any_tables.commit(
            location, [file] if file else [], SCHEMA, mode="overwrite", partition={"name": name}
        )

    put("2013-12-24T00:00:00", 1, 2)
    put("ü [x]%/", 3)
    put("2013-12-24T00:00:00", 4)
    assert values(any_tables, location) == [3, 4]
    put("2013-12-24T00:00:00")
    assert values(any_tables, location) == [3]


def test_a_commit_that_names_a_missing_file_is_refused(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    write_arrow(any_tables, [rows(1)], SCHEMA, location, mode="append")
    with pytest.raises(StoreError, match=r"gone\.parquet.*nothing was committed"):
        any_tables.commit(location, [WrittenFile("gone.parquet", 10, 1)], SCHEMA, mode="append")
    written = any_tables.write_file(rows(2), SCHEMA, location)
    with pytest.raises(StoreError, match="nothing was committed"):
        any_tables.commit(
            location, [WrittenFile(written.path, written.size + 1, 1)], SCHEMA, mode="append"
        )
    assert any_tables.version(location) == 0
    assert values(any_tables, location) == [1]


def test_a_table_may_be_empty(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    write_arrow(any_tables, [rows()], SCHEMA, location, mode="overwrite")
    assert any_tables.exists(location)
    assert any_tables.read_arrow(location).num_rows == 0
    assert any_tables.read_arrow(location).schema.names == ["x", "name"]


def test_a_table_that_is_not_there_is_named_with_the_next_step(any_tables: Any) -> None:
    location = any_tables.location("shop", "t")
    for read in (any_tables.version, any_tables.read_arrow, any_tables.read_pandas):
        with pytest.raises(StoreError, match=r"no Delta table at .*/shop/t; materialise"):
            read(location)


@pytest.mark.parametrize("method", ["write_file", "commit", "read_arrow"])
def test_the_failing_double_fails_where_it_is_told_to(method: str) -> None:
    tables = FailingTables(broken=frozenset({method}))
    with pytest.raises(StoreError, match=f"no space left on device \\({method}\\)"):
        getattr(tables, method)("anything")
    assert tables.exists("anything") is False


# The contract, through Spark, on every root.


@pytest.mark.spark
def test_spark_writes_and_reads_every_root(spark: SparkSession, tables: DeltaTables) -> None:
    location = tables.location("shop", "features")
    pairs = [(1, "a"), (2, None), (None, "ü"), (4, "🐟")]
    assert tables.write_spark(spark_rows(spark, *pairs).repartition(2), location) == 0
    assert as_set(tables.read_spark(spark, location)) == set(pairs)
    assert tables.write_spark(spark_rows(spark, (5, "b")), location, mode="append") == 1
    assert as_set(tables.read_spark(spark, location)) == {*pairs, (5, "b")}
    # A new shape comes in with an overwrite; the old version keeps its own.
    reshaped = spark.createDataFrame([("c", 1.5)], "name string, y double")
    assert tables.write_spark(reshaped, location) == 2
    assert as_set(tables.read_spark(spark, location)) == {("c", 1.5)}
    assert as_set(tables.read_spark(spark, location, 0)) == set(pairs)
    assert tables.read_spark(spark, location, 0).columns == ["x", "name"]
    assert tables.write_spark(reshaped.limit(0), location) == 3
    assert tables.read_spark(spark, location).count() == 0
    assert tables.read_spark(spark, location).schema == reshaped.schema


@pytest.mark.spark
def test_spark_overwrites_one_partition(spark: SparkSession, any_tables: Any) -> None:
    location = any_tables.location("shop", "predictions")
    for name, number in [("2013-12-24", 1), ("2013-12-25", 2), ("2013-12-24", 3)]:
        any_tables.write_spark(
            spark_rows(spark, (number, name)), location, partition={"name": name}
        )
    assert as_set(any_tables.read_spark(spark, location)) == {(3, "2013-12-24"), (2, "2013-12-25")}


@pytest.mark.spark
def test_nothing_is_committed_when_the_written_rows_are_refused(
    spark: SparkSession, any_tables: Any
) -> None:
    location = any_tables.location("shop", "features")
    any_tables.write_spark(spark_rows(spark, (1, "a")), location)
    seen: list[set[tuple[Any, ...]]] = []

    def refuse(written: DataFrame) -> None:
        seen.append(as_set(written))
        raise ValueError("not these")

    with pytest.raises(ValueError, match="not these"):
        any_tables.write_spark(spark_rows(spark, (2, "b")), location, before_commit=refuse)
    assert seen == [{(2, "b")}]
    assert any_tables.version(location) == 0
    assert as_set(any_tables.read_spark(spark, location)) == {(1, "a")}


@pytest.mark.spark
def test_a_partition_column_is_also_in_the_file(spark: SparkSession, local: DeltaTables) -> None:
    location = local.location("shop", "predictions")
    local.write_spark(
        spark_rows(spark, (1, "2013-12-24")), location, partition={"name": "2013-12-24"}
    )
    (path,) = Path(location).glob("*.parquet")
    assert path.name.startswith("part-")
    assert pq.read_table(path).to_pylist() == [{"x": 1, "name": "2013-12-24"}]
    assert DeltaTable(location).metadata().partition_columns == ["name"]


# What only real tables have.


def test_a_commit_says_how_many_rows_a_file_has(local: DeltaTables) -> None:
    location = local.location("shop", "t")
    write_arrow(local, [rows(1, 2, 3)], SCHEMA, location, mode="append", metadata={"run": "r1"})
    actions = pa.table(DeltaTable(location).get_add_actions(flatten=True)).to_pylist()
    assert [action["num_records"] for action in actions] == [3]
    assert DeltaTable(location).history()[0]["run"] == "r1"


@pytest.mark.parametrize("keep", ["append", "partition"])
def test_rows_that_could_not_be_read_beside_the_others_are_refused(
    local: DeltaTables, keep: str
) -> None:
    location = local.location("shop", "t")
    partition = {"name": "a"} if keep == "partition" else None
    local.commit(
        location,
        [local.write_file(rows(1), SCHEMA, location)],
        SCHEMA,
        mode="append",
        partition=partition,
    )  # type: ignore[list-item]
    other = pa.schema([("x", pa.string()), ("name", pa.string())])
    file = local.write_file(pa.table({"x": ["one"], "name": ["b"]}), other, location)
    mode, target = ("append", None) if keep == "append" else ("overwrite", {"name": "b"})
    with pytest.raises(
        StoreError,
        match=(
            r"column 'x' is .*long.* in the table and .*string.* in the new rows; "
            r"nothing was committed"
        ),
    ):
        local.commit(location, [file], other, mode=mode, partition=target)  # type: ignore[list-item, arg-type]
    assert values(local, location) == [1]


def protocol(table: Path, **protocol: Any) -> None:
    """Give a table another protocol, as another writer would."""
    line = json.dumps({"protocol": protocol})
    (table / "_delta_log" / "00000000000000000001.json").write_text(line + "\n", encoding="utf-8")


@pytest.mark.parametrize("feature", ["deletionVectors", "columnMapping"])
def test_a_table_with_features_that_are_not_read_here_is_refused(
    tmp_path: Path, local: DeltaTables, feature: str
) -> None:
    path = tmp_path / "shop" / "t"
    write_deltalake(path, rows(1))
    protocol(
        path,
        minReaderVersion=3,
        minWriterVersion=7,
        readerFeatures=[feature],
        writerFeatures=[feature],
    )
    with pytest.raises(StoreError, match=f"Delta features that are not read here: {feature}"):
        local.read_arrow(local.location("shop", "t"))


def test_column_mapping_of_the_older_protocol_is_refused_too(
    tmp_path: Path, local: DeltaTables
) -> None:
    path = tmp_path / "shop" / "t"
    write_deltalake(path, rows(1))
    log = path / "_delta_log"
    first = [
        json.loads(line)
        for line in (log / "00000000000000000000.json").read_text(encoding="utf-8").splitlines()
    ]
    (metadata,) = (action for action in first if "metaData" in action)
    shape = json.loads(metadata["metaData"]["schemaString"])
    for number, field in enumerate(shape["fields"], start=1):
        field["metadata"] = {
            "delta.columnMapping.id": number,
            "delta.columnMapping.physicalName": f"col-{number}",
        }
    metadata["metaData"] |= {
        "schemaString": json.dumps(shape),
        "configuration": {"delta.columnMapping.mode": "name"},
    }
    lines = [{"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}, metadata]
    (log / "00000000000000000001.json").write_text(
        "\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8"
    )
    with pytest.raises(StoreError, match="Delta features that are not read here: columnMapping"):
        local.version(local.location("shop", "t"))


def test_a_log_that_names_a_file_outside_the_table_is_refused(
    tmp_path: Path, local: DeltaTables, spark: SparkSession
) -> None:
    location = local.location("shop", "t")
    write_arrow(local, [rows(1)], SCHEMA, location, mode="append")
    log = Path(location) / "_delta_log" / "00000000000000000001.json"
    action = {
        "path": "../../secret.parquet",
        "size": 1,
        "partitionValues": {},
        "modificationTime": 0,
        "dataChange": True,
    }
    log.write_text(json.dumps({"add": action}) + "\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"outside the table: \.\./\.\./secret\.parquet"):
        local.read_spark(spark, location)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_full_or_forbidden_disk_is_told_as_such(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    tables = DeltaTables(root=str(tmp_path))
    with pytest.raises(StoreError, match="check that the store can be reached"):
        tables.write_file(rows(1), SCHEMA, tables.location("shop", "t"))


def test_a_root_that_is_a_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "shop").write_text("not a folder")
    tables = DeltaTables(root=str(tmp_path))
    with pytest.raises(StoreError, match="check that the store can be reached and has room"):
        tables.write_file(rows(1), SCHEMA, tables.location("shop", "t"))


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
def test_a_contract_is_shown_whole(contract: TableContract) -> None:
    shown: Callable[[str], Any] = contract_metadata(contract, "/data/t").get
    assert [
        column.name for column in shown("dagster/column_schema").columns
    ] == contract.schema.names
    assert all(column.description for column in shown("dagster/column_schema").columns)
    assert (shown("dagster/uri"), shown("fleet/row"), shown("fleet/format")) == (
        "/data/t",
        contract.row,
        contract.format,
    )


def test_a_column_of_a_later_release_joins_a_table_and_is_null_in_its_older_rows(
    any_tables: Any,
) -> None:
    location = any_tables.location("fleet", "ledger")
    write_arrow(any_tables, [rows(1)], SCHEMA, location, mode="append")
    wider = SCHEMA.append(pa.field("since", pa.string()))
    newer = rows(2).append_column("since", pa.array(["now"]))
    write_arrow(any_tables, [newer], wider, location, mode="append")
    read = any_tables.read_arrow(location).sort_by("x")
    assert read.column("since").to_pylist() == [None, "now"]
    assert read.column("x").to_pylist() == [1, 2]


def test_rows_of_an_earlier_release_have_late_columns_as_null_and_no_other_column_may_lack() -> (
    None
):
    columns = (
        Column("x", pa.int64(), "a number"),
        Column("since", pa.string(), "came later", is_late=True),
    )
    contract = TableContract(name="things", row="a thing", key=("x",), columns=columns)
    found = in_format(pd.DataFrame({"x": [1, 2]}), contract, "somewhere/things")
    assert found["since"].tolist() == [None, None]
    with pytest.raises(
        StoreError, match="somewhere/things was written by an earlier version: it has no column x"
    ):
        in_format(pd.DataFrame({"since": ["now"]}), contract, "somewhere/things")
