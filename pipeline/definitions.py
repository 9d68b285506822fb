"""The code location: every fleet under defs/, with the resources of the profile in force. Imported by nobody."""

import sys
from functools import cache
from pathlib import Path

import dagster as dg

from assets.automation import what_dead_runs_kept
from assets.broken_fleet import broken_fleets
from assets.console import console_logger
from assets.fleets import load_fleets
from pipeline.faults import arm
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.profiles import current_profile
from resources.spark_session import SparkSessionResource

PROJECT = Path(__file__).parent.parent


# Dagster loads a code location several times within one command.
@cache
def _report_broken(fleet: str, message: str) -> None:
    first, *others = message.splitlines()
    more = " many-models check lists them." if others else ""
    sys.stderr.write(f"fleet {fleet} is broken and left out: {first}{more}\n")


@dg.definitions
def defs() -> dg.Definitions:
    """All fleets, in one process and one Spark session per run."""
    profile = current_profile(PROJECT)
    scratch = f"{profile.data_root}/scratch"
    arm(profile.crash_at)
    common = dg.Definitions(
        resources={
            "spark": SparkSessionResource(master=profile.spark_master, worker_python=profile.worker_python, scratch=scratch),
            "tables": DeltaTables(root=profile.tables_root),
            "registry": MlflowRegistry(tracking_uri=profile.mlflow_uri, artifact_root=profile.mlflow_artifacts, scratch=scratch),
            "launch": LaunchSettings(
                as_of=profile.as_of,
                limit_groups=profile.limit_groups,
                retrain=profile.retrain,
                groups=list(profile.groups),
                dry_run=profile.dry_run,
            ),
        },
        sensors=[what_dead_runs_kept],
        executor=dg.in_process_executor,
        loggers={"console": console_logger(Path(profile.data_root) / "logs")},
    )
    fleets = load_fleets(PROJECT)
    for name, message in broken_fleets(fleets).items():
        _report_broken(name, message)
    return dg.Definitions.merge(fleets, common)
