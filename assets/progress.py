"""Progress lines for people: groups done, failed, time left."""

import time

from dagster import DagsterLogManager

from pipeline.spark.progress import Done, Report

MAX_LINES = 80
_MINUTE, _HOUR = 60, 3600
# From here on a duration is told in the next larger unit.
_IN_MINUTES, _IN_HOURS = 100, 100 * 60


def no_progress(*_: Done) -> None:
    """A reporter that says nothing."""


def progress_lines(log: DagsterLogManager) -> Report:
    """A reporter that logs changes, at most about a hundred lines a run."""
    started = time.monotonic()
    last = [0, 0]

    def report(done: Done) -> None:
        is_last = done.groups >= done.of
        step = max(1, done.of // MAX_LINES)
        is_due = done.groups - last[0] >= step and last[1] < MAX_LINES
        if done.groups == last[0] or not (is_due or is_last):
            return
        last[:] = done.groups, last[1] + 1
        left = "" if done.seconds_left is None else f", {rough_duration(done.seconds_left)} left"
        elapsed = time.monotonic() - started
        log.info(
            f"{done.groups:,} of {done.of:,} groups done, {done.failed:,} failed, {elapsed:.0f} "
            f"s{left}"
        )

    return report


def rough_duration(seconds: float) -> str:
    """A duration as precise as an estimate can be: `about 40 s`, `about 3 min`, `about 2 h`."""
    if seconds < _IN_MINUTES:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < _IN_HOURS:
        return f"about {round(seconds / _MINUTE)} min"
    return f"about {round(seconds / _HOUR)} h"
