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
from pipeline.runs.planned_run import PlannedRun
from pipeline.spark.blending import (
    blended_answers,
    constant_column,
    grain_columns,
    grain_predictions,
    mark_groups,
    with_weights,
)
from pipeline.spark.keys import finite, inverse_link_column, link_column, moment_column
from pipeline.spark.measures import (
    baseline_measures,
    compared_measures,
    row_errors,
    row_means,
    row_measures,
)
from pipeline.spark.products import sums_of_products, symmetric_matrices
from pipeline.spec import CONTENDERS, MULTICLASS, FleetSpec
from pipeline.training.blend import Constants, GroupSkill, Moments
from pipeline.training.splits import EARLIER, REPORT, TUNE, Cutoffs

# An interval from n rows contains up to 1 / (n + 1) more answers than it should: from here on about
# 3 in 100 at most.
MIN_INTERVAL_ROWS = 30


def nearest_predictions(holdout: DataFrame) -> DataFrame:
    """The prediction of the finest model that has one for each row: row_key and `_base`."""
    grain = sf.when(sf.col("prediction").isNotNull(), sf.col("grain"))
    return holdout.groupBy("row_key").agg(sf.max_by("prediction", grain).alias("_base"))


def judged_rows(
    holdout: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    has_model: Sequence[Collection[str]] = (),
) -> DataFrame:
    """One row per held-out row (for multiclass per row and class), with each grain's prediction.

    Args:
        holdout: as in `tables.HOLDOUT`, of one run.
        spec: the fleet.
        cutoffs: the run's dates.
        has_model: per grain the groups that have a model. A row that lacks the prediction of one of
            them is left out: it is not in a coarse group's sample, or only an earlier run had it.

    Returns:
        Beside the columns of the holdout: p0, p1, ... (the grains' predictions), has_model0, ...
        (whether the row's group has a model), residual (the target as models see it), stretch (of
        time: 0 and 1 are the halves of the tune split, 2, 3, ... lie before it; null for report
        rows). Rows before the tune split are there wherever some model has predicted them.
    """
    stretch = _stretch(cutoffs)
    now = sf.when(sf.col("time") >= moment_column(cutoffs.report_start), REPORT)
    now = now.when(sf.col("time") >= moment_column(cutoffs.tune_start), TUNE)
    now = now.when(stretch.isNotNull(), EARLIER)
    # Out-of-fold predictions of fit rows are for children to correct. A group that kept an older
    # model was held out at older dates: what chose its parameters then may not report on it now.
    is_honest = sf.col("split").isin(EARLIER, TUNE, REPORT)
    is_honest &= (sf.col("split") == REPORT) | (now == EARLIER) | (now == sf.col("split"))
    # An earlier release held out rows of weight 0, too.
    counts = now.isNotNull() & (sf.col("weight") > 0)
    held_out = holdout.where(is_honest & counts).withColumn("split", now)
    judged = _side_by_side(held_out, len(spec.grains))
    linked = link_column(sf.col("actual"), spec.target.transform)
    residual = finite((linked - sf.col("offset")) / sf.col("scale"))
    judged = judged.withColumn("residual", residual).withColumn("stretch", stretch)
    for grain, groups in enumerate(has_model):
        judged = _without_unanswered(judged, grain, groups)
    return judged


def _stretch(cutoffs: Cutoffs) -> Column:
    """The stretch of time that a row lies in, as `Cutoffs.stretch_starts` numbers them."""
    time = sf.col("time")
    stretch = sf.when(time >= moment_column(cutoffs.report_start), None)
    for number, start in cutoffs.stretch_starts:
        stretch = stretch.when(time >= moment_column(start), number)
    return stretch.cast("int")


def _side_by_side(held_out: DataFrame, n_grains: int) -> DataFrame:
    """One row per held-out row, with each grain's own prediction."""
    shared = ("time", "actual", "offset", "scale", "group_ids")
    return held_out.groupBy("row_key", "split", "class_name").agg(
        *(sf.first(name).alias(name) for name in shared),
        # In a coarse group's sample a row weighs more, as it stands for others.
        sf.max("weight").alias("weight"),
        *grain_predictions("p", n_grains),
    )


def _without_unanswered(judged: DataFrame, grain: int, groups: Collection[str]) -> DataFrame:
    """The rows with has_model<grain>, less tune and report rows that a model has not predicted."""
    has_model = f"has_model{grain}"
    is_answered = (
        ~sf.col(has_model)
        | sf.col(f"p{grain}").isNotNull()
        | sf.col("residual").isNull()
        | (sf.col("split") == EARLIER)
    )
    return mark_groups(judged, grain, groups, has_model).where(is_answered)


def sum_moments(
    judged: DataFrame, n_grains: int, constants: Constants, classes: Sequence[str]
) -> Moments:
    """Add up products of target and predictions per finest group and split; one Spark job.

    For multiclass the sums are of differences from the prior, as each class has a constant of its
    own and `Moments` has room for one.
    """
    prior = sf.lit(0.0)
    if constants.prior:
        prior = constant_column(constants, classes)
    vector = [sf.lit(1.0), sf.col("residual") - prior]
    for prediction in grain_columns("p", n_grains):
        vector.append(sf.coalesce(prediction - prior, sf.lit(0.0)))
    sums = (
        judged.where(sf.col("residual").isNotNull() & sf.col("split").isin(TUNE, REPORT))
        .groupBy("split", "group_ids")
        .agg(*sums_of_products(vector, sf.col("weight")))
        .toPandas()
    )
    # A fixed order, so that sums over groups are the same to the last bit from run to run.
    sums["group_ids"] = sums["group_ids"].map(tuple)
    sums = sums.sort_values(["split", "group_ids"], ignore_index=True)
    return Moments(
        split=sums["split"].to_numpy(dtype=object),
        groups=np.array(sums["group_ids"].tolist(), dtype=object).reshape(len(sums), n_grains),
        products=symmetric_matrices(sums, len(vector)),
    )


def measure_groups(
    judged: DataFrame,
    run: PlannedRun,
    spec: FleetSpec,
    skills: Mapping[GroupKey, GroupSkill],
    has_model: Sequence[Collection[str]],
) -> pd.DataFrame:
    """Errors on every group's report rows, in target units; one Spark job.

    Measured are the fleet, the pooled model, the constant and the baselines.

    Args:
        judged: as from `judged_rows`.
        run: its constants answer without a model. The baselines are read from its rows, as they may
            be declared after a group was trained.
        spec: the fleet.
        skills: weights by group.
        has_model: per grain the groups that were trained.

    Returns:
        One row per group with report rows: grain, group_id, report_rows, and the ledger's rmse,
        mae, mape, pooled_rmse, pooled_mape, intervals (JSON; null for classes), baselines and
        metrics (JSON).
    """
    classes = run.settings.model_spec.classes
    baselines = baseline_names(spec)
    report = with_weights(judged.where("split = 'report'"), skills, has_model)
    if baselines:
        is_reported = sf.col("time") >= moment_column(run.cutoffs.report_start)
        answers = baseline_answers(run.rows.where(is_reported), spec)
        report = report.join(answers, "row_key", "left")
    constant = constant_column(run.constants, classes)
    answered = _answered_rows(report, spec, constant, run.constants.without_offset)
    contenders = [*CONTENDERS, *baselines.values()]
    errors = row_errors(answered, spec, contenders, classes)
    by_level = errors.select("*", sf.posexplode("group_ids").alias("grain", "group_id"))
    measured = by_level.groupBy("grain", "group_id").agg(
        sf.count("*").alias("report_rows"),
        *row_means(spec, contenders),
        *baseline_measures(spec, list(baselines.values())),
    )
    if not spec.is_class_task:
        misses = errors.select("miss", sf.posexplode("group_ids").alias("grain", "group_id"))
        widths = half_widths(misses, spec.scoring.levels)
        measured = measured.join(widths, ["grain", "group_id"], "left")
    return _as_ledger(measured.toPandas(), spec, baselines)


def baseline_names(spec: FleetSpec) -> dict[str, str]:
    """The name of each baseline's column (b0, b1, ...) by its title."""
    return {title: f"b{number}" for number, title in enumerate(spec.all_baselines)}


def _answered_rows(
    report: DataFrame, spec: FleetSpec, constant: Column, without_offset: float
) -> DataFrame:
    """Each row's answers in target units, and by how much the fleet's misses in link space.

    Args:
        report: report rows, with weights as from `with_weights` and the baselines' answers.
        spec: the fleet.
        constant: what answers without any model.
        without_offset: what answers rows that have no offset or no scale, in link space.
    """
    fleet = blended_answers(len(spec.grains), constant)[-1]
    pooled = sf.coalesce(sf.col("p0"), constant)
    anchored = sf.col("offset").isNotNull() & sf.col("scale").isNotNull()
    answers = []
    for name, answer in zip(CONTENDERS, (fleet, pooled, constant), strict=True):
        linked = sf.col("offset") + sf.col("scale") * answer
        linked = sf.when(anchored, linked).otherwise(sf.lit(without_offset))
        answers.append(inverse_link_column(linked, spec.target.transform).alias(name))
    for number, name in enumerate(baseline_names(spec).values()):
        answers.append(baseline_answer(spec, number).alias(name))
    miss = sf.when(anchored, sf.abs(sf.col("residual") - fleet))
    return report.select(
        "row_key", "class_name", "actual", "group_ids", *answers, miss.alias("miss")
    )


def baseline_answers(rows: DataFrame, spec: FleetSpec) -> DataFrame:
    """Each row's answers by the baselines: row_key, and _b0, _b1, ... in the order declared.

    They are null for a baseline that was declared after the table was made.
    """
    available = set(rows.columns)
    columns = []
    for number, name in enumerate(spec.all_baselines.values()):
        answer = sf.lit(None).cast("double")
        if name in available:
            answer = sf.col(f"`{name}`")
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

    A half width is the k-th smallest of n misses, k = ceil((n + 1) level): if future rows are like
    these n, an answer misses by more in at most 1 - level of the cases, whatever the model and the
    distribution. Rows count alike, whatever their weight. Spark sorts each group to rank its rows,
    so that a group may be larger than memory.

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
    rank = sf.row_number().over(group.orderBy("miss"))
    n_rows = sf.count("*").over(group)
    ranked = misses.where("miss IS NOT NULL").select(
        "grain", "group_id", "miss", rank.alias("_rank"), n_rows.alias("_n")
    )
    is_large = sf.col("_n") >= MIN_INTERVAL_ROWS
    widths = []
    for level in levels:
        # As decimals: in floating point 0.55 * 100 is more than 55.
        k = sf.ceil((sf.col("_n") + 1) * sf.lit(Decimal(repr(level))))
        is_kth = is_large & (sf.col("_rank") == k)
        widths.append(sf.max(sf.when(is_kth, sf.col("miss"))))
    return ranked.groupBy("grain", "group_id").agg(sf.array(*widths).alias("half_widths"))


def _as_ledger(
    measured: pd.DataFrame, spec: FleetSpec, baselines: Mapping[str, str]
) -> pd.DataFrame:
    """The measures as columns of the ledger.

    Args:
        measured: one row per group.
        spec: the fleet.
        baselines: as from `baseline_names`.
    """
    contenders = {**dict(zip(CONTENDERS, CONTENDERS, strict=True)), **baselines}
    compared = compared_measures(spec)
    of_baseline = ["n", *compared, *(f"fleet_{name}" for name in compared)]
    metrics = []
    beside_baselines = []
    for row in measured.to_dict("records"):
        metrics.append(_measures_json(row, contenders, row_measures(spec)))
        beside_baselines.append(_measures_json(row, baselines, of_baseline))
    columns = measured[["grain", "group_id", "report_rows"]].copy()
    columns["metrics"] = metrics
    columns["baselines"] = beside_baselines
    columns["intervals"] = None
    if not spec.is_class_task:
        ledger = {
            "rmse": "fleet_rmse",
            "mae": "fleet_mae",
            "mape": "fleet_mape",
            "pooled_rmse": "pooled_rmse",
            "pooled_mape": "pooled_mape",
        }
        for name, column in ledger.items():
            columns[name] = measured[column]
        levels = spec.scoring.levels
        columns["intervals"] = [_intervals(levels, widths) for widths in measured["half_widths"]]
    return columns


def _measures_json(
    row: Mapping[Any, Any], contenders: Mapping[str, str], names: Sequence[str]
) -> str:
    """Some of a row's measures as JSON, by title of the contender; null where there is none.

    Args:
        row: of a group.
        contenders: prefix of each contender's columns, by its title.
        names: of the measures.
    """
    measures: dict[str, dict[str, Any]] = {}
    for title, prefix in contenders.items():
        of_contender = measures[title] = {}
        for name in names:
            of_contender[name] = _value_or_none(row[f"{prefix}_{name}"])
    return json.dumps(measures, ensure_ascii=False)


def _value_or_none(value: Any) -> Any:
    if pd.isna(value):
        return None
    return value


def _intervals(levels: Sequence[float], widths: Any) -> str | None:
    """Half widths by level, as JSON; None for a group that has none of its own.

    Args:
        levels: of the intervals.
        widths: one per level; null, as pandas has it, for a group without a miss.
    """
    if widths is None or np.isscalar(widths):
        return None
    own: dict[str, float | None] = dict.fromkeys(map(repr, levels))
    for level, half in zip(levels, widths, strict=True):
        if half is not None and math.isfinite(half):
            own[repr(level)] = float(half)
    if all(half is None for half in own.values()):
        return None
    return json.dumps(own)
