"""Lengths of time as people write them: ``12 months``, ``6 hours``, ``1 day``."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import SpecError

SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
MOMENT_EXAMPLES = "one such as 2013-12-24 or 2013-12-24T18:00"
MONTHS = {"month": 1, "quarter": 3, "year": 12}
UNITS = (*SECONDS, *MONTHS)
# Keeps moments within what 64 bits of microseconds hold.
MAX_YEARS = 1000
SECONDS_PER_MONTH = 2_629_746
# Units that are as long in every zone.
_ELAPSED = ("minute", "hour")
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
        zone: time zone whose days, weeks and months are counted, e.g. Europe/Berlin; None is UTC.
            Minutes and hours are as long everywhere.
    """

    count: int
    unit: str
    zone: str | None = None

    @classmethod
    def parse(cls, text: str, zone: str | None = None) -> "Period":
        """Read ``12 months`` or ``1 day``.

        Args:
            text: as people write it.
            zone: see the class.

        Raises:
            SpecError: if the text is not a whole number and a known unit, or is longer than 1,000
                years.
        """
        written = _WRITTEN.match(text.lower())
        if written is None or written.group(2) not in UNITS:
            raise SpecError(
                f"{text!r} is not a length of time: expected a whole number and a unit, such as "
                f"'12 months'; units: {', '.join(UNITS)}"
            )
        count, unit = int(written.group(1)), written.group(2)
        unit_seconds = SECONDS.get(unit, MONTHS.get(unit, 0) * SECONDS_PER_MONTH)
        if count * unit_seconds > MAX_YEARS * 12 * SECONDS_PER_MONTH:
            raise SpecError(f"{text!r} is too long: expected at most {MAX_YEARS} years")
        return cls(count, unit, zone)

    def __str__(self) -> str:
        if self.count == 1:
            return f"1 {self.unit}"
        return f"{self.count} {self.unit}s"

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
        return Period(self.count * factor, self.unit, self.zone)

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
                30 April to 31 May. Otherwise the day of the month stays, and a day that a month
                lacks becomes that month's last day. Fixed lengths ignore it.
        """
        times = times.astype("datetime64[us]")
        if self.count == 0:
            # By way of clocks, one of two hours that they show twice would become the other.
            return times
        times = self.wall_clock(times)
        if self.is_calendar:
            moved = _add_months(times, factor * (self.count * MONTHS[self.unit]), last_days)
        else:
            length = np.timedelta64(self.count * SECONDS[self.unit], "s").astype("timedelta64[us]")
            moved = times + factor * length
        return self._moments(moved)

    def wall_clock(self, moments: Times) -> Times:
        """What the zone's clocks show, for units of days and longer; else UTC."""
        if self.zone is None or self.unit in _ELAPSED:
            return moments
        return to_wall_clock(moments, self.zone)

    def _moments(self, wall_clock: Times) -> Times:
        """The inverse of `wall_clock`."""
        if self.zone is None or self.unit in _ELAPSED:
            return wall_clock
        return from_wall_clock(wall_clock, self.zone)

    def unit_numbers(self, times: Times) -> Counts:
        """Which month, quarter or year holds each moment, counted from 1970.

        For calendar lengths only.
        """
        months = self.wall_clock(times).astype("datetime64[M]").astype(np.int64)
        numbers: Counts = months // MONTHS[self.unit]
        return numbers

    def floor(self, moment: pd.Timestamp) -> pd.Timestamp:
        """The start of the unit that holds the moment; weeks start on Monday."""
        moments = np.array([moment.to_datetime64()], "datetime64[us]")
        start = self._floor(pd.Timestamp(self.wall_clock(moments)[0]))
        starts = np.array([start.to_datetime64()], "datetime64[us]")
        return pd.Timestamp(self._moments(starts)[0])

    def _floor(self, wall_clock: pd.Timestamp) -> pd.Timestamp:
        if self.unit == "week":
            return wall_clock.normalize() - pd.Timedelta(days=wall_clock.weekday())
        if self.unit in ("minute", "hour", "day"):
            return wall_clock.floor({"minute": "min", "hour": "h", "day": "D"}[self.unit])
        if self.unit == "month":
            return wall_clock.normalize().replace(day=1)
        if self.unit == "quarter":
            return wall_clock.normalize().replace(
                day=1, month=3 * ((wall_clock.month - 1) // 3) + 1
            )
        return wall_clock.normalize().replace(day=1, month=1)

    def add(self, moment: pd.Timestamp, factor: int = 1, *, last_day: bool = False) -> pd.Timestamp:
        """The moment ``factor`` times this length later; see `moved`."""
        moments = np.array([moment.to_datetime64()])
        return pd.Timestamp(self.moved(moments, factor, np.array([last_day]))[0])


def to_wall_clock(moments: Times, zone: str) -> Times:
    """What the clocks of a zone show at moments of UTC.

    The beginning of a day is midnight, even where clocks skip it: in Chile or Egypt one day in
    spring begins at one o'clock, which would not be a whole day after the midnight before.
    """
    local = pd.DatetimeIndex(moments).tz_localize("UTC").tz_convert(zone).tz_localize(None)
    clock: Times = local.to_numpy().astype("datetime64[us]")
    midnight = clock.astype("datetime64[D]").astype("datetime64[us]")
    first_hour = np.flatnonzero((clock > midnight) & (clock - midnight <= np.timedelta64(1, "h")))
    begins = from_wall_clock(midnight[first_hour], zone) == moments[first_hour]
    clock[first_hour[begins]] = midnight[first_hour[begins]]
    return clock


def from_wall_clock(clock: Times, zone: str) -> Times:
    """The moments of UTC at which the clocks of a zone show these times.

    A time that they show twice, in autumn, means the first; one that they skip, in spring, means
    the end of the gap.
    """
    is_first = np.ones(len(clock), dtype=bool)
    local = pd.DatetimeIndex(clock).tz_localize(
        zone, ambiguous=is_first, nonexistent="shift_forward"
    )
    moments: Times = local.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    return moments


def on_last_day(times: Times) -> Flags:
    """Whether each moment lies on the last day of its month.

    The last day of a quarter or a year is one, too.
    """
    next_day = times.astype("datetime64[D]") + np.timedelta64(1, "D")
    is_last: Flags = next_day.astype("datetime64[M]") != times.astype("datetime64[M]")
    return is_last


def _add_months(times: Times, months: int | Counts, last_days: Flags | None) -> Times:
    start = times.astype("datetime64[M]")
    rest = times - start.astype("datetime64[us]")
    moved = start + np.asarray(months).astype("timedelta64[M]")
    with np.errstate(invalid="ignore"):  # NaT stays NaT
        day = rest // np.timedelta64(1, "D")
    days_of_month = (moved + np.timedelta64(1, "M")).astype("datetime64[D]") - moved.astype(
        "datetime64[D]"
    )
    last_day = days_of_month.astype(int) - 1
    within_day = rest - day * np.timedelta64(1, "D")
    kept_day = np.minimum(day, last_day)
    if last_days is not None:
        kept_day = np.where(last_days, last_day, kept_day)
    days = kept_day.astype("timedelta64[D]").astype("timedelta64[us]")
    shifted: Times = moved.astype("datetime64[us]") + days + within_day
    return shifted


def parse_moment(text: str, zone: str | None = None) -> pd.Timestamp:
    """Read a date or time.

    Args:
        text: what people write.
        zone: time zone of a text that names none; by default UTC.

    Returns:
        The moment, UTC without a zone.

    Raises:
        SpecError: if it is not a date or time.
    """
    # Coercing makes NaT of what is not a time, and of the text NaT, which pandas reads as a time.
    moment = pd.to_datetime(text, errors="coerce")
    if pd.isna(moment):
        raise SpecError(f"{text!r} is not a date or time; expected {MOMENT_EXAMPLES}")
    if moment.tzinfo is None and zone is not None:
        moment = moment.tz_localize(zone)
    if moment.tzinfo is None:
        return moment
    return moment.tz_convert("UTC").tz_localize(None)
