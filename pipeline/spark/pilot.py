"""`own: auto`: a pilot tries both forms of a group's own model before the fleet is trained."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from pipeline.models.meta_model import CORRECTION, INDEPENDENT
from pipeline.models.start import Start
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun, lay_out_run
from pipeline.runs.request import Request
from pipeline.spark.evaluation import nearest_predictions
from pipeline.spark.keys import link_column
from pipeline.spark.planning import count_rows
from pipeline.spark.training import TrainingContext, train_aside
from pipeline.spec import FleetSpec
from pipeline.training.splits import TUNE

# Groups that `own: auto` tries both forms on.
PILOT_GROUPS = 30
# By how many of its standard errors a correction must gain.
STANDARD_ERRORS = 2.0


def plan_with_pilot(
    context: TrainingContext,
    tables: FleetTables,
    features: DataFrame,
    spec: FleetSpec,
    request: Request,
    say: Callable[[str], None],
) -> PlannedRun:
    """Plan a run, in the form of the groups' own models that a pilot finds to be better.

    There is no pilot where the spec, or an earlier run, has chosen the form.

    Args:
        context: where the pilot trains.
        tables: of the fleet, with its earlier runs.
        features: the feature table.
        spec: the fleet.
        request: what the launch asks for.
        say: called with lines for people.

    Raises:
        DataError: as `plan_run`.
    """
    history = History.read(tables)
    counted = count_rows(features, spec, request, history)

    def lay_out(own: str | None = None) -> PlannedRun:
        return lay_out_run(
            counted,
            spec,
            request,
            history,
            slots=context.slots,
            own=own,
        )

    run = lay_out()
    if not run.must_choose:
        return run
    say("own: auto: trying both forms on some groups")
    own, why = choose_own(context, tables, run, spec)
    say(why)
    return lay_out(own)


def choose_own(
    context: TrainingContext, tables: FleetTables, run: PlannedRun, spec: FleetSpec
) -> tuple[str, str]:
    """Try both forms of `own` on some groups.

    Trains the pooled group once, and up to `PILOT_GROUPS` of the finest grain, small and large, in
    both forms. Nothing is committed.

    Args:
        context: where it trains.
        tables: where files are written.
        run: as planned, with independent models.
        spec: the fleet.

    Returns:
        The better form, and a line for people that says why.
    """
    plan = run.plan.to_train
    finest = plan[plan["grain"] == len(spec.grains) - 1].sort_values(["n_target", "group_id"])
    pooled = plan[plan["grain"] == 0]
    if finest.empty or pooled.empty:
        return INDEPENDENT, "no group to try both forms on"
    places = np.linspace(0, len(finest) - 1, PILOT_GROUPS)
    chosen = finest.iloc[sorted(set(map(round, places)))]

    def try_form(groups: pd.DataFrame, own: str, bases: DataFrame | None = None) -> DataFrame:
        settings = replace(run.settings, model_spec=replace(run.settings.model_spec, own=own))
        return train_aside(context, tables, run.rows, spec, groups, settings, bases)

    one_trial = Start(max_trials=1).to_json()
    bases = nearest_predictions(try_form(pooled.assign(started_from=one_trial), CORRECTION))
    misses = pd.DataFrame(
        {
            INDEPENDENT: _tune_misses(try_form(chosen, INDEPENDENT), spec),
            CORRECTION: _tune_misses(try_form(chosen, CORRECTION, bases), spec),
        }
    ).dropna()
    gain = misses[INDEPENDENT] - misses[CORRECTION]
    # A correction needs more fits, and each grain waits for the one above: worth it only where it
    # is clearly better.
    best = INDEPENDENT
    if gain.sum() > STANDARD_ERRORS * np.sqrt(len(gain) * gain.var()):
        best = CORRECTION
    errors = ", ".join(f"{own} {misses[own].mean():.5g}" for own in misses)
    where = f"the tune rows of {len(misses)} groups"
    return best, f"own: auto is {best}: mean squared error on {where}: {errors}"


def _tune_misses(holdout: DataFrame, spec: FleetSpec) -> "pd.Series[float]":
    """Each group's weighted mean squared error on tune rows, cross-selected, link space."""
    rows = holdout.where((sf.col("split") == TUNE) & sf.col("prediction").isNotNull())
    linked = link_column(sf.col("actual"), spec.target.transform)
    target = (linked - sf.col("offset")) / sf.col("scale")
    miss = sf.col("weight") * (target - sf.col("prediction")) ** 2
    mean = sf.sum(miss) / sf.nullif(sf.sum("weight"), sf.lit(0.0))
    groups = rows.groupBy("group_id").agg(mean.alias("miss")).toPandas()
    misses: pd.Series[float] = groups.set_index("group_id")["miss"].sort_index()
    return misses
