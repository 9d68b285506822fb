"""Partial pooling: how much each group's own model counts against its parent's answer.

A group's answer is ``w * own + (1 - w) * parent's answer`` in link space, down to a constant.
Everything needed to choose the weights, and to judge any blend of them by squared error, is in sums
of products of the row's target and predictions. Spark adds them up once per finest group; what
follows costs the driver a few numbers per group, whatever the number of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.tables import BY_CONSTANT
from pipeline.training.splits import REPORT, TUNE

Floats = npt.NDArray[np.float64]

# Stretches of time that the tune split is cut into, to see how steady the gain of a weight is.
# Even, for the halves.
N_BLOCKS = 8
# Own and parent's predictions that differ by less than this share of the squared error are the
# same: the rest is rounding.
DISCERNIBLE = 1e-12
# How far below the best gain a more cautious weight may stay, in standard errors of the difference.
STANDARD_ERRORS = 2.0
DECIMALS = 9


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
        block: stretch of the tune split that the entry's rows lie in, 0 to N_BLOCKS - 1; 0 for
            report.
        groups: the entry's group id in each grain, shape (entries, grains).
        n_rows: rows of each entry.
        products: weighted sums of v v', shape (entries, 2 + grains, 2 + grains); a missing
            prediction counts as 0.
    """

    split: npt.NDArray[np.object_]
    block: npt.NDArray[np.int64]
    groups: npt.NDArray[np.object_]
    n_rows: Floats
    products: Floats

    @classmethod
    def of_rows(
        cls,
        split: Sequence[str],
        block: npt.NDArray[np.int64],
        groups: npt.NDArray[np.object_],
        target: Floats,
        predictions: Floats,
        weight: Floats,
    ) -> "Moments":
        """One entry per row; for small data and tests."""
        vector = np.column_stack([np.ones(len(target)), target, np.nan_to_num(predictions)])
        products = weight[:, None, None] * vector[:, :, None] * vector[:, None, :]
        return cls(np.asarray(split, dtype=object), block, groups, np.ones(len(target)), products)


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
    tune_own: float | None
    tune_parent: float | None
    report_own: float | None
    report_parent: float | None
    report_blend: float | None
    report_constant: float | None
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


def learn_blend(
    moments: Moments,
    has_model: Sequence[set[str]],
    constant: float,
    pooling: Literal["blend", "select", "none"],
) -> dict[GroupKey, GroupSkill]:
    """Choose the weight of every group that has judged rows.

    Least squares on cross-selected tune predictions, grain by grain from coarse to fine. A group's
    weight is shrunk towards its grain's weight over all groups, the more so the fewer its rows and
    the more alike the groups are; a grain's weight is shrunk towards the parents' answers (the
    pooled model's towards itself), the more so the less certain it is.

    Args:
        moments: tune and report rows.
        has_model: per grain the groups that were trained.
        constant: the fleet's constant, last ancestor of all, in link space less the offset.
        pooling: `blend`; `select`: weight 1 where the own model beats the parent's answer on tune
            rows, else 0; `none`: 1.

    Returns:
        Skill by group.
    """
    n_entries, n_grains = moments.groups.shape
    # The answer so far, as a linear combination of v, per entry.
    answer = np.zeros((n_entries, 2 + n_grains))
    answer[:, 0] = constant
    constant_answer = answer.copy()
    target = np.zeros_like(answer)
    target[:, 1] = 1.0
    skills: dict[GroupKey, GroupSkill] = {}
    for grain in range(n_grains):
        own = np.zeros_like(answer)
        own[:, 2 + grain] = 1.0
        codes, names = pd.factorize(moments.groups[:, grain])
        trained = np.array([name in has_model[grain] for name in names], dtype=bool)
        parent = answer
        evidence = _evidence(moments, codes, len(names), target - parent, own - parent)
        weights = choose_weights(evidence, trained, pooling, prior=float(grain == 0))
        answer = parent + weights[codes][:, None] * (own - parent)
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
        errors[~trained, 0] = errors[~trained, 2] = np.nan
        measured = errors.astype(object)
        measured[np.isnan(errors)] = None
        for name, weight, errors_of_group in zip(names, weights, measured, strict=True):
            skills[GroupKey(grain, str(name))] = GroupSkill(float(weight), *errors_of_group)
    return skills


def _evidence(
    moments: Moments, codes: npt.NDArray[np.intp], n_groups: int, miss: Floats, step: Floats
) -> "Evidence":
    """What tune rows say of one grain's groups.

    Args:
        moments: tune and report rows.
        codes: the group of each entry.
        n_groups: of the grain.
        miss: the target less the parent's answer, as combinations of v per entry.
        step: the own prediction less it, likewise.
    """
    is_tune = moments.split == TUNE
    blocks = []
    for block in range(N_BLOCKS):
        blocks.append(_Sums(moments, codes, n_groups, is_tune & (moments.block == block)))
    whole = _Sums(moments, codes, n_groups, is_tune)
    return Evidence(
        gain=np.stack([block.of(miss, step) for block in blocks]),
        spread=np.stack([block.of(step, step) for block in blocks]),
        miss=whole.of(miss, miss),
        n_rows=whole.n_rows,
    )


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
        self._products = moments.products[self._chosen]
        self._codes = codes[self._chosen]
        self._n_groups = n_groups
        self.n_rows: Floats = np.bincount(
            self._codes, moments.n_rows[self._chosen], n_groups
        ).astype(np.float64)
        self._weight = np.bincount(self._codes, self._products[:, 0, 0], n_groups)

    def of(self, left: Floats, right: Floats) -> Floats:
        """Per group the weighted sum over rows of (left . v)(right . v)."""
        forms = np.einsum("ei,eij,ej->e", left[self._chosen], self._products, right[self._chosen])
        sums: Floats = np.bincount(self._codes, forms, self._n_groups).astype(np.float64)
        return sums

    def rmse(self, error: Floats) -> Floats:
        """Per group the root mean squared error; NaN where there is no row."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.maximum(self.of(error, error), 0.0) / self._weight)


@dataclass(frozen=True)
class Evidence:
    """What tune rows say for and against the own models of one grain's groups.

    With e the target less the parent's answer and d the own prediction less it:

    Args:
        gain: sum(d e) per block of the tune split and group, shape (N_BLOCKS, groups).
        spread: sum(d d), same shape.
        miss: sum(e e) per group.
        n_rows: tune rows per group.
    """

    gain: Floats
    spread: Floats
    miss: Floats
    n_rows: Floats


def choose_weights(
    evidence: Evidence,
    trained: npt.NDArray[np.bool_],
    pooling: Literal["blend", "select", "none"],
    prior: float,
) -> Floats:
    """Per group of one grain the weight of its own model.

    A group's least-squares weight is sum(d e) / sum(d d). The groups are then a random-effects
    meta-analysis: each weight is shrunk towards their mean, the more so the less certain it is and
    the less the groups differ. Rows of one time err together, so certainty is judged from halves of
    the tune split, not from rows alone: the more a group's weight changes from one half to the
    other, the less certain it is, and groups differ only as far as their differences persist from
    one half to the other. Last, all weights move away from the prior only as little as is not
    clearly worse than the best (two standard errors over blocks of time): the next period is never
    quite like the last.

    Args:
        evidence: of the tune rows.
        trained: whether the group has a model.
        pooling: as in `learn_blend`.
        prior: the weight without evidence: 1 for the pooled model, whose parent is a constant, else
            0.

    Source: random-effects meta-analysis, DerSimonian and Laird (1986), with moments taken across
    halves; the one standard error rule, Breiman, Friedman, Olshen and Stone (1984), here with
    paired differences and two of them; the standard error of a ratio, Cochran (1977), section 6.4.
    """
    if pooling == "none":
        return np.where(trained, 1.0, 0.0)
    gain, spread = evidence.gain.sum(axis=0), evidence.spread.sum(axis=0)
    if pooling == "select":
        # The own model's squared error is lower exactly where 2 sum(d e) > sum(d d).
        return np.where(trained & (2 * gain > spread), 1.0, 0.0)
    used = trained & (spread > DISCERNIBLE * evidence.miss)
    weights = np.zeros(len(gain))
    if not used.any():
        weights[trained] = prior
        return weights
    weights[used], mean = _shrunken_weights(evidence, used)
    # A model without a tune row that tells it from its parent is trusted like its fleet.
    weights[trained & ~used] = mean
    share = _steady_share(evidence, weights - prior, prior)
    weights[trained] = prior + share * (weights[trained] - prior)
    # Sums over files in another order differ in their last digits; weights do not.
    rounded: Floats = np.round(np.clip(weights, 0.0, 1.0), DECIMALS).astype(np.float64)
    return rounded


def _shrunken_weights(evidence: Evidence, used: npt.NDArray[np.bool_]) -> tuple[Floats, float]:
    """Weights of the used groups, shrunk towards their mean, and that mean."""
    gain, spread = evidence.gain.sum(axis=0)[used], evidence.spread.sum(axis=0)[used]
    miss, n_rows = evidence.miss[used], evidence.n_rows[used].sum()
    common = gain.sum() / spread.sum()
    row_noise = (miss - 2 * common * gain + common**2 * spread).sum() / n_rows
    gain_of_halves = _halves(evidence.gain[:, used])
    half_noise, between = _from_halves(gain_of_halves, _halves(evidence.spread[:, used]), common)
    # Never quite 0, so that a perfect fit on a row or two is a number, too.
    least_noise = DISCERNIBLE * miss.sum() / n_rows + 1e-200
    variance = max(row_noise, half_noise, least_noise) / spread
    certainty = 1 / (variance + between)
    own = gain / spread
    mean = float((certainty * own).sum() / certainty.sum())
    return (own * between + mean * variance) / (between + variance), mean


def _steady_share(evidence: Evidence, step: Floats, prior: float) -> float:
    """How much of a step from the prior weight to take: as little as is not clearly worse.

    The share c of the step gains 2 c A - c^2 S in squared error, with A and S summed over blocks of
    time; c* = A / S is best. A share that is u smaller loses 2 u (A_b - c* S_b) + u^2 S_b in block
    b. To first order that loss, summed, stays within its own standard error times `STANDARD_ERRORS`
    up to u = 2 STANDARD_ERRORS se(c*), where se(c*) is the ratio estimator's. So evidence that all
    blocks agree on is followed, however large the gain differs between them, and a lucky block is
    not.
    """
    gain = (step * (evidence.gain - prior * evidence.spread)).sum(axis=1)
    spread = (step**2 * evidence.spread).sum(axis=1)
    if spread.sum() <= 0:
        return 0.0
    best, n_blocks = gain.sum() / spread.sum(), len(gain)
    error = np.sqrt(n_blocks / (n_blocks - 1) * ((gain - best * spread) ** 2).sum()) / spread.sum()
    return float(np.clip(best - 2 * STANDARD_ERRORS * error, 0.0, 1.0))


def _halves(blocks: Floats) -> Floats:
    """Sums over the earlier and the later half of the blocks."""
    return np.stack([half.sum(axis=0) for half in np.split(blocks, 2)])


def _from_halves(gain: Floats, spread: Floats, common: float) -> tuple[float, float]:
    """Noise per unit of spread, and variance between groups.

    From how weights change between the halves of the tune split.
    """
    both = (spread > 0).all(axis=0)
    if not both.any():
        return 0.0, 0.0
    early, late = gain[:, both] / spread[:, both]
    harmonic = 1 / (1 / spread[:, both]).sum(axis=0)
    noise = float(np.average((early - late) ** 2 * harmonic))
    if both.sum() == 1:
        return noise, 0.0
    between = float(np.average((early - common) * (late - common), weights=harmonic))
    return noise, max(0.0, between)
