"""Grouped training on Spark: rows placed as the plan says, and one job that trains and writes."""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles, TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.plan import pack_tasks
from pipeline.runs.sampling import SAMPLED_WHOLE
from pipeline.runs.wave import TrainedFiles, Wave
from pipeline.spark.execution import keep_imports, without_adaptive_execution
from pipeline.spark.files import FileWriter, file_json, file_of_json, read_files
from pipeline.spark.keys import quoted
from pipeline.spark.placement import (
    SALT,
    find_salts,
    group_placed,
    place_by_salt,
    restore_moments,
    travel_types,
)
from pipeline.spark.progress import Progress, Report
from pipeline.spark.rows import grain_column, is_learnt_from
from pipeline.spec import FleetSpec
from pipeline.storage import WrittenFile
from pipeline.tables import BOOSTERS, HOLDOUT
from pipeline.training.trainer import RATE, TrainingSettings, train_group
from pipeline.training.worker import (
    NOT_STARTED,
    OUTCOME_SCHEMA,
    TaskWorker,
    TrainGroup,
    named_columns,
    not_started,
    stream_of,
)

# Beside each row, where a fleet is sampled: the rows of its finest group.
_FINEST_ROWS = "_finest_rows"


@dataclass(frozen=True)
class TrainingContext:
    """Where a run trains.

    Args:
        spark: the session.
        report: called now and then with how far the run is.
        memory_bytes: memory one group may take; None is unlimited.
        train: what trains a group; another function only for twins, and in tests.
        slots: tasks that run at once.
        threads: LightGBM's, per task.
    """

    spark: SparkSession
    report: Report
    memory_bytes: int | None = None
    train: TrainGroup = train_group
    slots: int = 1
    threads: int = 1


def placed_rows(
    spark: SparkSession,
    rows: DataFrame,
    spec: FleetSpec,
    groups: pd.DataFrame,
    bases: DataFrame | None = None,
) -> DataFrame:
    """Every row once per trained grain, in the Spark partition of its group's task; one exchange.

    Args:
        spark: the session.
        rows: the visible rows.
        spec: the fleet.
        groups: what is trained: grain, group_id, task (from 0, without gaps) and, for a sampled
            group, exponent (see `pipeline.runs.sampling`).
        bases: what the groups' trees correct: row_key and the parent's prediction, `_base`; None
            where they correct nothing.

    Returns:
        The columns that training reads, grain, group_id, task and its salt and, where a group is
        sampled, the row's sampling rate.
    """
    places, n_tasks = _places(spark, groups)
    rows = rows.where(is_learnt_from(spec))
    needed = _needed_columns(spec)
    is_sampled = bool(groups["exponent"].any())
    if is_sampled:
        rows = _with_group_sizes(rows, spec)
        needed.append(_FINEST_ROWS)
    columns = quoted(needed)
    level = grain_column(spec, sorted(set(groups["grain"]))).alias("_level")
    flat = rows.select(level, *columns).select("_level.grain", "_level.group_id", *columns)
    placed = flat.join(sf.broadcast(places), ["grain", "group_id"])
    if is_sampled:
        placed = _sample(placed)
    if bases is not None:
        placed = placed.join(bases, "row_key", "left")
    return place_by_salt(placed.drop("exponent"), n_tasks)


def _places(spark: SparkSession, groups: pd.DataFrame) -> tuple[DataFrame, int]:
    """Each group's task with its salt, the group's sampling exponent; and the number of tasks."""
    first, last = groups["task"].min(), groups["task"].max()
    n_tasks = int(last) + 1
    if first < 0:
        # A negative id would be given another task's salt, silently.
        raise AssertionError(f"task ids {first}..{last} are not within 0..{n_tasks - 1}")
    columns = {
        "grain": "int32",
        "group_id": "str",
        "task": "int32",
        SALT: "int32",
        "exponent": "int32",
    }
    salts = find_salts(n_tasks)[groups["task"].to_numpy(dtype=np.int64)]
    salted = groups.assign(**{SALT: salts})[list(columns)].astype(columns)
    schema = f"grain int, group_id string, task int, {SALT} int, exponent int"
    return spark.createDataFrame(salted, schema), n_tasks


def _needed_columns(spec: FleetSpec) -> list[str]:
    """The columns that training reads, each once."""
    target = spec.target
    of_target = (target.column, target.offset, target.scale, target.weight)
    needed = [*spec.finest, *spec.feature_columns, *of_target, "time", "known_at", "row_key"]
    return [name for name in dict.fromkeys(needed) if name is not None]


def _sample(placed: DataFrame) -> DataFrame:
    """The rows that stay in their group's sample, with their rate.

    The share of its finest group's rows that stays is 1, 1/2, 1/4 ..., but never less than
    `SAMPLED_WHOLE` rows.
    """
    thinned = sf.pow(sf.lit(0.5), sf.col("exponent"))
    least = sf.pow(sf.lit(2.0), sf.ceil(sf.log2(SAMPLED_WHOLE / sf.col(_FINEST_ROWS))))
    rate = sf.least(sf.lit(1.0), sf.greatest(thinned, least))
    placed = placed.withColumn(RATE, sf.when(sf.col("exponent") > 0, rate).otherwise(1.0))
    # By the row's own hash, so that a row that is in a sample stays in it from run to run.
    share = sf.pmod(sf.xxhash64("row_key"), sf.lit(1 << 30)) / float(1 << 30)
    return placed.where(share < sf.col(RATE)).drop(_FINEST_ROWS)


def _with_group_sizes(rows: DataFrame, spec: FleetSpec) -> DataFrame:
    """Each row with the number of rows of its finest group.

    Another exchange, only for fleets that are sampled.
    """
    size = sf.count("*").alias(_FINEST_ROWS)
    if not spec.finest:
        return rows.crossJoin(rows.groupBy().agg(size))
    # Other names for the keys: joined with what comes of them, columns of the same names could not
    # be told apart.
    names = [f"_key_{number}" for number in range(len(spec.finest))]
    keys = []
    same = []
    for name, key in zip(names, spec.finest, strict=True):
        column = sf.col(f"`{key}`")
        keys.append(column.alias(name))
        same.append(column.eqNullSafe(sf.col(name)))
    return rows.join(rows.groupBy(*keys).agg(size), same, "left").drop(*names)


def train_wave(
    context: TrainingContext,
    tables: FleetTables,
    placed: DataFrame,
    wave: Wave,
    settings: TrainingSettings,
    progress: Progress,
) -> TrainedFiles:
    """Train every placed group; one Spark job, whose tasks write boosters and holdout themselves.

    Args:
        context: where it trains, and what trains a group.
        tables: of the fleet; nothing is committed to them.
        placed: as from `placed_rows`.
        wave: the groups that are placed.
        settings: the run's.
        progress: counts what is done.
    """
    # All that `train_one` names travels to the tasks: no more than it needs.
    train = context.train
    memory_bytes = context.memory_bytes
    settings = replace(settings, threads=context.threads)
    keys = GroupKey.of_rows(wave.groups)
    starts = dict(zip(keys, wave.groups["started_from"], strict=True))
    costs = dict(zip(keys, wave.groups["cost_seconds"].astype(float), strict=True))
    name = wave.name
    start_seconds = wave.start_seconds
    done, failed = progress.done, progress.failed
    worked, spent = progress.worked, progress.spent
    travelling, moments = travel_types(placed, named_columns(settings.model_spec))

    def train_one(rows: pd.DataFrame) -> pd.DataFrame:
        if start_seconds is not None and _is_over(name, start_seconds):
            return _sealed(not_started(rows))
        worker = _worker_of(name, settings, starts, train, memory_bytes)
        outcome = worker.train(restore_moments(rows, moments))
        ledger = json.loads(outcome["ledger"][0].as_py())
        done.add(1)
        if ledger["status"] in ("failed", "crashed"):
            failed.add(1)
        worked.add(costs[GroupKey(outcome["grain"][0].as_py(), outcome["group_id"][0].as_py())])
        spent.add(float(ledger.get("seconds") or 0.0))
        return _sealed(outcome)

    trained = group_placed(travelling).applyInPandas(train_one, "outcome binary")
    write = _writer(tables, name, settings.run_id)
    rows = trained.mapInArrow(write, "kind string, line string").collect()
    return _collect(rows)


def _writer(
    tables: FleetTables, wave: str, run_id: str
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """What a task does with its outcomes: it writes boosters and held-out rows into files.

    The driver gets a line of JSON per group, and one per file.
    """
    boosters_root = tables.location(BOOSTERS)
    holdout_root = tables.location(HOLDOUT)
    options = dict(tables.tables.storage_options)
    of_booster = [name for name in OUTCOME_SCHEMA.names if name in BOOSTERS.schema.names]

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        keep_imports()
        boosters = FileWriter(boosters_root, options, BOOSTERS.schema)
        holdout = FileWriter(holdout_root, options, HOLDOUT.schema)
        for batch in batches:
            outcomes = map(_opened, batch["outcome"].to_pylist())
            rows = pa.concat_tables([OUTCOME_SCHEMA.empty_table(), *outcomes])
            has_booster = rows.filter(rows["text"].is_valid())
            boosters.write(_marked(has_booster.select(of_booster), wave, run_id))
            held_out = list(map(_opened, rows["holdout"].drop_null().to_pylist()))
            if held_out:
                holdout.write(_marked(pa.concat_tables(held_out), wave, run_id))
            lines = []
            for row in rows.select(["grain", "group_id", "ledger"]).to_pylist():
                key = {"grain": row["grain"], "group_id": row["group_id"]}
                lines.append(json.dumps({**key, **json.loads(row["ledger"])}))
            yield _lines("outcome", lines)
        for table, writer in (("boosters", boosters), ("holdout", holdout)):
            written = writer.close()
            if written is not None:
                yield _lines("file", [file_json(table, written)])

    return write


def _lines(kind: str, lines: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"kind": [kind] * len(lines), "line": lines})


def _collect(rows: Iterable[Any]) -> TrainedFiles:
    """The outcomes and files of a wave, from the lines that its tasks gave the driver."""
    files: dict[str, list[WrittenFile]] = {"boosters": [], "holdout": []}
    outcomes: list[dict[str, Any]] = []
    unstarted: list[GroupKey] = []
    for row in rows:
        message = json.loads(row["line"])
        if row["kind"] == "file":
            files[message["table"]].append(file_of_json(message))
        elif message["status"] == NOT_STARTED:
            unstarted.append(GroupKey.of(message))
        else:
            outcomes.append(message)
    return TrainedFiles(outcomes, files["boosters"], files["holdout"], unstarted)


def train_aside(
    context: TrainingContext,
    tables: FleetTables,
    rows: DataFrame,
    spec: FleetSpec,
    groups: pd.DataFrame,
    settings: TrainingSettings,
    bases: DataFrame | None = None,
) -> DataFrame:
    """Train groups for their predictions alone, and commit nothing; one Spark job.

    Args:
        context: where it trains, and what trains a group.
        tables: where files are written. No commit names them, so that cleaning removes them.
        rows: the visible rows.
        spec: the fleet.
        groups: grain, group_id, started_from, cost_seconds, exponent.
        settings: what they share.
        bases: what their trees correct, as for `placed_rows`.

    Returns:
        Their held-out rows, as in `tables.HOLDOUT`.
    """
    packed = groups.sort_values(
        ["cost_seconds", "group_id"], ascending=[False, True], ignore_index=True
    )
    packed = packed.assign(task=pack_tasks(packed["cost_seconds"].tolist(), slots=context.slots))
    placed = placed_rows(context.spark, rows, spec, packed, bases)
    # A worker finds a wave's settings by its name, which is therefore never given twice.
    wave = Wave(f"aside-{uuid.uuid4().hex[:8]}", packed)
    with without_adaptive_execution(context.spark):
        progress = Progress(context.spark, lambda _: None)
        files = train_wave(context, tables, placed, wave, settings, progress)
    paths = [file.path for file in files.holdout]
    options = tables.tables.storage_options
    return read_files(context.spark, tables.location(HOLDOUT), paths, HOLDOUT.schema, options)


def _sealed(outcome: pa.Table) -> pd.DataFrame:
    """One row of OUTCOME_SCHEMA in one cell; as columns, it would take Spark a millisecond more."""
    return pd.DataFrame({"outcome": [stream_of(outcome)]})


def _opened(stream: bytes) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all()


def _marked(rows: pa.Table, wave: str, run_id: str) -> pa.Table:
    """The rows with the wave and the run that they belong to."""
    for name, value in (("wave", wave), ("run_id", run_id)):
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    return rows


def _is_over(wave: str, start_seconds: float) -> bool:
    """Whether this executor began a wave more than `start_seconds` ago.

    A wave's tasks run in several processes. They agree on its beginning by a file in the executor's
    own folder, and by the clock of their machine, which need not agree with any other. Whoever
    comes first writes the file, so that every wave starts at least one group. A task that Spark
    repeats starts all its groups.
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
    wave: str,
    settings: TrainingSettings,
    starts: Mapping[GroupKey, str],
    train: TrainGroup,
    memory_bytes: int | None,
) -> TaskWorker:
    if wave not in _workers:
        keep_imports()
        for other in list(_workers):
            _workers.pop(other).close()
        _workers[wave] = TaskWorker(settings, starts, train, memory_bytes)
    return _workers[wave]
