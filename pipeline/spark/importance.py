"""Feature importance per group, on Spark: boosters and rows meet in the workers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.models.importance import SAMPLED_ROWS, group_importance
from pipeline.models.meta_model import ModelSpec, grain_name, load_booster
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.ledger import models_that_answer
from pipeline.runs.manifest import RunManifest
from pipeline.spark.execution import keep_imports, without_adaptive_execution
from pipeline.spark.files import FileWriter, file_json, file_of_json
from pipeline.spark.keys import number_or, quoted
from pipeline.spark.rows import grain_column, has_weight, limited_rows, visible_rows
from pipeline.spec import FleetSpec
from pipeline.storage import WrittenFile
from pipeline.tables import BOOSTERS, IMPORTANCE
from pipeline.training.worker import rows_in_pandas

GROUP = ["grain", "group_id"]
# Rows of the table or, for a group that could not be explained, one row with the reason.
_EXPLAINED: Any = pa.schema([*IMPORTANCE.schema, pa.field("error", pa.string())])


@dataclass(frozen=True)
class ImportanceResult:
    """Counts of a run's boosters, and what failed.

    Args:
        n_boosters: groups that have one that answers.
        n_copied: of those, groups whose rows were copied from the run before, as their booster is
            the same.
        failed: why a group has no rows, by its id.
    """

    n_boosters: int
    n_copied: int
    failed: Mapping[str, str]


def write_importance(
    spark: SparkSession,
    tables: FleetTables,
    features: DataFrame,
    spec: FleetSpec,
    run: RunManifest,
    ledger: pd.DataFrame,
) -> ImportanceResult:
    """Explain the boosters of a finished run that answer, and commit `tables.IMPORTANCE` for it.

    What the table had for the run is replaced. A group whose booster is that of the run before gets
    that run's rows. A group that cannot be explained gets none, and does not keep the others from
    theirs.

    Args:
        spark: the session.
        tables: of the fleet.
        features: the feature table, in the version that the run read.
        spec: the fleet.
        run: the run manifest.
        ledger: the run's rows.
    """
    store, location = tables.tables, tables.location(IMPORTANCE)
    boosters = models_that_answer(ledger, run.model_spec)[[*GROUP, "wave", "booster_id"]]
    before, explained = _explained_before(tables, location, run)
    # A group's id tells its grain, too.
    is_explained = pd.MultiIndex.from_frame(boosters[["group_id", "booster_id"]]).isin(explained)
    copied = boosters[is_explained]
    new = boosters[~is_explained]
    parts = []
    if len(copied):
        earlier = store.read_spark(spark, location, partitions={"run_id": [before]})
        parts.append(_copy(earlier, copied, run.run_id))
    if len(new):
        visible = visible_rows(features, run.cutoffs.as_of).where(has_weight(spec))
        rows = limited_rows(visible, spec, run.limit_groups)
        booster_store = tables.location(BOOSTERS)
        waves = sorted(set(new["wave"]))
        stored = store.read_spark(spark, booster_store, partitions={"wave": waves})
        parts.append(explain_groups(rows, stored, new, spec, run, booster_store))
    files, failed = _write(parts, location, dict(store.storage_options))
    partition = {"run_id": run.run_id}
    store.commit(location, files, IMPORTANCE.schema, mode="overwrite", partition=partition)
    return ImportanceResult(len(boosters), len(copied), failed)


def _copy(earlier: DataFrame, copied: pd.DataFrame, run_id: str) -> DataFrame:
    """The rows of an earlier run for groups whose booster is the same."""
    named = earlier.sparkSession.createDataFrame(
        copied[["group_id", "booster_id"]], "group_id string, booster_id string"
    )
    same = earlier.join(sf.broadcast(named), ["group_id", "booster_id"], "left_semi")
    same = same.withColumn("run_id", sf.lit(run_id))
    return same.withColumn("error", sf.lit(None).cast("string")).select(_EXPLAINED.names)


def _write(
    parts: Sequence[DataFrame], location: str, options: Mapping[str, str]
) -> tuple[list[WrittenFile], dict[str, str]]:
    """Let tasks write the rows.

    Returns:
        The files, and why a group has no rows, by its id.
    """
    if not parts:
        return [], {}
    frame, *others = parts
    for other in others:
        frame = frame.unionByName(other)
    with without_adaptive_execution(frame.sparkSession):
        rows = frame.mapInArrow(_writer(location, options), "kind string, line string").collect()
    files, failed = [], {}
    for row in rows:
        message = json.loads(row["line"])
        if row["kind"] == "file":
            files.append(file_of_json(message))
        else:
            failed[message["group_id"]] = message["error"]
    return files, failed


def _explained_before(
    tables: FleetTables, location: str, run: RunManifest
) -> tuple[str, pd.MultiIndex]:
    """The run before, and the groups and boosters that it has rows for.

    There are none where its features are not those of this run.
    """
    nothing = pd.MultiIndex.from_arrays([[], []])
    if run.previous_run_id is None or not tables.tables.exists(location):
        return "", nothing
    before = tables.run(run.previous_run_id)
    if before is None or before.model_spec.features != run.model_spec.features:
        return "", nothing
    first = str(run.model_spec.features[0])
    is_first = {"run_id": before.run_id, "feature": first}
    columns = ["group_id", "booster_id"]
    explained = tables.tables.read_pandas(location, where=is_first, columns=columns)
    return before.run_id, pd.MultiIndex.from_frame(explained)


def explain_groups(
    rows: DataFrame,
    boosters: DataFrame,
    groups: pd.DataFrame,
    spec: FleetSpec,
    run: RunManifest,
    where: str,
) -> DataFrame:
    """Importance of every feature in some groups.

    Args:
        rows: the visible rows.
        boosters: rows of the booster store.
        groups: grain, group_id, wave and booster_id.
        spec: the fleet.
        run: that trained them.
        where: the booster store, for messages.

    Returns:
        The columns of `tables.IMPORTANCE`, and error: null, or why a group has this one row and no
        other.
    """
    schema = "grain int, group_id string, wave string, booster_id string"
    named = rows.sparkSession.createDataFrame(groups.astype({"grain": "int32"}), schema)
    sample = newest_rows(rows, groups, spec).groupBy(*GROUP)
    texts = boosters.select("wave", "booster_id", "sha256", "n_bytes", "text")
    stored = texts.join(sf.broadcast(named), ["wave", "booster_id"]).groupBy(*GROUP)
    run_id = run.run_id
    model_spec = run.model_spec

    def explain(
        key: tuple[pa.Scalar, ...], rows_of_group: pa.Table, boosters_of_group: pa.Table
    ) -> pa.Table:
        keep_imports()
        grain = key[0].as_py()
        group = key[1].as_py()
        place: dict[str, Any] = {
            "run_id": run_id,
            "grain": grain,
            "grain_name": grain_name(model_spec.grains[grain]),
            "group_id": group,
        }
        try:
            importance = _explain_group(rows_of_group, boosters_of_group, model_spec, where)
            importance = importance.assign(**place, error=None)
            return pa.Table.from_pandas(importance, schema=_EXPLAINED, preserve_index=False)
        except Exception as error:  # noqa: BLE001 - one group ends nothing but itself
            why = f"{type(error).__name__}: {error}"
            return pa.Table.from_pylist([{**place, "error": why}], schema=_EXPLAINED)

    return sample.cogroup(stored).applyInArrow(explain, from_arrow_schema(_EXPLAINED))


def _explain_group(
    rows: pa.Table, boosters: pa.Table, model_spec: ModelSpec, where: str
) -> pd.DataFrame:
    """Importance of every feature in one group's booster.

    Raises:
        LookupError: if the booster is missing.
        PackError: if it is damaged.
    """
    if not boosters.num_rows:
        raise LookupError(f"{where} lacks the booster that the ledger names; train again")
    booster = boosters.slice(0, 1).to_pylist()[0]
    sample = rows_in_pandas(rows.sort_by("_place"), model_spec)
    importance = group_importance(load_booster(booster, where), sample, model_spec)
    return importance.assign(booster_id=booster["booster_id"])


def newest_rows(
    rows: DataFrame, groups: pd.DataFrame, spec: FleetSpec, n_rows: int = SAMPLED_ROWS
) -> DataFrame:
    """The newest rows of some groups that the group's model can answer.

    Rows travel to their groups once, and no task sends more than `n_rows` of a group.

    Args:
        rows: the visible rows.
        groups: grain and group_id.
        spec: the fleet.
        n_rows: of a group, at most.

    Returns:
        The features, the group, and the row's place in it, `_place`: 1 is the newest.
    """
    named = sf.broadcast(
        rows.sparkSession.createDataFrame(
            groups[GROUP].astype({"grain": "int32"}), "grain int, group_id string"
        )
    )
    columns = quoted(dict.fromkeys([*spec.feature_columns, "time", "row_key"]))
    level = grain_column(spec, sorted(set(groups["grain"]))).alias("_level")
    exploded = (
        rows.where(_is_anchored(spec))
        .select(level, *columns)
        .select("_level.grain", "_level.group_id", *columns)
    )
    place = sf.expr(
        "row_number() OVER (PARTITION BY grain, group_id ORDER BY time DESC, row_key DESC)"
    )
    placed = (
        exploded.join(named, GROUP, "left_semi")
        .withColumn("_place", place)
        .where(sf.col("_place") <= n_rows)
    )
    return placed.select(*GROUP, "_place", *quoted(spec.feature_columns))


def _is_anchored(spec: FleetSpec) -> Column:
    """Whether a row has the offset and the scale without which no model answers it."""
    offset, scale = number_or(spec.target.offset, 0.0), number_or(spec.target.scale, 1.0)
    return offset.isNotNull() & (scale > 0)


def _writer(root: str, options: Mapping[str, str]) -> Any:
    """What a task does with its groups: it writes rows into a file, and errors for the driver."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        file = FileWriter(root, options, IMPORTANCE.schema)
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            file.write(rows.filter(rows["error"].is_null()))
            failed = rows.filter(rows["error"].is_valid()).select(["group_id", "error"])
            for line in failed.to_pylist():
                yield pa.RecordBatch.from_pydict({"kind": ["error"], "line": [json.dumps(line)]})
        written = file.close()
        if written is not None:
            yield pa.RecordBatch.from_pydict(
                {"kind": ["file"], "line": [file_json(IMPORTANCE.name, written)]}
            )

    return write
