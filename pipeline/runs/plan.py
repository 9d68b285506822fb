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
# The last task of a slot in parts: as one, it would leave the other slots idle where the guesses
# were wrong.
LAST_SHARES, MIN_TASKS_BEFORE_LAST = [0.5, 0.25, 0.25], 3
# Fits of a group besides its trials: on fit rows (a refit only, for each half of the tune rows), on
# fit and tune rows, on all.
REFITS, _REFRESH_FITS = 2, 4
# A cost model is learnt from at least so many groups.
_LEARNT_FROM = 8
# Without any history, real seconds were up to so many times the planned ones (on five real fleets).
DOUBT = 15
# A wave is laid out for this part of `checkpoint_seconds`: two of them, each with its last group,
# are lost with a killed run.
WAVE_SHARE = 0.5

TRAIN, REFRESH, REUSE, KEEP, INHERIT = "train", "refresh", "reuse", "keep", "inherit"


@dataclass(frozen=True)
class CostModel:
    """Seconds to train a group: some per fit, and some per thousand rows, feature and fit.

    Args:
        fit_seconds: per fit. The prior was measured on the example fleets and generated ones with
            one thread.
        work_seconds: per thousand rows, feature and fit.
        learnt_from: groups of an earlier run that it was learnt from; 0 is the prior.
    """

    fit_seconds: float = 0.01
    work_seconds: float = 5e-4
    learnt_from: int = 0

    def predict(self, n_rows: Any, n_features: int, n_fits: Any) -> Any:
        """Seconds, of one thread."""
        return n_fits * (self.fit_seconds + self.work_seconds * n_rows / 1000 * n_features)

    @classmethod
    def learnt(cls, ledger: pd.DataFrame, n_features: int, n_fits: int) -> "CostModel":
        """Learn from the groups that an earlier run trained; the prior where they are too few.

        Least squares of relative errors, so that small groups count as much as large ones; no part
        is below a hundredth of the prior. It orders and packs the work and is shown beforehand;
        results do not depend on it.
        """
        prior = cls()
        trained = ledger[
            ledger["status"].isin(["trained", "refreshed"])
            & ledger["seconds"].gt(0)
            & ledger["n_target"].gt(0)
        ]
        if len(trained) < _LEARNT_FROM:
            return prior
        fits = np.where(trained["status"] == "refreshed", _REFRESH_FITS, n_fits + REFITS)
        work = trained["n_target"].to_numpy(dtype=float) / 1000 * n_features * fits
        seconds = trained["seconds"].to_numpy(dtype=float)
        design = np.column_stack([fits, work]) / seconds[:, None]
        (fit_seconds, work_seconds), *_ = np.linalg.lstsq(design, np.ones(len(work)), rcond=None)
        return cls(
            max(float(fit_seconds), prior.fit_seconds / 100),
            max(float(work_seconds), prior.work_seconds / 100),
            len(trained),
        )


@dataclass(frozen=True)
class Policy:
    """Which groups are trained again.

    Args:
        retrain: `changed`: whose fingerprint changed; `stale`: also those tuned longer ago than
            `retune_after`; `listed`: the listed ones; `all`.
        listed: group ids, for `listed`.
        retune_after: a changed group tuned less long ago is refitted without trials.
        as_of: what the run pretends.
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
        cost_model: that foresaw the seconds.
    """

    groups: pd.DataFrame
    slots: int
    cost_model: CostModel = field(default_factory=CostModel)

    @property
    def to_train(self) -> pd.DataFrame:
        """The groups that are trained or refitted, longest first."""
        return self.groups[self.groups["action"].isin([TRAIN, REFRESH])]

    @property
    def n_waves(self) -> int:
        """Waves."""
        return int(self.groups["wave"].max()) + 1 if len(self.groups) else 0

    @property
    def n_tasks(self) -> int:
        """Spark tasks of all waves."""
        return (
            int(self.to_train.groupby("wave")["task"].max().add(1).sum())
            if len(self.to_train)
            else 0
        )

    @property
    def predicted_seconds(self) -> float:
        """Predicted wall seconds: the fullest slot when tasks start in order."""
        loads = [0.0] * self.slots
        for cost in self.to_train.groupby(["wave", "task"])["cost_seconds"].sum().sort_index():
            heapq.heapreplace(loads, loads[0] + float(cost))
        return max(loads)

    def describe(self) -> str:
        """The plan in one paragraph for people."""
        counted = self.groups["action"].value_counts()
        descriptions = {
            TRAIN: "to train",
            REFRESH: "to refit",
            REUSE: "unchanged (reused)",
            KEEP: "done before the interruption",
        }
        parts = [
            f"{counted[action]:,} {text}"
            for action, text in descriptions.items()
            if action in counted
        ]
        rest = self.groups.loc[self.groups["action"] == INHERIT, "reason"].value_counts()
        parts += [f"{count:,} {reason}" for reason, count in rest.items()]
        return f"{len(self.groups):,} groups: {', '.join(parts)}; {self._describe_seconds()}"

    def _describe_seconds(self) -> str:
        if self.to_train.empty:
            return "nothing to train"
        seconds, earlier = self.predicted_seconds, self.cost_model.learnt_from
        if earlier:
            waves = f"{self.n_waves} wave{'' if self.n_waves == 1 else 's'}"
            return (
                f"{self.n_tasks:,} tasks in {waves} on {self.slots} slots, about {seconds:.0f} s, "
                f"estimated from {earlier:,} earlier groups"
            )
        # How many tasks and waves it takes depends on the seconds, which nobody knows yet.
        return (
            f"{max(1, seconds):.0f} to {max(1, DOUBT * seconds):.0f} s on {self.slots} slots, "
            "estimated (no history yet)"
        )


def build_plan(
    counts: pd.DataFrame,
    policy: Policy,
    earlier: EarlierRuns,
    *,
    shared: str,
    n_features: int,
    n_fits: int,
    slots: int,
    checkpoint_seconds: float,
    cost_model: CostModel | None = None,
) -> TrainingPlan:
    """Decide per group whether it is trained, from what, and where.

    Args:
        counts: one row per group: grain, group_id, parent_id, n_rows, n_target, n_invalid, n_fit,
            n_tune, n_report, rows_hash.
        policy: which groups are trained again.
        earlier: what earlier runs left.
        shared: as from `shared_digest`.
        n_features: features per row.
        n_fits: trials per group that the tuning budget allows.
        slots: tasks that run at once.
        checkpoint_seconds: a kill costs at most twice as much work per slot.
        cost_model: foresees seconds; by default learnt from `earlier.before` by the caller, here
            the prior.
    """
    model = cost_model or CostModel()
    groups = _with_vanished(counts.reset_index(drop=True), earlier.before)
    finest = int(groups["grain"].max())
    decisions = _decisions(groups.to_dict("records"), policy, earlier, shared, finest)
    for name in ("action", "reason", "started_from", "fingerprint"):
        groups[name] = pd.Series([getattr(decision, name) for decision in decisions], dtype=object)
    works = groups["action"].isin([TRAIN, REFRESH])
    fits = np.where(groups["action"] == REFRESH, _REFRESH_FITS, n_fits + REFITS)
    groups["cost_seconds"] = np.where(
        works, model.predict(groups["n_target"], n_features, fits), 0.0
    )
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
    return TrainingPlan(groups, slots, model)


def _with_vanished(
    counts: pd.DataFrame, before: Mapping[GroupKey, Mapping[str, Any]]
) -> pd.DataFrame:
    """The groups of the data, and those of the run before that are not in it any more."""
    there = set(GroupKey.of_rows(counts))
    gone = [row for key, row in sorted(before.items()) if key not in there]
    if not gone:
        return counts
    empty = {name: 0 for name in counts.columns if name.startswith("n_")}
    rows = [
        {
            "grain": row["grain"],
            "group_id": row["group_id"],
            "parent_id": row["parent_id"],
            "rows_hash": VANISHED,
            **empty,
        }
        for row in gone
    ]
    added = pd.DataFrame(rows).reindex(columns=counts.columns)
    if "exponent" in added:
        added["exponent"] = 0
    return pd.concat([counts, added.astype(counts.dtypes)], ignore_index=True)


@dataclass(frozen=True)
class _Decision:
    action: str
    reason: str | None = None
    started_from: str | None = None
    fingerprint: str | None = None


def _decisions(
    groups: Sequence[Mapping[Any, Any]],
    policy: Policy,
    earlier: EarlierRuns,
    shared: str,
    finest: int,
) -> list[_Decision]:
    """One decision per group, in the groups' order.

    Parents first, because a child that corrects them changes with them.
    """
    found: dict[int, _Decision] = {}
    bases: dict[GroupKey, str | None] = {}
    listed: set[GroupKey] = set()
    for place in sorted(range(len(groups)), key=lambda place: groups[place]["grain"]):
        group = dict(groups[place])
        key, parent = GroupKey.of(group), GroupKey.parent_of(group)
        if (
            policy.corrects
            and group["rows_hash"] != VANISHED
            and (base := bases.get(parent)) is not None
        ):
            group["rows_hash"] = f"{group['rows_hash']}+{base}"
        if key.group_id in policy.listed or (policy.corrects and parent in listed):
            listed.add(key)
        found[place] = _decide(group, policy, earlier, shared, finest, is_listed=key in listed)
        bases[key] = found[place].fingerprint or bases.get(parent)
    return [found[place] for place in range(len(groups))]


def _decide(
    group: Mapping[Any, Any],
    policy: Policy,
    earlier: EarlierRuns,
    shared: str,
    finest: int,
    *,
    is_listed: bool,
) -> _Decision:
    """What is to be done for one group."""
    key = GroupKey.of(group)
    before = earlier.before.get(key)
    hashed = str(group["rows_hash"])
    if policy.recipes:
        return _refit_or_not(key, policy.recipes.get(key), earlier, hashed, shared)
    if hashed == VANISHED or (policy.retrain == "listed" and not is_listed):
        return _without_training(
            key[0], before, VANISHED if hashed == VANISHED else NOT_LISTED, hashed, shared
        )
    # The pooled group is sent to a worker in any case, if only to judge the rows that no model
    # answers.
    if key[0] > 0 and (reason := _reason_to_inherit(group, policy, finest)) is not None:
        return _Decision(INHERIT, reason)
    source = earlier.kept.get(key)
    if source is not None and _is_unchanged(source, hashed, shared):
        return _Decision(KEEP, None, source["started_from"], source["fingerprint"])
    source = next(
        (
            row
            for row in (before, earlier.unfinished.get(key))
            if row and _may_be_reused(row, hashed, shared, policy)
        ),
        None,
    )
    if source is not None:
        return _Decision(REUSE, None, source["started_from"], source["fingerprint"])
    start = _start(group, earlier, policy, judge=policy.finest_only and key[0] != finest)
    started_from = start.to_json()
    return _Decision(
        TRAIN if start.refit is None else REFRESH,
        None,
        started_from,
        fingerprint(hashed, shared, started_from),
    )


def _refit_or_not(
    key: GroupKey, start: Start | None, earlier: EarlierRuns, hashed: str, shared: str
) -> _Decision:
    """Fit an earlier recipe, unless an interrupted run has done that."""
    if hashed == VANISHED or start is None or (start.judge and key[0] > 0):
        return _Decision(INHERIT, VANISHED if hashed == VANISHED else NOT_LISTED)
    started_from = start.to_json()
    wanted = fingerprint(hashed, shared, started_from)
    for row, action in ((earlier.kept.get(key), KEEP), (earlier.unfinished.get(key), REUSE)):
        if row is not None and row["fingerprint"] == wanted:
            return _Decision(action, None, started_from, wanted)
    return _Decision(TRAIN if start.refit is None else REFRESH, None, started_from, wanted)


def _without_training(
    grain: int, before: Mapping[str, Any] | None, reason: str, hashed: str, shared: str
) -> _Decision:
    """A group keeps the booster it has, if it has one, whether or not its rows changed.

    The pooled group keeps its held-out rows, or judges.
    """
    if grain == 0 and before is None:
        started_from = Start(judge=True).to_json()
        return _Decision(TRAIN, reason, started_from, fingerprint(hashed, shared, started_from))
    if before is None or (grain > 0 and before["status"] not in WITH_BOOSTER):
        return _Decision(INHERIT, reason)
    return _Decision(REUSE, reason, before["started_from"], before["fingerprint"])


def _reason_to_inherit(group: Mapping[Any, Any], policy: Policy, finest: int) -> str | None:
    if policy.finest_only and group["grain"] != finest:
        return NOT_POOLED
    # A group with invalid targets is sent to a worker, which says what is wrong with it.
    is_spoilt = group["grain"] == finest and group.get("n_invalid", 0) > 0
    if is_spoilt or (group["n_fit"] >= policy.fit_rows and group["n_tune"] >= policy.tune_rows):
        return None
    return NO_TARGET if group["n_target"] == 0 else TOO_FEW_ROWS


def _is_unchanged(row: Mapping[str, Any], rows_hash: str, shared: str) -> bool:
    """Whether the group would be trained from just what it was trained from.

    Refits of an earlier release predicted the tune rows that had chosen them: their weights are
    wrong, and they are made again.
    """
    started_from = row["started_from"]
    if not isinstance(started_from, str) or Start.from_json(started_from).predicts_what_chose_it:
        return False
    return bool(row["fingerprint"] == fingerprint(rows_hash, shared, started_from))


def _may_be_reused(row: Mapping[str, Any], rows_hash: str, shared: str, policy: Policy) -> bool:
    """A failed group is tried again; one that killed its process twice is not, until it changes."""
    if (
        policy.retrain not in ("changed", "stale")
        or row["status"] == "failed"
        or not _is_unchanged(row, rows_hash, shared)
    ):
        return False
    return (
        policy.retrain == "changed"
        or row["status"] not in WITH_BOOSTER
        or _was_tuned_lately(row, policy)
    )


def _was_tuned_lately(row: Mapping[str, Any], policy: Policy) -> bool:
    return (
        policy.retune_after.add(pd.Timestamp(row["tuned_as_of"]).tz_localize(None)) > policy.as_of
    )


def _start(group: Mapping[Any, Any], earlier: EarlierRuns, policy: Policy, *, judge: bool) -> Start:
    """From the group's own last parameters, then its parent's."""
    if judge:
        return Start(judge=True)
    keys = GroupKey.of(group), GroupKey.parent_of(group)
    own, parent = (
        row if row is not None and row["status"] in WITH_BOOSTER else None
        for row in map(earlier.before.get, keys)
    )
    # Without the winners of both halves, as in a ledger of an earlier release, tune rows would be
    # predicted by what they chose.
    if (
        own is not None
        and earlier.same_spec
        and own.get("cross_selection") is not None
        and policy.retrain in ("changed", "stale")
        and _was_tuned_lately(own, policy)
    ):
        cross = CrossSelection.from_json(own["cross_selection"])
        return Start(
            refit=json.loads(own["parameters"]), n_rounds=int(own["n_rounds"]), cross=cross
        )
    return Start(
        trials=tuple(json.loads(row["parameters"]) for row in (own, parent) if row is not None),
        max_trials=policy.max_trials,
    )


def of_grain(plan: TrainingPlan, grain: int) -> TrainingPlan:
    """The part of a plan that trains one grain."""
    return replace(
        plan, groups=plan.to_train[plan.to_train["grain"] == grain].reset_index(drop=True)
    )


def pack_tasks(
    costs: Sequence[float], *, slots: int, task_seconds: float = TASK_SECONDS
) -> list[int]:
    """Pack groups into tasks of about `task_seconds`, given longest first.

    Tasks are numbered longest first, too.

    Args:
        costs: seconds per group, in descending order.
        slots: tasks that run at once; there are at least that many tasks where there are groups
            enough.
        task_seconds: what a task should last; a longer group is a task of its own.

    Returns:
        The task of each group.

    Source: longest processing time first, Graham (1969): at most 4/3 - 1/(3m) of the optimum on m
    slots where each holds one task.
    """
    if not costs:
        return []
    giants = sum(cost >= task_seconds for cost in costs)
    rest = sum(costs[giants:])
    # As many small tasks for every slot: one more would leave the other slots idle while it runs.
    per_slot = max(1, round(rest / (slots * task_seconds)))
    shares = [1.0] * (slots * (per_slot - 1)) + (
        LAST_SHARES if per_slot >= MIN_TASKS_BEFORE_LAST else [1.0]
    ) * slots
    # The load of each task over its share.
    heap = [
        (0.0, -share, giants + number) for number, share in enumerate(shares[: len(costs) - giants])
    ]
    chosen = list(range(giants))
    for cost in costs[giants:]:
        filled, share, task = heap[0]
        heapq.heapreplace(heap, (filled - cost / share, share, task))
        chosen.append(task)
    loads = np.bincount(chosen, weights=np.asarray(costs))
    rank = np.empty(len(loads), dtype=int)
    rank[np.argsort(-loads, kind="stable")] = np.arange(len(loads))
    return [int(rank[task]) for task in chosen]


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
    # A task longer than a wave leaves numbers out.
    _, first, wave_of_task = np.unique(wave_of_task, return_index=True, return_inverse=True)
    chosen = np.asarray(tasks)
    return wave_of_task[chosen].tolist(), (chosen - first[wave_of_task[chosen]]).tolist()


def longest_first(groups: pd.DataFrame) -> pd.DataFrame:
    """The groups by planned seconds, those of equal cost in a fixed order."""
    by = ["cost_seconds", "grain", "group_id"]
    return groups.sort_values(by, ascending=[False, True, True], ignore_index=True)


def refuse_unknown(listed: Collection[str], known: Sequence[str]) -> None:
    """Check the group ids that a launch names.

    Args:
        listed: by the launch.
        known: of the fleet.

    Raises:
        DataError: naming the first that is unknown, and near ones.
    """
    unknown = sorted(set(listed) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are {len(known):,}, e.g. {known[-1]}."
        )
        raise DataError(
            f"there is no group {unknown[0]!r}; {hint} A group is named by the JSON array of its "
            "keys"
        )
