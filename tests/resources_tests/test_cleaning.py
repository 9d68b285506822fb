"""What `many-models clean` takes away, and what it never does; on real Delta tables."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs as pf
import pytest
from deltalake import DeltaTable

from pipeline.errors import StoreError
from pipeline.models.meta_model import filesystem_of
from pipeline.tables import (
    BOOSTERS,
    DECISIONS,
    FEATURES,
    HOLDOUT,
    IMPORTANCE,
    LEDGER,
    PREDICTIONS,
    RUNS,
    TableContract,
)
from pipeline.testing.tables import write_arrow
from resources import cleaning
from resources.cleaning import Cleaned, clean
from resources.delta_tables import DeltaTables
from resources.lease import hold_lease

NOTHING = timedelta(0)
DAY = timedelta(days=1)
RAW_SCHEMA = pa.schema([("x", pa.int64())])


@dataclass
class Registry:
    """What is asked of a registry."""

    runs: tuple[str, ...] = ()
    newest: str | None = None

    def challenger_run(self, name: str) -> str | None:
        return self.newest if name == "shop" else None

    def fleet_versions(self, name: str) -> set[str]:
        return set(self.runs) if name == "shop" else set()


def write(
    tables: DeltaTables,
    contract: TableContract,
    rows: list[dict[str, Any]],
    partition: dict[str, str],
    namespace: str = "shop",
) -> None:
    location = tables.location(namespace, contract.name)
    file = tables.write_file(
        pa.Table.from_pylist(rows, schema=contract.schema), contract.schema, location
    )
    assert file is not None
    tables.commit(location, [file], contract.schema, mode="overwrite", partition=partition)


def features(tables: DeltaTables) -> int:
    """One more version of the feature table, which replaces the one before."""
    location = tables.location("shop", FEATURES.name)
    rows = pa.Table.from_pylist([{"row_key": "a"}], schema=FEATURES.schema)
    return write_arrow(tables, [rows], FEATURES.schema, location, mode="overwrite")


def trained(
    tables: DeltaTables,
    number: int,
    *,
    reuses: int | None = None,
    finished: bool = True,
    namespace: str = "shop",
    **run: Any,
) -> str:
    """A run on a feature table of its own; its one group may reuse the booster of an earlier run."""
    run_id, wave = f"run-{number}", f"run-{number if reuses is None else reuses}-w"
    version = features(tables)
    write(
        tables,
        LEDGER,
        [{"run_id": run_id, "grain": 0, "group_id": "[]", "wave": wave}],
        {"run_id": run_id},
        namespace,
    )
    write(tables, IMPORTANCE, [{"run_id": run_id, "feature": "x"}], {"run_id": run_id}, namespace)
    if reuses is None:
        write(tables, BOOSTERS, [{"wave": wave, "booster_id": run_id}], {"wave": wave}, namespace)
        write(tables, HOLDOUT, [{"wave": wave, "row_key": "a"}], {"wave": wave}, namespace)
    started = pd.Timestamp("2026-01-01", tz="UTC") + number * pd.Timedelta(days=1)
    row = {
        "run_id": run_id,
        "started_at": started,
        "finished_at": started + pd.Timedelta(hours=1) if finished else None,
        "features_version": version,
        "request": json.dumps({"retrain": "changed"}),
        **run,
    }
    write(tables, RUNS, [row], {"run_id": run_id}, namespace)
    return run_id


def values(tables: DeltaTables, contract: TableContract, column: str) -> set[str]:
    return set(tables.read_pandas(tables.location("shop", contract.name))[column])


def files(tables: DeltaTables) -> set[str]:
    filesystem, root = filesystem_of(tables.root, tables.storage_options)
    found = filesystem.get_file_info(pf.FileSelector(root, recursive=True))
    return {
        info.path for info in found if info.type == pf.FileType.File and "/lease" not in info.path
    }


def is_readable(tables: DeltaTables, version: int) -> bool:
    location = tables.location("shop", FEATURES.name)
    table = DeltaTable(location, version=version)
    return all(
        (Path(location) / path).exists()
        for path in pa.table(table.get_add_actions(flatten=True))["path"].to_pylist()
    )


def cleaned(
    tables: DeltaTables,
    registry: Registry | None = None,
    *,
    keep: timedelta = NOTHING,
    keep_runs: int = 2,
    **options: Any,
) -> Cleaned:
    return clean(tables, registry or Registry(), "shop", keep=keep, keep_runs=keep_runs, **options)  # type: ignore[arg-type]


@pytest.fixture
def tables(tmp_path: Path) -> DeltaTables:
    return DeltaTables(root=str(tmp_path / "tables"))


@pytest.fixture
def four(tables: DeltaTables) -> DeltaTables:
    """Four runs of a fleet."""
    for number in range(4):
        trained(tables, number)
    return tables


def test_everything_of_the_newest_runs_stays(four: DeltaTables) -> None:
    cleaned(four)
    for contract, column in (
        (RUNS, "run_id"),
        (LEDGER, "run_id"),
        (IMPORTANCE, "run_id"),
        (BOOSTERS, "booster_id"),
    ):
        assert values(four, contract, column) == {"run-2", "run-3"}
    assert values(four, HOLDOUT, "wave") == {"run-2-w", "run-3-w"}
    assert [is_readable(four, version) for version in range(4)] == [False, False, True, True]


def test_a_booster_that_a_kept_run_reuses_stays(four: DeltaTables) -> None:
    trained(four, 4, reuses=0)
    cleaned(four, keep_runs=1)
    assert values(four, BOOSTERS, "booster_id") == {"run-0"}
    assert values(four, HOLDOUT, "wave") == {"run-0-w"}
    assert values(four, LEDGER, "run_id") == {"run-4"}


def test_runs_that_a_version_answers_with_or_that_served_stay_in_the_ledger(
    four: DeltaTables,
) -> None:
    write(
        four,
        DECISIONS,
        [{"decision_id": "d", "from_version": None, "to_version": "run-1"}],
        {"decision_id": "d"},
    )
    cleaned(four, Registry(runs=("run-0", "run-3")), keep_runs=1)
    assert (
        values(four, LEDGER, "run_id")
        == values(four, RUNS, "run_id")
        == {"run-0", "run-1", "run-3"}
    )
    assert values(four, BOOSTERS, "booster_id") == {"run-3"}
    assert not is_readable(four, 0)


def test_the_challengers_run_is_kept_whole_however_old_it_is(four: DeltaTables) -> None:
    cleaned(four, Registry(runs=("run-0",), newest="run-0"), keep_runs=1)
    assert values(four, BOOSTERS, "booster_id") == {"run-0", "run-3"}
    assert [is_readable(four, version) for version in range(4)] == [True, False, False, True]


def test_an_unfinished_run_stays_only_while_it_can_be_resumed(tables: DeltaTables) -> None:
    trained(tables, 0, finished=False)
    trained(tables, 1)
    trained(tables, 2, finished=False)
    cleaned(tables, keep_runs=1)
    assert values(tables, RUNS, "run_id") == values(tables, LEDGER, "run_id") == {"run-1", "run-2"}


def test_a_refit_counts_for_no_run_of_the_fleet(tables: DeltaTables) -> None:
    trained(tables, 0)
    trained(tables, 1)
    trained(tables, 2, request=json.dumps({"recipes": "1f"}))
    cleaned(tables, keep_runs=1)
    assert values(tables, RUNS, "run_id") == {"run-1", "run-2"}


def test_feature_tables_of_trials_and_backtests_stay(tables: DeltaTables) -> None:
    trained(tables, 0, namespace="shop-trial")
    trained(tables, 1, namespace="shop-backtest-2025-01-01")
    trained(tables, 2, namespace="other-trial")
    trained(tables, 3)
    cleaned(tables)
    assert [is_readable(tables, version) for version in range(4)] == [True, True, False, True]


def test_replaced_files_of_every_table_go(four: DeltaTables) -> None:
    for _ in range(2):
        write_arrow(
            four,
            [pa.table({"x": [1]})],
            RAW_SCHEMA,
            four.location("shop", "raw", "sales"),
            mode="overwrite",
        )
        write(four, PREDICTIONS, [{"as_of": "2026-01-01", "row_key": "a"}], {"as_of": "2026-01-01"})
    write(four, PREDICTIONS, [{"as_of": "2026-01-02", "row_key": "a"}], {"as_of": "2026-01-02"})
    found = cleaned(four).tables
    assert (len(found["raw/sales"].files), len(found["predictions"].files)) == (1, 1)
    assert values(four, PREDICTIONS, "as_of") == {"2026-01-01", "2026-01-02"}
    assert four.read_arrow(four.location("shop", "raw", "sales")).num_rows == 1


def test_what_interrupted_runs_left_goes_and_what_is_not_ours_stays(four: DeltaTables) -> None:
    boosters = Path(four.location("shop", "boosters"))
    (boosters / "part-left.parquet").write_bytes(b"12345")
    (boosters / "notes.txt").write_bytes(b"mine")
    lost = Path(four.location("shop", "holdout"))
    (lost / "_delta_log").rename(lost.parent / "away")
    before = {path.name for path in lost.iterdir()}
    found = cleaned(four, keep_runs=9)
    assert [(Path(path).name, size) for path, size in found.tables["boosters"].files] == [
        ("part-left.parquet", 5)
    ]
    assert (boosters / "notes.txt").exists()
    # A folder without a log may only have lost it.
    assert {path.name for path in lost.iterdir()} == before


def test_a_table_that_is_written_without_the_lease_keeps_files_that_have_no_commit_yet(
    four: DeltaTables,
) -> None:
    being_written = Path(four.location("shop", "features")) / "part-new.parquet"
    being_written.write_bytes(b"12345")
    cleaned(four)
    assert being_written.exists()
    yesterday = (datetime.now(UTC) - timedelta(hours=25)).timestamp()
    os.utime(being_written, (yesterday, yesterday))
    cleaned(four)
    assert not being_written.exists()


def test_files_stay_as_long_as_somebody_may_read_them(four: DeltaTables) -> None:
    before = files(four)
    found = cleaned(four, keep=DAY)
    assert not any(one.files for one in found.tables.values())
    assert before <= files(four)
    assert "more are too young (--keep-hours)" in found.text
    # Their rows are gone from the tables as they are now.
    assert values(four, RUNS, "run_id") == {"run-2", "run-3"}


def test_a_dry_run_says_the_same_and_touches_nothing(four: DeltaTables) -> None:
    (Path(four.location("shop", "boosters")) / "part-left.parquet").write_bytes(b"12345")
    before = files(four)
    with hold_lease(four, "shop", "run-9"):
        told = cleaned(four, dry_run=True)
    assert files(four) == before
    assert "part-left.parquet" in told.text
    assert "would be removed (dry run: nothing was)" in told.text
    done = cleaned(four)
    assert {name: one.partitions for name, one in told.tables.items()} == {
        name: one.partitions for name, one in done.tables.items()
    }
    assert told.tables["features"] == done.tables["features"]


def test_a_second_time_there_is_nothing_to_do(four: DeltaTables) -> None:
    cleaned(four)
    again = cleaned(four)
    assert not any(one.files or one.partitions for one in again.tables.values())


def test_nothing_is_removed_while_the_fleet_is_trained(four: DeltaTables) -> None:
    before = files(four)
    with (
        hold_lease(four, "shop", "run-9"),
        pytest.raises(StoreError, match="is being trained by run run-9"),
    ):
        cleaned(four)
    assert files(four) == before


@pytest.mark.parametrize("turn", [1, 3, 5])
def test_a_clean_that_was_killed_is_finished_by_the_next(
    four: DeltaTables, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    left = turn

    def die(_: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cleaning, "crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            cleaned(four)
    cleaned(four)
    for contract, column in ((RUNS, "run_id"), (LEDGER, "run_id"), (BOOSTERS, "booster_id")):
        assert values(four, contract, column) == {"run-2", "run-3"}
    assert {Path(path).parent.name for path in files(four) if path.endswith(".parquet")} == {
        FEATURES.name, RUNS.name, LEDGER.name, IMPORTANCE.name, BOOSTERS.name, HOLDOUT.name,
    }  # fmt: skip
    assert sum(path.endswith(".parquet") for path in files(four)) == 2 * 6


def test_a_stale_writer_is_fenced_off_by_a_clean(four: DeltaTables) -> None:
    location = four.location("shop", LEDGER.name)
    seen = four.transaction(location, "training")
    cleaned(four)
    assert (four.transaction(location, "training") or 0) > (seen or 0)


def test_a_fleet_without_manifests_loses_no_rows(tables: DeltaTables) -> None:
    """The tables of runs may be lost, or of another format: nothing then says which rows are old."""
    write(tables, LEDGER, [{"run_id": "run-0", "grain": 0, "group_id": "[]"}], {"run_id": "run-0"})
    cleaned(tables)
    assert values(tables, LEDGER, "run_id") == {"run-0"}


def test_an_object_store_is_cleaned(object_store: dict[str, str]) -> None:
    tables = DeltaTables(root="s3://fleets/cleaned", storage_options=object_store)
    for number in range(3):
        trained(tables, number)
    found = cleaned(tables, keep_runs=1)
    assert values(tables, BOOSTERS, "booster_id") == {"run-2"}
    assert len(found.tables["features"].files) == 2
    assert tables.read_arrow(tables.location("shop", FEATURES.name)).num_rows == 1
