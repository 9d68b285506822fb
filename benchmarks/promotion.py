"""Promotion: how often a group is moved to a new recipe that is not better, and how often to one that is."""

from collections.abc import Mapping

import pandas as pd

from benchmarks.engine import Engine, Training
from benchmarks.generated import GeneratedFleet
from benchmarks.runs import NotMeasured, Runs
from pipeline.models.promotion import NEW_RECIPE, ComparedRun, Judgement
from pipeline.runs.manifest import RunManifest
from pipeline.spark.comparison import Comparison, judge
from pipeline.spec import FleetSpec
from pipeline.testing.runs import own_tables, quiet_context

REPEATS = 20
# Share of a fleet's groups that must be tested: where both recipes happen to give the same booster,
# there is nothing to test.
TESTED = 0.8
UNCHANGED_GROUPS, IMPROVED_GROUPS = 200, 40
# Of a group's rows 15 % are report rows: 75, and 1,000.
ROWS, MANY_ROWS = 500, 6_667
COMMON = {"learning_rate": 0.1, "min_data_in_leaf": 20}
# Two recipes of which neither is better.
EVEN = ({**COMMON, "num_leaves": 15}, {**COMMON, "num_leaves": 16})
# Leaves of the first must hold so many of 5,700 rows that it cannot follow the effects to where
# they level off; its error is about a tenth larger.
WORSE, BETTER = (
    {"learning_rate": 0.1, "num_leaves": 3, "min_data_in_leaf": rows} for rows in (1_300, 20)
)


def false_promotions(
    runs: Runs, repeats: int = REPEATS, n_groups: int = UNCHANGED_GROUPS
) -> Mapping[str, float]:
    """Share of groups that are moved to a recipe that differs and is not better, over repeats with other data."""
    found = []
    with Engine(runs.new_folder()) as engine:
        for repeat in range(repeats):
            fleet = GeneratedFleet(n_groups, rows_per_group=ROWS, seed=repeat)
            judged = _contest(engine, f"even-{repeat}", fleet, *EVEN)
            found.append(_finest(judged))
    groups = pd.concat(found)
    return {
        "": groups["promoted"].mean(),
        "groups": len(groups),
        "loss-ratio": groups["loss_challenger"].sum() / groups["loss_champion"].sum(),
    }


def true_promotions(runs: Runs, n_groups: int = IMPROVED_GROUPS) -> Mapping[str, float]:
    """Share of groups that are moved to a recipe whose error is a tenth lower, on 1,000 report rows each."""
    with Engine(runs.new_folder()) as engine:
        fleet = GeneratedFleet(n_groups, rows_per_group=MANY_ROWS)
        groups = _finest(_contest(engine, "better", fleet, WORSE, BETTER))
    cut = 1 - (groups["loss_challenger"] / groups["loss_champion"]) ** 0.5
    return {
        "": groups["promoted"].mean(),
        "groups": len(groups),
        "error-cut": cut.mean(),
        "report-rows": groups["n_rows"].mean(),
    }


def _finest(judgement: Judgement) -> pd.DataFrame:
    """The groups that were tested."""
    rows = judgement.decisions[judgement.decisions["grain"] == 1]
    tested = rows[rows["kind"] == NEW_RECIPE]
    if len(tested) < TESTED * len(rows) or tested["p_value"].isna().any():
        raise NotMeasured(
            f"too few groups were tested: {rows[['kind', 'reason']].value_counts().to_dict()}"
        )
    return tested


def _contest(
    engine: Engine,
    name: str,
    fleet: GeneratedFleet,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> Judgement:
    """Train a fleet by two recipes, and let the second challenge the first."""
    location = engine.write(name, fleet)
    specs = [
        fleet.spec(tuning={"max_trials": 1, "patience": 1, "search": dict(recipe)})
        for recipe in (before, after)
    ]
    first, second = (
        engine.train(name, location, spec, f"{name}-{number}") for number, spec in enumerate(specs)
    )
    champion, challenger = (_side(engine, name, training) for training in (first, second))
    contest = Comparison(
        _run(engine, name, second),
        challenger,
        {champion.fleet_version: champion},
        dict.fromkeys(champion.groups, champion.fleet_version),
    )
    return _judged(engine, name, location, specs[1], contest)


def _judged(
    engine: Engine, name: str, location: str, spec: FleetSpec, contest: Comparison
) -> Judgement:
    spark = engine.spark.session
    features = engine.tables.read_spark(spark, location)
    judged = judge(
        quiet_context(spark, slots=engine.slots),
        own_tables(engine.tables, name),
        features,
        spec,
        contest,
    )
    print(f"    judged: {judged.decisions['reason'].value_counts().to_dict()}", flush=True)
    return judged


def _run(engine: Engine, name: str, training: Training) -> RunManifest:
    found = own_tables(engine.tables, name).run(training.run.run_id)
    if found is None:
        raise NotMeasured(f"{name}: the tables do not know run {training.run.run_id}")
    return found


def _side(engine: Engine, name: str, training: Training) -> ComparedRun:
    return ComparedRun.of_ledger(_run(engine, name, training).generation, training.ledger)
