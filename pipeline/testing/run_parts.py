"""Parts of training runs of the small fleet, made by hand: nothing is counted, trained or read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.models.meta_model import GroupKey, group_id
from pipeline.models.pack import build_model_spec
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import EarlierRuns, History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.plan import TrainingPlan
from pipeline.runs.planned_run import CountedRows, PlannedRun, lay_out_run
from pipeline.runs.request import Request
from pipeline.spec import FleetSpec
from pipeline.storage import Tables
from pipeline.tables import LEDGER, RUNS, TableContract
from pipeline.testing.data import CITIES, small_spec
from pipeline.training.blend import Constants
from pipeline.training.splits import Cutoffs

CUTOFFS = Cutoffs(
    as_of=pd.Timestamp("2024-10-26"),
    tune_start=pd.Timestamp("2024-08-01"),
    report_start=pd.Timestamp("2024-10-01"),
)
CATEGORIES: Mapping[str, Sequence[str]] = {"kind": ("large", "small")}


def make_manifest(run_id: str = "run-1", **changes: Any) -> RunManifest:
    """A finished run of the small fleet, with changes to its fields."""
    spec = small_spec()
    fields: dict[str, Any] = {
        "run_id": run_id,
        "started_at": pd.Timestamp("2024-10-27 08:00", tz="UTC"),
        "finished_at": pd.Timestamp("2024-10-27 09:00", tz="UTC"),
        "previous_run_id": None,
        "request": Request(run_id).text,
        "data_digest": "digest",
        "cutoffs": CUTOFFS,
        "features_version": 3,
        "spec_digest": spec.training_digest,
        "constants": Constants(97.5, 96.25),
        "n_groups": 7,
        "model_spec": build_model_spec(spec, CATEGORIES),
        "versions": {"python": "3.11.9", "lightgbm": "4.7.0"},
        "waves": (f"{run_id}-wave-0",),
        "unknown_groups": (),
    }
    return RunManifest(**{**fields, **changes})


def make_history(
    runs: Sequence[RunManifest] = (),
    ledgers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> History:
    """A history of these runs, oldest first, as a fleet's tables would give it.

    Args:
        runs: oldest first.
        ledgers: ledger rows by run.
    """
    rows_by_run = ledgers or {}

    def read_ledger(run_id: str) -> pd.DataFrame:
        return _read_back(LEDGER, rows_by_run.get(run_id, ()))

    return History(_read_back(RUNS, [run.to_row() for run in runs]), read_ledger)


def make_ledger_row(
    grain: int = 2,
    group: str = '["north","oslo"]',
    **changes: Any,
) -> dict[str, Any]:
    """The ledger row of a trained group, with changes to its columns."""
    row: dict[str, Any] = dict.fromkeys(LEDGER.schema.names)
    row |= {
        "run_id": "run-1",
        "grain": grain,
        "group_id": group,
        "status": "trained",
        "booster_id": f"booster of {group}",
        "n_rows": 300,
        "n_target": 300,
        "n_tune": 60,
        "n_rounds": 5,
        "parameters": '{"num_leaves":7}',
        "tune_loss": 1.0,
        "started_from": "{}",
        "fingerprint": f"print of {group}",
        "source_run_id": "run-1",
        "wave": "run-1-wave-0",
        "tuned_as_of": CUTOFFS.as_of.tz_localize("UTC"),
        "weight": 0.5,
        "seconds": 1.0,
    }
    return {**row, **changes}


def count_rows(**changes: Any) -> CountedRows:
    """What would be counted of 300 days of the small fleet, with changes to its fields."""
    groups = [_count_group(0, [], 4)]
    for region, cities in CITIES.items():
        groups.append(_count_group(1, [region], len(cities)))
        groups += [_count_group(2, [region, city], 1) for city in cities]
    fields: dict[str, Any] = {
        "rows": None,
        "cutoffs": CUTOFFS,
        "categories": CATEGORIES,
        "classes": [],
        "counts": pd.DataFrame(groups),
        "constants": Constants(97.5, 97.5),
        "nullable": [],
    }
    return CountedRows(**{**fields, **changes})


def lay_out(
    spec: FleetSpec | None = None,
    request: Request | None = None,
    history: History | None = None,
    counted: CountedRows | None = None,
    own: str | None = None,
) -> PlannedRun:
    """A planned run of the small fleet on two slots, without rows; by default without history."""
    return lay_out_run(
        counted or count_rows(),
        spec or small_spec(),
        request or Request("run-2"),
        history or make_history(),
        slots=2,
        own=own,
    )


def make_planned_run(
    groups: Sequence[Mapping[str, Any]],
    earlier: EarlierRuns | None = None,
) -> PlannedRun:
    """A planned run whose plan has just these groups.

    Args:
        groups: rows of the plan, each with at least its grain, group_id and action.
        earlier: what earlier runs left.
    """
    defaults: dict[str, Any] = {
        "parent_id": None,
        "reason": None,
        "started_from": "{}",
        "fingerprint": None,
        "rows_hash": "rows",
        "exponent": 0,
        "cost_seconds": 2.0,
        "wave": 0,
        "task": 0,
    }
    plan = TrainingPlan(pd.DataFrame([{**defaults, **group} for group in groups]), slots=2)
    return replace(lay_out(), plan=plan, earlier=earlier or EarlierRuns())


def ledger_by_key(rows: Sequence[Mapping[str, Any]]) -> dict[GroupKey, Mapping[str, Any]]:
    """Ledger rows by group."""
    return {GroupKey.of(row): row for row in rows}


def commit_rows(
    tables: Tables,
    contract: TableContract,
    rows: Sequence[Mapping[str, Any]],
    namespace: str = "small",
) -> None:
    """Append rows to a table of a fleet."""
    fleet = FleetTables(tables, namespace, namespace)
    files = fleet.write(contract, _table_of(contract, rows))
    tables.commit(fleet.location(contract), files, contract.schema, mode="append")


def _table_of(contract: TableContract, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(map(dict, rows)), schema=contract.schema)


def _read_back(contract: TableContract, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with the types, and the nulls, that they have when they are read from a table."""
    frame: pd.DataFrame = _table_of(contract, rows).to_pandas()
    return frame


def _count_group(grain: int, keys: Sequence[str], n_cities: int) -> dict[str, Any]:
    """The counts of a group with that many cities."""
    parent_id = None
    if keys:
        parent_id = group_id(list(keys[:-1]))
    return {
        "grain": grain,
        "group_id": group_id(list(keys)),
        "parent_id": parent_id,
        "n_rows": 300 * n_cities,
        "n_target": 300 * n_cities,
        "n_invalid": 0,
        "n_fit": 213 * n_cities,
        "n_tune": 61 * n_cities,
        "n_report": 26 * n_cities,
        "rows_hash": f"rows of {'/'.join(keys)}",
    }
