"""`<fleet>/features`: the feature table, its contract enforced before it is committed."""

import dagster as dg

from assets.link import FleetFiles, link_key, link_settings, prefixed, readable_failures
from pipeline.features.sql import check_features
from pipeline.spark.features import all_null_columns, build_features, check_feature_table
from pipeline.spec import FleetSpec
from pipeline.tables import FEATURES
from resources.delta_tables import DeltaTables, contract_metadata
from resources.spark_session import SparkSessionResource


def features_asset(spec: FleetSpec, files: FleetFiles) -> dg.AssetsDefinition:
    """The feature table of a fleet."""
    sources = [source.name for source in spec.sources]

    @dg.asset(
        **link_settings(
            spec, "features", description="One row per entity and time: keys, target, features.", kinds={"spark", "sql", "deltalake"}, deps=sources
        ),
        check_specs=[
            dg.AssetCheckSpec("has_targets", asset=link_key(spec, "features"), blocking=True, description="Some row has a target."),
            dg.AssetCheckSpec("no_feature_is_all_null", asset=link_key(spec, "features"), description="Every feature has a value somewhere."),
        ],
    )
    def features(context: dg.AssetExecutionContext, tables: DeltaTables, spark: SparkSessionResource) -> dg.MaterializeResult:
        location = tables.location(spec.name, FEATURES.name)
        with readable_failures():
            raw = {name: tables.read_spark(spark.session, tables.location(spec.name, "raw", name)) for name in sources}
            schemas = {name: {field.name: field.dataType.simpleString() for field in frame.schema} for name, frame in raw.items()}
            check_features(spec, files.sql, file=spec.features.sql, schemas=schemas)
            rows = build_features(spark.session, spec, files.sql, raw)
            counts: dict[str, int] = {}
            version = tables.write_spark(rows, location, before_commit=lambda written: counts.update(check_feature_table(written, spec)))
            empty = all_null_columns(tables.read_spark(spark.session, location), spec.feature_columns)
        context.log.info(f"features: {counts['n_rows']:,} rows, {counts['n_targets']:,} with a target, {len(spec.feature_columns)} features")
        columns = [dg.TableColumn(field.name, field.dataType.simpleString()) for field in rows.schema]
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(FEATURES, location),
                "dagster/row_count": counts["n_rows"],
                "dagster/column_schema": dg.TableSchema(columns=columns),
                **prefixed({"version": version, **counts, "features": len(spec.feature_columns)}),
            },
            check_results=[
                dg.AssetCheckResult(check_name="has_targets", passed=counts["n_targets"] > 0, metadata={"rows_with_target": counts["n_targets"]}),
                dg.AssetCheckResult(
                    check_name="no_feature_is_all_null",
                    passed=not empty,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={"all_null": ", ".join(empty) or "none"},
                ),
            ],
        )

    return features
