from typing import Any

import dagster as dg
import pandas as pd
import pytest
from pydantic import ValidationError

from pipeline.errors import SpecError
from pipeline.spec import FleetSpec
from resources.launch_settings import LaunchSettings, RefusedSettings

LISTED = ['["north","n0"]']


def test_a_trial_keeps_its_tables_and_model_apart(shop: FleetSpec) -> None:
    assert LaunchSettings().namespace(shop) == "shop"
    assert LaunchSettings(limit_groups=3).namespace(shop) == "shop-trial"


def test_the_launch_comes_before_the_fleet_and_the_fleet_before_the_data(shop: FleetSpec) -> None:
    dated = shop.model_copy(update={"as_of": "2013-12-24"})
    assert LaunchSettings().moment(shop) is None
    assert LaunchSettings().moment(dated) == pd.Timestamp("2013-12-24")
    assert LaunchSettings(as_of="2014-01-01T18:00").moment(dated) == pd.Timestamp(
        "2014-01-01 18:00"
    )


def test_a_moment_with_a_zone_becomes_utc(shop: FleetSpec) -> None:
    assert LaunchSettings(as_of="2014-01-01T01:00+02:00").moment(shop) == pd.Timestamp(
        "2013-12-31 23:00"
    )


@pytest.mark.parametrize("text", ["yesterdayish", "2013-13-01", "24.12.2013 nachts", "NaT"])
def test_what_is_no_moment_is_refused(shop: FleetSpec, text: str) -> None:
    with pytest.raises(
        SpecError, match=r"as_of: .* is not a date or time; expected one such as 2013-12-24"
    ) as told:
        LaunchSettings(as_of=text).moment(shop)
    assert text in str(told.value)


@pytest.mark.parametrize("number", [0, -1])
def test_a_limit_is_at_least_one(number: int) -> None:
    with pytest.raises(ValidationError, match="limit_groups"):
        LaunchSettings(limit_groups=number)


def test_a_launch_asks_for_what_its_settings_say(shop: FleetSpec) -> None:
    request = LaunchSettings(as_of="2014-01-01", limit_groups=3, retrain="stale").request(
        shop, "run-7"
    )
    assert (request.run_id, request.as_of, request.limit_groups) == (
        "run-7",
        pd.Timestamp("2014-01-01"),
        3,
    )
    assert (request.retrain, request.listed) == ("stale", ())
    plain = LaunchSettings().request(shop, "run-8")
    assert (plain.as_of, plain.limit_groups, plain.retrain, plain.listed) == (
        None,
        None,
        "changed",
        (),
    )


@pytest.mark.parametrize("retrain", ["changed", "listed"])
def test_groups_mean_that_those_are_trained(shop: FleetSpec, retrain: Any) -> None:
    request = LaunchSettings(retrain=retrain, groups=LISTED).request(shop, "run-7")
    assert (request.retrain, request.listed) == ("listed", tuple(LISTED))


@pytest.mark.parametrize("retrain", ["stale", "all"])
def test_groups_with_another_choice_are_refused(shop: FleetSpec, retrain: Any) -> None:
    with pytest.raises(
        SpecError,
        match=f"groups are listed, and retrain is '{retrain}'; expected listed, or no groups",
    ):
        LaunchSettings(retrain=retrain, groups=LISTED).request(shop, "run-7")


def test_listed_without_groups_is_refused(shop: FleetSpec) -> None:
    with pytest.raises(SpecError, match="retrain is listed, and no group is; name some in groups"):
        LaunchSettings(retrain="listed").request(shop, "run-7")


def test_requests_that_ask_for_the_same_read_the_same(shop: FleetSpec) -> None:
    one, other = (
        LaunchSettings(groups=groups).request(shop, "run").text
        for groups in (["[]", *LISTED], [*LISTED, "[]"])
    )
    assert one == other != LaunchSettings().request(shop, "run").text


def test_every_setting_says_what_it_does() -> None:
    assert [
        name for name, field in LaunchSettings.model_fields.items() if not field.description
    ] == []


def test_refused_settings_end_a_launch_before_its_first_step() -> None:
    started = []

    @dg.asset
    def first(launch: LaunchSettings) -> None:
        started.append(launch)

    launch = RefusedSettings(mistake="MANY_MODELS_LIMIT_GROUPS is 'abc'")
    result = dg.materialize([first], resources={"launch": launch}, raise_on_error=False)
    assert not result.success
    assert started == []
    (failure,) = (
        event for event in result.all_events if event.event_type == dg.DagsterEventType.RUN_FAILURE
    )
    assert "MANY_MODELS_LIMIT_GROUPS is 'abc'" in failure.job_failure_data.error.to_string()
