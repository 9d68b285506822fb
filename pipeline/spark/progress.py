"""How far a training run is, added up on Spark's workers while it goes on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import SparkSession

from pipeline.runs.schedule import Pace, seconds_left

Report = Callable[["Done"], None]


@dataclass(frozen=True)
class Done:
    """How far the training of a run is.

    Args:
        groups: trained, or found not to be trainable.
        failed: of these.
        of: groups to train.
        seconds_left: wall seconds, about; None before there is evidence.
    """

    groups: int
    failed: int
    of: int
    seconds_left: float | None


class Progress:
    """Counts of what is done, added up on Spark's workers as their tasks end.

    Args:
        spark: the session.
        report: called now and then with how far the run is.
        slots: tasks that run at once.
    """

    def __init__(self, spark: SparkSession, report: Report, slots: int = 1) -> None:
        context = spark.sparkContext
        self.done, self.failed = context.accumulator(0), context.accumulator(0)
        # Of the groups that ended: seconds as planned, and as they were.
        self.worked, self.spent = context.accumulator(0.0), context.accumulator(0.0)
        self.pace = Pace()
        self._report = report
        self._slots = slots
        self._of = 0
        self._planned = 0.0
        self._began = time.monotonic()

    def expect(self, groups: pd.DataFrame) -> None:
        """Count groups among those to train; rows of a plan."""
        self._of += len(groups)
        self._planned += float(groups["cost_seconds"].sum())

    def so_far(self) -> Done:
        """How far the run is now."""
        done = int(self.done.value)
        left = seconds_left(
            self.pace,
            slots=self._slots,
            groups_left=self._of - done,
            planned_left=max(0.0, self._planned - float(self.worked.value)),
            spent=float(self.spent.value),
            elapsed=time.monotonic() - self._began,
        )
        return Done(done, int(self.failed.value), self._of, left)

    @contextmanager
    def reported(self, every_seconds: float = 2.0) -> Iterator[None]:
        """Report now and then, and once at the end."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(every_seconds):
                self._report(self.so_far())

        watcher = threading.Thread(target=watch, name="training-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        self._report(self.so_far())
