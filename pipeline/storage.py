"""What the library asks of tables, of the model registry and of the lease.

The adapters and the doubles have it.
"""

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import pandas as pd
import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Mode = Literal["append", "overwrite"]
# By column: the value that rows have there, or the values that it is among.
Where = Mapping[str, str | Sequence[str]]
# The application whose transactions fence the commits of training runs, and how many numbers each
# holder of the lease has.
TRAINING = "training"
COMMITS_PER_LEASE = 1_000_000_000


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written below a table's root and that nobody has committed yet.

    Args:
        path: relative to the root.
        size: bytes.
        n_rows: rows.
    """

    path: str
    size: int
    n_rows: int


class HeldLease(Protocol):
    """The right to train a fleet."""

    @property
    def fence(self) -> int:
        """Grows each time that the lease is taken."""

    def check(self) -> None:
        """Make sure that the lease is still held."""


@dataclass(frozen=True)
class Snapshot:
    """The newest version of a table, as its log tells it.

    Args:
        identity: differs between any two versions, also of tables that were removed and made again.
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
        """Write a data frame from Spark's tasks and make one commit; the version.

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
        app: tuple[str, int] | None = None,
        fenced: bool = False,
    ) -> int:
        """Make one commit of written files; overwriting with a partition replaces only it.

        A commit whose application transaction the table has seen is not made again. A fenced one is
        refused where the table has seen a later transaction.
        """

    def create(self, location: str, schema: pa.Schema, *, partition_by: Sequence[str] = ()) -> None:
        """Make a table without rows, unless there is one."""

    def transaction(self, location: str, app_id: str) -> int | None:
        """The last number that an application committed; None for none."""

    def snapshot(self, location: str) -> Snapshot | None:
        """The newest version, if all its files are there as they were written.

        None otherwise, or where there is no table.
        """

    def layout(self, location: str) -> tuple[pa.Schema, list[str]]:
        """A table's columns, and those of them that it is partitioned by."""

    def read_arrow(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows whose columns equal, or are among, the values of `where`."""

    def read_pandas(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Rows whose columns equal, or are among, the values of `where`."""

    def read_spark(
        self,
        spark: "SparkSession",
        location: str,
        version: int | None = None,
        *,
        partitions: Mapping[str, Sequence[str]] | None = None,
    ) -> "DataFrame":
        """The rows of a version, of the named partitions, as a Spark data frame."""
