"""One training run of a fleet: trained in waves, blended, accounted for, and resumable."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from pipeline.crash_points import crash_point
from pipeline.models.meta_model import GroupKey
from pipeline.runs.commits import Commits
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.ledger import CRASHED_ALONE, ledger_rows, trained_row, waves_of
from pipeline.runs.plan import TrainingPlan, of_grain
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.schedule import Schedule
from pipeline.runs.second_pass import plan_second_pass
from pipeline.runs.wave import TrainedFiles, Wave, train_overlapping
from pipeline.spark.evaluation import nearest_predictions
from pipeline.spark.execution import without_adaptive_execution
from pipeline.spark.judging import held_out_rows, judge_run
from pipeline.spark.progress import Progress
from pipeline.spark.training import TrainingContext, placed_rows, train_wave
from pipeline.spec import FleetSpec
from pipeline.storage import HeldLease
from pipeline.tables import LEDGER, records
from pipeline.training.outcome import WITH_BOOSTER

TrainedRows = dict[GroupKey, dict[str, Any]]


def train_run(
    context: TrainingContext,
    tables: FleetTables,
    run: PlannedRun,
    spec: FleetSpec,
    *,
    features_version: int,
    lease: HeldLease,
) -> pd.DataFrame:
    """Train every planned group, learn the blend, and commit one ledger row per group.

    Waves are committed as they end: boosters, then held-out predictions, then ledger rows. At the
    end one commit replaces the run's ledger rows by complete ones. A run that is killed at any
    moment is finished by the next one with the same request and data.

    Args:
        context: where it trains.
        tables: of the fleet.
        run: as planned.
        spec: the fleet.
        features_version: version of the feature table that was planned on.
        lease: the right to train the fleet. It is checked before each commit, and each commit
            carries its fence.

    Returns:
        The ledger.
    """
    started_at = pd.Timestamp.now(tz="UTC")
    commits = Commits(tables, run.run_id, lease)
    crash_point("run_planned")
    manifest = run.manifest(spec, started_at=started_at, features_version=features_version)
    commits.manifest(manifest)
    crash_point("manifest_committed")
    trained = _FleetTraining(context, tables, run, spec, commits).train()
    crash_point("waves_finished")
    rows = ledger_rows(run, spec, trained)
    ledger, unknown_groups = judge_run(context.spark, tables, run, spec, rows)
    crash_point("blend_learnt")
    commits.ledger(ledger)
    crash_point("ledger_committed")
    commits.manifest(
        manifest.finished(
            n_groups=len(ledger), waves=tuple(waves_of(rows)), unknown_groups=unknown_groups
        )
    )
    crash_point("run_committed")
    return ledger


@dataclass(frozen=True)
class _FleetTraining:
    """The waves of one run.

    Args:
        context: where it trains.
        tables: of the fleet.
        run: as planned.
        spec: the fleet.
        commits: keeps each wave.
    """

    context: TrainingContext
    tables: FleetTables
    run: PlannedRun
    spec: FleetSpec
    commits: Commits

    def train(self) -> TrainedRows:
        """Train the plan's waves, and commit each.

        Returns:
            The ledger row so far of every group that was trained.
        """
        spark, run = self.context.spark, self.run
        progress = Progress(spark, self.context.report, run.plan.slots)
        progress.expect(run.plan.to_train)
        trained: TrainedRows = {}
        with without_adaptive_execution(spark), progress.reported():
            for grain, plan in self._stages():
                bases = None
                if grain:
                    bases = self._parent_predictions(trained, grain)
                trained |= self._train_plan(plan, progress, bases)
            for plan in plan_second_pass(run, self.spec, trained):
                progress.expect(plan.to_train)
                again = self._train_plan(plan, progress)
                trained |= {key: row for key, row in again.items() if row["status"] == "trained"}
        return trained

    def _stages(self) -> Iterator[tuple[int, TrainingPlan]]:
        """The whole plan at once (as grain 0), or grain by grain where each corrects the last."""
        if not self.run.settings.model_spec.corrects:
            yield 0, self.run.plan
            return
        for grain in range(len(self.spec.grains)):
            plan = of_grain(self.run.plan, grain)
            if len(plan.groups):
                yield grain, plan

    def _parent_predictions(
        self, trained: Mapping[GroupKey, dict[str, Any]], grain: int
    ) -> DataFrame:
        """Each row's prediction by the finest model above the grain: row_key and `_base`.

        The model was fitted without the row.
        """
        rows = ledger_rows(self.run, self.spec, trained)
        coarser = [row for row in rows if row["status"] in WITH_BOOSTER and row["grain"] < grain]
        held_out = held_out_rows(self.context.spark, self.tables, coarser)
        if held_out is None:
            return self.run.rows.select(
                "row_key", sf.lit(self.run.constants.with_offset).alias("_base")
            )
        return nearest_predictions(held_out)

    def _train_plan(
        self, plan: TrainingPlan, progress: Progress, bases: DataFrame | None = None
    ) -> TrainedRows:
        """Train a plan's groups wave by wave, and commit each wave as it ends.

        Returns:
            The ledger row so far of every group that was trained.
        """
        spark, run = self.context.spark, self.run
        schedule = Schedule(
            plan.to_train,
            slots=plan.slots,
            checkpoint_seconds=self.spec.tuning.checkpoint_seconds,
            has_history=plan.learnt_from > 0,
        )
        trained_rows: TrainedRows = {}

        def train(wave: Wave) -> TrainedFiles | None:
            return self._train_wave(wave, progress, bases)

        waves = train_overlapping(schedule, run.run_id, train, spark.sparkContext.cancelAllJobs)
        # Closed at once where a commit fails, so that what is under way ends.
        with closing(waves):
            for wave, trained in waves:
                rows = self._rows_of(wave, trained)
                self.commits.wave(
                    wave,
                    trained,
                    pd.DataFrame(list(rows.values())).reindex(columns=LEDGER.schema.names),
                )
                trained_rows |= rows
                schedule.ended(wave.groups, trained.outcomes, trained.not_started)
                progress.pace = schedule.pace
        return trained_rows

    def _rows_of(self, wave: Wave, trained: TrainedFiles) -> TrainedRows:
        """The ledger rows of the groups that a wave started."""
        outcomes = trained.outcome_of
        not_started = set(trained.not_started)
        rows: TrainedRows = {}
        for planned in records(wave.groups):
            key = GroupKey.of(planned)
            if key not in not_started:
                rows[key] = trained_row(planned, outcomes.get(key), wave.name, self.run, self.spec)
        return rows

    def _train_wave(
        self, wave: Wave, progress: Progress, bases: DataFrame | None
    ) -> TrainedFiles | None:
        """Train a wave in one Spark job.

        Returns:
            None if the job died and the wave holds several groups; a group that was alone in its
            wave is `crashed`.
        """
        spark, run = self.context.spark, self.run
        placed = placed_rows(spark, run.rows, self.spec, wave.groups, bases)
        try:
            return train_wave(self.context, self.tables, placed, wave, run.settings, progress)
        except (PySparkException, Py4JError) as error:
            is_stopped = spark.sparkContext._jsc is None  # noqa: SLF001 - nothing public tells
            if is_stopped or not _died_of_training(placed, error):
                raise
        if len(wave.groups) > 1:
            return None
        (key,) = (GroupKey.of(row) for row in records(wave.groups))
        return TrainedFiles([{**key._asdict(), **CRASHED_ALONE}], [], [])


def _died_of_training(placed: DataFrame, error: Exception) -> bool:
    """Whether rows can be read and placed, so that it was training that ended the job."""
    if "cancelled" in str(error):
        return False
    try:
        placed.groupBy("task").count().collect()
    except (PySparkException, Py4JError):
        return False
    return True
