"""Laying out one training run from what was counted and what earlier runs left.

Nothing is trained.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

import pandas as pd

from pipeline.models.meta_model import CORRECTION, INDEPENDENT
from pipeline.models.pack import build_model_spec
from pipeline.periods import Period
from pipeline.runs.fingerprints import shared_digest
from pipeline.runs.history import EarlierRuns, History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.plan import CostModel, Policy, TrainingPlan, build_plan, refuse_unknown
from pipeline.runs.request import Request
from pipeline.runs.sampling import sampling_exponents
from pipeline.spec import FleetSpec
from pipeline.training.blend import Constants
from pipeline.training.objective import learning_goal
from pipeline.training.splits import Cutoffs
from pipeline.training.trainer import TrainingSettings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Trials per group of the first pass, where the fleet has a budget of seconds.
FIRST_PASS_TRIALS = 1
PACKAGES = ("many-models", "pyspark", "lightgbm", "optuna", "pandas", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class CountedRows:
    """What the plan needs to know of the visible rows.

    Args:
        cutoffs: the run's dates.
        categories: values per categorical feature, in order.
        classes: of the target, in order; empty for regression.
        counts: one row per group of every grain, with its counts, its parent, and the hash of its
            training rows.
        constants: what answers without a model: mean of the fit rows (their quantile where one is
            learnt; classes' shares), 0 where there is none.
        nullable: features in which a row that is learnt from has a null.
    """

    cutoffs: Cutoffs
    categories: Mapping[str, Sequence[str]]
    classes: Sequence[str]
    counts: pd.DataFrame
    constants: Constants
    nullable: Sequence[str]


@dataclass(frozen=True, kw_only=True)
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
        earlier: what earlier runs left.
        previous_run_id: the newest run finished before it.
        data_digest: hash of the rows.
        is_resumed: whether an interrupted run is taken up again.
        must_choose: whether `own` is auto and nobody has chosen yet: the plan is that of
            independent models.
    """

    run_id: str
    rows: "DataFrame"
    cutoffs: Cutoffs
    plan: TrainingPlan
    settings: TrainingSettings
    constants: Constants
    request: Request
    earlier: EarlierRuns = field(default_factory=EarlierRuns)
    previous_run_id: str | None = None
    data_digest: str = ""
    is_resumed: bool = False
    must_choose: bool = False

    def manifest(
        self, spec: FleetSpec, *, started_at: pd.Timestamp, features_version: int
    ) -> RunManifest:
        """What the run pins, for its row of `tables.RUNS`; not finished.

        Args:
            spec: the fleet.
            started_at: UTC.
            features_version: version of the feature table that was planned on.
        """
        return RunManifest(
            run_id=self.run_id,
            started_at=started_at,
            finished_at=None,
            previous_run_id=self.previous_run_id,
            request=self.request.text,
            data_digest=self.data_digest,
            cutoffs=self.cutoffs,
            features_version=features_version,
            spec_digest=spec.training_digest,
            constants=self.constants,
            n_groups=len(self.plan.groups),
            model_spec=self.settings.model_spec,
            versions={
                "python": platform.python_version(),
                **{package: installed_version(package) for package in PACKAGES},
            },
        )


def lay_out_run(
    rows: "DataFrame",
    counted: CountedRows,
    spec: FleetSpec,
    request: Request,
    history: History,
    *,
    slots: int,
    threads: int,
    own: str | None = None,
) -> PlannedRun:
    """Find what earlier runs left, and lay out the work.

    Args:
        rows: the visible rows, for whoever trains.
        counted: what is known of them.
        spec: the fleet.
        request: what the launch asks for.
        history: earlier runs.
        slots: tasks that run at once.
        threads: LightGBM's, per task.
        own: `independent` or `correction`, where the spec leaves it open; by default that of the
            run before.

    Raises:
        DataError: if a listed group does not exist.
    """
    refuse_unknown(request.listed, counted.counts["group_id"].tolist())
    as_of = counted.cutoffs.as_of
    before = history.newest_finished(as_of)
    open_runs = history.unfinished(before)
    chosen = _chosen_own(spec, before, open_runs, own)
    settings = _settings(counted, spec, request.run_id, chosen or INDEPENDENT, threads)
    shared = shared_digest(
        settings.model_spec, settings.goal, spec.tuning, counted.cutoffs, spec.target.weight
    )
    data_digest = _data_digest(counted.counts, shared, as_of)
    previous_run_id = None if before is None else before.run_id
    resumed = _interrupted_run(open_runs, request, spec, data_digest, previous_run_id)
    earlier = EarlierRuns.read(history, before, open_runs, resumed, spec)
    plan = _plan(
        _with_samples(counted.counts, spec), spec, request, earlier, shared, as_of, chosen, slots
    )
    run_id = request.run_id if resumed is None else resumed.run_id
    return PlannedRun(
        run_id=run_id,
        rows=rows,
        cutoffs=counted.cutoffs,
        plan=plan,
        settings=replace(settings, run_id=run_id),
        constants=counted.constants,
        request=request,
        earlier=earlier,
        previous_run_id=previous_run_id,
        data_digest=data_digest,
        is_resumed=resumed is not None,
        must_choose=chosen is None,
    )


def known_categories(spec: FleetSpec, before: RunManifest | None) -> Mapping[str, Sequence[str]]:
    """The categories of the run before, whose order stays under the same spec."""
    if before is None or before.spec_digest != spec.training_digest:
        return {}
    return before.model_spec.categories


def _chosen_own(
    spec: FleetSpec, before: RunManifest | None, open_runs: Sequence[RunManifest], own: str | None
) -> str | None:
    """The form of the groups' models.

    None where `own` is auto and neither the caller nor an earlier run of this spec has chosen.
    """
    if spec.own != "auto":
        return spec.own
    if own is not None:
        return own
    known = [
        run
        for run in (before, *open_runs)
        if run is not None and run.spec_digest == spec.training_digest
    ]
    return str(known[-1].model_spec.own) if known else None


def _settings(
    counted: CountedRows, spec: FleetSpec, run_id: str, own: str, threads: int
) -> TrainingSettings:
    model_spec = build_model_spec(
        spec,
        counted.categories,
        list(counted.classes),
        counted.constants.prior,
        own,
        counted.nullable,
    )
    return TrainingSettings(
        run_id=run_id,
        model_spec=model_spec,
        goal=learning_goal(spec, len(counted.classes)),
        target=spec.target.column,
        weight=spec.target.weight,
        tuning=spec.tuning,
        cutoffs=counted.cutoffs,
        threads=threads,
    )


def _data_digest(counts: pd.DataFrame, shared: str, as_of: pd.Timestamp) -> str:
    """Hash of all rows that are learnt from, and of what all groups share."""
    pooled_hash = str(counts.loc[counts["grain"] == 0, "rows_hash"].iloc[0])
    return hashlib.sha256(f"{pooled_hash}\n{shared}\n{as_of}".encode()).hexdigest()


def _interrupted_run(
    open_runs: Sequence[RunManifest],
    request: Request,
    spec: FleetSpec,
    data_digest: str,
    previous_run_id: str | None,
) -> RunManifest | None:
    """The newest unfinished run that is the one this launch would make."""
    wanted = (request.text, spec.training_digest, data_digest, previous_run_id)
    for run in reversed(open_runs):
        if (run.request, run.spec_digest, run.data_digest, run.previous_run_id) == wanted:
            return run
    return None


def _with_samples(counts: pd.DataFrame, spec: FleetSpec) -> pd.DataFrame:
    """The groups with their sampling exponent, which is part of what they are trained from."""
    is_coarse = (counts["grain"] < len(spec.grains) - 1).to_numpy()
    n_target = counts["n_target"].to_numpy()
    exponents = sampling_exponents(n_target, is_coarse=is_coarse, max_rows=spec.tuning.max_rows)
    groups = counts.assign(exponent=exponents)
    is_sampled = groups["exponent"] > 0
    groups.loc[is_sampled, "rows_hash"] += "/" + groups.loc[is_sampled, "exponent"].astype(str)
    return groups


def _plan(
    groups: pd.DataFrame,
    spec: FleetSpec,
    request: Request,
    earlier: EarlierRuns,
    shared: str,
    as_of: pd.Timestamp,
    own: str | None,
    slots: int,
) -> TrainingPlan:
    tuning, n_features = spec.tuning, len(spec.feature_columns)
    first_pass = FIRST_PASS_TRIALS if tuning.budget_seconds else None
    n_fits = first_pass or min(tuning.max_trials, tuning.patience + 1)
    policy = Policy(
        retrain=request.retrain,
        listed=frozenset(request.listed),
        retune_after=Period.parse(tuning.retune_after),
        as_of=as_of,
        fit_rows=tuning.fit_rows,
        tune_rows=tuning.tune_rows,
        finest_only=spec.pooling == "none",
        corrects=own == CORRECTION,
        max_trials=first_pass,
        recipes=request.recipes,
    )
    return build_plan(
        groups,
        policy,
        earlier,
        shared=shared,
        n_features=n_features,
        n_fits=n_fits,
        slots=slots,
        checkpoint_seconds=tuning.checkpoint_seconds,
        cost_model=CostModel.learnt(earlier.timed, n_features, n_fits),
    )
