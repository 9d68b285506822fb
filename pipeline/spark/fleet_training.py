"""One training run of a fleet: plan it, train it in waves, blend it, account for every group, and finish what was interrupted."""

import hashlib
import itertools
import json
import platform
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.crash_points import crash_point
from pipeline.errors import DataError
from pipeline.features.encoding import choose_categories
from pipeline.models.meta_model import CORRECTION, INDEPENDENT, GroupKey, ModelSpec, grain_name
from pipeline.models.pack import build_model_spec
from pipeline.models.start import Start
from pipeline.periods import Period
from pipeline.runs.fingerprints import fingerprint, shared_digest
from pipeline.runs.plan import (
    INHERIT,
    KEEP,
    REFRESH,
    REUSE,
    TRAIN,
    CostModel,
    Memory,
    Policy,
    Retrain,
    TrainingPlan,
    build_plan,
    of_grain,
    pack_tasks,
    refuse_unknown,
)
from pipeline.runs.sampling import sampling_exponents
from pipeline.runs.schedule import Schedule
from pipeline.spark.evaluation import judged_rows, measure_groups, nearest_predictions, sum_moments
from pipeline.spark.features import newest_known, newest_time
from pipeline.spark.files import read_files
from pipeline.spark.keys import link_column, moment_column
from pipeline.spark.losses import answer_losers_otherwise
from pipeline.spark.training import (
    Progress,
    Report,
    TrainedFiles,
    Wave,
    count_categories,
    count_classes,
    count_groups,
    limited_rows,
    placed_rows,
    train_wave,
    visible_rows,
    without_adaptive_execution,
)
from pipeline.spec import FleetSpec
from pipeline.storage import COMMITS_PER_LEASE, TRAINING, HeldLease, Tables
from pipeline.tables import BOOSTERS, HOLDOUT, LEDGER, RECIPES, RUNS, TableContract, fleet_runs, in_format, records
from pipeline.training.blend import STANDARD_ERRORS, Constants, GroupSkill, learn_blend
from pipeline.training.objective import learning_goal
from pipeline.training.outcome import ERROR, NATIVE_CRASH, WITH_BOOSTER
from pipeline.training.splits import TUNE, Cutoffs, resolve_cutoffs
from pipeline.training.trainer import TrainingSettings
from pipeline.training.worker import TrainGroup

# Trials per group of the first pass, where the fleet has a budget of seconds.
FIRST_PASS_TRIALS = 1
# Groups that `own: auto` tries both forms on.
PILOT_GROUPS = 30
# Group ids that a run's row names where held-out rows belong to groups that the ledger does not know.
MAX_UNKNOWN_GROUPS = 20
# What a row of an earlier run's ledger gives to a group that is reused.
_TAKEN_OVER = (
    "booster_id",
    "n_fit",
    "n_tune",
    "n_report",
    "n_invalid",
    "n_trials",
    "n_pruned",
    "n_rounds",
    "parameters",
    "cross_selection",
    "stopped_by",
    "tune_loss",
    "source_run_id",
    "wave",
    "tuned_as_of",
    "error_class",
    "error_message",
    "weight",
)


@dataclass(frozen=True)
class Request:
    """What a launch asks for.

    Args:
        run_id: of the run, unless it resumes another.
        as_of: what the run pretends; None is the newest row that has a target.
        limit_groups: only so many finest groups; None is all.
        retrain: which groups are trained again, see `Policy`.
        listed: group ids, for `retrain: listed`.
        recipes: earlier recipes by group; where there are any, they are refitted and nothing else is trained.
    """

    run_id: str
    as_of: pd.Timestamp | None = None
    limit_groups: int | None = None
    retrain: Retrain = "changed"
    listed: Collection[str] = ()
    recipes: Mapping[GroupKey, Start] = field(default_factory=dict)

    @classmethod
    def of_refit(cls, run_id: str, challenger: "pd.Series[Any]", recipes: Mapping[GroupKey, Start]) -> "Request":
        """For a run that fits earlier recipes on the rows of another run.

        Args:
            run_id: of the run, unless it resumes another.
            challenger: the other's row of `tables.RUNS`.
            recipes: how each group starts.
        """
        as_of = pd.Timestamp(challenger["as_of"]).tz_convert(None)
        return cls(run_id, as_of, json.loads(challenger["request"])["limit_groups"], recipes=recipes)

    @property
    def text(self) -> str:
        """What must be equal for a run to be resumed, as JSON; the as-of is pinned by itself."""
        parts: dict[str, Any] = {"limit_groups": self.limit_groups, "listed": sorted(self.listed), "retrain": self.retrain}
        if self.recipes:
            starts = [[*key, start.to_json()] for key, start in sorted(self.recipes.items())]
            parts[RECIPES] = hashlib.sha256(json.dumps(starts).encode()).hexdigest()
        return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class PlannedRun:
    """All that a run pins before it trains.

    Args:
        run_id: of the run; that of the interrupted run where one is resumed.
        rows: the visible rows.
        cutoffs: its dates.
        plan: which group trains where.
        settings: what every group shares.
        constants: what answers without a model.
        request: what was asked for.
        memory: what earlier runs left.
        previous_run_id: the newest run finished before it.
        data_digest: hash of the rows.
        is_resumed: whether an interrupted run is taken up again.
        must_choose: whether `own` is auto and nobody has chosen yet: the plan is that of independent models.
    """

    run_id: str
    rows: DataFrame
    cutoffs: Cutoffs
    plan: TrainingPlan
    settings: TrainingSettings
    constants: Constants
    request: Request
    memory: Memory = field(default_factory=Memory)
    previous_run_id: str | None = None
    data_digest: str = ""
    is_resumed: bool = False
    must_choose: bool = False


def _no_rows(contract: TableContract) -> pd.DataFrame:
    rows: pd.DataFrame = contract.schema.empty_table().to_pandas()
    return rows


def read_runs(tables: Tables, namespace: str) -> pd.DataFrame:
    """The rows of `tables.RUNS`, finished or not; none where there is no table yet.

    Raises:
        StoreError: if the table is of another format.
    """
    location = tables.location(namespace, RUNS.name)
    if not tables.exists(location):
        return _no_rows(RUNS)
    return in_format(tables.read_pandas(location), RUNS, location)


def newest_as_of(tables: Tables, namespace: str, run_ids: Collection[str]) -> pd.Timestamp | None:
    """The latest as-of of some runs, UTC without a zone; None where the tables know none of them.

    Args:
        tables: where the runs are kept.
        namespace: of the tables.
        run_ids: the training runs, e.g. those whose chains a version answers from.
    """
    runs = read_runs(tables, namespace)
    as_of = runs.loc[runs["run_id"].isin(list(run_ids)), "as_of"].max()
    return None if pd.isna(as_of) else pd.Timestamp(as_of).tz_convert(None)


@dataclass(frozen=True)
class History:
    """The runs before this one, from the fleet's tables.

    Args:
        runs: rows of `tables.RUNS`, oldest first.
        ledger: gives a run's ledger rows.
    """

    runs: pd.DataFrame
    ledger: Callable[[str], pd.DataFrame]

    @classmethod
    def read(cls, tables: Tables, namespace: str) -> "History":
        """From the tables of a fleet; empty where there are none yet.

        Raises:
            StoreError: if they are of another format.
        """
        ledger = tables.location(namespace, LEDGER.name)

        def rows_of(run_id: str) -> pd.DataFrame:
            if not tables.exists(ledger):
                return _no_rows(LEDGER)
            return in_format(tables.read_pandas(ledger, where={"run_id": run_id}), LEDGER, ledger)

        # A table of another format is not added to, even where no run asks for its rows.
        rows_of("")
        return cls(read_runs(tables, namespace).sort_values("started_at", ignore_index=True), rows_of)

    def finished(self, as_of: pd.Timestamp) -> "pd.Series[Any] | None":
        """The newest finished run that saw nothing that a run of this as-of must not see."""
        runs = fleet_runs(self.runs)
        known = runs[runs["finished_at"].notna() & (runs["as_of"].dt.tz_convert(None) <= as_of)]
        return known.iloc[-1] if len(known) else None

    def unfinished(self, since: "pd.Series[Any] | None") -> pd.DataFrame:
        """Runs that did not come to their end, newest last, started after a given one."""
        open_runs = self.runs[self.runs["finished_at"].isna()]
        return open_runs if since is None else open_runs[open_runs["started_at"] > since["started_at"]]


def _by_group(ledger: pd.DataFrame) -> dict[GroupKey, Mapping[str, Any]]:
    return {GroupKey.of(row): row for row in records(ledger)}


def plan_run(
    features: DataFrame, spec: FleetSpec, request: Request, history: History, *, slots: int, threads: int, own: str | None = None
) -> PlannedRun:
    """Count the groups, fix the dates, find what earlier runs left, and lay out the work; nothing is trained.

    Args:
        features: the feature table.
        spec: the fleet.
        request: what the launch asks for.
        history: earlier runs.
        slots: tasks that run at once.
        threads: LightGBM's, per task.
        own: `independent` or `correction`, where the spec leaves it open (see `choose_own`); by default that of the run before.

    Raises:
        DataError: if no row is visible at the as-of, or a listed group does not exist, or the classes are not what the task needs.
    """
    moment = request.as_of if request.as_of is not None else newest_known(features, spec.target.column)
    rows = limited_rows(visible_rows(features, moment), spec, request.limit_groups)
    newest = newest_time(rows, spec.target.column)
    if newest is None:
        earliest, latest = features.where("NOT is_future").selectExpr("string(min(known_at))", "string(max(known_at))").collect()[0]
        raise DataError(f"as of {moment} no row is known yet; known_at runs from {earliest} to {latest}: choose an as-of within or after it")
    cutoffs = resolve_cutoffs(spec.splits, moment, newest, spec.timezone)
    before = history.finished(moment)
    same_spec = before is not None and before["spec_digest"] == spec.training_digest
    known = ModelSpec.from_json(before["model_spec"]).categories if before is not None and same_spec else {}
    categories = choose_categories(count_categories(rows, spec, cutoffs), spec.features.max_categories, known)
    classes = count_classes(rows, spec, cutoffs)
    data = count_groups(rows, spec, cutoffs, categories, classes)
    refuse_unknown(request.listed, data.counts["group_id"].tolist())
    tuning = spec.tuning
    open_runs = history.unfinished(before)
    chosen = spec.own if spec.own != "auto" else own or _own_of(spec, before, open_runs)
    settings = TrainingSettings(
        run_id=request.run_id,
        model_spec=build_model_spec(spec, categories, list(classes), data.constants.prior, chosen or INDEPENDENT, data.nullable),
        goal=learning_goal(spec, len(classes)),
        target=spec.target.column,
        weight=spec.target.weight,
        tuning=tuning,
        cutoffs=cutoffs,
        threads=threads,
    )
    previous_run_id = None if before is None else str(before["run_id"])
    pooled_hash = str(data.counts.loc[data.counts["grain"] == 0, "rows_hash"].iloc[0])
    shared = shared_digest(settings.model_spec, settings.goal, tuning, cutoffs, spec.target.weight)
    digest = hashlib.sha256(f"{pooled_hash}\n{shared}\n{moment}".encode()).hexdigest()
    resumed = next((run for run in reversed(records(open_runs)) if _is_same(run, request, spec, digest, previous_run_id)), None)
    ledger_before = _no_rows(LEDGER) if before is None else history.ledger(str(before["run_id"]))
    others = [history.ledger(str(run["run_id"])) for run in records(open_runs) if resumed is None or run["run_id"] != resumed["run_id"]]
    memory = Memory(
        kept={} if resumed is None else _by_group(history.ledger(str(resumed["run_id"]))),
        before=_by_group(ledger_before),
        unfinished={key: row for ledger in others for key, row in _by_group(ledger).items()},
        same_spec=same_spec,
    )
    counts = data.counts
    counts["exponent"] = sampling_exponents(
        counts["n_target"].to_numpy(), is_coarse=(counts["grain"] < len(spec.grains) - 1).to_numpy(), max_rows=tuning.max_rows
    )
    sampled = counts["exponent"] > 0
    counts.loc[sampled, "rows_hash"] += "/" + counts.loc[sampled, "exponent"].astype(str)
    n_fits = FIRST_PASS_TRIALS if tuning.budget_seconds else min(tuning.max_trials, tuning.patience + 1)
    n_features = len(spec.feature_columns)
    plan = build_plan(
        counts,
        Policy(
            retrain=request.retrain,
            listed=frozenset(request.listed),
            retune_after=Period.parse(tuning.retune_after),
            as_of=moment,
            fit_rows=tuning.fit_rows,
            tune_rows=tuning.tune_rows,
            finest_only=spec.pooling == "none",
            corrects=chosen == CORRECTION,
            max_trials=FIRST_PASS_TRIALS if tuning.budget_seconds else None,
            recipes=request.recipes,
        ),
        memory,
        shared=shared,
        n_features=n_features,
        n_fits=n_fits,
        slots=slots,
        checkpoint_seconds=tuning.checkpoint_seconds,
        cost_model=CostModel.learnt(_seen(ledger_before, memory.kept), n_features, n_fits),
    )
    run_id = request.run_id if resumed is None else str(resumed["run_id"])
    return PlannedRun(
        run_id,
        rows,
        cutoffs,
        plan,
        replace(settings, run_id=run_id),
        data.constants,
        request,
        memory,
        previous_run_id,
        digest,
        resumed is not None,
        chosen is None,
    )


def _seen(before: pd.DataFrame, kept: Mapping[GroupKey, Mapping[str, Any]]) -> pd.DataFrame:
    """The groups whose seconds tell of this run's: those of the run before, and those that this one trained before it was interrupted."""
    columns = ["status", "seconds", "n_target"]
    timed = [*records(before[columns]), *({name: row[name] for name in columns} for row in kept.values())]
    return pd.DataFrame([row for row in timed if row["seconds"]], columns=columns).astype({"seconds": float, "n_target": float})


def _own_of(spec: FleetSpec, before: "pd.Series[Any] | None", open_runs: pd.DataFrame) -> str | None:
    """What an earlier run of the same spec chose where `own` is auto; None if there is none."""
    known: list[Mapping[Any, Any]] = [*([] if before is None else [before.to_dict()]), *records(open_runs)]
    runs = [run for run in known if run["spec_digest"] == spec.training_digest]
    return ModelSpec.from_json(runs[-1]["model_spec"]).own if runs else None


def _is_same(run: Mapping[str, Any], request: Request, spec: FleetSpec, data_digest: str, previous_run_id: str | None) -> bool:
    """Whether an unfinished run is the one that this launch would make."""
    previous = run["previous_run_id"] if isinstance(run["previous_run_id"], str) else None
    wanted = (request.text, spec.training_digest, data_digest, previous_run_id)
    return (run["request"], run["spec_digest"], run["data_digest"], previous) == wanted


@dataclass(frozen=True)
class Cluster:
    """Where a run trains.

    Args:
        spark: the session.
        report: called now and then with what is done.
        memory_bytes: memory one group may take; None is unlimited.
        train: what trains a group; another function only in tests.
    """

    spark: SparkSession
    report: Report
    memory_bytes: int | None = None
    train: TrainGroup | None = None


def train_run(
    cluster: Cluster, tables: Tables, namespace: str, run: PlannedRun, spec: FleetSpec, *, features_version: int, lease: HeldLease
) -> pd.DataFrame:
    """Train every planned group, learn the blend, and commit one ledger row per group.

    Waves are committed as they end: boosters, then held-out predictions, then ledger rows. At the end the run's ledger rows are
    replaced, in one commit, by complete ones. A run that is killed at any moment is finished by the next one that asks for the
    same of the same data.

    Args:
        cluster: where it trains.
        tables: where it is kept.
        namespace: of the tables.
        run: as planned.
        spec: the fleet.
        features_version: version of the feature table that was planned on.
        lease: the right to train the fleet. It is asked before each commit, and each commit carries its fence.

    Returns:
        The ledger.
    """
    started_at = pd.Timestamp.now(tz="UTC")
    commits = Commits(tables, namespace, run.run_id, lease)
    crash_point("run_planned")
    pinned = manifest(run, spec, started_at=started_at, features_version=features_version)
    commits.replace_run(RUNS, pa.Table.from_pylist([pinned], schema=RUNS.schema))
    crash_point("manifest_committed")
    outcomes = _train_all(cluster, commits, run, spec)
    crash_point("waves_finished")
    rows = _ledger_rows(run, spec, outcomes)
    waves = sorted({str(row["wave"]) for row in rows if isinstance(row["wave"], str)})
    ledger, unknown_groups = _judged(cluster.spark, tables, namespace, run, spec, rows)
    crash_point("blend_learnt")
    commits.replace_run(LEDGER, pa.Table.from_pandas(ledger, schema=LEDGER.schema, preserve_index=False))
    crash_point("ledger_committed")
    finished = {**pinned, "finished_at": pd.Timestamp.now(tz="UTC"), "waves": json.dumps(waves), "n_groups": len(ledger)}
    finished["unknown_groups"] = json.dumps(unknown_groups, ensure_ascii=False)
    commits.replace_run(RUNS, pa.Table.from_pylist([finished], schema=RUNS.schema))
    crash_point("run_committed")
    return ledger


class Commits:
    """The commits of one run, each only while the run still owns the fleet.

    The lease is asked before a commit, but a process may sleep for hours between the answer and the commit. So each commit carries
    a number that grows with the lease: a table that holds a later holder's commit refuses it.
    """

    def __init__(self, tables: Tables, namespace: str, run_id: str, lease: HeldLease) -> None:
        self.tables = tables
        self.roots = {contract.name: tables.location(namespace, contract.name) for contract in (RUNS, LEDGER, BOOSTERS, HOLDOUT)}
        self._run_id = run_id
        self._lease = lease
        self._n_commits = 0

    def replace_run(self, contract: Any, rows: pa.Table) -> None:
        """Let a table hold these rows for the run, instead of what it had."""
        self._lease.check()
        file = self.tables.write_file(rows, contract.schema, self.roots[contract.name])
        self._commit(contract, [file], mode="overwrite", partition={"run_id": self._run_id})

    def wave(self, wave: Wave, trained: TrainedFiles, rows: pd.DataFrame) -> None:
        """Commit a wave: boosters first, then held-out predictions, then the ledger rows that name them."""
        crash_point("wave_trained")
        self._lease.check()
        for contract, files in ((BOOSTERS, trained.boosters), (HOLDOUT, trained.holdout)):
            if files:
                self._commit(contract, files, mode="append", partition={"wave": wave.name})
            crash_point(f"{contract.name}_committed")
        table = pa.Table.from_pandas(rows, schema=LEDGER.schema, preserve_index=False)
        file = self.tables.write_file(table, LEDGER.schema, self.roots[LEDGER.name])
        self._lease.check()
        self._commit(LEDGER, [file], mode="append", partition={"run_id": self._run_id})
        crash_point("wave_committed")

    def _commit(self, contract: TableContract, files: Sequence[Any], *, mode: str, partition: Mapping[str, str]) -> None:
        self._n_commits += 1
        app = (TRAINING, self._lease.fence * COMMITS_PER_LEASE + self._n_commits)
        self.tables.commit(self.roots[contract.name], files, contract.schema, mode=mode, partition=partition, app=app, fenced=True)


def _train_all(cluster: Cluster, commits: Commits, run: PlannedRun, spec: FleetSpec) -> dict[GroupKey, dict[str, Any]]:
    """Train the plan's waves, and commit each; the ledger row so far of every group that was trained."""
    progress = Progress(cluster.spark, cluster.report, run.plan.slots)
    progress.expect(run.plan.to_train)
    found: dict[GroupKey, dict[str, Any]] = {}
    with without_adaptive_execution(cluster.spark), progress.told():
        for stage in _plans(run, spec):
            bases = _bases(cluster.spark, commits, run, _ledger_rows(run, spec, found), stage.grain) if stage.grain else None
            found |= _train_waves(cluster, commits, run, spec, stage.plan, progress, bases)
        for plan in _second_pass(run, spec, found):
            progress.expect(plan.to_train)
            again = _train_waves(cluster, commits, run, spec, plan, progress, None)
            found |= {key: row for key, row in again.items() if row["status"] == "trained"}
    return found


@dataclass(frozen=True)
class _Stage:
    """A part of the plan that is trained at once; above 0 the grain whose groups correct coarser ones."""

    plan: TrainingPlan
    grain: int = 0


def _plans(run: PlannedRun, spec: FleetSpec) -> Iterator[_Stage]:
    """The whole plan at once, or grain by grain where each corrects the one before."""
    if not run.settings.model_spec.corrects:
        yield _Stage(run.plan)
        return
    for grain in range(len(spec.grains)):
        plan = of_grain(run.plan, grain)
        if len(plan.groups):
            yield _Stage(plan, grain)


def _bases(spark: SparkSession, commits: "Commits", run: PlannedRun, rows: Sequence[Mapping[str, Any]], grain: int) -> DataFrame:
    """Per row what the finest model coarser than a grain predicts of it, made without it: row_key and `_base`."""
    coarser = [row for row in rows if row["status"] in WITH_BOOSTER and row["grain"] < grain]
    held_out = held_out_rows(spark, commits.tables, commits.roots[HOLDOUT.name], coarser)
    if held_out is None:
        return run.rows.select("row_key", sf.lit(run.constants.with_offset).alias("_base"))
    return nearest_predictions(held_out)


def choose_own(cluster: Cluster, tables: Tables, namespace: str, run: PlannedRun, spec: FleetSpec) -> tuple[str, str]:
    """Try both forms of `own` on some groups: which does better on their tune rows, and what was found, for people.

    Trains the pooled group once, and up to `PILOT_GROUPS` of the finest grain, small and large, in both forms. Nothing is committed.

    Args:
        cluster: where it trains.
        tables: where files are written.
        namespace: of the tables.
        run: as planned, with independent models.
        spec: the fleet.
    """
    plan = run.plan.to_train
    finest = plan[plan["grain"] == len(spec.grains) - 1].sort_values(["n_target", "group_id"])
    pooled = plan[plan["grain"] == 0]
    if finest.empty or pooled.empty:
        return INDEPENDENT, "no group to try both forms on"
    chosen = finest.iloc[sorted({round(place) for place in np.linspace(0, len(finest) - 1, PILOT_GROUPS)})]
    settings = {own: replace(run.settings, model_spec=replace(run.settings.model_spec, own=own)) for own in (INDEPENDENT, CORRECTION)}

    def tried(groups: pd.DataFrame, own: str, bases: DataFrame | None) -> DataFrame:
        return train_aside(cluster, tables, namespace, run.rows, spec, groups, settings[own], slots=run.plan.slots, bases=bases)

    bases = nearest_predictions(tried(pooled.assign(started_from=Start(max_trials=1).to_json()), CORRECTION, None))
    misses = pd.DataFrame({own: _tune_misses(tried(chosen, own, bases if own == CORRECTION else None), spec) for own in settings}).dropna()
    gain = misses[INDEPENDENT] - misses[CORRECTION]
    # Only what is clearly better is worth its fits and its barrier between grains.
    best = CORRECTION if gain.sum() > STANDARD_ERRORS * np.sqrt(len(gain) * gain.var()) else INDEPENDENT
    told = ", ".join(f"{own} {misses[own].mean():.5g}" for own in misses)
    return best, f"own: auto is {best}: mean squared error on the tune rows of {len(misses)} groups: {told}"


def train_aside(
    cluster: Cluster,
    tables: Tables,
    namespace: str,
    rows: DataFrame,
    spec: FleetSpec,
    groups: pd.DataFrame,
    settings: TrainingSettings,
    *,
    slots: int,
    bases: DataFrame | None = None,
) -> DataFrame:
    """Train groups to look at what they predict, and commit nothing; one Spark job.

    Args:
        cluster: where it trains, and what trains a group.
        tables: where files are written; they go as others do that no commit names.
        namespace: of the tables.
        rows: the visible rows.
        spec: the fleet.
        groups: grain, group_id, started_from, cost_seconds, exponent.
        settings: what they share.
        slots: tasks that run at once.
        bases: what their trees correct, as for `placed_rows`.

    Returns:
        Their held-out rows, as in `tables.HOLDOUT`.
    """
    packed = groups.sort_values(["cost_seconds", "group_id"], ascending=[False, True], ignore_index=True)
    packed = packed.assign(task=pack_tasks(packed["cost_seconds"].tolist(), slots=slots))
    roots = {contract.name: tables.location(namespace, contract.name) for contract in (BOOSTERS, HOLDOUT)}
    options = dict(tables.storage_options)
    placed = placed_rows(cluster.spark, rows, spec, packed, bases)
    # A worker knows a wave's settings by its name, which is therefore never given twice.
    wave = Wave(f"aside-{uuid.uuid4().hex[:8]}", packed)
    with without_adaptive_execution(cluster.spark):
        progress = Progress(cluster.spark, lambda _: None)
        files = train_wave(placed, wave, settings, roots, options, progress, cluster.train, cluster.memory_bytes)
    return read_files(cluster.spark, roots[HOLDOUT.name], [file.path for file in files.holdout], HOLDOUT.schema, options)


def _tune_misses(holdout: DataFrame, spec: FleetSpec) -> "pd.Series[Any]":
    """Weighted mean squared error of each group's cross-selected predictions of its tune rows, link space."""
    rows = holdout.where((sf.col("split") == TUNE) & sf.col("prediction").isNotNull())
    target = (link_column(sf.col("actual"), spec.target.transform) - sf.col("offset")) / sf.col("scale")
    miss = sf.col("weight") * (target - sf.col("prediction")) ** 2
    found = rows.groupBy("group_id").agg((sf.sum(miss) / sf.nullif(sf.sum("weight"), sf.lit(0.0))).alias("miss")).toPandas()
    misses: pd.Series[Any] = found.set_index("group_id")["miss"].sort_index()
    return misses


def _train_waves(
    cluster: Cluster, commits: Commits, run: PlannedRun, spec: FleetSpec, plan: TrainingPlan, progress: Progress, bases: DataFrame | None
) -> dict[GroupKey, dict[str, Any]]:
    """Train a plan's groups wave by wave, and commit each wave as it ends; the ledger rows so far."""
    schedule = Schedule(
        plan.to_train, slots=plan.slots, checkpoint_seconds=spec.tuning.checkpoint_seconds, has_history=plan.cost_model.learnt_from > 0
    )
    found: dict[GroupKey, dict[str, Any]] = {}

    def train(wave: Wave) -> TrainedFiles | None:
        return _train_wave(cluster, commits, run, spec, wave, progress, bases)

    # Closed at once where a commit fails, so that what is under way ends.
    with closing(_overlapping(cluster.spark, schedule, run.run_id, train)) as waves:
        for wave, trained in waves:
            outcomes = {GroupKey.of(outcome): outcome for outcome in trained.outcomes}
            left = set(trained.not_started)
            rows = [_trained_row(planned, outcomes, wave, run, spec) for planned in records(wave.groups) if GroupKey.of(planned) not in left]
            commits.wave(wave, trained, pd.DataFrame(rows).reindex(columns=LEDGER.schema.names))
            found |= {GroupKey.of(row): row for row in rows}
            schedule.ended(wave.groups, trained.outcomes, trained.not_started)
            progress.pace = schedule.pace
    return found


def _overlapping(
    spark: SparkSession, schedule: Schedule, run_id: str, train: Callable[[Wave], TrainedFiles | None]
) -> Generator[tuple[Wave, TrainedFiles], None, None]:
    """Each wave with what it left, as they end; the next one starts while one drains, as Spark hands free slots to the oldest job.

    A further one is laid out only when the caller, having committed a wave, asks for the next: more would be lost with a killed
    run, and less would be known of the pace. A wave that dies of a group is trained again in halves.
    """
    token = uuid.uuid4().hex[:8]
    numbers = itertools.count()
    pool = ThreadPoolExecutor(schedule.most_waves, thread_name_prefix="wave")
    running: dict[Future[TrainedFiles | None], Wave] = {}
    try:
        while True:
            while (groups := schedule.next_wave()) is not None:
                wave = Wave(f"{run_id}-{token}-{next(numbers)}", groups, schedule.start_seconds)
                running[pool.submit(train, wave)] = wave
            if not running:
                return
            ended = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            wave, trained = running.pop(ended), ended.result()
            if trained is None:
                schedule.halve(wave.groups)
            else:
                yield wave, trained
    except BaseException:
        for future in running:
            future.cancel()
        spark.sparkContext.cancelAllJobs()
        raise
    finally:
        pool.shutdown()


def _train_wave(
    cluster: Cluster, commits: Commits, run: PlannedRun, spec: FleetSpec, wave: Wave, progress: Progress, bases: DataFrame | None = None
) -> TrainedFiles | None:
    """One Spark job; None if a group of several kills it, and if it was alone, it is `crashed`."""
    placed = placed_rows(cluster.spark, run.rows, spec, wave.groups, bases)
    try:
        return train_wave(
            placed, wave, run.settings, commits.roots, dict(commits.tables.storage_options), progress, cluster.train, cluster.memory_bytes
        )
    except (PySparkException, Py4JError) as error:
        if cluster.spark.sparkContext._jsc is None or not _died_of_training(placed, error):  # noqa: SLF001 - whether the session has been stopped
            raise
    groups = wave.groups
    if len(groups) > 1:
        return None
    key = {"grain": int(groups["grain"].iloc[0]), "group_id": str(groups["group_id"].iloc[0])}
    message = "every Spark worker that trained it was lost; see the executors' logs, and give it more memory or fewer rows (tuning.max_rows)"
    told = {"status": "crashed", "reason": NATIVE_CRASH, "error_class": "ExecutorLost", "error_message": message}
    return TrainedFiles([{**key, **told}], [], [])


def _died_of_training(placed: DataFrame, error: Exception) -> bool:
    """Whether rows can be read and placed, so that it was training that ended the job."""
    if "cancelled" in str(error):
        return False
    try:
        placed.groupBy("task").count().collect()
    except (PySparkException, Py4JError):
        return False
    return True


def _trained_row(
    planned: Mapping[str, Any], outcomes: Mapping[GroupKey, Mapping[str, Any]], wave: Wave, run: PlannedRun, spec: FleetSpec
) -> dict[str, Any]:
    """The ledger row of a group that was sent to a worker; `failed` if nothing came back."""
    lost = {"status": "failed", "reason": ERROR, "error_class": "LostOutcome", "error_message": "the worker gave no outcome for this group"}
    outcome = outcomes.get(GroupKey.of(planned), lost)
    tuned = run.cutoffs.as_of
    if outcome["status"] == "refreshed":
        tuned = pd.Timestamp(run.memory.before[GroupKey.of(planned)]["tuned_as_of"]).tz_localize(None)
    return {
        **_planned_row(planned, run, spec),
        "source_run_id": run.run_id,
        "wave": wave.name,
        "tuned_as_of": tuned.tz_localize("UTC"),
        **outcome,
        "reason": planned["reason"] or outcome["reason"],
    }


def _planned_row(planned: Mapping[str, Any], run: PlannedRun, spec: FleetSpec) -> dict[str, Any]:
    row = {name: value for name, value in planned.items() if name not in ("action", "rows_hash", "exponent", "wave")}
    return {
        **row,
        "run_id": run.run_id,
        "grain_name": grain_name(spec.grains[int(planned["grain"])]),
        "planned_seconds": planned["cost_seconds"],
        "weight": 0.0,
        "wave": None,
    }


def _ledger_rows(run: PlannedRun, spec: FleetSpec, trained: Mapping[GroupKey, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per group that is trained by now or need not be, weights and errors still missing."""
    rows = []
    for planned in records(run.plan.groups):
        key = GroupKey.of(planned)
        if planned["action"] in (TRAIN, REFRESH) and key not in trained:
            continue
        row = _planned_row(planned, run, spec)
        if planned["action"] == KEEP:
            row = dict(run.memory.kept[key])
        elif planned["action"] == REUSE:
            source = _source(run.memory, key, planned["fingerprint"])
            reused = source["status"] in WITH_BOOSTER
            told = {"status": "reused"} if reused else {"status": source["status"], "reason": source["reason"]}
            row |= {**{name: source[name] for name in _TAKEN_OVER}, **told}
        elif planned["action"] == INHERIT:
            row |= {"status": "inherited", "planned_seconds": None}
        else:
            row = trained[key]
        rows.append(row)
    return rows


def _source(memory: Memory, key: GroupKey, wanted: str) -> Mapping[str, Any]:
    """The row that a group is reused from."""
    before = memory.before.get(key)
    return before if before is not None and before["fingerprint"] == wanted else memory.unfinished[key]


def _judged(
    spark: SparkSession,
    tables: Tables,
    namespace: str,
    run: PlannedRun,
    spec: FleetSpec,
    ledger_rows: list[dict[str, Any]],
) -> tuple[pd.DataFrame, list[str]]:
    """The ledger, and the groups of held-out rows that it does not know.

    Weights and errors come from the held-out predictions of whichever run trained each group. A group that the ledger does not
    know is a key that was read in two ways: its rows would count for nobody.
    """
    has_model = groups_with_model(ledger_rows, len(spec.grains))
    skills: Mapping[GroupKey, GroupSkill] = {}
    measures = pd.DataFrame(columns=["grain", "group_id"])
    classes = run.settings.model_spec.classes
    held_out = held_out_rows(spark, tables, tables.location(namespace, HOLDOUT.name), ledger_rows)
    if held_out is not None:
        judged = judged_rows(held_out, spec, run.cutoffs, run.constants, has_model).persist()
        try:
            moments = sum_moments(judged, len(spec.grains), run.constants, classes)
            skills = learn_blend(moments, has_model, run.constants[0], spec.pooling)
            skills = answer_losers_otherwise(judged, spec, skills, has_model, run.constants, classes, run.cutoffs.report_start)
            rows = run.rows.where(sf.col("time") >= moment_column(run.cutoffs.report_start))
            measures = measure_groups(spark, judged, spec, skills, run.constants, has_model, classes, rows)
        finally:
            judged.unpersist()
    known = {GroupKey.of(row) for row in ledger_rows}
    judged_groups = {*skills, *_by_group(measures)}
    unknown = sorted({group for grain, group in judged_groups - known})
    return build_ledger(ledger_rows, spec, skills, measures), unknown[:MAX_UNKNOWN_GROUPS]


def groups_with_model(rows: Iterable[Mapping[str, Any]], n_grains: int) -> list[set[str]]:
    """Per grain the groups that have a model, as their ledger rows say."""
    found: list[set[str]] = [set() for _ in range(n_grains)]
    for row in rows:
        if row["status"] in WITH_BOOSTER:
            found[int(row["grain"])].add(str(row["group_id"]))
    return found


def held_out_rows(spark: SparkSession, tables: Tables, location: str, rows: Iterable[Mapping[str, Any]]) -> DataFrame | None:
    """The held-out rows of groups whose ledger row names their wave; what an interrupted wave left is not among them.

    Args:
        spark: the session.
        tables: where they are kept.
        location: of the holdout table.
        rows: of the ledger.

    Returns:
        Rows of `tables.HOLDOUT`; None where no group has any.
    """
    named = [(row["wave"], int(row["grain"]), str(row["group_id"])) for row in rows if isinstance(row["wave"], str)]
    if not named or not tables.exists(location):
        return None
    holdout = tables.read_spark(spark, location, partitions={"wave": sorted({wave for wave, _, _ in named})})
    keys = spark.createDataFrame(pd.DataFrame(named), "wave string, grain int, group_id string")
    found: DataFrame = holdout.join(sf.broadcast(keys), ["wave", "grain", "group_id"], "left_semi")
    return found


def build_ledger(rows: Sequence[Mapping[str, Any]], spec: FleetSpec, skills: Mapping[GroupKey, GroupSkill], measures: pd.DataFrame) -> pd.DataFrame:
    """The complete ledger, one row per group: what became of it, its weight, and its errors."""
    measured = _by_group(measures)
    complete = []
    for row in rows:
        key = GroupKey.of(row)
        full = {**row, **(vars(skills[key]) if key in skills else {}), **measured.get(key, {})}
        if row["status"] not in WITH_BOOSTER:
            full["weight"] = 0.0
        elif key not in skills:
            # No row judges it: a group that is not in the data any more keeps its weight.
            full["weight"] = 1.0 if spec.pooling == "none" else float(row["weight"] or 0.0)
        complete.append(full)
    ledger = pd.DataFrame(complete).reindex(columns=LEDGER.schema.names)
    return ledger.sort_values(["grain", "group_id"], ignore_index=True)


def manifest(run: PlannedRun, spec: FleetSpec, *, started_at: pd.Timestamp, features_version: int) -> dict[str, Any]:
    """The row of `tables.RUNS` that says what the run pinned; not finished."""
    packages = ("many-models", "pyspark", "lightgbm", "optuna", "pandas", "pyarrow", "numpy")
    versions = {"python": platform.python_version(), **{package: installed_version(package) for package in packages}}
    return {
        "run_id": run.run_id,
        "started_at": started_at,
        "finished_at": None,
        "previous_run_id": run.previous_run_id,
        "request": run.request.text,
        "data_digest": run.data_digest,
        "as_of": run.cutoffs.as_of,
        "tune_start": run.cutoffs.tune_start,
        "report_start": run.cutoffs.report_start,
        "features_version": features_version,
        "spec_digest": spec.training_digest,
        "constant": None if run.constants.prior else run.constants.with_offset,
        "constant_without_offset": None if run.constants.prior else run.constants.without_offset,
        "n_groups": len(run.plan.groups),
        "model_spec": run.settings.model_spec.to_json(),
        "versions": json.dumps(versions),
        "waves": None,
        "unknown_groups": None,
    }


def _second_pass(run: PlannedRun, spec: FleetSpec, found: dict[GroupKey, dict[str, Any]]) -> Iterator[TrainingPlan]:
    """With a budget of seconds: plans of about a wave for the groups with the largest rows x error, until the budget is spent.

    Args:
        run: as planned.
        spec: the fleet.
        found: ledger rows of what has been trained; the caller adds each plan's before asking for the next.
    """
    budget = spec.tuning.budget_seconds
    if budget is None:
        return
    shared = shared_digest(run.settings.model_spec, run.settings.goal, spec.tuning, run.cutoffs, spec.target.weight)
    slots, wave_seconds = run.plan.slots, spec.tuning.checkpoint_seconds
    plans = {GroupKey.of(row): row for row in records(run.plan.to_train)}
    left = {key for key, row in found.items() if row["status"] == "trained" and spec.tuning.max_trials > FIRST_PASS_TRIALS}
    longer = (min(spec.tuning.max_trials, spec.tuning.patience + 1) + 2) / (FIRST_PASS_TRIALS + 2)
    for key in left:
        found[key]["stopped_by"] = "budget"
    # All seconds count, those of groups trained twice, too.
    spent = sum(float(row["seconds"] or 0.0) for row in found.values())
    while left:
        chosen: list[dict[str, Any]] = []
        cost = 0.0
        for key in sorted(left, key=lambda key: (-found[key]["n_tune"] * found[key]["tune_loss"], key)):
            seconds = float(found[key]["seconds"]) * longer
            if cost + seconds > min(budget - spent, max(wave_seconds * slots, seconds)):
                continue
            start = Start(trials=(json.loads(found[key]["parameters"]),)).to_json()
            again = fingerprint(str(plans[key]["rows_hash"]), shared, start)
            chosen.append({**plans[key], "started_from": start, "fingerprint": again, "cost_seconds": seconds})
            cost += seconds
        if not chosen:
            return
        left -= {GroupKey.of(row) for row in chosen}
        groups = pd.DataFrame(chosen).sort_values("cost_seconds", ascending=False, ignore_index=True)
        # These seconds are those of the first pass.
        yield TrainingPlan(groups, slots, CostModel(learnt_from=len(plans)))
        spent += sum(float(found[GroupKey.of(row)]["seconds"] or 0.0) for row in chosen)
