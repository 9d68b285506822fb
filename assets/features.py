"""`<fleet>/features`: the feature table, its contract enforced before it is committed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import dagster as dg

from assets.automation import follows_its_inputs
from assets.settings import (
    FleetFiles,
    asset_key,
    asset_settings,
    prefixed,
    readable_failures,
    since,
    unchanged,
)
from pipeline.errors import StoreError
from pipeline.features.sql import check_features
from pipeline.features.suspicions import columns_looked_at, find_suspicions
from pipeline.recognition import DIGEST, RESULTS, features_digest
from pipeline.spark.data_errors import readable_spark_errors
from pipeline.spark.features import (
    all_null_columns,
    build_features,
    check_feature_table,
    rows_of_some_entities,
)
from pipeline.spec import FleetSpec
from pipeline.tables import FEATURES
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.spark_session import SparkSessionResource

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def features_asset(spec: FleetSpec, files: FleetFiles) -> dg.AssetsDefinition:
    """The feature table of a fleet."""
    sources = [source.name for source in spec.sources]

    @dg.asset(
        **asset_settings(
            spec,
            "features",
            description="One row per entity and time: keys, target, features.",
            kinds={"spark", "sql", "deltalake"},
            deps=sources,
        ),
        automation_condition=follows_its_inputs(spec),
        check_specs=[
            dg.AssetCheckSpec(
                "has_targets",
                asset=asset_key(spec, "features"),
                blocking=True,
                description="Some row has a target.",
            ),
            dg.AssetCheckSpec(
                "no_feature_is_all_null",
                asset=asset_key(spec, "features"),
                description="Every feature has a value somewhere.",
            ),
            dg.AssetCheckSpec(
                "lags_find_their_rows",
                asset=asset_key(spec, "features"),
                description="No lag is null where the entity has a value in the wanted period.",
            ),
            dg.AssetCheckSpec(
                "days_begin_at_midnight",
                asset=asset_key(spec, "features"),
                description="Rows of days and longer do not lie at midnights of another time zone "
                "than the fleet's.",
            ),
            dg.AssetCheckSpec(
                "no_column_looks_like_the_future",
                asset=asset_key(spec, "features"),
                description="No column of features.columns equals the target of its own row, or "
                "follows each of its changes.",
            ),
        ],
    )
    def features(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        location = tables.location(spec.name, FEATURES.name)
        with readable_failures():
            digest = _digest(spec, files, tables, spark)
            found = None if launch.retrain == "all" else unchanged(tables, location, digest)
            if found is None:
                context.log.info("building the feature table on Spark")
                _build(spec, files, tables, spark, location, digest)
                found = tables.snapshot(location)
                said = ""
            else:
                said = f"unchanged since {since(found)}, "
            if found is None:
                raise StoreError(
                    f"{location} was committed, and its files are not there; check the store, then "
                    "run again"
                )
        results = json.loads(found.metadata[RESULTS])
        counts, empty, suspicions = results["counts"], results["all_null"], results["suspicions"]
        context.log.info(
            f"features: {said}{counts['n_rows']:,} rows, {counts['n_targets']:,} with a target, "
            f"{len(spec.feature_columns)} features"
        )
        columns = [dg.TableColumn(field.name, str(field.type)) for field in found.schema]
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(FEATURES, location),
                "dagster/row_count": counts["n_rows"],
                "dagster/column_schema": dg.TableSchema(columns=columns),
                **prefixed(
                    {
                        "version": found.version,
                        "unchanged": bool(said),
                        **counts,
                        "features": len(spec.feature_columns),
                    }
                ),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="has_targets",
                    passed=counts["n_targets"] > 0,
                    metadata={"rows_with_target": counts["n_targets"]},
                ),
                dg.AssetCheckResult(
                    check_name="no_feature_is_all_null",
                    passed=not empty,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={"all_null": ", ".join(empty) or "none"},
                ),
                _warning(
                    "lags_find_their_rows",
                    suspicions["missed_lags"],
                    "null although the entity has a value within a period of the wanted time: it "
                    "was known only after the row's horizon, "
                    "or the series keeps other hours",
                ),
                _warning(
                    "days_begin_at_midnight",
                    suspicions["other_midnights"],
                    "if that is midnight somewhere, set timezone to that zone, e.g. `timezone: "
                    "Europe/Berlin`: otherwise days are cut "
                    "in the wrong place, and lags miss their rows after each change of the clocks",
                ),
                _warning(
                    "no_column_looks_like_the_future",
                    suspicions["like_the_target"],
                    "a column that is known only with the target must not be in features.columns: "
                    "use a lag or a window of it; "
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


def _digest(
    spec: FleetSpec, files: FleetFiles, tables: DeltaTables, spark: SparkSessionResource
) -> str | None:
    """Of all that the table is made of; None where a raw table cannot be told from another."""
    raw = {
        source.name: tables.snapshot(tables.location(spec.name, "raw", source.name))
        for source in spec.sources
    }
    identities = {name: found.identity for name, found in raw.items() if found is not None}
    return (
        features_digest(spec, files.sql, identities, spark.conf)
        if len(identities) == len(raw)
        else None
    )


def _build(
    spec: FleetSpec,
    files: FleetFiles,
    tables: DeltaTables,
    spark: SparkSessionResource,
    location: str,
    digest: str | None,
) -> None:
    """Build, check and commit the table.

    What the checks found is kept in its commit, for launches that find it unchanged.
    """
    raw = {
        source.name: tables.read_spark(
            spark.session, tables.location(spec.name, "raw", source.name)
        )
        for source in spec.sources
    }
    schemas = {
        name: {field.name: field.dataType.simpleString() for field in frame.schema}
        for name, frame in raw.items()
    }
    check_features(spec, files.sql, file=spec.features.sql, schemas=schemas)
    kept = {DIGEST: digest} if digest else {}

    def look(written: "DataFrame") -> None:
        counts = check_feature_table(written, spec)
        looked_at = rows_of_some_entities(written, spec, columns_looked_at(spec), counts["n_rows"])
        results = {
            "counts": counts,
            "all_null": all_null_columns(written, spec.feature_columns),
            "suspicions": asdict(find_suspicions(looked_at, spec)),
        }
        kept[RESULTS] = json.dumps(results)

    with readable_spark_errors(spec.features.sql, raw):
        rows = build_features(spark.session, spec, files.sql, raw)
        tables.write_spark(rows, location, before_commit=look, metadata=kept)
