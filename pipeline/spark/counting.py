"""What is counted of the visible rows before a run is planned, in a few Spark jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.errors import DataError
from pipeline.spark.keys import finite, group_id_column, link_column
from pipeline.spark.rows import grain_column, is_learnt_from, split_column
from pipeline.spec import BINARY, COUNTED, MAX_CLASSES, MULTICLASS, QUANTILE, FleetSpec
from pipeline.training.blend import Constants
from pipeline.training.splits import FIT, REPORT, TUNE, Cutoffs

# Constants and weights keep so many significant digits: sums over files in another order differ in
# the last ones.
DIGITS = 12
# Features per whole number that tells which of them are null.
MASK_BITS = 48


@dataclass(frozen=True)
class CountedGroups:
    """The groups of the visible rows.

    Args:
        counts: one row per group of every grain, with its counts, its parent, and the hash of its
            training rows.
        constants: what answers without a model: mean of the fit rows (their quantile where one is
            learnt; classes' shares), 0 where there is none.
        nullable: features in which a row that is learnt from has a null.
    """

    counts: pd.DataFrame
    constants: Constants
    nullable: tuple[str, ...]


def count_classes(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> dict[str, int]:
    """Fit rows of each of the fleet's classes, in the classes' order.

    One Spark job, none for regression.

    Raises:
        DataError: if the classes are found in the data, and they are more than 100, fewer than two,
            or for binary not two.
    """
    if not spec.is_class_task:
        return {}
    column = sf.col(f"`{spec.target.column}`").cast("string")
    counted = (
        rows.where((split_column(cutoffs) == FIT) & is_learnt_from(spec))
        .groupBy(column.alias("class_name"))
        .count()
    )
    declared = spec.target.classes
    if declared is not None:
        there = {
            row["class_name"]: int(row["count"])
            for row in counted.where(sf.col("class_name").isin(list(declared))).collect()
        }
        return {name: there.get(name, 0) for name in declared}
    found = {
        row["class_name"]: int(row["count"])
        for row in counted.orderBy("class_name").limit(MAX_CLASSES + 1).collect()
    }
    shown = ", ".join(repr(name) for name in list(found)[:10]) or "none"
    what = f"target {spec.target.column!r}: the fit rows (before {cutoffs.tune_start})"
    if len(found) > MAX_CLASSES:
        raise DataError(
            f"{what} hold more than {MAX_CLASSES} classes, e.g. {shown}; merge rare ones in "
            f"{spec.features.sql}, or use task: regression"
        )
    if len(found) < 2 or (spec.task == BINARY and len(found) > 2):  # noqa: PLR2004
        wanted = "exactly two" if spec.task == BINARY else "two or more"
        raise DataError(
            f"{what} hold the classes {shown}; task {spec.task!r} needs {wanted}: set "
            f"target.classes, or correct {spec.features.sql}"
        )
    return found


def _linked_target(spec: FleetSpec, classes: Sequence[str]) -> Column:
    """What the trainer learns from, as it computes it: link space, for classes their number.

    Null where invalid.
    """
    target = sf.col(f"`{spec.target.column}`")
    if classes:
        place = sf.array_position(
            sf.array(*(sf.lit(name) for name in classes)), target.cast("string")
        )
        return sf.when(place > 0, (place - 1).cast("double"))
    linked = link_column(target, spec.target.transform)
    return sf.when(target >= 0, linked) if spec.objective in COUNTED else linked


def count_groups(
    rows: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    categories: Mapping[str, Sequence[str]],
    classes: Mapping[str, int] | None = None,
) -> CountedGroups:
    """Count every group's rows by split, and hash them; one Spark job.

    Args:
        rows: the visible rows.
        spec: the fleet.
        cutoffs: the run's dates.
        categories: values per categorical feature, in order.
        classes: fit rows by class, as from `count_classes`.
    """
    target = spec.target
    linked = _linked_target(spec, list(classes or {}))
    offset = finite(sf.col(f"`{target.offset}`")) if target.offset else sf.lit(0.0)
    scale = finite(sf.col(f"`{target.scale}`")) if target.scale else sf.lit(1.0)
    residual = finite((linked - offset) / sf.when(scale > 0, scale))
    known = is_learnt_from(spec)
    weight = finite(sf.col(f"`{target.weight}`")) if target.weight else sf.lit(1.0)
    narrow = _with_category_numbers(rows, categories).select(
        grain_column(spec).alias("_level"),
        sf.when(known, weight).alias("_weight"),
        split_column(cutoffs).alias("_split"),
        known.alias("_known"),
        sf.when(known, linked).alias("_linked"),
        sf.when(known, residual).alias("_residual"),
        sf.when(known, _row_hash(spec)).alias("_row_hash"),
        group_id_column(spec.finest).alias("_finest"),
        *(mask.alias(f"_nulls{number}") for number, mask in enumerate(_null_masks(spec))),
    )

    masks = [name for name in narrow.columns if name.startswith("_nulls")]
    # Which finer groups a row is judged in is part of what a coarse group holds out.
    is_finest = sf.col("_level.grain") == len(spec.grains) - 1
    hashed = sf.when(is_finest, sf.col("_row_hash")).otherwise(
        sf.when(sf.col("_known"), sf.xxhash64("_row_hash", "_finest"))
    )

    def rows_where(condition: Column, name: str) -> Column:
        return sf.sum(condition.cast("long")).alias(name)

    usable = sf.col("_residual").isNotNull()
    fit, is_pooled = sf.col("_split") == FIT, sf.col("_level.grain") == 0

    def middle(values: Column) -> Column:
        if spec.objective == QUANTILE:
            return sf.percentile_approx(values, spec.alpha or 0.5, 10_000)
        if not target.weight:
            return sf.avg(values)
        return sf.sum(sf.col("_weight") * values) / sf.sum(
            sf.when(values.isNotNull(), sf.col("_weight"))
        )

    counted = narrow.groupBy("_level.grain", "_level.group_id").agg(
        sf.first("_level.parent_id").alias("parent_id"),
        sf.count("*").alias("n_rows"),
        rows_where(sf.col("_known"), "n_target"),
        rows_where(sf.col("_known") & sf.col("_linked").isNull(), "n_invalid"),
        *(
            rows_where(usable & (sf.col("_split") == split), f"n_{split}")
            for split in (FIT, TUNE, REPORT)
        ),
        # A sum of 64-bit hashes, whatever the order of the rows, in two halves that cannot
        # overflow.
        sf.sum(hashed.bitwiseAND(0xFFFFFFFF)).alias("_low"),
        sf.sum(sf.shiftrightunsigned(hashed, 32)).alias("_high"),
        middle(sf.when(fit & is_pooled, sf.col("_residual"))).alias("_constant"),
        middle(sf.when(fit & is_pooled, sf.col("_linked"))).alias("_plain_constant"),
        *(
            sf.bit_or(
                sf.when(is_pooled & usable, sf.col(name)).otherwise(sf.lit(0).cast("long"))
            ).alias(name)
            for name in masks
        ),
    )
    counts = counted.toPandas()
    counts["rows_hash"] = [
        f"{n}-{low:x}-{high:x}"
        for n, low, high in zip(
            counts["n_target"], _whole(counts["_low"]), _whole(counts["_high"]), strict=True
        )
    ]
    pooled = counts[counts["grain"] == 0].iloc[0]
    with_offset, without_offset = (
        0.0 if pd.isna(pooled[name]) else _rounded(pooled[name])
        for name in ("_constant", "_plain_constant")
    )
    prior = _prior(classes or {}) if spec.task == MULTICLASS else ()
    constants = Constants(0.0, 0.0, prior) if prior else Constants(with_offset, without_offset)
    nullable = tuple(
        name
        for place, name in enumerate(spec.feature_columns)
        if int(pooled[masks[place // MASK_BITS]]) >> place % MASK_BITS & 1
    )
    return CountedGroups(
        counts.drop(columns=["_constant", "_plain_constant", "_low", "_high", *masks]),
        constants,
        nullable,
    )


def _null_masks(spec: FleetSpec) -> list[Column]:
    """Which features of a row are null or NaN, one bit each.

    A few whole numbers travel more cheaply than a column each.
    """
    masks = [sf.lit(0).cast("long") for _ in range(0, len(spec.feature_columns), MASK_BITS)]
    for place, name in enumerate(spec.feature_columns):
        value = sf.col(f"`{name}`")
        is_null = (
            value.isNull()
            if name in spec.features.categoricals
            else value.isNull() | sf.isnan(value.try_cast("double"))
        )
        bit = sf.when(is_null, sf.lit(1 << place % MASK_BITS)).otherwise(sf.lit(0)).cast("long")
        masks[place // MASK_BITS] = masks[place // MASK_BITS].bitwiseOR(bit)
    return masks


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _prior(classes: Mapping[str, int]) -> tuple[float, ...]:
    """Each class's share of the fit rows; equal shares where there is no row."""
    total = sum(classes.values())
    return tuple(count / total if total else 1 / len(classes) for count in classes.values())


def _whole(sums: "pd.Series[Any]") -> list[int]:
    """Sums as whole numbers; 0 for a group without rows to add up."""
    return [0 if pd.isna(value) else int(value) for value in sums.astype(object)]


def _with_category_numbers(rows: DataFrame, categories: Mapping[str, Sequence[str]]) -> DataFrame:
    """Each categorical's number beside it, as training sees it.

    Null for a value that is not in the fleet's list.
    """
    for name, values in categories.items():
        numbered = rows.sparkSession.createDataFrame(
            list(enumerate(values)), f"`_number_{name}` int, `_value_{name}` string"
        )
        found = sf.col(f"`{name}`").cast("string") == sf.col(f"`_value_{name}`")
        rows = rows.join(sf.broadcast(numbered), found, "left").drop(f"_value_{name}")
    return rows


def _row_hash(spec: FleetSpec) -> Column:
    """64-bit hash of all that training reads of a row, as it reads it.

    Features count in single precision, and null equals NaN.
    """

    def number(name: str, kind: str) -> Column:
        value = sf.col(f"`{name}`").try_cast(kind)
        return sf.coalesce(
            sf.when(~sf.isnan(value) & (sf.abs(value) < float("inf")), value),
            sf.lit(float("nan")).cast(kind),
        )

    features = [
        sf.coalesce(sf.col(f"`_number_{name}`"), sf.lit(-1))
        if name in spec.features.categoricals
        else number(name, "float")
        for name in spec.feature_columns
    ]
    # In double precision even where they are features, too. Baselines are not learnt from, and read
    # when the run is judged.
    used = (spec.target.offset, spec.target.scale, spec.target.weight)
    exact = [number(name, "double") for name in dict.fromkeys(used) if name is not None]
    # An infinite target counts as such: it is not null.
    target = sf.col(f"`{spec.target.column}`")
    return sf.xxhash64(
        sf.lit(len(features)), "row_key", "time", "known_at", target, *features, *exact
    )


def count_categories(
    rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs
) -> dict[str, dict[str, int]]:
    """Rows per value of each categorical, on fit rows only.

    One Spark job, at most `max_categories` values each.
    """
    names = spec.features.categoricals
    if not names:
        return {}
    pairs = sf.explode(
        sf.array(
            *(
                sf.struct(
                    sf.lit(name).alias("name"), sf.col(f"`{name}`").cast("string").alias("value")
                )
                for name in names
            )
        )
    )
    fit = rows.where((split_column(cutoffs) == FIT) & is_learnt_from(spec))
    counted = (
        fit.select(pairs.alias("_pair"))
        .where("_pair.value IS NOT NULL")
        .groupBy("_pair.name", "_pair.value")
        .count()
    )
    rank = sf.expr("row_number() OVER (PARTITION BY name ORDER BY count DESC, value)")
    kept = (
        counted.withColumn("_rank", rank)
        .where(sf.col("_rank") <= spec.features.max_categories)
        .collect()
    )
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in kept:
        found[row["name"]][row["value"]] = row["count"]
    return found
