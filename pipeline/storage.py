"""What the library asks of tables and of the lease that protects them.

The adapters in `resources/` and the doubles in `pipeline/testing/` fulfil these protocols.
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

import pandas as pd
import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Mode = Literal["append", "overwrite"]
# By column: the value that rows have there, or the values that are allowed.
Where = Mapping[str, str | Sequence[str]]
# The application whose transactions fence the commits of training runs, and how many commits each
# holder of the lease can number.
TRAINING = "training"
COMMITS_PER_LEASE = 1_000_000_000


@dataclass(frozen=True)
class WrittenFile:
    """A file below a table's root that no commit names yet.

    Args:
        path: relative to the root.
        size: bytes.
        n_rows: rows.
    """

    path: str
    size: int
    n_rows: int


class AppTransaction(NamedTuple):
    """An application's number for a commit, by which a table recognises the commit.

    Args:
        app_id: the application.
        number: of the commit. A commit whose number the table has seen, or a later one, is not made
            again.
        is_fenced: whether the table refuses the commit, with an error, where it has seen a later
            number.
    """

    app_id: str
    number: int
    is_fenced: bool = False

    @classmethod
    def of_training(cls, fence: int, n: int) -> Self:
        """The transaction of the nth commit by the holder of a lease; fenced.

        Args:
            fence: of the lease; the numbers of a later holder are above all of an earlier one's.
            n: counts the holder's commits, from 1.
        """
        return cls(TRAINING, fence * COMMITS_PER_LEASE + n, is_fenced=True)


class HeldLease(Protocol):
    """The right to train a fleet."""

    @property
    def fence(self) -> int:
        """A number that grows each time the lease is taken."""

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            StoreError: if it is not.
        """


@dataclass(frozen=True)
class Snapshot:
    """The newest version of a table, according to its log.

    Args:
        identity: differs between any two versions, even of a table that was removed and made again.
        version: its number.
        committed_at: when it was committed, UTC.
        metadata: strings kept in its commit.
        schema: its columns.
        n_files: data files.
        n_rows: rows of all files.
    """

    identity: str
    version: int
    committed_at: dt.datetime
    metadata: Mapping[str, str]
    schema: pa.Schema
    n_files: int
    n_rows: int


class Tables(Protocol):
    """Tables that change by single commits."""

    @property
    def storage_options(self) -> Mapping[str, str]:
        """Options of the object store."""

    def location(self, namespace: str, *parts: str) -> str:
        """Root of one table."""

    def exists(self, location: str) -> bool:
        """Whether there is a table."""

    def version(self, location: str) -> int:
        """The number of a table's newest version."""

    def write_file(self, table: pa.Table, schema: pa.Schema, location: str) -> WrittenFile | None:
        """Write one file without committing it; None for no rows."""

    def write_spark(
        self,
        frame: "DataFrame",
        location: str,
        *,
        mode: Mode = "overwrite",
        partition: Mapping[str, str] | None = None,
        before_commit: Callable[["DataFrame"], object] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Write a data frame from Spark's tasks and make one commit; returns the version.

        `before_commit` is called with the written rows; if it raises, nothing is committed.
        """

    def commit(
        self,
        location: str,
        files: Sequence[WrittenFile],
        schema: pa.Schema,
        *,
        mode: Mode,
        partition: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        app: AppTransaction | None = None,
    ) -> int:
        """Make one commit of written files; overwriting with a partition replaces only that one.

        A commit with an application transaction lands at most once.
        """

    def create(self, location: str, schema: pa.Schema, *, partition_by: Sequence[str] = ()) -> None:
        """Make a table without rows, unless there is one."""

    def transaction(self, location: str, app_id: str) -> int | None:
        """The last number that an application committed; None for none."""

    def snapshot(self, location: str) -> Snapshot | None:
        """The newest version, if all its files are present with the size they were written with.

        None otherwise, or where there is no table.
        """

    def layout(self, location: str) -> tuple[pa.Schema, list[str]]:
        """A table's columns, and the names of those that it is partitioned by."""

    def read_arrow(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows that have the values of `where`, as Arrow."""

    def read_pandas(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Rows that have the values of `where`, as pandas."""

    def read_spark(
        self,
        spark: "SparkSession",
        location: str,
        version: int | None = None,
        *,
        partitions: Mapping[str, Sequence[str]] | None = None,
    ) -> "DataFrame":
        """The rows of a version, by default the newest, as a Spark data frame.

        Only the named partitions, where given.
        """
