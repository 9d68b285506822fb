from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.periods import MONTHS, SECONDS, UNITS, Period, from_wall_clock

moments = st.datetimes(
    min_value=pd.Timestamp("1990-01-01"), max_value=pd.Timestamp("2060-01-01")
).map(lambda m: pd.Timestamp(m).as_unit("us"))
counts = st.integers(0, 400)


def shifted(length: str, moment: str, factor: int = 1) -> str:
    return str(Period.parse(length).add(pd.Timestamp(moment), factor))


@given(moments, counts, st.sampled_from(sorted(SECONDS)))
def test_a_fixed_length_added_and_taken_away_is_nothing(
    moment: pd.Timestamp, count: int, unit: str
) -> None:
    period = Period(count, unit)
    assert period.add(period.add(moment), -1) == moment


@given(moments, counts, st.sampled_from(sorted(MONTHS)))
def test_calendar_lengths_return_to_the_same_month_and_at_most_three_days_earlier(
    moment: pd.Timestamp, count: int, unit: str
) -> None:
    period = Period(count, unit)
    back = period.add(period.add(moment), -1)
    assert (back.year, back.month) == (moment.year, moment.month)
    assert pd.Timedelta(0) <= moment - back <= pd.Timedelta(days=3)
    if moment.day <= 28:
        assert back == moment


@given(moments, counts, st.sampled_from(UNITS))
def test_shifting_agrees_with_pandas(moment: pd.Timestamp, count: int, unit: str) -> None:
    months = count * MONTHS.get(unit, 0)
    seconds = count * SECONDS.get(unit, 0)
    assert Period(count, unit).add(moment) == moment + pd.DateOffset(months=months, seconds=seconds)


@given(moments, moments, counts, st.sampled_from(UNITS))
def test_shifting_keeps_the_order(
    one: pd.Timestamp, other: pd.Timestamp, count: int, unit: str
) -> None:
    early, late = sorted([one, other])
    assert Period(count, unit).add(early) <= Period(count, unit).add(late)


@given(moments, st.sampled_from(UNITS))
def test_a_unit_holds_its_moment(moment: pd.Timestamp, unit: str) -> None:
    period = Period(1, unit)
    start = period.floor(moment)
    assert start <= moment < period.add(start)
    assert period.floor(start) == start


@pytest.mark.parametrize(
    ("moment", "length", "factor", "expected"),
    [
        ("2024-01-31", "1 month", 1, "2024-02-29 00:00:00"),
        ("2023-01-31", "1 month", 1, "2023-02-28 00:00:00"),
        ("2024-03-31", "1 month", -1, "2024-02-29 00:00:00"),
        ("2024-02-29", "1 year", 1, "2025-02-28 00:00:00"),
        ("2024-11-30 23:59:59", "1 quarter", 1, "2025-02-28 23:59:59"),
        ("2024-01-31", "1 month", 2, "2024-03-31 00:00:00"),
        ("2024-12-24 06:30", "2 weeks", 1, "2025-01-07 06:30:00"),
        ("2024-03-01 00:30", "6 hours", -1, "2024-02-29 18:30:00"),
        ("1969-12-31 23:00", "2 hours", 1, "1970-01-01 01:00:00"),
        ("1968-01-31", "1 month", 1, "1968-02-29 00:00:00"),
        ("2024-05-05", "0 days", 1, "2024-05-05 00:00:00"),
    ],
)
def test_month_ends_weeks_and_hours(moment: str, length: str, factor: int, expected: str) -> None:
    assert shifted(length, moment, factor) == expected


def test_weeks_start_on_monday() -> None:
    assert Period(1, "week").floor(pd.Timestamp("2024-12-29 12:00")) == pd.Timestamp("2024-12-23")
    assert Period(1, "week").floor(pd.Timestamp("2024-12-23")) == pd.Timestamp("2024-12-23")


def test_quarters_start_with_their_first_month() -> None:
    assert Period(1, "quarter").floor(pd.Timestamp("2024-06-30 23:59")) == pd.Timestamp(
        "2024-04-01"
    )
    assert Period(1, "quarter").floor(pd.Timestamp("2024-05-31")) == pd.Timestamp("2024-04-01")


def test_many_moments_are_shifted_one_by_one() -> None:
    times = np.array(["2024-01-31", "2024-02-01", "NaT"], dtype="datetime64[us]")
    moved = Period(1, "month").after(times)
    assert (
        moved[:2].tolist()
        == np.array(["2024-02-29", "2024-03-01"], dtype="datetime64[us]").tolist()
    )
    assert np.isnat(moved[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 months", Period(12, "month")),
        (" 1  Day ", Period(1, "day")),
        ("0 days", Period(0, "day")),
        ("1 hours", Period(1, "hour")),
    ],
)
def test_people_write_lengths_in_their_way(text: str, expected: Period) -> None:
    assert Period.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "day", "1", "-1 day", "1.5 days", "1 moon", "1 s", "one day", "1 day 2 hours", "1d"],
)
def test_bad_texts_are_refused_with_the_units_there_are(text: str) -> None:
    with pytest.raises(SpecError, match=r"is not a length of time.*units: minute, hour") as caught:
        Period.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["1001 years", "99999999999999 minutes", "9" * 30 + " days"])
def test_lengths_that_no_clock_holds_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="too long: expected at most 1000 years"):
        Period.parse(text)


@pytest.mark.parametrize("text", ["1 month", "12 months", "0 days", "1 day"])
def test_a_length_reads_as_it_was_written(text: str) -> None:
    assert str(Period.parse(text)) == text
    assert Period.parse(text).name == text.replace(" ", "_")


BERLIN = "Europe/Berlin"


def local(*texts: str) -> Any:
    return (
        pd.DatetimeIndex(texts)
        .tz_localize(BERLIN)
        .tz_convert("UTC")
        .tz_localize(None)
        .to_numpy()
        .astype("datetime64[us]")
    )


@pytest.mark.parametrize("text", ["1 day", "1 week", "1 month", "1 year"])
def test_days_and_longer_follow_the_clocks_of_the_zone(text: str) -> None:
    # The clocks were put forward on 31 March and back on 27 October 2024.
    midnights = pd.date_range("2023-01-01", "2025-12-31", freq="D", tz=BERLIN)
    moments = midnights.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    moved = Period.parse(text, BERLIN).before(moments)
    shown = pd.DatetimeIndex(moved).tz_localize("UTC").tz_convert(BERLIN)
    assert (shown == shown.normalize()).all()
    naive = Period.parse(text).before(
        midnights.tz_localize(None).to_numpy().astype("datetime64[us]")
    )
    assert (shown.tz_localize(None).to_numpy() == naive).all()


@pytest.mark.parametrize(
    "zone",
    ["America/Santiago", "Africa/Cairo", "America/Havana", "Asia/Beirut", "Australia/Lord_Howe"],
)
@pytest.mark.parametrize(("text", "days"), [("1 day", 1), ("1 week", 7)])
def test_days_that_begin_at_one_oclock_follow_those_that_begin_at_midnight(
    zone: str, text: str, days: int
) -> None:
    # Clocks that are put forward at midnight show none on that day.
    dates = pd.date_range("2023-01-01", "2025-12-31", freq="D")
    begin = dates.tz_localize(
        zone, nonexistent="shift_forward", ambiguous=np.ones(len(dates), dtype=bool)
    )
    moments = begin.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    period = Period.parse(text, zone)
    assert (period.before(moments)[days:] == moments[:-days]).all()
    assert (period.after(moments)[:-days] == moments[days:]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_no_length_moves_nothing_also_where_clocks_show_an_hour_twice(unit: str) -> None:
    hours = (
        pd.date_range("2024-10-26", "2024-10-28", freq="30min").to_numpy().astype("datetime64[us]")
    )
    assert (Period(0, unit, BERLIN).before(hours) == hours).all()


def test_hours_are_as_long_in_every_zone() -> None:
    moments = local("2024-03-31 05:00", "2024-10-27 05:00")
    for text in ("24 hours", "90 minutes"):
        assert (
            Period.parse(text, BERLIN).before(moments) == Period.parse(text).before(moments)
        ).all()


def test_units_begin_at_midnight_of_the_zone() -> None:
    moment = pd.Timestamp(local("2024-07-01 00:30")[0])
    assert moment == pd.Timestamp("2024-06-30 22:30")
    for unit in ("day", "month", "quarter"):
        assert Period(1, unit, BERLIN).floor(moment) == pd.Timestamp(local("2024-07-01")[0])
    assert Period(1, "month").floor(moment) == pd.Timestamp("2024-06-01")
    assert Period(1, "month", BERLIN).unit_numbers(local("2024-07-01 00:30")) == Period(
        1, "month"
    ).unit_numbers(np.array(["2024-07-15"], "datetime64[us]"))


def test_clocks_that_show_a_time_twice_or_never() -> None:
    twice = from_wall_clock(np.array(["2024-10-27T02:30"], "datetime64[us]"), BERLIN)
    assert twice == np.array(["2024-10-27T00:30"], "datetime64[us]")
    never = from_wall_clock(np.array(["2024-03-31T02:30"], "datetime64[us]"), BERLIN)
    assert never == np.array(["2024-03-31T01:00"], "datetime64[us]")
    assert np.isnat(Period(1, "day", BERLIN).before(np.array(["NaT"], "datetime64[us]"))).all()
