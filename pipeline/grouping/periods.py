"""Lengths of time as people write them: ``12 months``, ``6 hours``, ``1 day``."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import SpecError

SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
MONTHS = {"month": 1, "quarter": 3, "year": 12}
UNITS = (*SECONDS, *MONTHS)
# Keeps moments within what 64 bits of microseconds hold.
MOST_YEARS = 1000
SECONDS_PER_MONTH = 2_629_746
_WRITTEN = re.compile(r"^\s*(\d+)\s+([a-z]+?)s?\s*$")

Times = npt.NDArray[np.datetime64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Period:
    """A whole number of one unit of time; months, quarters and years are calendar ones.

    Args:
        count: how many units; 0 or more.
        unit: one of minute, hour, day, week, month, quarter, year.
    """

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Period":
        """Read ``12 months`` or ``1 day``.

        Raises:
            SpecError: if the text is not a whole number and a known unit, or is longer than 1,000 years.
        """
        found = _WRITTEN.match(text.lower())
        if found is None or found.group(2) not in UNITS:
            raise SpecError(f"{text!r} is not a length of time: expected a whole number and a unit, such as '12 months'; units: {', '.join(UNITS)}")
        count, unit = int(found.group(1)), found.group(2)
        if count * SECONDS.get(unit, MONTHS.get(unit, 0) * SECONDS_PER_MONTH) > MOST_YEARS * 12 * SECONDS_PER_MONTH:
            raise SpecError(f"{text!r} is too long: expected at most {MOST_YEARS} years")
        return cls(count, unit)

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'' if self.count == 1 else 's'}"

    @property
    def name(self) -> str:
        """The length as part of a column name, e.g. ``12_months``."""
        return str(self).replace(" ", "_")

    @property
    def is_calendar(self) -> bool:
        """Whether its length in seconds depends on the calendar."""
        return self.unit in MONTHS

    def times(self, factor: int) -> "Period":
        """This length, ``factor`` times over."""
        return Period(self.count * factor, self.unit)

    def before(self, times: Times, last_days: Flags | None = None) -> Times:
        """The moments this length earlier; see `moved`."""
        return self.moved(times, -1, last_days)

    def after(self, times: Times, last_days: Flags | None = None) -> Times:
        """The moments this length later; see `moved`."""
        return self.moved(times, 1, last_days)

    def moved(self, times: Times, factor: int | Counts, last_days: Flags | None = None) -> Times:
        """The moments ``factor`` times this length later, or earlier where it is negative.

        Args:
            times: moments.
            factor: one for all of them, or one for each.
            last_days: moments that go from the last day of a month to the last day of another, as
                30 April to 31 May. Otherwise the day of the month stays, and a day that a month lacks
                becomes that month's last day. Fixed lengths pay no attention to it.
        """
        times = times.astype("datetime64[us]")
        if not self.is_calendar:
            length = np.timedelta64(self.count * SECONDS[self.unit], "s").astype("timedelta64[us]")
            later: Times = times + factor * length
            return later
        return _add_months(times, factor * (self.count * MONTHS[self.unit]), last_days)

    def unit_numbers(self, times: Times) -> Counts:
        """Which month, quarter or year holds each moment, counted from 1970; for calendar lengths only."""
        months = times.astype("datetime64[M]").astype(np.int64)
        numbers: Counts = months // MONTHS[self.unit]
        return numbers

    def floor(self, moment: pd.Timestamp) -> pd.Timestamp:
        """The start of the unit that holds the moment; weeks start on Monday."""
        if self.unit == "week":
            return moment.normalize() - pd.Timedelta(days=moment.weekday())
        if self.unit in ("minute", "hour", "day"):
            return moment.floor({"minute": "min", "hour": "h", "day": "D"}[self.unit])
        if self.unit == "month":
            return moment.normalize().replace(day=1)
        if self.unit == "quarter":
            return moment.normalize().replace(day=1, month=3 * ((moment.month - 1) // 3) + 1)
        return moment.normalize().replace(day=1, month=1)

    def add(self, moment: pd.Timestamp, factor: int = 1, *, last_day: bool = False) -> pd.Timestamp:
        """The moment ``factor`` times this length later; see `moved`."""
        moments = np.array([moment.to_datetime64()])
        return pd.Timestamp(self.moved(moments, factor, np.array([last_day]))[0])


def on_last_day(times: Times) -> Flags:
    """Whether each moment lies on the last day of its month; that of a quarter or a year is one, too."""
    next_day = times.astype("datetime64[D]") + np.timedelta64(1, "D")
    found: Flags = next_day.astype("datetime64[M]") != times.astype("datetime64[M]")
    return found


def _add_months(times: Times, months: int | Counts, last_days: Flags | None) -> Times:
    start = times.astype("datetime64[M]")
    rest = times - start.astype("datetime64[us]")
    moved = start + np.asarray(months).astype("timedelta64[M]")
    with np.errstate(invalid="ignore"):  # no time stays no time
        day = rest // np.timedelta64(1, "D")
    days_of_month = (moved + np.timedelta64(1, "M")).astype("datetime64[D]") - moved.astype("datetime64[D]")
    last_day = days_of_month.astype(int) - 1
    within_day = rest - day * np.timedelta64(1, "D")
    kept_day = np.minimum(day, last_day)
    if last_days is not None:
        kept_day = np.where(last_days, last_day, kept_day)
    days = kept_day.astype("timedelta64[D]").astype("timedelta64[us]")
    shifted: Times = moved.astype("datetime64[us]") + days + within_day
    return shifted
