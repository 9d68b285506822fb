"""`<fleet>/models`: grouped training; boosters, holdout and one ledger row per group."""

from collections.abc import Iterator
from typing import get_args

import dagster as dg
import pandas as pd
import pyarrow as pa

from assets.link import link_key, link_settings, png, prefixed, readable_failures
from assets.newest_run import ledger_of, newest_run
from assets.progress import progress_lines
from pipeline.models.meta_model import PackError, decode_booster
from pipeline.reporting.plots import plan_plot, training_plot
from pipeline.reporting.summary import fleet_errors, markdown_table, slowest_groups, status_counts, worst_groups
from pipeline.spark.files import WrittenFile
from pipeline.spark.fleet_training import FinishedRun, PlannedRun, manifest, plan_run, train_run
from pipeline.spec import FleetSpec
from pipeline.tables import BOOSTERS, HOLDOUT, LEDGER, RUNS, TableContract
from pipeline.training.outcome import TOO_FEW_ROWS, Status
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.spark_session import SparkSessionResource

CHECKED_BOOSTERS = 200


def models_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The trained models of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "models",
            description="One tuned LightGBM model per group that has rows enough, and one ledger row per group whatever happened to it.",
            kinds={"spark", "lightgbm", "optuna", "deltalake"},
            deps=["features"],
        ),
        output_required=False,
    )
    def models(
        context: dg.AssetExecutionContext, tables: DeltaTables, spark: SparkSessionResource, launch: LaunchSettings
    ) -> Iterator[dg.MaterializeResult]:
        namespace, run_id = launch.namespace(spec), context.run.run_id
        started_at = pd.Timestamp.now(tz="UTC")
        with readable_failures():
            features_location = tables.location(spec.name, "features")
            features_version = tables.version(features_location)
            features = tables.read_spark(spark.session, features_location, features_version)
            run = plan_run(
                features,
                spec,
                run_id=run_id,
                as_of=launch.moment(spec),
                limit_groups=launch.limit_groups,
                slots=spark.slots,
                threads=spark.task_cpus,
            )
            context.log.info(_plan_text(run, spec))
            if launch.dry_run:
                context.log.info("dry run: nothing was trained\n" + _largest(run))
                return
            locations = {contract.name: tables.location(namespace, contract.name) for contract in (RUNS, BOOSTERS, HOLDOUT, LEDGER)}
            report = progress_lines(context.log, len(run.plan.to_train), float(run.plan.to_train["cost_seconds"].sum()))
            finished = train_run(spark.session, run, spec, roots=locations, options=tables.storage_options, report=report)
            _commit(tables, locations, run, finished, manifest(run, spec, started_at=started_at, features_version=features_version))
            ledger = tables.read_pandas(locations["ledger"], where={"run_id": run_id})
        yield dg.MaterializeResult(
            metadata={
                **contract_metadata(LEDGER, locations["ledger"]),
                "dagster/row_count": len(ledger),
                "fleet/status": dg.MetadataValue.md(markdown_table(status_counts(ledger))),
                "fleet/errors": dg.MetadataValue.md(markdown_table(pd.DataFrame([vars(error) for error in fleet_errors(ledger, spec)]))),
                "fleet/worst_groups": dg.MetadataValue.md(markdown_table(worst_groups(ledger, 20))),
                "fleet/slowest_groups": dg.MetadataValue.md(markdown_table(slowest_groups(ledger))),
                "fleet/plot": png(training_plot(ledger, spec)),
                "fleet/planned_against_real": png(plan_plot(ledger)),
                **prefixed({"run_id": run_id, "plan": run.plan.describe(), "as_of": str(run.cutoffs.as_of), "features_version": features_version}),
            },
        )

    return models


def models_checks(spec: FleetSpec) -> dg.AssetChecksDefinition:
    """What must hold of every training run, read back from its tables; a dry run has nothing to check."""

    def check(name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
        return dg.AssetCheckSpec(name, asset=link_key(spec, "models"), blocking=blocking, description=description)

    @dg.multi_asset_check(
        name=f"{spec.name}__models_checks",
        specs=[
            check("every_group_has_an_outcome", "The ledger has exactly one row per group of the plan.", blocking=True),
            check(
                "boosters_match_the_ledger",
                "Boosters in the store have the digests and ids that the ledger names (all, or 200 of them).",
                blocking=True,
            ),
            check("no_group_failed", "No group ended in an error."),
        ],
    )
    def checks(tables: DeltaTables, launch: LaunchSettings) -> Iterator[dg.AssetCheckResult]:
        namespace = launch.namespace(spec)
        with readable_failures():
            run = newest_run(tables, namespace)
            ledger = ledger_of(tables, namespace, str(run["run_id"]))
            results = [
                _every_group_has_an_outcome(int(run["n_groups"]), ledger),
                _boosters_match(tables, tables.location(namespace, BOOSTERS.name), ledger),
                _no_group_failed(ledger),
            ]
        yield from results

    return checks


def _plan_text(run: PlannedRun, spec: FleetSpec) -> str:
    cutoffs, tuning = run.cutoffs, spec.tuning
    text = f"plan: {run.plan.describe()}; as of {cutoffs.as_of}, tune from {cutoffs.tune_start}, report from {cutoffs.report_start}"
    if not run.plan.groups["reason"].eq(TOO_FEW_ROWS).any():
        return text
    return f"{text}; a group is trained from {tuning.fit_rows} fit and {tuning.tune_rows} tune rows (tuning.fit_rows, tuning.tune_rows)"


def _largest(run: PlannedRun) -> str:
    shown = run.plan.groups.head(10)[["group_id", "status", "reason", "n_rows", "n_fit", "n_tune", "n_report", "cost_seconds", "task"]]
    return str(shown.fillna("").to_string(index=False, float_format=lambda value: f"{value:.1f}"))


def _commit(tables: DeltaTables, locations: dict[str, str], run: PlannedRun, finished: FinishedRun, pinned: dict[str, object]) -> None:
    """Boosters first, then holdout, then the ledger that names them, then the run itself."""
    ledger = pa.Table.from_pandas(finished.ledger, schema=LEDGER.schema, preserve_index=False)
    runs = pa.Table.from_pylist([pinned], schema=RUNS.schema)
    written: dict[TableContract, list[WrittenFile | None]] = {
        BOOSTERS: [*finished.files.boosters],
        HOLDOUT: [*finished.files.holdout],
        LEDGER: [tables.write_file(ledger, LEDGER.schema, locations["ledger"])],
        RUNS: [tables.write_file(runs, RUNS.schema, locations["runs"])],
    }
    for contract, files in written.items():
        present = [file for file in files if file is not None]
        tables.commit(locations[contract.name], present, contract.schema, mode="append", app=(f"{run.run_id}/{contract.name}", 1))


def _every_group_has_an_outcome(n_groups: int, ledger: pd.DataFrame) -> dg.AssetCheckResult:
    n_doubled = int(ledger.duplicated(["grain", "group_id"]).sum())
    unknown = sorted(set(ledger["status"].fillna("null")) - set(get_args(Status)))
    return dg.AssetCheckResult(
        check_name="every_group_has_an_outcome",
        passed=len(ledger) == n_groups and n_doubled == 0 and not unknown,
        metadata={"groups": n_groups, "ledger_rows": len(ledger), "doubled": n_doubled, "unknown_status": ", ".join(unknown) or "none"},
    )


def _boosters_match(tables: DeltaTables, location: str, ledger: pd.DataFrame) -> dg.AssetCheckResult:
    wanted = set(ledger["booster_id"].dropna())
    run_id = str(ledger["run_id"].iloc[0]) if len(ledger) else ""
    stored = tables.read_arrow(location, where={"run_id": run_id}, columns=["booster_id"]).column(0).to_pylist() if tables.exists(location) else []
    absent = sorted(wanted - set(stored))
    damaged = []
    if wanted:
        sample = tables.read_arrow(location, where={"run_id": run_id}).slice(0, CHECKED_BOOSTERS)
        for row in sample.to_pylist():
            try:
                decode_booster(row, location)
            except PackError as error:
                damaged.append(str(error))
    return dg.AssetCheckResult(
        check_name="boosters_match_the_ledger",
        passed=not absent and not damaged,
        metadata={"boosters": len(wanted), "absent": str(absent[:10]), "damaged": str(damaged[:10])},
    )


def _no_group_failed(ledger: pd.DataFrame) -> dg.AssetCheckResult:
    failed = ledger[ledger["status"] == "failed"]
    shown = failed.head(20)[["group_id", "error_class", "error_message"]]
    return dg.AssetCheckResult(
        check_name="no_group_failed",
        passed=failed.empty,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"failed": len(failed), "examples": dg.MetadataValue.md(markdown_table(shown))},
    )
