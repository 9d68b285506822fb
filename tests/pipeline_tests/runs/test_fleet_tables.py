"""Where the tables of a fleet are, and what is read from them."""

from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StoreError
from pipeline.models.start import Start
from pipeline.runs.fleet_tables import FleetTables, no_rows
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.tables import ALL, FEATURES, LEDGER, RAW, RUNS
from pipeline.testing.doubles import MemoryTables
from pipeline.testing.run_parts import CUTOFFS, commit_rows, make_ledger_row, make_manifest
from pipeline.testing.runs import own_tables
from pipeline.testing.tables import write_arrow
from pipeline.training.splits import Cutoffs

TRIAL = "small_trial"
REFIT = Request("refit", recipes={(0, "[]"): Start(judge=True)}).text


def at_hour(hour: int) -> pd.Timestamp:
    return pd.Timestamp(f"2024-10-27 {hour:02}:00", tz="UTC")


def as_of_day(day: int) -> Cutoffs:
    return Cutoffs(pd.Timestamp(2024, 10, day), CUTOFFS.tune_start, CUTOFFS.report_start)


def tables_with(*runs: RunManifest) -> FleetTables:
    """The tables of a fleet whose table of runs has these rows, in this order."""
    tables: Any = MemoryTables()
    commit_rows(tables, RUNS, [run.to_row() for run in runs])
    return own_tables(tables, "small")


# Where they are


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
def test_only_raw_tables_and_features_belong_to_the_fleet_whatever_the_namespace(
    contract: Any,
) -> None:
    tables: Any = MemoryTables()
    trial = FleetTables(tables, TRIAL, "small")
    owner = "small" if contract in (RAW, FEATURES) else TRIAL
    assert trial.location(contract) == f"memory/{owner}/{contract.name}"


def test_each_source_has_its_own_raw_table_of_the_fleet() -> None:
    tables: Any = MemoryTables()
    trial = FleetTables(tables, TRIAL, "small")
    assert trial.raw_location("sales") == "memory/small/raw/sales"


def test_a_trial_reads_the_version_of_the_fleets_features() -> None:
    tables: Any = MemoryTables()
    for _ in range(3):
        commit_rows(tables, FEATURES, [{"row_key": "[1]"}])
    assert FleetTables(tables, TRIAL, "small").features_version() == 2


def test_a_trial_does_not_see_the_fleets_runs() -> None:
    fleet = tables_with(make_manifest("run-1"))
    trial = FleetTables(fleet.tables, TRIAL, "small")
    assert trial.runs().empty
    assert fleet.runs()["run_id"].tolist() == ["run-1"]


# Runs


def test_where_there_is_no_table_there_are_no_rows_but_all_columns() -> None:
    tables: Any = MemoryTables()
    fleet = own_tables(tables, "small")
    assert list(fleet.runs().columns) == RUNS.schema.names
    assert list(fleet.ledger("run-1").columns) == LEDGER.schema.names
    assert fleet.runs().empty
    assert fleet.ledger("run-1").empty
    assert fleet.run("run-1") is None
    assert fleet.newest_as_of(["run-1"]) is None
    with pytest.raises(
        StoreError, match="'small' has no finished training run; materialise small/models first"
    ):
        fleet.newest_run()


def test_a_run_is_read_by_its_id() -> None:
    first, second = make_manifest("run-1"), make_manifest("run-2", finished_at=None, waves=())
    fleet = tables_with(first, second)
    assert fleet.run("run-1") == first
    assert fleet.run("run-2") == second
    assert fleet.run("run-3") is None


def test_the_newest_run_is_the_one_that_finished_last() -> None:
    late = make_manifest("late", started_at=at_hour(1), finished_at=at_hour(9))
    early = make_manifest("early", started_at=at_hour(2), finished_at=at_hour(8))
    unfinished = make_manifest("unfinished", started_at=at_hour(10), finished_at=None)
    assert tables_with(late, early, unfinished).newest_run().run_id == "late"


def test_where_every_run_was_interrupted_the_message_says_that_it_resumes() -> None:
    fleet = tables_with(make_manifest("run-1", finished_at=None))
    with pytest.raises(
        StoreError, match="only interrupted ones; materialise small/models again: it resumes"
    ):
        fleet.newest_run()


def test_a_run_that_only_refitted_recipes_is_not_the_newest() -> None:
    whole = make_manifest("whole", finished_at=at_hour(8))
    refit = make_manifest("refit", finished_at=at_hour(9), request=REFIT)
    assert tables_with(whole, refit).newest_run().run_id == "whole"
    with pytest.raises(
        StoreError, match="has no finished training run; materialise small/models first"
    ):
        tables_with(refit).newest_run()


def test_the_newest_as_of_is_the_latest_of_the_named_runs() -> None:
    days = {"run-1": 24, "run-2": 26, "run-3": 25}
    fleet = tables_with(*(make_manifest(run, cutoffs=as_of_day(day)) for run, day in days.items()))
    assert fleet.newest_as_of(["run-1", "run-3", "gone"]) == pd.Timestamp("2024-10-25")
    assert fleet.newest_as_of(["run-1", "run-2"]) == pd.Timestamp("2024-10-26")
    assert fleet.newest_as_of(["gone"]) is None
    assert fleet.newest_as_of([]) is None


# The ledger


def test_a_ledger_has_the_rows_of_one_run() -> None:
    tables: Any = MemoryTables()
    commit_rows(tables, LEDGER, [make_ledger_row(run_id="run-1"), make_ledger_row(run_id="run-2")])
    ledger = own_tables(tables, "small").ledger("run-2")
    assert ledger["run_id"].tolist() == ["run-2"]
    assert own_tables(tables, "small").ledger("run-3").empty


def test_a_ledger_of_an_earlier_format_is_refused_with_the_next_step() -> None:
    tables: Any = MemoryTables()
    schema = pa.schema(
        [
            pa.field("interval", pa.float64()) if field.name == "intervals" else field
            for field in LEDGER.schema
        ]
    )
    location = tables.location("shop", LEDGER.name)
    row = pa.Table.from_pylist([{"run_id": "run-1", "interval": 1.0}], schema=schema)
    tables.commit(location, [tables.write_file(row, schema, location)], schema, mode="append")
    with pytest.raises(
        StoreError,
        match="has no column intervals, expected format 3 of the table 'ledger'; move it away",
    ):
        own_tables(tables, "shop").ledger("run-1")


def test_runs_of_an_earlier_format_are_refused_and_a_late_column_is_null() -> None:
    tables: Any = MemoryTables()
    location = tables.location("small", RUNS.name)
    row = make_manifest().to_row()
    late = pa.schema([field for field in RUNS.schema if field.name != "unknown_groups"])
    write_arrow(
        tables, [pa.Table.from_pylist([row], schema=late)], late, location, mode="overwrite"
    )
    fleet = own_tables(tables, "small")
    run = fleet.run("run-1")
    assert run is not None
    assert run.unknown_groups == ()
    lacking = pa.schema([field for field in RUNS.schema if field.name != "waves"])
    write_arrow(
        tables, [pa.Table.from_pylist([row], schema=lacking)], lacking, location, mode="overwrite"
    )
    with pytest.raises(StoreError, match="has no column waves"):
        fleet.runs()


def test_no_rows_of_a_contract_have_its_columns() -> None:
    for contract in ALL:
        assert list(no_rows(contract).columns) == contract.schema.names
        assert no_rows(contract).empty
