"""Names that users and tables rely on, compared with a file, so that a reviewer sees a rename."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.tables import ALL

SNAPSHOT = Path(__file__).parent / "snapshots" / "definitions.json"
REWRITE = "MANY_MODELS_WRITE_SNAPSHOTS"
COMMAND = f"{REWRITE}=1 make test ARGS=tests/assets_tests/test_snapshot.py"
EXAMPLES = ("flights", "housing")


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    """The code location as Dagster loads it, whatever mistakes the environment holds."""
    import pipeline.definitions

    return pipeline.definitions.defs()


def describe(definitions: dg.Definitions) -> dict[str, Any]:
    """The names of the example fleets, of what all fleets share, and of every table's columns."""
    fleets = {key.path[0] for key in definitions.resolve_asset_graph().get_all_asset_keys()}
    sensors = [sensor.name for sensor in definitions.sensors or ()]
    return {
        "fleets": {fleet: describe_fleet(definitions, fleet, fleets) for fleet in EXAMPLES},
        "shared": {
            "sensors": sorted(name for name in sensors if find_fleet(name, fleets) is None),
            "resources": sorted(definitions.resources or ()),
        },
        "tables": {
            contract.name: [[column.name, str(column.type)] for column in contract.columns]
            for contract in ALL
        },
    }


def describe_fleet(definitions: dg.Definitions, fleet: str, fleets: set[str]) -> dict[str, Any]:
    graph = definitions.resolve_asset_graph()
    assets: dict[str, list[str]] = {}
    for key in graph.get_all_asset_keys():
        if key.path[0] == fleet:
            assets[key.to_user_string()] = sorted(
                parent.to_user_string() for parent in graph.get(key).parent_keys
            )
    checks: dict[str, Any] = {}
    for check in graph.asset_check_keys:
        if check.asset_key.path[0] == fleet:
            checks[f"{check.asset_key.to_user_string()}:{check.name}"] = {
                "blocking": graph.get(check).blocking
            }
    jobs: dict[str, list[str]] = {}
    for job in definitions.jobs or ():
        if find_fleet(job.name, fleets) == fleet:
            # A job that is defined by the assets that it launches.
            assert not isinstance(job, dg.JobDefinition)
            jobs[job.name] = sorted(key.to_user_string() for key in job.selection.resolve(graph))
    schedules: dict[str, Any] = {}
    for schedule in definitions.schedules or ():
        if find_fleet(schedule.name, fleets) == fleet:
            assert isinstance(schedule, dg.ScheduleDefinition)
            schedules[schedule.name] = {
                "job": schedule.job_name,
                "cron": schedule.cron_schedule,
                "timezone": schedule.execution_timezone,
            }
    sensors = [sensor.name for sensor in definitions.sensors or ()]
    return {
        "assets": assets,
        "checks": checks,
        "jobs": jobs,
        "schedules": schedules,
        "sensors": sorted(name for name in sensors if find_fleet(name, fleets) == fleet),
    }


def find_fleet(name: str, fleets: set[str]) -> str | None:
    """The fleet whose name a job, schedule or sensor begins with; none for what all fleets share."""
    matching = [fleet for fleet in fleets if name.startswith(f"{fleet}_")]
    return max(matching, key=len, default=None)


def as_lines(value: Any, path: str = "") -> Iterator[str]:
    """One line per name, so that two snapshots can be told apart line by line."""
    if isinstance(value, Mapping) and value:
        for name, inner in sorted(value.items()):
            yield from as_lines(inner, f"{path} > {name}" if path else str(name))
    elif isinstance(value, list) and value:
        for inner in value:
            yield f"{path} > {inner if isinstance(inner, str) else json.dumps(inner)}"
    else:
        yield f"{path}: {json.dumps(value)}"


def explain_difference(expected: Any, actual: Any) -> str:
    """What was added, what was removed, and the command that accepts it; empty if nothing was."""
    if expected == actual:
        return ""
    before, after = list(as_lines(expected)), list(as_lines(actual))
    added = [line for line in after if line not in before]
    removed = [line for line in before if line not in after]
    parts = [f"{SNAPSHOT.name} differs from what is defined now."]
    if added:
        parts += ["Added:", *(f"  {line}" for line in added)]
    if removed:
        parts += ["Removed:", *(f"  {line}" for line in removed)]
    if not added and not removed:
        moved = [line for line, other in zip(after, before, strict=False) if line != other]
        parts += ["In another order:", *(f"  {line}" for line in moved)]
    parts.append(f"If that is meant, rewrite the file and commit it: {COMMAND}")
    return "\n".join(parts)


# Dagster 1.13 about its own code, where checks and assets of several fleets are put together.
@pytest.mark.filterwarnings("ignore:Parameter `execution_type` of function")
def test_names_of_assets_checks_jobs_resources_and_columns_are_those_of_the_snapshot(
    definitions: dg.Definitions,
) -> None:
    actual = describe(definitions)
    if os.environ.get(REWRITE):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(json.dumps(actual, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    expected = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    difference = explain_difference(expected, actual)
    if difference:
        pytest.fail(difference, pytrace=False)


def test_a_rename_is_told_as_what_was_added_and_what_was_removed() -> None:
    before = {
        "assets": {"shop/models": ["shop/features"], "shop/sales": []},
        "checks": {"shop/models:is_whole": {"blocking": True}},
    }
    after = {
        "assets": {"shop/boosters": ["shop/features"], "shop/sales": []},
        "checks": {"shop/models:is_whole": {"blocking": False}},
    }
    assert explain_difference(before, after).splitlines() == [
        "definitions.json differs from what is defined now.",
        "Added:",
        "  assets > shop/boosters > shop/features",
        "  checks > shop/models:is_whole > blocking: false",
        "Removed:",
        "  assets > shop/models > shop/features",
        "  checks > shop/models:is_whole > blocking: true",
        "If that is meant, rewrite the file and commit it: MANY_MODELS_WRITE_SNAPSHOTS=1 make test ARGS=tests/assets_tests/test_snapshot.py",
    ]


def test_columns_in_another_order_are_told() -> None:
    before = {
        "runs": [["run_id", "string"], ["as_of", "string"], ["n_groups", "int64"]],
        "leases": [],
    }
    after = {
        "leases": [],
        "runs": [["as_of", "string"], ["run_id", "string"], ["n_groups", "int64"]],
    }
    message = explain_difference(before, after)
    assert (
        'In another order:\n  runs > ["as_of", "string"]\n  runs > ["run_id", "string"]\nIf'
        in message
    )
    assert explain_difference(before, before) == ""
