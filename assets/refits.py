"""Earlier recipes that a challenger did not beat, fitted on its rows.

Their groups get newer models without newer recipes.
"""

import pandas as pd

from pipeline.models.promotion import EarlierRecipes
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.history import History
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.spark.planning import plan_run
from pipeline.spark.training import TrainingContext
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from resources.lease import hold_lease


def refit(
    context: TrainingContext,
    tables: FleetTables,
    spec: FleetSpec,
    challenger: RunManifest,
    recipes: EarlierRecipes,
    *,
    run_id: str,
) -> tuple[RunManifest, pd.DataFrame]:
    """Fit recipes on a challenger's rows, as a training run of their groups and of those above.

    A refit that is killed is finished by the next launch that decides the same.

    Args:
        context: where it trains.
        tables: of the fleet.
        spec: of the fleet.
        challenger: the challenger's training run, whose rows and cutoffs are used.
        recipes: what is fitted.
        run_id: of the training run, unless it resumes another.

    Returns:
        The training run, and its ledger.

    Raises:
        StoreError: if a training of the fleet runs.
    """
    version = challenger.features_version
    with hold_lease(tables.tables, tables.namespace, run_id) as lease:
        request = Request.of_refit(run_id, challenger, recipes.starts)
        features = tables.features(context.spark, version)
        run = plan_run(context, features, spec, request, History.read(tables))
        ledger = train_run(context, tables, run, spec, features_version=version, lease=lease)
    manifest = tables.run(run.run_id)
    assert manifest is not None  # noqa: S101 - it has just been committed
    return manifest, ledger
