"""When the rows of the horizon lie: the times that `score: future` makes up."""

import numpy as np
import pandas as pd

from pipeline.features.history import Indices
from pipeline.periods import Flags, Period, Times


def future_times(
    period: Period,
    newest: pd.Timestamp,
    end: pd.Timestamp,
    newest_of_entity: Times,
    last_days: Flags,
) -> tuple[Indices, Times]:
    """The next times of every entity, period by period, after the newest row of the fleet.

    Calendar periods go on from the entity's own newest row, so that each series keeps its day of
    the month, or stays on last days; fixed ones go on from the newest row of the fleet.

    Args:
        period: step of the series.
        newest: latest time of the fleet.
        end: last moment that is answered.
        newest_of_entity: per entity.
        last_days: entities whose every row lies on the last day of a month.

    Returns:
        One row per entity and time: the entity's place, and the time.
    """
    start = newest_of_entity
    passed = np.zeros(len(start), dtype=np.int64)
    if period.is_calendar:
        newest_unit = period.unit_numbers(np.array([newest.to_datetime64()]))
        # An entity that ended long ago gets the same periods as all others.
        passed = (newest_unit - period.unit_numbers(start)) // period.count
    else:
        start = np.full(len(start), newest.to_datetime64())
    entities = []
    times = []
    moments = period.moved(start, passed, last_days)
    while (moments <= end).any():
        due = np.flatnonzero((moments > newest) & (moments <= end))
        entities.append(due)
        times.append(moments[due])
        passed = passed + 1
        moments = period.moved(start, passed, last_days)
    return np.concatenate([np.arange(0), *entities]), np.concatenate([start[:0], *times])
