import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.spec import SplitsSpec
from pipeline.training.splits import FIT, GAP, REPORT, TUNE, Cutoffs, resolve_cutoffs

START, MIDDLE, END = (
    pd.Timestamp("2024-10-01"),
    pd.Timestamp("2024-12-01"),
    pd.Timestamp("2025-01-01"),
)
CUTOFFS = Cutoffs(as_of=END, tune_start=START, report_start=MIDDLE)
times = st.datetimes(min_value=pd.Timestamp("2024-08-01"), max_value=pd.Timestamp("2025-01-01"))


def moments(*texts: str) -> npt.NDArray[np.datetime64]:
    return np.array(texts, dtype="datetime64[us]")


def assigned(time: str, known_at: str | None = None) -> str:
    return str(CUTOFFS.assign(moments(time), moments(known_at or time))[0])


@given(st.lists(st.tuples(times, times), min_size=1, max_size=40))
def test_no_split_learns_from_what_was_known_after_it_was_closed(
    pairs: list[tuple[pd.Timestamp, pd.Timestamp]],
) -> None:
    time, known_at = (
        np.array(column, dtype="datetime64[us]") for column in zip(*pairs, strict=True)
    )
    split = CUTOFFS.assign(time, known_at)
    assert set(split) <= {FIT, TUNE, REPORT, GAP}
    start, middle = START.to_datetime64(), MIDDLE.to_datetime64()
    assert (np.maximum(time, known_at)[split == FIT] < start).all()
    assert (np.maximum(time, known_at)[split == TUNE] < middle).all()
    assert (time[split == TUNE] >= start).all()
    assert ((time >= middle) == (split == REPORT)).all()


def test_cutoffs_belong_to_the_later_part() -> None:
    assert assigned("2024-09-30 23:59:59.999") == FIT
    assert assigned("2024-10-01") == TUNE
    assert assigned("2024-11-30 23:59:59.999") == TUNE
    assert assigned("2024-12-01") == REPORT


@pytest.mark.parametrize(
    ("time", "known_at"),
    [("2024-09-30", "2024-10-01"), ("2024-09-01", "2025-01-01"), ("2024-11-30", "2024-12-01")],
)
def test_outcomes_known_after_their_part_was_closed_are_gap_rows(time: str, known_at: str) -> None:
    assert assigned(time, known_at) == GAP


def test_a_row_without_a_time_is_in_no_split() -> None:
    assert assigned("NaT", "2024-01-01") == GAP
    assert assigned("2024-01-01", "NaT") == GAP


@pytest.mark.parametrize(
    ("newest", "report", "tune", "tune_start", "report_start"),
    [
        ("2013-12-24", "1 month", "2 months", "2013-10-01", "2013-12-01"),
        ("2013-12-01", "1 month", "1 month", "2013-11-01", "2013-12-01"),
        ("2015-07-01", "12 months", "12 months", "2013-08-01", "2014-08-01"),
        ("2024-12-25 17:30", "1 week", "3 days", "2024-12-20", "2024-12-23"),
        ("2024-02-15", "1 quarter", "1 year", "2023-01-01", "2024-01-01"),
        ("2024-02-15 13:45", "6 hours", "1 day", "2024-02-14 08:00", "2024-02-15 08:00"),
        ("2024-03-31", "1 year", "1 month", "2023-12-01", "2024-01-01"),
    ],
)
def test_cutoffs_move_by_whole_units(
    newest: str, report: str, tune: str, tune_start: str, report_start: str
) -> None:
    cutoffs = resolve_cutoffs(
        SplitsSpec(report=report, tune=tune), pd.Timestamp("2030-01-01"), pd.Timestamp(newest)
    )
    assert (cutoffs.tune_start, cutoffs.report_start) == (
        pd.Timestamp(tune_start),
        pd.Timestamp(report_start),
    )


@given(
    st.datetimes(min_value=pd.Timestamp("2000-01-01"), max_value=pd.Timestamp("2030-01-01")),
    st.integers(1, 24),
    st.integers(1, 24),
)
def test_the_newest_row_is_always_a_report_row(
    newest: pd.Timestamp, report: int, tune: int
) -> None:
    cutoffs = resolve_cutoffs(
        SplitsSpec(report=f"{report} months", tune=f"{tune} weeks"),
        pd.Timestamp(newest),
        pd.Timestamp(newest),
    )
    assert cutoffs.tune_start < cutoffs.tune_middle < cutoffs.report_start <= pd.Timestamp(newest)


def test_newer_rows_of_the_same_unit_move_no_cutoff() -> None:
    splits = SplitsSpec(report="1 month", tune="1 month")
    first, last = (
        resolve_cutoffs(splits, END, pd.Timestamp(day))
        for day in ("2024-12-01", "2024-12-31 23:59")
    )
    assert first == last
