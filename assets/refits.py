"""Earlier recipes that a challenger did not beat, fitted on its rows: their groups get newer models without newer recipes."""

from pathlib import Path
from typing import Any

import pandas as pd

from assets.meta_model import packed
from assets.newest_run import ledger_of
from pipeline.models.meta_model import FleetModel
from pipeline.models.promotion import EarlierRecipes
from pipeline.spark.fleet_training import Cluster, History, Request, plan_run, read_runs, train_run
from pipeline.spark.training import Report
from pipeline.spec import FleetSpec
from resources.delta_tables import DeltaTables
from resources.lease import hold_lease
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource


def is_older(tables: DeltaTables, namespace: str, fleet_version: str, than: "pd.Series[Any]") -> bool:
    """Whether a run was fitted on other rows than another.

    Args:
        tables: where the runs are.
        namespace: of the tables.
        fleet_version: the run.
        than: the other's row of `tables.RUNS`.
    """
    runs = read_runs(tables, namespace)
    run = runs[runs["run_id"] == fleet_version].iloc[-1]
    return any(run[name] != than[name] for name in ("as_of", "features_version"))


def refit(
    tables: DeltaTables,
    registry: MlflowRegistry,
    spark: SparkSessionResource,
    spec: FleetSpec,
    namespace: str,
    challenger: "pd.Series[Any]",
    recipes: EarlierRecipes,
    *,
    run_id: str,
    report: Report,
    folder: Path,
) -> FleetModel:
    """Fit recipes on the rows of a challenger, as a training run of their groups and of those above them.

    A refit that is killed is finished by the next launch that decides the same.

    Args:
        tables: where the fleet's tables are.
        registry: where its versions are.
        spark: trains.
        spec: the fleet.
        namespace: of tables and versions.
        challenger: its row of `tables.RUNS`.
        recipes: what is fitted.
        run_id: of the training run, unless it resumes another.
        report: called now and then with what is done.
        folder: empty or absent; gets the pack.

    Returns:
        The run's model, which is not registered.

    Raises:
        StoreError: if a training of the fleet runs.
    """
    features_version = int(challenger["features_version"])
    with hold_lease(tables, namespace, run_id) as lease:
        features = tables.read_spark(spark.session, tables.location(spec.name, "features"), features_version)
        request = Request.of_refit(run_id, challenger, recipes.starts)
        run = plan_run(features, spec, request, History.read(tables, namespace), slots=spark.slots, threads=spark.task_cpus)
        cluster = Cluster(spark.session, report, spark.group_memory_bytes)
        train_run(cluster, tables, namespace, run, spec, features_version=features_version, lease=lease)
    runs = read_runs(tables, namespace)
    manifest = runs[runs["run_id"] == run.run_id].iloc[-1]
    return packed(folder, tables, registry, namespace, spec, manifest, ledger_of(tables, namespace, run.run_id))
