"""Choosing the blend's weights on Spark: what each weight gains, in the fleet's own loss."""

from collections.abc import Collection, Sequence
from itertools import combinations_with_replacement

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.spark.keys import finite
from pipeline.spark.losses import in_target_units, row_loss
from pipeline.spec import FleetSpec
from pipeline.training.blend import WEIGHTS, Gains, choose_weight
from pipeline.training.splits import EARLIER

# The pooled model is trusted without evidence: its parent is a constant.
PRIORS = (1.0, 0.0)


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
    evidence = judged.where("stretch IS NOT NULL AND residual IS NOT NULL")
    answer = constant
    weights: list[dict[str, float]] = []
    for grain, groups in enumerate(has_model):
        prior = PRIORS[min(grain, 1)]
        own = sf.col(f"p{grain}")
        if spec.pooling == "none":
            weights.append(dict.fromkeys(groups, 1.0))
            continue
        rows = evidence.where(_is_evidence(grain))
        if spec.pooling == "select":
            better = _better_than_parent(rows, spec, grain, own, answer)
            weights.append({group: float(group in better) for group in groups})
            evidence, weight = _with_weights(evidence, grain, better)
            blended = weight * own + (1 - weight) * answer
            answer = sf.when(own.isNull(), answer).otherwise(blended)
        else:
            common = choose_weight(sum_gains(rows, spec, grain, answer, prior), prior)
            weights.append(dict.fromkeys(groups, common))
            answer = _blend(common, own, answer)
    return weights


def _blend(weight: float, own: Column, parent: Column) -> Column:
    """A grain's answer, no longer an expression than it must be; the parent's without an own."""
    if weight == 0.0:
        return parent
    if weight == 1.0:
        return sf.coalesce(own, parent)
    return sf.when(own.isNull(), parent).otherwise(weight * own + (1 - weight) * parent)


def sum_gains(rows: DataFrame, spec: FleetSpec, grain: int, parent: Column, prior: float) -> Gains:
    """What each weight of a grain's own models gains; one Spark job.

    Args:
        rows: evidence, as from `evaluation.judged_rows`.
        spec: the fleet.
        grain: index of the grain.
        parent: the answer of the grain above.
        prior: the weight that gains are measured from.
    """
    own = sf.col(f"p{grain}")
    at_prior = _loss_at(prior, spec, own, parent)
    gains = []
    for place, weight in enumerate(WEIGHTS):
        gain = sf.col("weight") * (at_prior - _loss_at(weight, spec, own, parent))
        # A loss that no double holds decides nothing.
        gains.append(sf.coalesce(sf.sum(finite(gain)), sf.lit(0.0)).alias(f"g{place}"))
    # Rows of one group and stretch err together: their gains are one observation.
    of_prior = sf.sum(finite(sf.col("weight") * at_prior))
    at_start = sf.coalesce(of_prior, sf.lit(0.0)).alias("loss")
    group = sf.col("group_ids")[grain].alias("group")
    of_groups = rows.groupBy("stretch", group).agg(at_start, *gains)
    pairs = list(combinations_with_replacement(range(len(WEIGHTS)), 2))
    sums = [sf.sum("loss").alias("loss"), sf.count("*").alias("n_groups")]
    sums += [sf.sum(f"g{place}").alias(f"g{place}") for place in range(len(WEIGHTS))]
    sums += [sf.sum(sf.col(f"g{i}") * sf.col(f"g{j}")).alias(f"g{i}_{j}") for i, j in pairs]
    by_stretch = of_groups.groupBy("stretch").agg(*sums).toPandas().sort_values("stretch")
    products = np.zeros((len(by_stretch), len(WEIGHTS), len(WEIGHTS)))
    for i, j in pairs:
        products[:, i, j] = products[:, j, i] = by_stretch[f"g{i}_{j}"]
    names = [f"g{place}" for place in range(len(WEIGHTS))]
    loss = float(by_stretch["loss"].sum())
    n_groups = by_stretch["n_groups"].to_numpy(dtype=np.int64)
    return Gains(loss, by_stretch[names].to_numpy(dtype=float), products, n_groups)


def _is_evidence(grain: int) -> Column:
    """Whether a row lets a grain's models be compared with the answers of the coarser ones.

    In stretches before the tune split some groups have too few rows to be predicted.
    """
    is_evidence = sf.col(f"p{grain}").isNotNull()
    for coarser in range(grain):
        is_missing = sf.col(f"has_model{coarser}") & sf.col(f"p{coarser}").isNull()
        is_evidence &= (sf.col("split") != EARLIER) | ~is_missing
    return is_evidence


def _loss_at(weight: float, spec: FleetSpec, own: Column, parent: Column) -> Column:
    """The own loss of a row at a weight of the own prediction."""
    if weight == 0.0:
        return row_loss(spec, in_target_units(spec, parent))
    if weight == 1.0:
        return row_loss(spec, in_target_units(spec, own))
    return row_loss(spec, in_target_units(spec, weight * own + (1 - weight) * parent))


def _better_than_parent(
    rows: DataFrame, spec: FleetSpec, grain: int, own: Column, parent: Column
) -> set[str]:
    """The groups whose own model has less loss than their parent's answer."""
    gain = sf.col("weight") * (_loss_at(0.0, spec, own, parent) - _loss_at(1.0, spec, own, parent))
    gains = rows.groupBy(sf.col("group_ids")[grain].alias("group")).agg(
        sf.sum(finite(gain)).alias("gain")
    )
    return {row["group"] for row in gains.where("gain > 0").select("group").collect()}


def _with_weights(rows: DataFrame, grain: int, groups: Collection[str]) -> tuple[DataFrame, Column]:
    """The rows with their group's weight beside them: 1 for the named groups, else 0."""
    name = f"_better{grain}"
    named = rows.sparkSession.createDataFrame(
        [(group,) for group in sorted(groups)], f"{name} string"
    )
    is_own = sf.col("group_ids")[grain] == sf.col(name)
    joined = rows.join(sf.broadcast(named), is_own, "left")
    return joined, sf.col(name).isNotNull().cast("double")
