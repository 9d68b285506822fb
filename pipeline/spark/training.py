"""Grouped training on Spark: counts for the plan, one job that trains and writes, sums for the blend."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.errors import DataError
from pipeline.grouping.plan import TrainingPlan
from pipeline.grouping.splits import FIT, GAP, REPORT, TUNE, Cutoffs
from pipeline.spark.files import FileWriter, WrittenFile, file_json, file_of_json
from pipeline.spark.keys import finite, group_id_column, link_column, moment_column
from pipeline.spec import BINARY, COUNTED, MAX_CLASSES, MULTICLASS, QUANTILE, FleetSpec
from pipeline.tables import BOOSTERS, HOLDOUT
from pipeline.training.blend import Constants
from pipeline.training.trainer import TrainingSettings
from pipeline.training.worker import OUTCOME_COLUMNS, TrainGroup, run_group

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingData:
    """What the plan needs to know of the visible rows.

    Args:
        counts: one row per group of every grain, with its counts and parent.
        constants: what answers without a model: mean of the fit rows (their quantile where one is learnt; classes' shares), 0 where
            there is none.
    """

    counts: pd.DataFrame
    constants: Constants


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


def _grain_column(spec: FleetSpec) -> Column:
    """Each row once per grain: its index, group and parent."""
    ids = [group_id_column(grain) for grain in spec.grains]
    parents = [sf.lit(None).cast("string"), *ids[:-1]]
    levels = [
        sf.struct(sf.lit(level).alias("grain"), own.alias("group_id"), parent.alias("parent_id"))
        for level, (own, parent) in enumerate(zip(ids, parents, strict=True))
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
    counted = rows.where((_split_column(cutoffs) == FIT) & column.isNotNull()).groupBy(column.alias("class_name")).count()
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


def count_groups(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs, classes: Mapping[str, int] | None = None) -> TrainingData:
    """Count every group's rows by split; one Spark job.

    Args:
        rows: the visible rows.
        spec: the fleet.
        cutoffs: the run's dates.
        classes: fit rows by class, as from `count_classes`.
    """
    target = spec.target
    linked = _linked_target(spec, list(classes or {}))
    offset = finite(sf.col(f"`{target.offset}`")) if target.offset else sf.lit(0.0)
    scale = finite(sf.col(f"`{target.scale}`")) if target.scale else sf.lit(1.0)
    residual = finite((linked - offset) / sf.when(scale > 0, scale))
    # As the trainer counts: rows of no weight teach nothing.
    weighs = finite(sf.col(f"`{target.weight}`")) > 0 if target.weight else sf.lit(True)
    narrow = rows.select(
        _grain_column(spec).alias("_level"),
        weighs.alias("_weighs"),
        _split_column(cutoffs).alias("_split"),
        sf.col(f"`{target.column}`").isNotNull().alias("_known"),
        linked.alias("_linked"),
        residual.alias("_residual"),
    )

    def rows_where(condition: Column, name: str) -> Column:
        return sf.sum(condition.cast("long")).alias(name)

    usable = sf.col("_residual").isNotNull() & sf.coalesce(sf.col("_weighs"), sf.lit(False))
    fit, is_pooled = sf.col("_split") == FIT, sf.col("_level.grain") == 0

    def middle(values: Column) -> Column:
        return sf.percentile_approx(values, spec.alpha or 0.5, 10_000) if spec.objective == QUANTILE else sf.avg(values)

    counted = narrow.groupBy("_level.grain", "_level.group_id").agg(
        sf.first("_level.parent_id").alias("parent_id"),
        sf.count("*").alias("n_rows"),
        rows_where(sf.col("_known"), "n_target"),
        *(rows_where(usable & (sf.col("_split") == split), f"n_{split}") for split in (FIT, TUNE, REPORT)),
        middle(sf.when(fit & is_pooled, sf.col("_residual"))).alias("_constant"),
        middle(sf.when(fit & is_pooled, sf.col("_linked"))).alias("_plain_constant"),
    )
    counts = counted.toPandas()
    pooled = counts[counts["grain"] == 0].iloc[0]
    with_offset, without_offset = (0.0 if pd.isna(pooled[name]) else float(pooled[name]) for name in ("_constant", "_plain_constant"))
    prior = _prior(classes or {}) if spec.task == MULTICLASS else ()
    return TrainingData(
        counts.drop(columns=["_constant", "_plain_constant"]), Constants(0.0, 0.0, prior) if prior else Constants(with_offset, without_offset)
    )


def _prior(classes: Mapping[str, int]) -> tuple[float, ...]:
    """Each class's share of the fit rows; equal shares where there is no row."""
    total = sum(classes.values())
    return tuple(count / total if total else 1 / len(classes) for count in classes.values())


def count_categories(rows: DataFrame, spec: FleetSpec, cutoffs: Cutoffs) -> dict[str, dict[str, int]]:
    """Rows per value of each categorical, on fit rows only; one Spark job, at most `max_categories` values each."""
    names = spec.features.categoricals
    if not names:
        return {}
    pairs = sf.explode(sf.array(*(sf.struct(sf.lit(name).alias("name"), sf.col(f"`{name}`").cast("string").alias("value")) for name in names)))
    fit = rows.where((_split_column(cutoffs) == FIT) & sf.col(f"`{spec.target.column}`").isNotNull())
    counted = fit.select(pairs.alias("_pair")).where("_pair.value IS NOT NULL").groupBy("_pair.name", "_pair.value").count()
    rank = sf.expr("row_number() OVER (PARTITION BY name ORDER BY count DESC, value)")
    kept = counted.withColumn("_rank", rank).where(sf.col("_rank") <= spec.features.max_categories).collect()
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in kept:
        found[row["name"]][row["value"]] = row["count"]
    return found


@contextmanager
def _without_adaptive_execution(spark: SparkSession) -> Iterator[None]:
    """Adaptive execution would merge the tasks that the plan has laid out."""
    before = spark.conf.get("spark.sql.adaptive.enabled")
    spark.conf.set("spark.sql.adaptive.enabled", "false")
    try:
        yield
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", str(before))


def placed_rows(spark: SparkSession, rows: DataFrame, spec: FleetSpec, plan: TrainingPlan) -> DataFrame:
    """Every row once per grain whose group is trained, in the Spark partition that is its group's task; one exchange.

    The pooled group is always there, if only to judge the rows that no model answers.
    """
    tasks = plan.to_train[["grain", "group_id", "task"]]
    if plan.n_tasks and (tasks["task"].min() < 0 or tasks["task"].max() >= plan.n_tasks):
        # Ids outside the range would wrap around silently.
        raise AssertionError(f"task ids {tasks['task'].min()}..{tasks['task'].max()} are not within 0..{plan.n_tasks - 1}")
    if not (tasks["grain"] == 0).any():
        tasks = pd.concat([tasks, pd.DataFrame({"grain": [0], "group_id": ["[]"], "task": [0]})])
    where = spark.createDataFrame(tasks.astype({"grain": "int32", "task": "int32"}), "grain int, group_id string, task int")
    needed = dict.fromkeys([*spec.finest, *spec.feature_columns, *spec.carried_columns, spec.target.column, "time", "known_at", "row_key"])
    exploded = rows.where(sf.col(f"`{spec.target.column}`").isNotNull()).select(
        _grain_column(spec).alias("_level"), *(f"`{name}`" for name in needed)
    )
    flat = exploded.select("_level.grain", "_level.group_id", *(f"`{name}`" for name in needed))
    return flat.join(sf.broadcast(where), ["grain", "group_id"]).repartitionById(max(1, plan.n_tasks), "task")


@dataclass(frozen=True)
class TrainedFiles:
    """What one training job left behind, not yet committed.

    Args:
        outcomes: one dict per trained or failed group: ledger columns.
        boosters: files of the booster store.
        holdout: files of the holdout table.
    """

    outcomes: list[dict[str, Any]]
    boosters: list[WrittenFile]
    holdout: list[WrittenFile]


def train_groups(
    spark: SparkSession,
    placed: DataFrame,
    settings: TrainingSettings,
    roots: Mapping[str, str],
    options: Mapping[str, str],
    costs: Mapping[tuple[int, str], float],
    report: Report,
    train: TrainGroup | None = None,
) -> TrainedFiles:
    """Train every placed group; one Spark job, whose tasks write boosters and holdout themselves.

    Args:
        spark: the session.
        placed: as from `placed_rows`.
        settings: the run's.
        roots: roots of the tables boosters and holdout.
        options: storage options.
        costs: planned seconds by (grain, group id), for the progress report.
        report: called now and then with groups done, groups failed, planned seconds done.
        train: what trains a group; another function only in tests.
    """
    context = spark.sparkContext
    done, failed, worked = context.accumulator(0), context.accumulator(0), context.accumulator(0.0)

    def train_one(frame: pd.DataFrame) -> pd.DataFrame:
        outcome = run_group(frame, settings, train) if train else run_group(frame, settings)
        done.add(1)
        if json.loads(outcome["ledger"].iloc[0])["status"] == "failed":
            failed.add(1)
        worked.add(costs.get((int(outcome["grain"].iloc[0]), outcome["group_id"].iloc[0]), 0.0))
        return outcome

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        writers = {
            "boosters": FileWriter(roots["boosters"], options, BOOSTERS.schema),
            "holdout": FileWriter(roots["holdout"], options, HOLDOUT.schema),
        }
        for batch in batches:
            for row in batch.to_pylist():
                if row["text"] is not None:
                    booster = {name: row.get(name, settings.run_id) for name in BOOSTERS.schema.names}
                    writers["boosters"].write(pa.Table.from_pylist([booster], schema=BOOSTERS.schema))
                if row["holdout"] is not None:
                    writers["holdout"].write(pa.ipc.open_stream(row["holdout"]).read_all())
                line = {"grain": row["grain"], "group_id": row["group_id"], **json.loads(row["ledger"])}
                yield pa.RecordBatch.from_pydict({"kind": ["outcome"], "line": [json.dumps(line)]})
        for table, writer in writers.items():
            if (written := writer.close()) is not None:
                yield pa.RecordBatch.from_pydict({"kind": ["file"], "line": [file_json(table, written)]})

    trained = placed.groupBy("task", "grain", "group_id").applyInPandas(train_one, OUTCOME_COLUMNS)
    with _without_adaptive_execution(spark), _progress(lambda: report(done.value, failed.value, worked.value)):
        rows = trained.mapInArrow(write, "kind string, line string").collect()
    files = [json.loads(row["line"]) for row in rows if row["kind"] == "file"]
    return TrainedFiles(
        outcomes=[json.loads(row["line"]) for row in rows if row["kind"] == "outcome"],
        boosters=[file_of_json(file) for file in files if file["table"] == "boosters"],
        holdout=[file_of_json(file) for file in files if file["table"] == "holdout"],
    )


@contextmanager
def _progress(tell: Callable[[], None], every_seconds: float = 2.0) -> Iterator[None]:
    """Call `tell` now and then, and once at the end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_seconds):
            tell()

    watcher = threading.Thread(target=watch, name="training-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    tell()
