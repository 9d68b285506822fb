"""Feature importance per group, on Spark: boosters and rows meet in the workers."""

import json
from collections.abc import Iterator, Mapping
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
    run_id, model_spec, store = run.run_id, run.model_spec, tables.tables
    location = tables.location(IMPORTANCE)
    having = ledger[ledger["booster_id"].notna()][[*GROUP, "wave", "booster_id"]]
    before, known = _known(tables, location, run)
    # A group's id tells its grain, too.
    is_known = pd.MultiIndex.from_frame(having[["group_id", "booster_id"]]).isin(known)
    copied, wanted = having[is_known], having[~is_known]
    parts = []
    if len(copied):
        named = spark.createDataFrame(
            copied[["group_id", "booster_id"]], "group_id string, booster_id string"
        )
        earlier = store.read_spark(spark, location, partitions={"run_id": [before]})
        same = earlier.join(
            sf.broadcast(named), ["group_id", "booster_id"], "left_semi"
        ).withColumn("run_id", sf.lit(run_id))
        parts.append(same.withColumn("error", sf.lit(None).cast("string")).select(_LOOKED_AT.names))
    if len(wanted):
        visible = visible_rows(features, run.cutoffs.as_of).where(has_weight(spec))
        rows = limited_rows(visible, spec, run.limit_groups)
        booster_store = tables.location(BOOSTERS)
        boosters = store.read_spark(
            spark, booster_store, partitions={"wave": sorted(set(wanted["wave"]))}
        )
        parts.append(
            explain_groups(
                rows, boosters, wanted, spec, model_spec, run_id=run_id, where=booster_store
            )
        )
    files, failed = [], {}
    if parts:
        frame = parts[0] if len(parts) == 1 else parts[0].unionByName(parts[1])
        with without_adaptive_execution(spark):
            lines = frame.mapInArrow(
                _writer(location, dict(store.storage_options)), "kind string, line string"
            ).collect()
        told = [(line["kind"], json.loads(line["line"])) for line in lines]
        files = [file_of_json(line) for kind, line in told if kind == "file"]
        failed = {line["group_id"]: line["error"] for kind, line in told if kind == "error"}
    store.commit(location, files, IMPORTANCE.schema, mode="overwrite", partition={"run_id": run_id})
    return ImportanceResult(len(having), len(copied), failed)


def _known(tables: FleetTables, location: str, run: RunManifest) -> tuple[str, pd.MultiIndex]:
    """The run before, and the groups and boosters that it has rows for.

    None where its features have other names.
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
    model_spec: ModelSpec,
    *,
    run_id: str,
    where: str,
) -> DataFrame:
    """Importance of every feature in every wanted group.

    Args:
        rows: the visible rows.
        boosters: rows of the booster store.
        wanted: grain, group_id, wave and booster_id.
        spec: the fleet.
        model_spec: of the run.
        run_id: of the run.
        where: the booster store, for messages.

    Returns:
        The columns of `tables.IMPORTANCE`, and error: null, or why a group has this one row and no
        other.
    """
    spark = rows.sparkSession
    schema = "grain int, group_id string, wave string, booster_id string"
    named = sf.broadcast(spark.createDataFrame(wanted.astype({"grain": "int32"}), schema))
    asked = newest_rows(rows, wanted, spec).groupBy(*GROUP)
    stored = (
        boosters.select("wave", "booster_id", "sha256", "n_bytes", "text")
        .join(named, ["wave", "booster_id"])
        .groupBy(*GROUP)
    )

    def look(
        key: tuple[pa.Scalar, ...], rows_of_group: pa.Table, boosters_of_group: pa.Table
    ) -> pa.Table:
        keep_imports()
        grain, group = (value.as_py() for value in key)
        told: dict[str, Any] = {
            "run_id": run_id,
            "grain": grain,
            "grain_name": grain_name(model_spec.grains[grain]),
            "group_id": group,
        }
        try:
            if not boosters_of_group.num_rows:
                raise LookupError(f"{where} lacks the booster that the ledger names; train again")  # noqa: TRY301 - told as any other
            booster = boosters_of_group.slice(0, 1).to_pylist()[0]
            sample = rows_in_pandas(rows_of_group.sort_by("_place"), model_spec)
            found = group_importance(load_booster(booster, where), sample, model_spec).assign(
                **told, booster_id=booster["booster_id"], error=None
            )
            return pa.Table.from_pandas(found, schema=_LOOKED_AT, preserve_index=False)
        except Exception as error:  # noqa: BLE001 - one group ends nothing but itself
            return pa.Table.from_pylist(
                [{**told, "error": f"{type(error).__name__}: {error}"}], schema=_LOOKED_AT
            )

    return asked.cogroup(stored).applyInArrow(look, from_arrow_schema(_LOOKED_AT))


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
