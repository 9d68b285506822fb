import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.models.promotion import (
    NEW_GROUP,
    NEW_RECIPE,
    NOT_COMPARABLE,
    REFRESH,
    UNCHANGED,
    Judgement,
    Side,
    decide,
    judge_answers,
    judge_challenger,
    kind_of_change,
    overridden,
    rolled_back,
    taken_back,
)

GROUPS = [(0, "[]"), *((1, f'["{number}"]') for number in range(9))]


def failed_gates(groups: list[tuple[int, str]] | None = None, **columns: Any) -> list[str]:
    ledger = pd.DataFrame(GROUPS, columns=["grain", "group_id"])
    defaults = {"report_blend": 1.0, "report_constant": 2.0, "status": "trained", "booster_id": "x"}
    gates = judge_challenger(ledger.assign(**{**defaults, **columns}), GROUPS if groups is None else groups)
    assert all(gate.found and gate.expected for gate in gates)
    return [gate.name for gate in gates if not gate.passed]


def test_a_sound_version_passes_every_gate() -> None:
    assert failed_gates() == []


def test_every_group_needs_an_answer_chain() -> None:
    assert failed_gates(GROUPS[:-1]) == ["every group has an answer chain"]
    assert failed_gates([*GROUPS, (1, '["further"]')]) == []


@pytest.mark.parametrize(("blend", "passes"), [(2.0, True), (2.1, False), (np.inf, False), (np.nan, True)])
def test_the_fleet_must_not_be_worse_than_its_constant(blend: float, passes: bool) -> None:
    assert failed_gates(report_blend=blend) == ([] if passes else ["the fleet beats its constant"])


@pytest.mark.parametrize("measure", ["pinball", "deviance"])
@pytest.mark.parametrize(("blend", "passes"), [(1.0, True), (1.1, False)])
def test_quantiles_and_counts_are_judged_by_their_own_loss(measure: str, blend: float, passes: bool) -> None:
    metrics = json.dumps({"fleet": {"rmse": 9.0, measure: blend}, "constant": {"rmse": 2.0, measure: 1.0}})
    assert failed_gates(report_blend=9.0, metrics=metrics) == ([] if passes else ["the fleet beats its constant"])


def test_other_measures_do_not_judge() -> None:
    metrics = json.dumps({"fleet": {"rmse": 9.0, "log_loss": 9.0}, "constant": {"rmse": 2.0, "log_loss": 1.0}})
    assert failed_gates(metrics=metrics) == []


def test_only_the_whole_fleet_is_compared_with_its_constant() -> None:
    assert failed_gates(report_blend=[1.0] + [5.0] * 9) == []


def test_some_group_must_have_a_model() -> None:
    assert failed_gates(booster_id=None) == ["some group has a model"]
    assert failed_gates(booster_id=[None] * 9 + ["x"]) == []


@pytest.mark.parametrize(("n_failed", "passes"), [(0, True), (1, True), (2, False), (10, False)])
def test_at_most_one_group_in_ten_may_fail(n_failed: int, passes: bool) -> None:
    status = ["failed"] * n_failed + ["trained"] * (10 - n_failed)
    assert failed_gates(status=status) == ([] if passes else ["few groups failed"])


# Group by group


def side(version: str, boosters: Mapping[str, tuple[str, str, float]], **spec: Any) -> Side:
    """A run of two grains: per group id its booster, parameters and weight."""
    model = {"grains": [[], ["k"]], "features": ["x"], "categories": {}, "own": "independent", "target": {"column": "y"}}
    model |= {"task": "regression", "classes": [], "is_count": False, "fleet_version": version, **spec}
    rows = {
        (0 if group == "[]" else 1, group): {"booster_id": booster, "parameters": parameters, "weight": weight}
        for group, (booster, parameters, weight) in boosters.items()
    }
    return Side(version, model, rows)


A, B = '["a"]', '["b"]'
OLD = side("old", {"[]": ("p1", '{"leaves": 3}', 1.0), A: ("a1", '{"leaves": 7}', 0.5), B: ("b1", '{"leaves": 7}', 1.0)})


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
def test_a_change_is_told_by_what_has_a_say_in_the_answers(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    boosters = {group: (row["booster_id"], row["parameters"], row["weight"]) for (_, group), row in OLD.groups.items()}
    new = side("new", {**boosters, **changes})
    assert tuple(kind_of_change(key, OLD, new) for key in OLD.groups) == expected


def test_runs_that_answer_another_question_are_not_compared() -> None:
    boosters = {"[]": ("p1", '{"leaves": 3}', 1.0)}
    assert kind_of_change((0, "[]"), OLD, side("new", boosters, target={"column": "z"})) == NOT_COMPARABLE
    assert kind_of_change((0, "[]"), side("old", {}), side("new", boosters)) == NOT_COMPARABLE
    assert kind_of_change((0, "[]"), None, side("new", boosters)) == NEW_GROUP
    assert kind_of_change((0, "[]"), OLD, side("new", {"[]": ("p2", '{"leaves": 3}', 1.0)}, features=["x", "z"])) == NEW_RECIPE


def test_a_correction_is_of_another_recipe_when_its_parent_is() -> None:
    boosters = {"[]": ("p1", '{"leaves": 3}', 1.0), A: ("a1", '{"leaves": 7}', 1.0)}
    before = side("old", boosters, own="correction")
    after = side("new", {**boosters, "[]": ("p2", '{"leaves": 4}', 1.0)}, own="correction")
    assert kind_of_change((1, A), before, after) == NEW_RECIPE
    assert kind_of_change((1, A), side("old", boosters), side("new", {**boosters, "[]": ("p2", '{"leaves": 4}', 1.0)})) == UNCHANGED


def compared(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Groups with kind, rows, blocks, gain and its error; of one grain below the pooled group, whose row is the first."""
    columns = ["kind", "n_rows", "n_blocks", "gain", "gain_error"]
    frame = pd.DataFrame(rows, columns=columns)
    groups = [(0, "[]", None), *((1, f'["{number}"]', "[]") for number in range(1, len(rows)))]
    return frame.assign(**dict(zip(("grain", "group_id", "parent_id"), zip(*groups, strict=True), strict=True)))


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
def test_refreshes_go_unless_worse_and_new_recipes_only_if_better(row: tuple[Any, ...], promoted: bool, reason: str) -> None:
    decided = decide(compared(POOLED_STAYS, row))
    assert tuple(decided.loc[1, ["promoted", "reason"]]) == (promoted, reason)


@pytest.mark.parametrize("kind", [REFRESH, NEW_RECIPE])
@pytest.mark.parametrize(("pooled", "goes"), [(POOLED_GOES, True), (POOLED_STAYS, False)])
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(29, 20), (900, 7), (None, None)])
def test_a_group_with_few_report_rows_follows_its_parent(kind: str, pooled: tuple[Any, ...], goes: bool, n_rows: Any, n_blocks: Any) -> None:
    decided = decide(compared(pooled, (kind, n_rows, n_blocks, 99.0, 1.0)))
    assert tuple(decided.loc[1, ["promoted", "reason"]]) == (goes, "follows_parent")
    assert pd.isna(decided.loc[1, "p_value"])


def test_a_fleet_without_report_rows_takes_the_newest() -> None:
    decided = decide(compared((NEW_RECIPE, None, None, None, None), (NEW_RECIPE, None, None, None, None)))
    assert decided["promoted"].all()
    assert decided["reason"].tolist() == ["unmeasured", "follows_parent"]


def test_a_group_that_was_taken_back_waits_for_another_challenger() -> None:
    moves = pd.DataFrame(
        [("rollback", True, "new", 1, '["1"]'), ("rollback", True, "older", 1, '["2"]'), ("judge", True, "new", 1, '["3"]')],
        columns=["decision", "moved", "from_version", "grain", "group_id"],
    )
    held = taken_back(moves, "new")
    assert held == {(1, '["1"]')}
    better = (NEW_RECIPE, 900, 20, 5.0, 1.0)
    decided = decide(compared(POOLED_GOES, better, better), held)
    assert decided["reason"].tolist() == ["better", "rolled_back", "better"]
    assert decided["promoted"].tolist() == [True, False, True]


@pytest.mark.parametrize(("n_blocks", "most"), [(8, 0.06), (24, 0.05)])
def test_without_a_change_few_groups_are_moved(n_blocks: int, most: float) -> None:
    random = np.random.default_rng(5)
    blocks = random.normal(size=(4000, n_blocks))
    gain, error = blocks.mean(axis=1), blocks.std(axis=1, ddof=1) / np.sqrt(n_blocks)
    decided = decide(compared(POOLED_STAYS, *((NEW_RECIPE, 900, n_blocks, one, two) for one, two in zip(gain, error, strict=True))))
    assert 0.015 < decided["promoted"].mean() < most / 1.5


def answered(*rows: tuple[Any, ...]) -> pd.DataFrame:
    """Decisions of finest groups: promoted, losses of champion and challenger, gain over the constant and its error."""
    names = ["promoted", "loss_sum_champion", "loss_sum_challenger", "constant_gain", "constant_error"]
    return pd.DataFrame(rows, columns=names).assign(grain=1, n_rows=100, n_blocks=20, group_id=[f'["{number}"]' for number in range(len(rows))])


def test_a_fleet_that_is_worse_than_the_champion_is_told() -> None:
    worse = [(True, 10.0, 11.0 + 0.01 * number, 1.0, 0.1) for number in range(20)]
    assert [gate.passed for gate in judge_answers(answered(*worse))] == [False, True]
    stays = [(False, *row[1:]) for row in worse]
    assert [gate.passed for gate in judge_answers(answered(*stays))] == [True, True]
    even = [(True, 10.0, 10.0 + (-1) ** number, 1.0, 0.1) for number in range(20)]
    assert [gate.passed for gate in judge_answers(answered(*even))] == [True, True]
    assert [gate.passed for gate in judge_answers(answered((True, np.nan, 10.0, 1.0, 0.1)))] == [True, True]


def test_a_group_that_is_worse_than_its_constant_is_told() -> None:
    sound = [(True, 10.0, 9.0, 1.0, 0.1)] * 20
    (_, gate) = judge_answers(answered(*sound, (True, 10.0, 9.0, -1.0, 0.1)))
    assert (gate.passed, gate.found) == (False, '1 of 21: ["20"]')
    (_, gate) = judge_answers(answered(*sound, (False, 10.0, 9.0, -1.0, 0.1)))
    assert gate.passed
    # Among twenty sound groups one is by chance two standard errors off.
    (_, gate) = judge_answers(answered(*sound, (True, 10.0, 9.0, -0.2, 0.1)))
    assert gate.passed


# What a person decides


def judgement() -> Judgement:
    decided = decide(compared(POOLED_GOES, (NEW_RECIPE, 900, 20, 3.0, 1.0), (NEW_RECIPE, 900, 20, 0.0, 1.0), (NEW_GROUP, None, None, None, None)))
    decided = decided.assign(from_version=["old", "old", "old", None], loss_sum_champion=1.0, loss_sum_challenger=1.0)
    decided = decided.assign(constant_gain=1.0, constant_error=0.1)
    return Judgement(decided.assign(to_version=decided["from_version"].where(~decided["promoted"], "new")))


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
def test_a_person_overrides_the_tests(decision: str, listed: list[str], expected: list[str]) -> None:
    found = overridden(judgement(), decision, listed, "new")
    assert found.decisions["to_version"].tolist() == expected
    assert found.is_whole == (set(expected) == {"new"})


def test_a_rollback_says_from_what_to_what() -> None:
    current, target = {(0, "[]"): "new", (1, A): "new", (1, B): "old"}, {(0, "[]"): "old", (1, A): "old"}
    whole = rolled_back(current, target, [])
    assert whole[["group_id", "from_version", "to_version"]].to_numpy(dtype=object).tolist() == [
        ["[]", "new", "old"],
        [A, "new", "old"],
        [B, "old", None],
    ]
    assert rolled_back(current, target, [A])["group_id"].tolist() == [A]
    with pytest.raises(DataError, match=r"no group '\[\"b\"\]'"):
        rolled_back(current, target, [B])
