"""Earlier recipes that a challenger did not beat, fitted on its rows.

Their groups get newer models without newer recipes.
"""

from pathlib import Path

from assets.meta_model import pack_run
from pipeline.models.meta_model import FleetModel
from pipeline.models.promotion import EarlierRecipes
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.spark.planning import plan_run
from pipeline.spark.progress import Report
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from resources.lease import hold_lease
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource


def refit(
    tables: FleetTables,
    registry: MlflowRegistry,
    spark: SparkSessionResource,
    spec: FleetSpec,
    challenger: RunManifest,
    recipes: EarlierRecipes,
    *,
    run_id: str,
    report: Report,
    folder: Path,
) -> FleetModel:
    """Fit recipes on a challenger's rows, as a training run of their groups and of those above.

    A refit that is killed is finished by the next launch that decides the same.

    Args:
        tables: of the fleet.
        registry: where earlier versions are, whose boosters a shared pack need not store again.
        spark: trains.
        spec: of the fleet.
        challenger: the challenger's training run, whose rows and cutoffs are used.
        recipes: what is fitted.
        run_id: of the training run, unless it resumes another.
        report: called now and then with the progress.
        folder: empty or absent; gets the pack.

    Returns:
        The run's model, which is not registered.

    Raises:
        StoreError: if a training of the fleet runs.
    """
    version = challenger.features_version
    with hold_lease(tables.tables, tables.namespace, run_id) as lease:
        context = spark.training_context(report)
        request = Request.of_refit(run_id, challenger, recipes.starts)
        features = tables.features(spark.session, version)
        run = plan_run(context, features, spec, request, History.read(tables))
        ledger = train_run(context, tables, run, spec, features_version=version, lease=lease)
    manifest = tables.run(run.run_id)
    assert manifest is not None  # noqa: S101 - it has just been committed
    return pack_run(folder, tables, registry, spec, manifest, ledger)
