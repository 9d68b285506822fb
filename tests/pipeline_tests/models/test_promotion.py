from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.models.meta_model import Generation, GroupKey, ModelSpec, ModelTarget
from pipeline.models.promotion import (
    NEW_GROUP,
    NEW_RECIPE,
    NOT_COMPARABLE,
    REFRESH,
    UNCHANGED,
    ComparedRun,
    Judgement,
    decide,
    earlier_recipes,
    groups_rolled_back,
    judge_answers,
    judge_challenger,
    judge_rivals,
    kind_of_change,
    losing_groups,
    override_decisions,
    rolled_back,
    with_refits,
)
from pipeline.models.start import Start

GROUPS = [(0, "[]"), *((1, f'["{number}"]') for number in range(9))]


def failed_gates(groups: list[tuple[int, str]] | None = None, **columns: Any) -> list[str]:
    ledger = pd.DataFrame(GROUPS, columns=["grain", "group_id"])
    defaults = {"status": "trained", "booster_id": "x"}
    gates = judge_challenger(
        ledger.assign(**{**defaults, **columns}), GROUPS if groups is None else groups
    )
    assert all(gate.found and gate.expected for gate in gates)
    return [gate.name for gate in gates if not gate.passed]


def test_a_sound_version_passes_every_gate() -> None:
    assert failed_gates() == []


def test_every_group_needs_an_answer_chain() -> None:
    assert failed_gates(GROUPS[:-1]) == ["every group has an answer chain"]
    assert failed_gates([*GROUPS, (1, '["further"]')]) == []


def test_some_group_must_have_a_model() -> None:
    assert failed_gates(booster_id=None) == ["some group has a model"]
    assert failed_gates(booster_id=[None] * 9 + ["x"]) == []


@pytest.mark.parametrize(("n_failed", "passes"), [(0, True), (1, True), (2, False), (10, False)])
def test_at_most_one_group_in_ten_may_fail(n_failed: int, passes: bool) -> None:
    status = ["failed"] * n_failed + ["trained"] * (10 - n_failed)
    assert failed_gates(status=status) == ([] if passes else ["few groups failed"])


# Group by group


MODEL_SPEC = ModelSpec(
    fleet="shop",
    grains=((), ("k",)),
    features=("x",),
    categories={},
    required=("k", "x"),
    optional=(),
    task="regression",
    own="independent",
    is_count=False,
    classes=(),
    prior=(),
    target=ModelTarget("y", "none", None, None),
    interval=0.8,
    intervals=(0.8,),
)


def side(
    version: str, boosters: Mapping[str, tuple[str, str, float]], **changes: Any
) -> ComparedRun:
    """A run of two grains: per group id its booster, parameters and weight."""
    spec = replace(MODEL_SPEC, **changes)
    rows: dict[GroupKey, dict[str, Any]] = {
        GroupKey(0 if group == "[]" else 1, group): {
            "booster_id": booster,
            "parameters": parameters,
            "weight": weight,
        }
        for group, (booster, parameters, weight) in boosters.items()
    }
    return ComparedRun(Generation(spec, version, constant=0.0, constant_without_offset=0.0), rows)


A, B = '["a"]', '["b"]'
OLD = side(
    "old",
    {
        "[]": ("p1", '{"leaves": 3}', 1.0),
        A: ("a1", '{"leaves": 7}', 0.5),
        B: ("b1", '{"leaves": 7}', 1.0),
    },
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (UNCHANGED, UNCHANGED, UNCHANGED)),
        ({A: ("a2", '{"leaves": 7}', 0.5)}, (UNCHANGED, REFRESH, UNCHANGED)),
        ({A: ("a1", '{"leaves": 7}', 0.6)}, (UNCHANGED, REFRESH, UNCHANGED)),
        ({A: ("a2", '{"leaves": 9}', 0.5)}, (UNCHANGED, NEW_RECIPE, UNCHANGED)),
        # The pooled model has a say in the answers of a, none in those of b.
        ({"[]": ("p2", '{"leaves": 3}', 1.0)}, (REFRESH, REFRESH, UNCHANGED)),
        ({"[]": ("p2", '{"leaves": 4}', 1.0)}, (NEW_RECIPE, NEW_RECIPE, UNCHANGED)),
        ({B: ("b2", '{"leaves": 7}', 0.9)}, (UNCHANGED, UNCHANGED, NEW_RECIPE)),
        ({A: (None, None, 0.0)}, (UNCHANGED, NEW_RECIPE, UNCHANGED)),
    ],
)
def test_a_change_is_told_by_what_has_a_say_in_the_answers(
    changes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    boosters = {
        group: (row["booster_id"], row["parameters"], row["weight"])
        for (_, group), row in OLD.groups.items()
    }
    new = side("new", {**boosters, **changes})
    assert tuple(kind_of_change(key, OLD, new) for key in OLD.groups) == expected


def test_runs_that_answer_another_question_are_not_compared() -> None:
    boosters = {"[]": ("p1", '{"leaves": 3}', 1.0)}
    assert (
        kind_of_change(
            GroupKey(0, "[]"),
            OLD,
            side("new", boosters, target=replace(MODEL_SPEC.target, column="z")),
        )
        == NOT_COMPARABLE
    )
    assert (
        kind_of_change(GroupKey(0, "[]"), side("old", {}), side("new", boosters)) == NOT_COMPARABLE
    )
    assert kind_of_change(GroupKey(0, "[]"), None, side("new", boosters)) == NEW_GROUP
    assert (
        kind_of_change(
            GroupKey(0, "[]"),
            OLD,
            side("new", {"[]": ("p2", '{"leaves": 3}', 1.0)}, features=("x", "z")),
        )
        == NEW_RECIPE
    )


def test_a_correction_is_of_another_recipe_when_its_parent_is() -> None:
    boosters = {"[]": ("p1", '{"leaves": 3}', 1.0), A: ("a1", '{"leaves": 7}', 1.0)}
    before = side("old", boosters, own="correction")
    after = side("new", {**boosters, "[]": ("p2", '{"leaves": 4}', 1.0)}, own="correction")
    assert kind_of_change(GroupKey(1, A), before, after) == NEW_RECIPE
    assert (
        kind_of_change(
            GroupKey(1, A),
            side("old", boosters),
            side("new", {**boosters, "[]": ("p2", '{"leaves": 4}', 1.0)}),
        )
        == UNCHANGED
    )


def compared(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Groups with kind, rows, blocks, gain and its error; of one grain below the pooled group, whose row is the first."""
    columns = ["kind", "n_rows", "n_blocks", "gain", "gain_error"]
    frame = pd.DataFrame(rows, columns=columns)
    groups = [(0, "[]", None), *((1, f'["{number}"]', "[]") for number in range(1, len(rows)))]
    return frame.assign(
        **dict(zip(("grain", "group_id", "parent_id"), zip(*groups, strict=True), strict=True))
    )


POOLED_STAYS = (NEW_RECIPE, 900, 20, 0.0, 1.0)
POOLED_GOES = (NEW_RECIPE, 900, 20, 5.0, 1.0)


@pytest.mark.parametrize(
    ("row", "promoted", "reason"),
    [
        ((REFRESH, 900, 20, -1.0, 1.0), True, "not_worse"),
        ((REFRESH, 900, 20, -3.0, 1.0), False, "worse"),
        ((NEW_RECIPE, 900, 20, 1.0, 1.0), False, "not_better"),
        ((NEW_RECIPE, 900, 20, 3.0, 1.0), True, "better"),
        ((NEW_RECIPE, 900, 20, 0.0, 0.0), False, "not_better"),
        ((REFRESH, 900, 20, 0.0, 0.0), True, "not_worse"),
        # With few stretches of time the same t says less.
        ((NEW_RECIPE, 900, 8, 2.2, 1.0), False, "not_better"),
        ((NEW_RECIPE, 900, 24, 2.2, 1.0), True, "better"),
        ((UNCHANGED, 900, 20, -9.0, 1.0), True, "unchanged"),
        ((NEW_GROUP, None, None, None, None), True, "new_group"),
        ((NOT_COMPARABLE, None, None, None, None), True, "not_comparable"),
    ],
)
def test_refreshes_go_unless_worse_and_new_recipes_only_if_better(
    row: tuple[Any, ...], promoted: bool, reason: str
) -> None:
    decided = decide(compared(POOLED_STAYS, row))
    assert tuple(decided.loc[1, ["promoted", "reason"]]) == (promoted, reason)


@pytest.mark.parametrize("kind", [REFRESH, NEW_RECIPE])
@pytest.mark.parametrize(("pooled", "goes"), [(POOLED_GOES, True), (POOLED_STAYS, False)])
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(29, 20), (900, 7), (None, None)])
def test_a_group_with_few_report_rows_follows_its_parent(
    kind: str, pooled: tuple[Any, ...], goes: bool, n_rows: Any, n_blocks: Any
) -> None:
    decided = decide(compared(pooled, (kind, n_rows, n_blocks, 99.0, 1.0)))
    assert tuple(decided.loc[1, ["promoted", "reason"]]) == (goes, "follows_parent")
    assert pd.isna(decided.loc[1, "p_value"])


def test_a_fleet_without_report_rows_takes_the_newest() -> None:
    decided = decide(
        compared((NEW_RECIPE, None, None, None, None), (NEW_RECIPE, None, None, None, None))
    )
    assert decided["promoted"].all()
    assert decided["reason"].tolist() == ["unmeasured", "follows_parent"]


def test_a_group_that_was_taken_back_waits_for_another_challenger() -> None:
    moves = pd.DataFrame(
        [
            ("rollback", True, "new", 1, '["1"]'),
            ("rollback", True, "older", 1, '["2"]'),
            ("judge", True, "new", 1, '["3"]'),
        ],
        columns=["decision", "moved", "from_version", "grain", "group_id"],
    )
    held = groups_rolled_back(moves, "new")
    assert held == {(1, '["1"]')}
    better = (NEW_RECIPE, 900, 20, 5.0, 1.0)
    decided = decide(compared(POOLED_GOES, better, better), held)
    assert decided["reason"].tolist() == ["better", "rolled_back", "better"]
    assert decided["promoted"].tolist() == [True, False, True]
    # Where the version that was rolled back to has no such group, there is nothing to wait with.
    decided = decide(compared(POOLED_GOES, (NEW_GROUP, np.nan, np.nan, np.nan, np.nan)), held)
    assert decided["reason"].tolist() == ["better", "new_group"]


@pytest.mark.parametrize(("n_blocks", "most"), [(8, 0.06), (24, 0.05)])
def test_without_a_change_few_groups_are_moved(n_blocks: int, most: float) -> None:
    random = np.random.default_rng(5)
    blocks = random.normal(size=(4000, n_blocks))
    gain, error = blocks.mean(axis=1), blocks.std(axis=1, ddof=1) / np.sqrt(n_blocks)
    decided = decide(
        compared(
            POOLED_STAYS,
            *((NEW_RECIPE, 900, n_blocks, one, two) for one, two in zip(gain, error, strict=True)),
        )
    )
    assert 0.015 < decided["promoted"].mean() < most / 1.5


def answered(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Decisions of finest groups: promoted, losses of champion and challenger."""
    names = ["promoted", "loss_sum_champion", "loss_sum_challenger"]
    return pd.DataFrame(rows, columns=names).assign(grain=1)


def test_a_fleet_that_is_worse_than_the_champion_is_told() -> None:
    worse = [(True, 10.0, 11.0 + 0.01 * number) for number in range(20)]
    assert not judge_answers(answered(*worse)).passed
    assert judge_answers(answered(*((False, *row[1:]) for row in worse))).passed
    even = [(True, 10.0, 10.0 + (-1) ** number) for number in range(20)]
    assert judge_answers(answered(*even)).passed
    assert judge_answers(answered((True, np.nan, 10.0))).passed


def beside(
    *rows: tuple[str, float, float, float, float],
    n_rows: int = 100,
    n_blocks: int = 20,
    loss: float = 10.0,
) -> pd.DataFrame:
    """Groups beside their parent and the constant: id, gain over the parent (its loss less ours) and error, gain over the constant and error."""
    names = ["group_id", "gain_parent", "gain_error_parent", "gain_constant", "gain_error_constant"]
    frame = pd.DataFrame(rows, columns=names).assign(
        grain=1, n_rows=n_rows, n_blocks=n_blocks, loss=loss
    )
    for rival in ("parent", "constant"):
        frame[f"n_rows_{rival}"], frame[f"n_blocks_{rival}"] = n_rows, n_blocks
        frame[f"loss_{rival}"] = loss + frame[f"gain_{rival}"]
    return frame


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((1.0, 0.1, 2.0, 0.1), None),
        ((-1.0, 0.1, 2.0, 0.1), "parent"),
        ((-1.0, 0.1, -2.0, 0.1), "constant"),
        ((-2.0, 0.1, -1.0, 0.1), "parent"),
        # The constant is better for sure, and the parent better still.
        ((-2.0, 2.0, -1.0, 0.1), "parent"),
        ((1.0, 0.1, -1.0, 0.1), "constant"),
        # Two standard errors are noise among so many groups.
        ((-0.2, 0.1, -0.2, 0.1), None),
        # So is the last digit of a sum, however steady.
        ((-1e-13, 1e-16, -1e-13, 1e-16), None),
    ],
)
def test_a_group_that_loses_for_sure_is_left_to_who_answers_it_best(
    gains: tuple[float, ...], expected: str | None
) -> None:
    sound = [(f'["{number}"]', 1.0, 0.1, 2.0, 0.1) for number in range(20)]
    found = losing_groups(beside(*sound, (A, *gains)))
    assert found == ({} if expected is None else {(1, A): expected})


@pytest.mark.parametrize(("n_rows", "n_blocks"), [(29, 20), (100, 7)])
def test_a_group_with_few_report_rows_loses_to_nobody(n_rows: int, n_blocks: int) -> None:
    assert losing_groups(beside((A, -9.0, 0.1, -9.0, 0.1), n_rows=n_rows, n_blocks=n_blocks)) == {}


@pytest.mark.parametrize(
    ("gain", "error", "n_rows", "passes"),
    [
        (-2.5, 0.5, 100, False),
        (2.5, 0.5, 100, True),
        (-0.5, 0.5, 100, True),
        (0.0, 0.0, 100, True),
        (-2.5, 0.5, 29, True),
    ],
)
def test_only_a_fleet_that_is_worse_than_a_rival_for_sure_fails_its_gate(
    gain: float, error: float, n_rows: int, passes: bool
) -> None:
    fleet = beside(("[]", gain, error, 1.0, 0.1), n_rows=n_rows)
    gates = judge_rivals(fleet, {"parent": "its pooled model", "constant": "its constant"})
    assert [gate.name for gate in gates] == [
        "the fleet is not worse than its pooled model",
        "the fleet is not worse than its constant",
    ]
    assert [gate.passed for gate in gates] == [passes, True]
    assert gates[0].found == (
        "too few report rows to compare"
        if n_rows < 30
        else f"loss 10, its pooled model {10 + gain:g} on 100 rows"
    )


def test_without_report_rows_no_rival_is_better() -> None:
    (gate,) = judge_rivals(pd.DataFrame(), {"constant": "its constant"})
    assert (gate.passed, gate.found) == (True, "too few report rows to compare")


def test_a_group_that_another_answers_says_so_where_it_is_promoted() -> None:
    rows = compared(
        POOLED_GOES,
        (NEW_RECIPE, 900, 20, 5.0, 1.0),
        (NEW_RECIPE, 900, 20, 0.0, 1.0),
        (NEW_GROUP, None, None, None, None),
    )
    decided = decide(rows.assign(answered_by=[None, "parent", "constant", "constant"]))
    assert decided["reason"].tolist() == [
        "better",
        "answered_by_parent",
        "not_better",
        "answered_by_constant",
    ]


def test_a_group_that_the_constant_answers_leans_on_nobody() -> None:
    boosters = {
        group: (row["booster_id"], row["parameters"], row["weight"])
        for (_, group), row in OLD.groups.items()
    }
    new = side(
        "new", {**boosters, "[]": ("p2", '{"leaves": 9}', 1.0), A: ("a2", '{"leaves": 9}', 0.0)}
    )
    new.groups[1, A]["answered_by"] = "constant"
    assert new.chain(GroupKey(1, A)) == []
    before = side("old", boosters)
    before.groups[1, A].update(weight=0.0, answered_by="constant")
    # Its pooled model and its own are others now; neither has a say.
    assert kind_of_change(GroupKey(1, A), before, new) == UNCHANGED
    assert kind_of_change(GroupKey(1, A), OLD, new) == NEW_RECIPE


# What a person decides


def judgement() -> Judgement:
    decided = decide(
        compared(
            POOLED_GOES,
            (NEW_RECIPE, 900, 20, 3.0, 1.0),
            (NEW_RECIPE, 900, 20, 0.0, 1.0),
            (NEW_GROUP, None, None, None, None),
        )
    )
    decided = decided.assign(
        from_version=["old", "old", "old", None], loss_sum_champion=1.0, loss_sum_challenger=1.0
    )
    return Judgement(
        decided.assign(to_version=decided["from_version"].where(~decided["promoted"], "new"))
    )


@pytest.mark.parametrize(
    ("decision", "listed", "expected"),
    [
        ("judge", [], ["new", "new", "old", "new"]),
        ("promote", [], ["new", "new", "new", "new"]),
        ("promote", ['["2"]'], ["old", "old", "new", "new"]),
        ("keep", [], ["old", "old", "old", "new"]),
        ("keep", ['["1"]'], ["new", "old", "old", "new"]),
    ],
)
def test_a_person_overrides_the_tests(
    decision: str, listed: list[str], expected: list[str]
) -> None:
    found = override_decisions(judgement(), decision, listed, "new")
    assert found.decisions["to_version"].tolist() == expected
    assert found.is_whole == (set(expected) == {"new"})


def test_a_rollback_says_from_what_to_what() -> None:
    current, target = (
        {(0, "[]"): "new", (1, A): "new", (1, B): "old"},
        {(0, "[]"): "old", (1, A): "old"},
    )
    whole = rolled_back(current, target, [])
    assert whole[["group_id", "from_version", "to_version"]].to_numpy(dtype=object).tolist() == [
        ["[]", "new", "old"],
        [A, "new", "old"],
        [B, "old", None],
    ]
    assert rolled_back(current, target, [A])["group_id"].tolist() == [A]
    with pytest.raises(DataError, match=r"no group '\[\"b\"\]'"):
        rolled_back(current, target, [B])


# Earlier recipes

CROSS = '{"earlier": null, "later": null, "middle": "2024-01-01"}'


def refittable(found: ComparedRun) -> ComparedRun:
    """The same run, whose ledger says enough for its recipes to be fitted again."""
    rows = {
        key: {**row, "n_rounds": 5, "cross_selection": CROSS} for key, row in found.groups.items()
    }
    return ComparedRun(found.generation, rows)


def decided_of(*rows: tuple[int, str, str, bool, str]) -> pd.DataFrame:
    decisions = pd.DataFrame(rows, columns=["grain", "group_id", "kind", "promoted", "reason"])
    return decisions.assign(
        parent_id=["[]" if grain else None for grain in decisions["grain"]],
        from_version="old",
        to_version="old",
    )


NEW = side(
    "new",
    {
        "[]": ("p2", '{"leaves": 4}', 1.0),
        A: ("a2", '{"leaves": 8}', 0.5),
        B: ("b2", '{"leaves": 8}', 1.0),
    },
)
BEATEN = decided_of(
    (0, "[]", NEW_RECIPE, True, "better"),
    (1, A, NEW_RECIPE, False, "not_better"),
    (1, B, NEW_RECIPE, True, "better"),
)


def test_a_recipe_that_was_not_beaten_is_fitted_with_those_above_it() -> None:
    (found,) = earlier_recipes(BEATEN, {"old": refittable(OLD)}, NEW)
    assert (found.fleet_version, found.groups) == ("old", {(1, A)})
    assert {key: (start.refit, start.n_rounds) for key, start in found.starts.items()} == {
        (0, "[]"): ({"leaves": 3}, 5),
        (1, A): ({"leaves": 7}, 5),
    }


@pytest.mark.parametrize(
    ("pooled", "stays"),
    [
        ((NEW_RECIPE, False, "not_better"), {(0, "[]"), (1, A)}),
        # A refresh that is worse stays with its old model, and so does who follows it.
        ((REFRESH, False, "worse"), set()),
        ((NEW_RECIPE, False, "override"), set()),
        ((NEW_RECIPE, False, "rolled_back"), set()),
    ],
)
def test_who_follows_a_recipe_that_was_not_beaten_stays_with_it(
    pooled: tuple[str, bool, str], stays: set[tuple[int, str]]
) -> None:
    decisions = decided_of((0, "[]", *pooled), (1, A, NEW_RECIPE, False, "follows_parent"))
    found = earlier_recipes(decisions, {"old": refittable(OLD)}, NEW)
    assert {key for recipes in found for key in recipes.groups} == stays


def test_a_group_without_an_own_recipe_is_left_to_those_above_it() -> None:
    without = side("old", {"[]": ("p1", '{"leaves": 3}', 1.0), A: (None, "", 0.0)})  # type: ignore[dict-item]
    (found,) = earlier_recipes(BEATEN, {"old": refittable(without)}, NEW)
    assert found.starts[1, A] == Start(judge=True)


@pytest.mark.parametrize(
    "champion",
    [OLD, refittable(side("old", {"[]": ("p1", '{"leaves": 3}', 1.0)}, features=("x", "z")))],
)
def test_a_recipe_that_cannot_be_fitted_any_more_is_left_out(champion: ComparedRun) -> None:
    """A ledger of an earlier release does not say how to predict tune rows; a column may be described no more."""
    rows = {
        key: {"cross_selection": None, "n_rounds": 5, **row} for key, row in champion.groups.items()
    }
    assert earlier_recipes(BEATEN, {"old": ComparedRun(champion.generation, rows)}, NEW) == []


def test_what_was_fitted_answers_its_groups() -> None:
    judged = Judgement(BEATEN.assign(to_version=["new", "old", "new"]))
    found = with_refits(judged, {"fitted": {(1, A)}})
    assert found.decisions["to_version"].tolist() == ["new", "fitted", "new"]
    assert found.decisions["reason"].tolist() == ["better", "earlier_recipe_refitted", "better"]
    assert found.changes_answers
    nothing = Judgement(
        decided_of((0, "[]", UNCHANGED, True, "unchanged"), (1, A, NEW_RECIPE, False, "not_better"))
    )
    assert not nothing.changes_answers
    assert with_refits(nothing, {"fitted": {(1, A)}}).changes_answers
