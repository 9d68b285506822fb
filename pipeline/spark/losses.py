"""Contenders compared on the same report rows, in the fleet's own loss, for paired tests."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.models.promotion import losing_groups
from pipeline.spark.evaluation import constant_column
from pipeline.spark.keys import inverse_link_column, moment_column, moment_of
from pipeline.spark.measures import SMALLEST, binary_log_loss, clipped_deviance, pinball_loss
from pipeline.spec import HUBER, MULTICLASS, QUANTILE, FleetSpec
from pipeline.tables import BY_CONSTANT, BY_PARENT
from pipeline.training.blend import Constants, GroupSkill

# Stretches of the report split whose sums are compared.
N_STRETCHES = 24
# Sums of squares of what is the same in all stretches leave rounding only.
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


def level_answers(
    own: Sequence[Column], weights: Sequence[Column], is_cut: Sequence[Column], constant: Column
) -> list[Column]:
    """Each level's blended answer, link space less offset, over scale (for classes probabilities).

    Args:
        own: prediction of each grain's own model; null without one.
        weights: of the own models; null without one.
        is_cut: whether the level is answered by the constant, whatever is above it.
        constant: what answers without any model.
    """
    answers, answer = [], constant
    for prediction, weight, cut in zip(own, weights, is_cut, strict=True):
        blended = sf.when(prediction.isNull() | weight.isNull(), answer)
        blended = blended.otherwise(weight * prediction + (1 - weight) * answer)
        answer = sf.when(cut, constant).otherwise(blended)
        answers.append(answer)
    return answers


def in_target_units(spec: FleetSpec, answer: Column) -> Column:
    """An answer in link space less the offset, over the scale, as a value of the target."""
    return inverse_link_column(sf.col("offset") + sf.col("scale") * answer, spec.target.transform)


def row_loss(spec: FleetSpec, answer: Column) -> Column:
    """The fleet's own loss of one row, on the target's scale; for multiclass of one class of a row.

    Args:
        spec: the fleet.
        answer: in target units, for classes a probability; the loss is null where it is.
    """
    actual = sf.col("actual")
    # Clipped only where there is an answer: greatest() would take the bound for a null.
    if spec.task == MULTICLASS:
        of_class = sf.when(actual > 0, -sf.log(sf.greatest(answer, sf.lit(SMALLEST)))).otherwise(
            0.0
        )
        return sf.when(answer.isNotNull(), of_class)
    if spec.is_class_task:
        return binary_log_loss(actual, answer)
    error = actual - answer
    if spec.objective == QUANTILE:
        return pinball_loss(error, spec.alpha)
    if spec.variance_power is not None:
        return clipped_deviance(actual, answer, spec.variance_power)
    if spec.objective == HUBER:
        # Trees see the error over the scale.
        bend = (spec.alpha or 1.0) * sf.col("scale")
        return sf.when(sf.abs(error) <= bend, error * error / 2).otherwise(
            bend * (sf.abs(error) - bend / 2)
        )
    return sf.abs(error) if spec.objective == "l1" else error * error


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
    rivals = list(dict.fromkeys(name for contest in contests for name in contest.rivals))
    rows = rows.where(sf.col("weight") > 0)
    newest = rows.agg(sf.unix_micros(sf.max("time"))).collect()[0][0]
    if newest is None:
        return pd.DataFrame(columns=["grain", "group_id", *_measured(rivals)])
    start = moment_column(report_start).cast("double")
    end = moment_column(moment_of(newest)).cast("double")
    place = sf.floor((sf.col("time").cast("double") - start) / (end - start + 1) * N_STRETCHES)
    counted = sf.col("actual") if spec.task == MULTICLASS else sf.lit(1.0)
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


def _level_of(contest: Paired, rivals: Sequence[str]) -> Column:
    """One comparison of a row: its grain and group, our loss, and each rival's loss or null."""
    nothing = sf.lit(None)
    losses = []
    for name in rivals:
        losses.append(contest.rivals.get(name, nothing).cast("double").alias(name))
    group, ours = contest.group.alias("group_id"), contest.ours.alias("ours")
    return sf.struct(sf.lit(contest.grain).alias("grain"), group, ours, *losses)


def _sums_of_rows(rivals: Sequence[str]) -> list[Column]:
    """Sums over the rows of a stretch: ours, and each rival's on the rows that both answer."""
    counted, weight, ours = sf.col("counted"), sf.col("weight"), sf.col("level.ours")
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
        d, w = sf.col(f"d_{name}"), sf.col(f"w_{name}")
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
    names = ("loss", "loss_sum", "gain", "gain_error", "n_rows", "n_blocks")
    return [
        "n_rows",
        "n_blocks",
        "loss",
        "loss_sum",
        *(f"{name}_{rival}" for rival in rivals for name in names),
    ]


def _as_measured(sums: pd.DataFrame, rivals: Sequence[str]) -> pd.DataFrame:
    """Means with the standard errors of ratios, from sums over stretches."""
    sums = sums.astype({name: float for name in sums.columns if name not in ("grain", "group_id")})
    found = {name: sums[name] for name in ("grain", "group_id", "n_rows", "n_blocks")}
    found |= {"loss": sums["ours"] / sums["weight"], "loss_sum": sums["ours"]}
    for rival in rivals:
        n, weight, d, dd = (sums[f"{part}_{rival}"] for part in ("b", "w", "d", "dd"))
        gain = d / weight
        squares = (dd - 2 * gain * sums[f"dw_{rival}"] + gain**2 * sums[f"ww_{rival}"]).clip(
            lower=0.0
        )
        squares = squares.where(squares > _ROUNDING * dd, 0.0)
        found |= {
            f"loss_{rival}": sums[f"l_{rival}"] / weight,
            f"loss_sum_{rival}": sums[f"l_{rival}"],
            f"gain_{rival}": gain,
            f"gain_error_{rival}": (n / (n - 1).clip(lower=1) * squares) ** 0.5 / weight,
            f"n_rows_{rival}": sums[f"n_{rival}"],
            f"n_blocks_{rival}": n,
        }
    return pd.DataFrame(found)


def answer_losers_otherwise(
    judged: DataFrame,
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    has_model: Sequence[Collection[str]],
    constants: Constants,
    classes: Sequence[str],
    report_start: pd.Timestamp,
) -> dict[GroupKey, GroupSkill]:
    """Leave finest groups to their parent, or the constant, where that is significantly better.

    Coarser groups stay as they are: what they do badly over all their rows, some finer group that
    leans on them may need.

    Args:
        judged: rows as from `evaluation.judged_rows`.
        spec: the fleet.
        skills: weights as learnt, by group.
        has_model: per grain the groups that were trained.
        constants: what answers without a model.
        classes: of the target; empty for regression.
        report_start: where the report split begins.

    Returns:
        The skills; those of groups that lose have weight 0 and say in answered_by who answers.
    """
    rows = judged.where("split = 'report' AND residual IS NOT NULL")
    grains = range(len(spec.grains))
    weights = []
    for grain in grains:
        rows = rows.join(
            sf.broadcast(_weight_table(rows, grain, skills, has_model[grain])),
            _same_group(grain),
            "left",
        )
        weights.append(sf.col(f"_w{grain}"))
    constant = constant_column(constants, classes)
    own = [sf.col(f"p{grain}") for grain in grains]
    answers = [constant, *level_answers(own, weights, [sf.lit(False) for _ in grains], constant)]
    plain, parent, ours = (
        row_loss(spec, in_target_units(spec, answer)) for answer in (constant, *answers[-2:])
    )
    paired = Paired(
        grains[-1], sf.col("group_ids")[grains[-1]], ours, {BY_PARENT: parent, BY_CONSTANT: plain}
    )
    losers = losing_groups(compare_answers(rows, spec, [paired], report_start))
    left = {GroupKey(*key): by for key, by in losers.items()}
    return {**skills, **{key: skills[key].left_to(by) for key, by in left.items() if key in skills}}


def _same_group(grain: int) -> Column:
    return sf.col("group_ids")[grain] == sf.col(f"_g{grain}")


def _weight_table(
    rows: DataFrame, grain: int, skills: Mapping[GroupKey, GroupSkill], has_model: Collection[str]
) -> DataFrame:
    """The weight of each group of a grain that has a model."""
    table = [
        (group, skill.weight)
        for (level, group), skill in skills.items()
        if level == grain and group in has_model
    ]
    return rows.sparkSession.createDataFrame(table, f"_g{grain} string, _w{grain} double")
