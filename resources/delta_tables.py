"""Delta tables below one root: written by Spark or the driver, one commit per write."""

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

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
from pipeline.storage import Mode, Snapshot, Tables, Where, WrittenFile
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
        with _store_errors(self.root):
            filesystem, root = filesystem_of(self.root, self.storage_options)
            found = filesystem.get_file_info(pf.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == pf.FileType.Directory)

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
            before_commit(
                read_files(
                    frame.sparkSession,
                    location,
                    [file.path for file in files],
                    schema,
                    self.storage_options,
                )
            )
        return self.commit(
            location, files, schema, mode=mode, partition=partition, metadata=metadata
        )

    def write_arrow(
        self,
        tables: Iterable[pa.Table],
        schema: pa.Schema,
        location: str,
        *,
        mode: Mode,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Write rows from the driver, each table as one file, then make one commit.

        Returns the version.
        """
        files = [self.write_file(table, schema, location) for table in tables]
        return self.commit(
            location, [file for file in files if file], schema, mode=mode, metadata=metadata
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
        app: tuple[str, int] | None = None,
        fenced: bool = False,
    ) -> int:
        """Make one commit of written files.

        With an application transaction it lands once, whatever the store answers: after an error
        the table itself says whether the commit is in it.

        Args:
            location: root of the table.
            files: what to add; each must be there with its size.
            schema: the files' schema.
            mode: append or overwrite.
            partition: as for `write_spark`.
            metadata: strings kept in the commit.
            app: id and number of an application transaction; one that the table has already seen is
                not committed again.
            fenced: whether to refuse the commit where the table has seen a later transaction of the
                application. This holds at the very moment of the commit, however long the process
                slept before it.

        Raises:
            StoreError: if a file is missing or of another size, a later transaction fences the
                commit off, or the store refuses.
        """
        self._check_files(location, files)
        attempt = partial(
            self._commit,
            location,
            files,
            Schema.from_arrow(schema),
            mode,
            partition or {},
            metadata or {},
        )
        with _store_errors(location):
            attempts_left = ATTEMPTS
            while True:
                attempts_left -= 1
                try:
                    return attempt(app, fenced=fenced)
                except (DeltaError, OSError) as error:
                    if app is None or not attempts_left:
                        raise
                    # Another version came between looking and committing, or our own did and its
                    # answer was lost: look again.
                    if (
                        not isinstance(error, CommitFailedError)
                        and self.transaction(location, app[0]) != app[1]
                    ):
                        raise

    def _commit(
        self,
        location: str,
        files: Sequence[WrittenFile],
        schema: Schema,
        mode: Mode,
        partition: Mapping[str, str],
        metadata: Mapping[str, str],
        app: tuple[str, int] | None = None,
        *,
        fenced: bool = False,
    ) -> int:
        """One attempt.

        With an application transaction only onto the version that was looked at, for the format
        would let both of two land.
        """
        actions: list[Any] = [_add_action(file, partition) for file in files]
        properties = CommitProperties(
            custom_metadata=dict(metadata) or None,
            app_transactions=[Transaction(app[0], app[1])] if app else None,
            max_commit_retries=0 if app else None,
        )
        partition_by, options = list(partition), self.storage_options or None
        if not DeltaTable.is_deltatable(location, self.storage_options):
            try:
                create_table_with_add_actions(
                    location,
                    schema,
                    actions,
                    mode="error" if app else "overwrite",
                    partition_by=partition_by,
                    commit_properties=properties,
                    storage_options=options,
                )
            except DeltaError as error:
                if app is not None and self.exists(location):
                    raise CommitFailedError(f"{location} was created meanwhile") from error
                raise
            return int(DeltaTable(location, storage_options=self.storage_options).version())
        table = DeltaTable(location, storage_options=self.storage_options)
        if (
            app is not None
            and (seen := table.transaction_version(app[0])) is not None
            and seen >= app[1]
        ):
            if fenced and seen > app[1]:
                raise StoreError(
                    f"{location}: another run has taken the fleet over and committed since "
                    f"(transaction {seen}, this one is {app[1]}); "
                    "nothing more of this run is committed: run again once the other has ended"
                )
            return int(table.version())
        if mode == "append" or partition:
            _refuse_other_types(table, schema, location)
            if _add_missing_columns(table, schema):
                # That was a commit of its own, and another's may lie before it: look at the table
                # anew.
                return self._commit(
                    location, files, schema, mode, partition, metadata, app, fenced=fenced
                )
            if list(table.metadata().partition_columns) != partition_by:
                raise StoreError(
                    f"{location} is partitioned by {table.metadata().partition_columns}, the new "
                    f"rows by {partition_by}; nothing was committed"
                )
        if mode == "overwrite" and not partition:
            # A new shape of the table comes in with the rows that have it.
            create_table_with_add_actions(
                location,
                schema,
                actions,
                mode="overwrite",
                commit_properties=properties,
                storage_options=options,
            )
        else:
            filters = (
                [(name, "=", value) for name, value in partition.items()]
                if mode == "overwrite"
                else None
            )
            table.create_write_transaction(
                actions,
                mode,
                schema,
                partition_by=partition_by,
                partition_filters=filters,
                commit_properties=properties,
            )
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
            seen = DeltaTable(location, storage_options=self.storage_options).transaction_version(
                app_id
            )
        return None if seen is None else int(seen)

    def snapshot(self, location: str) -> Snapshot | None:
        """The newest version, if all its files are there as they were written.

        None otherwise, or where there is no table.
        """
        with _store_errors(location):
            if not self.exists(location):
                return None
            table = self._open(location, None)
            actions = file_actions(table).to_pydict()
            filesystem, root = filesystem_of(location, self.storage_options)
            infos = filesystem.get_file_info([f"{root}/{path}" for path in actions["path"]])
            if [info.size for info in infos] != actions["size_bytes"] or None in actions[
                "num_records"
            ]:
                return None
            commit = table.history(1)[0]
        return Snapshot(
            identity=f"{table.metadata().id}/{table.version()}",
            version=int(table.version()),
            committed_at=dt.datetime.fromtimestamp(commit["timestamp"] / 1000, dt.UTC),
            metadata={name: value for name, value in commit.items() if isinstance(value, str)},
            schema=_arrow_schema(table),
            n_files=len(infos),
            n_rows=sum(actions["num_records"]),
        )

    def layout(self, location: str) -> tuple[pa.Schema, list[str]]:
        """A table's columns, and those of them that it is partitioned by."""
        table = self._open(location, None)
        return _arrow_schema(table), list(table.metadata().partition_columns)

    def _check_files(self, location: str, files: Sequence[WrittenFile]) -> None:
        """A commit that names a missing file would be accepted by the format; not by us."""
        filesystem, root = filesystem_of(location, self.storage_options)
        for file, info in zip(
            files, filesystem.get_file_info([f"{root}/{file.path}" for file in files]), strict=True
        ):
            if info.size != file.size:
                raise StoreError(
                    f"{location}/{file.path} has {info.size} bytes, expected {file.size} as "
                    "written; nothing was committed: run again"
                )

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
        filters = [
            (name, "=", value) if isinstance(value, str) else (name, "in", list(value))
            for name, value in (where or {}).items()
        ] or None
        with _store_errors(location):
            return self._open(location, None).to_pyarrow_table(
                filters=filters, columns=list(columns) if columns else None
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


def _refuse_other_types(table: DeltaTable, schema: Schema, location: str) -> None:
    """Files that stay must be readable beside the new ones.

    The format itself would accept the commit.
    """
    before = {field.name: field.type for field in table.schema().fields}
    for field in schema.fields:
        there = before.get(field.name)
        if there is not None and there != field.type:
            raise StoreError(
                f"{location}: column {field.name!r} is {there.to_json()} in the table and "
                f"{field.type.to_json()} in the new rows; "
                "nothing was committed: move the table away to start a new one, or cast the column"
            )


def _add_missing_columns(table: DeltaTable, schema: Schema) -> bool:
    """Give a table the columns of the new rows that it lacks, as one of an earlier release may.

    Whether it lacked any.
    """
    known = {field.name for field in table.schema().fields}
    missing = [field for field in schema.fields if field.name not in known]
    if missing:
        table.alter.add_columns(missing)
    return bool(missing)


def _paths(table: DeltaTable, location: str, partitions: Mapping[str, Sequence[str]]) -> list[str]:
    actions = file_actions(table)
    for name, values in partitions.items():
        actions = actions.filter(
            pc.is_in(actions[f"partition.{name}"], value_set=pa.array(list(values), pa.string()))
        )
    return sorted(within(path, location) for path in actions["path"].to_pylist())


def _arrow_schema(table: DeltaTable) -> pa.Schema:
    return pa.schema(table.schema().to_arrow())


def _add_action(file: WrittenFile, partition: Mapping[str, str]) -> AddAction:
    return AddAction(
        file.path,
        file.size,
        dict(partition),
        0,
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
    # The adapter has what the library asks of tables.
    _TABLES: Tables = DeltaTables(root="")
