"""`<fleet>/features`: the feature table, its contract enforced before it is committed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.automation import follows_its_inputs
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
from pipeline.errors import StoreError
from pipeline.features.sql import check_features
from pipeline.features.suspicions import columns_looked_at, find_suspicions
from pipeline.recognition import RESULTS, features_digest
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spark.data_errors import readable_spark_errors
from pipeline.spark.features import (
    all_null_columns,
    build_features,
    check_feature_table,
    rows_of_some_entities,
)
from pipeline.spec import FleetSpec
from pipeline.storage import Snapshot
from pipeline.tables import FEATURES
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.spark_session import SparkSessionResource

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


CHECKS = {
    "has_targets": "Some row has a target.",
    "no_feature_is_all_null": "Every feature has a value somewhere.",
    "lags_find_their_rows": "No lag is null where the entity has a value in the wanted period.",
    "days_begin_at_midnight": "Rows of days and longer do not lie at midnights of another time "
    "zone than the fleet's.",
    "no_column_looks_like_the_future": "No column of features.columns equals the target of its "
    "own row, or follows each of its changes.",
}
MISSED_LAGS = (
    "null although the entity has a value within a period of the wanted time: it was known only "
    "after the row's horizon, or the series keeps other hours"
)
OTHER_MIDNIGHTS = (
    "if that is midnight somewhere, set timezone to that zone, e.g. `timezone: Europe/Berlin`: "
    "otherwise days are cut in the wrong place, and lags miss their rows after each change of the "
    "clocks"
)
LIKE_THE_TARGET = (
    "a column that is known only with the target must not be in features.columns: use a lag or a "
    "window of it; if it is known when the prediction is made, nothing needs to be done"
)


def features_asset(spec: FleetSpec, files: FleetFiles) -> dg.AssetsDefinition:
    """The feature table of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "features",
            description="One row per entity and time: keys, target, features.",
            kinds={"spark", "sql", "deltalake"},
            deps=[source.name for source in spec.sources],
        ),
        automation_condition=follows_its_inputs(spec),
        check_specs=check_specs(spec, "features", CHECKS, blocking=["has_targets"]),
    )
    def features(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        own = FleetTables(tables, spec.name, spec.name)
        with readable_failures():
            digest = _digest(spec, files, own, spark)
            table = unchanged(launch, tables, own.location(FEATURES), digest)
            is_unchanged = table is not None
            if table is None:
                context.log.info("building the feature table on Spark")
                table = _build(spec, files, own, spark, digest)
        results = json.loads(table.metadata[RESULTS])
        context.log.info(_describe_rows(results["counts"], spec, table, is_unchanged=is_unchanged))
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(FEATURES, own.location(FEATURES)),
                **_metadata(results["counts"], spec, table, is_unchanged=is_unchanged),
            },
            check_results=_check(results),
        )

    return features


def _describe_rows(
    counts: Mapping[str, int], spec: FleetSpec, table: Snapshot, *, is_unchanged: bool
) -> str:
    """The table in a line."""
    rows = f"{counts['n_rows']:,} rows, {counts['n_targets']:,} with a target"
    if is_unchanged:
        rows = f"unchanged since {since(table)}, {rows}"
    return f"features: {rows}, {len(spec.feature_columns)} features"


def _metadata(
    counts: Mapping[str, int], spec: FleetSpec, table: Snapshot, *, is_unchanged: bool
) -> dict[str, Any]:
    """What the Dagster UI shows of the table."""
    facts = {
        "version": table.version,
        "unchanged": is_unchanged,
        **counts,
        "features": len(spec.feature_columns),
    }
    return {
        "dagster/row_count": counts["n_rows"],
        "dagster/column_schema": column_schema(table.schema),
        **prefixed(facts),
    }


def _check(results: Mapping[str, Any]) -> list[dg.AssetCheckResult]:
    """What the checks found when the table was built."""
    n_targets = results["counts"]["n_targets"]
    empty = results["all_null"]
    suspicions = results["suspicions"]
    return [
        dg.AssetCheckResult(
            check_name="has_targets",
            passed=n_targets > 0,
            metadata={"rows_with_target": n_targets},
        ),
        dg.AssetCheckResult(
            check_name="no_feature_is_all_null",
            passed=not empty,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"all_null": ", ".join(empty) or "none"},
        ),
        _warning("lags_find_their_rows", suspicions["missed_lags"], MISSED_LAGS),
        _warning("days_begin_at_midnight", suspicions["other_midnights"], OTHER_MIDNIGHTS),
        _warning("no_column_looks_like_the_future", suspicions["like_the_target"], LIKE_THE_TARGET),
    ]


def _warning(check_name: str, suspicions: Mapping[str, str], hint: str) -> dg.AssetCheckResult:
    """A check that fails as a warning if anything is suspicious, and stops nothing."""
    description = None
    if suspicions:
        listed = "; ".join(f"{name}: {suspicion}" for name, suspicion in suspicions.items())
        description = f"{listed} ({hint})"
    return dg.AssetCheckResult(
        check_name=check_name,
        passed=not suspicions,
        severity=dg.AssetCheckSeverity.WARN,
        description=description,
        metadata=dict(suspicions),
    )


def _digest(
    spec: FleetSpec, files: FleetFiles, tables: FleetTables, spark: SparkSessionResource
) -> str | None:
    """Digest of all that the table is made of; None unless every raw table is whole."""
    identities = {}
    for source in spec.sources:
        raw = tables.tables.snapshot(tables.raw_location(source.name))
        if raw is None:
            return None
        identities[source.name] = raw.identity
    return features_digest(spec, files.sql, identities, spark.conf)


def _build(
    spec: FleetSpec,
    files: FleetFiles,
    tables: FleetTables,
    spark: SparkSessionResource,
    digest: str | None,
) -> Snapshot:
    """Build, check and commit the table.

    The commit keeps what the checks found, for launches that find the table unchanged.
    """
    raw = {
        source.name: tables.tables.read_spark(spark.session, tables.raw_location(source.name))
        for source in spec.sources
    }
    schemas = {name: dict(frame.dtypes) for name, frame in raw.items()}
    check_features(spec, files.sql, file=spec.features.sql, schemas=schemas)
    metadata = commit_metadata(digest)

    def look(written: "DataFrame") -> None:
        metadata[RESULTS] = json.dumps(_examine(written, spec))

    location = tables.location(FEATURES)
    with readable_spark_errors(spec.features.sql, raw):
        rows = build_features(spark.session, spec, files.sql, raw)
        tables.tables.write_spark(rows, location, before_commit=look, metadata=metadata)
    table = tables.tables.snapshot(location)
    if table is None:
        raise StoreError(
            f"{location} was committed, but its files are missing; check the store, then run again"
        )
    return table


def _examine(written: "DataFrame", spec: FleetSpec) -> dict[str, Any]:
    """Check a table that is not committed yet.

    Raises:
        DataError: if it breaks its contract.
    """
    counts = check_feature_table(written, spec)
    sample = rows_of_some_entities(written, spec, columns_looked_at(spec), counts["n_rows"])
    return {
        "counts": counts,
        "all_null": all_null_columns(written, spec.feature_columns),
        "suspicions": asdict(find_suspicions(sample, spec)),
    }
