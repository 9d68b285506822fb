"""Judging a run on its held-out rows: sums for the blend, then errors against baselines."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.spark.keys import finite, inverse_link_column, link_column, moment_column
from pipeline.spark.measures import (
    baseline_measures,
    row_errors,
    row_means,
    row_measures,
    shown_measures,
)
from pipeline.spec import CONTENDERS, MULTICLASS, QUANTILE, FleetSpec
from pipeline.training.blend import N_BLOCKS, Constants, GroupSkill, Moments
from pipeline.training.splits import REPORT, TUNE, Cutoffs

# An interval from n rows contains up to 1 / (n + 1) more answers than it should: from here on about
# 3 in 100 at most.
MIN_INTERVAL_ROWS = 30


def nearest_predictions(holdout: DataFrame) -> DataFrame:
    """What the finest model that has a prediction says of each row: row_key and `_base`."""
    grain = sf.when(sf.col("prediction").isNotNull(), sf.col("grain"))
    return holdout.groupBy("row_key").agg(sf.max_by("prediction", grain).alias("_base"))


def judged_rows(
    holdout: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    constants: Constants,
    has_model: Sequence[Collection[str]] = (),
) -> DataFrame:
    """One row per held-out row, with each grain's own prediction side by side.

    For multiclass one per row and class.

    Args:
        holdout: as in `tables.HOLDOUT`, of one run.
        spec: the fleet.
        cutoffs: the run's dates.
        constants: what answers without a model.
        has_model: per grain the groups that have a model; a row that one of its groups with a model
            has not predicted is left out (it is not in a coarse group's sample, or only an earlier
            run had it).

    Returns:
        Beside the columns of the holdout: p0, p1, ... (the grains' predictions), residual (the
        target as models see it), block (stretch of the tune split), blend_weight (the row's weight
        where the blend is learnt).
    """
    tune_start = moment_column(cutoffs.tune_start)
    report_start = moment_column(cutoffs.report_start)
    now = sf.when(sf.col("time") >= report_start, REPORT).when(sf.col("time") >= tune_start, TUNE)
    # Out-of-fold predictions of fit rows are for children to correct. A group that kept an older
    # model was held out at older dates: what chose its parameters then may not report on it now.
    is_honest = sf.col("split").isin(TUNE, REPORT) & ~((sf.col("split") == TUNE) & (now == REPORT))
    # An earlier release held out rows of weight 0, too.
    counts = now.isNotNull() & (sf.col("weight") > 0)
    held_out = holdout.where(is_honest & counts).withColumn("split", now)
    judged = _side_by_side(held_out, len(spec.grains))
    linked = link_column(sf.col("actual"), spec.target.transform)
    residual = finite((linked - sf.col("offset")) / sf.col("scale"))
    start, end = tune_start.cast("double"), report_start.cast("double")
    block = sf.floor((sf.col("time").cast("double") - start) / (end - start) * N_BLOCKS).cast("int")
    block = sf.when(sf.col("split") == TUNE, block).otherwise(0)
    judged = judged.withColumn("residual", residual).withColumn("block", block)
    for grain, groups in enumerate(has_model):
        judged = _without_unanswered(judged, grain, groups)
    return judged.withColumn("blend_weight", _blend_weight(spec, constants))


def _side_by_side(held_out: DataFrame, n_grains: int) -> DataFrame:
    """One row per held-out row, with each grain's own prediction."""
    shared = ("time", "actual", "offset", "scale", "group_ids")
    predictions = []
    for grain in range(n_grains):
        own = sf.when(sf.col("grain") == grain, sf.col("prediction"))
        predictions.append(sf.max(own).alias(f"p{grain}"))
    return held_out.groupBy("row_key", "split", "class_name").agg(
        *(sf.first(name).alias(name) for name in shared),
        # In a coarse group's sample a row weighs more, as it stands for others.
        sf.max("weight").alias("weight"),
        *predictions,
    )


def _without_unanswered(judged: DataFrame, grain: int, groups: Collection[str]) -> DataFrame:
    """The rows without those that a group with a model has not held out."""
    named = judged.sparkSession.createDataFrame(
        [(group,) for group in sorted(groups)], f"_m{grain} string"
    )
    is_own = sf.col("group_ids")[grain] == sf.col(f"_m{grain}")
    is_answered = (
        sf.col(f"_m{grain}").isNull()
        | sf.col(f"p{grain}").isNotNull()
        | sf.col("residual").isNull()
    )
    return judged.join(sf.broadcast(named), is_own, "left").where(is_answered).drop(f"_m{grain}")


def _blend_weight(spec: FleetSpec, constants: Constants) -> Column:
    """The row's weight.

    For quantiles in the tune split times the side of the pooled answer that the row lies on.

    Squared errors weighed by alpha above an answer and by 1 - alpha below it are those of
    asymmetric least squares: they are smallest near the quantile as plain ones are near the mean.
    Source: Newey and Powell (1987).
    """
    if spec.objective != QUANTILE:
        return sf.col("weight")
    is_above = sf.col("residual") > sf.coalesce(sf.col("p0"), sf.lit(constants.with_offset))
    side = sf.when(is_above, spec.alpha).otherwise(1 - (spec.alpha or 0.5))
    return sf.when(sf.col("split") == TUNE, sf.col("weight") * side).otherwise(sf.col("weight"))


def constant_column(constants: Constants, classes: Sequence[str]) -> Column:
    """What answers a row, for multiclass a row's class, without any model.

    In link space less the offset, over the scale.
    """
    if not constants.prior:
        return sf.lit(constants.with_offset)
    pairs = [
        sf.lit(part)
        for name, share in zip(classes, constants.prior, strict=True)
        for part in (name, share)
    ]
    return sf.element_at(sf.create_map(*pairs), sf.col("class_name"))


def sum_moments(
    judged: DataFrame, n_grains: int, constants: Constants, classes: Sequence[str]
) -> Moments:
    """Add up products of target and predictions per finest group and split; one Spark job.

    Each class has a constant of its own, and the sums know but one: for multiclass they are of
    differences from the prior.
    """
    prior = constant_column(constants, classes) if constants.prior else sf.lit(0.0)
    predictions = (
        sf.coalesce(sf.col(f"p{grain}") - prior, sf.lit(0.0)) for grain in range(n_grains)
    )
    vector = [sf.lit(1.0), sf.col("residual") - prior, *predictions]
    pairs = [(i, j) for i in range(len(vector)) for j in range(i, len(vector))]
    sums = [
        sf.sum(sf.col("blend_weight") * vector[i] * vector[j]).alias(f"s{i}_{j}") for i, j in pairs
    ]
    found = (
        judged.where(sf.col("residual").isNotNull())
        .groupBy("split", "block", "group_ids")
        .agg(sf.count("*").alias("n_rows"), *sums)
        .toPandas()
    )
    # A fixed order, so that sums over groups are the same to the last bit from run to run.
    found["group_ids"] = found["group_ids"].map(tuple)
    found = found.sort_values(["split", "block", "group_ids"], ignore_index=True)
    products = np.zeros((len(found), len(vector), len(vector)))
    for i, j in pairs:
        products[:, i, j] = products[:, j, i] = found[f"s{i}_{j}"]
    groups = np.array(found["group_ids"].tolist(), dtype=object).reshape(len(found), n_grains)
    n_rows = found["n_rows"].to_numpy(dtype=np.float64)
    return Moments(
        found["split"].to_numpy(dtype=object),
        found["block"].to_numpy(dtype=np.int64),
        groups,
        n_rows,
        products,
    )


def measure_groups(
    judged: DataFrame,
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    constants: Constants,
    has_model: Sequence[set[str]],
    classes: Sequence[str],
    rows: DataFrame,
) -> pd.DataFrame:
    """Errors on every group's report rows, in target units; one Spark job.

    They are those of the fleet, the pooled model, the constant and the baselines.

    Args:
        judged: as from `judged_rows`.
        spec: the fleet.
        skills: weights by group.
        constants: what answers without a model.
        has_model: per grain the groups that were trained.
        classes: of the target, in order; empty for regression.
        rows: rows of the feature table, which the baselines are read from: they may be declared
            after a group was trained.

    Returns:
        One row per group with report rows: grain, group_id, report_rows, and the ledger's rmse,
        mae, mape, pooled_rmse, pooled_mape, intervals (JSON; null for classes), baselines and
        metrics (JSON).
    """
    constant = constant_column(constants, classes)
    report = judged.where("split = 'report'")
    report, fleet = _with_blended_answer(report, spec, skills, has_model, constant)
    titles = list(spec.all_baselines)
    if titles:
        report = report.join(baseline_answers(rows, spec), "row_key", "left")
    baselines = {f"b{number}": baseline_answer(spec, number) for number in range(len(titles))}
    contenders = [*CONTENDERS, *baselines]
    anchored = sf.col("offset").isNotNull() & sf.col("scale").isNotNull()

    def answer(residual: Column) -> Column:
        linked = sf.col("offset") + sf.col("scale") * residual
        linked = sf.when(anchored, linked).otherwise(sf.lit(constants.without_offset))
        return inverse_link_column(linked, spec.target.transform)

    answered = report.select(
        "row_key",
        "class_name",
        "actual",
        "group_ids",
        answer(fleet).alias("fleet"),
        answer(sf.coalesce(sf.col("p0"), constant)).alias("pooled"),
        answer(constant).alias("constant"),
        *(column.alias(name) for name, column in baselines.items()),
        sf.when(anchored, sf.abs(sf.col("residual") - fleet)).alias("miss"),
    )
    errors = row_errors(answered, spec, contenders, classes)
    by_level = errors.select("*", sf.posexplode("group_ids").alias("grain", "group_id"))
    measured = by_level.groupBy("grain", "group_id").agg(
        sf.count("*").alias("report_rows"),
        *row_means(spec, contenders),
        *baseline_measures(spec, len(titles)),
    )
    if not spec.is_class_task:
        misses = errors.select("miss", sf.posexplode("group_ids").alias("grain", "group_id"))
        widths = half_widths(misses, spec.scoring.levels)
        measured = measured.join(widths, ["grain", "group_id"], "left")
    return _as_ledger(measured.toPandas(), spec, titles)


def _with_blended_answer(
    report: DataFrame,
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    has_model: Sequence[set[str]],
    constant: Column,
) -> tuple[DataFrame, Column]:
    """The rows with their groups' weights beside them, and the fleet's answer to each of them."""
    answer = constant
    for grain in range(len(spec.grains)):
        weights = []
        for (level, group), skill in skills.items():
            if level == grain and (group in has_model[grain] or skill.is_cut):
                weights.append((group, skill.weight, skill.is_cut))
        columns = f"_g{grain} string, _w{grain} double, _cut{grain} boolean"
        table = sf.broadcast(report.sparkSession.createDataFrame(weights, columns))
        report = report.join(table, sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left")
        weight, own = sf.coalesce(sf.col(f"_w{grain}"), sf.lit(0.0)), sf.col(f"p{grain}")
        blended = weight * own + (1 - weight) * answer
        blended = sf.when(own.isNull(), answer).otherwise(blended)
        answer = sf.when(sf.col(f"_cut{grain}"), constant).otherwise(blended)
    return report, answer


def baseline_answers(rows: DataFrame, spec: FleetSpec) -> DataFrame:
    """What the baselines say of each row: row_key, and _b0, _b1, ... as they are declared.

    A baseline that was declared after the table was made answers no row of it.
    """
    columns = []
    for number, name in enumerate(spec.all_baselines.values()):
        answer = sf.col(f"`{name}`") if name in rows.columns else sf.lit(None).cast("double")
        columns.append(answer.alias(f"_b{number}"))
    return rows.select("row_key", *columns)


def baseline_answer(spec: FleetSpec, number: int) -> Column:
    """A baseline's answer in target units.

    For classes the probability that it gives to the row's class, null without an answer.
    """
    value = sf.col(f"_b{number}")
    if spec.task == MULTICLASS:
        return (value.cast("string") == sf.col("class_name")).cast("double")
    return finite(value.try_cast("double"))


def half_widths(misses: DataFrame, levels: Sequence[float]) -> DataFrame:
    """Half widths of every group's intervals: split conformal prediction, exact order statistics.

    Of n misses it is the k-th smallest, k = ceil((n + 1) level): if the rows to come are like these
    n, an answer misses by more in at most 1 - level of the cases, whatever the model and the
    distribution. Rows count alike, whatever their weight. Ranks are made by a sort of each group,
    which may be larger than memory.

    Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); Lei, G'Sell,
    Rinaldo, Tibshirani and Wasserman, Distribution-Free Predictive Inference for Regression (2018).

    Args:
        misses: one row per row and grain: grain, group_id and miss, the size of the error in link
            space over scale; null does not count.
        levels: rising, each between 0 and 1.

    Returns:
        One row per group with a miss: grain, group_id and half_widths, one per level; null where k
        is more than n, and in groups of fewer rows than `MIN_INTERVAL_ROWS`.
    """
    group = Window.partitionBy("grain", "group_id")
    rank, n_rows = sf.row_number().over(group.orderBy("miss")), sf.count("*").over(group)
    ranked = misses.where("miss IS NOT NULL").select(
        "grain", "group_id", "miss", rank.alias("_rank"), n_rows.alias("_n")
    )
    # As decimals: in floating point 0.55 * 100 is more than 55.
    wanted = (sf.ceil((sf.col("_n") + 1) * sf.lit(Decimal(repr(level)))) for level in levels)
    is_large = sf.col("_n") >= MIN_INTERVAL_ROWS
    found = [sf.max(sf.when(is_large & (sf.col("_rank") == k), sf.col("miss"))) for k in wanted]
    return ranked.groupBy("grain", "group_id").agg(sf.array(*found).alias("half_widths"))


def _as_ledger(found: pd.DataFrame, spec: FleetSpec, titles: Sequence[str]) -> pd.DataFrame:
    """The measures as columns of the ledger."""
    records = found.to_dict("records")
    names = row_measures(spec)
    columns = found[["grain", "group_id", "report_rows"]].copy()
    shown = {
        **dict(zip(CONTENDERS, CONTENDERS, strict=True)),
        **{title: f"b{number}" for number, title in enumerate(titles)},
    }
    columns["metrics"] = [
        json.dumps(
            {
                title: {name: _plain(row[f"{way}_{name}"]) for name in names}
                for title, way in shown.items()
            },
            ensure_ascii=False,
        )
        for row in records
    ]
    compared = shown_measures(spec)
    of_baseline = ["n", *compared, *(f"fleet_{name}" for name in compared)]
    columns["baselines"] = [
        json.dumps(
            {
                title: {name: _plain(row[f"b{number}_{name}"]) for name in of_baseline}
                for number, title in enumerate(titles)
            },
            ensure_ascii=False,
        )
        for row in records
    ]
    columns["intervals"] = None
    if not spec.is_class_task:
        ledger = {
            "rmse": "fleet_rmse",
            "mae": "fleet_mae",
            "mape": "fleet_mape",
            "pooled_rmse": "pooled_rmse",
            "pooled_mape": "pooled_mape",
        }
        for name, measured in ledger.items():
            columns[name] = found[measured]
        columns["intervals"] = [
            _intervals(spec.scoring.levels, row["half_widths"]) for row in records
        ]
    return columns


def _intervals(levels: Sequence[float], found: Any) -> str | None:
    """Half widths by level, as JSON; None for a group that has none of its own."""
    halves = [None] * len(levels) if found is None or np.isscalar(found) else list(found)
    own = {
        repr(level): float(half) if half is not None and math.isfinite(half) else None
        for level, half in zip(levels, halves, strict=True)
    }
    return json.dumps(own) if any(half is not None for half in own.values()) else None


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value
