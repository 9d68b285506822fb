"""`<fleet>/predictions`: every row to score, answered by the champion."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

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
            features = scope.tables.features(spark.session)
            as_of = launch.moment(spec) or newest_known(features, spec.target.column)
            _refuse_hindsight(champion, model, scope.tables, as_of)
            context.log.info(
                f"answering the rows to score (score: {spec.scoring.score}) with version "
                f"{champion.number}, as of {as_of}"
            )
            scored = _score(spec, scope.tables, features, model, as_of)
            if scored.n_rows == 0:
                context.log.warning(_no_rows_to_score(spec, as_of))
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
        as_of: the time that the launch pretends it is.
        n_rows: rows to score.
        written: what the table holds for that as-of.
        delta_version: of the table.
    """

    as_of: pd.Timestamp
    n_rows: int
    written: AnswerCounts
    delta_version: int


def _score(
    spec: FleetSpec,
    tables: FleetTables,
    features: "DataFrame",
    model: FleetModel,
    as_of: pd.Timestamp,
) -> _Scored:
    """Answer the rows to score, and replace those of the same as-of."""
    session = features.sparkSession
    store = tables.tables
    location = tables.location(PREDICTIONS)
    rows = rows_to_score(features, spec, as_of)
    answers = score_rows(session, rows, spec, model, as_of, store.storage_options)
    version = store.write_spark(answers, location, partition={"as_of": as_of.isoformat()})
    written = count_answers(store.read_spark(session, location), as_of)
    return _Scored(as_of, rows.count(), written, version)


def _no_rows_to_score(spec: FleetSpec, as_of: pd.Timestamp) -> str:
    return (
        f"no row to score after {as_of} (score: {spec.scoring.score}); launch with an earlier "
        "as_of, or bring newer rows"
    )


def _report(
    spec: FleetSpec,
    scope: Scope,
    launch: LaunchSettings,
    champion: Version,
    challenger: Version | None,
    scored: _Scored,
) -> str:
    """What a launch ends with, for people.

    It is about the newest training run; if another run's version serves, that run's errors, on its
    own report rows, stand beside.
    """
    tables = scope.tables
    facts = {}
    beside = {}
    if scope.note:
        facts["backtest"] = scope.note.removeprefix("backtest ")
    serving = f"{scope.namespace} version {champion.number} (champion)"
    facts["model"] = f"{serving}, run {champion.fleet_version}"
    if challenger is not None and challenger.fleet_version != champion.fleet_version:
        waiting = f"version {challenger.number}, run {challenger.fleet_version}"
        command = launch.command(spec, decision="promote", why="...")
        facts["challenger"] = f"{waiting}, does not serve; to serve it: {command}"
        beside[f"version {champion.number}, which serves"] = tables.ledger(champion.fleet_version)
    answered = f"{scored.written.n_rows:,} of {scored.n_rows:,} rows answered"
    facts["predictions"] = f"{answered}, as of {scored.as_of}"
    facts["tables"] = tables.tables.location(scope.namespace)
    facts["look next"] = (
        f"make ui, then Assets > {spec.name} > models: every group's state, worst groups, plots"
    )
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


def _refuse_hindsight(
    version: Version, model: FleetModel, tables: FleetTables, as_of: pd.Timestamp
) -> None:
    """Refuse a version that saw rows known later than the launch's as-of.

    Raises:
        DataError: if the version did.
    """
    answering_runs = [generation.fleet_version for generation in model.generations]
    seen = tables.newest_as_of(answering_runs)
    if seen is not None and seen > as_of:
        raise DataError(
            f"version {version.number} of {version.name!r} saw rows known until {seen}, and this "
            f"launch is as of {as_of}: its answers would know the future; launch with as_of {seen} "
            f"or later, or train as of {as_of} and serve that version (decision: promote)"
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
