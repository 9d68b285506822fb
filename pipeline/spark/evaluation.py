"""Judging a run on its holdout: sums for the blend, then every group's error against its baselines."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.grouping.splits import TUNE, Cutoffs
from pipeline.spark.keys import finite, inverse_link_column, link_column, moment_column
from pipeline.spec import FleetSpec
from pipeline.training.blend import N_BLOCKS, GroupSkill, Moments

MIN_INTERVAL_ROWS = 30


def judged_rows(holdout: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> DataFrame:
    """One row per held-out row, with the own prediction of each grain side by side as p0, p1, ..."""
    shared = ("time", "actual", "offset", "scale", "weight", "group_ids", "baselines")
    predictions = [sf.max(sf.when(sf.col("grain") == grain, sf.col("prediction"))).alias(f"p{grain}") for grain in range(len(spec.grains))]
    wide = holdout.groupBy("row_key", "split").agg(*(sf.first(name).alias(name) for name in shared), *predictions)
    linked = link_column(sf.col("actual"), spec.target.transform)
    start, end = (moment_column(moment).cast("double") for moment in (cutoffs.tune_start, cutoffs.report_start))
    block = sf.floor((sf.col("time").cast("double") - start) / (end - start) * N_BLOCKS).cast("int")
    block = sf.when(sf.col("split") == TUNE, block).otherwise(0)
    return wide.withColumn("residual", finite((linked - sf.col("offset")) / sf.col("scale"))).withColumn("block", block)


def sum_moments(judged: DataFrame, n_grains: int) -> Moments:
    """Add up products of target and predictions per finest group and split; one Spark job."""
    vector = [sf.lit(1.0), sf.col("residual"), *(sf.coalesce(sf.col(f"p{grain}"), sf.lit(0.0)) for grain in range(n_grains))]
    pairs = [(i, j) for i in range(len(vector)) for j in range(i, len(vector))]
    sums = [sf.sum(sf.col("weight") * vector[i] * vector[j]).alias(f"s{i}_{j}") for i, j in pairs]
    found = judged.where(sf.col("residual").isNotNull()).groupBy("split", "block", "group_ids").agg(sf.count("*").alias("n_rows"), *sums).toPandas()
    # A fixed order, so that sums over groups are the same to the last bit from run to run.
    found["group_ids"] = found["group_ids"].map(tuple)
    found = found.sort_values(["split", "block", "group_ids"], ignore_index=True)
    products = np.zeros((len(found), len(vector), len(vector)))
    for i, j in pairs:
        products[:, i, j] = products[:, j, i] = found[f"s{i}_{j}"]
    groups = np.array(found["group_ids"].tolist(), dtype=object).reshape(len(found), n_grains)
    n_rows = found["n_rows"].to_numpy(dtype=np.float64)
    return Moments(found["split"].to_numpy(dtype=object), found["block"].to_numpy(dtype=np.int64), groups, n_rows, products)


def measure_groups(
    spark: SparkSession,
    judged: DataFrame,
    spec: FleetSpec,
    skills: Mapping[tuple[int, str], GroupSkill],
    constants: tuple[float, float],
    has_model: Sequence[set[str]],
) -> pd.DataFrame:
    """Every group's error on report rows in target units, of the fleet, the pooled model and the baselines; one Spark job.

    Args:
        spark: the session.
        judged: as from `judged_rows`.
        spec: the fleet.
        skills: weights by (grain, group id).
        constants: the fleet's constant for rows with and without an offset, link space.
        has_model: per grain the groups that were trained.

    Returns:
        One row per group with report rows: grain, group_id, report_rows, rmse, mae, mape (percent), pooled_rmse, pooled_mape,
        baselines (JSON: per baseline n, rmse, mape, and the fleet's own on the same rows), interval (link space over scale).
    """
    constant, plain_constant = (sf.lit(value) for value in constants)
    report = judged.where("split = 'report'")
    residual_answer: Column = constant
    for grain in range(len(spec.grains)):
        weights = [(group, skill.weight) for (level, group), skill in skills.items() if level == grain and group in has_model[grain]]
        table = sf.broadcast(spark.createDataFrame(weights, f"_g{grain} string, _w{grain} double"))
        report = report.join(table, sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left")
        weight, own = sf.coalesce(sf.col(f"_w{grain}"), sf.lit(0.0)), sf.col(f"p{grain}")
        residual_answer = sf.when(own.isNull(), residual_answer).otherwise(weight * own + (1 - weight) * residual_answer)
    anchored = sf.col("offset").isNotNull() & sf.col("scale").isNotNull()

    def answer(residual: Column) -> Column:
        linked = sf.when(anchored, sf.col("offset") + sf.col("scale") * residual).otherwise(plain_constant)
        return inverse_link_column(linked, spec.target.transform)

    answered = report.select(
        "actual",
        "group_ids",
        answer(residual_answer).alias("answer"),
        answer(sf.coalesce(sf.col("p0"), constant)).alias("pooled"),
        *(finite(sf.col("baselines")[number]).alias(f"b{number}") for number in range(len(spec.baselines))),
        sf.when(anchored, sf.abs(sf.col("residual") - residual_answer)).alias("miss"),
    )
    groups = answered.select("*", sf.posexplode("group_ids").alias("grain", "group_id")).groupBy("grain", "group_id")
    measures = [
        sf.count("*").alias("report_rows"),
        *_errors("answer", ""),
        sf.avg(sf.abs(sf.col("actual") - sf.col("answer"))).alias("mae"),
        *_errors("pooled", "pooled_"),
        sf.when(sf.count("miss") >= MIN_INTERVAL_ROWS, sf.percentile("miss", sf.lit(spec.scoring.interval))).alias("interval"),
    ]
    for number in range(len(spec.baselines)):
        there = sf.col(f"b{number}").isNotNull()
        measures += [
            sf.count(f"b{number}").alias(f"b{number}_n"),
            *_errors(f"b{number}", f"b{number}_"),
            *_errors("answer", f"b{number}_fleet_", there),
        ]
    found = groups.agg(*measures).toPandas()
    names = ("n", "rmse", "mape", "fleet_rmse", "fleet_mape")
    found["baselines"] = [
        json.dumps({title: {name: _plain(row[f"b{number}_{name}"]) for name in names} for number, title in enumerate(spec.baselines)})
        for row in found.to_dict("records")
    ]
    return found.drop(columns=[f"b{number}_{name}" for number in range(len(spec.baselines)) for name in names])


def _errors(answer: str, prefix: str, only: Column | None = None) -> list[Column]:
    """RMSE and MAPE of a column of answers."""
    error = sf.col("actual") - sf.col(answer)
    relative = sf.when(sf.col("actual") != 0, sf.abs(error / sf.col("actual")) * 100)
    if only is not None:
        error, relative = sf.when(only, error), sf.when(only, relative)
    return [sf.sqrt(sf.avg(error * error)).alias(f"{prefix}rmse"), sf.avg(relative).alias(f"{prefix}mape")]


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value
