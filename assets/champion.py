"""`<fleet>/champion`: the version that serves.

Each group moves to the challenger only if the paired tests, or a person, say so.
"""

from typing import Any

import dagster as dg
import pandas as pd

from assets.deciding import Deciding, Outcome, version_number
from assets.settings import asset_settings, check_specs, png, prefixed, readable_failures
from pipeline.models.promotion import CAN_ANSWER, CAN_OPEN, REFITTED
from pipeline.reporting.plots import decision_plot
from pipeline.reporting.summary import markdown_table
from pipeline.spec import FleetSpec
from pipeline.tables import DECISIONS
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

MAX_ROWS_SHOWN = 20
CHECKS = {"challenger_passed_its_gates": "The newest version is fit to serve, group by group."}


def champion_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The serving version of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "champion",
            description="The version under the alias `champion`: each group is answered by the "
            "newest chain that is not worse than the one before. "
            "A challenger that fails a gate leaves it where it is. Launch it alone with `decision` "
            "to override or to roll back.",
            kinds={"mlflow", "spark"},
            deps=["meta_model"],
        ),
        check_specs=check_specs(spec, "champion", CHECKS),
    )
    def champion(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        with readable_failures():
            scope = launch.scope(spec, tables, registry)
            if scope.note:
                context.log.info(scope.note)
            deciding = Deciding(
                spec, scope.tables, registry, spark, launch, context.run.run_id, context.log
            )
            outcome = deciding.run()
        promote = launch.command(spec, decision="promote", why="...")
        summary = describe_outcome(outcome, promote)
        if outcome.failed_gates:
            context.log.warning(summary)
        else:
            context.log.info(summary)
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(DECISIONS, scope.tables.location(DECISIONS)),
                **_metadata(outcome, spec, launch.decision),
            },
            check_results=[_challenger_passed_its_gates(outcome, summary)],
        )

    return champion


def _metadata(outcome: Outcome, spec: FleetSpec, decision: str) -> dict[str, Any]:
    """What the Dagster UI shows of a decision."""
    groups = outcome.decisions.assign(moved=outcome.moved)
    gates = pd.DataFrame([vars(gate) for gate in outcome.gates])
    facts = {
        "champion": version_number(outcome.after),
        "before": version_number(outcome.before),
        "challenger": version_number(outcome.challenger),
        "fleet_version": outcome.after.fleet_version if outcome.after else "none",
        "decision": decision,
        "groups_moved": int(outcome.moved.sum()),
    }
    return {
        **prefixed(facts),
        "fleet/gates": dg.MetadataValue.md(markdown_table(gates)),
        "fleet/reasons": dg.MetadataValue.md(markdown_table(_count_reasons(groups))),
        "fleet/tested_groups": dg.MetadataValue.md(markdown_table(_clearest_tests(groups))),
        "fleet/plot": png(decision_plot(groups, spec)),
    }


def _challenger_passed_its_gates(outcome: Outcome, summary: str) -> dg.AssetCheckResult:
    passed = not outcome.failed_gates
    # A version that serves although a gate failed is worth a look, and stops nobody.
    severity = dg.AssetCheckSeverity.ERROR if outcome.is_refused else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        check_name="challenger_passed_its_gates",
        passed=passed,
        severity=severity,
        description="all gates passed" if passed else summary,
    )


def _count_reasons(groups: pd.DataFrame) -> pd.DataFrame:
    """Groups by what became of them, and why."""
    counted = (
        groups.groupby(["moved", "reason", "to_version"], dropna=False)
        .size()
        .reset_index(name="groups")
    )
    return counted.sort_values("groups", ascending=False, ignore_index=True)


def _clearest_tests(groups: pd.DataFrame) -> pd.DataFrame:
    """The clearest of the tested groups."""
    if "p_value" not in groups:
        return pd.DataFrame()
    is_tested = groups["p_value"].notna()
    tested = groups[is_tested].sort_values(["p_value", "group_id"]).head(MAX_ROWS_SHOWN)
    return tested[
        ["group_id", "moved", "reason", "n_rows", "loss_champion", "loss_challenger", "p_value"]
    ]


def describe_outcome(outcome: Outcome, promote: str) -> str:
    """What a launch did, in a line.

    Args:
        outcome: of the launch.
        promote: the command that lets a challenger serve that gates held back.
    """
    after = version_number(outcome.after)
    if outcome.challenger is None:
        n_moved = int(outcome.moved.sum())
        return (
            f"rolled back: {n_moved:,} groups; champion is version {after}, "
            f"before {version_number(outcome.before)}"
        )
    version = f"version {outcome.challenger.number}"
    failed = "; ".join(
        f"{gate.name} ({gate.found}, expected {gate.expected})" for gate in outcome.failed_gates
    )
    if outcome.is_refused:
        cannot_answer = any(gate.name in (CAN_OPEN, CAN_ANSWER) for gate in outcome.failed_gates)
        next_step = f"To let it serve anyway: {promote}"
        if cannot_answer:
            next_step = "Materialise models and meta_model again"
        return f"{version} stays challenger: {failed}; champion is {after}. {next_step}"
    judged = f"{version} passed {len(outcome.gates)} gates"
    if failed:
        judged = f"{version} did not pass every gate: {failed}"
    if after == outcome.challenger.number:
        return f"{judged}; it is champion nevertheless" if failed else f"{judged} and is champion"
    if not outcome.moved.any():
        return f"{judged}, and no group is better off with it; champion is {after}"
    return (
        f"{judged}: {_describe_groups(outcome)}; champion is version {after}, which combines them"
    )


def _describe_groups(outcome: Outcome) -> str:
    """How many groups a challenger answers that did not become champion as a whole."""
    rows = outcome.decisions
    is_refitted = rows["reason"] == REFITTED
    n_stayed = int((rows["from_version"] == rows["to_version"]).sum())
    parts = [f"it answers {int((outcome.moved & ~is_refitted).sum()):,} more groups"]
    if is_refitted.any():
        parts.append(f"{int(is_refitted.sum()):,} keep their recipes, fitted on the newer rows")
    parts.append(f"{n_stayed:,} stay as they are")
    return ", ".join(parts)
