"""What is counted of the visible rows before a run is planned, in a few Spark jobs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.errors import DataError
from pipeline.runs.planned_run import CountedRows
from pipeline.spark.keys import finite, group_id_column, link_column, number_or
from pipeline.spark.rows import grain_column, is_learnt_from, split_column
from pipeline.spec import BINARY, COUNTED, MAX_CLASSES, MULTICLASS, FleetSpec
from pipeline.training.blend import Constants
from pipeline.training.splits import FIT, REPORT, TUNE, Cutoffs

# Significant digits that a constant keeps: sums over files in another order differ in later ones.
DIGITS = 12
# Rows that the quantile of a weighted target is read from.
MAX_QUANTILE_ROWS = 100_000
# Features per whole number whose bits say which of them are null.
MASK_BITS = 48
_NULLS = "_nulls"


def count_classes(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> dict[str, int]:
    """Fit rows of each of the fleet's classes, in the classes' order.

    One Spark job, none for regression.

    Raises:
        DataError: if the spec lists no classes, and the data has more than `MAX_CLASSES`, fewer
            than two, or for binary not two.
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
        return dict.fromkeys(declared, 0) | rows_of
    rows_of = _rows_by_class(counted.orderBy("class_name").limit(MAX_CLASSES + 1))
    _check_classes(list(rows_of), spec, cutoffs)
    return rows_of


def _rows_by_class(counted: DataFrame) -> dict[str, int]:
    return {row["class_name"]: int(row["count"]) for row in counted.collect()}


def _check_classes(classes: Sequence[str], spec: FleetSpec, cutoffs: Cutoffs) -> None:
    """Refuse classes found in the data that the task cannot take."""
    n_binary = 2
    examples = ", ".join(map(repr, classes[:10])) or "none"
    rows = f"target {spec.target.column!r}: the fit rows (before {cutoffs.tune_start})"
    if len(classes) > MAX_CLASSES:
        raise DataError(
            f"{rows} hold more than {MAX_CLASSES} classes, e.g. {examples}; merge rare ones in "
            f"{spec.features.sql}, or use task: regression"
        )
    needed = "two or more"
    is_wrong = len(classes) < n_binary
    if spec.task == BINARY:
        needed = "exactly two"
        is_wrong = len(classes) != n_binary
    if is_wrong:
        raise DataError(
            f"{rows} hold the classes {examples}; task {spec.task!r} needs {needed}: set "
            f"target.classes, or correct {spec.features.sql}"
        )


def _linked_target(spec: FleetSpec, classes: Sequence[str]) -> Column:
    """The target as the trainer computes it: in link space, for classes their number.

    Null where it is invalid.
    """
    target = sf.col(f"`{spec.target.column}`")
    if classes:
        place = sf.array_position(sf.array(*map(sf.lit, classes)), target.cast("string"))
        return sf.when(place > 0, (place - 1).cast("double"))
    linked = link_column(target, spec.target.transform)
    if spec.objective in COUNTED:
        return sf.when(target >= 0, linked)
    return linked


def count_groups(
    rows: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    categories: Mapping[str, Sequence[str]],
    classes: Mapping[str, int] | None = None,
) -> CountedRows:
    """Count every group's rows by split, and hash them; one Spark job.

    A second one reads the weighted rows of a fleet that learns a quantile.

    Args:
        rows: the visible rows.
        spec: the fleet.
        cutoffs: the run's dates.
        categories: values per categorical feature, in order.
        classes: fit rows by class, as from `count_classes`.
    """
    classes = classes or {}
    narrow = _narrow_rows(rows, spec, cutoffs, categories, list(classes))
    counts = _aggregate(narrow, spec).toPandas()
    counts["rows_hash"] = _hash_texts(counts)
    pooled = counts[counts["grain"] == 0].iloc[0]
    nullable = []
    for place, name in enumerate(spec.feature_columns):
        mask, bit = divmod(place, MASK_BITS)
        if int(pooled[f"{_NULLS}{mask}"]) >> bit & 1:
            nullable.append(name)
    if _has_weighted_quantile(spec):
        constants = _weighted_quantiles(narrow, spec.learnt_quantile or 0.5)
    else:
        constants = _constants(pooled, spec, classes)
    private = [name for name in counts.columns if name.startswith("_")]
    return CountedRows(
        rows=rows,
        cutoffs=cutoffs,
        categories=categories,
        classes=list(classes),
        counts=counts.drop(columns=private),
        constants=constants,
        nullable=tuple(nullable),
    )


def _narrow_rows(
    rows: DataFrame,
    spec: FleetSpec,
    cutoffs: Cutoffs,
    categories: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> DataFrame:
    """Every row once per grain, with no more than what is counted."""
    linked = _linked_target(spec, classes)
    offset = number_or(spec.target.offset, 0.0)
    scale = number_or(spec.target.scale, 1.0)
    weight = number_or(spec.target.weight, 1.0)
    residual = finite((linked - offset) / sf.when(scale > 0, scale))
    is_learnt = is_learnt_from(spec)
    return _with_category_numbers(rows, categories).select(
        grain_column(spec).alias("_level"),
        sf.when(is_learnt, weight).alias("_weight"),
        split_column(cutoffs).alias("_split"),
        is_learnt.alias("_is_learnt"),
        sf.when(is_learnt, linked).alias("_linked"),
        sf.when(is_learnt, residual).alias("_residual"),
        sf.when(is_learnt, _row_hash(spec)).alias("_row_hash"),
        group_id_column(spec.finest).alias("_finest"),
        *_null_masks(spec),
    )


def _aggregate(narrow: DataFrame, spec: FleetSpec) -> DataFrame:
    """One row per group: counts, the two halves of its hash, its constants, its null features."""
    is_learnt = sf.col("_is_learnt")
    usable = sf.col("_residual").isNotNull()
    split = sf.col("_split")
    is_pooled = sf.col("_level.grain") == 0
    is_pooled_fit = (split == FIT) & is_pooled
    # Which finer groups a row is judged in is part of what a coarse group holds out.
    is_finest = sf.col("_level.grain") == len(spec.grains) - 1
    coarse_hash = sf.when(is_learnt, sf.xxhash64("_row_hash", "_finest"))
    hashed = sf.when(is_finest, sf.col("_row_hash")).otherwise(coarse_hash)

    def count_where(condition: Column, name: str) -> Column:
        return sf.sum(condition.cast("long")).alias(name)

    of_splits = [count_where(usable & (split == name), f"n_{name}") for name in (FIT, TUNE, REPORT)]
    masks = []
    for name in narrow.columns:
        if name.startswith(_NULLS):
            of_pooled = sf.when(is_pooled & usable, sf.col(name)).otherwise(sf.lit(0).cast("long"))
            masks.append(sf.bit_or(of_pooled).alias(name))
    constants = []
    if not _has_weighted_quantile(spec):
        for name, values in (("_constant", "_residual"), ("_plain_constant", "_linked")):
            of_fit = sf.when(is_pooled_fit, sf.col(values))
            constants.append(_constant_of(of_fit, spec).alias(name))
    # Not null: beside a null pandas would round the other groups' sums.
    no_row = sf.lit(0).cast("long")
    return narrow.groupBy("_level.grain", "_level.group_id").agg(
        sf.first("_level.parent_id").alias("parent_id"),
        sf.count("*").alias("n_rows"),
        count_where(is_learnt, "n_target"),
        count_where(is_learnt & sf.col("_linked").isNull(), "n_invalid"),
        *of_splits,
        # A sum of 64-bit hashes, whatever the order of the rows, in two halves that cannot
        # overflow.
        sf.coalesce(sf.sum(hashed.bitwiseAND(0xFFFFFFFF)), no_row).alias("_low"),
        sf.coalesce(sf.sum(sf.shiftrightunsigned(hashed, 32)), no_row).alias("_high"),
        *constants,
        *masks,
    )


def _has_weighted_quantile(spec: FleetSpec) -> bool:
    """Whether a quantile answers best without any model, of rows that count differently."""
    return spec.learnt_quantile is not None and spec.target.weight is not None


def _constant_of(values: Column, spec: FleetSpec) -> Column:
    """The best answer without any model: the weighted mean, or the quantile that is learnt."""
    if spec.learnt_quantile is not None:
        return sf.percentile_approx(values, spec.learnt_quantile, 10_000)
    if not spec.target.weight:
        return sf.avg(values)
    weights = sf.sum(sf.when(values.isNotNull(), sf.col("_weight")))
    return sf.sum(sf.col("_weight") * values) / weights


def _weighted_quantiles(narrow: DataFrame, quantile: float) -> Constants:
    """The quantile of weighted fit rows, of at most `MAX_QUANTILE_ROWS`; one Spark job.

    Which rows these are follows from their hashes, so it is the same in every run.
    """
    is_pooled_fit = (sf.col("_split") == FIT) & (sf.col("_level.grain") == 0)
    rows = narrow.where(is_pooled_fit & sf.col("_is_learnt"))
    columns = ["_residual", "_linked", "_weight"]
    some = rows.orderBy("_row_hash").limit(MAX_QUANTILE_ROWS).select(*columns).toPandas()

    def read_quantile(name: str) -> float:
        used = some[some[name].notna()].sort_values(name)
        reached = used["_weight"].cumsum() >= quantile * used["_weight"].sum()
        return _rounded(used.loc[reached, name].min())

    return Constants(read_quantile("_residual"), read_quantile("_linked"))


def _hash_texts(counts: pd.DataFrame) -> list[str]:
    """Each group's hash as text: its rows, and both halves of the sum."""
    texts = []
    for n, low, high in zip(counts["n_target"], counts["_low"], counts["_high"], strict=True):
        texts.append(f"{n}-{int(low):x}-{int(high):x}")
    return texts


def _constants(pooled: "pd.Series[Any]", spec: FleetSpec, classes: Mapping[str, int]) -> Constants:
    """What answers without any model, as the pooled group's row has it."""
    if spec.task == MULTICLASS:
        prior = _prior(classes)
        if prior:
            return Constants(0.0, 0.0, prior)
    return Constants(_rounded(pooled["_constant"]), _rounded(pooled["_plain_constant"]))


def _rounded(value: Any) -> float:
    """A constant to `DIGITS` significant digits; 0 where no row gives one."""
    if pd.isna(value):
        return 0.0
    return float(f"{value:.{DIGITS}g}")


def _prior(classes: Mapping[str, int]) -> tuple[float, ...]:
    """Each class's share of the fit rows; equal shares where there is no row."""
    total = sum(classes.values())
    if total:
        return tuple(count / total for count in classes.values())
    return tuple(1 / len(classes) for _ in classes)


def _null_masks(spec: FleetSpec) -> list[Column]:
    """Which features of a row are null or NaN, one bit each, in columns _nulls0, _nulls1, ...

    A few whole numbers travel more cheaply than a column each.
    """
    n_masks = math.ceil(len(spec.feature_columns) / MASK_BITS)
    masks = [sf.lit(0).cast("long")] * n_masks
    for place, name in enumerate(spec.feature_columns):
        mask, bit = divmod(place, MASK_BITS)
        value = sf.col(f"`{name}`")
        is_null = value.isNull()
        if name not in spec.features.categoricals:
            is_null = is_null | sf.isnan(value.try_cast("double"))
        flag = sf.when(is_null, sf.lit(1 << bit)).otherwise(sf.lit(0)).cast("long")
        masks[mask] = masks[mask].bitwiseOR(flag)
    return [mask.alias(f"{_NULLS}{number}") for number, mask in enumerate(masks)]


def _with_category_numbers(rows: DataFrame, categories: Mapping[str, Sequence[str]]) -> DataFrame:
    """The rows with each categorical's number, as training sees it, beside it.

    Null for a value that is not in the fleet's list.
    """
    for name, values in categories.items():
        numbered = rows.sparkSession.createDataFrame(
            list(enumerate(values)), f"`_number_{name}` int, `_value_{name}` string"
        )
        is_same = sf.col(f"`{name}`").cast("string") == sf.col(f"`_value_{name}`")
        rows = rows.join(sf.broadcast(numbered), is_same, "left").drop(f"_value_{name}")
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

    features = []
    for name in spec.feature_columns:
        if name in spec.features.categoricals:
            features.append(sf.coalesce(sf.col(f"`_number_{name}`"), sf.lit(-1)))
        else:
            features.append(number(name, "float"))
    # In double precision even where they are features, too. Baselines are not learnt from, and read
    # when the run is judged.
    exact = []
    target = spec.target
    for column in dict.fromkeys((target.offset, target.scale, target.weight)):
        if column is not None:
            exact.append(number(column, "double"))
    # An infinite target counts as such: it is not null.
    actual = sf.col(f"`{target.column}`")
    return sf.xxhash64(
        sf.lit(len(features)), "row_key", "time", "known_at", actual, *features, *exact
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
    pairs = []
    for name in names:
        value = sf.col(f"`{name}`").cast("string")
        pairs.append(sf.struct(sf.lit(name).alias("name"), value.alias("value")))
    fit = rows.where((split_column(cutoffs) == FIT) & is_learnt_from(spec))
    counted = (
        fit.select(sf.explode(sf.array(*pairs)).alias("_pair"))
        .where("_pair.value IS NOT NULL")
        .groupBy("_pair.name", "_pair.value")
        .count()
    )
    rank = sf.expr("row_number() OVER (PARTITION BY name ORDER BY count DESC, value)")
    is_kept = sf.col("_rank") <= spec.features.max_categories
    categories: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in counted.withColumn("_rank", rank).where(is_kept).collect():
        categories[row["name"]][row["value"]] = row["count"]
    return categories
