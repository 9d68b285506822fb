"""What looks wrong in a feature table that keeps its contract.

Lags that miss their rows, and columns that look like the future.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipeline.features.history import (
    Floats,
    bounds_of,
    codes_of,
    search_slices,
    times_of,
    values_of,
)
from pipeline.periods import SECONDS, Flags, Period, Times
from pipeline.spec import FleetSpec

# A column looks like the target from this share of equal values on, or this correlation of their
# changes: the delay on departure, which is known before the delay on arrival, has 0.93; a copy with
# noise of a tenth has 0.995.
MIN_EQUAL_SHARE = 0.95
MIN_CORRELATION = 0.99
# Fewer changes than that say nothing.
MIN_CHANGES = 30

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Suspicions:
    """What the author of a fleet should look at; empty where nothing is suspicious.

    Args:
        missed_lags: per lag, how many of its nulls lie beside a value.
        like_the_target: per column of `features.columns`, how closely it follows the target of its
            own row.
        other_midnights: for `time`, the hours of UTC at which its days seem to begin.
    """

    missed_lags: dict[str, str]
    like_the_target: dict[str, str]
    other_midnights: dict[str, str]


def columns_looked_at(spec: FleetSpec) -> list[str]:
    """The columns of the feature table that `find_suspicions` reads."""
    columns = [*spec.entity, "time", spec.target.column, *_quantities(spec)]
    for lag in spec.all_lags:
        columns += [lag.column, *(lag.name(periods) for periods in lag.periods)]
    return list(dict.fromkeys(columns))


def find_suspicions(table: pa.Table, spec: FleetSpec) -> Suspicions:
    """Look for what mistakes in features.sql and defs.yaml leave behind.

    A lag misses a row where it is null although the entity has a value in the month, quarter or
    year that it looks at, or less than one fixed period from the moment that it looks at: that
    value was known too late, or the series keeps other hours.

    A column looks like the target where it equals it in nearly all rows in which the target is not
    what it was in the entity's row before; or where its changes from row to row are correlated with
    the target's, and more closely than its changes one row earlier are. What is known beforehand
    cannot follow each change.

    Args:
        table: the columns of `columns_looked_at`, all rows of some entities.
        spec: the fleet.
    """
    codes = codes_of(table, tuple(spec.entity))
    time = times_of(table["time"])
    missed = {}
    for lag in spec.all_lags:
        values = values_of(table, lag.column)
        for periods in lag.periods:
            period = spec.step
            is_missed = np.isnan(values_of(table, lag.name(periods)))
            is_missed &= _has_value_near(codes, time, values, period, periods)
            if is_missed.any():
                missed[lag.name(periods)] = f"{is_missed.sum():,} of {table.num_rows:,} rows"
    alike = {}
    target = _target(table, spec)
    order = np.lexsort((time, codes))
    for name in _quantities(spec):
        likeness = _likeness(codes[order], values_of(table, name)[order], target[order])
        if likeness:
            alike[name] = likeness
    return Suspicions(missed, alike, _other_midnights(time, spec))


def _other_midnights(time: Times, spec: FleetSpec) -> dict[str, str]:
    """Series whose rows all lie at one hour of UTC that is not midnight, or at two adjacent ones.

    Only series of days and longer are looked at. Such hours are the midnights of another time zone,
    two of them its winter and summer; counted in UTC, days are cut in the wrong place, and lags
    miss their rows after each change of the clocks.
    """
    if spec.timezone is not None or spec.period is None or spec.step.unit in ("minute", "hour"):
        return {}
    seen = time[~np.isnat(time)]
    since_midnight = np.unique(
        (seen - seen.astype("datetime64[D]")).astype("timedelta64[s]").astype(np.int64)
    )
    one_hour, one_day = SECONDS["hour"], SECONDS["day"]
    # The hours of winter and summer; the later may come first, beyond midnight.
    shifts = (one_hour, one_day - one_hour)
    is_one = len(since_midnight) == 1 and since_midnight[0] != 0
    is_pair = len(since_midnight) == 2 and int(np.ptp(since_midnight)) in shifts  # noqa: PLR2004
    if not (is_one or is_pair):
        return {}
    hours = " or ".join(
        f"{second // one_hour:02d}:{second % one_hour // 60:02d}" for second in since_midnight
    )
    return {spec.time: f"all rows lie at {hours} UTC"}


def _quantities(spec: FleetSpec) -> list[str]:
    """The columns of `features.columns` that hold numbers."""
    texts = {*spec.features.categoricals, *spec.key_columns}
    return [name for name in spec.features.columns if name not in texts]


def _target(table: pa.Table, spec: FleetSpec) -> Floats:
    """The target as numbers: classes that are numbers as these, others by alphabetical place."""
    if not spec.is_class_task:
        return values_of(table, spec.target.column)
    classes = table[spec.target.column].to_pandas()
    numbers = pd.to_numeric(classes, errors="coerce")
    if (numbers.isna() & classes.notna()).any():
        codes, _ = pd.factorize(classes, sort=True)
        numbers = pd.Series(codes).where(codes >= 0)
    target: Floats = numbers.to_numpy(np.float64)
    return target


def _has_value_near(
    codes: Codes, time: Times, values: Floats, period: Period, periods: int
) -> Flags:
    """Whether the entity has a value near the moment that a lag looks at.

    That is in the calendar unit that many periods before, or less than a fixed period away.
    """
    if period.is_calendar:
        clock = period.unit_numbers(time)
        first = clock - period.count * periods
        last = first
    else:
        clock = period.wall_clock(time).astype(np.int64)
        length = period.count * SECONDS[period.unit] * 1_000_000
        first = clock - (periods + 1) * length + 1
        last = clock - (periods - 1) * length - 1
    observed = np.flatnonzero(~np.isnan(values))
    order = observed[np.lexsort((clock[observed], codes[observed]))]
    starts, ends = bounds_of(codes[order], codes)
    low = search_slices(clock[order], starts, ends, first, side="left")
    high = search_slices(clock[order], starts, ends, last, side="right")
    near: Flags = high > low
    return near


def _likeness(codes: Codes, values: Floats, target: Floats) -> str | None:
    """What makes a column look like the target; None if nothing does.

    Both are in the order of entities and times.
    """
    is_next = codes[1:] == codes[:-1]
    target_change = np.where(is_next, np.diff(target), np.nan)
    change = np.where(is_next, np.diff(values), np.nan)
    change_before = np.concatenate([[np.nan], change[:-1]])
    change_before = np.where(is_next, change_before, np.nan)
    moved = np.isfinite(change) & np.isfinite(target_change) & (target_change != 0)
    if moved.sum() < MIN_CHANGES:
        return None
    equal = float((values[1:] == target[1:])[moved].mean())
    if equal >= MIN_EQUAL_SHARE:
        return f"equal to the target in {equal:.1%} of the rows in which the target changes"
    same = _correlation(change, target_change)
    if same >= MIN_CORRELATION and same > _correlation(change_before, target_change):
        return f"changes with the target of the same row, correlation {same:.3f}"
    return None


def _correlation(one: Floats, other: Floats) -> float:
    """Absolute correlation over the rows that have both; 0 where one of them does not change."""
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < MIN_CHANGES or not np.ptp(one[both]) or not np.ptp(other[both]):
        return 0.0
    return float(abs(np.corrcoef(one[both], other[both])[0, 1]))
