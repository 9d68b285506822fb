"""Which groups start next while a run trains.

Waves are laid out one at a time, from what the run has learnt of its own pace.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.runs.plan import DOUBT, WAVE_SHARE, longest_first, pack_tasks

# Waves that may be under way, not committed yet; a killed run loses them.
WAVES_AT_ONCE = 2
# Share of `checkpoint_seconds` after which a wave starts no further group.
START_SHARE = 0.6
# A group that takes longer than this share is a wave of its own: it is committed the moment it
# ends, and nothing waits for it.
ALONE_SHARE = 0.4
# Groups of the first wave that finds the pace, across all sizes: at least, and per slot.
PROBE_GROUPS = 8
PROBE_GROUPS_PER_SLOT = 4
# Groups that must have ended before the two numbers of a pace are learnt apart, and before any
# estimate is shown.
LEARNT_FROM = 8
SHOWN_FROM = 4
# The slots are taken to be busy for at least this share of the time: a lower share only says that
# they were idle before the first tasks ended.
LEAST_BUSY = 0.25
# Below this, seconds are mostly noise.
LEAST_SECONDS = 0.01


@dataclass(frozen=True)
class Pace:
    """Real seconds of a group, from the planned ones: some per group, some per planned second.

    Args:
        factor: real seconds per planned second.
        per_group: real seconds that each group takes besides.
        learnt_from: groups of this run that it was learnt from; 0 trusts the plan.
    """

    factor: float = 1.0
    per_group: float = 0.0
    learnt_from: int = 0

    def expected(self, planned: Any) -> Any:
        """Real seconds of one group, of one thread."""
        return self.factor * planned + self.per_group

    @classmethod
    def learnt(cls, planned: Sequence[float], real: Sequence[float]) -> "Pace":
        """Learn from groups that ended; without any, the plan's own seconds are trusted.

        Least squares of relative errors, so that small groups count as much as large ones, then
        scaled so that both sums are equal. Neither number is negative.

        Args:
            planned: seconds that the plan foresaw for each group.
            real: seconds that it took.
        """
        foreseen = np.asarray(planned, dtype=float)
        taken = np.maximum(np.asarray(real, dtype=float), LEAST_SECONDS)
        if not foreseen.sum():
            return cls()
        factor, per_group = 1.0, 0.0
        if len(taken) >= LEARNT_FROM:
            design = np.column_stack([foreseen, np.ones(len(taken))]) / taken[:, None]
            (factor, per_group), *_ = np.linalg.lstsq(design, np.ones(len(taken)), rcond=None)
            if factor < 0:
                factor, per_group = 0.0, 1.0
            elif per_group < 0:
                factor, per_group = 1.0, 0.0
        scale = taken.sum() / (factor * foreseen + per_group).sum()
        return cls(float(scale * factor), float(scale * per_group), len(taken))


class Schedule:
    """The groups of a plan, handed out wave by wave, longest first.

    A wave is laid out only when it is about to start, with the newest pace; while there is none, a
    first wave of groups across all sizes finds it. Whatever the pace, a wave starts no group later
    than `start_seconds` after its first one; groups that it did not start come back.

    Args:
        groups: what is trained, longest first: grain, group_id, cost_seconds and whatever else a
            wave needs; each wave gets its own `task`, from 0 without gaps.
        slots: tasks that run at once.
        checkpoint_seconds: a kill costs at most twice as much work per slot.
        has_history: whether the planned seconds were learnt from an earlier run.
    """

    def __init__(
        self,
        groups: pd.DataFrame,
        *,
        slots: int,
        checkpoint_seconds: float,
        has_history: bool,
    ) -> None:
        self._left = groups.reset_index(drop=True)
        self._slots = slots
        self._checkpoint_seconds = checkpoint_seconds
        self._has_history = has_history
        self._must_probe = not has_history
        self._halves: list[pd.DataFrame] = []
        # The waves under way, by their first group: those of one long group, and all others.
        self._alone: set[GroupKey] = set()
        self._shared: set[GroupKey] = set()
        self._planned: list[float] = []
        self._real: list[float] = []
        self.pace = Pace()

    @property
    def start_seconds(self) -> float:
        """Seconds after the start of its first group in which a wave may start another."""
        return START_SHARE * self._checkpoint_seconds

    @property
    def max_waves(self) -> int:
        """Waves that are ever under way together."""
        return WAVES_AT_ONCE + self._slots + 1

    @property
    def is_known(self) -> bool:
        """Whether seconds are learnt, in this run or an earlier one."""
        return self._has_history or self.pace.learnt_from > 0

    def next_wave(self) -> pd.DataFrame | None:
        """The groups that start now, with their tasks.

        None while enough is under way, or nothing is left.
        """
        if self._halves and len(self._shared) < WAVES_AT_ONCE:
            return self._start(self._halves.pop(0), self._shared)
        if self._left.empty:
            return None
        expected = self.pace.expected(self._left["cost_seconds"].to_numpy(dtype=float))
        doubt = 1 if self.is_known else DOUBT
        long = int((expected * doubt >= ALONE_SHARE * self._checkpoint_seconds).sum())
        # One more than there are slots waits for the first that is free.
        places = self._slots + 1 if self.is_known else 1
        if long and len(self._alone) < places:
            return self._take(np.array([0]), expected, self._alone)
        if len(self._shared) >= WAVES_AT_ONCE or (long and self.is_known):
            return None
        is_doubtful = expected.sum() * doubt > WAVE_SHARE * self._checkpoint_seconds * self._slots
        if self._must_probe and not self.is_known and is_doubtful:
            self._must_probe = False
            n_probed = max(PROBE_GROUPS, PROBE_GROUPS_PER_SLOT * self._slots)
            places_across = np.linspace(0, len(expected) - 1, min(n_probed, len(expected)))
            return self._take(np.unique(places_across.round().astype(int)), expected, self._shared)
        return self._take(np.arange(self._n_for_a_wave(expected)), expected, self._shared)

    def ended(
        self,
        groups: pd.DataFrame,
        outcomes: Iterable[Mapping[str, Any]],
        not_started: Iterable[GroupKey] = (),
    ) -> None:
        """Learn from a wave that is committed, and take back the groups that it did not start.

        Args:
            groups: as `next_wave` gave them.
            outcomes: grain, group_id, status and seconds of those that ended.
            not_started: the others.
        """
        self._release(groups)
        costs = dict(zip(GroupKey.of_rows(groups), groups["cost_seconds"], strict=True))
        for outcome in outcomes:
            seconds = outcome.get("seconds")
            if outcome["status"] in ("trained", "refreshed") and seconds:
                self._planned.append(float(costs[GroupKey.of(outcome)]))
                self._real.append(float(seconds))
        self.pace = Pace.learnt(self._planned, self._real)
        back = set(not_started)
        if back:
            again = groups[[key in back for key in GroupKey.of_rows(groups)]]
            self._left = longest_first(pd.concat([self._left, again]))

    def halve(self, groups: pd.DataFrame) -> None:
        """Train a wave that died again, in halves, down to the group that kills it."""
        self._release(groups)
        # Longest first: every other group to each half.
        self._halves += [groups.iloc[start::2].reset_index(drop=True) for start in (0, 1)]

    def _n_for_a_wave(self, expected: "np.ndarray[Any, Any]") -> int:
        """How many of the longest groups fill the slots that no long group holds."""
        free = max(1, self._slots - len(self._alone))
        load = WAVE_SHARE * self._checkpoint_seconds * free
        if expected.sum() <= START_SHARE / WAVE_SHARE * load:
            return len(expected)
        return int(np.searchsorted(np.cumsum(expected), load)) + 1

    def _take(
        self, places: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]", kind: set[GroupKey]
    ) -> pd.DataFrame:
        chosen = self._left.iloc[places].reset_index(drop=True)
        self._left = self._left.drop(index=self._left.index[places]).reset_index(drop=True)
        tasks = pack_tasks(expected[places].tolist(), slots=self._slots)
        return self._start(chosen.assign(task=tasks), kind)

    def _start(self, groups: pd.DataFrame, kind: set[GroupKey]) -> pd.DataFrame:
        kind.add(GroupKey.of_rows(groups)[0])
        return groups.assign(task=pd.factorize(groups["task"], sort=True)[0])

    def _release(self, groups: pd.DataFrame) -> None:
        first = GroupKey.of_rows(groups)[0]
        self._alone.discard(first)
        self._shared.discard(first)


def seconds_left(
    pace: Pace,
    *,
    slots: int,
    groups_left: int,
    planned_left: float,
    spent: float,
    elapsed: float,
) -> float | None:
    """Wall seconds until the groups are trained, from the throughput so far.

    None while too few groups have ended.

    Args:
        pace: learnt in this run.
        slots: tasks that run at once.
        groups_left: groups that have not ended.
        planned_left: their planned seconds.
        spent: real seconds inside groups that ended, of one thread.
        elapsed: wall seconds since the first wave began.
    """
    if pace.learnt_from < SHOWN_FROM or not groups_left or not elapsed:
        return None
    work = pace.factor * planned_left + pace.per_group * groups_left
    busy = min(1.0, max(LEAST_BUSY, spent / (slots * elapsed)))
    return float(work / (slots * busy))
