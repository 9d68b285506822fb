"""Delta tables below one root: written by Spark or the driver, one commit per write."""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import dagster as dg
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pf
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, create_table_with_add_actions
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import StoreError
from pipeline.models.meta_model import filesystem_of
from pipeline.reading.delta_log import file_actions, refuse_strange_features, within
from pipeline.spark.files import FileWriter, read_files, write_files
from pipeline.storage import AppTransaction, Mode, Snapshot, Tables, Where, WrittenFile
from pipeline.tables import TableContract

ATTEMPTS = 20


class DeltaTables(dg.ConfigurableResource):
    """All tables of all fleets: `<root>/<fleet>/<table>`."""

    root: str = Field(
        description="Absolute folder or object-store URL of all tables, e.g. /data/fleets or "
        "s3://bucket/fleets."
    )
    storage_options: dict[str, str] = Field(
        default_factory=dict,
        description="Options of the object store, as the deltalake package takes them.",
    )

    def location(self, namespace: str, *parts: str) -> str:
        """Root of one table."""
        return "/".join([self.root.rstrip("/"), namespace, *parts])

    def namespaces(self) -> list[str]:
        """Fleets, trials and backtests that have tables."""
        return self.folders_below(self.root)

    def folders_below(self, location: str) -> list[str]:
        """Names of the folders directly below a location, sorted; none where it does not exist."""
        with _store_errors(location):
            filesystem, root = filesystem_of(location, self.storage_options)
            entries = filesystem.get_file_info(pf.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in entries if info.type == pf.FileType.Directory)

    def write_spark(
        self,
        frame: DataFrame,
        location: str,
        *,
        mode: Mode = "overwrite",
        partition: Mapping[str, str] | None = None,
        before_commit: Callable[[DataFrame], Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Write a data frame from Spark's tasks, then make one commit.

        Args:
            frame: the rows.
            location: root of the table.
            mode: append, or overwrite the table (or the partition).
            partition: the one partition that all rows belong to, by column; overwriting replaces
                only it.
            before_commit: called with the written rows, not committed yet; if it raises, nothing
                is.
            metadata: strings kept in the commit; `before_commit` may still add some.

        Returns:
            The version committed.
        """
        with _store_errors(location):
            files, schema = write_files(frame, location, self.storage_options)
        if before_commit is not None:
            paths = [file.path for file in files]
            written = read_files(frame.sparkSession, location, paths, schema, self.storage_options)
            before_commit(written)
        return self.commit(
            location, files, schema, mode=mode, partition=partition, metadata=metadata
        )

    def write_file(self, table: pa.Table, schema: pa.Schema, location: str) -> WrittenFile | None:
        """Write one file below a table's root without committing it; None for no rows."""
        with _store_errors(location):
            writer = FileWriter(location, self.storage_options, schema)
            writer.write(table)
            return writer.close()

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
        """Make one commit of written files.

        Args:
            location: root of the table.
            files: what to add; each must be there with its size.
            schema: the files' schema.
            mode: append or overwrite.
            partition: as for `write_spark`.
            metadata: strings kept in the commit.
            app: with it the commit lands once, whatever the store answers: after an error the table
                itself says whether the commit is in it. A fenced one is checked at the very moment
                of the commit, however long the process slept before it.

        Raises:
            StoreError: if a file is missing or of another size, a later transaction fences the
                commit off, or the store refuses.
        """
        self._check_files(location, files)
        change = _Change(
            location=location,
            files=files,
            schema=Schema.from_arrow(schema),
            mode=mode,
            partition=partition or {},
            metadata=metadata or {},
            app=app,
        )
        with _store_errors(location):
            attempts_left = ATTEMPTS
            while True:
                attempts_left -= 1
                try:
                    return self._commit(change)
                except (DeltaError, OSError) as error:
                    if app is None or not attempts_left:
                        raise
                    # Another version came between looking and committing, or our own did and its
                    # answer was lost: look again.
                    if (
                        not isinstance(error, CommitFailedError)
                        and self.transaction(location, app.app_id) != app.number
                    ):
                        raise

    def _commit(self, change: "_Change") -> int:
        """Make one attempt.

        With an application transaction only onto the version that was looked at, because the format
        would let both of two land.
        """
        if not self.exists(change.location):
            self._create_with(change)
            return self._newest_version(change.location)
        table = DeltaTable(change.location, storage_options=self.storage_options)
        if change.app is not None and _has_seen(table, change.app, change.location):
            return int(table.version())
        if change.replaces_table:
            # A new shape of the table comes in with the rows that have it.
            self._put(change, "overwrite")
            return self._newest_version(change.location)
        _refuse_other_types(table, change.schema, change.location)
        if _add_missing_columns(table, change.schema):
            # That was a commit of its own, and another's may lie before it: look at the table anew.
            return self._commit(change)
        _refuse_other_partitions(table, change)
        table.create_write_transaction(
            change.actions,
            change.mode,
            change.schema,
            partition_by=list(change.partition),
            partition_filters=change.partition_filters,
            commit_properties=change.properties,
        )
        return self._newest_version(change.location)

    def _create_with(self, change: "_Change") -> None:
        """Make the table with the rows of its first commit."""
        try:
            self._put(change, "error" if change.app else "overwrite")
        except DeltaError as error:
            if change.app is not None and self.exists(change.location):
                raise CommitFailedError(f"{change.location} was created meanwhile") from error
            raise

    def _put(self, change: "_Change", mode: Literal["error", "overwrite"]) -> None:
        """Let the rows of a commit be the whole table."""
        create_table_with_add_actions(
            change.location,
            change.schema,
            change.actions,
            mode=mode,
            partition_by=list(change.partition),
            commit_properties=change.properties,
            storage_options=self.storage_options or None,
        )

    def _newest_version(self, location: str) -> int:
        return int(DeltaTable(location, storage_options=self.storage_options).version())

    def create(self, location: str, schema: pa.Schema, *, partition_by: Sequence[str] = ()) -> None:
        """Make a table without rows, unless there is one."""
        with _store_errors(location):
            DeltaTable.create(
                location,
                Schema.from_arrow(schema),
                mode="ignore",
                partition_by=list(partition_by),
                storage_options=self.storage_options or None,
            )

    def transaction(self, location: str, app_id: str) -> int | None:
        """The last number that an application committed.

        None for none, or where there is no table.
        """
        with _store_errors(location):
            if not self.exists(location):
                return None
            table = DeltaTable(location, storage_options=self.storage_options)
            return table.transaction_version(app_id)

    def snapshot(self, location: str) -> Snapshot | None:
        """The newest version, if all its files are present with the size they were written with.

        None otherwise, or where there is no table.
        """
        with _store_errors(location):
            if not self.exists(location):
                return None
            table = self._open(location, None)
            actions = file_actions(table)
            n_records = actions["num_records"].to_pylist()
            sizes = self._file_sizes(location, actions["path"].to_pylist())
            if sizes != actions["size_bytes"].to_pylist() or None in n_records:
                return None
            commit = table.history(1)[0]
        metadata = {name: value for name, value in commit.items() if isinstance(value, str)}
        return Snapshot(
            identity=f"{table.metadata().id}/{table.version()}",
            version=int(table.version()),
            committed_at=dt.datetime.fromtimestamp(commit["timestamp"] / 1000, dt.UTC),
            metadata=metadata,
            schema=_arrow_schema(table),
            n_files=len(sizes),
            n_rows=sum(n_records),
        )

    def layout(self, location: str) -> tuple[pa.Schema, list[str]]:
        """A table's columns, and the names of those that it is partitioned by."""
        table = self._open(location, None)
        return _arrow_schema(table), list(table.metadata().partition_columns)

    def _check_files(self, location: str, files: Sequence[WrittenFile]) -> None:
        """Refuse files that are missing or incomplete, which the format itself would accept."""
        sizes = self._file_sizes(location, [file.path for file in files])
        for file, size in zip(files, sizes, strict=True):
            if size != file.size:
                raise StoreError(
                    f"{location}/{file.path} has {size} bytes, expected {file.size} as "
                    "written; nothing was committed: run again"
                )

    def _file_sizes(self, location: str, paths: Sequence[str]) -> list[int | None]:
        """The size of each file below a table's root; None for one that is missing."""
        filesystem, root = filesystem_of(location, self.storage_options)
        infos = filesystem.get_file_info([f"{root}/{path}" for path in paths])
        return [info.size for info in infos]

    def exists(self, location: str) -> bool:
        """Whether there is a table."""
        return bool(DeltaTable.is_deltatable(location, self.storage_options))

    def version(self, location: str) -> int:
        """Newest version of a table."""
        return int(self._open(location, None).version())

    def read_spark(
        self,
        spark: SparkSession,
        location: str,
        version: int | None = None,
        *,
        partitions: Mapping[str, Sequence[str]] | None = None,
    ) -> DataFrame:
        """A table as a data frame, of its newest or a given version.

        Only the named partitions, where given.
        """
        with _store_errors(location):
            table = self._open(location, version)
            return read_files(
                spark,
                location,
                _paths(table, location, partitions or {}),
                _arrow_schema(table),
                self.storage_options,
            )

    def read_pandas(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The rows of a table that have the values of `where`, as pandas."""
        return self.read_arrow(location, where=where, columns=columns).to_pandas()

    def read_arrow(
        self, location: str, *, where: Where | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows of a table that have the values of `where`, as Arrow."""
        filters: list[Any] = []
        for name, value in (where or {}).items():
            if isinstance(value, str):
                filters.append((name, "=", value))
            else:
                filters.append((name, "in", list(value)))
        with _store_errors(location):
            return self._open(location, None).to_pyarrow_table(
                filters=filters or None, columns=list(columns or ()) or None
            )

    def _open(self, location: str, version: int | None) -> DeltaTable:
        with _store_errors(location):
            if not self.exists(location):
                raise StoreError(
                    f"there is no Delta table at {location}; materialise the asset that writes it "
                    "first"
                )
            table = DeltaTable(location, version=version, storage_options=self.storage_options)
        refuse_strange_features(table, location)
        return table


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What one commit does to a table; see `DeltaTables.commit`."""

    location: str
    files: Sequence[WrittenFile]
    schema: Schema
    mode: Mode
    partition: Mapping[str, str]
    metadata: Mapping[str, str]
    app: AppTransaction | None

    @property
    def replaces_table(self) -> bool:
        """Whether no row of the table stays."""
        return self.mode == "overwrite" and not self.partition

    @property
    def actions(self) -> list[Any]:
        """One action per file."""
        return [add_action(file, self.partition) for file in self.files]

    @property
    def partition_filters(self) -> list[tuple[str, str, Any]] | None:
        """Which rows are replaced; None where none are."""
        if self.mode == "append":
            return None
        return [(name, "=", value) for name, value in self.partition.items()]

    @property
    def properties(self) -> CommitProperties:
        """What the commit carries besides its files."""
        metadata = dict(self.metadata) or None
        if self.app is None:
            return CommitProperties(custom_metadata=metadata)
        return CommitProperties(
            custom_metadata=metadata,
            app_transactions=[Transaction(self.app.app_id, self.app.number)],
            max_commit_retries=0,
        )


def _has_seen(table: DeltaTable, app: AppTransaction, location: str) -> bool:
    """Whether the table holds a commit of that number, or a later one, already.

    Raises:
        StoreError: if it holds a later one, and the transaction is fenced.
    """
    seen = table.transaction_version(app.app_id)
    if seen is None or seen < app.number:
        return False
    if app.is_fenced and seen > app.number:
        raise StoreError(
            f"{location}: another run has taken the fleet over and committed since "
            f"(transaction {seen}, this one is {app.number}); "
            "nothing more of this run is committed: run again once the other has ended"
        )
    return True


def _refuse_other_types(table: DeltaTable, schema: Schema, location: str) -> None:
    """Refuse rows that could not be read beside those that stay; the format would accept them."""
    types = {field.name: field.type for field in table.schema().fields}
    for field in schema.fields:
        type_before = types.get(field.name)
        if type_before is not None and type_before != field.type:
            raise StoreError(
                f"{location}: column {field.name!r} is {type_before.to_json()} in the table and "
                f"{field.type.to_json()} in the new rows; "
                "nothing was committed: move the table away to start a new one, or cast the column"
            )


def _refuse_other_partitions(table: DeltaTable, change: _Change) -> None:
    columns = list(table.metadata().partition_columns)
    if columns != list(change.partition):
        raise StoreError(
            f"{change.location} is partitioned by {columns}, the new rows by "
            f"{list(change.partition)}; nothing was committed"
        )


def _add_missing_columns(table: DeltaTable, schema: Schema) -> bool:
    """Give a table of an earlier release the columns of the new rows that it lacks.

    Returns:
        Whether it lacked any.
    """
    present = {field.name for field in table.schema().fields}
    missing = [field for field in schema.fields if field.name not in present]
    if missing:
        table.alter.add_columns(missing)
    return bool(missing)


def _paths(table: DeltaTable, location: str, partitions: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths of the files of some partitions, relative to the root; of all where none is named."""
    actions = file_actions(table)
    for name, values in partitions.items():
        value_set = pa.array(list(values), pa.string())
        actions = actions.filter(pc.is_in(actions[f"partition.{name}"], value_set=value_set))
    return sorted(within(path, location) for path in actions["path"].to_pylist())


def _arrow_schema(table: DeltaTable) -> pa.Schema:
    return pa.schema(table.schema().to_arrow())


def add_action(file: WrittenFile, partition: Mapping[str, str]) -> AddAction:
    """The entry of a file in the log.

    Args:
        file: below the table's root.
        partition: the values that its rows have in the partition columns.
    """
    return AddAction(
        file.path,
        file.size,
        dict(partition),
        0,  # no time of modification
        data_change=True,
        stats=f'{{"numRecords": {file.n_rows}}}',
    )


@contextmanager
def _store_errors(location: str) -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{location}: {error}; check that the store can be reached and has room, then run again"
        ) from error


def contract_metadata(contract: TableContract, location: str) -> dict[str, Any]:
    """What the Dagster UI shows of a table."""
    columns = [
        dg.TableColumn(column.name, str(column.type), column.description)
        for column in contract.columns
    ]
    return {
        "dagster/column_schema": dg.TableSchema(columns=columns),
        "dagster/uri": location,
        "fleet/row": contract.row,
        "fleet/key": ", ".join(contract.key) or "none",
        "fleet/format": contract.format,
    }


if TYPE_CHECKING:
    # The adapter fulfils the protocol.
    _TABLES: Tables = DeltaTables(root="")
