import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.models.promotion import judge_challenger

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
