"""Which groups a challenger may answer for, and the gates before the alias moves.

Compared are twins: the recipes of both, fitted on the same fit and tune rows, judged on the same
report rows (`pipeline.spark.comparison` adds the losses up). A recipe is a group's parameters,
features and form, with those of the ancestors that have a say in its answers.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import DataError, StoreError
from pipeline.models.meta_model import Generation, GroupKey, ModelSpec
from pipeline.models.start import CrossSelection, Start
from pipeline.tables import BY_CONSTANT, BY_PARENT, records

Floats = npt.NDArray[np.float64]

# One-sided: how often a group without a real change is moved, or held back, by chance.
LEVEL = 0.025
# A group with fewer report rows, or with rows in fewer stretches of time, follows its parent.
MIN_ROWS, MIN_BLOCKS = 30, 8
# The chance that any group of a sound fleet is left to its parent or its constant.
FLEET_LEVEL = 0.05
# A smaller share of a loss than this is rounding.
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
# The loss that a gate expects beside that of a rival, or of the champion.
_NO_MORE_LOSS = "not significantly more"


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
        """What the group's own model is made by; None where it has none.

        Rounds and categories are not part of it: they follow from the rows.
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
            ancestors = key.list_ancestry(model_spec.grains)[:-1]
            parts.extend(map(self.recipe, ancestors))
        return json.dumps(parts, sort_keys=True)

    def chain(self, key: GroupKey) -> list[tuple[GroupKey, float]]:
        """The models in a group's answers, coarsest first, with their blend weights."""
        corrects = self.model_spec.corrects
        models: list[tuple[GroupKey, float]] = []
        for above in key.list_ancestry(self.model_spec.grains):
            row = self.groups.get(above)
            if row is None:
                continue
            if row.get("answered_by") == BY_CONSTANT:
                models = []
            if row["booster_id"] is None:
                continue
            weight = float(row["weight"] or 0.0)
            if weight == 1.0 and not corrects:
                models = []  # what is above has no say
            if self.model_spec.needs(weight):
                models.append((above, weight))
        return models


def is_comparable(champion: ModelSpec, challenger: ModelSpec) -> bool:
    """Whether two model specs pose the same question, so that the recipes of both can be compared."""
    return _question_of(champion) == _question_of(challenger)


def _question_of(model_spec: ModelSpec) -> tuple[Any, ...]:
    return (
        model_spec.grains,
        model_spec.task,
        model_spec.classes,
        model_spec.target,
        bool(model_spec.is_count),
    )


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
    return _compare_chains(key, champion, challenger)


def _compare_chains(key: GroupKey, champion: ComparedRun, challenger: ComparedRun) -> str:
    """Whether the models in a group's answers are the same, or made by the same recipes."""
    before = dict(champion.chain(key))
    after = dict(challenger.chain(key))
    if list(before) != list(after):
        return NEW_RECIPE
    same_boosters = all(
        champion.groups[above]["booster_id"] == challenger.groups[above]["booster_id"]
        for above in before
    )
    if same_boosters and before == after:
        return UNCHANGED
    same_recipes = all(champion.recipe(above) == challenger.recipe(above) for above in before)
    if same_recipes:
        return REFRESH
    return NEW_RECIPE


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
        rolled_back: groups that were rolled back from this challenger.

    Returns:
        The rows, coarse groups first, with promoted, reason and p_value (of the one-sided test;
        null where none was made).

    Source: ratio estimator over clusters, Cochran (1977), section 6.4, with Student's t of one
    degree of freedom less than there are stretches.
    """
    ordered = groups.sort_values(["grain", "group_id"], ignore_index=True)
    n_rows = _floats(ordered, "n_rows")
    n_blocks = _floats(ordered, "n_blocks")
    p_better = chance_of(_floats(ordered, "gain"), _floats(ordered, "gain_error"), n_blocks)
    enough = (n_rows >= MIN_ROWS) & (n_blocks >= MIN_BLOCKS) & np.isfinite(p_better)
    verdicts: dict[GroupKey, _Verdict] = {}
    keys = GroupKey.of_rows(ordered)
    for key, parent, kind, is_judged, better in zip(
        keys, ordered["parent_id"], ordered["kind"], enough, p_better, strict=True
    ):
        if key in rolled_back and kind != NEW_GROUP:
            # A new group cannot go back: nothing answered it before.
            verdict = _Verdict(ROLLED_BACK, promoted=False)
        elif kind in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE):
            verdict = _Verdict(kind, promoted=True)
        elif not is_judged and key.grain == 0:
            verdict = _Verdict(UNMEASURED, promoted=True)
        elif not is_judged:
            follows = verdicts[GroupKey(key.grain - 1, parent)]
            verdict = _Verdict(FOLLOWS, promoted=follows.promoted)
        else:
            verdict = _judge_recipe(kind, better)
        verdicts[key] = verdict
    promoted = [verdict.promoted for verdict in verdicts.values()]
    reasons = [verdict.reason for verdict in verdicts.values()]
    p_values = [verdict.p_value for verdict in verdicts.values()]
    if "answered_by" in ordered:
        for place, answered_by in enumerate(ordered["answered_by"]):
            if promoted[place] and isinstance(answered_by, str):
                reasons[place] = f"answered_by_{answered_by}"
    return ordered.assign(
        promoted=promoted, reason=reasons, p_value=pd.Series(p_values, dtype=float)
    )


def _floats(rows: pd.DataFrame, name: str) -> Floats:
    return rows[name].to_numpy(dtype=np.float64)


class _Verdict(NamedTuple):
    """Whether a group is promoted, why, and the p-value of the test that says so, if any."""

    reason: str
    promoted: bool
    p_value: float | None = None


def _judge_recipe(kind: str, p_better: float) -> _Verdict:
    """The verdict on a group that was compared.

    Args:
        kind: what it is in the challenger.
        p_better: of the test that the challenger is better.
    """
    if kind == REFRESH:
        p_worse = 1.0 - p_better
        if p_worse < LEVEL:
            return _Verdict(WORSE, promoted=False, p_value=p_worse)
        return _Verdict(NOT_WORSE, promoted=True, p_value=p_worse)
    if p_better < LEVEL:
        return _Verdict(BETTER, promoted=True, p_value=p_better)
    return _Verdict(NOT_BETTER, promoted=False, p_value=p_better)


def chance_of(gain: Floats, error: Floats, n_blocks: Floats) -> Floats:
    """Chance of a gain at least this large if there is none.

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
        return dict(zip(GroupKey.of_rows(rows), map(str, rows["to_version"]), strict=True))

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

    Fitted on newer rows, they answer better than their old models. A set is left out where it
    cannot be fitted: with the challenger's columns, or from a ledger of an earlier release.

    Args:
        decisions: as from `decide`, with from_version.
        champions: the runs that answer now, by fleet version.
        challenger: the run that is judged.
    """
    recipes = []
    for version, groups in sorted(_staying_groups(decisions).items()):
        earlier = champions[version]
        if _can_be_fitted(earlier.model_spec, challenger.model_spec):
            starts = _list_refits(earlier, groups)
            if starts is not None:
                recipes.append(EarlierRecipes(version, frozenset(groups), starts))
    return recipes


def _staying_groups(decisions: pd.DataFrame) -> dict[str, set[GroupKey]]:
    """By fleet version the groups that keep its recipes.

    The challenger's new recipe is not better for them, or they follow a parent of which that holds.
    """
    staying: dict[str, set[GroupKey]] = {}
    not_better: set[GroupKey] = set()
    for row in records(decisions.sort_values("grain")):
        if row["promoted"] or row["kind"] != NEW_RECIPE:
            continue
        follows = row["reason"] == FOLLOWS and GroupKey.parent_of(row) in not_better
        if row["reason"] == NOT_BETTER or follows:
            key = GroupKey.of(row)
            not_better.add(key)
            staying.setdefault(str(row["from_version"]), set()).add(key)
    return staying


def _can_be_fitted(earlier: ModelSpec, challenger: ModelSpec) -> bool:
    """Whether the recipes of one model spec can be fitted on the rows of another."""
    return (
        earlier.features == challenger.features
        and earlier.own == challenger.own
        and earlier.target == challenger.target
    )


def _list_refits(
    earlier: ComparedRun, groups: Collection[GroupKey]
) -> dict[GroupKey, Start] | None:
    """How the recipes of some groups, and of those above them, are fitted again.

    None where the ledger does not say enough about one of them.
    """
    starts: dict[GroupKey, Start] = {}
    for key in groups:
        for above in key.list_ancestry(earlier.model_spec.grains):
            start = _refit_of(earlier, above)
            if start is None:
                return None
            starts[above] = start
    return starts


def _refit_of(earlier: ComparedRun, key: GroupKey) -> Start | None:
    """How the recipe of a group is fitted again; None where its ledger row does not say enough."""
    row = earlier.groups.get(key)
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
    version_of: dict[GroupKey, str] = {}
    for version, groups in refits.items():
        version_of.update(dict.fromkeys(groups, version))
    rows = judgement.decisions
    versions = list(map(version_of.get, GroupKey.of_rows(rows)))
    refitted = pd.Series(versions, index=rows.index, dtype=object)
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
    all_rows = pd.Series(data=True, index=rows.index)
    chosen = all_rows
    if listed:
        chosen = rows["group_id"].isin(list(listed))
    if decision == "promote":
        touched = all_rows
        promoted = chosen | rows["from_version"].isna()
    else:
        # A group that nothing answers yet has nothing to stay with.
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
    keys = sorted(serving) or [GroupKey(0, "[]")]
    return _list_moves(keys, serving, serving).assign(reason=GATES)


def _list_moves(
    keys: Sequence[GroupKey], before: Mapping[GroupKey, str], after: Mapping[GroupKey, str]
) -> pd.DataFrame:
    """One row per group: grain, group_id, from_version and to_version."""
    rows = pd.DataFrame(keys, columns=["grain", "group_id"])
    rows["from_version"] = [before.get(key) for key in keys]
    rows["to_version"] = [after.get(key) for key in keys]
    return rows


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
    missing = set(listed).difference(group for _, group in target)
    if missing:
        raise DataError(
            f"the version to roll back to has no group {min(missing)!r}; roll back the whole "
            "fleet, or to a version that has it (rollback_to)"
        )
    keys = sorted({**target, **current})
    if listed:
        chosen = set(listed)
        keys = [key for key in keys if key[1] in chosen]
    return _list_moves(keys, current, target).assign(reason=OVERRIDE)


def losing_groups(measured: pd.DataFrame) -> dict[GroupKey, str]:
    """Which rival answers the groups whose own answers are significantly worse.

    Args:
        measured: one row per group, as from `losses.compare_answers`, with the rivals parent and
            constant.

    Returns:
        `parent` or `constant` by group, the better of the two. In a fleet in which no group is
        worse, the chance that any group is listed is `FLEET_LEVEL`.
    """
    enough = (measured["n_rows"] >= MIN_ROWS) & (measured["n_blocks"] >= MIN_BLOCKS)
    tested = measured[enough]
    level = FLEET_LEVEL / max(1, 2 * len(tested))
    is_worse = _is_worse(tested, BY_PARENT, level) | _is_worse(tested, BY_CONSTANT, level)
    losers = tested[is_worse]
    rivals = np.where(losers["loss_constant"] < losers["loss_parent"], BY_CONSTANT, BY_PARENT)
    return dict(zip(GroupKey.of_rows(losers), rivals.tolist(), strict=True))


def _is_worse(measured: pd.DataFrame, rival: str, level: float) -> "pd.Series[bool]":
    """Per row whether our loss is significantly above a rival's, and by more than rounding."""
    gain = _floats(measured, f"gain_{rival}")
    error = _floats(measured, f"gain_error_{rival}")
    n_blocks = _floats(measured, f"n_blocks_{rival}")
    is_discernible = -gain > DISCERNIBLE * _floats(measured, "loss")
    p_worse = 1.0 - chance_of(gain, error, n_blocks)
    return pd.Series(is_discernible & (p_worse < level), index=measured.index)


def judge_challenger(ledger: pd.DataFrame, groups_in_pack: Sequence[GroupKey]) -> list[Gate]:
    """Ask whether a version is fit to serve, whatever served before it.

    Args:
        ledger: the rows of its training run.
        groups_in_pack: every group that has an answer chain in it.

    Raises:
        StoreError: if the ledger has no such run.
    """
    if ledger[ledger["grain"] == 0].empty:
        raise StoreError(
            "the ledger does not know the challenger's run: registry and data root do not belong "
            "together; materialise models again"
        )
    without_chain = set(GroupKey.of_rows(ledger)).difference(groups_in_pack)
    n_failed = int((ledger["status"] == "failed").sum())
    n_models = int(ledger["booster_id"].notna().sum())
    return [
        Gate(CAN_ANSWER, not without_chain, f"{len(without_chain)} of {len(ledger)} lack one", "0"),
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
        gates.append(_judge_rival(fleet, rival, title, level=LEVEL / len(titles)))
    return gates


def _judge_rival(fleet: pd.DataFrame, rival: str, title: str, *, level: float) -> Gate:
    name = f"the fleet is not worse than {title}"
    if fleet.empty or not _has_enough_rows(fleet.iloc[0], rival):
        finding = "too few report rows to compare"
        return Gate(name, passed=True, found=finding, expected=_NO_MORE_LOSS)
    row = fleet.iloc[0]
    theirs = row[f"loss_{rival}"]
    ours = theirs - row[f"gain_{rival}"]
    finding = f"loss {ours:.6g}, {title} {theirs:.6g} on {row[f'n_rows_{rival}']:,.0f} rows"
    is_worse = bool(_is_worse(fleet, rival, level).iloc[0])
    return Gate(name, not is_worse, finding, _NO_MORE_LOSS)


def _has_enough_rows(row: "pd.Series[Any]", rival: str) -> bool:
    """Whether a rival answers enough rows, in enough stretches of time, to be compared with."""
    return bool(row[f"n_rows_{rival}"] >= MIN_ROWS and row[f"n_blocks_{rival}"] >= MIN_BLOCKS)


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
    finding = "nothing to compare"
    if whole > 0:
        finding = f"{-total / whole:+.3%} loss over {len(gains)} groups"
    return Gate("the fleet is not worse than the champion", not is_worse, finding, _NO_MORE_LOSS)


def _normal_below(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(z))


def may_serve(gates: Sequence[Gate], *, is_first: bool, decision: str) -> bool:
    """Whether a challenger serves from now on, for the groups that were promoted.

    Where nothing serves yet, the challenger does, whatever its gates say: its answers are better
    than none. A person may promote what the gates would not. Only a version that cannot answer
    never serves.

    Args:
        gates: its gates.
        is_first: whether nothing serves yet.
        decision: what the launch asks for.
    """
    failed = {gate.name for gate in gates if not gate.passed}
    if CAN_ANSWER in failed:
        return False
    return not failed or is_first or decision == "promote"


def answers_differ(decisions: pd.DataFrame) -> "pd.Series[bool]":
    """Per decision whether another fleet version answers the group."""
    return decisions["from_version"].fillna("") != decisions["to_version"].fillna("")


def number_before(moves: pd.DataFrame, number: str) -> str | None:
    """The registered version that served before another; None where no decision says.

    Args:
        moves: one row per launch that decided, oldest first: champion_before and champion_after.
        number: of the version that serves.
    """
    earlier = moves[moves["champion_after"] == number]
    earlier = earlier[earlier["champion_before"].notna() & (earlier["champion_before"] != number)]
    if earlier.empty:
        return None
    return str(earlier["champion_before"].iloc[-1])


def found_elsewhere(before: Mapping[GroupKey, str], after: Mapping[GroupKey, str]) -> pd.DataFrame:
    """Decisions that record an alias found where no recorded launch moved it.

    Args:
        before: fleet version by group, as the last recorded decision left them; empty where that is
            unknown.
        after: the same of the version that was found to serve.
    """
    # The move itself is recorded even where a version cannot be opened.
    keys = sorted({**before, **after}) or [GroupKey(0, "[]")]
    rows = _list_moves(keys, before, after)
    return rows.assign(
        moved=answers_differ(rows),
        reason=UNKNOWN,
        decision=UNKNOWN,
        decided_by=UNKNOWN,
        why="the alias was moved by hand, or by a launch that was killed",
    )
