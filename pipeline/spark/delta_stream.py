"""A Delta table as a stream of the rows that its versions add.

Spark starts Python processes of its own that import this module and little else: those that plan
micro batches, and those that read files.
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

PASSED_OVER = 100


class DeltaVersions(DataSource):
    """A Delta table as a stream of the rows that its versions add; an offset is a version.

    The first micro batch is the table as it is then. A version that removes or rewrites rows ends
    the stream, or is passed over as a whole with `skip_changes`; one that only puts files together
    otherwise adds nothing.
    """

    @classmethod
    def name(cls) -> str:
        """As in `spark.readStream.format(...)`."""
        return "delta_versions"

    def streamReader(self, schema: StructType) -> "DeltaVersionsReader":  # noqa: N802 - Spark's name
        """What reads it."""
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
        """The newest version is the last."""
        self._last = self._newest()

    def latestOffset(self, start: dict[str, int], limit: ReadLimit) -> dict[str, int]:  # noqa: N802 - Spark's name
        """Up to where the next micro batch goes.

        Raises:
            DataError: if a version on the way removes or rewrites rows.
        """
        newest = self._newest() if self._last is None else self._last
        if start["version"] < 0:
            return {"version": newest}
        end, n_files = start["version"], 0
        for version in range(start["version"] + 1, newest + 1):
            added = len(self._added(version))
            if (
                added
                and n_files
                and n_files + added > self._max_files
                and not isinstance(limit, ReadAllAvailable)
            ):
                break
            end, n_files = version, n_files + added
        # Versions without rows make no micro batch of their own, unless there are so many that the
        # log might lose them.
        return {
            "version": end if n_files or end - start["version"] > PASSED_OVER else start["version"]
        }

    def partitions(self, start: dict[str, int], end: dict[str, int]) -> Sequence[InputPartition]:
        """The files between two versions; from the beginning, those of the version."""
        if start["version"] < 0:
            table = open_delta(self._location, self._storage, end["version"])
            _, root = filesystem_of(self._location, self._storage)
            return [FilePartition(file) for file in live_files(table, self._location, root)]
        files = [
            FilePartition(file)
            for version in range(start["version"] + 1, end["version"] + 1)
            for file in self._added(version)
        ]
        self._commits = {
            version: commit for version, commit in self._commits.items() if version > end["version"]
        }
        return files

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """The rows of one file, in a task."""
        assert isinstance(partition, FilePartition)  # noqa: S101 - as from `partitions`
        return rows_reader(self._shape, self._location, self._storage, ColumnTypes())(
            partition.file
        )

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
