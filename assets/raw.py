"""`<fleet>/<source>`: a source, as ingested, in Delta."""

import datetime as dt

import dagster as dg
import pyarrow as pa

from assets.settings import (
    FleetFiles,
    asset_key,
    asset_settings,
    prefixed,
    readable_failures,
    since,
    unchanged,
)
from pipeline.errors import DataError
from pipeline.reading.sources import read_source, source_state
from pipeline.recognition import DIGEST, raw_digest
from pipeline.spec import FleetSpec, SourceSpec
from pipeline.storage import WrittenFile
from pipeline.tables import RAW
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings


def raw_asset(spec: FleetSpec, source: SourceSpec, files: FleetFiles) -> dg.AssetsDefinition:
    """The raw table of one source."""

    @dg.asset(
        **asset_settings(
            spec,
            source.name,
            description=f"Raw table `{source.name}`, as ingested from `{source.uri}`.",
            kinds={"deltalake", "arrow"},
        ),
        check_specs=[
            dg.AssetCheckSpec(
                "has_rows",
                asset=asset_key(spec, source.name),
                description="The source is not empty.",
            )
        ],
    )
    def raw(
        context: dg.AssetExecutionContext, tables: DeltaTables, launch: LaunchSettings
    ) -> dg.MaterializeResult:
        location = tables.location(spec.name, "raw", source.name)
        with readable_failures():
            # Before the files are read: one that changes meanwhile is another one the next time.
            digest = raw_digest(source, source_state(source, files.folder))
            found = None if launch.retrain == "all" else unchanged(tables, location, digest)
            if found is None:
                written, schema = ingest(source, files, tables, location)
                version = tables.commit(
                    location,
                    written,
                    schema,
                    mode="overwrite",
                    metadata={DIGEST: digest} if digest else None,
                )
                n_files, n_rows = len(written), sum(file.n_rows for file in written)
                context.log.info(f"{source.name}: {n_rows:,} rows from {source.uri}")
            else:
                version, schema, n_files, n_rows = (
                    found.version,
                    found.schema,
                    found.n_files,
                    found.n_rows,
                )
                context.log.info(f"{source.name}: unchanged since {since(found)}, {n_rows:,} rows")
        columns = [dg.TableColumn(field.name, str(field.type)) for field in schema]
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": n_rows,
                "dagster/uri": location,
                "dagster/column_schema": dg.TableSchema(columns=columns),
                **prefixed(
                    {
                        "version": version,
                        "source": source.uri,
                        "files": n_files,
                        "unchanged": found is not None,
                    }
                ),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="has_rows",
                    passed=n_rows > 0,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={"rows": n_rows},
                )
            ],
        )

    return raw


def ingest(
    source: SourceSpec, files: FleetFiles, tables: DeltaTables, location: str
) -> tuple[list[WrittenFile], pa.Schema]:
    """Write a source's files below a table's root, one by one.

    Where their types differ, as the type that holds both.
    """
    now = dt.datetime.now(dt.UTC)
    contents: list[tuple[str, pa.Schema, WrittenFile | None]] = []
    for address, table in read_source(source, files.folder):
        stamped = _stamped(table, address, now)
        contents.append(
            (address, stamped.schema, tables.write_file(stamped, stamped.schema, location))
        )
    try:
        schema = pa.unify_schemas([found for _, found, _ in contents], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"source {source.name!r}: its files do not fit together ({error}); set the column's "
            "type under types"
        ) from error
    schema = pa.schema(
        [
            pa.field(field.name, pa.string()) if pa.types.is_null(field.type) else field
            for field in schema
        ]
    )
    if all(found == schema for _, found, _ in contents):
        return [file for _, _, file in contents if file is not None], schema
    rewritten = (
        tables.write_file(_as(_stamped(table, address, now), schema), schema, location)
        for address, table in read_source(source, files.folder)
    )
    return [file for file in rewritten if file is not None], schema


def _stamped(table: pa.Table, address: str, now: dt.datetime) -> pa.Table:
    """The rows with their origin and reading time, and times in microseconds as Delta has them."""
    table = table.cast(
        pa.schema([field.with_type(_in_microseconds(field.type)) for field in table.schema])
    )
    source, ingested_at = (column.type for column in RAW.columns)
    return table.append_column(
        "_source", pa.repeat(pa.scalar(address, source), len(table))
    ).append_column("_ingested_at", pa.repeat(pa.scalar(now, ingested_at), len(table)))


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    return (
        pa.timestamp("us", tz="UTC" if kind.tz else None) if pa.types.is_timestamp(kind) else kind
    )


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)
