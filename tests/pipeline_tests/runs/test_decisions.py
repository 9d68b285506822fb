"""The table of decisions: one launch of `champion` after the other."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.runs.decisions import Decisions
from pipeline.tables import DECISIONS
from pipeline.testing.doubles import MemoryTables
from pipeline.testing.runs import own_tables

OSLO, ROMA = '["north","oslo"]', '["south","roma"]'


@pytest.fixture
def decisions() -> Decisions:
    """The decisions of a fleet that has made none."""
    tables: Any = MemoryTables()
    return Decisions(own_tables(tables, "small"))


def decide(
    decision_id: str, hour: int, groups: tuple[str, ...] = (OSLO,), **columns: Any
) -> pd.DataFrame:
    """The rows of one launch."""
    row = {
        "decision_id": decision_id,
        "decided_at": pd.Timestamp(f"2024-10-27 {hour:02}:00", tz="UTC"),
        "decision": "judge",
        "champion_before": "1",
        "champion_after": "2",
        "from_version": "run-1",
        "to_version": "run-2",
        "moved": True,
        "grain": 2,
        **columns,
    }
    return pd.DataFrame([{**row, "group_id": group} for group in groups])


def test_a_fleet_that_never_decided_has_moved_no_alias(decisions: Decisions) -> None:
    moves = decisions.alias_moves()
    assert moves.empty
    assert "champion_after" in moves.columns
    assert decisions.rolled_back_from("run-2") == frozenset()


def test_alias_moves_are_one_row_per_launch_oldest_first(decisions: Decisions) -> None:
    decisions.write(decide("later", 9, (OSLO, ROMA), champion_before="2", champion_after="3"))
    decisions.write(decide("first", 8, (OSLO, ROMA)))
    moves = decisions.alias_moves()
    assert moves[["decision_id", "champion_before", "champion_after"]].to_numpy().tolist() == [
        ["first", "1", "2"],
        ["later", "2", "3"],
    ]
    assert moves["moved"].tolist() == [True, True]


def test_rows_of_a_decision_are_read_back_as_the_contract_has_them(decisions: Decisions) -> None:
    rows = decide("first", 8, (OSLO, ROMA), n_rows=[9], why=None, p_value=0.25)
    rows["n_rows"] = pd.Series([9, None], dtype=object)
    decisions.write(rows)
    decisions.write(decide("other", 9))
    found = decisions.rows_of("first")
    assert list(found.columns) == DECISIONS.schema.names
    assert found["group_id"].tolist() == [OSLO, ROMA]
    assert (found["n_rows"][0], found["n_rows"].isna().tolist()) == (9, [False, True])
    assert found["p_value"].tolist() == [0.25, 0.25]
    assert found["why"].tolist() == [None, None]
    # Columns that the launch did not have are null.
    assert found["decided_by"].isna().all()
    assert found["loss_champion"].isna().all()


@pytest.mark.parametrize("null", [None, np.nan])
def test_what_has_no_text_is_null_and_numbers_are_written_as_text(
    decisions: Decisions, null: Any
) -> None:
    decisions.write(decide("first", 8, champion_before=null, champion_after=7))
    (row,) = decisions.rows_of("first").to_dict("records")
    assert (row["champion_before"], row["champion_after"]) == (None, "7")


def test_what_a_launch_wrote_is_replaced_when_it_was_carried_out(decisions: Decisions) -> None:
    decisions.write(decide("other", 7))
    decisions.write(decide("first", 8, (OSLO, ROMA), moved=None))
    assert decisions.rows_of("first")["moved"].tolist() == [None, None]
    decisions.write(decide("first", 8, (OSLO, ROMA)))
    assert decisions.rows_of("first")["moved"].tolist() == [True, True]
    assert len(decisions.rows_of("other")) == 1


def test_rows_of_an_unknown_decision_are_none(decisions: Decisions) -> None:
    decisions.write(decide("first", 8))
    assert decisions.rows_of("second").empty


def test_groups_are_rolled_back_from_the_version_that_answered_them(decisions: Decisions) -> None:
    back = {"decision": "rollback", "from_version": "run-2", "to_version": "run-1"}
    decisions.write(decide("judged", 7, (OSLO, ROMA)))
    decisions.write(decide("back", 8, (OSLO,), **back))
    decisions.write(decide("not done", 9, (ROMA,), **back, moved=False))
    assert decisions.rolled_back_from("run-2") == {(2, OSLO)}
    assert decisions.rolled_back_from("run-1") == frozenset()


def test_a_trial_decides_for_itself() -> None:
    tables: Any = MemoryTables()
    Decisions(own_tables(tables, "small")).write(decide("first", 8))
    assert Decisions(own_tables(tables, "small_trial")).alias_moves().empty
