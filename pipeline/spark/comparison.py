"""Challenger against champion on report rows: twins are fitted, and Spark adds up the losses."""

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
from pipeline.runs.sampling import sampling_exponents
from pipeline.spark.evaluation import (
    baseline_answer,
    baseline_answers,
    constant_column,
    judged_rows,
    nearest_predictions,
)
from pipeline.spark.judging import held_out_rows
from pipeline.spark.losses import Paired, compare_answers, in_target_units, level_answers, row_loss
from pipeline.spark.rows import limited_rows, visible_rows
from pipeline.spark.training import TrainingContext, train_aside
from pipeline.spec import MULTICLASS, FleetSpec
from pipeline.tables import BY_CONSTANT
from pipeline.training.blend import Constants
from pipeline.training.objective import learning_goal
from pipeline.training.splits import REPORT
from pipeline.training.trainer import TrainingSettings, fit_twin, train_group

# Seconds of one fit where the ledger knows none.
FIT_SECONDS = 0.2


@dataclass(frozen=True)
class Comparison:
    """A challenger, and who answers now.

    Args:
        run: the challenger's training run.
        challenger: that run, as it is compared.
        champions: the runs that answer now, by fleet version.
        serving: fleet version by group, as the champion answers now; empty where there is none.
        rolled_back: groups that were taken back from this challenger.
    """

    run: RunManifest
    challenger: ComparedRun
    champions: Mapping[str, ComparedRun]
    serving: Mapping[GroupKey, str]
    rolled_back: frozenset[GroupKey] = frozenset()

    @cached_property
    def kinds(self) -> dict[GroupKey, str]:
        """What each group of the challenger is, compared with what answers it now."""
        found = {}
        for key in self.challenger.groups:
            version = self.serving.get(key)
            found[key] = kind_of_change(
                key, None if version is None else self.champions[version], self.challenger
            )
        return found


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
    spark, kinds = context.spark, contest.kinds
    groups = contest.challenger.groups
    frame = pd.DataFrame(
        [(*key, groups[key]["parent_id"], kind) for key, kind in kinds.items()],
        columns=["grain", "group_id", "parent_id", "kind"],
    )
    frame["from_version"] = [contest.serving.get(key) for key in kinds]
    held_out = held_out_rows(spark, tables, groups.values())
    frame["answered_by"] = [groups[key].get("answered_by") for key in kinds]
    losses, fleet = pd.DataFrame(columns=["grain", "group_id", *_MEASURED]), pd.DataFrame()
    if held_out is not None:
        has_model = groups_with_model(groups.values(), len(spec.grains))
        judged = judged_rows(
            held_out, spec, contest.run.cutoffs, contest.run.constants, has_model
        ).where((sf.col("split") == REPORT) & sf.col("residual").isNotNull())
        rows = limited_rows(
            visible_rows(features, contest.run.cutoffs.as_of), spec, contest.run.limit_groups
        )
        twins = {
            version: fit_twins(context, tables, rows, spec, contest, side, held_out)
            for version, side in contest.champions.items()
            if _is_compared(version, kinds, contest)
        }
        judged = judged.join(baseline_answers(rows, spec), "row_key", "left").persist()
        try:
            losses, fleet = compare_runs(spark, judged, spec, contest, twins)
        finally:
            judged.unpersist()
    decided = decide(frame.merge(losses, on=["grain", "group_id"], how="left"), contest.rolled_back)
    to_version = decided["from_version"].where(
        ~decided["promoted"], contest.challenger.fleet_version
    )
    return Judgement(decided.assign(to_version=to_version), judge_rivals(fleet, rival_titles(spec)))


def _is_compared(version: str, kinds: Mapping[GroupKey, str], contest: Comparison) -> bool:
    """Whether some group that the version answers now is compared with the challenger."""
    return any(
        contest.serving.get(key) == version and kind not in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE)
        for key, kind in kinds.items()
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


def fit_twins(
    context: TrainingContext,
    tables: FleetTables,
    rows: DataFrame,
    spec: FleetSpec,
    contest: Comparison,
    side: ComparedRun,
    held_out: DataFrame,
) -> Twins:
    """Fit what answers now on the rows that the challenger's own twins were fitted on.

    Where recipes are the same there is nothing to fit.

    Args:
        context: where they are fitted.
        tables: of the fleet; nothing is committed to them.
        rows: the challenger's visible rows.
        spec: the fleet.
        contest: who is compared.
        side: the run whose recipes are fitted.
        held_out: the challenger's held-out rows.
    """
    known = contest.challenger.groups
    keys = {
        key
        for key in side.groups
        if key in known and side.recipe(key) not in (None, contest.challenger.recipe(key))
    }
    lacking = [name for name in side.model_spec.features if name not in rows.columns]
    if not keys or lacking:
        return Twins(frozenset(keys), None)

    def fit(chosen: Collection[GroupKey], bases: DataFrame | None = None) -> DataFrame:
        seen = twin_spec(spec, side.model_spec)
        settings = _twin_settings(seen, contest, side, context.threads)
        groups = _planned(seen, contest.challenger, side, sorted(chosen))
        twin_context = (
            context if context.train is not train_group else replace(context, train=fit_twin)
        )
        return train_aside(
            twin_context, tables, rows, seen, groups, settings, slots=context.slots, bases=bases
        )

    if not side.model_spec.corrects:
        return Twins(frozenset(keys), fit(keys))
    found: DataFrame | None = None
    for grain in range(len(spec.grains)):
        chosen = {key for key in keys if key[0] == grain}
        if not chosen:
            continue
        bases = None
        if grain:
            others = held_out.where(sf.col("grain") < grain)
            bases = nearest_predictions(
                others if found is None else _instead(context.spark, others, keys, found)
            )
        fitted = fit(chosen, bases)
        found = fitted if found is None else found.unionByName(fitted)
    return Twins(frozenset(keys), found)


def _instead(
    spark: SparkSession, held_out: DataFrame, keys: Collection[GroupKey], twins: DataFrame
) -> DataFrame:
    """Held-out rows in which twins have taken the place of their groups."""
    replaced = sf.broadcast(spark.createDataFrame(sorted(keys), "grain int, group_id string"))
    return held_out.join(replaced, ["grain", "group_id"], "left_anti").unionByName(twins)


def _twin_settings(
    spec: FleetSpec, contest: Comparison, side: ComparedRun, threads: int
) -> TrainingSettings:
    """What the twins of a run share: its model spec, the challenger's dates."""
    return TrainingSettings(
        run_id=contest.challenger.fleet_version,
        model_spec=side.model_spec,
        goal=learning_goal(spec, len(side.model_spec.classes)),
        target=spec.target.column,
        weight=spec.target.weight,
        tuning=spec.tuning,
        cutoffs=contest.run.cutoffs,
        threads=threads,
    )


def twin_spec(spec: FleetSpec, model_spec: ModelSpec) -> FleetSpec:
    """The fleet as a run with that model spec saw it.

    Its features are all columns of the feature table by now.
    """
    names, categories = model_spec.features, tuple(model_spec.categories)
    monotone = {name: sign for name, sign in spec.features.monotone.items() if name in names}
    features = spec.features.model_copy(
        update={
            "columns": tuple(name for name in names if name not in categories),
            "categoricals": categories,
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
    spec: FleetSpec, challenger: ComparedRun, side: ComparedRun, keys: Sequence[GroupKey]
) -> pd.DataFrame:
    """Some twins, as `train_aside` takes them."""
    rows = [challenger.groups[key] for key in keys]
    groups = pd.DataFrame(keys, columns=["grain", "group_id"])
    groups["started_from"] = [_refit(side.groups[key]) for key in keys]
    groups["cost_seconds"] = [_fit_seconds(row) for row in rows]
    n_target = np.array([int(row["n_target"] or 0) for row in rows], dtype=np.int64)
    groups["exponent"] = sampling_exponents(
        n_target,
        is_coarse=(groups["grain"] < len(spec.grains) - 1).to_numpy(),
        max_rows=spec.tuning.max_rows,
    )
    return groups


def _refit(row: Mapping[str, Any]) -> str:
    """How the recipe of a ledger row is fitted, as in a plan."""
    parameters = json.loads(row["parameters"])
    return Start(refit=parameters, n_rounds=int(row["n_rounds"])).to_json()


def _fit_seconds(row: Mapping[str, Any]) -> float:
    """About how long one fit takes."""
    n_fits = float(row["n_trials"] or 0.0) + 2
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
    versions, n_grains = list(twins), len(spec.grains)
    rows = judged
    for number, version in enumerate(versions):
        rows = _with_twins(rows, twins[version].holdout, number, n_grains)
    for grain in range(n_grains):
        weights = sf.broadcast(_weights_of(spark, grain, contest, versions, twins))
        rows = rows.join(weights, sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left")
    constant = constant_column(contest.run.constants, contest.challenger.model_spec.classes)
    ours = level_answers(
        _of_grains("p", n_grains), _of_grains("_c", n_grains), _of_grains("_k", n_grains), constant
    )
    theirs = _answers_now(spec, contest, versions, constant)

    def loss(answer: Column) -> Column:
        return row_loss(spec, in_target_units(spec, answer))

    contests = [
        Paired(
            grain, sf.col("group_ids")[grain], loss(ours[grain]), {CHAMPION: loss(theirs[grain])}
        )
        for grain in range(n_grains)
    ]
    rivals = {POOLED: loss(sf.coalesce(sf.col("p0"), constant)), CONSTANT: loss(constant)}
    for number in range(len(spec.all_baselines)):
        rivals[f"b{number}"] = row_loss(spec, baseline_answer(spec, number))
    whole = Paired(WHOLE_FLEET, sf.lit("[]"), loss(ours[-1]), rivals)
    found = compare_answers(rows, spec, [*contests, whole], contest.run.cutoffs.report_start)
    is_whole = found["grain"] == WHOLE_FLEET
    titles = {
        "loss": "loss_challenger",
        "loss_sum": "loss_sum_challenger",
        f"gain_{CHAMPION}": "gain",
        f"gain_error_{CHAMPION}": "gain_error",
    }
    groups = found[~is_whole].rename(columns=titles)
    return groups.reindex(columns=["grain", "group_id", *_MEASURED]), found[is_whole]


def _of_grains(name: str, n_grains: int) -> list[Column]:
    """One column per grain, from coarse to fine."""
    return [sf.col(f"{name}{grain}") for grain in range(n_grains)]


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
            fitted, same = sf.col(f"q{number}_{grain}"), sf.col(f"p{grain}")
            twin.append(sf.when(has_twin, fitted).otherwise(same))
        answers = level_answers(
            twin,
            _of_grains(f"_w{number}_", n_grains),
            _of_grains(f"_k{number}_", n_grains),
            _constant_of(contest.champions[version], spec, constant),
        )
        for grain, answer in enumerate(answers):
            is_theirs = sf.col(f"_v{grain}") == number
            theirs[grain] = sf.when(is_theirs, answer).otherwise(theirs[grain])
    return theirs


def rival_titles(spec: FleetSpec) -> dict[str, str]:
    """What people call each of the fleet's rivals, by its name in `compare_runs`.

    Where all is pooled there is no pooled model beside it.
    """
    titles = {POOLED: "its pooled model"} if len(spec.grains) > 1 and spec.pooling != "none" else {}
    baselines = {f"b{number}": title for number, title in enumerate(spec.all_baselines)}
    return {**titles, CONSTANT: "its constant", **baselines}


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


def _with_twins(
    rows: DataFrame, holdout: DataFrame | None, number: int, n_grains: int
) -> DataFrame:
    """What twins of each grain predict, beside every judged row, as q<number>_<grain>."""
    names = [f"q{number}_{grain}" for grain in range(n_grains)]
    if holdout is None:
        return rows.withColumns({name: sf.lit(None).cast("double") for name in names})
    wide = holdout.where(sf.col("split") == REPORT).groupBy(
        "row_key", sf.col("class_name").alias("_class")
    )
    predicted = wide.agg(
        *(
            sf.max(sf.when(sf.col("grain") == grain, sf.col("prediction"))).alias(name)
            for grain, name in enumerate(names)
        )
    )
    same = (rows["row_key"] == predicted["row_key"]) & rows["class_name"].eqNullSafe(
        predicted["_class"]
    )
    return rows.join(predicted, same, "left").drop(predicted["row_key"]).drop("_class")


def _weights_of(
    spark: SparkSession,
    grain: int,
    contest: Comparison,
    versions: Sequence[str],
    twins: Mapping[str, Twins],
) -> DataFrame:
    """What is known of each group of a grain.

    Its weight in the challenger (_c) and in each version (_w), null without a model; whether the
    constant answers it there (_k); whether its recipe there is another (_t); and the number of the
    version that answers it now (_v).
    """
    keys = sorted(
        {
            key
            for side in (contest.challenger, *contest.champions.values())
            for key in side.groups
            if key[0] == grain
        }
    )
    numbers = {version: number for number, version in enumerate(versions)}
    table = []
    for key in keys:
        row: list[Any] = [
            key[1],
            *_weight(contest.challenger, key),
            numbers.get(contest.serving.get(key, "")),
        ]
        for version in versions:
            row += [*_weight(contest.champions[version], key), key in twins[version].keys]
        table.append(row)
    columns = [f"_g{grain} string", f"_c{grain} double", f"_k{grain} boolean", f"_v{grain} int"]
    for number in range(len(versions)):
        columns += [
            f"_w{number}_{grain} double",
            f"_k{number}_{grain} boolean",
            f"_t{number}_{grain} boolean",
        ]
    return spark.createDataFrame(table, ", ".join(columns))


def _weight(side: ComparedRun, key: GroupKey) -> tuple[float | None, bool]:
    """A group's weight, and whether the constant answers it instead of its parent."""
    row = side.groups.get(key)
    if row is None:
        return None, False
    weight = None if row["booster_id"] is None else float(row["weight"] or 0.0)
    return weight, row.get("answered_by") == BY_CONSTANT


def _constant_of(side: ComparedRun, spec: FleetSpec, challenger: Column) -> Column:
    """What a run answers without any model; its classes' shares are those of its own rows."""
    if spec.task == MULTICLASS:
        return constant_column(
            Constants(0.0, 0.0, tuple(side.model_spec.prior)), side.model_spec.classes
        )
    constant = side.generation.constant
    return challenger if constant is None else sf.lit(float(constant))
