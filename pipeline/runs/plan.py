"""Which group trains in which Spark task and in which wave, shown before any work is done."""

import difflib
import heapq
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import DataError
from pipeline.models.meta_model import GroupKey
from pipeline.models.start import CrossSelection, Start
from pipeline.periods import Period
from pipeline.runs.fingerprints import fingerprint
from pipeline.runs.history import EarlierRuns
from pipeline.runs.request import Retrain
from pipeline.training.outcome import (
    NO_TARGET,
    NOT_LISTED,
    NOT_POOLED,
    TOO_FEW_ROWS,
    VANISHED,
    WITH_BOOSTER,
)

TASK_SECONDS = 3.0
# The last task of a slot is cut into parts: as one, it would leave the other slots idle where the
# predicted seconds were wrong.
LAST_SHARES, MIN_TASKS_BEFORE_LAST = [0.5, 0.25, 0.25], 3
# Fits of a tuned group besides its trials: before each of two earlier stretches, on fit and tune
# rows, and on all rows. A refitted group is also fitted on the fit rows, once for each half of the
# tune rows.
REFITS, _REFRESH_FITS = 4, 6
# The fewest groups that a cost model is learnt from.
_LEARNT_FROM = 8
# Without any history, real seconds were up to this many times the planned ones (five real fleets).
DOUBT = 15
# A wave is laid out for this share of `checkpoint_seconds`, because a killed run loses two waves,
# each with its last group.
WAVE_SHARE = 0.5

TRAIN, REFRESH, REUSE, KEEP, INHERIT = "train", "refresh", "reuse", "keep", "inherit"


@dataclass(frozen=True)
class CostModel:
    """Seconds to train a group: some per fit, and some per thousand rows, feature and fit.

    Args:
        n_features: features per row.
        n_trials: trials per group that the tuning budget allows.
        fit_seconds: per fit. The defaults were measured on the example fleets and on generated
            ones, with one thread.
        work_seconds: per thousand rows, feature and fit.
        learnt_from: groups of an earlier run that it was learnt from; 0 for the defaults.
    """

    n_features: int
    n_trials: int
    fit_seconds: float = 0.01
    work_seconds: float = 5e-4
    learnt_from: int = 0

    def predict(self, n_rows: Any, *, is_refit: Any) -> Any:
        """Seconds of one group or of each, of one thread.

        Args:
            n_rows: rows with a target.
            is_refit: whether the group is fitted with known parameters.
        """
        work = self.work_seconds * n_rows / 1000 * self.n_features
        return self._n_fits(is_refit) * (self.fit_seconds + work)

    def learnt(self, ledger: pd.DataFrame) -> "CostModel":
        """Learn from the groups that an earlier run trained; the same model where they are too few.

        Least squares of relative errors, so that small groups count as much as large ones; neither
        number falls below a hundredth of this model's. The seconds order and pack the work and are
        shown beforehand; results do not depend on them.
        """
        trained = ledger[
            ledger["status"].isin(["trained", "refreshed"])
            & ledger["seconds"].gt(0)
            & ledger["n_target"].gt(0)
        ]
        if len(trained) < _LEARNT_FROM:
            return self
        fits = self._n_fits(trained["status"] == "refreshed")
        work = trained["n_target"].to_numpy(dtype=float) / 1000 * self.n_features * fits
        seconds = trained["seconds"].to_numpy(dtype=float)
        design = np.column_stack([fits, work]) / seconds[:, None]
        (fit_seconds, work_seconds), *_ = np.linalg.lstsq(design, np.ones(len(work)), rcond=None)
        return replace(
            self,
            fit_seconds=max(float(fit_seconds), self.fit_seconds / 100),
            work_seconds=max(float(work_seconds), self.work_seconds / 100),
            learnt_from=len(trained),
        )

    def _n_fits(self, is_refit: Any) -> Any:
        return np.where(is_refit, _REFRESH_FITS, self.n_trials + REFITS)


@dataclass(frozen=True)
class Policy:
    """Which groups are trained again.

    Args:
        retrain: `changed`: whose fingerprint changed; `stale`: also those tuned longer ago than
            `retune_after`; `listed`: the listed ones; `all`.
        listed: group ids, for `listed`.
        retune_after: a changed group tuned less long ago is refitted without trials.
        as_of: the date that the run pretends it is.
        shared: hash of what all groups share, as from `shared_digest`; a group that was trained
            under another one counts as changed.
        fit_rows: a group with fewer fit rows is not trained.
        tune_rows: a group with fewer tune rows is not trained.
        finest_only: whether only the finest grain is trained.
        corrects: whether a group's trees correct its parent's predictions, so that it changes with
            its parent.
        max_trials: first-pass trials where the fleet has a budget of seconds; None leaves it to the
            spec.
        recipes: how groups start whose earlier recipes are refitted; where there are any, only
            these groups are trained.
    """

    retrain: Retrain
    listed: Collection[str]
    retune_after: Period
    as_of: pd.Timestamp
    shared: str
    fit_rows: int
    tune_rows: int
    finest_only: bool = False
    corrects: bool = False
    max_trials: int | None = None
    recipes: Mapping[GroupKey, Start] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do.

    Args:
        groups: one row per group of every grain, longest first: grain (index), group_id, parent_id,
            n_rows, n_target, n_fit, n_tune, n_report; action: `train`, `refresh` (refit with known
            parameters), `reuse` (an earlier run's booster), `keep` (done before this run was
            interrupted) or `inherit` (its parent answers); reason; started_from (JSON, see
            `Start`); fingerprint; cost_seconds (of one thread); wave and task (-1 where not
            trained) as they come if these seconds are right: a run lays out its waves by what it
            learns (see `pipeline.runs.schedule`).
        slots: tasks that run at once.
        learnt_from: groups of an earlier run that the seconds were learnt from; 0 without history.
    """

    groups: pd.DataFrame
    slots: int
    learnt_from: int = 0

    @property
    def to_train(self) -> pd.DataFrame:
        """The groups that are trained or refitted, longest first."""
        return self.groups[self.groups["action"].isin([TRAIN, REFRESH])]

    @property
    def n_waves(self) -> int:
        """Waves, if the predicted seconds are right."""
        if self.groups.empty:
            return 0
        return int(self.groups["wave"].max()) + 1

    @property
    def n_tasks(self) -> int:
        """Spark tasks of all waves."""
        if self.to_train.empty:
            return 0
        return int(self.to_train.groupby("wave")["task"].max().add(1).sum())

    @property
    def predicted_seconds(self) -> float:
        """Predicted wall seconds: the fullest slot when tasks start in order."""
        loads = [0.0] * self.slots
        for cost in self.to_train.groupby(["wave", "task"])["cost_seconds"].sum().sort_index():
            heapq.heapreplace(loads, loads[0] + float(cost))
        return max(loads)

    def describe(self) -> str:
        """The plan in one paragraph for people."""
        counts = self.groups["action"].value_counts()
        descriptions = {
            TRAIN: "to train",
            REFRESH: "to refit",
            REUSE: "unchanged (reused)",
            KEEP: "done before the interruption",
        }
        parts = []
        for action, text in descriptions.items():
            if action in counts:
                parts.append(f"{counts[action]:,} {text}")
        reasons = self.groups.loc[self.groups["action"] == INHERIT, "reason"].value_counts()
        for reason, count in reasons.items():
            parts.append(f"{count:,} {reason}")
        return f"{len(self.groups):,} groups: {', '.join(parts)}; {self._describe_seconds()}"

    def _describe_seconds(self) -> str:
        if self.to_train.empty:
            return "nothing to train"
        seconds = self.predicted_seconds
        if self.learnt_from:
            waves = f"{self.n_waves} waves"
            if self.n_waves == 1:
                waves = "1 wave"
            return (
                f"{self.n_tasks:,} tasks in {waves} on {self.slots} slots, about {seconds:.0f} s, "
                f"estimated from {self.learnt_from:,} earlier groups"
            )
        # The numbers of tasks and waves depend on the seconds, which nobody knows yet.
        return (
            f"{max(1, seconds):.0f} to {max(1, DOUBT * seconds):.0f} s on {self.slots} slots, "
            "estimated (no history yet)"
        )


def build_plan(
    counts: pd.DataFrame,
    policy: Policy,
    earlier: EarlierRuns,
    cost_model: CostModel,
    *,
    slots: int,
    checkpoint_seconds: float,
) -> TrainingPlan:
    """Decide per group whether it is trained, from what, and where.

    Args:
        counts: one row per group: grain, group_id, parent_id, n_rows, n_target, n_invalid, n_fit,
            n_tune, n_report, rows_hash.
        policy: which groups are trained again.
        earlier: what earlier runs left.
        cost_model: predicts the seconds that order and pack the groups.
        slots: tasks that run at once.
        checkpoint_seconds: a kill costs at most twice as much work per slot.
    """
    groups = _with_vanished(counts.reset_index(drop=True), earlier.before)
    finest = int(groups["grain"].max())
    decisions = _decisions(groups.to_dict("records"), policy, earlier, finest)
    for name in ("action", "reason", "started_from", "fingerprint"):
        groups[name] = pd.Series([getattr(decision, name) for decision in decisions], dtype=object)
    seconds = cost_model.predict(groups["n_target"], is_refit=groups["action"] == REFRESH)
    groups["cost_seconds"] = np.where(groups["action"].isin([TRAIN, REFRESH]), seconds, 0.0)
    groups = longest_first(groups)
    groups["wave"], groups["task"] = -1, -1
    trained = groups.index[groups["action"].isin([TRAIN, REFRESH])]
    costs = groups.loc[trained, "cost_seconds"].tolist()
    waves, tasks = assign_waves(
        pack_tasks(costs, slots=slots),
        costs,
        slots=slots,
        wave_seconds=WAVE_SHARE * checkpoint_seconds,
    )
    groups.loc[trained, "wave"], groups.loc[trained, "task"] = waves, tasks
    return TrainingPlan(groups, slots, cost_model.learnt_from)


def _with_vanished(
    counts: pd.DataFrame, before: Mapping[GroupKey, Mapping[str, Any]]
) -> pd.DataFrame:
    """The groups of the data, and those of the run before that no longer have rows."""
    present = set(GroupKey.of_rows(counts))
    no_rows = dict.fromkeys(counts.filter(regex="^n_").columns, 0)
    vanished = []
    for key, row in sorted(before.items()):
        if key in present:
            continue
        vanished.append(
            {
                "grain": row["grain"],
                "group_id": row["group_id"],
                "parent_id": row["parent_id"],
                "rows_hash": VANISHED,
                **no_rows,
            }
        )
    if not vanished:
        return counts
    added = pd.DataFrame(vanished).reindex(columns=counts.columns)
    if "exponent" in added:
        added["exponent"] = 0
    return pd.concat([counts, added.astype(counts.dtypes)], ignore_index=True)


@dataclass(frozen=True)
class _Decision:
    action: str
    reason: str | None = None
    started_from: str | None = None
    fingerprint: str | None = None

    @classmethod
    def train(
        cls, start: Start, rows_hash: str, policy: Policy, reason: str | None = None
    ) -> "_Decision":
        """Train a group, or refit it where its parameters are known."""
        action = TRAIN
        if start.refit is not None:
            action = REFRESH
        started_from = start.to_json()
        return cls(
            action, reason, started_from, fingerprint(rows_hash, policy.shared, started_from)
        )

    @classmethod
    def take_over(
        cls, action: str, row: Mapping[str, Any], reason: str | None = None
    ) -> "_Decision":
        """Keep or reuse what a ledger row says of a group."""
        return cls(action, reason, row["started_from"], row["fingerprint"])


def _decisions(
    groups: Sequence[Mapping[Any, Any]], policy: Policy, earlier: EarlierRuns, finest: int
) -> list[_Decision]:
    """One decision per group, in the groups' order.

    Parents first, because a child that corrects them changes with them.
    """
    decisions: dict[int, _Decision] = {}
    # Per group the fingerprint of its own trees, or of those of the nearest coarser group.
    nearest: dict[GroupKey, str | None] = {}
    listed: set[GroupKey] = set()
    for place in sorted(range(len(groups)), key=lambda place: groups[place]["grain"]):
        group = dict(groups[place])
        key, parent = GroupKey.of(group), GroupKey.parent_of(group)
        corrected = nearest.get(parent)
        if policy.corrects and group["rows_hash"] != VANISHED and corrected is not None:
            group["rows_hash"] = f"{group['rows_hash']}+{corrected}"
        if key.group_id in policy.listed or (policy.corrects and parent in listed):
            listed.add(key)
        decision = _decide(group, policy, earlier, finest, is_listed=key in listed)
        decisions[place] = decision
        nearest[key] = decision.fingerprint or corrected
    return [decisions[place] for place in range(len(groups))]


def _decide(
    group: Mapping[Any, Any],
    policy: Policy,
    earlier: EarlierRuns,
    finest: int,
    *,
    is_listed: bool,
) -> _Decision:
    """Decide about one group."""
    key = GroupKey.of(group)
    before = earlier.before.get(key)
    rows_hash = str(group["rows_hash"])
    if policy.recipes:
        return _refit_or_not(key, earlier, policy, rows_hash)
    if rows_hash == VANISHED:
        return _without_training(key, before, policy, rows_hash, VANISHED)
    if policy.retrain == "listed" and not is_listed:
        return _without_training(key, before, policy, rows_hash, NOT_LISTED)
    # The pooled group is sent to a worker in any case, if only to judge the rows that no model
    # answers.
    if key.grain > 0:
        reason = _reason_to_inherit(group, policy, finest)
        if reason is not None:
            return _Decision(INHERIT, reason)
    taken_over = _take_over_unchanged(key, earlier, policy, rows_hash)
    if taken_over is not None:
        return taken_over
    start = _start(group, earlier, policy, judge=policy.finest_only and key.grain != finest)
    return _Decision.train(start, rows_hash, policy)


def _take_over_unchanged(
    key: GroupKey, earlier: EarlierRuns, policy: Policy, rows_hash: str
) -> _Decision | None:
    """Keep or reuse what an earlier run did for a group, if it would be done again."""
    kept = earlier.kept.get(key)
    if kept is not None and _is_unchanged(kept, rows_hash, policy):
        return _Decision.take_over(KEEP, kept)
    for row in (earlier.before.get(key), earlier.unfinished.get(key)):
        if row is not None and _may_be_reused(row, rows_hash, policy):
            return _Decision.take_over(REUSE, row)
    return None


def _refit_or_not(key: GroupKey, earlier: EarlierRuns, policy: Policy, rows_hash: str) -> _Decision:
    """Fit an earlier recipe, unless an interrupted run has done that."""
    if rows_hash == VANISHED:
        return _Decision(INHERIT, VANISHED)
    start = policy.recipes.get(key)
    if start is None or (start.judge and key.grain > 0):
        return _Decision(INHERIT, NOT_LISTED)
    decision = _Decision.train(start, rows_hash, policy)
    for row, action in ((earlier.kept.get(key), KEEP), (earlier.unfinished.get(key), REUSE)):
        if row is not None and row["fingerprint"] == decision.fingerprint:
            return replace(decision, action=action)
    return decision


def _without_training(
    key: GroupKey, before: Mapping[str, Any] | None, policy: Policy, rows_hash: str, reason: str
) -> _Decision:
    """Keep the booster that a group has, if it has one, whether or not its rows changed.

    The pooled group keeps its held-out rows, or judges.
    """
    if before is None:
        if key.grain > 0:
            return _Decision(INHERIT, reason)
        return _Decision.train(Start(judge=True), rows_hash, policy, reason)
    if key.grain > 0 and before["status"] not in WITH_BOOSTER:
        return _Decision(INHERIT, reason)
    return _Decision.take_over(REUSE, before, reason)


def _reason_to_inherit(group: Mapping[Any, Any], policy: Policy, finest: int) -> str | None:
    """Why a group has no model of its own; None where it is trained."""
    if policy.finest_only and group["grain"] != finest:
        return NOT_POOLED
    # A group with invalid targets is sent to a worker, which says what is wrong with it.
    is_spoilt = group["grain"] == finest and group.get("n_invalid", 0) > 0
    if is_spoilt or (group["n_fit"] >= policy.fit_rows and group["n_tune"] >= policy.tune_rows):
        return None
    if group["n_target"] == 0:
        return NO_TARGET
    return TOO_FEW_ROWS


def _is_unchanged(row: Mapping[str, Any], rows_hash: str, policy: Policy) -> bool:
    """Whether the group would be trained from exactly what it was trained from.

    Refits of an earlier release predicted the tune rows that had chosen their parameters: their
    weights are wrong, so they are made again.
    """
    started_from = row["started_from"]
    if not isinstance(started_from, str) or Start.from_json(started_from).predicts_what_chose_it:
        return False
    return bool(row["fingerprint"] == fingerprint(rows_hash, policy.shared, started_from))


def _may_be_reused(row: Mapping[str, Any], rows_hash: str, policy: Policy) -> bool:
    """Whether a group keeps the result of an earlier run.

    A failed group is tried again; one that killed its process twice is not, until it changes.
    """
    if policy.retrain not in ("changed", "stale") or row["status"] == "failed":
        return False
    if not _is_unchanged(row, rows_hash, policy):
        return False
    return (
        policy.retrain == "changed"
        or row["status"] not in WITH_BOOSTER
        or _was_tuned_lately(row, policy)
    )


def _was_tuned_lately(row: Mapping[str, Any], policy: Policy) -> bool:
    tuned_as_of = pd.Timestamp(row["tuned_as_of"]).tz_localize(None)
    return policy.retune_after.add(tuned_as_of) > policy.as_of


def _start(group: Mapping[Any, Any], earlier: EarlierRuns, policy: Policy, *, judge: bool) -> Start:
    """From the group's own last parameters, then its parent's."""
    if judge:
        return Start(judge=True)
    own = _row_with_booster(earlier, GroupKey.of(group))
    parent = _row_with_booster(earlier, GroupKey.parent_of(group))
    # Without the winners of both halves, as in a ledger of an earlier release, a refit would
    # predict tune rows with parameters that those rows have chosen.
    if (
        own is not None
        and earlier.same_spec
        and own.get("cross_selection") is not None
        and policy.retrain in ("changed", "stale")
        and _was_tuned_lately(own, policy)
    ):
        return Start(
            refit=json.loads(own["parameters"]),
            n_rounds=int(own["n_rounds"]),
            cross=CrossSelection.from_json(own["cross_selection"]),
        )
    trials = []
    for row in (own, parent):
        if row is not None:
            trials.append(json.loads(row["parameters"]))
    return Start(trials=tuple(trials), max_trials=policy.max_trials)


def _row_with_booster(earlier: EarlierRuns, key: GroupKey) -> Mapping[str, Any] | None:
    """The ledger row of a group in the run before, if it had a model."""
    row = earlier.before.get(key)
    if row is None or row["status"] not in WITH_BOOSTER:
        return None
    return row


def of_grain(plan: TrainingPlan, grain: int) -> TrainingPlan:
    """The part of a plan that trains one grain."""
    groups = plan.to_train[plan.to_train["grain"] == grain]
    return replace(plan, groups=groups.reset_index(drop=True))


def pack_tasks(
    costs: Sequence[float], *, slots: int, task_seconds: float = TASK_SECONDS
) -> list[int]:
    """Pack groups into tasks of about `task_seconds`, given longest first.

    Tasks are numbered longest first, too.

    Args:
        costs: seconds per group, in descending order.
        slots: tasks that run at once; there are at least as many tasks if there are enough groups.
        task_seconds: how long a task should last; a longer group is a task of its own.

    Returns:
        The task of each group.

    Source: longest processing time first, Graham (1969): at most 4/3 - 1/(3m) of the optimum on m
    slots where each holds one task.
    """
    if not costs:
        return []
    giants = sum(cost >= task_seconds for cost in costs)
    rest = sum(costs[giants:])
    # Every slot gets as many small tasks: one more would leave the other slots idle while it runs.
    per_slot = max(1, round(rest / (slots * task_seconds)))
    last_shares = [1.0]
    if per_slot >= MIN_TASKS_BEFORE_LAST:
        last_shares = LAST_SHARES
    shares = [1.0] * (slots * (per_slot - 1)) + last_shares * slots
    # The load of each task over its share.
    heap = []
    for task, share in enumerate(shares[: len(costs) - giants], start=giants):
        heap.append((0.0, -share, task))
    chosen = list(range(giants))
    for cost in costs[giants:]:
        filled, share, task = heap[0]
        heapq.heapreplace(heap, (filled - cost / share, share, task))
        chosen.append(task)
    loads = np.bincount(chosen, weights=np.asarray(costs))
    rank = np.empty(len(loads), dtype=int)
    rank[np.argsort(-loads, kind="stable")] = np.arange(len(loads))
    numbers: list[int] = rank[chosen].tolist()
    return numbers


def assign_waves(
    tasks: Sequence[int], costs: Sequence[float], *, slots: int, wave_seconds: float
) -> tuple[list[int], list[int]]:
    """Cut tasks, longest first, into waves that keep all slots busy for about `wave_seconds`.

    Args:
        tasks: task of each group, as from `pack_tasks`.
        costs: seconds of each group.
        slots: tasks that run at once.
        wave_seconds: about how long a wave lasts.

    Returns:
        The wave of each group, and its task's number within that wave, both from 0.
    """
    if not tasks:
        return [], []
    loads = np.bincount(tasks, weights=np.asarray(costs))
    began = np.concatenate([[0.0], np.cumsum(loads)[:-1]])
    wave_of_task = np.floor(began / (wave_seconds * slots)).astype(int)
    # A task that is longer than a wave leaves gaps in the numbers.
    _, first, wave_of_task = np.unique(wave_of_task, return_index=True, return_inverse=True)
    chosen = np.asarray(tasks)
    return wave_of_task[chosen].tolist(), (chosen - first[wave_of_task[chosen]]).tolist()


def longest_first(groups: pd.DataFrame) -> pd.DataFrame:
    """The groups by planned seconds, those of equal cost in a fixed order."""
    by = ["cost_seconds", "grain", "group_id"]
    return groups.sort_values(by, ascending=[False, True, True], ignore_index=True)


def refuse_unknown(listed: Collection[str], group_ids: Sequence[str]) -> None:
    """Check the group ids that a launch names.

    Args:
        listed: by the launch.
        group_ids: all of the fleet.

    Raises:
        DataError: naming the first that is unknown, and similar ones.
    """
    unknown = sorted(set(listed) - set(group_ids))
    if not unknown:
        return
    hint = f"there are {len(group_ids):,}, e.g. {group_ids[-1]}."
    near = difflib.get_close_matches(unknown[0], group_ids, n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise DataError(
        f"there is no group {unknown[0]!r}; {hint} A group is named by the JSON array of its keys"
    )
