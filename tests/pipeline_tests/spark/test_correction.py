"""own: correction and auto, on Spark, with real tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.models.meta_model import CORRECTION, INDEPENDENT, FleetModel
from pipeline.models.pack import PackedRun, write_pack
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.spark.pilot import choose_own
from pipeline.spark.planning import plan_run
from pipeline.spec import FleetSpec
from pipeline.tables import records
from pipeline.testing.data import feature_rows, small_spec
from pipeline.testing.runs import own_tables, quiet_context, train_quietly
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def spec() -> FleetSpec:
    return small_spec(own="correction", tuning={"max_trials": 2, "max_rounds": 30})


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return feature_rows(300)


@pytest.fixture(scope="module")
def features(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    return in_spark(spark, rows)


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(
        time=rows["time"].dt.tz_localize("UTC"), known_at=rows["known_at"].dt.tz_localize("UTC")
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def planned(
    tables: DeltaTables, features: DataFrame, spec: FleetSpec, run_id: str, **request: Any
) -> PlannedRun:
    return plan_run(
        quiet_context(features.sparkSession),
        features,
        spec,
        Request(run_id, **request),
        History.read(own_tables(tables, spec.name)),
    )


def trained(
    spark: SparkSession, tables: DeltaTables, run: PlannedRun, spec: FleetSpec
) -> pd.DataFrame:
    return train_quietly(spark, own_tables(tables, spec.name), run, spec)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> DeltaTables:
    return DeltaTables(root=str(tmp_path_factory.mktemp("correction")))


@pytest.fixture(scope="module")
def ledger(
    spark: SparkSession, tables: DeltaTables, features: DataFrame, spec: FleetSpec
) -> pd.DataFrame:
    return trained(spark, tables, planned(tables, features, spec, "first"), spec)


def boosters(tables: DeltaTables, spec: FleetSpec) -> list[dict[str, Any]]:
    return tables.read_arrow(tables.location(spec.name, "boosters")).to_pylist()


def packed(
    folder: Path, tables: DeltaTables, spec: FleetSpec, ledger: pd.DataFrame, **changes: Any
) -> FleetModel:
    first = records(own_tables(tables, spec.name).runs())[0]
    generation = RunManifest.from_row(first).generation
    generation = replace(generation, model_spec=replace(generation.model_spec, **changes))
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: boosters(tables, spec))
    return FleetModel(folder)


def test_coarse_groups_predict_every_row_and_finest_ones_the_held_out_rows(
    tables: DeltaTables, ledger: pd.DataFrame, spec: FleetSpec
) -> None:
    assert set(ledger["status"]) == {"trained"}
    holdout = tables.read_pandas(tables.location(spec.name, "holdout"))
    splits = {grain: set(part["split"]) for grain, part in holdout.groupby("grain")}
    assert splits[0] == splits[1] >= {"fit", "tune", "report"}
    assert splits[2] == {"tune", "report"}
    assert holdout["prediction"].notna().all()


def test_out_of_fold_predictions_are_worse_than_the_served_model_on_its_own_rows(
    tmp_path: Path, tables: DeltaTables, ledger: pd.DataFrame, spec: FleetSpec, rows: pd.DataFrame
) -> None:
    pooled_alone = packed(
        tmp_path / "pack", tables, spec, ledger[ledger["grain"] == 0].assign(weight=1.0)
    )
    answers = pooled_alone.predict(rows).set_index(rows["row_key"])["prediction"]
    holdout = tables.read_pandas(tables.location(spec.name, "holdout"))
    out_of_fold = holdout[(holdout["grain"] == 0) & (holdout["split"] == "fit")].set_index(
        "row_key"
    )
    own_rows = (out_of_fold["actual"] - answers.reindex(out_of_fold.index)).std()
    assert (out_of_fold["actual"] - out_of_fold["prediction"]).std() > own_rows


def test_an_answer_is_the_parents_plus_what_the_trees_add(
    tmp_path: Path, tables: DeltaTables, ledger: pd.DataFrame, spec: FleetSpec, rows: pd.DataFrame
) -> None:
    batch = rows[rows["city"] == "oslo"].tail(20)
    full = packed(tmp_path / "full" / "pack", tables, spec, ledger.assign(weight=1.0)).predict(
        batch
    )
    parents = packed(
        tmp_path / "parents" / "pack",
        tables,
        spec,
        ledger.assign(weight=np.where(ledger["grain"] == 2, 0.0, 1.0)),
    ).predict(batch)
    only_oslo = ledger[(ledger["grain"] == 2) & ledger["group_id"].str.contains("oslo")].assign(
        weight=1.0
    )
    trees = packed(tmp_path / "trees" / "pack", tables, spec, only_oslo, own=INDEPENDENT).predict(
        batch
    )
    np.testing.assert_allclose(
        full["prediction"], parents["prediction"] + trees["prediction"], rtol=1e-12
    )
    half = packed(
        tmp_path / "half" / "pack",
        tables,
        spec,
        ledger.assign(weight=np.where(ledger["grain"] == 2, 0.5, 1.0)),
    ).predict(batch)
    np.testing.assert_allclose(
        half["prediction"], (full["prediction"] + parents["prediction"]) / 2, rtol=1e-12
    )


def test_a_model_that_has_no_weight_still_carries_those_that_correct_it(
    tmp_path: Path, tables: DeltaTables, ledger: pd.DataFrame, spec: FleetSpec, rows: pd.DataFrame
) -> None:
    batch = rows[rows["city"] == "oslo"].tail(20)
    all_weights = packed(
        tmp_path / "all" / "pack", tables, spec, ledger.assign(weight=1.0)
    ).predict(batch)
    finest_only = packed(
        tmp_path / "finest" / "pack",
        tables,
        spec,
        ledger.assign(weight=np.where(ledger["grain"] == 2, 1.0, 0.0)),
    ).predict(batch)
    np.testing.assert_allclose(all_weights["prediction"], finest_only["prediction"], rtol=1e-12)
    assert set(finest_only["answered_by"]) == {"[region, city]"}


def test_children_change_with_their_parents_and_nothing_else_does(
    spark: SparkSession,
    tables: DeltaTables,
    ledger: pd.DataFrame,
    spec: FleetSpec,
    rows: pd.DataFrame,
) -> None:
    assert set(planned(tables, in_spark(spark, rows), spec, "again").plan.groups["action"]) == {
        "reuse"
    }
    changed = rows.assign(price=rows["price"].where(rows["city"] != "oslo", rows["price"] + 1))
    run = planned(tables, in_spark(spark, changed), spec, "changed")
    # The pooled group holds oslo, so all groups that correct it change with it.
    assert set(run.plan.groups["action"]) == {"refresh"}
    independent = small_spec(tuning={"max_trials": 2, "max_rounds": 30}, name="alone")
    trained(
        spark, tables, planned(tables, in_spark(spark, rows), independent, "first"), independent
    )
    alone = planned(tables, in_spark(spark, changed), independent, "changed").plan.groups
    assert set(alone.loc[alone["action"] == "refresh", "group_id"]) == {
        "[]",
        '["north"]',
        '["north","oslo"]',
    }


def test_auto_corrects_only_where_that_is_better_and_keeps_its_choice(
    spark: SparkSession, tmp_path: Path, features: DataFrame
) -> None:
    tables = DeltaTables(root=str(tmp_path))
    spec = small_spec(own="auto", tuning={"max_trials": 1, "max_rounds": 30})
    run = planned(tables, features, spec, "first")
    assert run.must_choose
    own, told = choose_own(quiet_context(spark), own_tables(tables, spec.name), run, spec)
    errors = {
        name: float(number)
        for name, number in (part.split() for part in told.split(": ")[-1].split(", "))
    }
    assert set(errors) == {INDEPENDENT, CORRECTION}
    # A tie is no reason to correct.
    assert own == INDEPENDENT or errors[CORRECTION] < errors[INDEPENDENT]
    assert not tables.exists(tables.location(spec.name, "ledger"))
    chosen = plan_run(
        quiet_context(features.sparkSession),
        features,
        spec,
        Request("first"),
        History.read(own_tables(tables, spec.name)),
        own=own,
    )
    trained(spark, tables, chosen, spec)
    later = planned(tables, features, spec, "second")
    assert (later.must_choose, later.settings.model_spec.own) == (False, own)
    assert set(later.plan.groups["action"]) == {"reuse"}
