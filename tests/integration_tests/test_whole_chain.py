"""A small real fleet through real Spark, Delta and MLflow: what every link leaves, and what running it again does."""

from typing import Any

import pandas as pd
import pytest

from resources.spark_session import SparkSessionResource

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]

CITIES = ("Abilene", "Amarillo", "Austin", "Dallas", "Houston", "Midland")


def test_every_link_is_materialised_and_every_check_passes(chain: Any) -> None:
    links = {
        event.asset_key.path[-1]
        for event in chain.result.get_asset_materialization_events()
        if event.asset_key
    }
    assert links == {
        "txhousing",
        "features",
        "models",
        "importance",
        "meta_model",
        "champion",
        "predictions",
    }
    checks = chain.result.get_asset_check_evaluations()
    assert len(checks) == 15
    assert [check.check_name for check in checks if not check.passed] == []


def test_every_group_has_one_ledger_row_and_every_future_row_one_answer(chain: Any) -> None:
    ledger = chain.table("housing", "ledger")
    assert sorted(ledger.loc[ledger["grain"] == 1, "group_id"]) == sorted(
        f'["{city}"]' for city in CITIES
    )
    assert len(ledger) == 1 + len(CITIES)
    predictions = chain.table("housing", "predictions")
    assert sorted(predictions["city"]) == sorted(CITIES)
    assert predictions["prediction"].notna().all()
    assert (predictions["lower"] <= predictions["upper"]).all()
    assert set(predictions["time"].dt.strftime("%Y-%m")) == {"2015-08"}


def test_materialisations_tell_rows_states_and_show_plots(chain: Any) -> None:
    metadata = {
        event.asset_key.path[-1]: event.materialization.metadata
        for event in chain.result.get_asset_materialization_events()
        if event.asset_key
    }
    assert metadata["txhousing"]["dagster/row_count"].value == 8602
    assert metadata["predictions"]["dagster/row_count"].value == len(CITIES)
    assert "trained" in str(metadata["models"]["fleet/status"].value)
    assert "Abilene" in str(metadata["models"]["fleet/worst_groups"].value)
    for link in ("models", "meta_model", "predictions"):
        assert str(metadata[link]["fleet/plot"].value).startswith(
            "![plot](data:image/png;base64,iVBOR"
        )


def test_a_second_run_gives_the_same_boosters_and_answers_and_no_new_version(chain: Any) -> None:
    before = chain.table("housing", "predictions").set_index("row_key").sort_index()
    chain.run_again()
    after = chain.table("housing", "predictions").set_index("row_key").sort_index()
    assert len(after) == len(before)
    pd.testing.assert_frame_equal(
        after[["prediction", "booster_id"]], before[["prediction", "booster_id"]]
    )
    assert after["fleet_version"].equals(before["fleet_version"])
    assert chain.resources["registry"].find("housing", "2") is None
    ledger = chain.table("housing", "ledger")
    first, second = (
        rows.set_index("group_id")["booster_id"].sort_index()
        for _, rows in ledger.groupby("run_id", sort=False)
    )
    assert first.equals(second)


def test_a_trial_on_a_few_groups_touches_nothing_real(chain: Any) -> None:
    runs, predictions = chain.table("housing", "runs"), chain.table("housing", "predictions")
    chain.run_again(limit_groups=2)
    assert len(chain.table("housing-trial", "ledger")) == 3
    assert chain.resources["registry"].find("housing-trial", "champion") is not None
    pd.testing.assert_frame_equal(chain.table("housing", "runs"), runs)
    pd.testing.assert_frame_equal(chain.table("housing", "predictions"), predictions)


def test_a_dry_run_trains_nothing(chain: Any) -> None:
    runs = chain.table("housing", "runs")
    result = chain.run_again(dry_run=True)
    assert result.success
    links = {
        event.asset_key.path[-1]
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }
    assert links == {"txhousing", "features"}
    pd.testing.assert_frame_equal(chain.table("housing", "runs"), runs)


def test_resource_settings_reach_spark(spark_resource: SparkSessionResource) -> None:
    assert spark_resource.session.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark_resource.session.conf.get("spark.sql.runSQLOnFiles") == "false"
