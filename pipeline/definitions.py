"""The code location: every fleet under defs/, with the resources of the active profile.

No other module imports it.
"""

import sys
from functools import cache
from pathlib import Path

import dagster as dg

from assets.automation import what_dead_runs_kept
from assets.broken_fleet import broken_fleets
from assets.console import console_logger
from assets.fleets import load_fleets
from pipeline.crash_points import arm
from pipeline.errors import SpecError
from resources.build import build_resources
from resources.launch_settings import LaunchSettings, RefusedSettings
from resources.profiles import Profile, current_profile, fallback_profile

PROJECT = Path(__file__).parent.parent


# Dagster loads a code location several times within one command.
@cache
def _report_broken(fleet: str, message: str) -> None:
    first, *others = message.splitlines()
    line = f"fleet {fleet} is broken and left out: {first}"
    if others:
        line += " many-models check lists them."
    sys.stderr.write(f"{line}\n")


@cache
def _report_refused(message: str) -> None:
    sys.stderr.write(f"nothing can be launched: {message}\n")


def _settings() -> tuple[Profile, LaunchSettings]:
    """The active profile and the settings of a launch.

    Where the environment has a mistake, the settings refuse every launch.
    """
    try:
        profile = current_profile(PROJECT)
        arm(profile.crash_at)
    except SpecError as error:
        mistake = f"{error}; correct or unset the variable, then launch again"
        _report_refused(mistake)
        return fallback_profile(PROJECT), RefusedSettings(mistake=mistake)
    return profile, LaunchSettings(
        as_of=profile.as_of,
        limit_groups=profile.limit_groups,
        retrain=profile.retrain,
        groups=list(profile.groups),
        dry_run=profile.dry_run,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """All fleets, in one process and one Spark session per run."""
    profile, launch = _settings()
    built = build_resources(profile, by_variable=True)
    common = dg.Definitions(
        resources={
            "spark": built.spark,
            "tables": built.tables,
            "registry": built.registry,
            "launch": launch,
        },
        sensors=[what_dead_runs_kept],
        executor=dg.in_process_executor,
        loggers={"console": console_logger(Path(profile.data_root) / "logs")},
    )
    fleets = load_fleets(PROJECT)
    for name, message in broken_fleets(fleets).items():
        _report_broken(name, message)
    return dg.Definitions.merge(fleets, common)
