"""`<fleet>/predictions`: every row to score, answered by the champion."""

from collections.abc import Mapping

import dagster as dg
import pandas as pd

from assets.automation import follows_its_inputs
from assets.link import link_key, link_settings, png, prefixed, readable_failures
from assets.newest_run import ledger_of, newest_run
from pipeline.errors import DataError
from pipeline.reporting.plots import prediction_plot
from pipeline.reporting.summary import markdown_table, summarise
from pipeline.spark.features import newest_known
from pipeline.spark.fleet_training import newest_as_of
from pipeline.spark.scoring import AnswerCounts, count_answers, rows_to_score, score_rows
from pipeline.spec import FleetSpec
from pipeline.tables import PREDICTIONS
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version
from resources.spark_session import SparkSessionResource


def predictions_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The scored table of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "predictions",
            description="One answer per row to score, with its interval and who answered; the rows of one as-of are replaced as a whole.",
            kinds={"spark", "deltalake"},
            deps=["features", "champion"],
        ),
        automation_condition=follows_its_inputs(spec),
        check_specs=[
            dg.AssetCheckSpec(
                "every_row_is_answered",
                asset=link_key(spec, "predictions"),
                blocking=True,
                description="As many finite answers as rows to score, each row once.",
            )
        ],
    )
    def predictions(
        context: dg.AssetExecutionContext, tables: DeltaTables, registry: MlflowRegistry, spark: SparkSessionResource, launch: LaunchSettings
    ) -> dg.MaterializeResult:
        with readable_failures():
            scope = launch.scope(spec, tables, registry)
            namespace = scope.namespace
            location = tables.location(namespace, PREDICTIONS.name)
            version = registry.get(namespace, CHAMPION)
            features = tables.read_spark(spark.session, tables.location(spec.name, "features"))
            as_of = launch.moment(spec) or newest_known(features, spec.target.column)
            rows = rows_to_score(features, spec, as_of)
            model = registry.open_pack(version, tables.storage_options)
            answering_runs = [generation.fleet_version for generation in model.generations]
            _refuse_hindsight(version, newest_as_of(tables, namespace, answering_runs), as_of)
            context.log.info(f"answering the rows to score (score: {spec.scoring.score}) with version {version.number}, as of {as_of}")
            answers = score_rows(spark.session, rows, spec, model, as_of, tables.storage_options)
            partition = {"as_of": as_of.isoformat()}
            delta_version = tables.write_spark(answers, location, partition=partition)
            written = count_answers(tables.read_spark(spark.session, location), as_of)
            n_rows = rows.count()
            served = ledger_of(tables, namespace, version.fleet_version)
            trained = ledger_of(tables, namespace, str(newest_run(tables, namespace)["run_id"]))
            challenger = registry.find(namespace, CHALLENGER)
        if n_rows == 0:
            context.log.warning(
                f"there is no row to score after {as_of} (score: {spec.scoring.score}); launch with an earlier as_of, or bring newer rows"
            )
        facts = {
            **({"backtest": scope.note.removeprefix("backtest ")} if scope.note else {}),
            "model": f"{namespace} version {version.number} (champion), run {version.fleet_version}",
            **_waiting(challenger, version, launch, spec),
            "predictions": f"{written.n_rows:,} of {n_rows:,} rows answered, as of {as_of}",
            "tables": tables.location(namespace),
            "look next": f"make ui, then Assets > {spec.name} > models: every group's state, worst groups, plots",
        }
        # The report is of the run that was just paid for; where another serves, its errors on the rows of its own report stand beside.
        is_served = challenger is None or challenger.fleet_version == version.fleet_version
        beside = {} if is_served else {f"version {version.number}, which serves": served}
        context.log.info("\n" + summarise(trained, spec, facts, beside))
        by_grain = pd.DataFrame(list(written.answered_by.items()), columns=["answered by", "rows"])
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(PREDICTIONS, location),
                "dagster/row_count": written.n_rows,
                **prefixed(
                    {"as_of": as_of.isoformat(), "version": version.number, "fleet_version": version.fleet_version, "delta_version": delta_version}
                ),
                "fleet/answered_by": dg.MetadataValue.md(markdown_table(by_grain)),
                "fleet/plot": png(prediction_plot(written.sample, written.answered_by, spec)),
            },
            check_results=[_every_row_is_answered(n_rows, written)],
        )

    return predictions


def _waiting(challenger: Version | None, champion: Version, launch: LaunchSettings, spec: FleetSpec) -> Mapping[str, str]:
    """The line about a newer version that does not serve, if there is one."""
    if challenger is None or challenger.fleet_version == champion.fleet_version:
        return {}
    command = launch.command(spec, decision="promote", why="...")
    return {"challenger": f"version {challenger.number}, run {challenger.fleet_version}, does not serve; to serve it: {command}"}


def _refuse_hindsight(version: Version, seen: pd.Timestamp | None, as_of: pd.Timestamp) -> None:
    """No row is answered by a version that saw rows known later than the launch's as-of.

    Raises:
        DataError: if the version did.
    """
    if seen is not None and seen > as_of:
        raise DataError(
            f"version {version.number} of {version.name!r} saw rows known until {seen}, and this launch is as of {as_of}: "
            f"its answers would know the future; launch with as_of {seen} or later, "
            f"or train as of {as_of} and serve that version (decision: promote)"
        )


def _every_row_is_answered(n_rows: int, written: AnswerCounts) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="every_row_is_answered",
        passed=written.n_rows == n_rows and written.n_missing == 0 and written.n_doubled == 0,
        metadata={"rows_to_score": n_rows, "answers": written.n_rows, "without_prediction": written.n_missing, "doubled": written.n_doubled},
    )
