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
from pipeline.runs.manifest import RunManifest
from pipeline.spark.execution import keep_imports, without_adaptive_execution
from pipeline.spark.files import FileWriter, file_json, file_of_json
from pipeline.spark.keys import finite
from pipeline.spark.rows import grain_column, has_weight, limited_rows, visible_rows
from pipeline.spec import FleetSpec
from pipeline.storage import WrittenFile
from pipeline.tables import BOOSTERS, IMPORTANCE
from pipeline.training.worker import rows_in_pandas

GROUP = ["grain", "group_id"]
# Rows of the table or, where a group could not be looked at, why.
_LOOKED_AT: Any = pa.schema([*IMPORTANCE.schema, pa.field("error", pa.string())])


@dataclass(frozen=True)
class ImportanceResult:
    """What became of a run's boosters.

    Args:
        n_boosters: groups that have one.
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
    """Look at every booster of a finished run, and commit `tables.IMPORTANCE` for it.

    What the table had for the run is replaced.

    A group whose booster is that of the run before has that run's rows. One that cannot be looked
    at has none, and the others are not lost to it.

    Args:
        spark: the session.
        tables: of the fleet.
        features: the feature table, in the version that the run read.
        spec: the fleet.
        run: the run manifest.
        ledger: the run's rows.
    """
    store, location = tables.tables, tables.location(IMPORTANCE)
    having = ledger[ledger["booster_id"].notna()][[*GROUP, "wave", "booster_id"]]
    before, known = _known(tables, location, run)
    # A group's id tells its grain, too.
    is_known = pd.MultiIndex.from_frame(having[["group_id", "booster_id"]]).isin(known)
    copied, wanted = having[is_known], having[~is_known]
    parts = []
    if len(copied):
        earlier = store.read_spark(spark, location, partitions={"run_id": [before]})
        parts.append(_copy(earlier, copied, run.run_id))
    if len(wanted):
        visible = visible_rows(features, run.cutoffs.as_of).where(has_weight(spec))
        rows = limited_rows(visible, spec, run.limit_groups)
        booster_store, waves = tables.location(BOOSTERS), sorted(set(wanted["wave"]))
        boosters = store.read_spark(spark, booster_store, partitions={"wave": waves})
        parts.append(explain_groups(rows, boosters, wanted, spec, run, booster_store))
    files, failed = _write(parts, location, dict(store.storage_options))
    partition = {"run_id": run.run_id}
    store.commit(location, files, IMPORTANCE.schema, mode="overwrite", partition=partition)
    return ImportanceResult(len(having), len(copied), failed)


def _copy(earlier: DataFrame, copied: pd.DataFrame, run_id: str) -> DataFrame:
    """The rows of an earlier run for groups whose booster is the same."""
    named = earlier.sparkSession.createDataFrame(
        copied[["group_id", "booster_id"]], "group_id string, booster_id string"
    )
    same = earlier.join(sf.broadcast(named), ["group_id", "booster_id"], "left_semi")
    same = same.withColumn("run_id", sf.lit(run_id))
    return same.withColumn("error", sf.lit(None).cast("string")).select(_LOOKED_AT.names)


def _write(
    parts: Sequence[DataFrame], location: str, options: Mapping[str, str]
) -> tuple[list[WrittenFile], dict[str, str]]:
    """Write rows from the tasks; the files, and why groups have none, by their id."""
    if not parts:
        return [], {}
    frame = parts[0] if len(parts) == 1 else parts[0].unionByName(parts[1])
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


def _known(tables: FleetTables, location: str, run: RunManifest) -> tuple[str, pd.MultiIndex]:
    """The run before, and the groups and boosters that it has rows for.

    No groups where its features have other names.
    """
    nothing = pd.MultiIndex.from_arrays([[], []])
    if run.previous_run_id is None or not tables.tables.exists(location):
        return "", nothing
    before = tables.run(run.previous_run_id)
    if before is None or before.model_spec.features != run.model_spec.features:
        return "", nothing
    first = str(run.model_spec.features[0])
    is_first = {"run_id": before.run_id, "feature": first}
    found = tables.tables.read_pandas(location, where=is_first, columns=["group_id", "booster_id"])
    return before.run_id, pd.MultiIndex.from_frame(found)


def explain_groups(
    rows: DataFrame,
    boosters: DataFrame,
    wanted: pd.DataFrame,
    spec: FleetSpec,
    run: RunManifest,
    where: str,
) -> DataFrame:
    """Importance of every feature in every wanted group.

    Args:
        rows: the visible rows.
        boosters: rows of the booster store.
        wanted: grain, group_id, wave and booster_id.
        spec: the fleet.
        run: that trained them.
        where: the booster store, for messages.

    Returns:
        The columns of `tables.IMPORTANCE`, and error: null, or why a group has this one row and no
        other.
    """
    schema = "grain int, group_id string, wave string, booster_id string"
    groups = rows.sparkSession.createDataFrame(wanted.astype({"grain": "int32"}), schema)
    sample = newest_rows(rows, wanted, spec).groupBy(*GROUP)
    texts = boosters.select("wave", "booster_id", "sha256", "n_bytes", "text")
    stored = texts.join(sf.broadcast(groups), ["wave", "booster_id"]).groupBy(*GROUP)
    run_id, model_spec = run.run_id, run.model_spec

    def explain(
        key: tuple[pa.Scalar, ...], rows_of_group: pa.Table, boosters_of_group: pa.Table
    ) -> pa.Table:
        keep_imports()
        grain, group = (value.as_py() for value in key)
        place: dict[str, Any] = {
            "run_id": run_id,
            "grain": grain,
            "grain_name": grain_name(model_spec.grains[grain]),
            "group_id": group,
        }
        try:
            found = _explain_group(rows_of_group, boosters_of_group, model_spec, where)
            found = found.assign(**place, error=None)
            return pa.Table.from_pandas(found, schema=_LOOKED_AT, preserve_index=False)
        except Exception as error:  # noqa: BLE001 - one group ends nothing but itself
            why = f"{type(error).__name__}: {error}"
            return pa.Table.from_pylist([{**place, "error": why}], schema=_LOOKED_AT)

    return sample.cogroup(stored).applyInArrow(explain, from_arrow_schema(_LOOKED_AT))


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
    found = group_importance(load_booster(booster, where), sample, model_spec)
    return found.assign(booster_id=booster["booster_id"])


def newest_rows(
    rows: DataFrame, groups: pd.DataFrame, spec: FleetSpec, n_rows: int = SAMPLED_ROWS
) -> DataFrame:
    """The newest rows of each named group that its model could be asked about.

    Features, group and `_place`, from 1.

    Rows go to their groups once, and of each group no task sends more than are wanted.

    Args:
        rows: the visible rows.
        groups: grain and group_id.
        spec: the fleet.
        n_rows: of a group, at most.
    """
    named = sf.broadcast(
        rows.sparkSession.createDataFrame(
            groups[GROUP].astype({"grain": "int32"}), "grain int, group_id string"
        )
    )
    columns = [f"`{name}`" for name in dict.fromkeys([*spec.feature_columns, "time", "row_key"])]
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
    return placed.select(*GROUP, "_place", *(f"`{name}`" for name in spec.feature_columns))


def _is_anchored(spec: FleetSpec) -> Column:
    """Whether a row has the offset and the scale without which no model answers it."""
    target = spec.target
    offset = finite(sf.col(f"`{target.offset}`")).isNotNull() if target.offset else sf.lit(True)
    return offset & (finite(sf.col(f"`{target.scale}`")) > 0) if target.scale else offset


def _writer(root: str, options: Mapping[str, str]) -> Any:
    """What a task does with its groups: rows into a file, errors to the driver."""

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        file = FileWriter(root, options, IMPORTANCE.schema)
        for batch in batches:
            rows = pa.Table.from_batches([batch])
            file.write(rows.filter(rows["error"].is_null()))
            for line in (
                rows.filter(rows["error"].is_valid()).select(["group_id", "error"]).to_pylist()
            ):
                yield pa.RecordBatch.from_pydict({"kind": ["error"], "line": [json.dumps(line)]})
        written = file.close()
        if written is not None:
            yield pa.RecordBatch.from_pydict(
                {"kind": ["file"], "line": [file_json(IMPORTANCE.name, written)]}
            )

    return write
