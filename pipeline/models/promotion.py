"""Which groups a challenger may answer instead of the champion, and the gates before the alias moves.

Compared are twins: the recipes of both, fitted on the same fit and tune rows, judged on the same report rows (`pipeline.spark.comparison`
adds the losses up). A recipe is a group's parameters, features and form, with those of the ancestors that have a say in its answers.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import DataError, StoreError
from pipeline.models.meta_model import CORRECTION
from pipeline.models.pack import ancestry
from pipeline.tables import records

Key = tuple[int, str]
Floats = npt.NDArray[np.float64]

# One-sided: a group without a real change is moved, or held back, by chance as often as that.
LEVEL = 0.025
# A group with fewer report rows, or with rows in fewer stretches of time, follows its parent.
MIN_ROWS, MIN_BLOCKS = 30, 8
# The chance that any group of a sound fleet fails the gate of the constants.
FLEET_LEVEL = 0.05
MAX_FAILED = 0.1

# What a group is in the challenger, compared with what answers it now.
UNCHANGED, REFRESH, NEW_RECIPE, NEW_GROUP, NOT_COMPARABLE = "unchanged", "refresh", "new_recipe", "new_group", "not_comparable"
# Why it is, or is not, promoted.
NOT_WORSE, WORSE, BETTER, NOT_BETTER, FOLLOWS, UNMEASURED = "not_worse", "worse", "better", "not_better", "follows_parent", "unmeasured"
ROLLED_BACK, OVERRIDE = "rolled_back", "override"


@dataclass(frozen=True)
class Gate:
    """One condition of promotion.

    Args:
        name: what it asks.
        passed: whether it holds.
        found: what was found.
        expected: what would pass.
    """

    name: str
    passed: bool
    found: str
    expected: str


@dataclass(frozen=True)
class Side:
    """A training run as it is compared.

    Args:
        fleet_version: the run.
        spec: of its generation, as in a pack's spec.json.
        groups: its ledger rows by group.
    """

    fleet_version: str
    spec: Mapping[str, Any]
    groups: Mapping[Key, Mapping[str, Any]]

    @classmethod
    def of_ledger(cls, spec: Mapping[str, Any], ledger: pd.DataFrame) -> "Side":
        """From the rows of a run's ledger."""
        return cls(str(spec["fleet_version"]), spec, {(int(row["grain"]), str(row["group_id"])): row for row in records(ledger)})

    def recipe(self, key: Key) -> str | None:
        """What the group's own model is made by; None where it has none. Rounds and categories come of the rows, not of the recipe."""
        row = self.groups.get(key)
        if row is None or row["booster_id"] is None:
            return None
        parts = [json.loads(row["parameters"]), self.spec["features"], sorted(self.spec["categories"]), self.spec["own"], self.spec["target"]]
        if self.spec["own"] == CORRECTION:
            parts += [self.recipe(above) for above in ancestry(key, self.spec["grains"])[:-1]]
        return json.dumps(parts, sort_keys=True)

    def chain(self, key: Key) -> list[tuple[Key, float]]:
        """The models that have a say in a group's answers, with their weights against their parents', coarsest first."""
        found: list[tuple[Key, float]] = []
        for above in ancestry(key, self.spec["grains"]):
            row = self.groups.get(above)
            if row is None or row["booster_id"] is None or (not row["weight"] and self.spec["own"] != CORRECTION):
                continue
            weight = float(row["weight"] or 0.0)
            found = [(above, weight)] if weight == 1.0 and self.spec["own"] != CORRECTION else [*found, (above, weight)]
        return found


def is_comparable(champion: Mapping[str, Any], challenger: Mapping[str, Any]) -> bool:
    """Whether two specs describe the same question, so that one's recipes can be fitted beside the other's."""
    return all(champion[name] == challenger[name] for name in ("grains", "task", "classes", "target", "is_count"))


def kind_of_change(key: Key, champion: Side | None, challenger: Side) -> str:
    """What a group is in the challenger, compared with the run that answers it now.

    Args:
        key: the group.
        champion: that run; None for a group that no run answers yet.
        challenger: the run that is judged.
    """
    if champion is None:
        return NEW_GROUP
    if champion.fleet_version == challenger.fleet_version:
        return UNCHANGED
    if not champion.groups or not is_comparable(champion.spec, challenger.spec):
        return NOT_COMPARABLE
    before, after = champion.chain(key), challenger.chain(key)
    if [above for above, _ in before] != [above for above, _ in after]:
        return NEW_RECIPE
    same_boosters = all(champion.groups[above]["booster_id"] == challenger.groups[above]["booster_id"] for above, _ in before)
    if same_boosters and before == after:
        return UNCHANGED
    return REFRESH if all(champion.recipe(above) == challenger.recipe(above) for above, _ in before) else NEW_RECIPE


def decide(groups: pd.DataFrame, rolled_back: "set[Key] | frozenset[Key]" = frozenset()) -> pd.DataFrame:
    """Say of every group whether the challenger answers it from now on.

    The same recipe on newer rows is promoted unless it is significantly worse, a new recipe only if it is significantly better; a
    group with few report rows follows its parent. The test is a paired t-test of sums over stretches of time, because rows of one
    time err together.

    Args:
        groups: one row per group of the challenger: grain, group_id, parent_id, kind; n_rows, n_blocks, gain (mean loss of the champion less
            that of the challenger) and gain_error (its standard error), null where nothing was compared.
        rolled_back: groups that were taken back from this very challenger.

    Returns:
        The rows, coarse groups first, with promoted, reason and p_value (of the one-sided test; null where none was made).

    Source: ratio estimator over clusters, Cochran (1977), section 6.4, with Student's t for so many stretches less one.
    """
    ordered = groups.sort_values(["grain", "group_id"], ignore_index=True)
    n_rows, n_blocks, gain, error = (ordered[name].to_numpy(dtype=float) for name in ("n_rows", "n_blocks", "gain", "gain_error"))
    p_better = chance_of(gain, error, n_blocks)
    enough = (n_rows >= MIN_ROWS) & (n_blocks >= MIN_BLOCKS) & np.isfinite(p_better)
    found: dict[Key, tuple[bool, str]] = {}
    p_values: list[float | None] = []
    keys = zip(ordered["grain"].astype(int), ordered["group_id"], strict=True)
    for key, parent, kind, judged, better in zip(keys, ordered["parent_id"], ordered["kind"], enough, p_better, strict=True):
        tested: float | None = None
        if key in rolled_back:
            verdict = False, ROLLED_BACK
        elif kind in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE):
            verdict = True, kind
        elif not judged:
            verdict = (found[key[0] - 1, parent][0], FOLLOWS) if key[0] else (True, UNMEASURED)
        elif kind == REFRESH:
            tested = 1.0 - better
            verdict = (False, WORSE) if tested < LEVEL else (True, NOT_WORSE)
        else:
            tested = better
            verdict = (True, BETTER) if tested < LEVEL else (False, NOT_BETTER)
        found[key] = verdict
        p_values.append(tested)
    promoted, reason = zip(*found.values(), strict=True) if found else ((), ())
    return ordered.assign(promoted=list(promoted), reason=list(reason), p_value=pd.Series(p_values, dtype=float))


def chance_of(gain: Floats, error: Floats, n_blocks: Floats) -> Floats:
    """Chance of a gain at least so large where there is none; 1/2 where both always err alike, NaN where nothing was compared."""
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where((gain == 0) & (error == 0), 0.0, gain / error)
        return np.where(np.isnan(gain) | (n_blocks < 2), np.nan, 1.0 - stdtr(np.maximum(n_blocks - 1, 1), t))  # noqa: PLR2004


@dataclass(frozen=True)
class Judgement:
    """What was decided of a challenger.

    Args:
        decisions: as from `decide`, with from_version and to_version (the fleet versions that answered and will answer the group).
        gates: the conditions before the alias moves.
    """

    decisions: pd.DataFrame
    gates: Sequence[Gate] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate is passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def serving(self) -> dict[Key, str]:
        """The fleet version that answers each group from now on."""
        rows = self.decisions
        return {(int(grain), str(group)): str(to) for grain, group, to in zip(rows["grain"], rows["group_id"], rows["to_version"], strict=True)}

    @property
    def changes_answers(self) -> bool:
        """Whether a group gets another chain, and not just the same one under a newer version's name."""
        rows = self.decisions
        return bool((rows["promoted"] & (rows["kind"] != UNCHANGED)).any())

    @property
    def is_whole(self) -> bool:
        """Whether the challenger answers every group from now on."""
        return bool(self.decisions["promoted"].all())


def overridden(judgement: Judgement, decision: str, listed: Collection[str], challenger: str) -> Judgement:
    """The decisions that a person takes instead of the tests.

    Args:
        judgement: what the tests say.
        decision: `promote`: only the listed groups get the challenger's chain, all others stay as they are; `keep`: the listed ones stay,
            the others are decided by the tests; `judge` changes nothing.
        listed: group ids; empty for all groups.
        challenger: its fleet version.
    """
    if decision == "judge":
        return judgement
    rows = judgement.decisions
    chosen = rows["group_id"].isin(list(listed)) if listed else pd.Series([True] * len(rows), index=rows.index)
    if decision == "promote":
        promoted, touched = chosen | rows["from_version"].isna(), pd.Series([True] * len(rows), index=rows.index)
    else:
        # A group that nothing answers yet cannot stay with anything.
        touched = chosen & rows["from_version"].notna()
        promoted = rows["promoted"] & ~touched
    changed = rows.assign(promoted=promoted, reason=rows["reason"].mask(touched, OVERRIDE), p_value=rows["p_value"].mask(touched))
    return Judgement(changed.assign(to_version=changed["from_version"].where(~promoted, challenger)), judge_answers(changed))


def taken_back(decisions: pd.DataFrame, challenger: str) -> frozenset[Key]:
    """Groups that were rolled back from that fleet version: only a person, or a newer version, moves them again.

    Args:
        decisions: rows of `tables.DECISIONS`.
        challenger: the fleet version.
    """
    rows = decisions[(decisions["decision"] == "rollback") & decisions["moved"].astype(bool) & (decisions["from_version"] == challenger)]
    return frozenset(zip(rows["grain"].astype(int), rows["group_id"].astype(str), strict=True))


def rolled_back(current: Mapping[Key, str], target: Mapping[Key, str], listed: Collection[str]) -> pd.DataFrame:
    """The decisions of a rollback: grain, group_id, from_version, to_version and reason.

    Args:
        current: fleet version by group, as the champion answers now.
        target: the same of the version to roll back to.
        listed: group ids; empty for all.

    Raises:
        DataError: if a listed group is not in the version to roll back to.
    """
    wanted = [key for key in {**target, **current} if not listed or key[1] in set(listed)]
    lacking = sorted({group for group in listed if not any(key[1] == group and key in target for key in wanted)})
    if lacking:
        raise DataError(
            f"the version to roll back to has no group {lacking[0]!r}; roll back the whole fleet, or to a version that has it (rollback_to)"
        )
    rows = [(*key, current.get(key), target.get(key)) for key in sorted(wanted)]
    return pd.DataFrame(rows, columns=["grain", "group_id", "from_version", "to_version"]).assign(reason=OVERRIDE)


def judge_challenger(ledger: pd.DataFrame, groups_in_pack: Sequence[Key]) -> list[Gate]:
    """Ask whether a version is fit to serve, whatever served before it.

    Args:
        ledger: the rows of its training run.
        groups_in_pack: grain index and id of every group that has an answer chain in it.

    Raises:
        StoreError: if the ledger has no such run.
    """
    chains = set(groups_in_pack)
    lacking = [key for key in zip(ledger["grain"], ledger["group_id"], strict=True) if (int(key[0]), key[1]) not in chains]
    pooled = ledger[ledger["grain"] == 0]
    if pooled.empty:
        raise StoreError("the ledger does not know the challenger's run: registry and data root do not belong together; materialise models again")
    blend, constant, measure = _errors(pooled.iloc[0])
    # Without report rows there is nothing to compare, and a first model beats none.
    unmeasured = pd.isna(blend) or pd.isna(constant)
    n_failed = int((ledger["status"] == "failed").sum())
    return [
        Gate("every group has an answer chain", not lacking, f"{len(lacking)} of {len(ledger)} lack one", "0"),
        Gate(
            "the fleet beats its constant",
            bool(unmeasured or (np.isfinite(blend) and blend <= constant)),
            "not measured" if unmeasured else f"error {blend:.6g}",
            "any" if unmeasured else f"at most {constant:.6g} ({measure} on report rows)",
        ),
        Gate("some group has a model", bool(ledger["booster_id"].notna().any()), f"{ledger['booster_id'].notna().sum()}", "at least 1"),
        Gate("few groups failed", n_failed <= MAX_FAILED * len(ledger), f"{n_failed} of {len(ledger)}", "at most 10 %"),
    ]


def judge_answers(decided: pd.DataFrame) -> list[Gate]:
    """Ask whether what is promoted answers well enough.

    Args:
        decided: as from `decide`, with loss_sum_champion and loss_sum_challenger (weighted sums), constant_gain (mean loss of the constant less
            that of the challenger) and constant_error (its standard error).
    """
    finest = decided[decided["grain"] == decided["grain"].max()]
    gains = (finest["loss_sum_champion"] - finest["loss_sum_challenger"]).where(finest["promoted"], 0.0)
    gains = gains[finest["loss_sum_champion"].notna()].to_numpy(dtype=float)
    # Groups as clusters: how steady the gain is from group to group.
    total, error = gains.sum(), np.sqrt((gains**2).sum())
    is_worse = bool(len(gains) >= MIN_BLOCKS and total < 0 and _normal_below(total / error) < LEVEL)
    whole = finest["loss_sum_champion"].sum()
    share = f"{-total / whole:+.3%} loss over {len(gains)} groups" if whole > 0 else "nothing to compare"
    p_better = chance_of(*(decided[name].to_numpy(dtype=float) for name in ("constant_gain", "constant_error", "n_blocks")))
    compared = decided["promoted"] & (decided["n_rows"] >= MIN_ROWS) & (decided["n_blocks"] >= MIN_BLOCKS) & np.isfinite(p_better)
    worse = decided[compared & (1.0 - p_better < FLEET_LEVEL / max(1, int(compared.sum())))]
    shown = ", ".join(worse.sort_values("constant_gain")["group_id"].head(5))
    return [
        Gate("the fleet is not worse than the champion", not is_worse, share, "not significantly more"),
        Gate("no group is worse than its constant", worse.empty, f"{len(worse)} of {int(compared.sum())}" + (f": {shown}" if shown else ""), "0"),
    ]


def _normal_below(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(z))


def _errors(pooled: "pd.Series[Any]") -> tuple[Any, Any, str]:
    """Errors of the fleet and of its constant over all rows, and what they are.

    Quantiles and counts are judged by the loss that they are learnt by: no quantile but the middle one is close in RMSE.
    """
    metrics = json.loads(pooled["metrics"]) if isinstance(pooled.get("metrics"), str) else {}
    for name, title in _OWN_LOSSES.items():
        blend, constant = (metrics.get(way, {}).get(name) for way in ("fleet", "constant"))
        if blend is not None and constant is not None:
            return blend, constant, title
    return pooled["report_blend"], pooled["report_constant"], "link space RMSE"


_OWN_LOSSES = {"pinball": "pinball loss", "deviance": "mean deviance"}
