"""Judging a run: weights and errors of its groups, from held-out predictions."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.models.meta_model import GroupKey
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import LedgerRow, by_group
from pipeline.runs.ledger import complete_ledger, groups_with_model
from pipeline.runs.planned_run import PlannedRun
from pipeline.spark.blending import constant_column
from pipeline.spark.evaluation import judged_rows, measure_groups, sum_moments
from pipeline.spark.losses import answer_losers_otherwise
from pipeline.spark.weights import learn_weights
from pipeline.spec import FleetSpec
from pipeline.tables import HOLDOUT
from pipeline.training.blend import GroupSkill, describe_groups

# The most groups of held-out rows without a ledger row that a run's row names.
MAX_UNKNOWN_GROUPS = 20


def judge_run(
    spark: SparkSession,
    tables: FleetTables,
    run: PlannedRun,
    spec: FleetSpec,
    rows: Sequence[LedgerRow],
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Learn the blend, and measure every group.

    Args:
        spark: the session.
        tables: of the fleet.
        run: as planned, its waves committed.
        spec: the fleet.
        rows: of the ledger, one per group, weights and errors still missing.

    Returns:
        The complete ledger, and the ids of groups that have held-out rows and no ledger row: their
        keys were read in two ways, and the rows would count for nobody.
    """
    has_model = groups_with_model(rows, len(spec.grains))
    skills: Mapping[GroupKey, GroupSkill] = {}
    measures = pd.DataFrame(columns=["grain", "group_id"])
    held_out = held_out_rows(spark, tables, rows)
    if held_out is not None:
        judged = judged_rows(held_out, spec, run.cutoffs, has_model).persist()
        try:
            skills, measures = _judge(judged, run, spec, has_model)
        finally:
            judged.unpersist()
    unknown = {*skills, *by_group(measures)}.difference(map(GroupKey.of, rows))
    unknown_ids = sorted({key.group_id for key in unknown})
    ledger = complete_ledger(rows, spec, skills, measures)
    return ledger, tuple(unknown_ids[:MAX_UNKNOWN_GROUPS])


def _judge(
    judged: DataFrame,
    run: PlannedRun,
    spec: FleetSpec,
    has_model: Sequence[set[str]],
) -> tuple[Mapping[GroupKey, GroupSkill], pd.DataFrame]:
    """Weights of the groups, and their errors on report rows."""
    classes = run.settings.model_spec.classes
    moments = sum_moments(judged, len(spec.grains), run.constants, classes)
    constant = constant_column(run.constants, classes)
    weights = learn_weights(judged, spec, has_model, constant)
    skills = describe_groups(moments, weights, run.constants.with_offset)
    skills = answer_losers_otherwise(
        judged, spec, skills, has_model, constant, run.cutoffs.report_start
    )
    return skills, measure_groups(judged, run, spec, skills, has_model)


def held_out_rows(
    spark: SparkSession, tables: FleetTables, rows: Iterable[LedgerRow]
) -> DataFrame | None:
    """The held-out rows of groups, from the wave that their ledger row names.

    Rows that an interrupted wave left are passed over.

    Args:
        spark: the session.
        tables: of the fleet.
        rows: of the ledger.

    Returns:
        Rows of `tables.HOLDOUT`; None where no group has any.
    """
    location = tables.location(HOLDOUT)
    named = [(row["wave"], *GroupKey.of(row)) for row in rows if isinstance(row["wave"], str)]
    if not named or not tables.tables.exists(location):
        return None
    waves = sorted({wave for wave, _, _ in named})
    holdout = tables.tables.read_spark(spark, location, partitions={"wave": waves})
    keys = spark.createDataFrame(pd.DataFrame(named), "wave string, grain int, group_id string")
    held_out: DataFrame = holdout.join(
        sf.broadcast(keys), ["wave", "grain", "group_id"], "left_semi"
    )
    return held_out
