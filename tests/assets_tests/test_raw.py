import gzip
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from assets.raw import raw_asset
from assets.settings import FleetFiles
from pipeline.reading import sources
from pipeline.spec import FleetSpec, SourceSpec
from pipeline.testing.doubles import FailingTables, MemoryTables
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings

Metadata = Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]]
Checks = Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]
Failure = Callable[[dg.ExecuteInProcessResult], str]


@pytest.fixture(params=["delta", "memory"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return (
        MemoryTables() if request.param == "memory" else DeltaTables(root=str(tmp_path / "tables"))
    )


def ingest(
    shop: FleetSpec,
    folder: Path,
    tables: Any,
    uri: str,
    *,
    launch: LaunchSettings | None = None,
    **source: Any,
) -> dg.ExecuteInProcessResult:
    asset = raw_asset(shop, SourceSpec(name="sales", uri=uri, **source), FleetFiles(folder, ""))
    return dg.materialize(
        [asset],
        resources={"tables": tables, "launch": launch or LaunchSettings()},
        raise_on_error=False,
    )


def stored(tables: Any) -> list[dict[str, Any]]:
    rows = tables.read_arrow(tables.location("shop", "raw", "sales")).to_pylist()
    return sorted(rows, key=lambda row: str(row.get("store")))


def test_a_zipped_file_is_ingested_with_its_origin(
    shop: FleetSpec, tmp_path: Path, tables: Any, metadata: Metadata, checks: Checks
) -> None:
    with zipfile.ZipFile(tmp_path / "sales.csv.zip", "w") as archive:
        archive.writestr("sales.csv", 'store,zip,amount\na,01234,1.5\n"b\nc",01235,NA\n')
        archive.writestr("__MACOSX/._sales.csv", "junk")
    result = ingest(shop, tmp_path, tables, "sales.csv.zip", types={"zip": "string"})
    assert result.success
    rows = stored(tables)
    assert [(row["store"], row["zip"], row["amount"]) for row in rows] == [
        ("a", "01234", 1.5),
        ("b\nc", "01235", None),
    ]
    assert {row["_source"] for row in rows} == {str(tmp_path / "sales.csv.zip")}
    assert len({row["_ingested_at"] for row in rows}) == 1
    told = metadata(result)["sales"]
    assert (told["dagster/row_count"], told["fleet/files"], told["fleet/source"]) == (
        2,
        1,
        "sales.csv.zip",
    )
    assert [column.name for column in told["dagster/column_schema"].columns] == [
        "store",
        "zip",
        "amount",
        "_source",
        "_ingested_at",
    ]
    assert checks(result)["has_rows"].passed


def test_files_that_drift_are_brought_together(
    shop: FleetSpec, tmp_path: Path, tables: Any, metadata: Metadata
) -> None:
    (tmp_path / "sales-1.csv").write_text("store,amount,gone\na,1,x\n")
    with gzip.open(tmp_path / "sales-2.csv.gz", "wt") as file:
        file.write("amount,store,new\n2.5,b,\n")
    result = ingest(shop, tmp_path, tables, "sales-*.csv*", format="csv")
    assert result.success
    rows = [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in stored(tables)
    ]
    assert rows == [
        {"store": "a", "amount": 1.0, "gone": "x", "new": None},
        {"store": "b", "amount": 2.5, "gone": None, "new": None},
    ]
    assert metadata(result)["sales"]["fleet/files"] == 2
    assert {Path(row["_source"]).name for row in stored(tables)} == {
        "sales-1.csv",
        "sales-2.csv.gz",
    }


def test_files_that_cannot_be_brought_together_are_refused(
    shop: FleetSpec, tmp_path: Path, tables: Any, failure: Failure
) -> None:
    (tmp_path / "sales-1.csv").write_text("store,amount\na,1\n")
    (tmp_path / "sales-2.csv").write_text("store,amount\na,many\n")
    result = ingest(shop, tmp_path, tables, "sales-*.csv")
    assert not result.success
    assert "source 'sales': its files do not fit together" in failure(result)
    assert "set the column's type under types" in failure(result)
    assert not tables.exists(tables.location("shop", "raw", "sales"))


def test_a_new_delivery_replaces_the_old_one(shop: FleetSpec, tmp_path: Path, tables: Any) -> None:
    for text in ("store,amount\na,1\n", "store,price\nb,2.5\n"):
        (tmp_path / "sales.csv").write_text(text)
        assert ingest(shop, tmp_path, tables, "sales.csv").success
    assert [(row["store"], row["price"]) for row in stored(tables)] == [("b", 2.5)]
    assert tables.version(tables.location("shop", "raw", "sales")) == 1


def test_an_empty_source_is_a_warning(
    shop: FleetSpec, tmp_path: Path, tables: Any, checks: Checks, metadata: Metadata
) -> None:
    (tmp_path / "sales.csv").write_text("store,amount\n")
    result = ingest(shop, tmp_path, tables, "sales.csv")
    assert result.success
    check = checks(result)["has_rows"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert metadata(result)["sales"]["dagster/row_count"] == 0
    assert tables.exists(tables.location("shop", "raw", "sales"))


def test_a_missing_source_fails_in_its_own_words(
    shop: FleetSpec, tmp_path: Path, failure: Failure
) -> None:
    result = ingest(shop, tmp_path, MemoryTables(), "no such/sales-*.csv")
    assert not result.success
    assert failure(result).splitlines() == [
        (
            "source 'sales': nothing is at 'no such/sales-*.csv'; expected a file, "
            "a folder or a glob that matches something"
        ),
        f"  tried: {tmp_path}/no such/sales-*.csv",
    ]


@pytest.mark.parametrize("broken", ["write_file", "commit"])
def test_a_store_that_fails_leaves_what_was_there(
    shop: FleetSpec, tmp_path: Path, failure: Failure, broken: str
) -> None:
    tables = FailingTables(broken=frozenset())
    (tmp_path / "sales.csv").write_text("store,amount\na,1\n")
    assert ingest(shop, tmp_path, tables, "sales.csv").success
    tables.broken = frozenset({broken})
    (tmp_path / "sales.csv").write_text("store,amount\nb,2\n")
    result = ingest(shop, tmp_path, tables, "sales.csv")
    assert not result.success
    assert f"no space left on device ({broken})" in failure(result)
    assert [row["store"] for row in stored(tables)] == ["a"]


# What did not change is not read again


def settled(path: Path, text: str) -> None:
    """Write a file as if that were a minute ago; what was written just now is doubtful."""
    path.write_text(text)
    before = path.stat().st_mtime - 60
    os.utime(path, (before, before))


@pytest.fixture
def no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time at which a file's entry was changed cannot be set."""
    monkeypatch.setattr(sources, "LOCAL_DOUBT_SECONDS", 0.0)


def version_of(tables: Any) -> int:
    return int(tables.version(tables.location("shop", "raw", "sales")))


@pytest.mark.usefixtures("no_doubt")
def test_an_unchanged_source_is_not_read_again(
    shop: FleetSpec,
    tmp_path: Path,
    tables: Any,
    metadata: Metadata,
    checks: Checks,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settled(tmp_path / "sales.csv", "store,amount\na,1\nb,2\n")
    first = metadata(ingest(shop, tmp_path, tables, "sales.csv"))["sales"]
    again = ingest(shop, tmp_path, tables, "sales.csv")
    assert version_of(tables) == 0
    told = metadata(again)["sales"]
    assert (first["fleet/unchanged"], told["fleet/unchanged"]) == (False, True)
    for name in ("dagster/row_count", "fleet/version", "fleet/files", "dagster/column_schema"):
        assert told[name] == first[name]
    assert checks(again)["has_rows"].passed
    assert re.search(r"sales: unchanged since \d\d:\d\d, 2 rows", capfd.readouterr().err)


@pytest.mark.usefixtures("no_doubt")
def test_whatever_may_have_changed_is_read_again(
    shop: FleetSpec, tmp_path: Path, tables: Any
) -> None:
    file = tmp_path / "sales-1.csv"
    settled(file, "store,amount\na,1\n")
    ingest(shop, tmp_path, tables, "sales-*.csv")
    times = file.stat()
    # The same size, and its time set back: the entry's own time tells.
    file.write_text("store,amount\nb,1\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    ingest(shop, tmp_path, tables, "sales-*.csv")
    assert [row["store"] for row in stored(tables)] == ["b"]
    settled(tmp_path / "sales-2.csv", "store,amount\nc,1\n")
    ingest(shop, tmp_path, tables, "sales-*.csv")
    assert [row["store"] for row in stored(tables)] == ["b", "c"]
    assert version_of(tables) == 2
    ingest(shop, tmp_path, tables, "sales-*.csv", types={"amount": "double"})
    assert version_of(tables) == 3
    ingest(
        shop,
        tmp_path,
        tables,
        "sales-*.csv",
        types={"amount": "double"},
        launch=LaunchSettings(retrain="all"),
    )
    assert version_of(tables) == 4


def test_a_file_written_just_now_is_doubtful(shop: FleetSpec, tmp_path: Path, tables: Any) -> None:
    (tmp_path / "sales.csv").write_text("store,amount\na,1\n")
    for _ in range(2):
        ingest(shop, tmp_path, tables, "sales.csv")
    assert version_of(tables) == 1


@pytest.mark.usefixtures("no_doubt")
def test_a_raw_table_that_lost_a_file_is_made_again(shop: FleetSpec, tmp_path: Path) -> None:
    tables = DeltaTables(root=str(tmp_path / "tables"))
    settled(tmp_path / "sales.csv", "store,amount\na,1\n")
    ingest(shop, tmp_path, tables, "sales.csv")
    next(Path(tables.location("shop", "raw", "sales")).glob("*.parquet")).unlink()
    assert ingest(shop, tmp_path, tables, "sales.csv").success
    assert [row["store"] for row in stored(tables)] == ["a"]


def test_a_delta_source_is_known_by_its_version(
    shop: FleetSpec, tmp_path: Path, tables: Any
) -> None:
    rows = pa.table({"store": ["a"]})
    write_deltalake(tmp_path / "sales", rows)
    for _ in range(2):
        ingest(shop, tmp_path, tables, "sales", format="delta")
    assert version_of(tables) == 0
    write_deltalake(tmp_path / "sales", rows, mode="append")
    ingest(shop, tmp_path, tables, "sales", format="delta")
    assert [row["store"] for row in stored(tables)] == ["a", "a"]
    shutil.rmtree(tmp_path / "sales")
    for _ in range(2):
        write_deltalake(tmp_path / "sales", pa.table({"store": ["b"]}), mode="append")
    ingest(shop, tmp_path, tables, "sales", format="delta")
    assert [row["store"] for row in stored(tables)] == ["b", "b"]
