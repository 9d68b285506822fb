"""Fit, tune and report: two dates for the whole fleet, so that no future leaks into a parent."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.periods import Period, Times
from pipeline.spec import SplitsSpec

FIT, TUNE, REPORT, GAP = "fit", "tune", "report", "gap"
# Fit rows that are held out once more, so that weights are chosen on more than the tune split.
EARLIER = "earlier"
# Stretches of such rows before the tune split, each as long as it.
N_EARLIER = 2


@dataclass(frozen=True)
class Cutoffs:
    """The resolved dates of one run.

    Args:
        as_of: everything known later is hidden.
        tune_start: fit rows lie before it and were known before it.
        report_start: tune rows lie before it and were known before it; report rows at or after it.
    """

    as_of: pd.Timestamp
    tune_start: pd.Timestamp
    report_start: pd.Timestamp

    @property
    def tune_middle(self) -> pd.Timestamp:
        """Cuts the tune rows into the two blocks of cross-selection."""
        return self.tune_start + (self.report_start - self.tune_start) / 2

    @property
    def stretch_starts(self) -> list[tuple[int, pd.Timestamp]]:
        """Number and start of the stretches on which weights are chosen, the newest first.

        0 and 1 are the halves of the tune split, 2, 3, ... lie before it.
        """
        halves = [(1, self.tune_middle), (0, self.tune_start)]
        return halves + list(enumerate(self.earlier_starts, start=2))

    @property
    def earlier_starts(self) -> list[pd.Timestamp]:
        """Where the stretches before the tune split begin, the newest first."""
        length = self.report_start - self.tune_start
        return [self.tune_start - number * length for number in range(1, N_EARLIER + 1)]

    def assign(self, time: Times, known_at: Times) -> npt.NDArray[np.object_]:
        """The split of each visible row.

        A row whose outcome became known only after its own part was closed is a ``gap`` row: no
        split learns from it, but the served booster, fitted on all rows, does.
        """
        tune_start = self.tune_start.to_datetime64()
        report_start = self.report_start.to_datetime64()
        split = np.full(len(time), GAP, dtype=object)
        split[(time < tune_start) & (known_at < tune_start)] = FIT
        split[(time >= tune_start) & (time < report_start) & (known_at < report_start)] = TUNE
        split[time >= report_start] = REPORT
        return split


def resolve_cutoffs(
    splits: SplitsSpec, as_of: pd.Timestamp, newest: pd.Timestamp, zone: str | None = None
) -> Cutoffs:
    """Turn lengths into dates.

    The last unit of the report split is the one that holds the newest visible row, so cutoffs move
    by whole units: with ``report: 1 month`` and a newest row on 24 December, report starts on 1
    December.

    Args:
        splits: the lengths.
        as_of: what the run pretends.
        newest: latest time of a visible row.
        zone: time zone whose days, weeks and months count; None is UTC.
    """
    report, tune = Period.parse(splits.report, zone), Period.parse(splits.tune, zone)
    unit = Period(1, report.unit, zone)
    report_start = unit.add(report.floor(newest), 1 - report.count)
    return Cutoffs(as_of, tune.add(report_start, -1), report_start)
