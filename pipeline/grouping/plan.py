"""Which group trains in which Spark task, told before any work is done."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

# Seconds per trained group, and per thousand rows, feature and fit of such a group; measured on the demo fleets with one
# thread. They only order and pack the work: results do not depend on them.
SECONDS_PER_GROUP = 0.1
SECONDS_PER_KILOROW_FEATURE_FIT = 4e-4
TASK_SECONDS = 3.0


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do.

    Args:
        groups: one row per group of every grain: grain (index), group_id, n_rows, n_target, n_fit, n_tune, n_report,
            status ("train", or "inherited" with its reason), reason, cost_seconds (of one thread), task (-1 where not trained).
        n_tasks: Spark tasks.
        slots: tasks that run at once.
    """

    groups: pd.DataFrame
    n_tasks: int
    slots: int

    @property
    def to_train(self) -> pd.DataFrame:
        """The groups that are trained, longest first."""
        return self.groups[self.groups["status"] == "train"]

    @property
    def predicted_seconds(self) -> float:
        """Predicted wall seconds: the fullest slot when tasks start in order."""
        loads = [0.0] * self.slots
        for cost in self.to_train.groupby("task")["cost_seconds"].sum().sort_index():
            heapq.heapreplace(loads, loads[0] + float(cost))
        return max(loads)

    def describe(self) -> str:
        """The plan in one paragraph for people."""
        n_groups, n_train = len(self.groups), len(self.to_train)
        reasons = self.groups.loc[self.groups["status"] != "train", "reason"].value_counts()
        rest = "".join(f", {count} {reason}" for reason, count in reasons.items())
        return f"{n_groups} groups: {n_train} to train{rest}; {self.n_tasks} tasks on {self.slots} slots, about {self.predicted_seconds:.0f} s"


def build_plan(counts: pd.DataFrame, *, n_features: int, n_fits: int, fit_rows: int, tune_rows: int, slots: int) -> TrainingPlan:
    """Decide per group whether it is trained, and where.

    Args:
        counts: one row per group: grain, group_id, n_rows, n_target, n_fit, n_tune, n_report.
        n_features: features per row.
        n_fits: fits per group that the tuning budget allows.
        fit_rows: a group with fewer fit rows is not trained.
        tune_rows: a group with fewer tune rows is not trained.
        slots: tasks that run at once.
    """
    groups = counts.reset_index(drop=True).copy()
    enough = (groups["n_fit"] >= fit_rows) & (groups["n_tune"] >= tune_rows)
    groups["status"] = np.where(enough, "train", "inherited")
    groups["reason"] = pd.Series(np.where(groups["n_target"] == 0, "no_target", "too_few_rows"), dtype=object).mask(enough, None)
    work = SECONDS_PER_KILOROW_FEATURE_FIT * groups["n_target"] / 1000 * n_features * n_fits
    groups["cost_seconds"] = np.where(enough, SECONDS_PER_GROUP + work, 0.0)
    groups = groups.sort_values(["cost_seconds", "grain", "group_id"], ascending=[False, True, True], ignore_index=True)
    groups["task"] = -1
    trained = groups.index[groups["status"] == "train"]
    tasks = pack_tasks(groups.loc[trained, "cost_seconds"].tolist(), slots=slots)
    groups.loc[trained, "task"] = tasks
    return TrainingPlan(groups, max(tasks, default=-1) + 1, slots)


def pack_tasks(costs: Sequence[float], *, slots: int, task_seconds: float = TASK_SECONDS) -> list[int]:
    """Pack groups into tasks of about `task_seconds`, given longest first; tasks are numbered longest first, too.

    Args:
        costs: seconds per group, in descending order.
        slots: tasks that run at once; there are at least that many tasks where there are groups enough.
        task_seconds: what a task should last; a longer group is a task of its own.

    Returns:
        The task of each group.

    Source: longest processing time first, Graham (1969): at most 4/3 - 1/(3m) of the optimum on m slots where each holds one task.
    """
    if not costs:
        return []
    giants = sum(cost >= task_seconds for cost in costs)
    rest = sum(costs[giants:])
    # As many small tasks for every slot: one more would leave the other slots idle while it runs.
    n_small = min(len(costs) - giants, slots * max(1, round(rest / (slots * task_seconds))))
    heap = [(0.0, giants + number) for number in range(n_small)]
    chosen = list(range(giants))
    for cost in costs[giants:]:
        load, task = heap[0]
        heapq.heapreplace(heap, (load + cost, task))
        chosen.append(task)
    loads = np.bincount(chosen, weights=np.asarray(costs))
    rank = np.empty(len(loads), dtype=int)
    rank[np.argsort(-loads, kind="stable")] = np.arange(len(loads))
    return [int(rank[task]) for task in chosen]
