"""Partial pooling: how much each grain's own models count against their parents' answers.

A group's answer is ``w * own + (1 - w) * parent's answer`` in link space, down to a constant. All
groups of a grain that have a model share one weight. It is chosen in the fleet's own loss, on
held-out rows of several stretches of time: weights of single groups do not last from one stretch to
the next (see decision 0029).

Everything needed comes as sums that Spark adds up: to choose a weight, a few numbers per grain; to
state each group's errors, a few numbers per group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.tables import BY_CONSTANT
from pipeline.training.splits import REPORT, TUNE

Floats = npt.NDArray[np.float64]

# The weights that are tried. Losses have no common form, so their minimum is looked up.
WEIGHTS = tuple(tenths / 10 for tenths in range(11))
# How far below the best gain a weight nearer to the prior may stay, in standard errors.
STANDARD_ERRORS = 1.0
# Gains that differ by less than this share of the loss are equal: the rest is rounding.
DISCERNIBLE = 1e-12


class Constants(NamedTuple):
    """The fleet's constant, the last ancestor of every group: what answers without any model.

    Args:
        with_offset: in link space, less the offset, over the scale; 0 for multiclass.
        without_offset: in link space; 0 for multiclass.
        prior: for multiclass each class's share of the fit rows; else empty.
    """

    with_offset: float
    without_offset: float
    prior: tuple[float, ...] = ()


@dataclass(frozen=True)
class Moments:
    """Sums over judged rows of products of ``v = (1, target, prediction of grain 0, 1, ...)``.

    For multiclass a row is one class of a judged row, and its target and predictions are taken
    relative to the class's prior.

    Args:
        split: `tune` or `report`, one per entry.
        groups: the entry's group id in each grain, shape (entries, grains).
        products: weighted sums of v v', shape (entries, 2 + grains, 2 + grains); a missing
            prediction counts as 0.
    """

    split: npt.NDArray[np.object_]
    groups: npt.NDArray[np.object_]
    products: Floats

    @classmethod
    def of_rows(
        cls,
        split: Sequence[str],
        groups: npt.NDArray[np.object_],
        target: Floats,
        predictions: Floats,
        weight: Floats,
    ) -> "Moments":
        """One entry per row; for small data and tests."""
        vector = np.column_stack([np.ones(len(target)), target, np.nan_to_num(predictions)])
        products = weight[:, None, None] * vector[:, :, None] * vector[:, None, :]
        return cls(np.asarray(split, dtype=object), groups, products)


@dataclass(frozen=True)
class GroupSkill:
    """What one group's judged rows say.

    Link-space root mean squared errors, null where there are no such rows.

    Args:
        weight: of the group's own model; 0 where it has none.
        tune_own: error of the own model on tune rows (cross-selected).
        tune_parent: of the parent's answer there.
        report_own: of the own model on report rows.
        report_parent: of the parent's answer there.
        report_blend: of the group's answer there.
        report_constant: of the fleet's constant there.
        answered_by: `parent` or `constant` where that answers the group instead, because its own
            answer is significantly worse.
    """

    weight: float
    tune_own: float | None = None
    tune_parent: float | None = None
    report_own: float | None = None
    report_parent: float | None = None
    report_blend: float | None = None
    report_constant: float | None = None
    answered_by: str | None = field(default=None, kw_only=True)

    @property
    def is_cut(self) -> bool:
        """Whether the constant answers the group, whatever is above it."""
        return self.answered_by == BY_CONSTANT

    def left_to(self, answered_by: str) -> "GroupSkill":
        """The skill of a group that its parent, or the constant, answers."""
        error = self.report_parent
        if answered_by == BY_CONSTANT:
            error = self.report_constant
        return replace(self, weight=0.0, report_blend=error, answered_by=answered_by)


@dataclass(frozen=True)
class Gains:
    """What the weights of one grain's own models gain on held-out rows, in the fleet's own loss.

    A weight's gain is the sum, over rows, of the loss at the prior weight less the loss at that
    weight.

    Args:
        loss: sum of the losses at the prior weight.
        by_stretch: gain of each of `WEIGHTS` in each stretch of time, shape (stretches, weights).
        products: in each stretch, for each pair of weights, the sum over groups of the products of
            their gains there, shape (stretches, weights, weights).
        n_groups: groups with rows in each stretch.
    """

    loss: float
    by_stretch: Floats
    products: Floats
    n_groups: npt.NDArray[np.int64]

    @classmethod
    def of_rows(
        cls, losses: Floats, groups: npt.NDArray[Any], stretches: npt.NDArray[Any], prior: float
    ) -> "Gains":
        """Added up from rows; for small data and tests.

        Args:
            losses: of each row at each of `WEIGHTS`, shape (rows, weights).
            groups: of each row.
            stretches: of each row.
            prior: one of `WEIGHTS`.
        """
        at_prior = losses[:, [WEIGHTS.index(prior)]]
        with np.errstate(invalid="ignore"):
            gains = at_prior - losses
        # A loss that no double holds decides nothing.
        gains[~np.isfinite(gains)] = 0.0
        by_stretch = []
        products = []
        n_groups = []
        for stretch in np.unique(stretches):
            is_within = stretches == stretch
            of_groups = pd.DataFrame(gains[is_within]).groupby(groups[is_within]).sum().to_numpy()
            by_stretch.append(of_groups.sum(axis=0))
            products.append(of_groups.T @ of_groups)
            n_groups.append(len(of_groups))
        n_weights = len(WEIGHTS)
        return cls(
            float(at_prior[np.isfinite(at_prior)].sum()),
            np.array(by_stretch).reshape(-1, n_weights),
            np.array(products).reshape(-1, n_weights, n_weights),
            np.array(n_groups, dtype=np.int64),
        )


def choose_weight(gains: Gains, prior: float) -> float:
    """The weight of one grain's own models: the nearest to the prior that is not clearly worse.

    That is the weight nearest to the prior whose gain over all stretches is at most one standard
    error below the best gain. Rows of one group and stretch err together, so they count as one
    observation; of a single one no error is known, and the best weight is taken. The weight counts
    only if such weights, each chosen in all stretches but one, gain in the one left out, on the
    whole; else the prior stays. A single stretch is its own.

    Args:
        gains: on held-out rows.
        prior: the weight without evidence: 1 for the pooled model, whose parent is a constant, else
            0.

    Returns:
        One of `WEIGHTS`.

    Source: the one standard error rule, Breiman, Friedman, Olshen and Stone, Classification and
    Regression Trees (1984), section 3.4.3.
    """
    # From the prior on, so that of equal gains the first is the nearest.
    places = sorted(range(len(WEIGHTS)), key=lambda place: abs(WEIGHTS[place] - prior))
    n_stretches = len(gains.by_stretch)
    everything = np.full(n_stretches, fill_value=True)
    held_out_gain = 0.0
    for left_out in range(n_stretches):
        others = everything
        if n_stretches > 1:
            others = np.arange(n_stretches) != left_out
        place = _choose_place(gains, others, places)
        held_out_gain += float(gains.by_stretch[left_out, place])
    if held_out_gain <= DISCERNIBLE * gains.loss:
        return prior
    return WEIGHTS[_choose_place(gains, everything, places)]


def _choose_place(gains: Gains, stretches: npt.NDArray[np.bool_], places: Sequence[int]) -> int:
    """The first of the places whose gain in some stretches is within the error of the best."""
    total = gains.by_stretch[stretches].sum(axis=0)
    products = gains.products[stretches].sum(axis=0)
    best = places[int(np.argmax(total[places]))]
    squares = products[best, best] - 2 * products[best] + np.diag(products)
    errors = np.full(len(WEIGHTS), DISCERNIBLE * gains.loss)
    if gains.n_groups[stretches].sum() > 1:
        errors += STANDARD_ERRORS * np.sqrt(np.maximum(squares, 0.0))
    return next(place for place in places if total[best] - total[place] <= errors[place])


def describe_groups(
    moments: Moments, weights: Sequence[Mapping[str, float]], constant: float
) -> dict[GroupKey, GroupSkill]:
    """The weight and the errors of every group that has judged rows or a model.

    Args:
        moments: of tune and report rows.
        weights: per grain the weight of each group that has a model.
        constant: the fleet's constant, last ancestor of all, in link space less the offset.
    """
    n_entries, n_grains = moments.groups.shape
    # The answer so far, as a linear combination of v, per entry.
    answer = np.zeros((n_entries, 2 + n_grains))
    answer[:, 0] = constant
    constant_answer = answer.copy()
    target = np.zeros_like(answer)
    target[:, 1] = 1.0
    skills: dict[GroupKey, GroupSkill] = {}
    for grain, of_grain in enumerate(weights):
        for name, weight in of_grain.items():
            skills[GroupKey(grain, name)] = GroupSkill(weight)
    for grain in range(n_grains):
        own = np.zeros_like(answer)
        own[:, 2 + grain] = 1.0
        codes, names = pd.factorize(moments.groups[:, grain])
        own_weights = pd.Index(names).map(weights[grain]).to_numpy(dtype=float, na_value=np.nan)
        has_model = ~np.isnan(own_weights)
        own_weights = np.where(has_model, own_weights, 0.0)
        parent = answer
        answer = parent + own_weights[codes][:, None] * (own - parent)
        tune = _Sums(moments, codes, len(names), moments.split == TUNE)
        report = _Sums(moments, codes, len(names), moments.split == REPORT)
        errors = np.column_stack(
            [
                tune.rmse(target - own),
                tune.rmse(target - parent),
                report.rmse(target - own),
                report.rmse(target - parent),
                report.rmse(target - answer),
                report.rmse(target - constant_answer),
            ]
        )
        # A group without a model has no errors of its own.
        errors[~has_model, 0] = errors[~has_model, 2] = np.nan
        measured = errors.astype(object)
        measured[np.isnan(errors)] = None
        for name, weight, errors_of_group in zip(names, own_weights, measured, strict=True):
            skills[GroupKey(grain, str(name))] = GroupSkill(float(weight), *errors_of_group)
    return skills


class _Sums:
    """Quadratic forms of the chosen entries, added up per group of one grain."""

    def __init__(
        self,
        moments: Moments,
        codes: npt.NDArray[np.intp],
        n_groups: int,
        chosen: npt.NDArray[np.bool_],
    ) -> None:
        self._chosen = chosen
        self._products = moments.products[chosen]
        self._codes = codes[chosen]
        self._n_groups = n_groups
        self._weight = np.bincount(self._codes, self._products[:, 0, 0], n_groups)

    def rmse(self, error: Floats) -> Floats:
        """Per group the root mean squared error; NaN where there is no row."""
        error = error[self._chosen]
        squares = np.einsum("ei,eij,ej->e", error, self._products, error)
        sums = np.bincount(self._codes, squares, self._n_groups)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.maximum(sums, 0.0) / self._weight)
