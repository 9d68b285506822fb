"""A Delta table as a stream of the rows that its versions add.

Spark plans micro batches and reads files in Python processes of its own, which import this module
and little else.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql.datasource import DataSource, DataSourceStreamReader, InputPartition
from pyspark.sql.streaming.datasource import (
    ReadAllAvailable,
    ReadLimit,
    ReadMaxFiles,
    SupportsTriggerAvailableNow,
)
from pyspark.sql.types import StructType

from pipeline.errors import DataError
from pipeline.models.meta_model import filesystem_of
from pipeline.reading.delta_log import Commit, live_files, open_delta, read_commit
from pipeline.reading.files import ColumnTypes, RowFile
from pipeline.spark.files import rows_reader

# Versions without rows that a stream waits through before it makes an empty micro batch of them.
PASSED_OVER = 100


class DeltaVersions(DataSource):
    """A Delta table as a stream of the rows that its versions add; an offset is a version.

    The first micro batch is the whole table. A version that removes or rewrites rows ends the
    stream, or is passed over as a whole with `skip_changes`; one that only rearranges rows in files
    adds nothing.
    """

    @classmethod
    def name(cls) -> str:
        """The name for `spark.readStream.format(...)`."""
        return "delta_versions"

    def streamReader(self, schema: StructType) -> "DeltaVersionsReader":  # noqa: N802 - Spark's name
        """The reader that the options describe."""
        options = self.options
        return DeltaVersionsReader(
            location=options["path"],
            storage=json.loads(options.get("secret_storage_options", "{}")),
            shape=schema,
            max_files=int(options["max_files"]),
            skip_changes=options.get("skip_changes", "false") == "true",
        )


@dataclass(frozen=True)
class FilePartition(InputPartition):
    """One file, read by one task."""

    file: RowFile


class DeltaVersionsReader(DataSourceStreamReader, SupportsTriggerAvailableNow):
    """Offsets and files of `DeltaVersions`.

    Args:
        location: root of the table.
        storage: options of the object store.
        shape: of the rows.
        max_files: files of a micro batch; a version is never cut.
        skip_changes: whether versions that remove or rewrite rows are passed over.
    """

    def __init__(
        self,
        location: str,
        storage: Mapping[str, str],
        shape: StructType,
        max_files: int,
        *,
        skip_changes: bool,
    ) -> None:
        self._location = location
        self._storage = dict(storage)
        self._shape = shape
        self._max_files = max_files
        self._skip_changes = skip_changes
        self._last: int | None = None
        self._commits: dict[int, Commit] = {}

    def initialOffset(self) -> dict[str, int]:  # noqa: N802 - Spark's name
        """Before the first version."""
        return {"version": -1}

    def getDefaultReadLimit(self) -> ReadLimit:  # noqa: N802 - Spark's name
        """Files per micro batch."""
        return ReadMaxFiles(self._max_files)

    def prepareForTriggerAvailableNow(self) -> None:  # noqa: N802 - Spark's name
        """Stop at the version that is the newest now."""
        self._last = self._newest()

    def latestOffset(self, start: dict[str, int], limit: ReadLimit) -> dict[str, int]:  # noqa: N802 - Spark's name
        """The last version of the next micro batch.

        Raises:
            DataError: if a version on the way removes or rewrites rows.
        """
        newest = self._last
        if newest is None:
            newest = self._newest()
        begin = start["version"]
        if begin < 0:
            return {"version": newest}
        end = begin
        n_files = 0
        for version in range(begin + 1, newest + 1):
            added = len(self._added(version))
            is_too_many = n_files + added > self._max_files
            if added and n_files and is_too_many and not isinstance(limit, ReadAllAvailable):
                break
            end = version
            n_files += added
        # Versions without rows make no micro batch of their own, unless there are so many that the
        # log might lose them.
        if not n_files and end - begin <= PASSED_OVER:
            return {"version": begin}
        return {"version": end}

    def partitions(self, start: dict[str, int], end: dict[str, int]) -> Sequence[InputPartition]:
        """The files added between two versions; from the beginning, all files of the last."""
        if start["version"] < 0:
            table = open_delta(self._location, self._storage, end["version"])
            _, root = filesystem_of(self._location, self._storage)
            return [FilePartition(file) for file in live_files(table, self._location, root)]
        added: list[RowFile] = []
        for version in range(start["version"] + 1, end["version"] + 1):
            added += self._added(version)
        for version in list(self._commits):
            if version <= end["version"]:
                del self._commits[version]
        return [FilePartition(file) for file in added]

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """The rows of one file, in a task."""
        assert isinstance(partition, FilePartition)  # noqa: S101 - as from `partitions`
        read_file = rows_reader(self._shape, self._location, self._storage, ColumnTypes())
        return read_file(partition.file)

    def _newest(self) -> int:
        return int(open_delta(self._location, self._storage).version())

    def _added(self, version: int) -> tuple[RowFile, ...]:
        """The files with new rows of one version."""
        if version not in self._commits:
            filesystem, root = filesystem_of(self._location, self._storage)
            self._commits[version] = read_commit(filesystem, root, self._location, version)
        commit = self._commits[version]
        if not commit.takes_away:
            return commit.added
        if self._skip_changes:
            return ()
        raise DataError(
            f"{self._location}: version {version} ({commit.operation or 'unknown operation'}) "
            "removes or rewrites rows that may have been answered; "
            "start the stream with --skip-changes to pass over such versions as a whole, or score "
            "the table anew with `many-models score`"
        )
