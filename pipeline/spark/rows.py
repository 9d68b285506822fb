"""Which rows of the feature table a run sees, learns from and is judged on, as Spark columns."""

from collections.abc import Sequence

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.spark.keys import finite, group_id_column, moment_column
from pipeline.spec import FleetSpec
from pipeline.training.splits import FIT, GAP, REPORT, TUNE, Cutoffs


def visible_rows(features: DataFrame, as_of: pd.Timestamp) -> DataFrame:
    """The rows that a run may see: known by the as-of, and not of the horizon."""
    return features.where((sf.col("known_at") <= moment_column(as_of)) & ~sf.col("is_future"))


def limited_rows(rows: DataFrame, spec: FleetSpec, limit_groups: int | None) -> DataFrame:
    """Only the rows of that many finest groups, the same ones each time (by hash)."""
    if limit_groups is None:
        return rows
    groups = (
        rows.select(group_id_column(spec.finest).alias("_group"))
        .distinct()
        .orderBy(sf.xxhash64("_group"), "_group")
        .limit(limit_groups)
    )
    return (
        rows.withColumn("_group", group_id_column(spec.finest))
        .join(sf.broadcast(groups), "_group", "left_semi")
        .drop("_group")
    )


def split_column(cutoffs: Cutoffs) -> Column:
    """The twin of `Cutoffs.assign`."""
    tune_start = moment_column(cutoffs.tune_start)
    report_start = moment_column(cutoffs.report_start)
    return (
        sf.when((sf.col("time") < tune_start) & (sf.col("known_at") < tune_start), FIT)
        .when(
            (sf.col("time") >= tune_start)
            & (sf.col("time") < report_start)
            & (sf.col("known_at") < report_start),
            TUNE,
        )
        .when(sf.col("time") >= report_start, REPORT)
        .otherwise(GAP)
    )


def grain_column(spec: FleetSpec, grains: Sequence[int] | None = None) -> Column:
    """Repeats each row once per grain, with the index of the grain, the row's group and its parent.

    Args:
        spec: the fleet.
        grains: indices of those that count; by default all.
    """
    levels = []
    parent = sf.lit(None).cast("string")
    for level, keys in enumerate(spec.grains):
        group = group_id_column(keys)
        if grains is None or level in grains:
            index = sf.lit(level).alias("grain")
            levels.append(sf.struct(index, group.alias("group_id"), parent.alias("parent_id")))
        parent = group
    return sf.explode(sf.array(*levels))


def is_learnt_from(spec: FleetSpec) -> Column:
    """Whether a row counts, as the trainer sees it: a known target, and a weight above 0.

    A target of NaN is not known.
    """
    target = sf.col(f"`{spec.target.column}`")
    has_target = target.isNotNull()
    if not spec.is_class_task:
        number = target.try_cast("double")
        has_target = number.isNotNull() & ~sf.isnan(number)
    return has_target & has_weight(spec)


def has_weight(spec: FleetSpec) -> Column:
    """Whether a row's weight is above 0: all others count for nothing, anywhere."""
    if spec.target.weight is None:
        return sf.lit(True)
    return sf.coalesce(finite(sf.col(f"`{spec.target.weight}`")) > 0, sf.lit(False))
