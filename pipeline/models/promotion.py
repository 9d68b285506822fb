"""Which groups a challenger may answer for, and the gates before the alias moves.

Compared are twins: the recipes of both, fitted on the same fit and tune rows, judged on the same
report rows (`pipeline.spark.comparison` adds the losses up). A recipe is a group's parameters,
features and form, with those of the ancestors that have a say in its answers.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import DataError, StoreError
from pipeline.models.meta_model import Generation, GroupKey, ModelSpec
from pipeline.models.start import CrossSelection, Start
from pipeline.tables import BY_CONSTANT, BY_PARENT, records

Floats = npt.NDArray[np.float64]

# One-sided: a group without a real change is moved, or held back, by chance as often as that.
LEVEL = 0.025
# A group with fewer report rows, or with rows in fewer stretches of time, follows its parent.
MIN_ROWS, MIN_BLOCKS = 30, 8
# The chance that any group of a sound fleet is left to its parent or its constant.
FLEET_LEVEL = 0.05
# A smaller share of a loss than that is rounding.
DISCERNIBLE = 1e-9
MAX_FAILED = 0.1

# What a group is in the challenger, compared with what answers it now.
UNCHANGED, REFRESH, NEW_RECIPE, NEW_GROUP, NOT_COMPARABLE = (
    "unchanged",
    "refresh",
    "new_recipe",
    "new_group",
    "not_comparable",
)
# Why it is, or is not, promoted.
NOT_WORSE, WORSE, BETTER, NOT_BETTER, FOLLOWS, UNMEASURED = (
    "not_worse",
    "worse",
    "better",
    "not_better",
    "follows_parent",
    "unmeasured",
)
ROLLED_BACK, OVERRIDE, GATES, UNKNOWN = "rolled_back", "override", "gates", "unknown"
REFITTED = "earlier_recipe_refitted"
# What nobody can override.
CAN_OPEN, CAN_ANSWER = "the version can be opened", "every group has an answer chain"


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
class ComparedRun:
    """A training run as it is compared.

    Args:
        generation: what it answers by, besides its boosters.
        groups: its ledger rows by group.
    """

    generation: Generation
    groups: Mapping[GroupKey, Mapping[str, Any]]

    @property
    def fleet_version(self) -> str:
        """The run."""
        return self.generation.fleet_version

    @property
    def model_spec(self) -> ModelSpec:
        """Of the run."""
        return self.generation.model_spec

    @classmethod
    def of_ledger(cls, generation: Generation, ledger: pd.DataFrame) -> "ComparedRun":
        """From the rows of a run's ledger."""
        return cls(generation, {GroupKey.of(row): row for row in records(ledger)})

    def recipe(self, key: GroupKey) -> str | None:
        """What the group's own model is made by.

        None where it has none. Rounds and categories come of the rows, not of the recipe.
        """
        row = self.groups.get(key)
        if row is None or row["booster_id"] is None:
            return None
        model_spec = self.model_spec
        parts = [
            json.loads(row["parameters"]),
            model_spec.features,
            sorted(model_spec.categories),
            model_spec.own,
            model_spec.target.to_dict(),
        ]
        if model_spec.corrects:
            parts += [
                self.recipe(above) for above in key.list_ancestry(self.model_spec.grains)[:-1]
            ]
        return json.dumps(parts, sort_keys=True)

    def chain(self, key: GroupKey) -> list[tuple[GroupKey, float]]:
        """The models in a group's answers, coarsest first, with their blend weights."""
        found: list[tuple[GroupKey, float]] = []
        for above in key.list_ancestry(self.model_spec.grains):
            row = self.groups.get(above)
            if row is not None and row.get("answered_by") == BY_CONSTANT:
                found = []
            if (
                row is None
                or row["booster_id"] is None
                or (not row["weight"] and not self.model_spec.corrects)
            ):
                continue
            weight = float(row["weight"] or 0.0)
            found = (
                [(above, weight)]
                if weight == 1.0 and not self.model_spec.corrects
                else [*found, (above, weight)]
            )
        return found


def is_comparable(champion: ModelSpec, challenger: ModelSpec) -> bool:
    """Whether two model specs pose the same question, so that the recipes of both can be compared."""
    questions = [
        (
            model_spec.grains,
            model_spec.task,
            model_spec.classes,
            model_spec.target,
            bool(model_spec.is_count),
        )
        for model_spec in (champion, challenger)
    ]
    return questions[0] == questions[1]


def kind_of_change(key: GroupKey, champion: ComparedRun | None, challenger: ComparedRun) -> str:
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
    if not champion.groups or not is_comparable(champion.model_spec, challenger.model_spec):
        return NOT_COMPARABLE
    before, after = champion.chain(key), challenger.chain(key)
    if [above for above, _ in before] != [above for above, _ in after]:
        return NEW_RECIPE
    same_boosters = all(
        champion.groups[above]["booster_id"] == challenger.groups[above]["booster_id"]
        for above, _ in before
    )
    if same_boosters and before == after:
        return UNCHANGED
    return (
        REFRESH
        if all(champion.recipe(above) == challenger.recipe(above) for above, _ in before)
        else NEW_RECIPE
    )


def decide(
    groups: pd.DataFrame, rolled_back: "set[GroupKey] | frozenset[GroupKey]" = frozenset()
) -> pd.DataFrame:
    """Say of every group whether the challenger answers it from now on.

    The same recipe on newer rows is promoted unless it is significantly worse, a new recipe only if
    it is significantly better; a group with few report rows follows its parent. The test is a
    paired t-test of sums over stretches of time, because rows of one time err together.

    Args:
        groups: one row per group of the challenger: grain, group_id, parent_id, kind; n_rows,
            n_blocks, gain (mean loss of the champion less that of the challenger) and gain_error
            (its standard error), null where nothing was compared; optionally answered_by (`parent`
            or `constant` where that answers the group in the challenger, as its own answer is
            worse).
        rolled_back: groups that were taken back from this very challenger.

    Returns:
        The rows, coarse groups first, with promoted, reason and p_value (of the one-sided test;
        null where none was made).

    Source: ratio estimator over clusters, Cochran (1977), section 6.4, with Student's t for so many
    stretches less one.
    """
    ordered = groups.sort_values(["grain", "group_id"], ignore_index=True)
    n_rows, n_blocks, gain, error = (
        ordered[name].to_numpy(dtype=float) for name in ("n_rows", "n_blocks", "gain", "gain_error")
    )
    p_better = chance_of(gain, error, n_blocks)
    enough = (n_rows >= MIN_ROWS) & (n_blocks >= MIN_BLOCKS) & np.isfinite(p_better)
    verdicts: dict[GroupKey, tuple[bool, str]] = {}
    p_values: list[float | None] = []
    keys = GroupKey.of_rows(ordered)
    for key, parent, kind, is_judged, better in zip(
        keys, ordered["parent_id"], ordered["kind"], enough, p_better, strict=True
    ):
        p_value: float | None = None
        if key in rolled_back and kind != NEW_GROUP:
            # What nothing answers cannot stay with anything.
            verdict = False, ROLLED_BACK
        elif kind in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE):
            verdict = True, kind
        elif not is_judged and key.grain == 0:
            verdict = True, UNMEASURED
        elif not is_judged:
            verdict = verdicts[GroupKey(key.grain - 1, parent)][0], FOLLOWS
        else:
            verdict, p_value = _tested_verdict(kind, better)
        verdicts[key] = verdict
        p_values.append(p_value)
    promoted = [goes for goes, _ in verdicts.values()]
    reasons = [reason for _, reason in verdicts.values()]
    if "answered_by" in ordered:
        for place, answered_by in enumerate(ordered["answered_by"]):
            if promoted[place] and isinstance(answered_by, str):
                reasons[place] = f"answered_by_{answered_by}"
    return ordered.assign(
        promoted=promoted, reason=reasons, p_value=pd.Series(p_values, dtype=float)
    )


def _tested_verdict(kind: str, p_better: float) -> tuple[tuple[bool, str], float]:
    """Whether a compared group is promoted, why, and the p-value of the test that says so.

    Args:
        kind: what it is in the challenger.
        p_better: of the test that the challenger is better.
    """
    if kind == REFRESH:
        p_worse = 1.0 - p_better
        return ((False, WORSE) if p_worse < LEVEL else (True, NOT_WORSE)), p_worse
    return ((True, BETTER) if p_better < LEVEL else (False, NOT_BETTER)), p_better


def chance_of(gain: Floats, error: Floats, n_blocks: Floats) -> Floats:
    """Chance of a gain at least so large where there is none.

    1/2 where both always err alike, NaN where nothing was compared.
    """
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where((gain == 0) & (error == 0), 0.0, gain / error)
        is_compared = ~np.isnan(gain) & (n_blocks > 1)
        chance = 1.0 - stdtr(np.maximum(n_blocks - 1, 1), t)
        return np.where(is_compared, chance, np.nan)


@dataclass(frozen=True)
class Judgement:
    """What was decided of a challenger.

    Args:
        decisions: as from `decide`, with from_version and to_version (the fleet versions that
            answered and will answer the group).
        rival_gates: whether the challenger is worse than its pooled model, its constant, or a
            baseline.
    """

    decisions: pd.DataFrame
    rival_gates: Sequence[Gate] = field(default_factory=list)

    @property
    def gates(self) -> list[Gate]:
        """The conditions before the alias moves."""
        return [judge_answers(self.decisions), *self.rival_gates]

    @property
    def serving(self) -> dict[GroupKey, str]:
        """The fleet version that answers each group from now on."""
        rows = self.decisions
        return {
            key: str(version)
            for key, version in zip(GroupKey.of_rows(rows), rows["to_version"], strict=True)
        }

    @property
    def changes_answers(self) -> bool:
        """Whether a group gets another chain, not the same one under a newer version's name."""
        rows = self.decisions
        return bool(
            (rows["promoted"] & (rows["kind"] != UNCHANGED)).any()
            or (rows["reason"] == REFITTED).any()
        )

    @property
    def is_whole(self) -> bool:
        """Whether the challenger answers every group from now on."""
        return bool(self.decisions["promoted"].all())


@dataclass(frozen=True)
class EarlierRecipes:
    """Recipes of one fleet version that a challenger did not beat.

    Args:
        fleet_version: whose recipes.
        groups: that they answer.
        starts: how the models of these groups, and of those above them, are fitted on the
            challenger's rows.
    """

    fleet_version: str
    groups: frozenset[GroupKey]
    starts: Mapping[GroupKey, Start]


def earlier_recipes(
    decisions: pd.DataFrame, champions: Mapping[str, ComparedRun], challenger: ComparedRun
) -> list[EarlierRecipes]:
    """The recipes that stay, one set per fleet version that has some.

    Fitted on newer rows, they answer better than their old models.

    A set is left out where the challenger's columns, or a ledger of an earlier release, do not
    allow to fit it.

    Args:
        decisions: as from `decide`, with from_version.
        champions: the runs that answer now, by fleet version.
        challenger: the run that is judged.
    """
    staying: dict[str, set[GroupKey]] = {}
    not_better: set[GroupKey] = set()
    for row in records(decisions.sort_values("grain")):
        key = GroupKey.of(row)
        follows = row["reason"] == FOLLOWS and GroupKey.parent_of(row) in not_better
        if (
            row["promoted"]
            or row["kind"] != NEW_RECIPE
            or not (row["reason"] == NOT_BETTER or follows)
        ):
            continue
        not_better.add(key)
        staying.setdefault(str(row["from_version"]), set()).add(key)
    found = []
    for version, groups in sorted(staying.items()):
        side = champions[version]
        starts = {
            above: _refit_of(side, above)
            for key in groups
            for above in key.list_ancestry(side.model_spec.grains)
        }
        can_be_fitted = all(
            getattr(side.model_spec, name) == getattr(challenger.model_spec, name)
            for name in ("features", "own", "target")
        )
        if can_be_fitted and all(start is not None for start in starts.values()):
            refits = {key: start for key, start in starts.items() if start is not None}
            found.append(EarlierRecipes(version, frozenset(groups), refits))
    return found


def _refit_of(side: ComparedRun, key: GroupKey) -> Start | None:
    """How the recipe of a group is fitted again; None where its ledger row does not say enough."""
    row = side.groups.get(key)
    if row is None or row["booster_id"] is None:
        return Start(judge=True)
    if row["cross_selection"] is None:
        return None
    cross = CrossSelection.from_json(row["cross_selection"])
    return Start(refit=json.loads(row["parameters"]), n_rounds=int(row["n_rounds"]), cross=cross)


def with_refits(judgement: Judgement, refits: Mapping[str, Collection[GroupKey]]) -> Judgement:
    """The decisions once earlier recipes have been fitted on the challenger's rows.

    Args:
        judgement: before.
        refits: groups by the fleet version that answers them from now on.
    """
    by_group = {key: version for version, groups in refits.items() for key in groups}
    rows = judgement.decisions
    answers = [by_group.get(key) for key in GroupKey.of_rows(rows)]
    refitted = pd.Series(answers, index=rows.index, dtype=object)
    is_refitted = refitted.notna()
    changed = rows.assign(
        reason=rows["reason"].mask(is_refitted, REFITTED),
        to_version=rows["to_version"].mask(is_refitted, refitted),
    )
    return replace(judgement, decisions=changed)


def override_decisions(
    judgement: Judgement, decision: str, listed: Collection[str], challenger: str
) -> Judgement:
    """The decisions that a person takes instead of the tests.

    Args:
        judgement: what the tests say.
        decision: `promote`: only the listed groups get the challenger's chain, all others stay as
            they are; `keep`: the listed ones stay, the others are decided by the tests; `judge`
            changes nothing.
        listed: group ids; empty for all groups.
        challenger: its fleet version.
    """
    if decision == "judge":
        return judgement
    rows = judgement.decisions
    chosen = (
        rows["group_id"].isin(list(listed))
        if listed
        else pd.Series([True] * len(rows), index=rows.index)
    )
    if decision == "promote":
        promoted, touched = (
            chosen | rows["from_version"].isna(),
            pd.Series([True] * len(rows), index=rows.index),
        )
    else:
        # A group that nothing answers yet cannot stay with anything.
        touched = chosen & rows["from_version"].notna()
        promoted = rows["promoted"] & ~touched
    changed = rows.assign(
        promoted=promoted,
        reason=rows["reason"].mask(touched, OVERRIDE),
        p_value=rows["p_value"].mask(touched),
    )
    return replace(
        judgement,
        decisions=changed.assign(to_version=changed["from_version"].where(~promoted, challenger)),
    )


def hold_back(judgement: Judgement) -> pd.DataFrame:
    """The decisions of a judgement that the gates stopped: every group stays as it is."""
    rows = judgement.decisions
    would_move = rows["from_version"].fillna("") != rows["to_version"]
    return rows.assign(
        reason=rows["reason"].mask(would_move, GATES), to_version=rows["from_version"]
    )


def stays(serving: Mapping[GroupKey, str]) -> pd.DataFrame:
    """The decisions about a challenger that cannot even be looked at.

    Args:
        serving: fleet version by group, as the champion answers now; where it is empty, the pooled
            group stands for all.
    """
    answering: Mapping[GroupKey, str | None] = serving or {GroupKey(0, "[]"): None}
    rows = [(*key, version, version) for key, version in sorted(answering.items())]
    return pd.DataFrame(rows, columns=["grain", "group_id", "from_version", "to_version"]).assign(
        reason=GATES
    )


def groups_rolled_back(decisions: pd.DataFrame, challenger: str) -> frozenset[GroupKey]:
    """Groups that were rolled back from a fleet version.

    Only a person, or a newer version, moves them again.

    Args:
        decisions: rows of `tables.DECISIONS`.
        challenger: the fleet version.
    """
    rows = decisions[
        (decisions["decision"] == "rollback")
        & decisions["moved"].astype(bool)
        & (decisions["from_version"] == challenger)
    ]
    return frozenset(GroupKey.of_rows(rows))


def rolled_back(
    current: Mapping[GroupKey, str], target: Mapping[GroupKey, str], listed: Collection[str]
) -> pd.DataFrame:
    """The decisions of a rollback: grain, group_id, from_version, to_version and reason.

    Args:
        current: fleet version by group, as the champion answers now.
        target: the same of the version to roll back to.
        listed: group ids; empty for all.

    Raises:
        DataError: if a listed group is not in the version to roll back to.
    """
    wanted = [key for key in {**target, **current} if not listed or key[1] in set(listed)]
    lacking = sorted(
        {group for group in listed if not any(key[1] == group and key in target for key in wanted)}
    )
    if lacking:
        raise DataError(
            f"the version to roll back to has no group {lacking[0]!r}; roll back the whole fleet, "
            "or to a version that has it (rollback_to)"
        )
    rows = [(*key, current.get(key), target.get(key)) for key in sorted(wanted)]
    return pd.DataFrame(rows, columns=["grain", "group_id", "from_version", "to_version"]).assign(
        reason=OVERRIDE
    )


def losing_groups(measured: pd.DataFrame) -> dict[GroupKey, str]:
    """Groups whose answers are significantly worse than their parent's or the constant's.

    And which of the two answers them better.

    Args:
        measured: one row per group, as from `losses.compare_answers`, with the rivals parent and
            constant.

    Returns:
        `parent` or `constant` by group. The chance that a fleet in which no group is worse has any
        is `FLEET_LEVEL`.
    """
    enough = (measured["n_rows"] >= MIN_ROWS) & (measured["n_blocks"] >= MIN_BLOCKS)
    tested = measured[enough]
    level = FLEET_LEVEL / max(1, 2 * len(tested))
    is_worse = {rival: _is_worse(tested, rival, level) for rival in (BY_PARENT, BY_CONSTANT)}
    losers = tested[is_worse[BY_PARENT] | is_worse[BY_CONSTANT]]
    found: dict[GroupKey, str] = {}
    for row in records(losers):
        by_constant = row["loss_constant"] < row["loss_parent"]
        found[GroupKey.of(row)] = BY_CONSTANT if by_constant else BY_PARENT
    return found


def _is_worse(measured: pd.DataFrame, rival: str, level: float) -> "pd.Series[bool]":
    """Per row whether our loss is significantly above a rival's, and by more than rounding."""
    gain, error, n_blocks = (
        measured[f"{name}_{rival}"].to_numpy(dtype=float)
        for name in ("gain", "gain_error", "n_blocks")
    )
    is_discernible = -gain > DISCERNIBLE * measured["loss"].to_numpy(dtype=float)
    return pd.Series(
        is_discernible & (1.0 - chance_of(gain, error, n_blocks) < level), index=measured.index
    )


def judge_challenger(ledger: pd.DataFrame, groups_in_pack: Sequence[GroupKey]) -> list[Gate]:
    """Ask whether a version is fit to serve, whatever served before it.

    Args:
        ledger: the rows of its training run.
        groups_in_pack: every group that has an answer chain in it.

    Raises:
        StoreError: if the ledger has no such run.
    """
    chains = set(groups_in_pack)
    lacking = [key for key in GroupKey.of_rows(ledger) if key not in chains]
    if ledger[ledger["grain"] == 0].empty:
        raise StoreError(
            "the ledger does not know the challenger's run: registry and data root do not belong "
            "together; materialise models again"
        )
    n_failed = int((ledger["status"] == "failed").sum())
    n_models = int(ledger["booster_id"].notna().sum())
    return [
        Gate(CAN_ANSWER, not lacking, f"{len(lacking)} of {len(ledger)} lack one", "0"),
        Gate("some group has a model", n_models > 0, f"{n_models}", "at least 1"),
        Gate(
            "few groups failed",
            n_failed <= MAX_FAILED * len(ledger),
            f"{n_failed} of {len(ledger)}",
            "at most 10 %",
        ),
    ]


def judge_rivals(fleet: pd.DataFrame, titles: Mapping[str, str]) -> list[Gate]:
    """Ask whether the fleet answers worse than its pooled model, its constant or a baseline.

    A gate fails only where the fleet is significantly worse, by the paired test over stretches of
    time. A rival that answers few rows, or rows in few stretches, is not compared.

    Args:
        fleet: one row, or none, as from `losses.compare_answers` over all report rows.
        titles: what people call each rival, by its name in the columns.
    """
    gates = []
    for rival, title in titles.items():
        found, is_worse = "too few report rows to compare", False
        row = fleet.iloc[0] if len(fleet) else {f"n_rows_{rival}": 0, f"n_blocks_{rival}": 0}
        if row[f"n_rows_{rival}"] >= MIN_ROWS and row[f"n_blocks_{rival}"] >= MIN_BLOCKS:
            theirs = row[f"loss_{rival}"]
            found = (
                f"loss {theirs - row[f'gain_{rival}']:.6g}, {title} {theirs:.6g} on "
                f"{row[f'n_rows_{rival}']:,.0f} rows"
            )
            is_worse = bool(_is_worse(fleet, rival, LEVEL / len(titles)).iloc[0])
        gates.append(
            Gate(
                f"the fleet is not worse than {title}",
                not is_worse,
                found,
                "not significantly more",
            )
        )
    return gates


def judge_answers(decided: pd.DataFrame) -> Gate:
    """Ask whether what is promoted is worse than what it replaces.

    Args:
        decided: as from `decide`, with loss_sum_champion and loss_sum_challenger (weighted sums).
    """
    finest = decided[decided["grain"] == decided["grain"].max()]
    gains = (finest["loss_sum_champion"] - finest["loss_sum_challenger"]).where(
        finest["promoted"], 0.0
    )
    gains = gains[finest["loss_sum_champion"].notna()].to_numpy(dtype=float)
    # Groups as clusters: how steady the gain is from group to group.
    total, error = gains.sum(), np.sqrt((gains**2).sum())
    is_worse = bool(len(gains) >= MIN_BLOCKS and total < 0 and _normal_below(total / error) < LEVEL)
    whole = finest["loss_sum_champion"].sum()
    share = (
        f"{-total / whole:+.3%} loss over {len(gains)} groups"
        if whole > 0
        else "nothing to compare"
    )
    return Gate(
        "the fleet is not worse than the champion", not is_worse, share, "not significantly more"
    )


def _normal_below(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(z))


def may_serve(gates: Sequence[Gate], *, is_first: bool, decision: str) -> bool:
    """Whether a challenger serves from now on, for the groups that were promoted.

    Where nothing serves yet, the challenger does, whatever its gates say: its answers are better
    than none. A person may promote what the gates would not. Only a version that cannot answer
    serves in no case.

    Args:
        gates: all that it was asked.
        is_first: whether nothing serves yet.
        decision: what the launch asks for.
    """
    can_answer = all(gate.passed for gate in gates if gate.name == CAN_ANSWER)
    passed = all(gate.passed for gate in gates)
    return can_answer and (passed or is_first or decision == "promote")


def answers_differ(decisions: pd.DataFrame) -> "pd.Series[bool]":
    """Per decision whether another fleet version answers the group."""
    return decisions["from_version"].fillna("") != decisions["to_version"].fillna("")


def number_before(moves: pd.DataFrame, number: str) -> str | None:
    """The registered version that served before another; None where no decision tells.

    Args:
        moves: one row per launch that decided, oldest first: champion_before and champion_after.
        number: of the version that serves.
    """
    earlier = moves[moves["champion_after"] == number]
    earlier = earlier[earlier["champion_before"].notna() & (earlier["champion_before"] != number)]
    return None if earlier.empty else str(earlier["champion_before"].iloc[-1])


def found_elsewhere(before: Mapping[GroupKey, str], after: Mapping[GroupKey, str]) -> pd.DataFrame:
    """Decisions that record an alias found where no recorded launch moved it.

    Args:
        before: fleet version by group, as the last recorded decision left them; empty where nobody
            can tell.
        after: the same of the version that was found to serve.
    """
    # The move itself is recorded even where a version cannot be opened.
    keys = sorted({**before, **after}) or [GroupKey(0, "[]")]
    rows = pd.DataFrame(keys, columns=["grain", "group_id"])
    rows["from_version"] = [before.get(key) for key in keys]
    rows["to_version"] = [after.get(key) for key in keys]
    return rows.assign(
        moved=answers_differ(rows),
        reason=UNKNOWN,
        decision=UNKNOWN,
        decided_by=UNKNOWN,
        why="the alias was moved by hand, or by a launch that was killed",
    )
