"""`<fleet>/features`: the feature table, its contract enforced before it is committed."""

from collections.abc import Mapping

import dagster as dg

from assets.link import FleetFiles, link_key, link_settings, prefixed, readable_failures
from pipeline.features.sql import check_features
from pipeline.features.suspicions import columns_looked_at, find_suspicions
from pipeline.spark.features import all_null_columns, build_features, check_feature_table, rows_of_some_entities
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
            dg.AssetCheckSpec(
                "lags_find_their_rows",
                asset=link_key(spec, "features"),
                description="No lag is null where the entity has a value in the wanted period.",
            ),
            dg.AssetCheckSpec(
                "days_begin_at_midnight",
                asset=link_key(spec, "features"),
                description="Rows of days and longer do not lie at midnights of another time zone than the fleet's.",
            ),
            dg.AssetCheckSpec(
                "no_column_looks_like_the_future",
                asset=link_key(spec, "features"),
                description="No column of features.columns equals the target of its own row, or follows each of its changes.",
            ),
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
            version = tables.write_spark(rows, location, before_commit=lambda rows: counts.update(check_feature_table(rows, spec)))
            written = tables.read_spark(spark.session, location)
            empty = all_null_columns(written, spec.feature_columns)
            suspicions = find_suspicions(rows_of_some_entities(written, spec, columns_looked_at(spec), counts["n_rows"]), spec)
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
                _warning(
                    "lags_find_their_rows",
                    suspicions.missed_lags,
                    "null although the entity has a value within a period of the wanted time: it was known only after the row's horizon, "
                    "or the series keeps other hours",
                ),
                _warning(
                    "days_begin_at_midnight",
                    suspicions.other_midnights,
                    "if that is midnight somewhere, set timezone to that zone, e.g. `timezone: Europe/Berlin`: otherwise days are cut "
                    "in the wrong place, and lags miss their rows after each change of the clocks",
                ),
                _warning(
                    "no_column_looks_like_the_future",
                    suspicions.like_the_target,
                    "a column that is known only with the target must not be in features.columns: use a lag or a window of it; "
                    "if it is known when the prediction is made, nothing needs to be done",
                ),
            ],
        )

    return features


def _warning(check_name: str, found: Mapping[str, str], hint: str) -> dg.AssetCheckResult:
    """A check that fails as a warning if anything was found, and stops nothing."""
    told = "; ".join(f"{name}: {what}" for name, what in found.items())
    return dg.AssetCheckResult(
        check_name=check_name,
        passed=not found,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{told} ({hint})" if found else None,
        metadata=dict(found),
    )
