"""What is counted of the visible rows before a run is planned, in a few Spark jobs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.errors import DataError
from pipeline.runs.planned_run import CountedRows
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
_NULLS = "_nulls"


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
        rows_of = _rows_by_class(counted.where(sf.col("class_name").isin(list(declared))))
        return {name: rows_of.get(name, 0) for name in declared}
    found = _rows_by_class(counted.orderBy("class_name").limit(MAX_CLASSES + 1))
    _check_classes(list(found), spec, cutoffs)
    return found


def _rows_by_class(counted: DataFrame) -> dict[str, int]:
    return {row["class_name"]: int(row["count"]) for row in counted.collect()}


def _check_classes(classes: Sequence[str], spec: FleetSpec, cutoffs: Cutoffs) -> None:
    """Refuse classes found in the data that the task cannot take."""
    n_binary = 2
    examples = ", ".join(repr(name) for name in classes[:10]) or "none"
    rows = f"target {spec.target.column!r}: the fit rows (before {cutoffs.tune_start})"
    if len(classes) > MAX_CLASSES:
        raise DataError(
            f"{rows} hold more than {MAX_CLASSES} classes, e.g. {examples}; merge rare ones in "
            f"{spec.features.sql}, or use task: regression"
        )
    is_binary = spec.task == BINARY
    if len(classes) < n_binary or (is_binary and len(classes) > n_binary):
        needed = "exactly two" if is_binary else "two or more"
        raise DataError(
            f"{rows} hold the classes {examples}; task {spec.task!r} needs {needed}: set "
            f"target.classes, or correct {spec.features.sql}"
        )


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
) -> CountedRows:
    """Count every group's rows by split, and hash them; one Spark job.

    Args:
        rows: the visible rows.
        spec: the fleet.
        cutoffs: the run's dates.
        categories: values per categorical feature, in order.
        classes: fit rows by class, as from `count_classes`.
    """
    counts = _aggregate(
        _narrow_rows(rows, spec, cutoffs, categories, classes or {}), spec
    ).toPandas()
    counts["rows_hash"] = _hash_texts(counts)
    pooled = counts[counts["grain"] == 0].iloc[0]
    masks = [name for name in counts.columns if name.startswith(_NULLS)]
    nullable = []
    for place, name in enumerate(spec.feature_columns):
        if int(pooled[masks[place // MASK_BITS]]) >> place % MASK_BITS & 1:
            nullable.append(name)
    return CountedRows(
        cutoffs=cutoffs,
        categories=categories,
        classes=list(classes or {}),
        counts=counts.drop(columns=["_constant", "_plain_constant", "_low", "_high", *masks]),
        constants=_constants(pooled, spec, classes or {}),
        nullable=tuple(nullable),
    )


def _narrow_rows(
    rows: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    categories: Mapping[str, Sequence[str]],
    classes: Mapping[str, int],
) -> DataFrame:
    """Every row once per grain, with no more than what is counted."""
    target = spec.target
    linked = _linked_target(spec, list(classes))
    offset = finite(sf.col(f"`{target.offset}`")) if target.offset else sf.lit(0.0)
    scale = finite(sf.col(f"`{target.scale}`")) if target.scale else sf.lit(1.0)
    weight = finite(sf.col(f"`{target.weight}`")) if target.weight else sf.lit(1.0)
    residual = finite((linked - offset) / sf.when(scale > 0, scale))
    known = is_learnt_from(spec)
    masks = [mask.alias(f"{_NULLS}{number}") for number, mask in enumerate(_null_masks(spec))]
    return _with_category_numbers(rows, categories).select(
        grain_column(spec).alias("_level"),
        sf.when(known, weight).alias("_weight"),
        split_column(cutoffs).alias("_split"),
        known.alias("_known"),
        sf.when(known, linked).alias("_linked"),
        sf.when(known, residual).alias("_residual"),
        sf.when(known, _row_hash(spec)).alias("_row_hash"),
        group_id_column(spec.finest).alias("_finest"),
        *masks,
    )


def _aggregate(narrow: DataFrame, spec: FleetSpec) -> DataFrame:
    """One row per group: counts, the two halves of its hash, its constants, its null features."""
    known, usable = sf.col("_known"), sf.col("_residual").isNotNull()
    split, is_pooled = sf.col("_split"), sf.col("_level.grain") == 0
    is_pooled_fit = (split == FIT) & is_pooled
    # Which finer groups a row is judged in is part of what a coarse group holds out.
    is_finest = sf.col("_level.grain") == len(spec.grains) - 1
    coarse_hash = sf.when(known, sf.xxhash64("_row_hash", "_finest"))
    hashed = sf.when(is_finest, sf.col("_row_hash")).otherwise(coarse_hash)

    def count_where(condition: Column, name: str) -> Column:
        return sf.sum(condition.cast("long")).alias(name)

    masks = []
    for name in narrow.columns:
        if name.startswith(_NULLS):
            of_pooled = sf.when(is_pooled & usable, sf.col(name)).otherwise(sf.lit(0).cast("long"))
            masks.append(sf.bit_or(of_pooled).alias(name))
    return narrow.groupBy("_level.grain", "_level.group_id").agg(
        sf.first("_level.parent_id").alias("parent_id"),
        sf.count("*").alias("n_rows"),
        count_where(known, "n_target"),
        count_where(known & sf.col("_linked").isNull(), "n_invalid"),
        *(count_where(usable & (split == name), f"n_{name}") for name in (FIT, TUNE, REPORT)),
        # A sum of 64-bit hashes, whatever the order of the rows, in two halves that cannot
        # overflow.
        sf.sum(hashed.bitwiseAND(0xFFFFFFFF)).alias("_low"),
        sf.sum(sf.shiftrightunsigned(hashed, 32)).alias("_high"),
        _constant_of(sf.when(is_pooled_fit, sf.col("_residual")), spec).alias("_constant"),
        _constant_of(sf.when(is_pooled_fit, sf.col("_linked")), spec).alias("_plain_constant"),
        *masks,
    )


def _constant_of(values: Column, spec: FleetSpec) -> Column:
    """What answers best without any model: the weighted mean, or the quantile that is learnt."""
    if spec.objective == QUANTILE:
        return sf.percentile_approx(values, spec.alpha or 0.5, 10_000)
    if not spec.target.weight:
        return sf.avg(values)
    weights = sf.sum(sf.when(values.isNotNull(), sf.col("_weight")))
    return sf.sum(sf.col("_weight") * values) / weights


def _hash_texts(counts: pd.DataFrame) -> list[str]:
    """Each group's hash as text: its rows, and both halves of the sum."""
    halves = zip(counts["n_target"], _whole(counts["_low"]), _whole(counts["_high"]), strict=True)
    return [f"{n}-{low:x}-{high:x}" for n, low, high in halves]


def _constants(pooled: "pd.Series[Any]", spec: FleetSpec, classes: Mapping[str, int]) -> Constants:
    """What answers without any model, as the pooled group's row has it."""
    if spec.task == MULTICLASS:
        prior = _prior(classes)
        if prior:
            return Constants(0.0, 0.0, prior)
    values = (pooled["_constant"], pooled["_plain_constant"])
    with_offset, without_offset = (0.0 if pd.isna(value) else _rounded(value) for value in values)
    return Constants(with_offset, without_offset)


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
