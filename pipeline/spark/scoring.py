"""Batch scoring on Spark: the pack travels to every worker, which opens it once."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyspark import SparkFiles
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.models.meta_model import FleetModel
from pipeline.spec import FleetSpec
from pipeline.spark.training import visible_rows

_ANSWER = "prediction double, lower double, upper double, answered_by string, booster_id string, fleet_version string"
_opened: dict[str, FleetModel] = {}


def rows_to_score(features: DataFrame, spec: FleetSpec, as_of: pd.Timestamp) -> DataFrame:
    """The rows a launch answers.

    `new`: rows of the data with a time after the as-of; `future`: those of the horizon after the newest visible time.
    """
    if spec.scoring.score == "new":
        return features.where((sf.col("time") > sf.lit(as_of.to_pydatetime())) & ~sf.col("is_future"))
    newest = pd.Timestamp(visible_rows(features, as_of).agg(sf.max("time")).collect()[0][0])
    end = spec.horizon_period.add(newest)
    return features.where((sf.col("time") > sf.lit(newest.to_pydatetime())) & (sf.col("time") <= sf.lit(end.to_pydatetime())))


def score_rows(spark: SparkSession, rows: DataFrame, spec: FleetSpec, pack: Path, as_of: pd.Timestamp) -> DataFrame:
    """Answer every row; no shuffle.

    Returns:
        One row per row: the columns of `tables.PREDICTIONS` and the fleet's keys.
    """
    spark.sparkContext.addFile(str(pack), recursive=True)
    name = pack.name

    def answer(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        if name not in _opened:
            _opened[name] = FleetModel(SparkFiles.get(name))
        for batch in batches:
            yield pd.concat([batch[kept], _opened[name].predict(batch)], axis=1)

    kept = list(dict.fromkeys(["row_key", "time", *spec.key_columns]))
    needed = dict.fromkeys([*kept, *spec.feature_columns, *(name_ for name_ in (spec.target.offset, spec.target.scale) if name_)])
    narrow = rows.select(*(f"`{column}`" for column in needed))
    types = {field.name: field.dataType.simpleString() for field in narrow.schema}
    schema = ", ".join([*(f"`{column}` {types[column]}" for column in kept), _ANSWER])
    answered = narrow.mapInPandas(answer, schema)
    return answered.withColumn("as_of", sf.lit(as_of.isoformat())).withColumn("scored_at", sf.current_timestamp())
