"""`<fleet>/<source>`: a source, as ingested, in Delta."""

import datetime as dt
from typing import Any, NamedTuple

import dagster as dg
import pyarrow as pa

from assets.settings import (
    FleetFiles,
    asset_settings,
    check_specs,
    column_schema,
    commit_metadata,
    prefixed,
    readable_failures,
    since,
    unchanged,
)
from pipeline.errors import DataError
from pipeline.reading.sources import read_source, source_state
from pipeline.recognition import raw_digest
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spec import FleetSpec, SourceSpec
from pipeline.storage import WrittenFile
from pipeline.tables import RAW
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings

CHECKS = {"has_rows": "The source is not empty."}


def raw_asset(spec: FleetSpec, source: SourceSpec, files: FleetFiles) -> dg.AssetsDefinition:
    """The raw table of one source."""

    @dg.asset(
        **asset_settings(
            spec,
            source.name,
            description=f"Raw table `{source.name}`, as ingested from `{source.uri}`.",
            kinds={"deltalake", "arrow"},
        ),
        check_specs=check_specs(spec, source.name, CHECKS),
    )
    def raw(
        context: dg.AssetExecutionContext, tables: DeltaTables, launch: LaunchSettings
    ) -> dg.MaterializeResult:
        location = FleetTables(tables, spec.name, spec.name).raw_location(source.name)
        with readable_failures():
            # Before the files are read: one that changes meanwhile is read again the next time.
            digest = raw_digest(source, source_state(source, files.folder))
            before = unchanged(launch, tables, location, digest)
            if before is None:
                table = _write(source, files, tables, location, digest)
                context.log.info(f"{source.name}: {table.n_rows:,} rows from {source.uri}")
            else:
                table = _RawTable(before.version, before.schema, before.n_files, before.n_rows)
                rows = f"unchanged since {since(before)}, {table.n_rows:,} rows"
                context.log.info(f"{source.name}: {rows}")
        return dg.MaterializeResult(
            metadata=_metadata(source, location, table, is_unchanged=before is not None),
            check_results=[_has_rows(table)],
        )

    return raw


class _RawTable(NamedTuple):
    """A version of a raw table."""

    version: int
    schema: pa.Schema
    n_files: int
    n_rows: int


def _write(
    source: SourceSpec, files: FleetFiles, tables: DeltaTables, location: str, digest: str | None
) -> _RawTable:
    """Read the source, and let its table hold what it has now."""
    written, schema = ingest(source, files, tables, location)
    metadata = commit_metadata(digest)
    version = tables.commit(location, written, schema, mode="overwrite", metadata=metadata)
    n_rows = sum(file.n_rows for file in written)
    return _RawTable(version, schema, len(written), n_rows)


def _metadata(
    source: SourceSpec, location: str, table: _RawTable, *, is_unchanged: bool
) -> dict[str, Any]:
    """What the Dagster UI shows of the table."""
    facts = {
        "version": table.version,
        "source": source.uri,
        "files": table.n_files,
        "unchanged": is_unchanged,
    }
    return {
        "dagster/row_count": table.n_rows,
        "dagster/uri": location,
        "dagster/column_schema": column_schema(table.schema),
        **prefixed(facts),
    }


def _has_rows(table: _RawTable) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="has_rows",
        passed=table.n_rows > 0,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"rows": table.n_rows},
    )


def ingest(
    source: SourceSpec, files: FleetFiles, tables: DeltaTables, location: str
) -> tuple[list[WrittenFile], pa.Schema]:
    """Write a source's files below a table's root, one by one.

    Where their types differ, all are written again with the types that hold every file's values.
    """
    now = dt.datetime.now(dt.UTC)
    schemas: list[pa.Schema] = []
    written: list[WrittenFile | None] = []
    for address, table in read_source(source, files.folder):
        stamped = _stamped(table, address, now)
        schemas.append(stamped.schema)
        written.append(tables.write_file(stamped, stamped.schema, location))
    schema = _common_schema(source, schemas)
    if not all(one == schema for one in schemas):
        written = []
        for address, table in read_source(source, files.folder):
            rows = _as(_stamped(table, address, now), schema)
            written.append(tables.write_file(rows, schema, location))
    return [file for file in written if file is not None], schema


def _common_schema(source: SourceSpec, schemas: list[pa.Schema]) -> pa.Schema:
    """For each column the type that holds every file's values.

    Raises:
        DataError: if there is none.
    """
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"source {source.name!r}: its files do not fit together ({error}); set the column's "
            "type under types"
        ) from error
    return pa.schema(list(map(_with_a_type, schema)))


def _with_a_type(field: pa.Field) -> pa.Field:
    """The column; one in which no file has a value holds text."""
    if pa.types.is_null(field.type):
        return pa.field(field.name, pa.string())
    return field


def _stamped(table: pa.Table, address: str, now: dt.datetime) -> pa.Table:
    """The rows with their origin and reading time, and times in microseconds as Delta has them."""
    stamped = table.cast(pa.schema(list(map(_in_microseconds, table.schema))))
    for column, value in zip(RAW.columns, (address, now), strict=True):
        values = pa.repeat(pa.scalar(value, column.type), len(table))
        stamped = stamped.append_column(column.name, values)
    return stamped


def _in_microseconds(field: pa.Field) -> pa.Field:
    if not pa.types.is_timestamp(field.type):
        return field
    zone = "UTC" if field.type.tz else None
    return field.with_type(pa.timestamp("us", tz=zone))


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)
