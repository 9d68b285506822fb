from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.training.blend import (
    N_BLOCKS,
    Evidence,
    GroupSkill,
    Moments,
    choose_weights,
    learn_blend,
)
from pipeline.training.splits import REPORT, TUNE

Pooling = Literal["blend", "select", "none"]
CONSTANT = 2.0
GRAINS = 3


class Rows:
    """Judged rows of a fleet of three grains, as arrays; predictions of grain 0, 1, 2 side by side."""

    def __init__(self, n: int, *, n_groups: int = 4, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        city = self.rng.integers(0, n_groups, n)
        self.groups = np.column_stack(
            [np.full(n, "[]"), [f'["{c % 2}"]' for c in city], [f'["{c % 2}","{c}"]' for c in city]]
        ).astype(object)
        self.split = np.where(np.arange(n) % 5 < 4, TUNE, REPORT).astype(object)
        self.block = np.where(self.split == TUNE, np.arange(n) * N_BLOCKS // n, 0)
        self.target = self.rng.normal(size=n)
        self.predictions = np.column_stack(
            [self.target + scale * self.rng.normal(size=n) for scale in (0.5, 0.5, 0.5)]
        )
        self.weight = np.ones(n)
        self.has_model: list[set[str]] = [set(self.groups[:, grain]) for grain in range(GRAINS)]

    def moments(self) -> Moments:
        return Moments.of_rows(
            self.split, self.block, self.groups, self.target, self.predictions, self.weight
        )

    def learn(self, pooling: Pooling = "blend") -> dict[tuple[int, str], GroupSkill]:
        return learn_blend(self.moments(), self.has_model, CONSTANT, pooling)

    def weights(self, grain: int, pooling: Pooling = "blend") -> dict[str, float]:
        return {
            group: skill.weight
            for (level, group), skill in self.learn(pooling).items()
            if level == grain
        }

    @property
    def noise(self) -> Any:
        return self.rng.normal(size=len(self.target))


def oracle(
    rows: Rows, skills: dict[tuple[int, str], GroupSkill]
) -> dict[tuple[int, str], tuple[float | None, ...]]:
    """The recursion, row by row."""
    errors: dict[tuple[int, str, str, str], list[float]] = {}
    for row in range(len(rows.target)):
        answer = CONSTANT
        for grain in range(GRAINS):
            group, own, parent = rows.groups[row, grain], rows.predictions[row, grain], answer
            trained = group in rows.has_model[grain]
            if trained:
                answer = (
                    skills[grain, group].weight * own + (1 - skills[grain, group].weight) * parent
                )
            said = {
                "own": own if trained else None,
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

    wanted = [
        (TUNE, "own"),
        (TUNE, "parent"),
        (REPORT, "own"),
        (REPORT, "parent"),
        (REPORT, "blend"),
        (REPORT, "constant"),
    ]
    return {key: tuple(rmse(*key, *entry) for entry in wanted) for key in skills}


@pytest.mark.parametrize("pooling", ["blend", "select", "none"])
def test_errors_are_those_of_answering_row_by_row(pooling: Pooling) -> None:
    rows = Rows(600, n_groups=5)
    rows.predictions[:, 1] += 0.3
    rows.has_model[2] -= {'["0","2"]'}
    rows.predictions[rows.groups[:, 2] == '["0","2"]', 2] = np.nan
    rows.split[rows.groups[:, 2] == '["1","3"]'] = TUNE
    skills = rows.learn(pooling)
    for key, expected in oracle(rows, skills).items():
        skill = skills[key]
        found = (
            skill.tune_own,
            skill.tune_parent,
            skill.report_own,
            skill.report_parent,
            skill.report_blend,
            skill.report_constant,
        )
        assert found == pytest.approx(expected), key
    assert skills[2, '["1","3"]'].report_blend is None
    assert skills[2, '["0","2"]'].tune_own is None


def test_sums_per_group_say_the_same_as_rows() -> None:
    rows = Rows(300)
    moments = rows.moments()
    keys = [
        tuple(key)
        for key in np.column_stack([moments.split, moments.block.astype(str), moments.groups])
    ]
    first = sorted({key: number for number, key in reversed(list(enumerate(keys)))}.values())
    added = [np.flatnonzero([key == keys[number] for key in keys]) for number in first]
    summed = Moments(
        moments.split[first],
        moments.block[first],
        moments.groups[first],
        np.array([float(len(rows_)) for rows_ in added]),
        np.stack([moments.products[rows_].sum(axis=0) for rows_ in added]),
    )
    found, expected = learn_blend(summed, rows.has_model, CONSTANT, "blend"), rows.learn()
    assert {key: skill.weight for key, skill in found.items()} == pytest.approx(
        {key: skill.weight for key, skill in expected.items()}
    )


def test_a_better_own_model_answers_alone() -> None:
    rows = Rows(4000)
    rows.predictions[:, 2] = rows.target + 0.01 * rows.noise
    assert min(rows.weights(2).values()) > 0.8


def test_a_useless_own_model_has_no_say() -> None:
    rows = Rows(4000)
    rows.predictions[:, :2] = (rows.target + 0.1 * rows.noise)[:, None]
    rows.predictions[:, 2] = 5 * rows.noise
    assert max(rows.weights(2).values()) < 0.02


def test_equally_good_models_share() -> None:
    rows = Rows(8000)
    rows.predictions[:, 1] = rows.predictions[:, 0]
    assert all(0.3 < weight < 0.6 for weight in rows.weights(2).values())


def test_noise_alone_moves_no_weight_from_its_prior() -> None:
    """Own models that differ from their parents by noise without meaning: few fleets of forty find anything in it."""
    moved = []
    for seed in range(40):
        rows = Rows(400, seed=seed)
        rows.predictions[:] = 0.0
        rows.predictions[:, 2] = 0.3 * rows.noise
        rows.target = rows.noise
        moved.append(max(rows.weights(2).values()))
    assert np.mean(np.array(moved) == 0) > 0.7
    assert np.mean(moved) < 0.1


def test_a_pooled_model_without_evidence_against_it_answers_alone() -> None:
    rows = Rows(40)
    rows.predictions[:, 0] = CONSTANT
    assert rows.weights(0) == {"[]": 1.0}


def test_a_pooled_model_that_is_worse_than_the_constant_loses_its_weight() -> None:
    rows = Rows(4000)
    rows.target = CONSTANT + 0.1 * rows.noise
    rows.predictions[:, 0] = 10 * rows.noise
    assert rows.weights(0)["[]"] < 0.25


def test_groups_that_differ_are_weighed_each_for_itself() -> None:
    rows = Rows(8000)
    good = rows.groups[:, 2] == '["0","0"]'
    rows.predictions[:, :2] = (rows.target + 0.5 * rows.noise)[:, None]
    rows.predictions[:, 2] = rows.target + np.where(good, 0.05, 5.0) * rows.noise
    weights = rows.weights(2)
    assert weights.pop('["0","0"]') > 0.7
    assert max(weights.values()) < 0.2


def test_a_group_of_few_rows_is_weighed_like_its_fleet() -> None:
    rows = Rows(8000)
    rows.predictions[:, 2] = rows.target + 0.1 * rows.noise
    few = np.flatnonzero(rows.groups[:, 2] == '["0","0"]')
    rows.split[few[4:]], rows.block[few[4:]] = REPORT, 0
    rows.split[few[:4]], rows.block[few[:4]] = TUNE, [0, 1, 4, 5]
    # On its few rows the own model happens to lie a little on the wrong side of its parent.
    rows.predictions[few, 0] = rows.predictions[few, 1] = rows.target[few] + 0.5
    rows.predictions[few, 2] = rows.target[few] + 0.51
    weights = rows.weights(2)
    assert weights['["0","0"]'] > 0.9 * np.mean(list(weights.values()))


@pytest.mark.parametrize("pooling", ["blend", "select", "none"])
def test_a_group_without_a_model_has_no_weight(pooling: Pooling) -> None:
    rows = Rows(600)
    rows.has_model[2] = {'["0","0"]'}
    rows.predictions[rows.groups[:, 2] != '["0","0"]', 2] = np.nan
    weights = rows.weights(2, pooling)
    assert [weight for group, weight in weights.items() if group != '["0","0"]'] == [0.0] * 3


def test_groups_without_a_model_change_no_other_weight() -> None:
    rows = Rows(2000)
    kept = rows.groups[:, 2] == '["0","0"]'
    rows.has_model[2] = {'["0","0"]'}
    rows.predictions[~kept, 2] = np.nan
    before = rows.weights(2)
    rows.predictions[~kept, 2] = 1e6
    assert rows.weights(2) == before


def test_select_takes_the_one_that_is_better_on_tune_rows() -> None:
    rows = Rows(3000)
    good = rows.groups[:, 2] == '["0","0"]'
    rows.predictions[:, 2] = rows.target + np.where(good, 0.1, 2.0) * rows.noise
    weights = rows.weights(2, "select")
    assert weights.pop('["0","0"]') == 1.0
    assert set(weights.values()) == {0.0}
    for (grain, group), skill in rows.learn("select").items():
        assert skill.tune_own is not None
        assert skill.tune_parent is not None
        assert skill.weight == float(skill.tune_own < skill.tune_parent), (grain, group)


def test_none_takes_the_own_model_wherever_there_is_one() -> None:
    rows = Rows(300)
    rows.predictions[:, 2] = 100.0
    assert set(rows.weights(2, "none").values()) == {1.0}


def test_report_rows_choose_no_weight() -> None:
    rows = Rows(600)
    before = {key: skill.weight for key, skill in rows.learn().items()}
    report = rows.split == REPORT
    rows.predictions[report] = 50.0
    assert {key: skill.weight for key, skill in rows.learn().items()} == before


def test_rows_of_no_weight_choose_nothing() -> None:
    rows = Rows(600)
    rows.weight = np.where(np.arange(600) % 3 == 0, 0.0, 1.0)
    before = rows.learn()
    rows.predictions[rows.weight == 0] = 1e3
    after = rows.learn()
    assert {key: skill.weight for key, skill in after.items()} == pytest.approx(
        {key: skill.weight for key, skill in before.items()}
    )
    assert after[0, "[]"].report_blend == pytest.approx(before[0, "[]"].report_blend)


def test_a_group_without_tune_rows_is_weighed_like_its_fleet() -> None:
    rows = Rows(4000)
    rows.predictions[:, 2] = rows.target + 0.01 * rows.noise
    rows.split[rows.groups[:, 2] == '["1","3"]'] = REPORT
    rows.block[rows.split == REPORT] = 0
    skills = rows.learn()
    assert skills[2, '["1","3"]'].weight > 0.75
    assert skills[2, '["1","3"]'].tune_own is None


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows, shuffled = Rows(500), Rows(500)
    order = np.random.default_rng(5).permutation(500)
    for name in ("split", "block", "groups", "target", "predictions", "weight"):
        setattr(shuffled, name, getattr(rows, name)[order])
    one, other = (
        {key: skill.weight for key, skill in found.learn().items()} for found in (rows, shuffled)
    )
    assert one == pytest.approx(other)


def test_without_any_row_there_is_nothing_to_weigh() -> None:
    rows = Rows(0)
    assert rows.learn() == {}


def test_a_fleet_without_tune_rows_trusts_the_pooled_model() -> None:
    rows = Rows(50)
    rows.split[:], rows.block[:] = REPORT, 0
    assert rows.weights(0) == {"[]": 1.0}
    assert set(rows.weights(1).values()) == set(rows.weights(2).values()) == {0.0}


@settings(max_examples=200)
@given(
    st.integers(0, 10**9),
    st.integers(1, 5),
    st.sampled_from(["blend", "select", "none"]),
    st.sampled_from([0.0, 1.0]),
)
def test_weights_lie_between_nothing_and_everything(
    seed: int, n_groups: int, pooling: Pooling, prior: float
) -> None:
    rng = np.random.default_rng(seed)
    # One row per block and group: differences and errors of any size, often none at all.
    differs, errs = (
        10 ** rng.uniform(-8, 8, (N_BLOCKS, n_groups))
        * rng.choice([-1, 0, 1], (N_BLOCKS, n_groups))
        for _ in range(2)
    )
    errs = np.where(rng.random(n_groups) < 0.2, differs, errs)
    evidence = Evidence(
        differs * errs, differs**2, (errs**2).sum(axis=0), np.full(n_groups, float(N_BLOCKS))
    )
    trained = rng.random(n_groups) < 0.7
    weights = choose_weights(evidence, trained, pooling, prior)
    assert np.isfinite(weights).all()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights[~trained] == 0).all()


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(1, 120),
    st.integers(1, 6),
    st.sampled_from(["blend", "select", "none"]),
)
def test_every_judged_group_has_a_weight_whatever_the_rows(
    seed: int, n_rows: int, n_groups: int, pooling: Pooling
) -> None:
    rows = Rows(n_rows, n_groups=n_groups, seed=seed)
    rows.predictions *= rows.rng.choice([0.0, 1.0, 1e6], size=rows.predictions.shape)
    skills = rows.learn(pooling)
    assert set(skills) == {
        (grain, group) for grain in range(GRAINS) for group in rows.groups[:, grain]
    }
    assert all(0 <= skill.weight <= 1 for skill in skills.values())
