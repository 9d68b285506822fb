"""Planning a training run: Spark counts the rows, and the layout follows from the counts."""

import pandas as pd
from pyspark.sql import DataFrame

from pipeline.errors import DataError
from pipeline.features.encoding import choose_categories
from pipeline.runs.history import History
from pipeline.runs.planned_run import CountedRows, PlannedRun, known_categories, lay_out_run
from pipeline.runs.request import Request
from pipeline.spark.counting import count_categories, count_classes, count_groups
from pipeline.spark.features import newest_known, newest_time
from pipeline.spark.rows import limited_rows, visible_rows
from pipeline.spark.training import TrainingContext
from pipeline.spec import FleetSpec
from pipeline.training.splits import resolve_cutoffs


def plan_run(
    context: TrainingContext,
    features: DataFrame,
    spec: FleetSpec,
    request: Request,
    history: History,
    *,
    own: str | None = None,
) -> PlannedRun:
    """Count the groups, fix the dates, find what earlier runs left, and lay out the work.

    Nothing is trained.

    Args:
        context: where the run is going to train.
        features: the feature table.
        spec: the fleet.
        request: what the launch asks for.
        history: earlier runs.
        own: `independent` or `correction`, where the spec leaves it open (see `choose_own`); by
            default that of the run before.

    Raises:
        DataError: as `count_rows`; or if a listed group does not exist.
    """
    counted = count_rows(features, spec, request, history)
    return lay_out_run(
        counted,
        spec,
        request,
        history,
        slots=context.slots,
        own=own,
    )


def count_rows(
    features: DataFrame, spec: FleetSpec, request: Request, history: History
) -> CountedRows:
    """The visible rows, and what the plan needs to know of them, in a few Spark jobs.

    Args:
        features: the feature table.
        spec: the fleet.
        request: its as-of and limit of groups choose the rows.
        history: earlier runs, whose categories keep their order.

    Raises:
        DataError: if no row is visible at the as-of, or the classes are not what the task needs.
    """
    as_of = request.as_of
    if as_of is None:
        as_of = newest_known(features, spec.target.column)
    rows = limited_rows(visible_rows(features, as_of), spec, request.limit_groups)
    newest = newest_time(rows, spec.target.column)
    if newest is None:
        raise _nothing_known(features, as_of)
    cutoffs = resolve_cutoffs(spec.splits, as_of, newest, spec.timezone)
    categories = choose_categories(
        count_categories(rows, spec, cutoffs),
        spec.features.max_categories,
        known_categories(spec, history.newest_finished(as_of)),
    )
    classes = count_classes(rows, spec, cutoffs)
    return count_groups(rows, spec, cutoffs, categories, classes)


def _nothing_known(features: DataFrame, as_of: pd.Timestamp) -> DataError:
    """The error of an as-of at which no row was known yet."""
    span = features.where("NOT is_future").selectExpr(
        "string(min(known_at))", "string(max(known_at))"
    )
    earliest, latest = span.collect()[0]
    return DataError(
        f"as of {as_of} no row is known yet; known_at runs from {earliest} to {latest}: "
        "choose an as-of within or after it"
    )
