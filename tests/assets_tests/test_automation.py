"""Schedules and sensors, without a daemon: what is declared, what a look at the sources asks for, what follows."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

from assets.automation import FLEET_TAG, automation, changes, kept_since
from assets.fleet import DescribedFleet
from assets.settings import FleetFiles
from pipeline.spec import FleetSpec, parse_spec
from pipeline.tables import LEDGER, RUNS
from pipeline.testing.tables import write_arrow
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

ALL = {
    "score": "0 6 * * *",
    "retrain": "0 3 * * 1",
    "timezone": "Europe/Berlin",
    "on_new_files": True,
}
SALES = dg.AssetKey(["shop", "sales"])


def spec_of(attributes: dict[str, Any], **told: Any) -> FleetSpec:
    return parse_spec({**attributes, "automation": told}, file="shop/defs.yaml")


@pytest.fixture
def files(tmp_path: Path) -> FleetFiles:
    return FleetFiles(tmp_path, "SELECT * FROM sales")


def defs_of(spec: FleetSpec, files: FleetFiles) -> dg.Definitions:
    """The fleet with the resources of a code location, which nothing here uses."""
    root = str(files.folder)
    resources = {
        "spark": SparkSessionResource(master="local[1]", scratch=root),
        "tables": DeltaTables(root=root),
        "registry": MlflowRegistry(tracking_uri=f"sqlite:///{root}/mlflow.db", scratch=root),
        "launch": LaunchSettings(),
    }
    return dg.Definitions.merge(
        DescribedFleet(spec, files).build_defs(), dg.Definitions(resources=resources)
    )


def test_nothing_is_scheduled_that_nobody_asked_for(
    shop_attributes: dict[str, Any], files: FleetFiles
) -> None:
    found = automation(spec_of(shop_attributes), files)
    assert not found.schedules
    assert not found.sensors
    assets = defs_of(spec_of(shop_attributes), files).resolve_asset_graph()
    assert not any(node.automation_condition for node in assets.asset_nodes)


def test_schedules_are_off_have_their_zone_and_launch_the_right_assets(
    shop_attributes: dict[str, Any], files: FleetFiles
) -> None:
    defs = defs_of(spec_of(shop_attributes, **ALL), files)
    score, retrain = (
        defs.resolve_schedule_def("shop_score_schedule"),
        defs.resolve_schedule_def("shop_retrain_schedule"),
    )
    for schedule, cron in ((score, "0 6 * * *"), (retrain, "0 3 * * 1")):
        assert (schedule.cron_schedule, schedule.execution_timezone) == (cron, "Europe/Berlin")
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert all(
        sensor.default_status == dg.DefaultSensorStatus.STOPPED for sensor in defs.sensors or ()
    )
    scored = {
        key.path[-1] for key in defs.resolve_job_def("shop_score").asset_layer.executable_asset_keys
    }
    assert scored == {"sales", "features", "predictions"}
    whole = {
        key.path[-1]
        for key in defs.resolve_job_def("shop_retrain").asset_layer.executable_asset_keys
    }
    assert whole == {
        "sales",
        "features",
        "models",
        "importance",
        "meta_model",
        "champion",
        "predictions",
    }


def test_by_default_the_fleets_zone_counts(
    shop_attributes: dict[str, Any], files: FleetFiles
) -> None:
    for zone, expected in ((None, "UTC"), ("Asia/Tokyo", "Asia/Tokyo")):
        spec = spec_of({**shop_attributes, "timezone": zone}, score="0 6 * * *")
        (schedule,) = automation(spec, files).schedules or ()
        assert schedule.execution_timezone == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("resume", [True, False])
def test_only_a_run_whose_process_is_gone_is_launched_again(
    shop_attributes: dict[str, Any], files: FleetFiles, resume: bool
) -> None:
    job = defs_of(spec_of(shop_attributes, resume=resume), files).resolve_job_def("shop_retrain")
    retried = (
        {"dagster/max_retries": "1", "dagster/retry_on_asset_or_op_failure": "false"}
        if resume
        else {}
    )
    assert {name: value for name, value in job.tags.items() if "retr" in name} == retried
    assert job.tags[FLEET_TAG] == "shop"


def test_automation_changes_neither_models_nor_feature_tables(
    shop_attributes: dict[str, Any],
) -> None:
    from pipeline.recognition import features_digest

    plain, told = spec_of(shop_attributes), spec_of(shop_attributes, **ALL)
    assert plain.training_digest == told.training_digest
    assert features_digest(plain, "", {}, {}) == features_digest(told, "", {}, {})


# Files


def asked(requests: list[dg.RunRequest]) -> list[list[str]]:
    return [[key.to_user_string() for key in request.asset_selection or ()] for request in requests]


def test_a_source_is_read_once_it_looked_the_same_twice(shop_attributes: dict[str, Any]) -> None:
    spec, cursor = spec_of(shop_attributes, **ALL), None
    for state, expected in [
        ("a", []),  # may still be written
        ("a", [["shop/sales"]]),
        ("a", []),
        ("b", []),
        ("c", []),  # another look, another size
        (None, []),  # changed a moment ago
        ("c", [["shop/sales"]]),
        ("c", []),
        ("a", []),
        ("a", [["shop/sales"]]),  # back to what it was: its raw table is not
    ]:
        requests, cursor = changes(spec, {"sales": state}, cursor)
        assert asked(requests) == expected, (state, cursor)


def test_changed_sources_are_read_by_one_run(shop_attributes: dict[str, Any]) -> None:
    sources = [{"name": "sales", "uri": "sales.csv"}, {"name": "shops", "uri": "shops.csv"}]
    spec = spec_of({**shop_attributes, "sources": sources}, **ALL)
    _, cursor = changes(spec, {"sales": "a", "shops": "x"}, None)
    requests, cursor = changes(spec, {"sales": "a", "shops": "x"}, cursor)
    assert asked(requests) == [["shop/sales", "shop/shops"]]
    _, cursor = changes(spec, {"sales": "a", "shops": "y"}, cursor)
    requests, _ = changes(spec, {"sales": "a", "shops": "y"}, cursor)
    assert asked(requests) == [["shop/shops"]]
    assert requests[0].tags[FLEET_TAG] == "shop"


def test_the_sensor_looks_at_real_files(shop_attributes: dict[str, Any], files: FleetFiles) -> None:
    sensor = defs_of(spec_of(shop_attributes, **ALL), files).resolve_sensor_def("shop_new_files")
    cursor = None

    def look() -> dg.SensorResult:
        nonlocal cursor
        with dg.build_sensor_context(cursor=cursor) as context:
            found = sensor(context)
        assert isinstance(found, dg.SensorResult)
        cursor = found.cursor
        return found

    assert not look().run_requests  # there is no file yet, which is no fault
    file = files.folder / "sales.csv"
    old = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    for text in ("store,amount\n1,2\n", "store,amount\n1,2\n1,3\n"):
        file.write_text(text)
        # Written a moment ago: it may change within the resolution of its time.
        assert not look().run_requests
        settle(file, old)
        assert not look().run_requests
        assert asked(look().run_requests or []) == [["shop/sales"]]  # type: ignore[arg-type]
        assert not look().run_requests


def settle(file: Path, moment: float) -> None:
    """Wait until a file's times are no doubt any more; only its entry's cannot be set."""
    import os
    import time

    from pipeline.reading.sources import LOCAL_DOUBT_SECONDS

    os.utime(file, (moment, moment))
    time.sleep(LOCAL_DOUBT_SECONDS + 0.1)


def test_features_and_predictions_follow_their_inputs(
    shop_attributes: dict[str, Any], files: FleetFiles
) -> None:
    defs = defs_of(spec_of(shop_attributes, **ALL), files)
    features, champion, predictions = (
        dg.AssetKey(["shop", name]) for name in ("features", "champion", "predictions")
    )
    instance = dg.DagsterInstance.ephemeral()

    def materialised(*keys: dg.AssetKey) -> None:
        for key in keys:
            instance.report_runless_asset_event(dg.AssetMaterialization(key))

    first = dg.evaluate_automation_conditions(defs, instance)
    assert first.total_requested == 0
    materialised(SALES)
    second = dg.evaluate_automation_conditions(defs, instance, cursor=first.cursor)
    # Nothing serves yet: there is nobody to answer.
    assert (second.get_num_requested(features), second.get_num_requested(predictions)) == (1, 0)
    materialised(features, champion, predictions)
    third = dg.evaluate_automation_conditions(defs, instance, cursor=second.cursor)
    assert third.total_requested == 0
    materialised(SALES)
    fourth = dg.evaluate_automation_conditions(defs, instance, cursor=third.cursor)
    assert (fourth.get_num_requested(features), fourth.get_num_requested(predictions)) == (1, 1)


# Runs that died


def test_what_a_dead_run_kept_is_told(tmp_path: Path) -> None:
    tables = DeltaTables(root=str(tmp_path))
    start = pd.Timestamp("2026-05-01 12:00", tz="UTC")
    runs = [
        {"run_id": "old", "started_at": start - pd.Timedelta(hours=9), "n_groups": 7},
        {"run_id": "done", "started_at": start, "finished_at": start, "n_groups": 7},
        {"run_id": "dead", "started_at": start + pd.Timedelta(minutes=1), "n_groups": 1043},
    ]
    for contract, rows in (
        (RUNS, runs),
        (LEDGER, [{"run_id": "dead", "group_id": name} for name in "abc"]),
    ):
        write_arrow(
            tables,
            [pa.Table.from_pylist(rows, schema=contract.schema)],
            contract.schema,
            tables.location("shop", contract.name),
            mode="append",
        )
    (tmp_path / "empty").mkdir()
    assert list(kept_since(tables, start.to_pydatetime())) == [
        (
            "the run's process is gone: 3 of 1,043 groups of shop are kept; "
            "the next launch with the same settings resumes training run dead"
        )
    ]
