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
from pipeline.spark.evaluation import judged_rows, measure_groups, sum_moments
from pipeline.spark.keys import moment_column
from pipeline.spark.losses import answer_losers_otherwise
from pipeline.spec import FleetSpec
from pipeline.tables import HOLDOUT
from pipeline.training.blend import GroupSkill, learn_blend

# Group ids that a run's row names where held-out rows belong to groups that the ledger does not
# know.
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
        The complete ledger, and groups of held-out rows that it does not know: keys that were read
        in two ways, whose rows would count for nobody.
    """
    has_model = groups_with_model(rows, len(spec.grains))
    skills: Mapping[GroupKey, GroupSkill] = {}
    measures = pd.DataFrame(columns=["grain", "group_id"])
    held_out = held_out_rows(spark, tables, rows)
    if held_out is not None:
        judged = judged_rows(held_out, spec, run.cutoffs, run.constants, has_model).persist()
        try:
            skills, measures = _judge(judged, run, spec, has_model)
        finally:
            judged.unpersist()
    known = {GroupKey.of(row) for row in rows}
    unknown = {group for _, group in {*skills, *by_group(measures)} - known}
    ledger = complete_ledger(rows, spec, skills, measures)
    return ledger, tuple(sorted(unknown)[:MAX_UNKNOWN_GROUPS])


def _judge(
    judged: DataFrame,
    run: PlannedRun,
    spec: FleetSpec,
    has_model: Sequence[set[str]],
) -> tuple[Mapping[GroupKey, GroupSkill], pd.DataFrame]:
    """Weights of the groups, and their errors on report rows."""
    classes = run.settings.model_spec.classes
    moments = sum_moments(judged, len(spec.grains), run.constants, classes)
    skills = learn_blend(moments, has_model, run.constants[0], spec.pooling)
    skills = answer_losers_otherwise(
        judged, spec, skills, has_model, run.constants, classes, run.cutoffs.report_start
    )
    report_rows = run.rows.where(sf.col("time") >= moment_column(run.cutoffs.report_start))
    measures = measure_groups(judged, spec, skills, run.constants, has_model, classes, report_rows)
    return skills, measures


def held_out_rows(
    spark: SparkSession, tables: FleetTables, rows: Iterable[LedgerRow]
) -> DataFrame | None:
    """The held-out rows of groups whose ledger row names their wave.

    What an interrupted wave left is not among them.

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
    found: DataFrame = holdout.join(sf.broadcast(keys), ["wave", "grain", "group_id"], "left_semi")
    return found
