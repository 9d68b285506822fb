"""Schedules and sensors of a fleet, as its `automation` says.

All of them are off until somebody switches them on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from assets.settings import FleetFiles, asset_key
from pipeline.errors import DataError, FleetError, SpecError
from pipeline.reading.sources import source_state
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spec import FleetSpec, SourceSpec
from pipeline.spec_mistakes import Mistake
from pipeline.tables import records
from resources.delta_tables import DeltaTables

# Runs of one fleet wait for each other: see dagster.local.yaml.
FLEET_TAG = "many_models/fleet"
# A run whose process is gone is launched once more. One that failed by itself is not: it would fail
# again.
RESUMED: Mapping[str, str] = {
    "dagster/max_retries": "1",
    "dagster/retry_on_asset_or_op_failure": "false",
}
LOOK_SECONDS = 30


def automation(spec: FleetSpec, files: FleetFiles) -> dg.Definitions:
    """The jobs, schedules and sensors of a fleet."""
    settings = spec.automation
    zone = settings.timezone or spec.timezone or "UTC"
    score = _score_job(spec)
    retrain = _retrain_job(spec)
    schedules = []
    for job, cron in ((score, settings.score), (retrain, settings.retrain)):
        if cron is None:
            continue
        schedule = dg.ScheduleDefinition(
            name=f"{job.name}_schedule",
            job=job,
            cron_schedule=cron,
            execution_timezone=zone,
            description=job.description,
        )
        schedules.append(schedule)
    sensors: list[dg.SensorDefinition] = []
    if settings.on_new_files:
        sensors = [_new_files_sensor(spec, files), _follow_sensor(spec)]
    return dg.Definitions(jobs=[score, retrain], schedules=schedules, sensors=sensors)


def check_automation(spec: FleetSpec) -> Iterator[Mistake]:
    """The cron texts that Dagster refuses."""
    for field in ("score", "retrain"):
        cron = getattr(spec.automation, field)
        if cron is None:
            continue
        try:
            dg.ScheduleDefinition(name="checked", job_name="checked", cron_schedule=cron)
        except dg.DagsterInvalidDefinitionError:
            expected = (
                "expected minute, hour, day, month and day of week, "
                "e.g. '0 6 * * *' for 6:00 each day"
            )
            yield Mistake(
                ("automation", field),
                f"automation.{field}: {cron!r} is not a cron text; {expected}",
            )


def follows_its_inputs(spec: FleetSpec) -> dg.AutomationCondition[Any] | None:
    """The condition that rebuilds the feature table and predictions when their inputs change.

    None where a fleet does not look for new files.
    """
    if not spec.automation.on_new_files:
        return None
    return dg.AutomationCondition.eager()


def _tags(spec: FleetSpec) -> dict[str, str]:
    tags = {FLEET_TAG: spec.name}
    if spec.automation.resume:
        tags |= RESUMED
    return tags


def _source_keys(spec: FleetSpec) -> list[dg.AssetKey]:
    return [asset_key(spec, source.name) for source in spec.sources]


def _score_job(spec: FleetSpec) -> Any:
    keys = [*_source_keys(spec), asset_key(spec, "features"), asset_key(spec, "predictions")]
    return dg.define_asset_job(
        f"{spec.name}_score",
        selection=dg.AssetSelection.assets(*keys),
        description="Raw tables, features and predictions, answered by the champion that serves; "
        "nothing is trained.",
        tags=_tags(spec),
    )


def _retrain_job(spec: FleetSpec) -> Any:
    return dg.define_asset_job(
        f"{spec.name}_retrain",
        selection=dg.AssetSelection.groups(spec.name),
        description="The whole chain, raw tables to predictions; only groups that changed are "
        "trained.",
        tags=_tags(spec),
    )


def _new_files_sensor(spec: FleetSpec, files: FleetFiles) -> dg.SensorDefinition:
    """Looks at the files of the sources."""

    @dg.sensor(
        name=f"{spec.name}_new_files",
        target=_source_keys(spec),
        minimum_interval_seconds=LOOK_SECONDS,
        description="New or changed files of a source: its raw table is read again. "
        f"{spec.name}_follow then makes features and predictions.",
    )
    def new_files(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        seen = {source.name: _state(source, files, context.log) for source in spec.sources}
        requests, cursor = changes(spec, seen, context.cursor)
        return dg.SensorResult(run_requests=requests, cursor=cursor)

    return new_files


def changes(
    spec: FleetSpec, seen: Mapping[str, str | None], cursor: str | None
) -> tuple[list[dg.RunRequest], str]:
    """Which sources to read again after a look at their files.

    A source is read when two looks in a row find the same files, and these are not the ones that
    were last read: files that are still being written are left for the next look.

    Args:
        spec: the fleet.
        seen: digest of each source's files; None where they cannot be told yet.
        cursor: from the look before; None for the first.

    Returns:
        One request for all raw tables that are to be read, or none; and the new cursor, a JSON
        object of each source's digest as it was `seen` last, and as it was when it was last `read`.
    """
    before: dict[str, dict[str, str]] = json.loads(cursor or "{}")
    after: dict[str, dict[str, str]] = {}
    changed: dict[str, str] = {}
    for name, state in seen.items():
        earlier = before.get(name, {})
        if state is None:
            after[name] = earlier
            continue
        after[name] = {**earlier, "seen": state}
        is_steady = earlier.get("seen") == state
        if is_steady and earlier.get("read") != state:
            changed[name] = state
            after[name]["read"] = state
    new_cursor = json.dumps(after, sort_keys=True)
    if not changed:
        return [], new_cursor
    request = dg.RunRequest(
        run_key=_digest(json.dumps(changed, sort_keys=True)),
        asset_selection=[asset_key(spec, name) for name in changed],
        tags=_tags(spec),
    )
    return [request], new_cursor


def _state(source: SourceSpec, files: FleetFiles, log: Any) -> str | None:
    """Digest of a source's files; None where there are none yet, or they are being written."""
    try:
        state = source_state(source, files.folder)
    except (SpecError, DataError) as error:
        log.info(f"source {source.name!r} cannot be looked at: {error}")
        return None
    if state is None:
        return None
    return _digest(state)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _follow_sensor(spec: FleetSpec) -> dg.AutomationConditionSensorDefinition:
    return dg.AutomationConditionSensorDefinition(
        f"{spec.name}_follow",
        target=dg.AssetSelection.assets(
            asset_key(spec, "features"), asset_key(spec, "predictions")
        ),
        run_tags=_tags(spec),
        description="Features and predictions are made again when what they are made of was.",
    )


@dg.run_failure_sensor(
    name="what_dead_runs_kept",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=LOOK_SECONDS,
    description="A run whose process is gone cannot say what of its training is kept: this does, "
    "in the run's log.",
)
def what_dead_runs_kept(
    context: dg.RunFailureSensorContext, tables: dg.ResourceParam[DeltaTables]
) -> None:
    """Say in the log of a run that died what of its training is kept, and how to go on."""
    run = context.dagster_run
    record = context.instance.get_run_record_by_id(run.run_id)
    if context.get_step_failure_events() or record is None or record.start_time is None:
        return
    for text in kept_since(tables, datetime.fromtimestamp(record.start_time, UTC)):
        context.instance.report_engine_event(text, run)


def kept_since(tables: DeltaTables, moment: datetime) -> Iterator[str]:
    """What is kept of each unfinished training that was begun, or resumed, since a moment.

    The moment has a zone; the tables are those of all fleets.
    """
    for namespace in tables.namespaces():
        own = FleetTables(tables, namespace, namespace)
        try:
            runs = own.runs()
            is_open = runs["finished_at"].isna() & (runs["started_at"] >= moment)
            for run in records(runs[is_open]):
                n_kept = len(own.ledger(str(run["run_id"])))
                kept = f"{n_kept:,} of {run['n_groups']:,} groups of {namespace} are kept"
                yield (
                    f"the run's process is gone: {kept}; the next launch with the same settings "
                    f"resumes training run {run['run_id']}"
                )
        except FleetError:  # another fleet's tables may be of another release
            continue
