"""`<fleet>/models`: grouped training; boosters, holdout and one ledger row per group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import dagster as dg
import pandas as pd

from assets.progress import no_progress, progress_lines
from assets.settings import asset_settings, check_specs, png, prefixed, readable_failures
from pipeline.crash_points import crash_point
from pipeline.models.meta_model import PackError, decode_booster
from pipeline.reporting.plots import plan_plot, training_plot
from pipeline.reporting.summary import (
    describe_outcomes,
    fleet_errors,
    markdown_table,
    slowest_groups,
    status_counts,
    worst_groups,
    worthwhile_groups,
)
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.plan import KEEP, REFRESH, TRAIN
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.runs.sampling import SAMPLED_WHOLE
from pipeline.spark.pilot import plan_with_pilot
from pipeline.spark.planning import plan_run
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from pipeline.storage import HeldLease
from pipeline.tables import BOOSTERS, LEDGER
from pipeline.training.outcome import NOT_LISTED, TOO_FEW_ROWS, VANISHED, Status
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.lease import hold_lease
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

CHECKED_BOOSTERS = 200
MAX_ROWS_SHOWN = 20


def models_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The trained models of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "models",
            description="One tuned LightGBM model per group that has enough rows, and one ledger "
            "row per group whatever happened to it.",
            kinds={"spark", "lightgbm", "optuna", "deltalake"},
            deps=["features"],
        ),
        output_required=False,
    )
    def models(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> Iterator[dg.MaterializeResult]:
        with readable_failures():
            scope = launch.scope(spec, tables, registry)
            if scope.note:
                context.log.info(scope.note)
            request = launch.request(spec, context.run.run_id)
            if launch.dry_run:
                _plan_only(context.log, spec, scope.tables, spark, request)
                return
            with hold_lease(tables, scope.namespace, request.run_id) as lease:
                trained = _train(context.log, spec, scope.tables, spark, request, lease)
        context.log.info(describe_outcomes(trained.ledger, spec.tuning.max_rounds))
        yield dg.MaterializeResult(metadata=_metadata(trained, spec, scope.tables))

    return models


CHECKS = {
    "every_group_has_an_outcome": "The ledger has exactly one row per group of the plan.",
    "boosters_match_the_ledger": (
        "Boosters in the store have the digests and ids that the ledger names (all, or 200 of "
        "them)."
    ),
    "every_judged_group_is_measured": (
        "Every held-out row belongs to a group of the ledger, and every group with report rows "
        "has its errors."
    ),
    "no_group_failed": "No group ended in an error or killed its process.",
}


def models_checks(spec: FleetSpec) -> dg.AssetChecksDefinition:
    """What must hold of every training run, read back from its tables.

    A dry run has nothing to check.
    """

    @dg.multi_asset_check(
        name=f"{spec.name}__models_checks",
        specs=check_specs(spec, "models", CHECKS, blocking=set(CHECKS) - {"no_group_failed"}),
    )
    def checks(
        tables: DeltaTables, registry: MlflowRegistry, launch: LaunchSettings
    ) -> Iterator[dg.AssetCheckResult]:
        with readable_failures():
            own = launch.scope(spec, tables, registry).tables
            run = own.newest_run()
            ledger = own.ledger(run.run_id)
            results = [
                _every_group_has_an_outcome(run.n_groups, ledger),
                _boosters_match(tables, own.location(BOOSTERS), ledger, run.waves),
                _every_judged_group_is_measured(run, ledger),
                _no_group_failed(ledger),
            ]
        yield from results

    return checks


@dataclass(frozen=True)
class _Trained:
    """A training run that came to its end.

    Args:
        run: as it was planned.
        ledger: its rows.
        features_version: version of the feature table that it read.
    """

    run: PlannedRun
    ledger: pd.DataFrame
    features_version: int


def _plan_only(
    log: dg.DagsterLogManager,
    spec: FleetSpec,
    tables: FleetTables,
    spark: SparkSessionResource,
    request: Request,
) -> None:
    """Say what a launch would do."""
    context, history = spark.training_context(no_progress), History.read(tables)
    run = plan_run(context, tables.features(spark.session), spec, request, history)
    log.info(_plan_text(run, spec))
    log.info("the largest groups:\n" + _largest_groups(run))
    log.info("dry run: nothing was trained")


def _train(
    log: dg.DagsterLogManager,
    spec: FleetSpec,
    tables: FleetTables,
    spark: SparkSessionResource,
    request: Request,
    lease: HeldLease,
) -> _Trained:
    """Plan the run, and train it."""
    crash_point("lease_taken")
    features_version = tables.features_version()
    features = tables.features(spark.session, features_version)
    context = spark.training_context(progress_lines(log))
    run = plan_with_pilot(context, tables, features, spec, request, log.info)
    log.info(_plan_text(run, spec))
    if run.is_resumed:
        log.info(f"resuming run {run.run_id}, which was interrupted")
    with _explained_interruption(log, tables, run):
        ledger = train_run(
            context, tables, run, spec, features_version=features_version, lease=lease
        )
    return _Trained(run, ledger, features_version)


def _metadata(trained: _Trained, spec: FleetSpec, tables: FleetTables) -> dict[str, Any]:
    """What the Dagster UI shows of a training run."""
    run, ledger = trained.run, trained.ledger
    errors = pd.DataFrame([vars(error) for error in fleet_errors(ledger, spec)])
    facts = {
        "run_id": run.run_id,
        "resumed": run.is_resumed,
        "plan": run.plan.describe(),
        "as_of": str(run.cutoffs.as_of),
        "features_version": trained.features_version,
        "trained_seconds": float(ledger["seconds"].sum()),
    }
    return {
        **contract_metadata(LEDGER, tables.location(LEDGER)),
        "dagster/row_count": len(ledger),
        "fleet/status": dg.MetadataValue.md(markdown_table(status_counts(ledger))),
        "fleet/errors": dg.MetadataValue.md(markdown_table(errors)),
        "fleet/worst_groups": dg.MetadataValue.md(
            markdown_table(worst_groups(ledger, MAX_ROWS_SHOWN))
        ),
        "fleet/slowest_groups": dg.MetadataValue.md(markdown_table(slowest_groups(ledger))),
        "fleet/own_models": dg.MetadataValue.md(
            markdown_table(worthwhile_groups(ledger, MAX_ROWS_SHOWN))
        ),
        "fleet/plot": png(training_plot(ledger, spec)),
        "fleet/planned_against_real": png(plan_plot(ledger)),
        **prefixed(facts),
    }


def _plan_text(run: PlannedRun, spec: FleetSpec) -> str:
    cutoffs, tuning = run.cutoffs, spec.tuning
    text = (
        f"plan: {run.plan.describe()}; as of {cutoffs.as_of}, tune from {cutoffs.tune_start}, "
        f"report from {cutoffs.report_start}"
    )
    if not run.plan.groups["reason"].eq(TOO_FEW_ROWS).any():
        return text
    return (
        f"{text}; a group is trained from {tuning.fit_rows} fit and {tuning.tune_rows} tune rows "
        "(tuning.fit_rows, tuning.tune_rows)"
    )


@contextmanager
def _explained_interruption(
    log: dg.DagsterLogManager, tables: FleetTables, run: PlannedRun
) -> Iterator[None]:
    """Tell somebody who ends a run what of it is kept, and how to go on."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        # Ctrl-C, SIGTERM, or "terminate" in the UI.
        log.warning(_kept_text(len(tables.ledger(run.run_id)), run))
        raise


def _kept_text(n_kept: int, run: PlannedRun) -> str:
    n_groups = int(run.plan.groups["action"].isin([TRAIN, REFRESH, KEEP]).sum())
    return (
        f"stopped: {n_kept:,} of {n_groups:,} groups are kept; the next launch with "
        "the same settings "
        f"resumes run {run.run_id}"
    )


def _largest_groups(run: PlannedRun) -> str:
    columns = [
        "group_id",
        "action",
        "reason",
        "n_rows",
        "n_fit",
        "n_tune",
        "n_report",
        "cost_seconds",
    ]
    shown = run.plan.groups.head(10)[columns]
    return str(shown.fillna("").to_string(index=False, float_format=lambda value: f"{value:.1f}"))


def _every_group_has_an_outcome(n_groups: int, ledger: pd.DataFrame) -> dg.AssetCheckResult:
    n_doubled = int(ledger.duplicated(["grain", "group_id"]).sum())
    unknown = sorted(set(ledger["status"].fillna("null")) - set(get_args(Status)))
    return dg.AssetCheckResult(
        check_name="every_group_has_an_outcome",
        passed=len(ledger) == n_groups and n_doubled == 0 and not unknown,
        metadata={
            "groups": n_groups,
            "ledger_rows": len(ledger),
            "doubled": n_doubled,
            "unknown_status": ", ".join(unknown) or "none",
        },
    )


def _boosters_match(
    tables: DeltaTables, location: str, ledger: pd.DataFrame, waves: Sequence[str]
) -> dg.AssetCheckResult:
    wanted = set(ledger["booster_id"].dropna())
    stored: list[str] = []
    damaged = []
    if wanted and tables.exists(location):
        stored = (
            tables.read_arrow(location, where={"wave": list(waves)}, columns=["booster_id"])
            .column(0)
            .to_pylist()
        )
        sampled = sorted(wanted.intersection(stored))[:CHECKED_BOOSTERS]
        for row in tables.read_arrow(
            location, where={"wave": list(waves), "booster_id": sampled}
        ).to_pylist():
            try:
                decode_booster(row, location)
            except PackError as error:
                damaged.append(str(error))
    absent = sorted(wanted - set(stored))
    return dg.AssetCheckResult(
        check_name="boosters_match_the_ledger",
        passed=not absent and not damaged,
        metadata={
            "boosters": len(wanted),
            "absent": str(absent[:10]),
            "damaged": str(damaged[:10]),
        },
    )


def _every_judged_group_is_measured(run: RunManifest, ledger: pd.DataFrame) -> dg.AssetCheckResult:
    unknown = run.unknown_groups
    unmeasured = _unmeasured_groups(ledger)
    return dg.AssetCheckResult(
        check_name="every_judged_group_is_measured",
        passed=not unknown and not unmeasured,
        metadata={
            "unknown_groups": ", ".join(unknown[:MAX_ROWS_SHOWN]) or "none",
            "unmeasured_groups": ", ".join(unmeasured[:MAX_ROWS_SHOWN]) or "none",
        },
    )


def _unmeasured_groups(ledger: pd.DataFrame) -> list[str]:
    """Groups with report rows and no errors on them.

    Some may be without errors for a good reason: rows that an ancestor has not held out are not
    judged, be it that it kept an older model, that it is so large that it learns from a sample, or
    that it took its worker down.
    """
    pooled = ledger[ledger["grain"] == 0]
    if ledger["reason"].eq(NOT_LISTED).any() or pooled["status"].eq("crashed").any():
        return []
    is_whole = ledger["n_target"] < SAMPLED_WHOLE
    has_report_rows = (ledger["n_report"].fillna(0) > 0) & ledger["reason"].ne(VANISHED)
    unmeasured = ledger[is_whole & has_report_rows & ledger["report_rows"].isna()]
    return [str(group) for group in unmeasured["group_id"]]


def _no_group_failed(ledger: pd.DataFrame) -> dg.AssetCheckResult:
    failed = ledger[ledger["status"].isin(["failed", "crashed"])]
    shown = failed.head(20)[["group_id", "status", "reason", "error_class", "error_message"]]
    return dg.AssetCheckResult(
        check_name="no_group_failed",
        passed=failed.empty,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"failed": len(failed), "examples": dg.MetadataValue.md(markdown_table(shown))},
    )
