"""Challenger against champion on the report rows: twins are fitted, and every group's losses are added up by Spark."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
    Judgement,
    Side,
    decide,
    judge_rivals,
    kind_of_change,
)
from pipeline.models.start import Start
from pipeline.runs.sampling import sampling_exponents
from pipeline.spark.evaluation import baseline_answer, baseline_answers, constant_column, judged_rows, nearest_predictions
from pipeline.spark.fleet_training import Cluster, groups_with_model, held_out_rows, train_aside
from pipeline.spark.losses import Paired, compare_answers, in_target_units, level_answers, row_loss
from pipeline.spark.training import limited_rows, visible_rows
from pipeline.spec import MULTICLASS, FleetSpec
from pipeline.storage import Tables
from pipeline.tables import BY_CONSTANT, HOLDOUT
from pipeline.training.blend import Constants
from pipeline.training.objective import learning_goal
from pipeline.training.splits import REPORT, Cutoffs
from pipeline.training.trainer import TrainingSettings, fit_twin

# Seconds of one fit where the ledger knows none.
FIT_SECONDS = 0.2


@dataclass(frozen=True)
class Contest:
    """A challenger, and who answers now.

    Args:
        run: the challenger's row of `tables.RUNS`, by column.
        challenger: its side.
        champions: the sides of the runs that answer now, by fleet version.
        serving: fleet version by group, as the champion answers now; empty where there is none.
        rolled_back: groups that were taken back from this challenger.
    """

    run: Mapping[Any, Any]
    challenger: Side
    champions: Mapping[str, Side]
    serving: Mapping[GroupKey, str]
    rolled_back: frozenset[GroupKey] = frozenset()

    @property
    def cutoffs(self) -> Cutoffs:
        """The challenger's dates."""
        return Cutoffs(*(_naive(self.run[name]) for name in ("as_of", "tune_start", "report_start")))

    @property
    def constants(self) -> Constants:
        """What the challenger answers without any model."""
        found = (
            0.0 if self.run[name] is None or pd.isna(self.run[name]) else float(self.run[name]) for name in ("constant", "constant_without_offset")
        )
        with_offset, without_offset = found
        return Constants(with_offset, without_offset, self.challenger.model_spec.prior)

    def kinds(self) -> dict[GroupKey, str]:
        """What each group of the challenger is, compared with what answers it now."""
        found = {}
        for key in self.challenger.groups:
            version = self.serving.get(key)
            found[key] = kind_of_change(key, None if version is None else self.champions[version], self.challenger)
        return found


def judge(
    cluster: Cluster, tables: Tables, namespace: str, features: DataFrame, spec: FleetSpec, contest: Contest, slots: int, threads: int
) -> Judgement:
    """Compare every group of a challenger with what answers it now, and decide.

    Args:
        cluster: where twins are fitted.
        tables: where the fleet's tables are.
        namespace: of the tables.
        features: the version of the feature table that the challenger was trained on.
        spec: the fleet.
        contest: who is compared.
        slots: tasks that run at once.
        threads: LightGBM's, per task.
    """
    spark, kinds = cluster.spark, contest.kinds()
    groups = contest.challenger.groups
    frame = pd.DataFrame([(*key, groups[key]["parent_id"], kind) for key, kind in kinds.items()], columns=["grain", "group_id", "parent_id", "kind"])
    frame["from_version"] = [contest.serving.get(key) for key in kinds]
    held_out = held_out_rows(spark, tables, tables.location(namespace, HOLDOUT.name), groups.values())
    frame["answered_by"] = [groups[key].get("answered_by") for key in kinds]
    losses, fleet = pd.DataFrame(columns=["grain", "group_id", *_MEASURED]), pd.DataFrame()
    if held_out is not None:
        has_model = groups_with_model(groups.values(), len(spec.grains))
        judged = judged_rows(held_out, spec, contest.cutoffs, contest.constants, has_model).where(
            (sf.col("split") == REPORT) & sf.col("residual").isNotNull()
        )
        rows = limited_rows(visible_rows(features, contest.cutoffs.as_of), spec, json.loads(contest.run["request"])["limit_groups"])
        twins = {
            version: fit_twins(_Workshop(cluster, tables, namespace, rows, spec, contest, slots, threads), side, held_out)
            for version, side in contest.champions.items()
            if _is_compared(version, kinds, contest)
        }
        judged = judged.join(baseline_answers(rows, spec), "row_key", "left").persist()
        try:
            losses, fleet = compare_runs(spark, judged, spec, contest, twins)
        finally:
            judged.unpersist()
    decided = decide(frame.merge(losses, on=["grain", "group_id"], how="left"), contest.rolled_back)
    to_version = decided["from_version"].where(~decided["promoted"], contest.challenger.fleet_version)
    return Judgement(decided.assign(to_version=to_version), judge_rivals(fleet, rival_titles(spec)))


def _is_compared(version: str, kinds: Mapping[GroupKey, str], contest: Contest) -> bool:
    """Whether some group that the version answers now is compared with the challenger."""
    return any(contest.serving.get(key) == version and kind not in (UNCHANGED, NEW_GROUP, NOT_COMPARABLE) for key, kind in kinds.items())


@dataclass(frozen=True)
class _Workshop:
    """What fitting twins takes."""

    cluster: Cluster
    tables: Tables
    namespace: str
    rows: DataFrame
    spec: FleetSpec
    contest: Contest
    slots: int
    threads: int


@dataclass(frozen=True)
class Twins:
    """Recipes of one run, fitted on the challenger's fit and tune rows.

    Args:
        keys: groups whose recipe is not the challenger's.
        holdout: what they predict of the report rows, as in `tables.HOLDOUT`; None where there are none.
    """

    keys: frozenset[GroupKey]
    holdout: DataFrame | None


def fit_twins(shop: _Workshop, side: Side, held_out: DataFrame) -> Twins:
    """Fit what answers now on the rows that the challenger's own twins were fitted on; where recipes are the same there is nothing to fit."""
    there = set(shop.contest.challenger.groups)
    keys = {key for key in side.groups if key in there and side.recipe(key) not in (None, shop.contest.challenger.recipe(key))}
    lacking = [name for name in side.model_spec.features if name not in shop.rows.columns]
    if not keys or lacking:
        return Twins(frozenset(keys), None)
    corrects = side.model_spec.corrects
    found: DataFrame | None = None
    for chosen in [{key for key in keys if key[0] == grain} for grain in range(len(shop.spec.grains))] if corrects else [keys]:
        if not chosen:
            continue
        bases = None
        if corrects and min(chosen)[0]:
            others = held_out.where(sf.col("grain") < min(chosen)[0])
            bases = nearest_predictions(others if found is None else _instead(shop.cluster.spark, others, keys, found))
        fitted = _fitted(shop, side, chosen, bases)
        found = fitted if found is None else found.unionByName(fitted)
    return Twins(frozenset(keys), found)


def _instead(spark: SparkSession, held_out: DataFrame, keys: Collection[GroupKey], twins: DataFrame) -> DataFrame:
    """Held-out rows in which twins have taken the place of their groups."""
    replaced = sf.broadcast(spark.createDataFrame(sorted(keys), "grain int, group_id string"))
    return held_out.join(replaced, ["grain", "group_id"], "left_anti").unionByName(twins)


def _fitted(shop: _Workshop, side: Side, keys: Collection[GroupKey], bases: DataFrame | None) -> DataFrame:
    """The held-out rows of some twins; one Spark job."""
    spec, contest = twin_spec(shop.spec, side.model_spec), shop.contest
    groups = _planned(spec, contest.challenger, side, sorted(keys))
    settings = TrainingSettings(
        run_id=contest.challenger.fleet_version,
        model_spec=side.model_spec,
        goal=learning_goal(spec, len(side.model_spec.classes)),
        target=spec.target.column,
        weight=spec.target.weight,
        tuning=spec.tuning,
        cutoffs=contest.cutoffs,
        threads=shop.threads,
    )
    cluster = replace(shop.cluster, train=shop.cluster.train or fit_twin)
    return train_aside(cluster, shop.tables, shop.namespace, shop.rows, spec, groups, settings, slots=shop.slots, bases=bases)


def twin_spec(spec: FleetSpec, model_spec: ModelSpec) -> FleetSpec:
    """The fleet as a run with that model spec saw it: its features, all of them columns of the feature table by now."""
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


def _planned(spec: FleetSpec, challenger: Side, side: Side, keys: Sequence[GroupKey]) -> pd.DataFrame:
    """Some twins, as `train_aside` takes them."""
    rows = [challenger.groups[key] for key in keys]
    groups = pd.DataFrame(keys, columns=["grain", "group_id"])
    groups["started_from"] = [
        Start(refit=json.loads(side.groups[key]["parameters"]), n_rounds=int(side.groups[key]["n_rounds"])).to_json() for key in keys
    ]
    groups["cost_seconds"] = [float(row["seconds"] or 0.0) / (float(row["n_trials"] or 0.0) + 2) or FIT_SECONDS for row in rows]
    n_target = np.array([int(row["n_target"] or 0) for row in rows], dtype=np.int64)
    groups["exponent"] = sampling_exponents(n_target, is_coarse=(groups["grain"] < len(spec.grains) - 1).to_numpy(), max_rows=spec.tuning.max_rows)
    return groups


def compare_runs(
    spark: SparkSession, judged: DataFrame, spec: FleetSpec, contest: Contest, twins: Mapping[str, Twins]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every group's losses on report rows, of the challenger and of what answers now, and the whole fleet's beside its rivals'.

    Args:
        spark: the session.
        judged: report rows, as from `evaluation.judged_rows`, with the baselines' answers as from `evaluation.baseline_answers`.
        spec: the fleet.
        contest: who is compared.
        twins: of the runs that are compared, by fleet version.

    Returns:
        One row per group with report rows: grain, group_id, n_rows, n_blocks, loss_champion and loss_challenger (weighted means, in the
        loss that the fleet learns by), loss_sum_champion and loss_sum_challenger, gain (champion's mean loss less the challenger's) and
        gain_error; null where nothing answers now. And one row, as from `losses.compare_answers`, of the challenger beside `rival_titles`.
    """
    versions = list(twins)
    n_grains = len(spec.grains)
    rows = judged
    for number, version in enumerate(versions):
        rows = _with_twins(rows, twins[version].holdout, number, n_grains)
    for grain in range(n_grains):
        rows = rows.join(
            sf.broadcast(_weights_of(spark, grain, contest, versions, twins)), sf.col("group_ids")[grain] == sf.col(f"_g{grain}"), "left"
        )
    grains = range(n_grains)
    constant = constant_column(contest.constants, contest.challenger.model_spec.classes)
    own, weights, is_cut = ([sf.col(f"{part}{grain}") for grain in grains] for part in ("p", "_c", "_k"))
    ours = level_answers(own, weights, is_cut, constant)
    theirs: list[Column] = [sf.lit(None).cast("double")] * n_grains
    for number, version in enumerate(versions):
        twin = [sf.when(sf.col(f"_t{number}_{grain}"), sf.col(f"q{number}_{grain}")).otherwise(sf.col(f"p{grain}")) for grain in grains]
        weights, is_cut = ([sf.col(f"{part}{number}_{grain}") for grain in grains] for part in ("_w", "_k"))
        answers = level_answers(twin, weights, is_cut, _constant_of(contest.champions[version], spec, constant))
        theirs = [
            sf.when(sf.col(f"_v{grain}") == number, answer).otherwise(before)
            for grain, (answer, before) in enumerate(zip(answers, theirs, strict=True))
        ]

    def loss(answer: Column) -> Column:
        return row_loss(spec, in_target_units(spec, answer))

    contests = [Paired(grain, sf.col("group_ids")[grain], loss(ours[grain]), {CHAMPION: loss(theirs[grain])}) for grain in grains]
    rivals = {POOLED: loss(sf.coalesce(sf.col("p0"), constant)), CONSTANT: loss(constant)}
    for number in range(len(spec.all_baselines)):
        rivals[f"b{number}"] = row_loss(spec, baseline_answer(spec, number))
    whole = Paired(WHOLE_FLEET, sf.lit("[]"), loss(ours[-1]), rivals)
    found = compare_answers(rows, spec, [*contests, whole], contest.cutoffs.report_start)
    is_whole = found["grain"] == WHOLE_FLEET
    titles = {"loss": "loss_challenger", "loss_sum": "loss_sum_challenger", f"gain_{CHAMPION}": "gain", f"gain_error_{CHAMPION}": "gain_error"}
    groups = found[~is_whole].rename(columns=titles)
    return groups.reindex(columns=["grain", "group_id", *_MEASURED]), found[is_whole]


def rival_titles(spec: FleetSpec) -> dict[str, str]:
    """What people call each of the fleet's rivals, by its name in `compare_runs`; where all is pooled there is no pooled model beside it."""
    titles = {POOLED: "its pooled model"} if len(spec.grains) > 1 and spec.pooling != "none" else {}
    baselines = {f"b{number}": title for number, title in enumerate(spec.all_baselines)}
    return {**titles, CONSTANT: "its constant", **baselines}


CHAMPION, POOLED, CONSTANT = "champion", "pooled", "constant"
# Stands where the index of a grain would.
WHOLE_FLEET = -1
_MEASURED = ("n_rows", "n_blocks", "loss_sum_champion", "loss_sum_challenger", "loss_champion", "loss_challenger", "gain", "gain_error")


def _with_twins(rows: DataFrame, holdout: DataFrame | None, number: int, n_grains: int) -> DataFrame:
    """What twins of each grain predict, beside every judged row, as q<number>_<grain>."""
    names = [f"q{number}_{grain}" for grain in range(n_grains)]
    if holdout is None:
        return rows.withColumns({name: sf.lit(None).cast("double") for name in names})
    wide = holdout.where(sf.col("split") == REPORT).groupBy("row_key", sf.col("class_name").alias("_class"))
    predicted = wide.agg(*(sf.max(sf.when(sf.col("grain") == grain, sf.col("prediction"))).alias(name) for grain, name in enumerate(names)))
    same = (rows["row_key"] == predicted["row_key"]) & rows["class_name"].eqNullSafe(predicted["_class"])
    return rows.join(predicted, same, "left").drop(predicted["row_key"]).drop("_class")


def _weights_of(spark: SparkSession, grain: int, contest: Contest, versions: Sequence[str], twins: Mapping[str, Twins]) -> DataFrame:
    """What is known of each group of a grain.

    Its weight in the challenger (_c) and in each version (_w), null without a model; whether the constant answers it there (_k); whether its
    recipe there is another (_t); and the number of the version that answers it now (_v).
    """
    keys = sorted({key for side in (contest.challenger, *contest.champions.values()) for key in side.groups if key[0] == grain})
    numbers = {version: number for number, version in enumerate(versions)}
    table = []
    for key in keys:
        row: list[Any] = [key[1], *_weight(contest.challenger, key), numbers.get(contest.serving.get(key, ""))]
        for version in versions:
            row += [*_weight(contest.champions[version], key), key in twins[version].keys]
        table.append(row)
    columns = [f"_g{grain} string", f"_c{grain} double", f"_k{grain} boolean", f"_v{grain} int"]
    for number in range(len(versions)):
        columns += [f"_w{number}_{grain} double", f"_k{number}_{grain} boolean", f"_t{number}_{grain} boolean"]
    return spark.createDataFrame(table, ", ".join(columns))


def _weight(side: Side, key: GroupKey) -> tuple[float | None, bool]:
    """The weight of a group's own model, and whether the constant answers the group instead of its parent."""
    row = side.groups.get(key)
    if row is None:
        return None, False
    weight = None if row["booster_id"] is None else float(row["weight"] or 0.0)
    return weight, row.get("answered_by") == BY_CONSTANT


def _constant_of(side: Side, spec: FleetSpec, challenger: Column) -> Column:
    """What a run answers without any model; its classes' shares are those of its own rows."""
    if spec.task == MULTICLASS:
        return constant_column(Constants(0.0, 0.0, side.model_spec.prior), side.model_spec.classes)
    constant = side.generation.constant
    return challenger if constant is None else sf.lit(constant)


def _naive(moment: Any) -> pd.Timestamp:
    found = pd.Timestamp(moment)
    return found.tz_convert("UTC").tz_localize(None) if found.tzinfo else found
