"""Builds the resources of a profile, in one place for Dagster and for the commands."""

from dataclasses import dataclass

import dagster as dg

from resources.delta_tables import DeltaTables
from resources.mlflow_registry import MlflowRegistry
from resources.profiles import SPARK_MASTER, TRACKING_URI, WORKER_PYTHON, Profile
from resources.spark_session import SparkSessionResource


@dataclass(frozen=True)
class Resources:
    """What assets and commands use.

    Args:
        spark: the session, not started yet.
        tables: all Delta tables.
        registry: MLflow's runs and registered models.
    """

    spark: SparkSessionResource
    tables: DeltaTables
    registry: MlflowRegistry


def build_resources(profile: Profile, *, by_variable: bool = False) -> Resources:
    """Build the resources of a profile.

    Args:
        profile: checked already, so that no variable named here is missing.
        by_variable: whether settings that the environment gives are passed as `dg.EnvVar`, which
            Dagster reads when a run starts. Its pages then show the variable's name, not a server's
            address with the password that may be in it.
    """
    scratch = f"{profile.data_root}/scratch"
    master = profile.spark_master
    worker_python = profile.worker_python
    tracking_uri = profile.mlflow_uri
    if by_variable and profile.is_cluster:
        master = dg.EnvVar(SPARK_MASTER)
    if by_variable and worker_python is not None:
        worker_python = dg.EnvVar(WORKER_PYTHON)
    if by_variable and profile.tracking_uri is not None:
        tracking_uri = dg.EnvVar(TRACKING_URI)
    return Resources(
        spark=SparkSessionResource(master=master, worker_python=worker_python, scratch=scratch),
        tables=DeltaTables(root=profile.tables_root),
        registry=MlflowRegistry(
            tracking_uri=tracking_uri, artifact_root=profile.mlflow_artifacts, scratch=scratch
        ),
    )
