"""Error measures of answers against the actual target, per task, as Spark expressions.

A contender is whoever answers: the fleet, the pooled model, the constant, a baseline. Its error on
a row is a column, and its measure over a group's rows the mean of that column (for RMSE its root).
Rows that a contender does not answer do not count for it.
"""

from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from pipeline.spec import COUNTED, MULTICLASS, QUANTILE, FleetSpec

# Probabilities and means are kept this far from 0, whose logarithm is infinite.
SMALLEST = 1e-15


def row_measures(spec: FleetSpec) -> tuple[str, ...]:
    """The measures of the fleet's task."""
    if spec.is_class_task:
        return ("log_loss", "brier", "accuracy")
    special = {QUANTILE: ("pinball",), **dict.fromkeys(COUNTED, ("deviance",))}
    return ("rmse", "mae", "mape", *special.get(spec.objective, ()))


def compared_measures(spec: FleetSpec) -> tuple[str, str]:
    """The two measures that people compare contenders by; smaller is better for the first."""
    if spec.is_class_task:
        return ("log_loss", "accuracy")
    return ("rmse", "mape")


def row_errors(
    answered: DataFrame, spec: FleetSpec, contenders: Sequence[str], classes: Sequence[str]
) -> DataFrame:
    """One row per judged row, with each contender's error in each measure.

    Args:
        answered: one row per judged row (for multiclass per row and class): row_key, class_name,
            actual, group_ids, miss, and per contender its answer, null where it has none.
        spec: the fleet.
        contenders: columns with answers.
        classes: of the target, in order.

    Returns:
        Columns group_ids, miss, and `<contender>_<measure>` for every contender and measure; rmse
        holds the squared error.
    """
    errors: dict[str, Column] = {}
    for contender in contenders:
        for name, error in _errors(contender, spec).items():
            errors[f"{contender}_{name}"] = error
    if spec.task == MULTICLASS:
        return _errors_over_classes(answered, errors, contenders, classes)
    columns = [error.alias(name) for name, error in errors.items()]
    return answered.select("group_ids", "miss", *columns)


def _errors_over_classes(
    answered: DataFrame,
    errors: Mapping[str, Column],
    contenders: Sequence[str],
    classes: Sequence[str],
) -> DataFrame:
    """Errors of rows from those of a row's classes, with each contender's accuracy.

    Of equal probabilities the first class is the answer.
    """
    place = sf.array_position(sf.array(*map(sf.lit, classes)), sf.col("class_name"))
    sums = [sf.sum(error).alias(name) for name, error in errors.items()]
    likeliest = []
    hits = []
    for contender in contenders:
        answer = sf.struct(sf.col(contender), -place, sf.col("actual"))
        is_answered = sf.col(contender).isNotNull()
        likeliest.append(sf.max(sf.when(is_answered, answer)).alias(f"{contender}_first"))
        hit = sf.col(f"{contender}_first")["actual"]
        hits.append(hit.alias(f"{contender}_accuracy"))
    of_rows = answered.groupBy("row_key").agg(
        sf.first("group_ids").alias("group_ids"),
        sf.first("miss").alias("miss"),
        *sums,
        *likeliest,
    )
    return of_rows.select("group_ids", "miss", *errors, *hits)


def _errors(contender: str, spec: FleetSpec) -> dict[str, Column]:
    """A contender's error on a row, null where it gave no answer.

    For multiclass on a class of a row, to be added up.
    """
    actual = sf.col("actual")
    answer = sf.col(contender)
    error = actual - answer
    # Clipped only where there is an answer: greatest() would take the bound for a null.
    if spec.task == MULTICLASS:
        log_loss = sf.when(
            (actual > 0) & answer.isNotNull(), -sf.log(sf.greatest(answer, sf.lit(SMALLEST)))
        )
        return {"log_loss": log_loss, "brier": error * error}
    if spec.is_class_task:
        hit = sf.when(answer.isNotNull(), ((answer > 0.5) == (actual > 0)).cast("double"))  # noqa: PLR2004
        log_loss = binary_log_loss(actual, answer)
        return {"log_loss": log_loss, "brier": error * error, "accuracy": hit}
    errors = {
        "rmse": error * error,
        "mae": sf.abs(error),
        "mape": sf.when(actual != 0, sf.abs(error / actual) * 100),
    }
    if spec.objective == QUANTILE:
        errors["pinball"] = pinball_loss(error, spec.alpha)
    if spec.variance_power is not None:
        errors["deviance"] = clipped_deviance(actual, answer, spec.variance_power)
    return errors


def binary_log_loss(actual: Column, answer: Column) -> Column:
    """Log loss of the second class's probability; null where there is no answer."""
    of_actual = sf.when(actual > 0, answer).otherwise(1 - answer)
    return sf.when(answer.isNotNull(), -sf.log(sf.greatest(of_actual, sf.lit(SMALLEST))))


def pinball_loss(error: Column, alpha: float | None) -> Column:
    """Pinball loss of actual less answer at quantile `alpha`, by default the median."""
    quantile = alpha or 0.5
    return sf.when(error > 0, quantile * error).otherwise((quantile - 1) * error)


def clipped_deviance(actual: Column, answer: Column, power: float) -> Column:
    """Unit deviance of an answer of at least `SMALLEST`; null where there is no answer."""
    return sf.when(
        answer.isNotNull(), deviance(actual, sf.greatest(answer, sf.lit(SMALLEST)), power)
    )


def deviance(actual: Column, mean: Column, power: float) -> Column:
    """Unit deviance of the Poisson (power 1) or Tweedie distribution.

    Source: Jorgensen, The Theory of Dispersion Models (1997).
    """
    if power == 1:
        return 2 * (
            sf.when(actual > 0, actual * sf.log(actual / mean)).otherwise(0.0) - actual + mean
        )
    return 2 * (
        sf.pow(actual, sf.lit(2 - power)) / ((1 - power) * (2 - power))
        - actual * sf.pow(mean, sf.lit(1 - power)) / (1 - power)
        + sf.pow(mean, sf.lit(2 - power)) / (2 - power)
    )


def row_means(spec: FleetSpec, contenders: Sequence[str]) -> list[Column]:
    """Every contender's measures over a group's rows, as `<contender>_<measure>`."""
    means = []
    for contender in contenders:
        for name in row_measures(spec):
            error = sf.col(f"{contender}_{name}")
            means.append(_mean(error, name).alias(f"{contender}_{name}"))
    return means


def baseline_measures(spec: FleetSpec, baselines: Sequence[str]) -> list[Column]:
    """Per baseline its rows (`b0_n`) and the fleet's measures on them (`b0_fleet_<measure>`).

    Args:
        spec: the fleet.
        baselines: names of their columns.
    """
    measure = "rmse"
    if spec.is_class_task:
        measure = "brier"
    measures = []
    for baseline in baselines:
        is_answered = sf.col(f"{baseline}_{measure}").isNotNull()
        measures.append(sf.count_if(is_answered).alias(f"{baseline}_n"))
        for name in compared_measures(spec):
            error = sf.when(is_answered, sf.col(f"fleet_{name}"))
            measures.append(_mean(error, name).alias(f"{baseline}_fleet_{name}"))
    return measures


def _mean(error: Column, measure: str) -> Column:
    mean = sf.avg(error)
    if measure == "rmse":
        return sf.sqrt(mean)
    return mean
