"""Contenders compared on the same report rows, in the fleet's own loss, for paired tests."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.models.promotion import losing_groups
from pipeline.spark.blending import blended_answers, with_weights
from pipeline.spark.keys import inverse_link_column, moment_column, moment_of
from pipeline.spark.measures import SMALLEST, binary_log_loss, clipped_deviance, pinball_loss
from pipeline.spec import HUBER, MULTICLASS, QUANTILE, FleetSpec
from pipeline.tables import BY_CONSTANT, BY_PARENT
from pipeline.training.blend import GroupSkill

# Stretches of the report split whose sums are compared.
N_STRETCHES = 24
# A smaller share of a sum of squares is rounding: the gain is the same in all stretches.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Paired:
    """One answer to a row beside its rivals.

    Args:
        grain: index of the grain.
        group: the row's group there.
        ours: loss of the answer, as from `row_loss`.
        rivals: losses of what it is compared with, by name; null where a rival does not answer the
            row.
    """

    grain: int
    group: Column
    ours: Column
    rivals: Mapping[str, Column]


def in_target_units(spec: FleetSpec, answer: Column) -> Column:
    """An answer in link space less the offset, over the scale, as a value of the target."""
    return inverse_link_column(sf.col("offset") + sf.col("scale") * answer, spec.target.transform)


def row_loss(spec: FleetSpec, answer: Column) -> Column:
    """The fleet's own loss of one row, on the target's scale; for multiclass of one class of a row.

    Args:
        spec: the fleet.
        answer: in target units, for classes a probability; where it is null, so is the loss.
    """
    actual = sf.col("actual")
    # Clipped only where there is an answer: greatest() would take the bound for a null.
    if spec.task == MULTICLASS:
        log_loss = -sf.log(sf.greatest(answer, sf.lit(SMALLEST)))
        of_class = sf.when(actual > 0, log_loss).otherwise(0.0)
        return sf.when(answer.isNotNull(), of_class)
    if spec.is_class_task:
        return binary_log_loss(actual, answer)
    if spec.variance_power is not None:
        return clipped_deviance(actual, answer, spec.variance_power)
    return _loss_of_error(spec, actual - answer)


def _loss_of_error(spec: FleetSpec, error: Column) -> Column:
    """The loss of actual less answer, for objectives that see nothing else."""
    if spec.objective == QUANTILE:
        return pinball_loss(error, spec.alpha)
    if spec.objective == HUBER:
        # Trees see the error over the scale.
        bend = (spec.alpha or 1.0) * sf.col("scale")
        beyond = bend * (sf.abs(error) - bend / 2)
        return sf.when(sf.abs(error) <= bend, error * error / 2).otherwise(beyond)
    if spec.objective == "l1":
        return sf.abs(error)
    return error * error


def answer_loss(spec: FleetSpec, answer: Column) -> Column:
    """The own loss of a row at an answer in link space less the offset, over the scale."""
    return row_loss(spec, in_target_units(spec, answer))


def compare_answers(
    rows: DataFrame, spec: FleetSpec, contests: Sequence[Paired], report_start: pd.Timestamp
) -> pd.DataFrame:
    """Mean losses of every group, and how steady each gain is over stretches of time.

    One Spark job and a small one.

    Args:
        rows: report rows as from `evaluation.judged_rows`; rows of weight 0 count for nothing.
        spec: the fleet.
        contests: who answers, and beside whom.
        report_start: where the report split begins.

    Returns:
        One row per group with such rows: grain, group_id, n_rows, n_blocks (stretches with rows),
        loss and loss_sum (of ours, weighted); and for each rival, on the rows that it answers:
        loss_<rival>, loss_sum_<rival>, gain_<rival> (its mean loss less ours), gain_error_<rival>
        (standard error of that), n_rows_<rival> and n_blocks_<rival>.

    Source: ratio estimator over clusters, Cochran (1977), section 6.4.
    """
    rivals = _rivals_of(contests)
    rows = rows.where(sf.col("weight") > 0)
    newest = rows.agg(sf.unix_micros(sf.max("time"))).collect()[0][0]
    if newest is None:
        return pd.DataFrame(columns=["grain", "group_id", *_measured(rivals)])
    start = moment_column(report_start).cast("double")
    end = moment_column(moment_of(newest)).cast("double")
    place = sf.floor((sf.col("time").cast("double") - start) / (end - start + 1) * N_STRETCHES)
    counted = sf.lit(1.0)
    if spec.task == MULTICLASS:
        # One of a row's classes is the actual one.
        counted = sf.col("actual")
    levels = [_level_of(contest, rivals) for contest in contests]
    exploded = rows.select(
        sf.least(place, sf.lit(N_STRETCHES - 1)).alias("stretch"),
        sf.col("weight"),
        counted.alias("counted"),
        sf.explode(sf.array(*levels)).alias("level"),
    )
    groups = exploded.groupBy("level.grain", "level.group_id", "stretch")
    stretches = groups.agg(*_sums_of_rows(rivals))
    totals = stretches.groupBy("grain", "group_id").agg(
        sf.count("*").alias("n_blocks"), *_sums_of_stretches(rivals)
    )
    return _as_measured(totals.toPandas(), rivals)


def _rivals_of(contests: Sequence[Paired]) -> list[str]:
    """Whoever answers beside any of the answers, in the order they are named."""
    rivals: dict[str, None] = {}
    for contest in contests:
        rivals |= dict.fromkeys(contest.rivals)
    return list(rivals)


def _level_of(contest: Paired, rivals: Sequence[str]) -> Column:
    """One comparison of a row: its grain and group, our loss, and each rival's loss or null."""
    nothing = sf.lit(None)
    losses = []
    for name in rivals:
        losses.append(contest.rivals.get(name, nothing).cast("double").alias(name))
    return sf.struct(
        sf.lit(contest.grain).alias("grain"),
        contest.group.alias("group_id"),
        contest.ours.alias("ours"),
        *losses,
    )


def _sums_of_rows(rivals: Sequence[str]) -> list[Column]:
    """Sums over the rows of a stretch: ours, and each rival's on the rows that both answer."""
    counted = sf.col("counted")
    weight = sf.col("weight")
    ours = sf.col("level.ours")
    sums = [
        sf.sum(counted).alias("n_rows"),
        sf.sum(weight * counted).alias("weight"),
        sf.sum(weight * ours).alias("ours"),
    ]
    for name in rivals:
        theirs = sf.col(f"level.`{name}`")
        answered = theirs.isNotNull() & ours.isNotNull()
        sums += [
            sf.sum(sf.when(answered, counted)).alias(f"n_{name}"),
            sf.sum(sf.when(answered, weight * counted)).alias(f"w_{name}"),
            sf.sum(sf.when(answered, weight * theirs)).alias(f"l_{name}"),
            sf.sum(sf.when(answered, weight * (theirs - ours))).alias(f"d_{name}"),
        ]
    return sums


def _sums_of_stretches(rivals: Sequence[str]) -> list[Column]:
    """Sums over the stretches of a group, with the products that a ratio's standard error needs."""
    sums = [sf.sum(name).alias(name) for name in ("n_rows", "weight", "ours")]
    for name in rivals:
        d = sf.col(f"d_{name}")
        w = sf.col(f"w_{name}")
        for part in ("n", "w", "l", "d"):
            sums.append(sf.sum(f"{part}_{name}").alias(f"{part}_{name}"))
        sums += [
            sf.count(d).alias(f"b_{name}"),
            sf.sum(d * d).alias(f"dd_{name}"),
            sf.sum(d * w).alias(f"dw_{name}"),
            sf.sum(w * w).alias(f"ww_{name}"),
        ]
    return sums


def _measured(rivals: Sequence[str]) -> list[str]:
    """The columns of measures, as `compare_answers` returns them."""
    columns = ["n_rows", "n_blocks", "loss", "loss_sum"]
    for rival in rivals:
        for name in ("loss", "loss_sum", "gain", "gain_error", "n_rows", "n_blocks"):
            columns.append(f"{name}_{rival}")
    return columns


def _as_measured(sums: pd.DataFrame, rivals: Sequence[str]) -> pd.DataFrame:
    """Means with the standard errors of ratios, from sums over stretches."""
    summed = sums.columns.drop(["grain", "group_id"])
    sums = sums.astype(dict.fromkeys(summed, float))
    measures = {name: sums[name] for name in ("grain", "group_id", "n_rows", "n_blocks")}
    measures["loss"] = sums["ours"] / sums["weight"]
    measures["loss_sum"] = sums["ours"]
    for rival in rivals:
        n = sums[f"b_{rival}"]
        weight = sums[f"w_{rival}"]
        dd = sums[f"dd_{rival}"]
        gain = sums[f"d_{rival}"] / weight
        squares = dd - 2 * gain * sums[f"dw_{rival}"] + gain**2 * sums[f"ww_{rival}"]
        squares = squares.clip(lower=0.0)
        squares = squares.where(squares > _ROUNDING * dd, 0.0)
        measures |= {
            f"loss_{rival}": sums[f"l_{rival}"] / weight,
            f"loss_sum_{rival}": sums[f"l_{rival}"],
            f"gain_{rival}": gain,
            f"gain_error_{rival}": (n / (n - 1).clip(lower=1) * squares) ** 0.5 / weight,
            f"n_rows_{rival}": sums[f"n_{rival}"],
            f"n_blocks_{rival}": n,
        }
    return pd.DataFrame(measures)


def answer_losers_otherwise(
    judged: DataFrame,
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    has_model: Sequence[Collection[str]],
    constant: Column,
    report_start: pd.Timestamp,
) -> dict[GroupKey, GroupSkill]:
    """Leave finest groups to their parent, or the constant, where that is significantly better.

    Coarser groups stay as they are: a finer group may need what they do badly over all their rows.

    Args:
        judged: rows as from `evaluation.judged_rows`.
        spec: the fleet.
        skills: weights as learnt, by group.
        has_model: per grain the groups that were trained.
        constant: what answers without a model, as from `blending.constant_column`.
        report_start: where the report split begins.

    Returns:
        The skills; those of groups that lose have weight 0 and say in answered_by who answers.
    """
    rows = judged.where("split = 'report' AND residual IS NOT NULL")
    rows = with_weights(rows, skills, has_model)
    finest = len(spec.grains) - 1
    *_, parent, own = [constant, *blended_answers(len(spec.grains), constant)]
    rivals = {BY_PARENT: answer_loss(spec, parent), BY_CONSTANT: answer_loss(spec, constant)}
    paired = Paired(finest, sf.col("group_ids")[finest], answer_loss(spec, own), rivals)
    answered = dict(skills)
    for key, rival in losing_groups(compare_answers(rows, spec, [paired], report_start)).items():
        if key in skills:
            answered[key] = skills[key].left_to(rival)
    return answered
