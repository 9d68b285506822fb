"""`<fleet>/champion`: the version that serves; moved only when the challenger passes its gates."""

import dagster as dg
import pandas as pd

from assets.link import link_key, link_settings, prefixed, readable_failures
from assets.newest_run import ledger_of
from pipeline.models.promotion import Gate, judge_challenger
from pipeline.reporting.summary import markdown_table
from pipeline.spec import FleetSpec
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry


def champion_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The serving version of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "champion",
            description="The version under the alias `champion`. A challenger that fails a gate leaves it where it is.",
            kinds={"mlflow"},
            deps=["meta_model"],
        ),
        check_specs=[
            dg.AssetCheckSpec(
                "challenger_passed_its_gates", asset=link_key(spec, "champion"), description="The newest version is fit to serve, and does."
            )
        ],
    )
    def champion(context: dg.AssetExecutionContext, tables: DeltaTables, registry: MlflowRegistry, launch: LaunchSettings) -> dg.MaterializeResult:
        namespace = launch.namespace(spec)
        with readable_failures():
            challenger = registry.get(namespace, CHALLENGER)
            ledger = ledger_of(tables, namespace, challenger.fleet_version)
            gates = judge_challenger(ledger, registry.open_pack(challenger, tables.storage_options).groups())
            passed = all(gate.passed for gate in gates)
            before = registry.find(namespace, CHAMPION)
            if passed:
                registry.promote(challenger)
            serving = registry.find(namespace, CHAMPION)
        context.log.info(_text(gates, challenger.number, serving.number if serving else None))
        return dg.MaterializeResult(
            metadata={
                **prefixed(
                    {
                        "champion": serving.number if serving else "none",
                        "before": before.number if before else "none",
                        "challenger": challenger.number,
                        "fleet_version": serving.fleet_version if serving else "none",
                    }
                ),
                "fleet/gates": dg.MetadataValue.md(markdown_table(pd.DataFrame([vars(gate) for gate in gates]))),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="challenger_passed_its_gates",
                    passed=passed,
                    severity=dg.AssetCheckSeverity.ERROR,
                    description="; ".join(f"{gate.name}: {gate.found}" for gate in gates if not gate.passed) or "all gates passed",
                )
            ],
        )

    return champion


def _text(gates: list[Gate], challenger: str, serving: str | None) -> str:
    failed = [f"{gate.name} ({gate.found}, expected {gate.expected})" for gate in gates if not gate.passed]
    if failed:
        return f"version {challenger} stays challenger: {'; '.join(failed)}; champion is {serving or 'none'}"
    return f"version {challenger} passed {len(gates)} gates and is champion"
