"""A wave: the groups that one Spark job trains and one commit keeps."""

import itertools
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.runs.schedule import Schedule
from pipeline.storage import WrittenFile


@dataclass(frozen=True)
class Wave:
    """The groups of one Spark job.

    Args:
        name: unique for ever; the partition of its boosters and holdout rows.
        groups: rows of the plan.
        start_seconds: seconds after its first group in which it may start another; by default it
            starts all.
    """

    name: str
    groups: pd.DataFrame
    start_seconds: float | None = None


@dataclass(frozen=True)
class TrainedFiles:
    """What one wave trained, not yet committed.

    Args:
        outcomes: one dict per group: ledger columns.
        boosters: files of the booster store.
        holdout: files of the holdout table.
        not_started: groups that the wave had no time left for.
    """

    outcomes: list[dict[str, Any]]
    boosters: list[WrittenFile]
    holdout: list[WrittenFile]
    not_started: list[GroupKey] = field(default_factory=list)

    @property
    def outcome_of(self) -> dict[GroupKey, dict[str, Any]]:
        """The outcomes by group."""
        return {GroupKey.of(outcome): outcome for outcome in self.outcomes}


def train_overlapping(
    schedule: Schedule,
    run_id: str,
    train: Callable[[Wave], TrainedFiles | None],
    cancel: Callable[[], None],
) -> Generator[tuple[Wave, TrainedFiles], None, None]:
    """Train wave by wave; gives each wave with its files as it ends.

    The next wave starts while the last groups of one are still training.

    Spark hands free slots to the oldest job. A further wave is laid out only when the caller
    has committed one and asks for the next: laid out earlier, it would know less of the pace, and
    a killed run would lose more. A wave that dies of a group is trained again in halves.

    Args:
        schedule: hands out the groups.
        run_id: first part of the waves' names.
        train: trains a wave; None if one of its groups killed it.
        cancel: ends what is being trained, when one wave fails.
    """
    token = uuid.uuid4().hex[:8]
    numbers = itertools.count()
    pool = ThreadPoolExecutor(schedule.max_waves, thread_name_prefix="wave")
    running: dict[Future[TrainedFiles | None], Wave] = {}
    try:
        while True:
            while (groups := schedule.next_wave()) is not None:
                wave = Wave(f"{run_id}-{token}-{next(numbers)}", groups, schedule.start_seconds)
                running[pool.submit(train, wave)] = wave
            if not running:
                return
            ended = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            wave, trained = running.pop(ended), ended.result()
            if trained is None:
                schedule.halve(wave.groups)
            else:
                yield wave, trained
    except BaseException:
        for future in running:
            future.cancel()
        cancel()
        raise
    finally:
        pool.shutdown()
