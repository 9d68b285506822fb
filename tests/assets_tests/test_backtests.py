"""A launch that pretends an earlier day than the version that serves leaves it, its aliases and its tables alone."""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from resources.launch_settings import LaunchSettings

pytestmark = pytest.mark.spark

Metadata = Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]]
Failure = Callable[[dg.ExecuteInProcessResult], str]
BEFORE = "2023-08-15"
BACKTEST = "shop-backtest-2023-08-15"


def settings(fleet: Any, **changes: Any) -> str:
    """The namespace of a launch with these settings."""
    spec = changes.pop("spec", fleet.spec)
    scope = LaunchSettings(**changes).scope(
        spec, fleet.resources["tables"], fleet.resources["registry"]
    )
    return scope.namespace


def test_only_an_as_of_before_that_of_the_version_that_serves_is_a_backtest(fleet: Any) -> None:
    assert settings(fleet, as_of=BEFORE) == BACKTEST
    assert settings(fleet, as_of="2023-10-14T23:59:30") == "shop-backtest-2023-10-14T235930"
    assert (
        settings(fleet)
        == settings(fleet, as_of="2023-10-15")
        == settings(fleet, as_of="2023-11-01")
        == "shop"
    )
    # A trial has a champion of its own, and so far none.
    assert settings(fleet, as_of=BEFORE, limit_groups=2) == "shop-trial"


def test_a_pinned_fleet_keeps_its_champion_and_can_roll_it_back(fleet: Any) -> None:
    pinned = fleet.spec.model_copy(update={"as_of": "2023-10-15"})
    earlier = fleet.spec.model_copy(update={"as_of": BEFORE})
    assert settings(fleet, spec=pinned) == "shop"
    assert settings(fleet, spec=earlier) == BACKTEST
    # What serves is decided upon where it serves, unless the launch itself goes back.
    assert settings(fleet, spec=earlier, decision="rollback") == "shop"
    assert settings(fleet, as_of=BEFORE, decision="promote") == BACKTEST


def test_without_a_version_that_serves_the_past_is_no_backtest(fleet: Any) -> None:
    fleet.resources["registry"].aliases.clear()
    assert settings(fleet, as_of=BEFORE) == "shop"


def test_a_backtest_changes_nothing_that_serves(fleet: Any, metadata: Metadata) -> None:
    registry = fleet.resources["registry"]
    aliases = dict(registry.aliases)
    names = ("runs", "ledger", "decisions", "predictions")
    before = {name: fleet.table(name) for name in names}
    launch = LaunchSettings(as_of=BEFORE)
    result = fleet.launch(
        "models", "importance", "meta_model", "champion", "predictions", launch=launch
    )
    assert result.success
    assert {
        alias: number for alias, number in registry.aliases.items() if alias[0] == "shop"
    } == aliases
    for name in names:
        pd.testing.assert_frame_equal(fleet.table(name), before[name])
    told = metadata(result)
    assert told["meta_model"]["fleet/registered_model"] == BACKTEST
    assert (told["champion"]["fleet/before"], told["champion"]["fleet/champion"]) == ("none", "1")
    tables = fleet.resources["tables"]
    answered = tables.read_pandas(tables.location(BACKTEST, "predictions"))
    (run,) = tables.read_pandas(tables.location(BACKTEST, "runs")).to_dict("records")
    assert set(answered["fleet_version"]) == {run["run_id"]} == {result.run_id}
    assert run["as_of"] == pd.Timestamp(BEFORE, tz="UTC")
    assert answered["time"].min() == pd.Timestamp("2023-09-01", tz="UTC")
    # Launched alone, a link finds the same place.
    again = fleet.launch("predictions", launch=launch)
    assert again.success
    assert metadata(again)["predictions"]["fleet/fleet_version"] == result.run_id


def test_rows_are_not_answered_by_a_version_that_saw_later_ones(
    fleet: Any, failure: Failure
) -> None:
    spec = fleet.spec.model_copy(update={"as_of": BEFORE})
    earlier = type(fleet)(spec, fleet.files, fleet.resources)
    result = earlier.launch("predictions", launch=LaunchSettings(decision="keep"))
    assert not result.success
    expected = (
        "version 1 of 'shop' saw rows known until 2023-10-15 00:00:00, "
        "and this launch is as of 2023-08-15 00:00:00"
    )
    assert failure(result).startswith(expected)
