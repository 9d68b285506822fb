from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.blend import (
    WEIGHTS,
    Gains,
    GroupSkill,
    Moments,
    choose_weight,
    describe_groups,
)
from pipeline.training.splits import REPORT, TUNE

CONSTANT = 2.0
GRAINS = 3
N_STRETCHES = 4


def gains_of(
    target: Any, own: Any, parent: Any, groups: Any, stretches: Any, prior: float = 0.0
) -> Gains:
    """What the weights gain in squared error."""
    losses = [(target - weight * own - (1 - weight) * parent) ** 2 for weight in WEIGHTS]
    return Gains.of_rows(np.stack(losses, axis=1), groups, stretches, prior)


class Series:
    """Rows of a grain: its own and the parent's predictions of a target of unit variance."""

    def __init__(self, n: int = 2000, n_groups: int = 20, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.groups = self.rng.integers(0, n_groups, n)
        self.stretches = np.arange(n) * N_STRETCHES // n
        self.target = self.rng.normal(size=n)
        self.parent = self.target + self.rng.normal(size=n)
        self.own = self.target + self.rng.normal(size=n)

    def weight(self, prior: float = 0.0) -> float:
        rows = (self.target, self.own, self.parent, self.groups, self.stretches)
        return choose_weight(gains_of(*rows, prior=prior), prior)

    def noise(self, scale: float) -> Any:
        return scale * self.rng.normal(size=len(self.target))


def test_a_better_own_model_answers_alone() -> None:
    rows = Series()
    rows.own = rows.target + rows.noise(0.1)
    assert rows.weight() == 1.0


def test_a_useless_own_model_has_no_say() -> None:
    rows = Series()
    rows.own = rows.noise(1.0)
    rows.parent = rows.target + rows.noise(0.3)
    assert rows.weight() == 0.0


def test_equally_good_models_share() -> None:
    assert 0.3 <= Series().weight() <= 0.5


def test_noise_alone_moves_few_weights_from_their_prior() -> None:
    weights = []
    for seed in range(40):
        rows = Series(400, 10, seed)
        rows.parent = np.zeros(400)
        rows.own = rows.noise(0.3)
        weights.append(rows.weight())
    assert np.mean(weights) < 0.02


def test_a_model_that_gains_in_one_stretch_only_has_no_say() -> None:
    rows = Series()
    is_lucky = rows.stretches == 0
    rows.own = np.where(is_lucky, rows.target, rows.target + 5.0)
    assert rows.weight() == 0.0


def test_a_weight_that_is_ruinous_in_one_stretch_does_not_hide_a_smaller_one_that_gains() -> None:
    """An overconfident model: alone it is best in most stretches, and ruinous in one."""
    rows = Series()
    losses = [(rows.target - w * rows.own - (1 - w) * rows.parent) ** 2 for w in WEIGHTS]
    of_weights = np.stack(losses, axis=1)
    of_weights[:, -1] = of_weights[:, -2] - 0.01
    of_weights[rows.stretches == 0, -1] += 10.0
    gains = Gains.of_rows(of_weights, rows.groups, rows.stretches, 0.0)
    assert 0.0 < choose_weight(gains, 0.0) < 1.0


def test_a_gain_in_a_single_stretch_counts_where_there_is_no_other() -> None:
    rows = Series()
    rows.own = rows.target
    rows.stretches[:] = 0
    assert rows.weight() == 1.0


def test_what_one_group_gains_is_one_observation() -> None:
    rows = Series(2000, 20)
    # Half of the groups gain what the others lose in part: by rows the sum is sure.
    is_better = rows.groups % 2 == 0
    miss = rows.target - rows.parent
    rows.own = rows.parent + np.where(is_better, miss, -0.5 * miss)
    together = rows.weight()
    rows.groups = np.arange(2000)
    assert together < rows.weight()


def test_a_pooled_model_without_evidence_against_it_answers_alone() -> None:
    n_weights = len(WEIGHTS)
    nothing = Gains(
        0.0, np.zeros((0, n_weights)), np.zeros((0, n_weights, n_weights)), np.zeros(0, int)
    )
    assert (choose_weight(nothing, 1.0), choose_weight(nothing, 0.0)) == (1.0, 0.0)


def test_a_pooled_model_that_is_worse_than_the_constant_loses_its_weight() -> None:
    rows = Series()
    rows.parent = np.zeros(2000)
    rows.own = rows.noise(3.0)
    assert rows.weight(prior=1.0) <= 0.1


def test_a_single_group_with_two_stretches_is_heard() -> None:
    rows = Series(n_groups=1)
    rows.stretches = np.arange(2000) // 1000
    rows.own = rows.target + rows.noise(0.1)
    assert rows.weight() == 1.0


def test_losses_that_are_infinite_decide_nothing() -> None:
    rows = Series()
    rows.own = rows.target + rows.noise(0.1)
    with_infinite = [(rows.target - w * rows.own - (1 - w) * rows.parent) ** 2 for w in WEIGHTS]
    losses = np.stack(with_infinite, axis=1)
    losses[5] = np.inf
    losses[6, :3] = np.inf
    assert choose_weight(Gains.of_rows(losses, rows.groups, rows.stretches, 0.0), 0.0) == 1.0


def test_models_that_agree_stay_with_the_prior() -> None:
    rows = Series()
    rows.own = rows.parent * (1 + 1e-15)
    assert (rows.weight(0.0), rows.weight(1.0)) == (0.0, 1.0)


def test_the_loss_decides_and_not_its_square() -> None:
    """The median of a skewed target is far from its mean; absolute errors prefer it."""
    rng = np.random.default_rng(0)
    target = np.exp(2 * rng.normal(size=4000))
    median, mean = np.ones(4000), np.full(4000, target.mean())
    stretches, groups = np.arange(4000) % N_STRETCHES, rng.integers(0, 50, 4000)
    losses = [np.abs(target - weight * median - (1 - weight) * mean) for weight in WEIGHTS]
    absolute = Gains.of_rows(np.stack(losses, axis=1), groups, stretches, 0.0)
    assert choose_weight(absolute, 0.0) >= 0.9
    assert choose_weight(gains_of(target, median, mean, groups, stretches), 0.0) == 0.0


@given(seed=st.integers(0, 10_000), prior=st.sampled_from([0.0, 1.0]))
@settings(max_examples=100, deadline=None)
def test_weights_do_not_depend_on_the_order_of_rows_or_the_unit_of_the_target(
    seed: int, prior: float
) -> None:
    rows = Series(200, 5, seed)
    weight = rows.weight(prior)
    assert weight in WEIGHTS
    order = rows.rng.permutation(200)
    for name in ("groups", "stretches", "target", "parent", "own"):
        setattr(rows, name, getattr(rows, name)[order])
    assert rows.weight(prior) == weight
    for name in ("target", "parent", "own"):
        setattr(rows, name, getattr(rows, name) * 1024.0)
    assert rows.weight(prior) == weight


class Rows:
    """Judged rows of a fleet of three grains, as arrays; predictions of grain 0, 1, 2 side by side."""

    def __init__(self, n: int, *, n_groups: int = 4, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        city = self.rng.integers(0, n_groups, n)
        self.groups = np.column_stack(
            [np.full(n, "[]"), [f'["{c % 2}"]' for c in city], [f'["{c % 2}","{c}"]' for c in city]]
        ).astype(object)
        self.split = np.where(np.arange(n) % 5 < 4, TUNE, REPORT).astype(object)
        self.target = self.rng.normal(size=n)
        self.predictions = np.column_stack(
            [self.target + scale * self.rng.normal(size=n) for scale in (0.5, 0.5, 0.5)]
        )
        self.weight = np.ones(n)
        self.weights: list[dict[str, float]] = []
        for grain in range(GRAINS):
            names = sorted(set(self.groups[:, grain]))
            self.weights.append({name: 0.1 * (1 + place) for place, name in enumerate(names)})

    def moments(self) -> Moments:
        return Moments.of_rows(self.split, self.groups, self.target, self.predictions, self.weight)

    def describe(self) -> dict[Any, GroupSkill]:
        return dict(describe_groups(self.moments(), self.weights, CONSTANT))


def oracle(rows: Rows) -> dict[tuple[int, str], tuple[float | None, ...]]:
    """The recursion, row by row."""
    errors: dict[tuple[int, str, str, str], list[float]] = {}
    for row in range(len(rows.target)):
        answer = CONSTANT
        for grain in range(GRAINS):
            group, own, parent = rows.groups[row, grain], rows.predictions[row, grain], answer
            weight = rows.weights[grain].get(group)
            if weight is not None:
                answer = weight * own + (1 - weight) * parent
            said = {
                "own": None if weight is None else own,
                "parent": parent,
                "blend": answer,
                "constant": CONSTANT,
            }
            for name, value in said.items():
                if value is not None:
                    errors.setdefault((grain, group, rows.split[row], name), []).append(
                        (rows.target[row] - value) ** 2
                    )

    def rmse(*key: Any) -> float | None:
        return float(np.sqrt(np.mean(errors[key]))) if key in errors else None

    entries = [
        (TUNE, "own"),
        (TUNE, "parent"),
        (REPORT, "own"),
        (REPORT, "parent"),
        (REPORT, "blend"),
        (REPORT, "constant"),
    ]
    groups = {(grain, group) for grain, group, _, _ in errors}
    return {key: tuple(rmse(*key, *entry) for entry in entries) for key in groups}


def errors_of(skill: GroupSkill) -> tuple[float | None, ...]:
    return (
        skill.tune_own,
        skill.tune_parent,
        skill.report_own,
        skill.report_parent,
        skill.report_blend,
        skill.report_constant,
    )


def test_errors_are_those_of_answering_row_by_row() -> None:
    rows = Rows(600, n_groups=5)
    rows.predictions[:, 1] += 0.3
    del rows.weights[2]['["0","2"]']
    rows.predictions[rows.groups[:, 2] == '["0","2"]', 2] = np.nan
    rows.split[rows.groups[:, 2] == '["1","3"]'] = TUNE
    skills = rows.describe()
    expected = oracle(rows)
    assert set(skills) == set(expected)
    for key, errors in expected.items():
        assert errors_of(skills[key]) == pytest.approx(errors), key
        assert skills[key].weight == rows.weights[key[0]].get(key[1], 0.0)
    assert skills[2, '["1","3"]'].report_blend is None
    assert skills[2, '["0","2"]'].tune_own is None


def test_sums_per_group_say_the_same_as_rows() -> None:
    rows = Rows(300)
    moments = rows.moments()
    keys = [tuple(key) for key in np.column_stack([moments.split, moments.groups])]
    first = sorted({key: number for number, key in reversed(list(enumerate(keys)))}.values())
    added = [np.flatnonzero([key == keys[number] for key in keys]) for number in first]
    summed = Moments(
        moments.split[first],
        moments.groups[first],
        np.stack([moments.products[rows_].sum(axis=0) for rows_ in added]),
    )
    of_sums = describe_groups(summed, rows.weights, CONSTANT)
    of_rows = rows.describe()
    assert set(of_sums) == set(of_rows)
    for key, skill in of_rows.items():
        assert errors_of(of_sums[key]) == pytest.approx(errors_of(skill))


def test_rows_of_no_weight_say_nothing() -> None:
    rows = Rows(400)
    rows.weight[::2] = 0.0
    skills = rows.describe()
    rows.target[::2] += 100.0
    assert rows.describe() == skills


def test_without_any_row_there_is_nothing_to_say() -> None:
    rows = Rows(0)
    assert rows.describe() == {}


def test_a_group_without_judged_rows_has_the_weight_of_its_grain() -> None:
    rows = Rows(100)
    rows.weights[2]['["9","9"]'] = 0.7
    assert rows.describe()[2, '["9","9"]'] == GroupSkill(0.7)
