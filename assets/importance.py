"""`<fleet>/importance`: what each feature does in each group's model."""

import dagster as dg
import pandas as pd

from assets.link import link_key, link_settings, png, prefixed, readable_failures
from assets.newest_run import features_of, ledger_of, newest_run
from pipeline.models.importance import SAMPLED_ROWS
from pipeline.models.meta_model import CORRECTION, ModelSpec
from pipeline.reporting.plots import importance_plot
from pipeline.reporting.summary import markdown_table, top_features
from pipeline.spark.importance import LookedAt, write_importance
from pipeline.spec import FleetSpec
from pipeline.tables import IMPORTANCE
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

SHOWN_GROUPS = 20


def importance_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The importance table of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "importance",
            description=(
                f"Gain, splits and mean absolute SHAP value (over at most {SAMPLED_ROWS} of its newest rows) of every feature in every group's own "
                "model. A group whose model is that of the run before keeps the rows it had."
            ),
            kinds={"spark", "lightgbm", "deltalake"},
            deps=["models"],
        ),
        check_specs=[
            dg.AssetCheckSpec(
                "every_model_has_importance", asset=link_key(spec, "importance"), description="Every group with a booster has a row per feature."
            )
        ],
    )
    def importance(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        with readable_failures():
            namespace = launch.scope(spec, tables, registry).namespace
            location = tables.location(namespace, IMPORTANCE.name)
            run = newest_run(tables, namespace)
            run_id = str(run["run_id"])
            ledger = ledger_of(tables, namespace, run_id)
            features = features_of(spark.session, tables, spec.name, run)
            context.log.info(f"looking at what features do in {int(ledger['booster_id'].notna().sum()):,} models")
            told = write_importance(spark.session, tables, namespace, features, spec, run.to_dict(), ledger)
            columns = ["grain", "group_id", "feature", "gain_share", "rank"]
            rows = tables.read_arrow(location, where={"run_id": run_id}, columns=columns).to_pandas(strings_to_categorical=True)
        top = top_features(rows)
        first = ", ".join(top["feature"].head(3)) or "none"
        context.log.info(f"{told.n_boosters - told.n_copied:,} models looked at, {told.n_copied:,} as before; most gain: {first}")
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(IMPORTANCE, location),
                "dagster/row_count": len(rows),
                **prefixed(
                    {
                        "run_id": run_id,
                        "groups": told.n_boosters,
                        "copied": told.n_copied,
                        "explains": _explained(ModelSpec.from_json(str(run["model_spec"])).own, spec),
                    }
                ),
                "fleet/top_features": dg.MetadataValue.md(markdown_table(top)),
                "fleet/plot": png(importance_plot(top, spec)),
            },
            check_results=[_every_model_has_importance(ledger, rows, told)],
        )

    return importance


def _explained(own: str, spec: FleetSpec) -> str:
    """What gain and SHAP values are of."""
    if own == CORRECTION and len(spec.grains) > 1:
        return "what a group's trees add to its parent's prediction; for the pooled group its whole prediction"
    return "the group's own model, before it is blended with its parent's"


def _every_model_has_importance(ledger: pd.DataFrame, rows: pd.DataFrame, told: LookedAt) -> dg.AssetCheckResult:
    wanted = set(ledger.loc[ledger["booster_id"].notna(), "group_id"])
    absent = sorted(wanted - set(rows["group_id"]))
    shown = [{"group_id": group, "why": told.failed.get(group, "its booster and its rows are not there")} for group in absent[:SHOWN_GROUPS]]
    return dg.AssetCheckResult(
        check_name="every_model_has_importance",
        passed=not absent,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "models": len(wanted),
            "absent": len(absent),
            "examples": dg.MetadataValue.md(markdown_table(pd.DataFrame(shown, columns=["group_id", "why"]))),
        },
    )
