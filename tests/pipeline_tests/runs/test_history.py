"""What a run may build on: which earlier run, and which of its groups."""

from typing import Any

import pandas as pd
import pytest

from pipeline.errors import StoreError
from pipeline.models.meta_model import GroupKey
from pipeline.models.start import Start
from pipeline.runs.history import EarlierRuns, History, by_group
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.tables import LEDGER, RUNS
from pipeline.testing.data import small_spec
from pipeline.testing.doubles import MemoryTables
from pipeline.testing.run_parts import (
    CUTOFFS,
    commit_rows,
    make_history,
    make_ledger_row,
    make_manifest,
)
from pipeline.testing.runs import own_tables
from pipeline.training.splits import Cutoffs

REFIT = Request("refit", recipes={(0, "[]"): Start(judge=True)}).text
OSLO, ROMA = '["north","oslo"]', '["south","roma"]'


def make_run(run_id: str, hour: int, *, day: int = 26, **changes: Any) -> RunManifest:
    """A finished run that started at that hour and pretended that day."""
    cutoffs = Cutoffs(pd.Timestamp(2024, 10, day), CUTOFFS.tune_start, CUTOFFS.report_start)
    started_at = pd.Timestamp(f"2024-10-27 {hour:02}:00", tz="UTC")
    return make_manifest(run_id, started_at=started_at, cutoffs=cutoffs, **changes)


def newest_of(*runs: RunManifest, day: int = 26) -> str | None:
    found = make_history(runs).newest_finished(pd.Timestamp(2024, 10, day))
    return None if found is None else found.run_id


# The run before


def test_a_first_run_has_nothing_before_it() -> None:
    assert newest_of() is None
    assert make_history().unfinished(None) == []


def test_the_run_before_is_the_newest_finished_one() -> None:
    runs = (make_run("run-1", 1), make_run("run-2", 2), make_run("run-3", 3, finished_at=None))
    assert newest_of(*runs) == "run-2"


@pytest.mark.parametrize(
    ("day", "expected"), [(24, None), (25, "earlier"), (26, "later"), (27, "later")]
)
def test_a_run_does_not_build_on_what_saw_more_than_it_may(day: int, expected: str | None) -> None:
    assert (
        newest_of(make_run("earlier", 1, day=25), make_run("later", 2, day=26), day=day) == expected
    )


def test_a_run_that_only_refitted_recipes_is_passed_over() -> None:
    assert newest_of(make_run("whole", 1), make_run("refit", 2, request=REFIT)) == "whole"
    assert newest_of(make_run("refit", 2, request=REFIT)) is None


# Interrupted runs


def test_interrupted_runs_are_those_started_after_the_run_before_newest_last() -> None:
    before = make_run("before", 3)
    open_runs = [
        make_run(name, hour, finished_at=None)
        for name, hour in (("long ago", 2), ("first", 4), ("last", 5))
    ]
    history = make_history([open_runs[0], before, *open_runs[1:]])
    assert [run.run_id for run in history.unfinished(before)] == ["first", "last"]
    assert [run.run_id for run in history.unfinished(None)] == ["long ago", "first", "last"]


def test_a_history_is_read_from_the_tables_oldest_first() -> None:
    tables: Any = MemoryTables()
    runs = [make_run("second", 2), make_run("first", 1)]
    commit_rows(tables, RUNS, [run.to_row() for run in runs])
    commit_rows(tables, LEDGER, [make_ledger_row(run_id="first")])
    history = History.read(own_tables(tables, "small"))
    assert history.runs["run_id"].tolist() == ["first", "second"]
    assert history.newest_finished(CUTOFFS.as_of) == runs[0]
    assert [len(history.ledger(run)) for run in ("first", "second")] == [1, 0]


def test_a_history_of_an_empty_fleet_is_empty() -> None:
    tables: Any = MemoryTables()
    history = History.read(own_tables(tables, "small"))
    assert history.newest_finished(CUTOFFS.as_of) is None
    assert history.unfinished(None) == []


def test_a_ledger_of_another_format_is_refused_even_where_no_run_asks_for_its_rows() -> None:
    tables: Any = MemoryTables()
    location = tables.location("small", LEDGER.name)
    schema = LEDGER.schema.remove(LEDGER.schema.get_field_index("intervals"))
    tables.create(location, schema)
    with pytest.raises(StoreError, match="has no column intervals"):
        History.read(own_tables(tables, "small"))


# What groups may build on


def read_earlier(
    before: RunManifest | None, resumed: RunManifest | None, **ledgers: list[dict[str, Any]]
) -> EarlierRuns:
    """What a run may take from runs a (finished), b and c (interrupted, c the newest)."""
    runs = [
        make_run("a", 1),
        make_run("b", 2, finished_at=None),
        make_run("c", 3, finished_at=None),
    ]
    history = make_history(runs, ledgers)
    return EarlierRuns.read(history, before, history.unfinished(before), resumed, small_spec())


def test_rows_of_the_run_before_the_resumed_run_and_other_interrupted_ones_are_kept_apart() -> None:
    ledgers = {run: [make_ledger_row(run_id=run)] for run in ("a", "b", "c")}
    earlier = read_earlier(make_run("a", 1), make_run("c", 3, finished_at=None), **ledgers)
    key = GroupKey(2, OSLO)
    found = [part[key]["run_id"] for part in (earlier.before, earlier.kept, earlier.unfinished)]
    assert found == ["a", "c", "b"]


def test_of_two_interrupted_runs_the_newer_row_of_a_group_counts() -> None:
    ledgers = {
        "b": [make_ledger_row(run_id="b"), make_ledger_row(group=ROMA, run_id="b")],
        "c": [make_ledger_row(run_id="c")],
    }
    earlier = read_earlier(None, None, **ledgers)
    assert earlier.unfinished[GroupKey(2, OSLO)]["run_id"] == "c"
    assert earlier.unfinished[GroupKey(2, ROMA)]["run_id"] == "b"
    assert (earlier.before, earlier.kept) == ({}, {})


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, False),
        (make_run("a", 1), True),
        (make_run("a", 1, spec_digest="another"), False),
    ],
)
def test_parameters_may_be_refitted_only_under_the_spec_that_chose_them(
    before: RunManifest | None, expected: bool
) -> None:
    assert read_earlier(before, None).same_spec == expected


def test_a_group_is_reused_from_the_row_that_has_its_fingerprint() -> None:
    key = GroupKey(2, OSLO)
    old = make_ledger_row(fingerprint="old")
    new = make_ledger_row(fingerprint="new")
    both = EarlierRuns(before={key: old}, unfinished={key: new})
    assert both.source_of(key, "old") is old
    assert both.source_of(key, "new") is new
    assert EarlierRuns(unfinished={key: new}).source_of(key, "new") is new


def test_seconds_are_learnt_from_the_run_before_and_the_resumed_one() -> None:
    before = by_group(
        pd.DataFrame(
            [
                make_ledger_row(0, "[]", seconds=3.0, n_target=30),
                make_ledger_row(1, '["north"]', seconds=None),
            ]
        )
    )
    kept = by_group(
        pd.DataFrame([make_ledger_row(2, OSLO, seconds=5.0, n_target=50, status="refreshed")])
    )
    unfinished = by_group(pd.DataFrame([make_ledger_row(2, ROMA, seconds=7.0)]))
    timed = EarlierRuns(kept=kept, before=before, unfinished=unfinished).timed
    assert timed.to_dict("list") == {
        "status": ["trained", "refreshed"],
        "seconds": [3.0, 5.0],
        "n_target": [30.0, 50.0],
    }


def test_without_earlier_groups_no_seconds_are_known() -> None:
    timed = EarlierRuns().timed
    assert timed.empty
    assert timed.dtypes.to_dict() == {"status": object, "seconds": float, "n_target": float}


def test_rows_by_group_are_found_whatever_kind_of_number_the_grain_is() -> None:
    rows = by_group(pd.DataFrame([make_ledger_row(2, OSLO)]).astype({"grain": "int32"}))
    assert list(rows) == [(2, OSLO)]
