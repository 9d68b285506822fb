"""`many-models score` and `stream`: rows answered by a registered version."""

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.models.meta_model import FleetModel
from pipeline.scoring.row_source import (
    SCORED_AT,
    SCORED_PERIOD,
    absolute,
    check_apart,
    check_columns,
    check_source,
    check_target,
    choose_column_types,
    find_source,
    target_schema,
)
from pipeline.spark.answers import score_source
from pipeline.spark.files import write_files
from pipeline.spark.set_aside import SetAside
from pipeline.spark.streaming import AnswerSink, Champion, Stream, run_stream, stream_rows
from resources.build import build_resources
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import CHAMPION, MlflowRegistry, Version
from resources.profiles import Profile
from resources.spark_session import SparkSessionResource

ALL_ROWS = "all"
MAX_FILES = 1_000
MAX_FILES_SHOWN = 5


@dataclass(frozen=True)
class _AnsweringVersion:
    """The version that answers.

    Args:
        version: as it is registered.
        model: opened from its pack.
        title: for people.
    """

    version: Version
    model: FleetModel
    title: str


@dataclass(frozen=True)
class Scorer:
    """What scoring needs.

    Args:
        tables: reads and commits the tables, which may lie outside its root.
        registry: of the models.
        spark: not started yet.
        streams: folder of checkpoints.
    """

    tables: DeltaTables
    registry: MlflowRegistry
    spark: SparkSessionResource
    streams: Path

    @classmethod
    def of(cls, profile: Profile) -> "Scorer":
        """A scorer with the resources of a profile."""
        built = build_resources(profile)
        return cls(built.tables, built.registry, built.spark, Path(profile.data_root) / "streams")

    def score(
        self,
        model_name: str,
        source: str,
        target: str,
        *,
        period: str = ALL_ROWS,
        version: str = CHAMPION,
    ) -> str:
        """Answer all rows of a source in one commit, replacing those of the same period.

        Args:
            model_name: the fleet, or its trial.
            source: a Delta table, or a file, folder or glob, in any format of a fleet's sources.
            target: Delta table of the answers.
            period: the rows' name in the target.
            version: an alias, or a number.

        Returns:
            What was done, for people.

        Raises:
            FleetError: if there is no such version, source or target.
            InputError: if the source lacks columns; then Spark has not been started.
        """
        started = time.monotonic()
        options = self.tables.storage_options
        source, target = absolute(source), absolute(target)
        answering = self._open(model_name, version)
        model = answering.model
        fleet_version = answering.version.fleet_version
        column_types = choose_column_types(model, self.registry.inputs(answering.version))
        rows = find_source(source, column_types, options)
        added = (SCORED_AT, SCORED_PERIOD)
        check_source(rows, model, added)
        self._prepare(
            source, target, target_schema(rows.schema, model.task, added), [SCORED_PERIOD]
        )
        with self.spark.yield_for_execution(None):
            answers = score_source(self.spark.session, rows, model, column_types, period, options)
            files, schema = write_files(answers, target, options)
            committed = self.tables.commit(
                target,
                files,
                schema,
                mode="overwrite",
                partition={SCORED_PERIOD: period},
                metadata={"source": str(rows), "fleet_version": fleet_version},
            )
        n_rows = sum(file.n_rows for file in files)
        return (
            f"{n_rows:,} rows of {rows} answered by {answering.title} (run {fleet_version}) in "
            f"{time.monotonic() - started:.1f} s\n"
            f"period {period!r} of {target} is replaced as a whole: version {committed} of the "
            "table"
        )

    def stream(
        self,
        model_name: str,
        source: str,
        target: str,
        *,
        checkpoint: str | None = None,
        every: float | None = None,
        max_files: int = MAX_FILES,
        skip_changes: bool = False,
        stopping: threading.Event,
        report: Callable[[str], None],
    ) -> None:
        """Answer rows as they come, until all are answered (or, with `every`, until told to stop).

        Args:
            model_name: the fleet, or its trial.
            source: a Delta table, or a folder or glob, in any format of a fleet's sources.
            target: Delta table of the answers.
            checkpoint: folder that remembers what was answered; by default one for each fleet,
                source and target.
            every: seconds between micro batches; None answers what is there and ends.
            max_files: files of a micro batch.
            skip_changes: whether versions of a Delta table that remove or rewrite rows are passed
                over.
            stopping: set to end it; a micro batch under way is given up, and repeated by the next
                start.
            report: takes a line per micro batch.

        Raises:
            FleetError: if there is no such champion, source or target, or the stream cannot go on.
            InputError: if rows lack columns.
        """
        source, target = absolute(source), absolute(target)
        folder = self.streams / f"{model_name}-{_digest(source, target)}"
        if checkpoint:
            folder = Path(absolute(checkpoint))
        options = self.tables.storage_options
        answering = self._open(model_name, CHAMPION)
        stream = self._resume(folder, answering, source, target)
        if stream is None:
            stream = self._begin(folder, answering, source, target)
        with self.spark.yield_for_execution(None):
            report(f"{answering.title} answers {source} into {target}; checkpoint {folder}")
            rows = stream_rows(
                self.spark.session,
                stream,
                options,
                answering.model.required,
                max_files=max_files,
                skip_changes=skip_changes,
            )
            sink = AnswerSink(
                stream, self.tables, Champion(self.registry, model_name, options), report
            )
            run_stream(rows, sink, folder, every=every, stopping=stopping)
        if stopping.is_set():
            report("stopped; the same command goes on")
        else:
            report(_ending(sink.set_aside))

    def _open(self, name: str, version: str) -> _AnsweringVersion:
        registered = self.registry.get(name, version)
        model = self.registry.open_pack(registered, self.tables.storage_options)
        title = f"{name} version {registered.number}"
        if not version.isdecimal():
            title += f" ({version})"
        return _AnsweringVersion(registered, model, title)

    def _resume(
        self, folder: Path, answering: _AnsweringVersion, source: str, target: str
    ) -> Stream | None:
        """The stream of a checkpoint, checked against the command; None if there is none."""
        stream = Stream.begun(folder)
        if stream is None:
            return None
        model = answering.model
        stream.check_same(answering.version.name, source, target)
        check_columns(stream.schema, source, model)
        stream.check_source()
        stream.check_target(self.tables)
        self.tables.create(target, target_schema(stream.schema, model.task, [SCORED_AT]))
        return stream

    def _begin(
        self, folder: Path, answering: _AnsweringVersion, source: str, target: str
    ) -> Stream:
        """A new stream, whose checkpoint is written."""
        model = answering.model
        column_types = choose_column_types(model, self.registry.inputs(answering.version))
        rows = find_source(source, column_types, self.tables.storage_options, leave_out=True)
        if Path(source).is_file():
            raise DataError(
                f"{source} is one file, which `many-models score` answers; a stream takes a "
                "folder, a glob or a Delta table"
            )
        check_source(rows, model, [SCORED_AT])
        self._prepare(source, target, target_schema(rows.schema, model.task, [SCORED_AT]), [])
        return Stream.begin(folder, answering.version.name, rows, column_types, target)

    def _prepare(
        self, source: str, target: str, schema: pa.Schema, partition_by: list[str]
    ) -> None:
        """Check the target, and create it if it is missing."""
        check_apart(source, target)
        if self.tables.exists(target):
            check_target(target, self.tables.layout(target), schema, partition_by)
        self.tables.create(target, schema, partition_by=partition_by)


def _ending(set_aside: SetAside) -> str:
    waiting = [entry.path for entry in set_aside.files()]
    if not waiting:
        return "all available rows have been answered"
    plural = "s" * (len(waiting) > 1)
    paths = ", ".join(waiting[:MAX_FILES_SHOWN])
    if len(waiting) > MAX_FILES_SHOWN:
        paths += f" and {len(waiting) - MAX_FILES_SHOWN} more"
    return (
        f"all other rows have been answered; {len(waiting)} file{plural} set aside: {paths}; "
        "complete or remove what cannot be read, then repeat the command"
    )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM while the block lasts."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as handlers are called
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
