"""Choosing the blend's weights on Spark: what each weight gains, in the fleet's own loss."""

from collections.abc import Collection, Sequence

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.spark.blending import blend, mark_groups
from pipeline.spark.keys import finite
from pipeline.spark.losses import answer_loss
from pipeline.spark.products import sums_of_products, symmetric_matrices
from pipeline.spec import FleetSpec
from pipeline.training.blend import WEIGHTS, Gains, choose_weight


def learn_weights(
    judged: DataFrame, spec: FleetSpec, has_model: Sequence[Collection[str]], constant: Column
) -> list[dict[str, float]]:
    """The weight of every group that has a model, grain by grain from coarse to fine.

    With `pooling: blend` a Spark job per grain, whose result has one row per stretch; with `select`
    a job per grain with one row per group.

    Args:
        judged: as from `evaluation.judged_rows`, with the groups that have a model.
        spec: the fleet.
        has_model: those groups, per grain.
        constant: what answers without any model, as from `blending.constant_column`.
    """
    if spec.pooling == "none":
        return [dict.fromkeys(groups, 1.0) for groups in has_model]
    evidence = judged.where("stretch IS NOT NULL AND residual IS NOT NULL")
    answer = constant
    weights: list[dict[str, float]] = []
    for grain, groups in enumerate(has_model):
        rows = evidence.where(_is_evidence(grain))
        if spec.pooling == "select":
            better = _better_than_parent(rows, spec, grain, answer)
            weights.append({group: float(group in better) for group in groups})
            is_better = f"_is_better{grain}"
            evidence = mark_groups(evidence, grain, better, is_better)
            own = sf.when(sf.col(is_better), sf.col(f"p{grain}"))
            answer = sf.coalesce(own, answer)
        else:
            # Without evidence the pooled model is trusted: its parent is a constant.
            prior = float(grain == 0)
            common = choose_weight(sum_gains(rows, spec, grain, answer, prior), prior)
            weights.append(dict.fromkeys(groups, common))
            answer = _answer_at(common, grain, answer)
    return weights


def sum_gains(rows: DataFrame, spec: FleetSpec, grain: int, parent: Column, prior: float) -> Gains:
    """What each weight of a grain's own models gains; one Spark job.

    Args:
        rows: evidence, as from `evaluation.judged_rows`.
        spec: the fleet.
        grain: index of the grain.
        parent: the answer of the grain above.
        prior: the weight that gains are measured from.
    """
    at_prior = _loss_at(prior, spec, grain, parent)
    gains = []
    for place, weight in enumerate(WEIGHTS):
        gain = at_prior - _loss_at(weight, spec, grain, parent)
        gains.append(_sum_finite(sf.col("weight") * gain).alias(f"g{place}"))
    names = [f"g{place}" for place in range(len(WEIGHTS))]
    loss = _sum_finite(sf.col("weight") * at_prior).alias("loss")
    # Rows of one group and stretch err together: their gains are one observation.
    group = sf.col("group_ids")[grain].alias("group")
    of_groups = rows.groupBy("stretch", group).agg(loss, *gains)
    sums = [sf.sum(name).alias(name) for name in ("loss", *names)]
    products = sums_of_products([sf.col(name) for name in names])
    grouped = of_groups.groupBy("stretch").agg(sf.count("*").alias("n_groups"), *sums, *products)
    by_stretch = grouped.toPandas().sort_values("stretch")
    return Gains(
        loss=float(by_stretch["loss"].sum()),
        by_stretch=by_stretch[names].to_numpy(dtype=float),
        products=symmetric_matrices(by_stretch, len(WEIGHTS)),
        n_groups=by_stretch["n_groups"].to_numpy(dtype=np.int64),
    )


def _sum_finite(values: Column) -> Column:
    """The sum of those that a double holds: what it does not hold decides nothing."""
    return sf.coalesce(sf.sum(finite(values)), sf.lit(0.0))


def _is_evidence(grain: int) -> Column:
    """Whether a row lets a grain's models be compared with the answers of the coarser ones.

    In stretches before the tune split some groups have too few rows to be predicted.
    """
    is_evidence = sf.col(f"p{grain}").isNotNull()
    for coarser in range(grain):
        is_evidence &= ~sf.col(f"has_model{coarser}") | sf.col(f"p{coarser}").isNotNull()
    return is_evidence


def _loss_at(weight: float, spec: FleetSpec, grain: int, parent: Column) -> Column:
    """The own loss of a row at a weight of the own prediction."""
    return answer_loss(spec, _answer_at(weight, grain, parent))


def _answer_at(weight: float, grain: int, parent: Column) -> Column:
    """A grain's answer, as an expression no longer than it must be: finer grains repeat it."""
    own = sf.col(f"p{grain}")
    if weight == 0.0:
        return parent
    if weight == 1.0:
        return sf.coalesce(own, parent)
    return blend(sf.lit(weight), own, parent)


def _better_than_parent(rows: DataFrame, spec: FleetSpec, grain: int, parent: Column) -> set[str]:
    """The groups whose own model has less loss than their parent's answer."""
    gain = _loss_at(0.0, spec, grain, parent) - _loss_at(1.0, spec, grain, parent)
    group = sf.col("group_ids")[grain].alias("group")
    gains = rows.groupBy(group).agg(_sum_finite(sf.col("weight") * gain).alias("gain"))
    return {row["group"] for row in gains.where("gain > 0").select("group").collect()}
