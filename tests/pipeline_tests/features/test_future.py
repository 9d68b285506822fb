from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.features.future import future_times
from pipeline.periods import Period
from pipeline.testing.data import small_spec


def made_up(period: str, horizon: str, *series: str, last_days: bool = False) -> list[list[str]]:
    """Per series the days that are made up after its newest."""
    spec = small_spec(period=period, horizon=horizon)
    newest = np.array(series, dtype="datetime64[us]")
    end = spec.horizon_end(pd.Timestamp(newest.max()))
    places, times = future_times(
        Period.parse(period),
        pd.Timestamp(newest.max()),
        end,
        newest,
        np.full(len(newest), last_days),
    )
    return [
        [str(moment)[:10] for moment in np.sort(times[places == place])]
        for place in range(len(newest))
    ]


@pytest.mark.parametrize(
    ("period", "newest", "expected"),
    [
        ("1 month", "2023-01-31", ["2023-02-28", "2023-03-31", "2023-04-30"]),
        ("1 month", "2023-02-28", ["2023-03-31", "2023-04-30", "2023-05-31"]),
        ("1 quarter", "2023-06-30", ["2023-09-30", "2023-12-31", "2024-03-31"]),
        ("1 year", "2023-02-28", ["2024-02-29", "2025-02-28", "2026-02-28"]),
    ],
)
def test_month_ends_are_followed_by_month_ends(
    period: str, newest: str, expected: list[str]
) -> None:
    horizon = period.replace("1", "3")
    assert made_up(period, horizon, newest, last_days=True) == [expected]


def test_a_series_that_lies_on_a_last_day_by_chance_keeps_its_day() -> None:
    assert made_up("1 month", "2 months", "2023-01-30") == [["2023-02-28", "2023-03-30"]]
    assert made_up("1 month", "2 months", "2023-02-28") == [["2023-03-28", "2023-04-28"]]


def test_each_series_keeps_its_own_day_and_its_number_of_rows() -> None:
    found = made_up("1 month", "1 month", "2023-03-15", "2023-03-01", "2022-11-20")
    assert found == [["2023-04-15"], ["2023-04-01"], ["2023-03-20"]]


def test_fixed_periods_go_on_from_the_newest_row_of_the_fleet() -> None:
    found = made_up("1 week", "15 days", "2023-03-15", "2023-03-01")
    assert found == [["2023-03-22", "2023-03-29"]] * 2


@pytest.mark.parametrize("series", [[], ["NaT"]])
def test_without_a_time_there_is_nothing_to_follow(series: list[Any]) -> None:
    newest = np.array(series, dtype="datetime64[us]")
    moment = pd.Timestamp("2023-01-01")
    places, times = future_times(
        Period(1, "month"),
        moment,
        moment + pd.Timedelta(days=40),
        newest,
        np.zeros(len(newest), bool),
    )
    assert len(places) == len(times) == 0
