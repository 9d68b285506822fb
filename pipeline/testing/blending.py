"""The blend in pandas: what Spark must come to, and what blending rules are replayed with."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.models.meta_model import inverse_link
from pipeline.spec import HUBER, MULTICLASS, QUANTILE, FleetSpec
from pipeline.training.blend import WEIGHTS, Gains, choose_weight
from pipeline.training.objective import SMALLEST

Floats = npt.NDArray[np.float64]


def own_losses(spec: FleetSpec, rows: pd.DataFrame, answers: Floats) -> Floats:
    """The fleet's own loss of each row, on the target's scale, times the row's weight.

    Args:
        spec: the fleet.
        rows: actual, offset, scale, weight; for multiclass one per row and class.
        answers: in link space less the offset, over the scale; for classes probabilities.
    """
    actual = rows["actual"].to_numpy(dtype=float)
    weight = rows["weight"].to_numpy(dtype=float)
    if spec.task == MULTICLASS:
        return weight * np.where(actual > 0, -np.log(np.maximum(answers, SMALLEST)), 0.0)
    if spec.is_class_task:
        of_actual = np.where(actual > 0, answers, 1 - answers)
        return weight * -np.log(np.maximum(of_actual, SMALLEST))
    scale = rows["scale"].to_numpy(dtype=float)
    linked = rows["offset"].to_numpy(dtype=float) + scale * answers
    answers = inverse_link(linked, spec.target.transform)
    error = actual - answers
    losses: Floats = error**2
    if spec.objective == "l1":
        losses = np.abs(error)
    elif spec.objective == QUANTILE:
        alpha = spec.alpha or 0.5
        losses = np.where(error > 0, alpha * error, (alpha - 1) * error)
    elif spec.objective == HUBER:
        bend = (spec.alpha or 1.0) * scale
        straight = bend * (np.abs(error) - bend / 2)
        losses = np.where(np.abs(error) <= bend, error**2 / 2, straight)
    elif spec.variance_power is not None:
        losses = _deviances(actual, np.maximum(answers, SMALLEST), spec.variance_power)
    return weight * losses


def _deviances(actual: Floats, mean: Floats, power: float) -> Floats:
    if power == 1:
        logs = np.where(actual > 0, actual * np.log(np.where(actual > 0, actual, 1.0) / mean), 0.0)
        return 2 * (logs - actual + mean)
    upper, lower = 2 - power, 1 - power
    of_actual = actual**upper / (lower * upper)
    return 2 * (of_actual - actual * mean**lower / lower + mean**upper / upper)


def learn_weights_in_pandas(
    rows: pd.DataFrame, spec: FleetSpec, has_model: Sequence[set[str]], constant: Floats
) -> list[dict[str, float]]:
    """The weights that `spark.weights.learn_weights` learns.

    Args:
        rows: as from `spark.evaluation.judged_rows`, with a usable target.
        spec: the fleet.
        has_model: per grain the groups that have a model.
        constant: what answers each row without any model.
    """
    answer = constant
    weights: list[dict[str, float]] = []
    for grain, trained in enumerate(has_model):
        prior = float(grain == 0)
        own = rows[f"p{grain}"].to_numpy(dtype=float)
        groups = np.array([ids[grain] for ids in rows["group_ids"]], dtype=object)
        is_evidence = ~np.isnan(own) & rows["stretch"].notna().to_numpy()
        for coarser in range(grain):
            is_missing = rows[f"p{coarser}"].isna() & _have_model(rows, coarser, has_model)
            is_evidence &= ~is_missing.to_numpy()
        used = rows[is_evidence]
        losses = []
        for weight in WEIGHTS:
            blended = weight * own[is_evidence] + (1 - weight) * answer[is_evidence]
            losses.append(own_losses(spec, used, blended))
        of_weights = np.stack(losses, axis=1)
        if spec.pooling == "none":
            of_groups = dict.fromkeys(trained, 1.0)
        elif spec.pooling == "select":
            gains_of_rows = pd.Series(of_weights[:, 0] - of_weights[:, -1])
            gain = gains_of_rows.groupby(groups[is_evidence]).sum()
            of_groups = {group: float(gain.get(group, 0.0) > 0) for group in trained}
        else:
            stretches = used["stretch"].to_numpy(dtype=int)
            gains = Gains.of_rows(of_weights, groups[is_evidence], stretches, prior)
            of_groups = dict.fromkeys(trained, choose_weight(gains, prior))
        weights.append(of_groups)
        answer = blend(own, groups, answer, of_groups)
    return weights


def blend(
    own: Floats, groups: npt.NDArray[np.object_], parent: Floats, weights: Mapping[str, float]
) -> Floats:
    """A grain's answers; the parent's where there is no own prediction."""
    weight = pd.Series(groups).map(weights).fillna(0.0).to_numpy(dtype=float)
    answers: Floats = np.where(np.isnan(own), parent, weight * own + (1 - weight) * parent)
    return answers


def _have_model(rows: pd.DataFrame, grain: int, has_model: Sequence[set[str]]) -> "pd.Series[bool]":
    return rows["group_ids"].map(lambda ids: ids[grain] in has_model[grain])
