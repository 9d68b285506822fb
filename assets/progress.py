"""Progress lines for people: groups done, failed, time left."""

import time

from dagster import DagsterLogManager

from pipeline.spark.training import Report

MOST_LINES = 80


def no_progress(*_: float) -> None:
    """A reporter that says nothing."""


def progress_lines(log: DagsterLogManager, n_groups: int, planned_seconds: float) -> Report:
    """A reporter that logs a line when something has changed, at most about a hundred times a run.

    Args:
        log: the step's log.
        n_groups: groups to train.
        planned_seconds: their planned cost, of one thread.
    """
    started = time.monotonic()
    last = [-1, 0]
    step = max(1, n_groups // MOST_LINES)

    def report(done: int, failed: int, worked_seconds: float) -> None:
        lines_left = last[1] < MOST_LINES
        if not n_groups or done == last[0] or (done < n_groups and (done - last[0] < step or not lines_left)):
            return
        last[0], last[1] = done, last[1] + 1
        elapsed = time.monotonic() - started
        share = worked_seconds / planned_seconds if planned_seconds else 0.0
        left = f", about {elapsed * (1 - share) / share:.0f} s left" if 0 < share < 1 and done < n_groups else ""
        log.info(f"{done:,} of {n_groups:,} groups done, {failed:,} failed, {elapsed:.0f} s{left}")

    return report
