"""Importance of features: the Spark path against the pandas path, what is copied, and what one bad group does."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.models.importance import SAMPLED_ROWS, group_importance
from pipeline.models.meta_model import group_ids, load_booster
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.spark.importance import ImportanceResult, newest_rows, write_importance
from pipeline.spark.planning import plan_run
from pipeline.spec import FleetSpec
from pipeline.tables import BOOSTERS, IMPORTANCE
from pipeline.testing.data import feature_rows, small_spec, with_classes
from pipeline.testing.runs import own_tables, quiet_context, train_quietly
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark

OSLO, BERGEN = '["north","oslo"]', '["north","bergen"]'


@pytest.fixture(scope="module")
def spec() -> FleetSpec:
    # Sales follow an offset that some rows lack: no model answers those.
    return small_spec(target={"offset": "usual_sales"}, tuning={"max_trials": 1, "max_rounds": 20})


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rows = feature_rows(260)
    rows.loc[rows["time"].dt.day == 28, "usual_sales"] = float("nan")
    return rows


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(
        time=rows["time"].dt.tz_localize("UTC"), known_at=rows["known_at"].dt.tz_localize("UTC")
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def trained(
    spark: SparkSession, tables: DeltaTables, features: DataFrame, spec: FleetSpec, run_id: str
) -> tuple[RunManifest, pd.DataFrame]:
    """A finished run: its manifest and its ledger, in which every model answers."""
    run = plan_run(
        quiet_context(spark),
        features,
        spec,
        Request(run_id),
        History.read(own_tables(tables, spec.name)),
    )
    ledger = train_quietly(spark, own_tables(tables, spec.name), run, spec)
    return manifest(tables, spec, run_id), ledger.assign(weight=0.5)


def test_a_model_that_does_not_answer_is_not_looked_at(
    spark: SparkSession, tmp_path: Path, features: DataFrame, spec: FleetSpec
) -> None:
    tables = DeltaTables(root=str(tmp_path))
    run, ledger = trained(spark, tables, features, spec, "first")
    ledger.loc[ledger["group_id"] != OSLO, "weight"] = 0.0
    own = own_tables(tables, spec.name)
    result = write_importance(spark, own, features, spec, run, ledger)
    assert result == ImportanceResult(1, 0, {})
    assert set(importance(tables, spec, "first").index.get_level_values(0)) == {OSLO}


def manifest(tables: DeltaTables, spec: FleetSpec, run_id: str) -> RunManifest:
    found = own_tables(tables, spec.name).run(run_id)
    assert found is not None
    return found


def importance(tables: DeltaTables, spec: FleetSpec, run_id: str) -> pd.DataFrame:
    found = tables.read_arrow(tables.location(spec.name, IMPORTANCE.name), where={"run_id": run_id})
    assert found.schema.equals(IMPORTANCE.schema)
    return found.to_pandas().set_index(["group_id", "feature"]).sort_index()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> DeltaTables:
    return DeltaTables(root=str(tmp_path_factory.mktemp("importance [x] ü")))


@pytest.fixture(scope="module")
def features(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    return in_spark(spark, rows)


@pytest.fixture(scope="module")
def first(
    spark: SparkSession, tables: DeltaTables, features: DataFrame, spec: FleetSpec
) -> tuple[RunManifest, pd.DataFrame]:
    return trained(spark, tables, features, spec, "first")


@pytest.fixture(scope="module")
def told(
    spark: SparkSession,
    tables: DeltaTables,
    features: DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
) -> ImportanceResult:
    return write_importance(spark, own_tables(tables, spec.name), features, spec, *first)


def test_spark_gives_what_pandas_gives(
    tables: DeltaTables,
    rows: pd.DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
    told: ImportanceResult,
) -> None:
    assert told == ImportanceResult(7, 0, {})
    run, ledger = first
    found, model_spec = importance(tables, spec, "first"), run.model_spec
    stored = {
        row["booster_id"]: row
        for row in tables.read_arrow(tables.location(spec.name, BOOSTERS.name)).to_pylist()
    }
    anchored = rows[rows["usual_sales"].notna()]
    compared = 0
    for grain, keys in enumerate(spec.grains):
        for group, of_group in anchored.groupby(group_ids(anchored, keys)):
            (booster_id,) = ledger.loc[ledger["group_id"] == group, "booster_id"]
            newest = of_group.sort_values(["time", "row_key"], ascending=False).head(SAMPLED_ROWS)
            expected = (
                group_importance(load_booster(stored[booster_id], "here"), newest, model_spec)
                .set_index("feature")
                .sort_index()
            )
            there = found.loc[str(group)]
            assert set(there["grain"]) == {grain}
            assert set(there["booster_id"]) == {booster_id}
            pd.testing.assert_frame_equal(
                there[list(expected.columns)], expected, check_dtype=False, check_exact=True
            )
            compared += 1
    assert compared == len(ledger) == 7
    assert set(found["grain_name"]) == {"[]", "[region]", "[region, city]"}
    assert set(found["n_rows"]) == {SAMPLED_ROWS}


def test_the_newest_rows_that_a_model_could_be_asked_about_are_looked_at(
    features: DataFrame, rows: pd.DataFrame, spec: FleetSpec
) -> None:
    groups = pd.DataFrame({"grain": [0, 2], "group_id": ["[]", OSLO]})
    newest = newest_rows(features, groups, spec, 5)
    # Each task sends no more rows of a group than are wanted.
    plan = newest._jdf.queryExecution().executedPlan().toString()  # noqa: SLF001 - nothing public gives the plan
    assert "WindowGroupLimit" in plan.partition("Exchange hashpartitioning")[2], plan
    found = newest.toPandas().sort_values(["group_id", "_place"])
    assert found.groupby("group_id")["_place"].apply(list).to_dict() == {
        "[]": [1, 2, 3, 4, 5],
        OSLO: [1, 2, 3, 4, 5],
    }
    oslo = rows[(rows["city"] == "oslo") & rows["usual_sales"].notna()].sort_values(
        "time", ascending=False
    )
    assert found.loc[found["group_id"] == OSLO, "price"].tolist() == oslo["price"].head(5).tolist()


def test_looking_again_changes_nothing(
    spark: SparkSession,
    tables: DeltaTables,
    features: DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
    told: ImportanceResult,
) -> None:
    before = importance(tables, spec, "first")
    assert write_importance(spark, own_tables(tables, spec.name), features, spec, *first) == told
    pd.testing.assert_frame_equal(importance(tables, spec, "first"), before)


def test_a_group_whose_model_is_the_same_keeps_its_rows(
    spark: SparkSession,
    tables: DeltaTables,
    rows: pd.DataFrame,
    spec: FleetSpec,
    told: ImportanceResult,
) -> None:
    changed = rows.assign(price=rows["price"].where(rows["city"] != "oslo", rows["price"] * 1.5))
    features = in_spark(spark, changed)
    run, ledger = trained(spark, tables, features, spec, "second")
    assert write_importance(
        spark, own_tables(tables, spec.name), features, spec, run, ledger
    ) == ImportanceResult(7, 4, {})
    before, found = importance(tables, spec, "first"), importance(tables, spec, "second")
    kept = ['["south"]', '["south","napoli"]', '["south","roma"]', BERGEN]
    pd.testing.assert_frame_equal(
        found.loc[kept].drop(columns="run_id"), before.loc[kept].drop(columns="run_id")
    )
    assert set(found["run_id"]) == {"second"}
    assert set(found.loc[OSLO, "booster_id"]) == set(
        ledger.loc[ledger["group_id"] == OSLO, "booster_id"]
    )
    assert set(found.loc[OSLO, "booster_id"]) != set(before.loc[OSLO, "booster_id"])
    # A feature of another name is another feature, whatever the boosters say.
    names = tuple(
        "sales_lag_7" if name == "promotion" else name for name in run.model_spec.features
    )
    renamed = replace(run, model_spec=replace(run.model_spec, features=names))
    assert (
        write_importance(
            spark, own_tables(tables, spec.name), features, spec, renamed, ledger
        ).n_copied
        == 0
    )


def test_a_group_that_cannot_be_looked_at_is_named_and_the_others_are_there(
    spark: SparkSession,
    tables: DeltaTables,
    features: DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
    tmp_path: Path,
) -> None:
    run, ledger = first
    ids = ledger.set_index("group_id")["booster_id"]
    stored = tables.read_arrow(tables.location(spec.name, BOOSTERS.name)).to_pylist()
    kept = [row for row in stored if row["booster_id"] != ids[BERGEN]]
    damaged = [
        {**row, "sha256": "0" * 64} if row["booster_id"] == ids[OSLO] else row for row in kept
    ]
    broken = DeltaTables(root=str(tmp_path))
    location = broken.location(spec.name, BOOSTERS.name)
    for wave in {row["wave"] for row in damaged}:
        file = broken.write_file(
            pa.Table.from_pylist([row for row in damaged if row["wave"] == wave], BOOSTERS.schema),
            BOOSTERS.schema,
            location,
        )
        assert file is not None
        broken.commit(location, [file], BOOSTERS.schema, mode="append", partition={"wave": wave})
    told = write_importance(spark, own_tables(broken, spec.name), features, spec, run, ledger)
    assert set(told.failed) == {OSLO, BERGEN}
    assert "is damaged" in told.failed[OSLO]
    assert "lacks the booster" in told.failed[BERGEN]
    found = importance(broken, spec, "first")
    assert set(found.index.get_level_values(0)) == set(ids.index) - {OSLO, BERGEN}


def test_a_group_without_rows_has_gain_and_no_shap(
    spark: SparkSession,
    tables: DeltaTables,
    features: DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
    told: ImportanceResult,
) -> None:
    run, ledger = first
    without_oslo = features.where("city <> 'oslo'")
    assert write_importance(
        spark,
        own_tables(tables, spec.name),
        without_oslo,
        spec,
        replace(run, run_id="third"),
        ledger,
    ) == ImportanceResult(7, 0, {})
    found = importance(tables, spec, "third")
    assert (
        found.loc[OSLO, "gain"].tolist()
        == importance(tables, spec, "first").loc[OSLO, "gain"].tolist()
    )
    assert found.loc[OSLO, "shap"].isna().all()
    assert set(found.loc[OSLO, "n_rows"]) == {0}


def test_a_fleet_without_any_model_has_an_empty_table(
    spark: SparkSession,
    features: DataFrame,
    spec: FleetSpec,
    first: tuple[RunManifest, pd.DataFrame],
    tmp_path: Path,
) -> None:
    run, ledger = first
    nothing = DeltaTables(root=str(tmp_path))
    none = ledger.assign(booster_id=None, wave=None)
    for _ in range(2):
        assert write_importance(
            spark, own_tables(nothing, spec.name), features, spec, run, none
        ) == ImportanceResult(0, 0, {})
        assert importance(nothing, spec, "first").empty


def test_shap_of_classes_is_the_mean_over_their_scores(
    spark: SparkSession, rows: pd.DataFrame, tmp_path: Path
) -> None:
    spec = small_spec(
        task="multiclass",
        target={"column": "label"},
        baselines=None,
        grains=[[], ["region"]],
        tuning={"max_trials": 1, "max_rounds": 5},
        name="kinds",
    )
    labelled = with_classes(rows, ("low", "mid", "top"))
    features, tables = in_spark(spark, labelled), DeltaTables(root=str(tmp_path))
    run, ledger = trained(spark, tables, features, spec, "first")
    assert write_importance(
        spark, own_tables(tables, spec.name), features, spec, run, ledger
    ) == ImportanceResult(3, 0, {})
    found = importance(tables, spec, "first")
    stored = {
        row["booster_id"]: row
        for row in tables.read_arrow(tables.location(spec.name, BOOSTERS.name)).to_pylist()
    }
    newest = labelled.sort_values(["time", "row_key"], ascending=False).head(SAMPLED_ROWS)
    (booster_id,) = ledger.loc[ledger["group_id"] == "[]", "booster_id"]
    expected = (
        group_importance(load_booster(stored[booster_id], "here"), newest, run.model_spec)
        .set_index("feature")
        .sort_index()
    )
    assert (expected["shap"] > 0).any()
    pd.testing.assert_series_equal(found.loc["[]", "shap"], expected["shap"], check_exact=True)
