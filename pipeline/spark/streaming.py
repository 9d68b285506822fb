"""Scoring rows as they arrive, in micro batches that are each committed exactly once.

They arrive as files of a folder, or as versions of a Delta table.

Spark records which rows a micro batch has before it begins, and repeats an interrupted batch with
the same rows. A batch's answers are one commit of the target with an application transaction (the
stream's id and the batch's number), so that a repeated batch is passed over if it was committed
before. The checkpoint folder holds Spark's part in `spark/`, and what the stream pinned at its
first start in `stream.json`.
"""

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import pyarrow as pa
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from pipeline.crash_points import crash_point
from pipeline.errors import DataError, SpecError, StoreError
from pipeline.models.meta_model import FleetModel, InputError
from pipeline.reading.files import ColumnTypes, root_of, row_file
from pipeline.reading.formats import FORMATS, is_glob
from pipeline.scoring.row_source import SCORED_AT, RowSource, check_columns
from pipeline.spark.answers import answer_rows
from pipeline.spark.data_errors import in_error_tree
from pipeline.spark.delta_stream import DeltaVersions
from pipeline.spark.files import Batches, escaped, nullable, rows_reader, write_files
from pipeline.spark.set_aside import FileSetAside, SetAside
from pipeline.storage import AppTransaction, Tables

POLL_SECONDS = 0.2
PINNED = "stream.json"
# Spark leaves out files that are by so much older than the newest; copies keep the age of their
# originals.
NEVER_TOO_OLD = "36500d"
_FILES = "path string, modificationTime timestamp, length long, content binary"


@dataclass(frozen=True)
class Stream:
    """A stream as it was begun; what is pinned stays the same at later starts.

    Args:
        folder: the checkpoint.
        id: made at the first start; the application id of its commits.
        fleet: whose champion answers.
        source: absolute address of the rows.
        kind: their format.
        shape: their columns, pinned.
        column_types: how columns without types are read, pinned.
        target: absolute address of the answers' table.
    """

    folder: Path
    id: str
    fleet: str
    source: str
    kind: str
    shape: StructType
    column_types: ColumnTypes
    target: str

    @property
    def app(self) -> str:
        """The application id of its commits."""
        return f"many-models-stream-{self.id}"

    @property
    def last_batch(self) -> int | None:
        """The newest micro batch that the checkpoint knows to be committed."""
        names = [path.name for path in (self.folder / "spark" / "commits").glob("*")]
        return max(map(int, filter(str.isdecimal, names)), default=None)

    @property
    def schema(self) -> pa.Schema:
        """The columns, in Arrow's types."""
        return to_arrow_schema(self.shape, timezone="UTC")

    @classmethod
    def begun(cls, folder: Path) -> Self | None:
        """The stream of a checkpoint; None if none was begun there.

        Raises:
            StoreError: if what it pinned cannot be read.
        """
        path = folder / PINNED
        if not path.exists():
            if (folder / "spark").exists():
                raise StoreError(
                    f"{path} is missing beside a checkpoint of Spark's; give another --checkpoint, "
                    "or restore the file"
                )
            return None
        try:
            pinned = json.loads(path.read_text(encoding="utf-8"))
            column_types = ColumnTypes(frozenset(pinned["numbers"]), frozenset(pinned["whole"]))
            names = {
                name: str(pinned[name]) for name in ("id", "fleet", "source", "kind", "target")
            }
            return cls(
                folder,
                shape=StructType.fromJson(pinned["columns"]),
                column_types=column_types,
                **names,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: not what a stream pinned ({error}); give another --checkpoint, or "
                "restore the file"
            ) from error

    @classmethod
    def begin(
        cls, folder: Path, fleet: str, source: RowSource, column_types: ColumnTypes, target: str
    ) -> Self:
        """Pin a new stream."""
        stream = cls(
            folder=folder,
            id=uuid.uuid4().hex,
            fleet=fleet,
            source=source.address,
            kind=source.kind,
            shape=nullable(from_arrow_schema(source.schema)),
            column_types=column_types,
            target=target,
        )
        pinned: dict[str, Any] = {
            "id": stream.id,
            "fleet": fleet,
            "source": stream.source,
            "kind": stream.kind,
            "target": target,
            "numbers": sorted(column_types.numeric),
            "whole": sorted(column_types.integer_keys),
            "columns": stream.shape.jsonValue(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{PINNED}.{os.getpid()}"
        written.write_text(json.dumps(pinned, indent=1), encoding="utf-8")
        written.replace(folder / PINNED)
        return stream

    def check_same(self, fleet: str, source: str, target: str) -> None:
        """Refuse to go on with another fleet, source or target.

        Raises:
            SpecError: naming what differs.
        """
        pairs = {
            "fleet": (self.fleet, fleet),
            "--from": (self.source, source),
            "--to": (self.target, target),
        }
        changes = []
        for name, (before, now) in pairs.items():
            if before != now:
                changes.append(f"{name} was {before} and is {now}")
        if changes:
            raise SpecError(
                f"{self.folder} is the checkpoint of another stream: {'; '.join(changes)}; give "
                "each stream a --checkpoint of its own"
            )

    def check_source(self) -> None:
        """Refuse to go on where the folder of the files is gone; it may be empty.

        Raises:
            DataError: naming it.
        """
        folder = self.source
        if is_glob(folder):
            folder = root_of(folder)
        if self.kind != "delta" and not Path(folder).is_dir():
            raise DataError(
                f"{self.source} is gone: there is no folder {folder}; put it back, or start "
                "another stream"
            )

    def check_target(self, tables: Tables) -> None:
        """Refuse to go on where the target lacks answers that were committed to it.

        Raises:
            StoreError: if the target was removed, or restored to an earlier version.
        """
        last = self.last_batch
        seen = tables.transaction(self.target, self.app)
        if last is None or (seen is not None and seen >= last):
            return
        answered = "no micro batch"
        if seen is not None:
            answered = f"micro batches up to {seen}"
        raise StoreError(
            f"{self.target} has the answers of {answered}, the checkpoint {self.folder} says "
            f"{last}: the table was removed or restored; give another --checkpoint to answer all "
            "rows again"
        )


def stream_rows(
    spark: SparkSession,
    stream: Stream,
    options: Mapping[str, str],
    required: Sequence[str],
    *,
    max_files: int,
    skip_changes: bool,
) -> DataFrame:
    """The rows of a stream.

    Args:
        spark: the session.
        stream: that is to run.
        options: of the object store.
        required: columns that every file of a folder must have.
        max_files: files of a micro batch.
        skip_changes: of a Delta table, see `DeltaVersions`.
    """
    if stream.kind == "delta":
        spark.dataSource.register(DeltaVersions)
        settings = {
            "max_files": str(max_files),
            "skip_changes": str(skip_changes).lower(),
            "secret_storage_options": json.dumps(dict(options)),
        }
        return (
            spark.readStream.format(DeltaVersions.name())
            .schema(stream.shape)
            .options(**settings)
            .load(stream.source)
        )
    endings = []
    for ending, file_format in FORMATS.items():
        if file_format.kind == stream.kind:
            endings.append(_either_case(ending))
    address = stream.source
    if Path(address).is_dir():
        address = escaped(address)
    # Spark only lists the files. Their rows are read by `rows_reader`, as everywhere: by name,
    # whatever the order of columns.
    settings = {
        "recursiveFileLookup": "true",
        "maxFileAge": NEVER_TOO_OLD,
        "maxFilesPerTrigger": str(max_files),
        "pathGlobFilter": f"*{{{','.join(endings)}}}",
    }
    listed = (
        spark.readStream.format("binaryFile")
        .schema(_FILES)
        .options(**settings)
        .load(address)
        .select("path")
    )
    return _read_listed(listed, stream, options, required, SetAside(stream.folder))


def _read_listed(
    listed: DataFrame,
    stream: Stream,
    options: Mapping[str, str],
    required: Sequence[str],
    set_aside: SetAside | None,
) -> DataFrame:
    """The rows of listed files; without `set_aside`, one that cannot be read raises."""
    rows = rows_reader(stream.shape, stream.source, options, stream.column_types, required)
    root = root_of(stream.source)

    def read(batches: Batches) -> Batches:
        for batch in batches:
            for path in batch.column(0).to_pylist():
                file = row_file(local_path(path), root)
                # Read to its end first: rows that were handed on cannot be taken back.
                if set_aside is None or set_aside.reads(file, rows):
                    yield from rows(file)

    return listed.mapInArrow(read, stream.shape)


def _either_case(suffix: str) -> str:
    """A glob of Hadoop's for a suffix, given in lower case, in letters of either case."""
    return re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", suffix)


def local_path(address: str) -> str:
    """The path of a file as Spark names it, e.g. file:/data/a.csv."""
    return re.sub(r"^file:/*", "/", address)


class Registry(Protocol):
    """What a stream needs of the model registry."""

    def get(self, name: str, alias: str) -> Any:
        """The version under an alias."""

    def open_pack(self, version: Any, options: Mapping[str, str] | None = None) -> FleetModel:
        """A version's model."""


class Champion:
    """The version that serves, looked up at each call; its pack is opened when it changes.

    Args:
        registry: that knows it.
        name: of the registered model.
        options: of the object store that a shared pack is in.
    """

    def __init__(self, registry: Registry, name: str, options: Mapping[str, str]) -> None:
        self._registry = registry
        self._name = name
        self._options = options
        self._opened: tuple[Any, FleetModel] | None = None

    def __call__(self) -> tuple[Any, FleetModel]:
        """The version and its model."""
        version = self._registry.get(self._name, "champion")
        if self._opened is None or self._opened[0] != version:
            self._opened = version, self._registry.open_pack(version, self._options)
        return self._opened


class AnswerSink:
    """Answers each micro batch and commits it once.

    Files set aside are answered once they can be read.

    Args:
        stream: whose rows it answers.
        tables: that hold the target.
        champion: gives the version that answers, and its model.
        report: called with a line per micro batch.
    """

    def __init__(
        self,
        stream: Stream,
        tables: Tables,
        champion: Callable[[], tuple[Any, FleetModel]],
        report: Callable[[str], None],
    ) -> None:
        self._stream = stream
        self._tables = tables
        self._champion = champion
        self._report = report
        self._one_at_a_time = threading.Lock()
        self.set_aside = SetAside(stream.folder)
        self.failure: Exception | None = None

    def __call__(self, rows: DataFrame, batch: int) -> None:
        """Called by Spark for each micro batch."""
        try:
            with self._one_at_a_time:
                self._answer_batch(rows, batch)
        except Exception as error:
            self.failure = error  # Spark hands on its text only
            raise

    def retry(self, spark: SparkSession) -> None:
        """Answer the files that were set aside and have changed since, each in a commit of its own.

        Raises:
            FleetError: if the target cannot be written.
        """
        for entry in self.set_aside.files():
            if entry.has_changed:
                with self._one_at_a_time:
                    self._answer_file(spark, entry)

    def _answer_batch(self, rows: DataFrame, batch: int) -> None:
        crash_point("stream_batch_begun")
        stream = self._stream
        seen = self._tables.transaction(stream.target, stream.app)
        if seen is not None and seen >= batch:
            self._report(f"batch {batch}: was committed before the restart, passed over")
        else:
            self.set_aside.begin()
            self._commit(rows, f"batch {batch}", AppTransaction(stream.app, batch))
        for entry in self.set_aside.keep():
            self._report(f"set aside, and answered once it is complete: {entry.reason}")

    def _answer_file(self, spark: SparkSession, entry: FileSetAside) -> None:
        """Answer a file that was set aside, unless it cannot be read yet or has been answered."""
        stream, options = self._stream, self._tables.storage_options
        app = f"{stream.app}-{entry.digest}"
        if self._tables.transaction(stream.target, app) is None:
            required = self._champion()[1].required
            stat = Path(entry.path).stat()
            rows = rows_reader(stream.shape, stream.source, options, stream.column_types, required)
            try:
                for _ in rows(row_file(entry.path, root_of(stream.source))):
                    pass
            except (DataError, InputError) as error:
                tried = FileSetAside(entry.path, stat.st_size, stat.st_mtime_ns, str(error))
                self.set_aside.update(tried)
                self._report(f"still set aside: {error}")
                return
            listed = spark.createDataFrame([(entry.path,)], "path string")
            complete = _read_listed(listed, stream, options, required, None)
            self._commit(complete, f"{entry.path}, set aside before", AppTransaction(app, 0))
        self.set_aside.remove(entry)

    def _commit(self, rows: DataFrame, name: str, app: AppTransaction) -> None:
        started = time.monotonic()
        stream, options = self._stream, self._tables.storage_options
        version, model = self._champion()
        check_columns(stream.schema, stream.source, model)
        answers = answer_rows(rows.sparkSession, rows, model, options).withColumn(
            SCORED_AT, sf.current_timestamp()
        )
        files, schema = write_files(answers, stream.target, options)
        crash_point("stream_files_written")
        self._tables.commit(stream.target, files, schema, mode="append", app=app)
        crash_point("stream_committed")
        n_rows = sum(file.n_rows for file in files)
        seconds = time.monotonic() - started
        self._report(
            f"{name}: {n_rows:,} rows in {seconds:.1f} s, answered by version {version.number} "
            f"(run {version.fleet_version})"
        )


def run_stream(
    rows: DataFrame,
    sink: AnswerSink,
    folder: Path,
    *,
    every: float | None,
    stopping: threading.Event,
) -> None:
    """Run a stream until all rows have been answered, or until it is to stop.

    Args:
        rows: as from `stream_rows`.
        sink: of the same stream.
        folder: its checkpoint.
        every: seconds between the starts of micro batches; None answers the rows that there are,
            and ends.
        stopping: set to end it; a micro batch under way is given up, and the next start repeats
            it.

    Raises:
        FleetError: whatever ended it otherwise.
    """
    writer = rows.writeStream.foreachBatch(sink).option("checkpointLocation", str(folder / "spark"))
    timing: dict[str, Any] = {"availableNow": True}
    if every is not None:
        timing = {"processingTime": f"{round(every * 1000)} milliseconds"}
    try:
        sink.retry(rows.sparkSession)
        tried = time.monotonic()
        query = writer.trigger(**timing).start()
        while not query.awaitTermination(POLL_SECONDS):  # type: ignore[arg-type] # a float does
            if stopping.is_set():
                query.stop()
                return
            if every is not None and time.monotonic() - tried >= every:
                sink.retry(rows.sparkSession)
                tried = time.monotonic()
    except StreamingQueryException as error:
        if stopping.is_set():
            return
        raise readable_failure(error, sink.failure) from error


def readable_failure(error: StreamingQueryException, cause: Exception | None) -> Exception:
    """The error that ended a stream, as it was raised in the first place.

    Args:
        error: as Spark reports it; it may come from a Python process of Spark's.
        cause: what the sink raised; None if it did not fail.
    """
    ours = in_error_tree(cause) or in_error_tree(error)
    if ours is not None:
        return ours
    lines = filter(str.strip, str(cause or error).splitlines())
    return StoreError(f"the stream ended: {next(lines, 'no reason was given')}")
