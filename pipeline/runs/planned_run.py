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
from pipeline.training.splits import Cutoffs
from pipeline.training.trainer import TrainingSettings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Trials per group of the first pass, where the fleet has a budget of seconds.
FIRST_PASS_TRIALS = 1
PACKAGES = ("many-models", "pyspark", "lightgbm", "optuna", "pandas", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class CountedRows:
    """The visible rows, and what the plan needs to know of them.

    Args:
        rows: the rows themselves, for whoever trains.
        cutoffs: the run's dates.
        categories: values per categorical feature, in order.
        classes: of the target, in order; empty for regression.
        counts: one row per group of every grain, with its counts, its parent, and the hash of its
            training rows.
        constants: what answers without a model: mean of the fit rows (their quantile where one is
            learnt; classes' shares), 0 where there is none.
        nullable: features in which a row that is learnt from has a null.
    """

    rows: "DataFrame"
    cutoffs: Cutoffs
    categories: Mapping[str, Sequence[str]]
    classes: Sequence[str]
    counts: pd.DataFrame
    constants: Constants
    nullable: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """Everything that a run fixes before it trains.

    Args:
        rows: the visible rows.
        plan: which group trains where.
        settings: what every group shares; where an interrupted run is resumed, with its run id.
        constants: what answers without a model.
        request: what was asked for.
        earlier: what earlier runs left.
        previous_run_id: the newest run finished before it.
        data_digest: hash of the rows.
        is_resumed: whether this resumes an interrupted run.
        must_choose: whether `own` is auto and nobody has chosen yet: the plan is that of
            independent models.
    """

    rows: "DataFrame"
    plan: TrainingPlan
    settings: TrainingSettings
    constants: Constants
    request: Request
    earlier: EarlierRuns = field(default_factory=EarlierRuns)
    previous_run_id: str | None = None
    data_digest: str = ""
    is_resumed: bool = False
    must_choose: bool = False

    @property
    def run_id(self) -> str:
        """The run, also the fleet version."""
        return self.settings.run_id

    @property
    def cutoffs(self) -> Cutoffs:
        """The run's dates."""
        return self.settings.cutoffs

    def manifest(
        self, spec: FleetSpec, *, started_at: pd.Timestamp, features_version: int
    ) -> RunManifest:
        """The manifest of the run at its start, not finished.

        Args:
            spec: the fleet.
            started_at: UTC.
            features_version: version of the feature table that was planned on.
        """
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            versions[package] = installed_version(package)
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
            versions=versions,
        )


def lay_out_run(
    counted: CountedRows,
    spec: FleetSpec,
    request: Request,
    history: History,
    *,
    slots: int,
    own: str | None = None,
) -> PlannedRun:
    """Find what earlier runs left, and lay out the work.

    Args:
        counted: the visible rows, and what is known of them.
        spec: the fleet.
        request: what the launch asks for.
        history: earlier runs.
        slots: tasks that run at once.
        own: `independent` or `correction`, where the spec leaves it open; by default that of the
            run before.

    Raises:
        DataError: if a listed group does not exist.
    """
    refuse_unknown(request.listed, counted.counts["group_id"].tolist())
    before = history.newest_finished(counted.cutoffs.as_of)
    open_runs = history.unfinished(before)
    chosen = _chosen_own(spec, before, open_runs, own)
    settings = _settings(counted, spec, request.run_id, chosen or INDEPENDENT)
    shared = shared_digest(settings)
    data_digest = _data_digest(counted, shared)
    previous_run_id = None
    if before is not None:
        previous_run_id = before.run_id
    resumed = _interrupted_run(open_runs, request, spec, data_digest, previous_run_id)
    if resumed is not None:
        settings = replace(settings, run_id=resumed.run_id)
    earlier = EarlierRuns.read(history, before, open_runs, resumed, spec)
    policy = _policy(spec, request, counted.cutoffs.as_of, shared, settings.model_spec.own)
    plan = build_plan(
        _with_samples(counted.counts, spec),
        policy,
        earlier,
        _cost_model(spec).learnt(earlier.timed),
        slots=slots,
        checkpoint_seconds=spec.tuning.checkpoint_seconds,
    )
    return PlannedRun(
        rows=counted.rows,
        plan=plan,
        settings=settings,
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
    chosen = None
    for run in (before, *open_runs):
        if run is not None and run.spec_digest == spec.training_digest:
            chosen = run.model_spec.own
    return chosen


def _settings(counted: CountedRows, spec: FleetSpec, run_id: str, own: str) -> TrainingSettings:
    model_spec = build_model_spec(
        spec,
        counted.categories,
        list(counted.classes),
        counted.constants.prior,
        own,
        counted.nullable,
    )
    return TrainingSettings.of_fleet(spec, model_spec, run_id=run_id, cutoffs=counted.cutoffs)


def _data_digest(counted: CountedRows, shared: str) -> str:
    """Hash of all rows that are learnt from, and of what all groups share."""
    counts, as_of = counted.counts, counted.cutoffs.as_of
    pooled_hash = str(counts.loc[counts["grain"] == 0, "rows_hash"].iloc[0])
    return hashlib.sha256(f"{pooled_hash}\n{shared}\n{as_of}".encode()).hexdigest()


def _interrupted_run(
    open_runs: Sequence[RunManifest],
    request: Request,
    spec: FleetSpec,
    data_digest: str,
    previous_run_id: str | None,
) -> RunManifest | None:
    """The newest unfinished run that pinned the same as this launch would."""
    pinned = (request.text, spec.training_digest, data_digest, previous_run_id)
    for run in reversed(open_runs):
        if (run.request, run.spec_digest, run.data_digest, run.previous_run_id) == pinned:
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


def _policy(
    spec: FleetSpec, request: Request, as_of: pd.Timestamp, shared: str, own: str
) -> Policy:
    """Which groups the run trains again."""
    tuning = spec.tuning
    return Policy(
        retrain=request.retrain,
        listed=frozenset(request.listed),
        retune_after=Period.parse(tuning.retune_after),
        as_of=as_of,
        shared=shared,
        fit_rows=tuning.fit_rows,
        tune_rows=tuning.tune_rows,
        finest_only=spec.pooling == "none",
        corrects=own == CORRECTION,
        max_trials=_first_pass_trials(spec),
        recipes=request.recipes,
    )


def _cost_model(spec: FleetSpec) -> CostModel:
    """What a fleet's groups cost without any history."""
    n_trials = _first_pass_trials(spec) or spec.tuning.expected_trials
    return CostModel(n_features=len(spec.feature_columns), n_trials=n_trials)


def _first_pass_trials(spec: FleetSpec) -> int | None:
    """Trials per group of the first pass; None where the fleet has no budget of seconds."""
    if spec.tuning.budget_seconds is None:
        return None
    return FIRST_PASS_TRIALS
