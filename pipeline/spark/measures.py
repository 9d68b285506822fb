"""Error measures of answers against the actual target, per task, as Spark expressions.

A way is one way to answer: the fleet, the pooled model, the constant, a baseline. Its error on a
row is a column, its measure over a group's rows the mean of that column (for RMSE its root); rows
that a way does not answer do not count for it.
"""

from collections.abc import Sequence

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


def shown_measures(spec: FleetSpec) -> tuple[str, str]:
    """The two measures that people compare contenders by; smaller is better for the first."""
    return ("log_loss", "accuracy") if spec.is_class_task else ("rmse", "mape")


def row_errors(
    answered: DataFrame, spec: FleetSpec, ways: Sequence[str], classes: Sequence[str]
) -> DataFrame:
    """One row per judged row, with each way's error in each measure.

    Args:
        answered: one row per judged row (for multiclass per row and class): row_key, class_name,
            actual, group_ids, miss, and per way its answer, null where it has none.
        spec: the fleet.
        ways: columns with answers.
        classes: of the target, in order.

    Returns:
        Columns group_ids, miss, and `<way>_<measure>` for every way and measure; rmse holds the
        squared error.
    """
    errors = {f"{way}_{name}": error for way in ways for name, error in _errors(way, spec).items()}
    if spec.task != MULTICLASS:
        return answered.select(
            "group_ids", "miss", *(error.alias(name) for name, error in errors.items())
        )
    place = sf.array_position(sf.array(*(sf.lit(name) for name in classes)), sf.col("class_name"))
    # Of equal probabilities the first class is the answer.
    likeliest = [
        sf.max(
            sf.when(sf.col(way).isNotNull(), sf.struct(sf.col(way), -place, sf.col("actual")))
        ).alias(f"{way}_first")
        for way in ways
    ]
    of_classes = answered.groupBy("row_key").agg(
        sf.first("group_ids").alias("group_ids"),
        sf.first("miss").alias("miss"),
        *(sf.sum(error).alias(name) for name, error in errors.items()),
        *likeliest,
    )
    hits = [sf.col(f"{way}_first")["actual"].alias(f"{way}_accuracy") for way in ways]
    return of_classes.select("group_ids", "miss", *errors, *hits)


def _errors(way: str, spec: FleetSpec) -> dict[str, Column]:
    """A contender's error on a row, null where it gave no answer.

    For multiclass on a class of a row, to be added up.
    """
    actual, answer = sf.col("actual"), sf.col(way)
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


def row_means(spec: FleetSpec, ways: Sequence[str]) -> list[Column]:
    """Every way's measures over a group's rows, as `<way>_<measure>`."""
    return [_mean(way, name).alias(f"{way}_{name}") for way in ways for name in row_measures(spec)]


def baseline_measures(spec: FleetSpec, n_baselines: int) -> list[Column]:
    """Per baseline its rows (`b0_n`) and the fleet's measures on them (`b0_fleet_<measure>`)."""
    found = []
    for way in (f"b{number}" for number in range(n_baselines)):
        there = sf.col(f"{way}_{'brier' if spec.is_class_task else 'rmse'}").isNotNull()
        found.append(sf.count_if(there).alias(f"{way}_n"))
        found += [
            _mean("fleet", name, there).alias(f"{way}_fleet_{name}")
            for name in shown_measures(spec)
        ]
    return found


def _mean(way: str, name: str, only: Column | None = None) -> Column:
    error = sf.col(f"{way}_{name}")
    mean = sf.avg(error if only is None else sf.when(only, error))
    return sf.sqrt(mean) if name == "rmse" else mean
