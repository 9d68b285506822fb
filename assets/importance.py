"""`<fleet>/importance`: what each feature does in each group's model."""

from typing import Any

import dagster as dg
import pandas as pd

from assets.settings import asset_settings, check_specs, png, prefixed, readable_failures
from pipeline.models.importance import SAMPLED_ROWS
from pipeline.models.meta_model import CORRECTION
from pipeline.reporting.plots import importance_plot
from pipeline.reporting.summary import markdown_table, top_features
from pipeline.runs.ledger import models_that_answer
from pipeline.runs.manifest import RunManifest
from pipeline.spark.importance import ImportanceResult, write_importance
from pipeline.spec import FleetSpec
from pipeline.tables import IMPORTANCE
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

SHOWN_GROUPS = 20


CHECKS = {
    "every_model_has_importance": "Every group whose own model answers has a row per feature."
}
# What the report reads of the table.
COLUMNS = ["grain", "group_id", "feature", "gain_share", "rank"]


def importance_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The importance table of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "importance",
            description=(
                f"Gain, splits and mean absolute SHAP value (over at most {SAMPLED_ROWS} of its "
                "newest rows) of every feature in every group's own model that "
                "counts in an answer. A group whose model is that of the run before keeps the "
                "rows it had."
            ),
            kinds={"spark", "lightgbm", "deltalake"},
            deps=["models"],
        ),
        check_specs=check_specs(spec, "importance", CHECKS),
    )
    def importance(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        with readable_failures():
            own = launch.scope(spec, tables, registry).tables
            location, run = own.location(IMPORTANCE), own.newest_run()
            ledger = own.ledger(run.run_id)
            features = own.features(spark.session, run.features_version)
            answering = models_that_answer(ledger, run.model_spec)
            context.log.info(f"looking at what features do in {len(answering):,} models")
            result = write_importance(spark.session, own, features, spec, run, ledger)
            written = tables.read_arrow(location, where={"run_id": run.run_id}, columns=COLUMNS)
            rows = written.to_pandas(strings_to_categorical=True)
        top = top_features(rows)
        context.log.info(_describe(result, top))
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(IMPORTANCE, location),
                "dagster/row_count": len(rows),
                **_metadata(result, run, top, spec),
            },
            check_results=[_every_model_has_importance(answering, rows, result)],
        )

    return importance


def _describe(result: ImportanceResult, top: pd.DataFrame) -> str:
    """What was done, in a line."""
    n_explained = result.n_boosters - result.n_copied
    first = ", ".join(top["feature"].head(3)) or "none"
    return f"{n_explained:,} models looked at, {result.n_copied:,} as before; most gain: {first}"


def _metadata(
    result: ImportanceResult, run: RunManifest, top: pd.DataFrame, spec: FleetSpec
) -> dict[str, Any]:
    """What the Dagster UI shows of the table."""
    facts = {
        "run_id": run.run_id,
        "groups": result.n_boosters,
        "copied": result.n_copied,
        "explains": _explained(run.model_spec.own, spec),
    }
    return {
        **prefixed(facts),
        "fleet/top_features": dg.MetadataValue.md(markdown_table(top)),
        "fleet/plot": png(importance_plot(top, spec)),
    }


def _explained(own: str, spec: FleetSpec) -> str:
    """What gain and SHAP values are of."""
    if own == CORRECTION and len(spec.grains) > 1:
        return (
            "what a group's trees add to its parent's prediction; "
            "for the pooled group its whole prediction"
        )
    return "the group's own model, before it is blended with its parent's"


def _every_model_has_importance(
    answering: pd.DataFrame, rows: pd.DataFrame, result: ImportanceResult
) -> dg.AssetCheckResult:
    wanted = set(answering["group_id"])
    absent = sorted(wanted - set(rows["group_id"]))
    shown = [
        {
            "group_id": group,
            "why": result.failed.get(group, "its booster or its rows are missing"),
        }
        for group in absent[:SHOWN_GROUPS]
    ]
    return dg.AssetCheckResult(
        check_name="every_model_has_importance",
        passed=not absent,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "models": len(wanted),
            "absent": len(absent),
            "examples": dg.MetadataValue.md(
                markdown_table(pd.DataFrame(shown, columns=["group_id", "why"]))
            ),
        },
    )
