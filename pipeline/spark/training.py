"""Grouped training on Spark: counts for the plan, one job that trains and writes, sums for the blend."""

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles, TaskContext
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.errors import DataError
from pipeline.models.meta_model import GroupKey
from pipeline.runs.sampling import SAMPLED_WHOLE
from pipeline.runs.schedule import Pace, seconds_left
from pipeline.spark.files import FileWriter, WrittenFile, file_json, file_of_json
from pipeline.spark.keys import finite, group_id_column, link_column, moment_column
from pipeline.spec import BINARY, COUNTED, MAX_CLASSES, MULTICLASS, QUANTILE, FleetSpec
from pipeline.tables import BOOSTERS, HOLDOUT
from pipeline.training.blend import Constants
from pipeline.training.splits import FIT, GAP, REPORT, TUNE, Cutoffs
from pipeline.training.trainer import RATE, TrainingSettings, train_group
from pipeline.training.worker import NOT_STARTED, OUTCOME_SCHEMA, TaskWorker, TrainGroup, not_started

Report = Callable[["Done"], None]
# Constants and weights keep so many significant digits: sums over files in another order differ in the last ones.
DIGITS = 12
# Features per whole number that tells which of them are null.
MASK_BITS = 48


@dataclass(frozen=True)
class TrainingData:
    """What the plan needs to know of the visible rows.

    Args:
        counts: one row per group of every grain, with its counts, its parent, and the hash of its training rows.
        constants: what answers without a model: mean of the fit rows (their quantile where one is learnt; classes' shares), 0 where
            there is none.
        nullable: features in which a row that is learnt from has a null.
    """

    counts: pd.DataFrame
    constants: Constants
    nullable: tuple[str, ...]


def visible_rows(features: DataFrame, as_of: pd.Timestamp) -> DataFrame:
    """The rows that a run may see: known by the as-of, not made up."""
    return features.where((sf.col("known_at") <= moment_column(as_of)) & ~sf.col("is_future"))


def limited_rows(rows: DataFrame, spec: FleetSpec, limit_groups: int | None) -> DataFrame:
    """Only the rows of that many finest groups, the same ones each time (by hash)."""
    if limit_groups is None:
        return rows
    groups = rows.select(group_id_column(spec.finest).alias("_group")).distinct().orderBy(sf.xxhash64("_group"), "_group").limit(limit_groups)
    return rows.withColumn("_group", group_id_column(spec.finest)).join(sf.broadcast(groups), "_group", "left_semi").drop("_group")


def _split_column(cutoffs: Cutoffs) -> Column:
    """The twin of `Cutoffs.assign`."""
    tune_start, report_start = (moment_column(moment) for moment in (cutoffs.tune_start, cutoffs.report_start))
    return (
        sf.when((sf.col("time") < tune_start) & (sf.col("known_at") < tune_start), FIT)
        .when((sf.col("time") >= tune_start) & (sf.col("time") < report_start) & (sf.col("known_at") < report_start), TUNE)
        .when(sf.col("time") >= report_start, REPORT)
        .otherwise(GAP)
    )


def grain_column(spec: FleetSpec, grains: Sequence[int] | None = None) -> Column:
    """Each row once per grain (of the named ones): its index, group and parent."""
    ids = [group_id_column(grain) for grain in spec.grains]
    parents = [sf.lit(None).cast("string"), *ids[:-1]]
    levels = [
        sf.struct(sf.lit(level).alias("grain"), own.alias("group_id"), parent.alias("parent_id"))
        for level, (own, parent) in enumerate(zip(ids, parents, strict=True))
        if grains is None or level in grains
    ]
    return sf.explode(sf.array(*levels))


def count_classes(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> dict[str, int]:
    """Fit rows of each of the fleet's classes, in the classes' order; one Spark job, none for regression.

    Raises:
        DataError: if the classes are found in the data, and they are more than 100, fewer than two, or for binary not two.
    """
    if not spec.is_class_task:
        return {}
    column = sf.col(f"`{spec.target.column}`").cast("string")
    counted = rows.where((_split_column(cutoffs) == FIT) & is_learnt_from(spec)).groupBy(column.alias("class_name")).count()
    declared = spec.target.classes
    if declared is not None:
        there = {row["class_name"]: int(row["count"]) for row in counted.where(sf.col("class_name").isin(list(declared))).collect()}
        return {name: there.get(name, 0) for name in declared}
    found = {row["class_name"]: int(row["count"]) for row in counted.orderBy("class_name").limit(MAX_CLASSES + 1).collect()}
    shown = ", ".join(repr(name) for name in list(found)[:10]) or "none"
    what = f"target {spec.target.column!r}: the fit rows (before {cutoffs.tune_start})"
    if len(found) > MAX_CLASSES:
        raise DataError(f"{what} hold more than {MAX_CLASSES} classes, e.g. {shown}; merge rare ones in {spec.features.sql}, or use task: regression")
    if len(found) < 2 or (spec.task == BINARY and len(found) > 2):  # noqa: PLR2004
        wanted = "exactly two" if spec.task == BINARY else "two or more"
        raise DataError(f"{what} hold the classes {shown}; task {spec.task!r} needs {wanted}: set target.classes, or correct {spec.features.sql}")
    return found


def _linked_target(spec: FleetSpec, classes: Sequence[str]) -> Column:
    """What the trainer learns from, as it computes it: link space, for classes their number; null where invalid."""
    target = sf.col(f"`{spec.target.column}`")
    if classes:
        place = sf.array_position(sf.array(*(sf.lit(name) for name in classes)), target.cast("string"))
        return sf.when(place > 0, (place - 1).cast("double"))
    linked = link_column(target, spec.target.transform)
    return sf.when(target >= 0, linked) if spec.objective in COUNTED else linked


def count_groups(
    rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs, categories: Mapping[str, Sequence[str]], classes: Mapping[str, int] | None = None
) -> TrainingData:
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
        _split_column(cutoffs).alias("_split"),
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
    hashed = sf.when(is_finest, sf.col("_row_hash")).otherwise(sf.when(sf.col("_known"), sf.xxhash64("_row_hash", "_finest")))

    def rows_where(condition: Column, name: str) -> Column:
        return sf.sum(condition.cast("long")).alias(name)

    usable = sf.col("_residual").isNotNull()
    fit, is_pooled = sf.col("_split") == FIT, sf.col("_level.grain") == 0

    def middle(values: Column) -> Column:
        if spec.objective == QUANTILE:
            return sf.percentile_approx(values, spec.alpha or 0.5, 10_000)
        if not target.weight:
            return sf.avg(values)
        return sf.sum(sf.col("_weight") * values) / sf.sum(sf.when(values.isNotNull(), sf.col("_weight")))

    counted = narrow.groupBy("_level.grain", "_level.group_id").agg(
        sf.first("_level.parent_id").alias("parent_id"),
        sf.count("*").alias("n_rows"),
        rows_where(sf.col("_known"), "n_target"),
        rows_where(sf.col("_known") & sf.col("_linked").isNull(), "n_invalid"),
        *(rows_where(usable & (sf.col("_split") == split), f"n_{split}") for split in (FIT, TUNE, REPORT)),
        # A sum of 64-bit hashes, whatever the order of the rows, in two halves that cannot overflow.
        sf.sum(hashed.bitwiseAND(0xFFFFFFFF)).alias("_low"),
        sf.sum(sf.shiftrightunsigned(hashed, 32)).alias("_high"),
        middle(sf.when(fit & is_pooled, sf.col("_residual"))).alias("_constant"),
        middle(sf.when(fit & is_pooled, sf.col("_linked"))).alias("_plain_constant"),
        *(sf.bit_or(sf.when(is_pooled & usable, sf.col(name)).otherwise(sf.lit(0).cast("long"))).alias(name) for name in masks),
    )
    counts = counted.toPandas()
    counts["rows_hash"] = [
        f"{n}-{low:x}-{high:x}" for n, low, high in zip(counts["n_target"], _whole(counts["_low"]), _whole(counts["_high"]), strict=True)
    ]
    pooled = counts[counts["grain"] == 0].iloc[0]
    with_offset, without_offset = (0.0 if pd.isna(pooled[name]) else _rounded(pooled[name]) for name in ("_constant", "_plain_constant"))
    prior = _prior(classes or {}) if spec.task == MULTICLASS else ()
    constants = Constants(0.0, 0.0, prior) if prior else Constants(with_offset, without_offset)
    nullable = tuple(name for place, name in enumerate(spec.feature_columns) if int(pooled[masks[place // MASK_BITS]]) >> place % MASK_BITS & 1)
    return TrainingData(counts.drop(columns=["_constant", "_plain_constant", "_low", "_high", *masks]), constants, nullable)


def _null_masks(spec: FleetSpec) -> list[Column]:
    """Which features of a row are null or NaN, one bit each: a few whole numbers, which travel more cheaply than a column each."""
    masks = [sf.lit(0).cast("long") for _ in range(0, len(spec.feature_columns), MASK_BITS)]
    for place, name in enumerate(spec.feature_columns):
        value = sf.col(f"`{name}`")
        is_null = value.isNull() if name in spec.features.categoricals else value.isNull() | sf.isnan(value.try_cast("double"))
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
    """Each categorical's number beside it, as training sees it: null for a value that is not in the fleet's list."""
    for name, values in categories.items():
        numbered = rows.sparkSession.createDataFrame(list(enumerate(values)), f"`_number_{name}` int, `_value_{name}` string")
        found = sf.col(f"`{name}`").cast("string") == sf.col(f"`_value_{name}`")
        rows = rows.join(sf.broadcast(numbered), found, "left").drop(f"_value_{name}")
    return rows


def _row_hash(spec: FleetSpec) -> Column:
    """64-bit hash of all that training reads of a row, as it reads it: features in single precision, no difference between null and NaN."""

    def number(name: str, kind: str) -> Column:
        value = sf.col(f"`{name}`").try_cast(kind)
        return sf.coalesce(sf.when(~sf.isnan(value) & (sf.abs(value) < float("inf")), value), sf.lit(float("nan")).cast(kind))

    features = [
        sf.coalesce(sf.col(f"`_number_{name}`"), sf.lit(-1)) if name in spec.features.categoricals else number(name, "float")
        for name in spec.feature_columns
    ]
    # In double precision even where they are features, too. Baselines are not learnt from, and read when the run is judged.
    used = (spec.target.offset, spec.target.scale, spec.target.weight)
    exact = [number(name, "double") for name in dict.fromkeys(used) if name is not None]
    # An infinite target counts as such: it is not null.
    target = sf.col(f"`{spec.target.column}`")
    return sf.xxhash64(sf.lit(len(features)), "row_key", "time", "known_at", target, *features, *exact)


def is_learnt_from(spec: FleetSpec) -> Column:
    """Whether a row counts, as the trainer sees it: its target is neither null nor NaN, and its weight is above 0."""
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


def count_categories(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> dict[str, dict[str, int]]:
    """Rows per value of each categorical, on fit rows only; one Spark job, at most `max_categories` values each."""
    names = spec.features.categoricals
    if not names:
        return {}
    pairs = sf.explode(sf.array(*(sf.struct(sf.lit(name).alias("name"), sf.col(f"`{name}`").cast("string").alias("value")) for name in names)))
    fit = rows.where((_split_column(cutoffs) == FIT) & is_learnt_from(spec))
    counted = fit.select(pairs.alias("_pair")).where("_pair.value IS NOT NULL").groupBy("_pair.name", "_pair.value").count()
    rank = sf.expr("row_number() OVER (PARTITION BY name ORDER BY count DESC, value)")
    kept = counted.withColumn("_rank", rank).where(sf.col("_rank") <= spec.features.max_categories).collect()
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in kept:
        found[row["name"]][row["value"]] = row["count"]
    return found


@contextmanager
def without_adaptive_execution(spark: SparkSession) -> Iterator[None]:
    """Adaptive execution would merge the tasks that the plan has laid out."""
    before = spark.conf.get("spark.sql.adaptive.enabled")
    spark.conf.set("spark.sql.adaptive.enabled", "false")
    try:
        yield
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", str(before))


def placed_rows(spark: SparkSession, rows: DataFrame, spec: FleetSpec, groups: pd.DataFrame, bases: DataFrame | None = None) -> DataFrame:
    """Every row once per grain whose group is trained, in the Spark partition that is its group's task; one exchange.

    Args:
        spark: the session.
        rows: the visible rows.
        spec: the fleet.
        groups: what is trained: grain, group_id, task (from 0, without gaps) and, for a sampled group, exponent (see `pipeline.runs.sampling`).
        bases: what the groups' trees correct: row_key and the parent's prediction, `_base`; None where they correct nothing.

    Returns:
        The columns that training reads, grain, group_id, task and, where a group is sampled, the row's sampling rate.
    """
    n_tasks = int(groups["task"].max()) + 1
    if groups["task"].min() < 0:
        # Ids outside the range would wrap around silently.
        raise AssertionError(f"task ids {groups['task'].min()}..{groups['task'].max()} are not within 0..{n_tasks - 1}")
    columns = {"grain": "int32", "group_id": "str", "task": "int32", "exponent": "int32"}
    schema = "grain int, group_id string, task int, exponent int"
    where = spark.createDataFrame(groups[list(columns)].astype(columns), schema)
    target = spec.target
    learnt = [name for name in (target.column, target.offset, target.scale, target.weight) if name is not None]
    needed = list(dict.fromkeys([*spec.finest, *spec.feature_columns, *learnt, "time", "known_at", "row_key"]))
    known = rows.where(is_learnt_from(spec))
    extra: list[str] = []
    if groups["exponent"].any():
        known, extra = _with_rates(known, spec), ["_finest_rows"]
    levels = sf.col("_level")
    exploded = known.select(grain_column(spec, sorted(set(groups["grain"]))).alias("_level"), *(f"`{name}`" for name in [*needed, *extra]))
    flat = exploded.select(levels["grain"].alias("grain"), levels["group_id"].alias("group_id"), *(f"`{name}`" for name in [*needed, *extra]))
    placed = flat.join(sf.broadcast(where), ["grain", "group_id"])
    if extra:
        # The share of its finest group's rows that stays: 1, 1/2, 1/4 ..., but never less than SAMPLED_WHOLE rows.
        rate = sf.greatest(sf.pow(sf.lit(0.5), sf.col("exponent")), sf.pow(sf.lit(2.0), sf.ceil(sf.log2(SAMPLED_WHOLE / sf.col("_finest_rows")))))
        placed = placed.withColumn(RATE, sf.when(sf.col("exponent") > 0, sf.least(sf.lit(1.0), rate)).otherwise(1.0))
        # By the row's own hash, so that a row that is in a sample stays in it from run to run.
        share = sf.pmod(sf.xxhash64("row_key"), sf.lit(1 << 30)) / float(1 << 30)
        placed = placed.where(share < sf.col(RATE)).drop("_finest_rows")
    if bases is not None:
        placed = placed.join(bases, "row_key", "left")
    return placed.drop("exponent").repartitionById(n_tasks, "task")


def _with_rates(rows: DataFrame, spec: FleetSpec) -> DataFrame:
    """The number of rows of its finest group beside each row; another exchange, only for fleets that are sampled."""
    # Other names for the keys: joined with what comes of them, columns of the same names could not be told apart.
    keys = {f"_key_{number}": sf.col(f"`{key}`") for number, key in enumerate(spec.finest)}
    counted = rows.groupBy(*(column.alias(name) for name, column in keys.items())).agg(sf.count("*").alias("_finest_rows"))
    same = [column.eqNullSafe(sf.col(name)) for name, column in keys.items()]
    joined = rows.join(counted, same, "left") if keys else rows.crossJoin(counted)
    return joined.drop(*keys)


@dataclass(frozen=True)
class TrainedFiles:
    """What one wave left behind, not yet committed.

    Args:
        outcomes: one dict per group: ledger columns.
        boosters: files of the booster store.
        holdout: files of the holdout table.
        not_started: groups for which the wave's time was over, as (grain, group id).
    """

    outcomes: list[dict[str, Any]]
    boosters: list[WrittenFile]
    holdout: list[WrittenFile]
    not_started: list[GroupKey] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """How far the training of a run is.

    Args:
        groups: trained, or found not to be trainable.
        failed: of these.
        of: groups to train.
        seconds_left: wall seconds, about; None before there is evidence.
    """

    groups: int
    failed: int
    of: int
    seconds_left: float | None


class Progress:
    """Counts of what is done, added up on Spark's workers as their tasks end.

    Args:
        spark: the session.
        report: called now and then.
        slots: tasks that run at once.
    """

    def __init__(self, spark: SparkSession, report: Report, slots: int = 1) -> None:
        context = spark.sparkContext
        self.done, self.failed = context.accumulator(0), context.accumulator(0)
        # Of the groups that ended: seconds as planned, and as they were.
        self.worked, self.spent = context.accumulator(0.0), context.accumulator(0.0)
        self.pace = Pace()
        self._report = report
        self._slots = slots
        self._of, self._planned = 0, 0.0
        self._began = time.monotonic()

    def expect(self, groups: pd.DataFrame) -> None:
        """These groups are to be trained, too: rows of a plan."""
        self._of += len(groups)
        self._planned += float(groups["cost_seconds"].sum())

    def so_far(self) -> Done:
        """What is done by now."""
        done = int(self.done.value)
        left = seconds_left(
            self.pace,
            slots=self._slots,
            groups_left=self._of - done,
            planned_left=max(0.0, self._planned - float(self.worked.value)),
            spent=float(self.spent.value),
            elapsed=time.monotonic() - self._began,
        )
        return Done(done, int(self.failed.value), self._of, left)

    @contextmanager
    def told(self, every_seconds: float = 2.0) -> Iterator[None]:
        """Report now and then, and once at the end."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(every_seconds):
                self._report(self.so_far())

        watcher = threading.Thread(target=watch, name="training-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        self._report(self.so_far())


@dataclass(frozen=True)
class Wave:
    """The groups of one Spark job.

    Args:
        name: unique for ever; the partition of its boosters and holdout rows.
        groups: rows of the plan.
        start_seconds: so long after its first group it may start another; by default it starts all.
    """

    name: str
    groups: pd.DataFrame
    start_seconds: float | None = None


def train_wave(
    placed: DataFrame,
    wave: Wave,
    settings: TrainingSettings,
    roots: Mapping[str, str],
    options: Mapping[str, str],
    progress: Progress,
    train: TrainGroup | None = None,
    memory_bytes: int | None = None,
) -> TrainedFiles:
    """Train every placed group; one Spark job, whose tasks write boosters and holdout themselves.

    Args:
        placed: as from `placed_rows`.
        wave: what is placed.
        settings: the run's.
        roots: roots of the tables boosters and holdout.
        options: storage options.
        progress: what is done.
        train: what trains a group; another function only in tests.
        memory_bytes: memory one group may take.
    """
    groups = wave.groups
    keys = GroupKey.of_rows(groups)
    starts = dict(zip(keys, groups["started_from"], strict=True))
    costs = dict(zip(keys, groups["cost_seconds"].astype(float), strict=True))
    name, run_id, start_seconds = wave.name, settings.run_id, wave.start_seconds
    done, failed, worked, spent = progress.done, progress.failed, progress.worked, progress.spent

    def train_one(rows: pa.Table) -> pa.Table:
        if start_seconds is not None and _is_over(name, start_seconds):
            return not_started(rows)
        outcome = _worker_of(name, settings, starts, train, memory_bytes).train(rows)
        ledger = json.loads(outcome["ledger"][0].as_py())
        done.add(1)
        if ledger["status"] in ("failed", "crashed"):
            failed.add(1)
        worked.add(costs[GroupKey(outcome["grain"][0].as_py(), outcome["group_id"][0].as_py())])
        spent.add(float(ledger.get("seconds") or 0.0))
        return outcome

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        keep_imports()
        boosters = FileWriter(roots["boosters"], options, BOOSTERS.schema)
        holdout = FileWriter(roots["holdout"], options, HOLDOUT.schema)
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            trained = rows.filter(rows["text"].is_valid())
            boosters.write(_marked(trained.select([field.name for field in OUTCOME_SCHEMA if field.name in BOOSTERS.schema.names]), name, run_id))
            streams = [pa.ipc.open_stream(part).read_all() for part in rows["holdout"].drop_null().to_pylist()]
            if streams:
                holdout.write(_marked(pa.concat_tables(streams), name, run_id))
            lines = [
                {"grain": row["grain"], "group_id": row["group_id"], **json.loads(row["ledger"])}
                for row in rows.select(["grain", "group_id", "ledger"]).to_pylist()
            ]
            yield pa.RecordBatch.from_pydict({"kind": ["outcome"] * len(lines), "line": [json.dumps(line) for line in lines]})
        for table, writer in (("boosters", boosters), ("holdout", holdout)):
            if (written := writer.close()) is not None:
                yield pa.RecordBatch.from_pydict({"kind": ["file"], "line": [file_json(table, written)]})

    trained = placed.groupBy("task", "grain", "group_id").applyInArrow(train_one, from_arrow_schema(OUTCOME_SCHEMA))
    rows = trained.mapInArrow(write, "kind string, line string").collect()
    files = [json.loads(row["line"]) for row in rows if row["kind"] == "file"]
    outcomes = [json.loads(row["line"]) for row in rows if row["kind"] == "outcome"]
    return TrainedFiles(
        outcomes=[outcome for outcome in outcomes if outcome["status"] != NOT_STARTED],
        not_started=[GroupKey.of(outcome) for outcome in outcomes if outcome["status"] == NOT_STARTED],
        boosters=[file_of_json(file) for file in files if file["table"] == "boosters"],
        holdout=[file_of_json(file) for file in files if file["table"] == "holdout"],
    )


def _marked(rows: pa.Table, wave: str, run_id: str) -> pa.Table:
    """The rows with the wave and the run that they belong to."""
    for name, value in (("wave", wave), ("run_id", run_id)):
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    return rows


def keep_imports() -> None:
    """Let Python's collector pass over what a worker holds by now, that is, its imports.

    Spark collects garbage after every task, which takes a worker a tenth of a second with all that training imports.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def _is_over(wave: str, start_seconds: float) -> bool:
    """Whether this executor began a wave longer ago than that; a task that Spark repeats starts all its groups.

    Its tasks run in several processes, which share a file in the executor's own folder, and the machine's clock, which
    no other machine has to agree with. The first to come writes the file: every wave starts a group at least.
    """
    context = TaskContext.get()
    if context is not None and context.attemptNumber() > 0:
        return False
    began = Path(SparkFiles.getRootDirectory()) / f"began-{wave}"
    now = time.monotonic()
    try:
        with began.open("x") as file:
            file.write(repr(now))
    except FileExistsError:
        # Another process has made it, and may be about to write.
        return now - float(began.read_text() or now) > start_seconds
    return False


# One per Python worker of Spark, which runs many tasks.
_workers: dict[str, TaskWorker] = {}


def _worker_of(
    wave: str, settings: TrainingSettings, starts: Mapping[GroupKey, str], train: TrainGroup | None, memory_bytes: int | None
) -> TaskWorker:
    if wave not in _workers:
        keep_imports()
        for other in list(_workers):
            _workers.pop(other).close()
        _workers[wave] = TaskWorker(settings, starts, train or train_group, memory_bytes)
    return _workers[wave]
