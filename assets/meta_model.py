"""`<fleet>/meta_model`: one registered model that answers for every group."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import pandas as pd

from assets.settings import asset_settings, check_specs, png, prefixed, readable_failures
from pipeline.models.meta_model import FleetModel, PackError, filesystem_of
from pipeline.models.pack import PackedRun, PackStore, answers_alike, write_pack
from pipeline.models.registry import RunRecord
from pipeline.reporting.plots import training_plot
from pipeline.reporting.summary import fleet_errors, markdown_table, shown_measures
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.manifest import RunManifest
from pipeline.spec import FleetSpec
from pipeline.tables import BOOSTERS
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version, interface_of
from resources.spark_session import SparkSessionResource

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LEDGER_ROWS_LOGGED = 10_000
# Rows that the check `registered_model_answers` scores.
SAMPLED_ROWS = 50
SHARED = "shared"


CHECKS = {
    "registered_model_answers": "Loaded from the registry it gives the pack's answers.",
    "registered_versions_are_whole": "Every file that the champion and the challenger answer from "
    "is there, of the right size and with the right footer.",
}


def meta_model_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The registered model of a fleet."""

    @dg.asset(
        **asset_settings(
            spec,
            "meta_model",
            description="One MLflow model version that answers for every group: all boosters, "
            "weights and categories in one pack.",
            kinds={"mlflow", "lightgbm"},
            deps=["models"],
        ),
        check_specs=check_specs(spec, "meta_model", CHECKS, blocking=["registered_model_answers"]),
    )
    def meta_model(
        context: dg.AssetExecutionContext,
        tables: DeltaTables,
        registry: MlflowRegistry,
        spark: SparkSessionResource,
        launch: LaunchSettings,
    ) -> dg.MaterializeResult:
        with readable_failures(), tempfile.TemporaryDirectory() as folder:
            own = launch.scope(spec, tables, registry).tables
            run = own.newest_run()
            ledger = own.ledger(run.run_id)
            features = own.features(spark.session, run.features_version)
            plot = training_plot(ledger, spec)
            registered = _version_of_the_same_answers(own, registry, spec, run, ledger)
            if registered is None:
                n_models = ledger["booster_id"].nunique()
                context.log.info(
                    f"packing {n_models:,} models into one version, and registering it"
                )
                model = pack_run(Path(folder) / "pack", own, registry, spec, run, ledger)
                record = _run_record(run, ledger, spec, plot)
                version = register_model(registry, own.namespace, model, features, record)
                registered = _Registered(version, model)
                context.log.info(f"registered {registered.title} as challenger, {registered.size}")
            else:
                same = f"{registered.title} answers as run {run.run_id} does"
                context.log.info(f"nothing changed: {same}, {registered.size}")
            checks = [
                _registered_model_answers(registered, registry, features, tables.storage_options),
                _registered_versions_are_whole(registry, own.namespace, tables.storage_options),
            ]
            metadata = _metadata(registered, ledger, spec, plot)
        return dg.MaterializeResult(metadata=metadata, check_results=checks)

    return meta_model


@dataclass(frozen=True)
class _Registered:
    """The version that answers as the newest run does.

    Args:
        version: as it is registered.
        model: from the pack that was just written, or from the registry if none had to be written.
    """

    version: Version
    model: FleetModel

    @property
    def pack_bytes(self) -> int:
        """Size of the pack."""
        return sum(path.stat().st_size for path in self.model.folder.iterdir())

    @property
    def size(self) -> str:
        """Size of the pack, for people."""
        return f"{self.pack_bytes / 1e6:.1f} MB"

    @property
    def title(self) -> str:
        """The version, for people."""
        version = self.version
        return f"{version.name} version {version.number} (run {version.fleet_version})"


def register_model(
    registry: MlflowRegistry,
    namespace: str,
    model: FleetModel,
    features: "DataFrame",
    record: RunRecord,
    *,
    alias: str | None = CHALLENGER,
) -> Version:
    """Register a model from its pack.

    Args:
        registry: where it is registered.
        namespace: name of the registered model.
        model: opened from the pack.
        features: gives the types of the columns that the model reads.
        record: what the MLflow run shows.
        alias: that the version gets; None for none.
    """
    return registry.register(
        namespace,
        model.fleet_version,
        pack=model.folder,
        interface=interface_of(model, dict(features.dtypes)),
        record=record,
        alias=alias,
    )


def _metadata(
    registered: _Registered, ledger: pd.DataFrame, spec: FleetSpec, plot: bytes
) -> dict[str, Any]:
    """What the Dagster UI shows of the newest version."""
    version = registered.version
    errors = pd.DataFrame(list(map(vars, fleet_errors(ledger, spec))))
    facts = {
        "registered_model": version.name,
        "version": version.number,
        "fleet_version": version.fleet_version,
        "groups": len(ledger),
        "pack_bytes": registered.pack_bytes,
    }
    return {
        **prefixed(facts),
        "fleet/errors": dg.MetadataValue.md(markdown_table(errors)),
        "fleet/plot": png(plot),
    }


def pack_run(
    folder: Path,
    tables: FleetTables,
    registry: MlflowRegistry,
    spec: FleetSpec,
    run: RunManifest,
    ledger: pd.DataFrame,
) -> FleetModel:
    """The model of a run, from a pack that is written into an empty or absent folder.

    A shared pack does not store again the boosters of the newest registered version.
    """
    options = tables.tables.storage_options

    def read_boosters(names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        where = {"wave": list(run.waves), "booster_id": list(names)}
        yield from tables.tables.read_arrow(tables.location(BOOSTERS), where=where).to_pylist()

    before: list[FleetModel] = []
    if spec.pack == SHARED:
        before = _challenger(registry, tables.namespace, options)
    digest = write_pack(
        folder,
        [PackedRun(run.generation, ledger)],
        read_boosters,
        store=pack_store(tables, spec),
        before=before,
    )
    return FleetModel(folder, digest=digest, options=options)


def _version_of_the_same_answers(
    tables: FleetTables,
    registry: MlflowRegistry,
    spec: FleetSpec,
    run: RunManifest,
    ledger: pd.DataFrame,
) -> _Registered | None:
    """The newest version, if it gives the answers of this run.

    None where it does not, or is not whole.
    """
    version = registry.find(tables.namespace, CHALLENGER)
    if version is None:
        return None
    before = tables.run(version.fleet_version)
    if before is None or before.spec_digest != run.spec_digest:
        return None
    earlier = PackedRun(before.generation, tables.ledger(before.run_id))
    if not answers_alike(earlier, PackedRun(run.generation, ledger)):
        return None
    try:
        model = registry.open_pack(version, tables.tables.storage_options)
        model.check_files()
    except PackError:
        return None
    is_shared = model.root is not None
    if is_shared != (spec.pack == SHARED):
        return None
    return _Registered(version, model)


def _run_record(run: RunManifest, ledger: pd.DataFrame, spec: FleetSpec, plot: bytes) -> RunRecord:
    return RunRecord(
        parameters=run_parameters(run, spec),
        metrics=run_metrics(ledger, spec),
        tables={"ledger.json": ledger.head(LEDGER_ROWS_LOGGED)},
        plots={"training.png": plot},
    )


def run_parameters(run: RunManifest, spec: FleetSpec) -> dict[str, Any]:
    """What the MLflow run shows as parameters."""
    row = run.to_row()
    parameters: dict[str, Any] = {}
    for name in ("as_of", "tune_start", "report_start"):
        parameters[name] = str(row[name].tz_localize("UTC"))
    for name in ("features_version", "n_groups", "spec_digest"):
        parameters[name] = str(row[name])
    parameters |= {
        "task": spec.task,
        "objective": spec.objective,
        "pooling": spec.pooling,
        "grains": str(list(map(list, spec.grains))),
    }
    for name, value in spec.tuning.model_dump().items():
        if value is not None:
            parameters[f"tuning.{name}"] = value
    return parameters


def run_metrics(ledger: pd.DataFrame, spec: FleetSpec) -> dict[str, float]:
    """Aggregate metrics of a run; what was not measured is absent."""
    metrics = {}
    for status, count in ledger["status"].value_counts().items():
        metrics[f"groups_{status}"] = float(count)
    for error in fleet_errors(ledger, spec):
        name = error.name.replace(" ", "_")
        for measure, value in shown_measures(error).items():
            if value is not None:
                metrics[f"{name}_{measure}"] = value
    return metrics


def pack_store(tables: FleetTables, spec: FleetSpec) -> PackStore | None:
    """Where the fleet's packs keep their boosters; None if each pack keeps its own."""
    if spec.pack != SHARED:
        return None
    root = tables.tables.location(tables.namespace, "packs")
    return PackStore(root, *filesystem_of(root, tables.tables.storage_options))


def _challenger(
    registry: MlflowRegistry, namespace: str, options: Mapping[str, str]
) -> list[FleetModel]:
    """The newest version, whose boosters need not be stored again.

    Empty where there is none that can be opened, such as one of an earlier release.
    """
    version = registry.find(namespace, CHALLENGER)
    if version is None:
        return []
    try:
        return [registry.open_pack(version, options)]
    except PackError:
        return []


def _registered_versions_are_whole(
    registry: MlflowRegistry, namespace: str, options: Mapping[str, str]
) -> dg.AssetCheckResult:
    states = {}
    is_whole = True
    for alias in (CHAMPION, CHALLENGER):
        version = registry.find(namespace, alias)
        if version is None:
            continue
        try:
            registry.open_pack(version, options).check_files()
            states[alias] = f"version {version.number} is whole"
        except PackError as error:
            states[alias] = str(error)
            is_whole = False
    return dg.AssetCheckResult(
        check_name="registered_versions_are_whole",
        passed=is_whole,
        metadata=states,
        description="; ".join(f"{alias}: {state}" for alias, state in states.items()),
    )


def _registered_model_answers(
    registered: _Registered,
    registry: MlflowRegistry,
    features: "DataFrame",
    options: Mapping[str, str],
) -> dg.AssetCheckResult:
    sample = features.limit(SAMPLED_ROWS).toPandas()
    loaded = registry.open_pack(registered.version, options)
    expected = _numbers_of(registered.model, sample)
    answers = _numbers_of(loaded, sample)
    is_equal = bool(np.array_equal(expected, answers, equal_nan=True))
    return dg.AssetCheckResult(
        check_name="registered_model_answers",
        passed=is_equal and bool(np.isfinite(answers).all()),
        metadata={"rows": len(sample), "equal": is_equal},
    )


def _numbers_of(model: FleetModel, sample: pd.DataFrame) -> "np.ndarray[Any, Any]":
    """A model's answers: predictions, or for classes their probabilities."""
    answers = model.predict(sample)
    if "probabilities" in answers:
        return np.stack(answers["probabilities"].to_list())
    return answers["prediction"].to_numpy()
