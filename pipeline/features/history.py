"""Features of the past: lags and trailing windows, as of what was known, on one key group's rows.

Pure numpy over Arrow, so that Spark (once per key group) and a test (on a whole table) run the same
function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipeline.periods import Flags, Period, Times, on_last_day, to_wall_clock
from pipeline.spec import FleetSpec, LagSpec, RollingSpec, Statistic

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
# Of rows whose entity's every row lies on the last day of a month: true. Only in fleets whose
# period is a calendar one.
ON_LAST_DAYS = "_on_last_days"


@dataclass(frozen=True)
class HistoryPass:
    """One shuffle: rows brought together by `keys`, and the features that can be computed there."""

    keys: tuple[str, ...]
    lags: tuple[LagSpec, ...]
    windows: tuple[RollingSpec, ...]


def plan_passes(spec: FleetSpec) -> list[HistoryPass]:
    """Group the features of the past into as few shuffles as possible.

    A feature over ``[carrier, dest]`` can be computed where rows share ``[dest]``; everything could
    be computed where all rows are together, but in one worker, so only features over ``[]`` are.
    """
    lags: dict[tuple[str, ...], list[LagSpec]] = {}
    for lag in spec.all_lags:
        lags.setdefault(tuple(spec.entity), []).append(lag)
    windows: dict[tuple[str, ...], list[RollingSpec]] = {}
    for window in spec.features.rolling:
        windows.setdefault(_keys_of(window, spec), []).append(window)
    passes: dict[tuple[str, ...], HistoryPass] = {}
    for keys in sorted({**lags, **windows}, key=len):
        host = next((other for other in passes if other and set(other) <= set(keys)), keys)
        before = passes.get(host, HistoryPass(host, (), ()))
        passes[host] = HistoryPass(
            host,
            (*before.lags, *lags.get(keys, ())),
            (*before.windows, *windows.get(keys, ())),
        )
    return list(passes.values())


def _keys_of(window: RollingSpec, spec: FleetSpec) -> tuple[str, ...]:
    """The key columns whose rows a window summarises."""
    if window.over is None:
        return tuple(spec.finest)
    return tuple(window.over)


def add_history(table: pa.Table, spec: FleetSpec, features: HistoryPass) -> pa.Table:
    """Append the pass's lags and windows to the rows.

    Args:
        table: one row per entity and time, with `time`, `known_at`, the columns the features
            summarise, and optionally `ON_LAST_DAYS`; all rows that share the pass's keys.
        spec: the fleet.
        features: what to compute.

    Returns:
        The rows in their order, with one float64 column per feature; null where nothing was known.
    """
    time = times_of(table["time"])
    known_at = times_of(table["known_at"])
    last_days = flags_of(table)
    deadline = spec.horizon_period.before(time, last_days)
    # Without a horizon a row is predicted at its time: what comes true at that moment, its own
    # outcome first of all, is not known.
    end = np.minimum(deadline, time - np.timedelta64(1, "us"))
    for lag in features.lags:
        codes = codes_of(table, tuple(spec.entity))
        values = values_of(table, lag.column)
        for periods in lag.periods:
            step = spec.step.times(periods)
            rows = _row_at(codes, time, known_at, end, step.before(time, last_days))
            if step.is_calendar:
                rows = np.where(
                    rows >= 0, rows, _last_row_of_unit(codes, time, known_at, end, step)
                )
            column = np.where(rows >= 0, values[rows], np.nan)
            table = table.append_column(lag.name(periods), _nullable(column))
    for window in features.windows:
        codes = codes_of(table, _keys_of(window, spec))
        values = values_of(table, window.column)
        start = spec.in_zone(window.window).before(
            deadline, last_days & on_last_day(_wall_clock(deadline, spec))
        )
        columns = _windowed(codes, known_at, end, start, values, window.statistics)
        for statistic, column in zip(window.statistics, columns, strict=True):
            table = table.append_column(window.name(statistic), _nullable(column))
    return table


def _wall_clock(times: Times, spec: FleetSpec) -> Times:
    if spec.timezone is None:
        return times
    return to_wall_clock(times, spec.timezone)


def times_of(column: pa.ChunkedArray | pa.Array) -> Times:
    """A column of times as moments, UTC without a zone."""
    moments: Times = (
        column.cast(pa.timestamp("us")).to_numpy(zero_copy_only=False).astype("datetime64[us]")
    )
    return moments


def values_of(table: pa.Table, name: str) -> Floats:
    """A column of numbers; NaN where it is null or infinite."""
    values: Floats = table[name].cast(pa.float64()).to_numpy().astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values, type=pa.float64(), from_pandas=True)


def codes_of(table: pa.Table, keys: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """A number per row for its combination of key values; null is a value of its own."""
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for key in keys:
        dictionary = table[key].combine_chunks().dictionary_encode(null_encoding="encode")
        if isinstance(dictionary, pa.ChunkedArray):
            dictionary = dictionary.combine_chunks()
        size = len(dictionary.dictionary) + 1
        values = dictionary.indices.to_numpy(zero_copy_only=False)
        combined, _ = pd.factorize(codes * size + values)
        codes = combined.astype(np.int64)
    return codes


def flags_of(table: pa.Table | pa.RecordBatch) -> Flags:
    """The rows of series that lie on last days of months throughout.

    None where that does not matter.
    """
    if ON_LAST_DAYS not in table.schema.names:
        return np.zeros(table.num_rows, dtype=bool)
    flags: Flags = table.column(ON_LAST_DAYS).to_numpy(zero_copy_only=False).astype(bool)
    return flags


def _row_at(
    codes: npt.NDArray[np.int64], time: Times, known_at: Times, deadline: Times, moment: Times
) -> Indices:
    """Per row the row of the same code at a given moment, if known by its deadline; else -1."""
    order = np.lexsort((time, codes))
    starts, ends = bounds_of(codes[order], codes)
    position = search_slices(time[order], starts, ends, moment, side="left")
    inside = position < ends
    rows = order[np.where(inside, position, 0)]
    usable = inside & (time[rows] == moment) & (known_at[rows] <= deadline)
    return np.where(usable, rows, -1)


def _last_row_of_unit(
    codes: npt.NDArray[np.int64], time: Times, known_at: Times, deadline: Times, step: Period
) -> Indices:
    """Per row the last known row of the same code in the calendar unit one step before; else -1.

    The unit is a month, quarter or year, and a row counts if it was known by the deadline.

    So a month's end finds the end of the month before, whichever day that is. Rows that were not
    known by then make no difference, present or not.
    """
    order = np.lexsort((time, codes))
    sorted_time = time[order]
    starts, ends = bounds_of(codes[order], codes)
    units = step.unit_numbers(time)
    unit_before = units - step.count
    low = search_slices(units[order], starts, ends, unit_before, side="left")
    high = search_slices(units[order], starts, ends, unit_before, side="right")
    # What lies after the deadline also became known after it.
    high = np.minimum(high, search_slices(sorted_time, starts, ends, deadline, side="right"))
    place = high - 1
    late = np.flatnonzero(place >= low)
    while len(late):
        late = late[~(known_at[order[place[late]]] <= deadline[late])]
        place[late] -= 1
        late = late[place[late] >= low[late]]
    return np.where(place >= low, order[place], -1)


def _windowed(
    codes: npt.NDArray[np.int64],
    known_at: Times,
    deadline: Times,
    start: Times,
    values: Floats,
    statistics: Sequence[Statistic],
) -> list[Floats]:
    """Per row, statistics of the values with its code that became known in (start, deadline]."""
    observed = np.flatnonzero(~np.isnan(values) & ~np.isnat(known_at))
    order = observed[np.lexsort((values[observed], known_at[observed], codes[observed]))]
    sorted_known = known_at[order]
    sorted_values = values[order]
    first, last = bounds_of(codes[order], codes)
    low = search_slices(sorted_known, first, last, start, side="right")
    high = search_slices(sorted_known, first, last, deadline, side="right")
    high = np.maximum(low, high)
    return [_statistic(statistic, sorted_values, low, high) for statistic in statistics]


def bounds_of(
    sorted_codes: npt.NDArray[np.int64], codes: npt.NDArray[np.int64]
) -> tuple[Indices, Indices]:
    """Per code the slice of equal ones among the sorted: its start, and its end, excluded."""
    first = np.searchsorted(sorted_codes, codes, side="left")
    last = np.searchsorted(sorted_codes, codes, side="right")
    return first, last


def search_slices(
    ordered: npt.NDArray[Any], first: Indices, last: Indices, values: npt.NDArray[Any], *, side: str
) -> Indices:
    """Per row where its value belongs in its own slice of `ordered`, by binary search."""
    low, high = first.copy(), last.copy()
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) // 2
        probe = ordered[np.where(open_, middle, 0)]
        if side == "left":
            goes_right = probe < values
        else:
            goes_right = probe <= values
        low = np.where(open_ & goes_right, middle + 1, low)
        high = np.where(open_ & ~goes_right, middle, high)


def _statistic(statistic: Statistic, values: Floats, low: Indices, high: Indices) -> Floats:
    count = (high - low).astype(np.float64)
    some = count > 0
    if statistic == "count":
        return count
    if statistic == "last":
        return _last(values, low, high)
    if statistic in ("min", "max"):
        return _extreme(np.minimum if statistic == "min" else np.maximum, values, low, high)
    mean, squares = _moments_of(values, low, high)
    if statistic == "mean":
        return np.where(some, mean, np.nan)
    if statistic == "sum":
        return np.where(some, mean * count, np.nan)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def _moments_of(values: Floats, low: Indices, high: Indices) -> tuple[Floats, Floats]:
    """Mean of each slice, and sum of its squared deviations from it; 0 where a slice is empty.

    A slice is put together from blocks of a power of two. Unlike differences of running sums,
    nothing outside a slice touches its result, not even its last digit: a wild value costs the
    other rows no precision, and the future does not leak into it.

    Source: pairwise update of moments, Chan, Golub and LeVeque (1983).
    """
    mean, squares = np.zeros(len(low)), np.zeros(len(low))
    length, taken = high - low, np.zeros(len(low), dtype=np.intp)
    level_mean, level_squares, block = values, np.zeros(len(values)), 1
    with np.errstate(over="ignore", invalid="ignore"):
        while len(level_mean):
            rows = np.flatnonzero(length & block)
            at = low[rows] + taken[rows]
            step, n = level_mean[at] - mean[rows], taken[rows] + block
            squares[rows] += level_squares[at] + step * step * (taken[rows] * block / n)
            mean[rows] += step * (block / n)
            taken[rows] = n
            step = level_mean[block:] - level_mean[:-block]
            level_squares = (
                level_squares[:-block] + level_squares[block:] + step * step * (block / 2)
            )
            level_mean = level_mean[:-block] + step / 2
            block *= 2
    return mean, squares


def _last(values: Floats, low: Indices, high: Indices) -> Floats:
    """The last value of each slice; NaN where it is empty."""
    answer = np.full(len(low), np.nan)
    rows = np.flatnonzero(high > low)
    answer[rows] = values[high[rows] - 1]
    return answer


def _extreme(better: np.ufunc, values: Floats, low: Indices, high: Indices) -> Floats:
    """Minimum or maximum of each slice, from a sparse table.

    Two overlapping blocks of a power of two cover any slice.
    """
    answer = np.full(len(low), np.nan)
    length = high - low
    level, block = values, 1
    while len(level):
        rows = np.flatnonzero((length >= block) & (length < 2 * block))
        answer[rows] = better(level[low[rows]], level[high[rows] - block])
        level = better(level[:-block], level[block:])
        block *= 2
    return answer
