"""`<fleet>/predictions`: every row to score, answered by the champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pandas as pd

from assets.automation import follows_its_inputs
from assets.settings import asset_settings, check_specs, png, prefixed, readable_failures
from pipeline.errors import DataError
from pipeline.models.meta_model import FleetModel
from pipeline.reporting.plots import prediction_plot
from pipeline.reporting.summary import markdown_table, summarise
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spark.features import newest_known
from pipeline.spark.scoring import AnswerCounts, count_answers, rows_to_score, score_rows
from pipeline.spec import FleetSpec
from pipeline.tables import PREDICTIONS
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings, Scope
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version
from resources.spark_session import SparkSessionResource

CHECKS = {"every_row_is_answered": "As many finite answers as rows to score, each row once."}


def predictions_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The scored table of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "predictions",
            description="One answer per row to score, with its interval and who answered; the rows "
            "of one as-of are replaced as a whole.",
            kinds={"spark", "deltalake"},
            deps=["features", "champion"],
        ),
        automation_condition=follows_its_inputs(spec),
        check_specs=check_specs(spec, "predictions", CHECKS, blocking=list(CHECKS)),
    )
    def predictions(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        with readable_failures():
            scope = launch.scope(spec, tables, registry)
            champion = registry.get(scope.namespace, CHAMPION)
            model = registry.open_pack(champion, tables.storage_options)
            scored = _score(context.log, spec, scope.tables, spark, launch, champion, model)
            challenger = registry.find(scope.namespace, CHALLENGER)
            report = _report(spec, scope, launch, champion, challenger, scored)
        context.log.info("\n" + report)
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(PREDICTIONS, scope.tables.location(PREDICTIONS)),
                **_metadata(scored, champion, spec),
            },
            check_results=[_every_row_is_answered(scored)],
        )

    return predictions


@dataclass(frozen=True)
class _Scored:
    """The rows that were answered.

    Args:
        as_of: what the launch pretends.
        n_rows: rows to score.
        written: what the table has of them.
        delta_version: of the table.
    """

    as_of: pd.Timestamp
    n_rows: int
    written: AnswerCounts
    delta_version: int


def _score(
    log: dg.DagsterLogManager,
    spec: FleetSpec,
    tables: FleetTables,
    spark: SparkSessionResource,
    launch: LaunchSettings,
    champion: Version,
    model: FleetModel,
) -> _Scored:
    """Answer the rows to score, and replace those of the same as-of.

    Raises:
        DataError: if the champion saw later rows.
    """
    features = tables.features(spark.session)
    as_of = launch.moment(spec) or newest_known(features, spec.target.column)
    answering_runs = [generation.fleet_version for generation in model.generations]
    _refuse_hindsight(champion, tables.newest_as_of(answering_runs), as_of)
    which = f"the rows to score (score: {spec.scoring.score})"
    log.info(f"answering {which} with version {champion.number}, as of {as_of}")
    rows = rows_to_score(features, spec, as_of)
    store, location = tables.tables, tables.location(PREDICTIONS)
    answers = score_rows(spark.session, rows, spec, model, as_of, store.storage_options)
    version = store.write_spark(answers, location, partition={"as_of": as_of.isoformat()})
    written = count_answers(store.read_spark(spark.session, location), as_of)
    n_rows = rows.count()
    if n_rows == 0:
        log.warning(
            f"no row to score after {as_of} (score: {spec.scoring.score}); launch with an earlier "
            "as_of, or bring newer rows"
        )
    return _Scored(as_of, n_rows, written, version)


def _report(
    spec: FleetSpec,
    scope: Scope,
    launch: LaunchSettings,
    champion: Version,
    challenger: Version | None,
    scored: _Scored,
) -> str:
    """What a launch ends with, for people.

    It is about the run that was just paid for; where another serves, its errors on the report rows
    of its own run stand beside.
    """
    tables = scope.tables
    answered = f"{scored.written.n_rows:,} of {scored.n_rows:,} rows answered"
    serving = f"{scope.namespace} version {champion.number} (champion)"
    facts = {
        **({"backtest": scope.note.removeprefix("backtest ")} if scope.note else {}),
        "model": f"{serving}, run {champion.fleet_version}",
        **_waiting(challenger, champion, launch, spec),
        "predictions": f"{answered}, as of {scored.as_of}",
        "tables": tables.tables.location(scope.namespace),
        "look next": f"make ui, then Assets > {spec.name} > models: "
        "every group's state, worst groups, plots",
    }
    beside = {}
    if challenger is not None and challenger.fleet_version != champion.fleet_version:
        beside[f"version {champion.number}, which serves"] = tables.ledger(champion.fleet_version)
    return summarise(tables.ledger(tables.newest_run().run_id), spec, facts, beside)


def _metadata(scored: _Scored, champion: Version, spec: FleetSpec) -> dict[str, Any]:
    """What the Dagster UI shows of the answers."""
    written = scored.written
    by_grain = pd.DataFrame(list(written.answered_by.items()), columns=["answered by", "rows"])
    facts = {
        "as_of": scored.as_of.isoformat(),
        "version": champion.number,
        "fleet_version": champion.fleet_version,
        "delta_version": scored.delta_version,
    }
    return {
        "dagster/row_count": written.n_rows,
        **prefixed(facts),
        "fleet/answered_by": dg.MetadataValue.md(markdown_table(by_grain)),
        "fleet/plot": png(prediction_plot(written.sample, written.answered_by, spec)),
    }


def _waiting(
    challenger: Version | None, champion: Version, launch: LaunchSettings, spec: FleetSpec
) -> Mapping[str, str]:
    """The line about a newer version that does not serve, if there is one."""
    if challenger is None or challenger.fleet_version == champion.fleet_version:
        return {}
    command = launch.command(spec, decision="promote", why="...")
    version = f"version {challenger.number}, run {challenger.fleet_version}"
    return {"challenger": f"{version}, does not serve; to serve it: {command}"}


def _refuse_hindsight(version: Version, seen: pd.Timestamp | None, as_of: pd.Timestamp) -> None:
    """No row is answered by a version that saw rows known later than the launch's as-of.

    Raises:
        DataError: if the version did.
    """
    if seen is not None and seen > as_of:
        raise DataError(
            f"version {version.number} of {version.name!r} saw rows known until {seen}, and this "
            f"launch is as of {as_of}: "
            f"its answers would know the future; launch with as_of {seen} or later, "
            f"or train as of {as_of} and serve that version (decision: promote)"
        )


def _every_row_is_answered(scored: _Scored) -> dg.AssetCheckResult:
    written = scored.written
    is_whole = written.n_rows == scored.n_rows
    return dg.AssetCheckResult(
        check_name="every_row_is_answered",
        passed=is_whole and written.n_missing == 0 and written.n_doubled == 0,
        metadata={
            "rows_to_score": scored.n_rows,
            "answers": written.n_rows,
            "without_prediction": written.n_missing,
            "doubled": written.n_doubled,
        },
    )
