"""Challenger against champion on report rows: twins are fitted, and Spark adds up the losses.

A twin is a recipe of the champion, fitted on the challenger's rows.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey, ModelSpec
from pipeline.models.promotion import (
    NEW_GROUP,
    NOT_COMPARABLE,
    UNCHANGED,
    ComparedRun,
    Judgement,
    decide,
    judge_rivals,
    kind_of_change,
)
from pipeline.models.start import Start
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.ledger import groups_with_model
from pipeline.runs.manifest import RunManifest
from pipeline.runs.plan import REFITS
from pipeline.runs.sampling import sampling_exponents
from pipeline.spark.blending import (
    constant_column,
    grain_columns,
    grain_predictions,
    level_answers,
)
from pipeline.spark.evaluation import (
    baseline_answer,
    baseline_answers,
    baseline_names,
    judged_rows,
    nearest_predictions,
)
from pipeline.spark.judging import held_out_rows
from pipeline.spark.losses import Paired, answer_loss, compare_answers, row_loss
from pipeline.spark.rows import limited_rows, visible_rows
from pipeline.spark.training import TrainingContext, train_aside
from pipeline.spec import MULTICLASS, FleetSpec
from pipeline.tables import BY_CONSTANT
from pipeline.training.blend import Constants
from pipeline.training.splits import REPORT
from pipeline.training.trainer import TrainingSettings, fit_twin, train_group

# Seconds of one fit where the ledger has none.
FIT_SECONDS = 0.2
CHAMPION, POOLED, CONSTANT = "champion", "pooled", "constant"
# Stands where the index of a grain would.
WHOLE_FLEET = -1
_MEASURED = (
    "n_rows",
    "n_blocks",
    "loss_sum_champion",
    "loss_sum_challenger",
    "loss_champion",
    "loss_challenger",
    "gain",
    "gain_error",
)


@dataclass(frozen=True)
class Comparison:
    """A challenger, and who answers now.

    Args:
        run: the challenger's training run.
        challenger: that run, as it is compared.
        champions: the runs that answer now, by fleet version.
        serving: fleet version that answers each group now; empty where there is no champion.
        rolled_back: groups that a person took back from this challenger.
    """

    run: RunManifest
    challenger: ComparedRun
    champions: Mapping[str, ComparedRun]
    serving: Mapping[GroupKey, str]
    rolled_back: frozenset[GroupKey] = frozenset()

    @cached_property
    def kinds(self) -> dict[GroupKey, str]:
        """What each group of the challenger is, compared with what answers it now."""
        kinds = {}
        for key in self.challenger.groups:
            champion = None
            if key in self.serving:
                champion = self.champions[self.serving[key]]
            kinds[key] = kind_of_change(key, champion, self.challenger)
        return kinds


def judge(
    context: TrainingContext,
    tables: FleetTables,
    features: DataFrame,
    spec: FleetSpec,
    contest: Comparison,
) -> Judgement:
    """Compare every group of a challenger with what answers it now, and decide.

    Args:
        context: where twins are fitted.
        tables: of the fleet.
        features: the version of the feature table that the challenger was trained on.
        spec: the fleet.
        contest: who is compared.
    """
    held_out = held_out_rows(context.spark, tables, contest.challenger.groups.values())
    losses = pd.DataFrame(columns=["grain", "group_id", *_MEASURED])
    fleet = pd.DataFrame()
    if held_out is not None:
        losses, fleet = _measure_losses(context, tables, features, spec, contest, held_out)
    groups = _groups_to_decide(contest).merge(losses, on=["grain", "group_id"], how="left")
    decided = decide(groups, contest.rolled_back)
    to_version = decided["from_version"].where(
        ~decided["promoted"], contest.challenger.fleet_version
    )
    return Judgement(decided.assign(to_version=to_version), judge_rivals(fleet, rival_titles(spec)))


def _groups_to_decide(contest: Comparison) -> pd.DataFrame:
    """One row per group of the challenger, still without losses."""
    columns = ["grain", "group_id", "parent_id", "kind", "from_version", "answered_by"]
    table = []
    for key, kind in contest.kinds.items():
        row = contest.challenger.groups[key]
        table.append(
            (*key, row["parent_id"], kind, contest.serving.get(key), row.get("answered_by"))
        )
    return pd.DataFrame(table, columns=columns)


def _measure_losses(
    context: TrainingContext,
    tables: FleetTables,
    features: DataFrame,
    spec: FleetSpec,
    contest: Comparison,
    held_out: DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Losses per group and of the whole fleet, as from `compare_runs`, once twins are fitted."""
    run = contest.run
    has_model = groups_with_model(contest.challenger.groups.values(), len(spec.grains))
    judged = judged_rows(held_out, spec, run.cutoffs, has_model)
    judged = judged.where((sf.col("split") == REPORT) & sf.col("residual").isNotNull())
    rows = limited_rows(visible_rows(features, run.cutoffs.as_of), spec, run.limit_groups)
    fitting = _TwinFitting(context, tables, spec, contest, rows, held_out)
    twins = {}
    for version, champion in contest.champions.items():
        if _is_compared(version, contest):
            twins[version] = fitting.fit(champion)
    judged = judged.join(baseline_answers(rows, spec), "row_key", "left").persist()
    try:
        return compare_runs(context.spark, judged, spec, contest, twins)
    finally:
        judged.unpersist()


def _is_compared(version: str, contest: Comparison) -> bool:
    """Whether some group that the version answers now is compared with the challenger."""
    return any(
        contest.serving.get(key) == version and kind not in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE)
        for key, kind in contest.kinds.items()
    )


@dataclass(frozen=True)
class Twins:
    """Recipes of one run, fitted on the challenger's fit and tune rows.

    Args:
        keys: groups whose recipe is not the challenger's.
        holdout: what they predict of the report rows, as in `tables.HOLDOUT`; None where there are
            none.
    """

    keys: frozenset[GroupKey]
    holdout: DataFrame | None


@dataclass(frozen=True)
class _TwinFitting:
    """Fits what answers now on the rows that the challenger's own twins were fitted on.

    Args:
        context: where twins are fitted.
        tables: of the fleet; nothing is committed to them.
        spec: the fleet.
        contest: who is compared.
        rows: the challenger's visible rows.
        held_out: the challenger's held-out rows.
    """

    context: TrainingContext
    tables: FleetTables
    spec: FleetSpec
    contest: Comparison
    rows: DataFrame
    held_out: DataFrame

    def fit(self, champion: ComparedRun) -> Twins:
        """Fit a run's recipes where they are not the challenger's.

        There are no twins where the feature table lacks a feature of the run.
        """
        keys = self._changed_groups(champion)
        lacking = set(champion.model_spec.features).difference(self.rows.columns)
        if not keys or lacking:
            return Twins(keys, None)
        if champion.model_spec.corrects:
            return Twins(keys, self._fit_by_grain(champion, keys))
        return Twins(keys, self._fit_groups(champion, keys))

    def _changed_groups(self, champion: ComparedRun) -> frozenset[GroupKey]:
        """The groups of both runs whose recipe in the one is not that in the other."""
        challenger = self.contest.challenger
        keys = set()
        for key in champion.groups.keys() & challenger.groups.keys():
            recipe = champion.recipe(key)
            if recipe is not None and recipe != challenger.recipe(key):
                keys.add(key)
        return frozenset(keys)

    def _fit_by_grain(self, champion: ComparedRun, keys: Collection[GroupKey]) -> DataFrame | None:
        """Fit twins from coarse to fine, as each corrects the predictions above it."""
        fitted: DataFrame | None = None
        for grain in range(len(self.spec.grains)):
            of_grain = [key for key in keys if key.grain == grain]
            if not of_grain:
                continue
            bases = None
            if grain:
                coarser = self.held_out.where(sf.col("grain") < grain)
                if fitted is not None:
                    coarser = _instead(self.context.spark, coarser, keys, fitted)
                bases = nearest_predictions(coarser)
            twins = self._fit_groups(champion, of_grain, bases)
            if fitted is None:
                fitted = twins
            else:
                fitted = fitted.unionByName(twins)
        return fitted

    def _fit_groups(
        self, champion: ComparedRun, keys: Collection[GroupKey], bases: DataFrame | None = None
    ) -> DataFrame:
        """What the twins of some groups predict of their held-out rows."""
        context = self.context
        if context.train is train_group:
            context = replace(context, train=fit_twin)
        spec = twin_spec(self.spec, champion.model_spec)
        settings = _twin_settings(spec, self.contest, champion)
        groups = _planned(spec, self.contest.challenger, champion, sorted(keys))
        return train_aside(context, self.tables, self.rows, spec, groups, settings, bases)


def _instead(
    spark: SparkSession, held_out: DataFrame, keys: Collection[GroupKey], twins: DataFrame
) -> DataFrame:
    """Held-out rows, for groups that have a twin those of the twin."""
    replaced = sf.broadcast(spark.createDataFrame(sorted(keys), "grain int, group_id string"))
    return held_out.join(replaced, ["grain", "group_id"], "left_anti").unionByName(twins)


def _twin_settings(spec: FleetSpec, contest: Comparison, champion: ComparedRun) -> TrainingSettings:
    """What the twins of a run share: its own model spec, and the challenger's dates."""
    return TrainingSettings.of_fleet(
        spec,
        champion.model_spec,
        run_id=contest.challenger.fleet_version,
        cutoffs=contest.run.cutoffs,
    )


def twin_spec(spec: FleetSpec, model_spec: ModelSpec) -> FleetSpec:
    """The fleet as a run with that model spec saw it.

    All its features are columns of the feature table, so that none is left to be computed.
    """
    names = model_spec.features
    numeric = tuple(name for name in names if name not in model_spec.categories)
    monotone = {name: sign for name, sign in spec.features.monotone.items() if name in names}
    features = spec.features.model_copy(
        update={
            "columns": numeric,
            "categoricals": tuple(model_spec.categories),
            "lags": (),
            "rolling": (),
            "derived": {},
            "calendar": (),
            "exclude": (),
            "monotone": monotone,
        }
    )
    return spec.model_copy(update={"features": features, "baselines": {}})


def _planned(
    spec: FleetSpec, challenger: ComparedRun, champion: ComparedRun, keys: Sequence[GroupKey]
) -> pd.DataFrame:
    """Some twins, as `train_aside` takes them."""
    table = []
    for key in keys:
        row = challenger.groups[key]
        start = _refit(champion.groups[key])
        table.append((*key, start, _fit_seconds(row), int(row["n_target"] or 0)))
    columns = ["grain", "group_id", "started_from", "cost_seconds", "n_target"]
    groups = pd.DataFrame(table, columns=columns)
    groups["exponent"] = sampling_exponents(
        groups.pop("n_target").to_numpy(dtype=np.int64),
        is_coarse=(groups["grain"] < len(spec.grains) - 1).to_numpy(),
        max_rows=spec.tuning.max_rows,
    )
    return groups


def _refit(row: Mapping[str, Any]) -> str:
    """The start that fits the recipe of a ledger row once more, as a plan has it."""
    parameters = json.loads(row["parameters"])
    return Start(refit=parameters, n_rounds=int(row["n_rounds"])).to_json()


def _fit_seconds(row: Mapping[str, Any]) -> float:
    """About how long one fit takes."""
    n_fits = float(row["n_trials"] or 0.0) + REFITS
    return float(row["seconds"] or 0.0) / n_fits or FIT_SECONDS


def compare_runs(
    spark: SparkSession,
    judged: DataFrame,
    spec: FleetSpec,
    contest: Comparison,
    twins: Mapping[str, Twins],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Losses of challenger and champion per group, and of the whole fleet beside its rivals.

    Args:
        spark: the session.
        judged: report rows, as from `evaluation.judged_rows`, with the baselines' answers as from
            `evaluation.baseline_answers`.
        spec: the fleet.
        contest: who is compared.
        twins: of the runs that are compared, by fleet version.

    Returns:
        One row per group with report rows: grain, group_id, n_rows, n_blocks, loss_champion and
        loss_challenger (weighted means, in the loss that the fleet learns by), loss_sum_champion
        and loss_sum_challenger, gain (champion's mean loss less the challenger's) and gain_error;
        null where nothing answers now. And one row, as from `losses.compare_answers`, of the
        challenger beside `rival_titles`.
    """
    n_grains = len(spec.grains)
    rows = judged
    for number, fitted in enumerate(twins.values()):
        rows = _with_twins(rows, fitted.holdout, number, n_grains)
    for grain in range(n_grains):
        weights = sf.broadcast(_weights_of(spark, grain, contest, twins))
        rows = rows.join(weights, sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left")
    constant = constant_column(contest.run.constants, contest.challenger.model_spec.classes)
    ours = level_answers(
        grain_columns("p", n_grains),
        grain_columns("_c", n_grains),
        grain_columns("_k", n_grains),
        constant,
    )
    theirs = _answers_now(spec, contest, list(twins), constant)
    contests = _contests(spec, ours, theirs, constant)
    measured = compare_answers(rows, spec, contests, contest.run.cutoffs.report_start)
    is_whole = measured["grain"] == WHOLE_FLEET
    titles = {
        "loss": "loss_challenger",
        "loss_sum": "loss_sum_challenger",
        f"gain_{CHAMPION}": "gain",
        f"gain_error_{CHAMPION}": "gain_error",
    }
    groups = measured[~is_whole].rename(columns=titles)
    return groups.reindex(columns=["grain", "group_id", *_MEASURED]), measured[is_whole]


def _contests(
    spec: FleetSpec, ours: Sequence[Column], theirs: Sequence[Column], constant: Column
) -> list[Paired]:
    """The challenger's answer to a row, in each grain beside the champion's, and beside rivals.

    Args:
        spec: the fleet.
        ours: the challenger's answer of each grain.
        theirs: what answers there now.
        constant: the challenger's constant.
    """
    contests = []
    for grain, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        group = sf.col("group_ids")[grain]
        rival = {CHAMPION: answer_loss(spec, their)}
        contests.append(Paired(grain, group, answer_loss(spec, our), rival))
    pooled = sf.coalesce(sf.col("p0"), constant)
    rivals = {POOLED: answer_loss(spec, pooled), CONSTANT: answer_loss(spec, constant)}
    for number, name in enumerate(baseline_names(spec).values()):
        rivals[name] = row_loss(spec, baseline_answer(spec, number))
    contests.append(Paired(WHOLE_FLEET, sf.lit("[]"), answer_loss(spec, ours[-1]), rivals))
    return contests


def _answers_now(
    spec: FleetSpec, contest: Comparison, versions: Sequence[str], constant: Column
) -> list[Column]:
    """Per grain the answer of the version that answers the row's group now, null without one."""
    n_grains = len(spec.grains)
    theirs: list[Column] = [sf.lit(None).cast("double")] * n_grains
    for number, version in enumerate(versions):
        twin = []
        for grain in range(n_grains):
            has_twin = sf.col(f"_t{number}_{grain}")
            fitted = sf.col(f"q{number}_{grain}")
            same = sf.col(f"p{grain}")
            twin.append(sf.when(has_twin, fitted).otherwise(same))
        answers = level_answers(
            twin,
            grain_columns(f"_w{number}_", n_grains),
            grain_columns(f"_k{number}_", n_grains),
            _constant_of(contest.champions[version], spec, constant),
        )
        for grain, answer in enumerate(answers):
            is_theirs = sf.col(f"_v{grain}") == number
            theirs[grain] = sf.when(is_theirs, answer).otherwise(theirs[grain])
    return theirs


def rival_titles(spec: FleetSpec) -> dict[str, str]:
    """What people call each of the fleet's rivals, by its name in `compare_runs`.

    A fleet that is pooled as a whole has no pooled model beside its own.
    """
    titles = {}
    if len(spec.grains) > 1 and spec.pooling != "none":
        titles[POOLED] = "its pooled model"
    titles[CONSTANT] = "its constant"
    baselines = {name: title for title, name in baseline_names(spec).items()}
    return {**titles, **baselines}


def _with_twins(
    rows: DataFrame, holdout: DataFrame | None, number: int, n_grains: int
) -> DataFrame:
    """Every judged row with the predictions of each grain's twins, as q<number>_<grain>."""
    if holdout is None:
        names = [f"q{number}_{grain}" for grain in range(n_grains)]
        return rows.withColumns(dict.fromkeys(names, sf.lit(None).cast("double")))
    of_rows = holdout.where(sf.col("split") == REPORT).groupBy(
        "row_key", sf.col("class_name").alias("_class")
    )
    predicted = of_rows.agg(*grain_predictions(f"q{number}_", n_grains))
    same = (rows["row_key"] == predicted["row_key"]) & rows["class_name"].eqNullSafe(
        predicted["_class"]
    )
    return rows.join(predicted, same, "left").drop(predicted["row_key"]).drop("_class")


def _weights_of(
    spark: SparkSession, grain: int, contest: Comparison, twins: Mapping[str, Twins]
) -> DataFrame:
    """What the runs say of each group of a grain.

    Its weight in the challenger (_c) and in each version (_w), null without a model; whether the
    constant answers it there (_k); whether its recipe there is another (_t); and the number of the
    version that answers it now (_v).
    """
    keys: set[GroupKey] = set()
    for run in (contest.challenger, *contest.champions.values()):
        keys.update(key for key in run.groups if key.grain == grain)
    numbers = {version: number for number, version in enumerate(twins)}
    table = []
    for key in sorted(keys):
        serving = numbers.get(contest.serving.get(key, ""))
        row: list[Any] = [key.group_id, *_weight(contest.challenger, key), serving]
        for version, fitted in twins.items():
            row += [*_weight(contest.champions[version], key), key in fitted.keys]
        table.append(row)
    columns = [f"_g{grain} string", f"_c{grain} double", f"_k{grain} boolean", f"_v{grain} int"]
    for number in range(len(twins)):
        columns += [
            f"_w{number}_{grain} double",
            f"_k{number}_{grain} boolean",
            f"_t{number}_{grain} boolean",
        ]
    return spark.createDataFrame(table, ", ".join(columns))


def _weight(run: ComparedRun, key: GroupKey) -> tuple[float | None, bool]:
    """A group's weight in a run, and whether the constant answers it instead of its parent."""
    row = run.groups.get(key)
    if row is None:
        return None, False
    weight = None
    if row["booster_id"] is not None:
        weight = float(row["weight"] or 0.0)
    return weight, row.get("answered_by") == BY_CONSTANT


def _constant_of(champion: ComparedRun, spec: FleetSpec, challenger: Column) -> Column:
    """What a run answers without any model; its classes' shares are those of its own rows.

    Where the run does not say, as the challenger does.
    """
    model_spec = champion.model_spec
    if spec.task == MULTICLASS:
        constants = Constants(0.0, 0.0, tuple(model_spec.prior))
        return constant_column(constants, model_spec.classes)
    constant = champion.generation.constant
    if constant is None:
        return challenger
    return sf.lit(float(constant))
