"""`<fleet>/meta_model`: one registered model that answers for every group, the newest challenger."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from assets.link import link_key, link_settings, png, prefixed, readable_failures
from assets.newest_run import features_of, ledger_of, newest_run, waves_of
from pipeline.models.meta_model import FleetModel, Generation, PackError, filesystem_of
from pipeline.models.pack import PackedRun, PackStore, answers_alike, write_pack
from pipeline.reporting.plots import training_plot
from pipeline.reporting.summary import fleet_errors, markdown_table, shown_measures
from pipeline.spark.fleet_training import read_runs
from pipeline.spec import FleetSpec
from pipeline.tables import BOOSTERS
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version, interface
from resources.spark_session import SparkSessionResource

LEDGER_ROWS_LOGGED = 10_000
SHARED = "shared"


def meta_model_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The registered model of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "meta_model",
            description="One MLflow model version that answers for every group: all boosters, weights and categories in one pack.",
            kinds={"mlflow", "lightgbm"},
            deps=["models"],
        ),
        check_specs=[
            dg.AssetCheckSpec(
                "registered_model_answers",
                asset=link_key(spec, "meta_model"),
                blocking=True,
                description="Loaded from the registry it gives the pack's answers.",
            ),
            dg.AssetCheckSpec(
                "registered_versions_are_whole",
                asset=link_key(spec, "meta_model"),
                description="Every file that the champion and the challenger answer from is there, of the right size and with the right footer.",
            ),
        ],
    )
    def meta_model(
        context: dg.AssetExecutionContext, tables: DeltaTables, registry: MlflowRegistry, spark: SparkSessionResource, launch: LaunchSettings
    ) -> dg.MaterializeResult:
        with readable_failures(), tempfile.TemporaryDirectory() as folder:
            namespace = launch.scope(spec, tables, registry).namespace
            run = newest_run(tables, namespace)
            run_id = str(run["run_id"])
            ledger = ledger_of(tables, namespace, run_id)
            plot = training_plot(ledger, spec)
            options = tables.storage_options
            features = features_of(spark.session, tables, spec.name, run)
            sample = features.limit(50).toPandas()
            version = _version_of_the_same_answers(tables, registry, namespace, spec, run, ledger)
            if version is not None:
                answering = registry.open_pack(version, options)
                told = f"nothing changed: {namespace} version {version.number} (run {version.fleet_version}) answers as run {run_id} does"
            else:
                pack = Path(folder) / "pack"
                context.log.info(f"packing {ledger['booster_id'].nunique():,} models into one version, and registering it")
                answering = packed(pack, tables, registry, namespace, spec, run, ledger)
                dtypes = {field.name: field.dataType.simpleString() for field in features.schema}
                version = registry.register(
                    namespace,
                    run_id,
                    pack=pack,
                    **interface(answering, dtypes),
                    parameters=run_parameters(run, spec),
                    metrics=run_metrics(ledger, spec),
                    tables={"ledger.json": ledger.head(LEDGER_ROWS_LOGGED)},
                    plots={"training.png": plot},
                )
                told = f"registered {namespace} version {version.number} (run {run_id}) as challenger"
            pack_bytes = sum(path.stat().st_size for path in answering.folder.iterdir())
            checks = [
                _registered_model_answers(registry.open_pack(version, options), answering, sample),
                _registered_versions_are_whole(registry, namespace, options),
            ]
        context.log.info(f"{told}, {pack_bytes / 1e6:.1f} MB")
        return dg.MaterializeResult(
            metadata={
                **prefixed(
                    {
                        "registered_model": namespace,
                        "version": version.number,
                        "fleet_version": version.fleet_version,
                        "groups": len(ledger),
                        "pack_bytes": pack_bytes,
                    }
                ),
                "fleet/errors": dg.MetadataValue.md(markdown_table(pd.DataFrame([vars(error) for error in fleet_errors(ledger, spec)]))),
                "fleet/plot": png(plot),
            },
            check_results=checks,
        )

    return meta_model


def packed(
    folder: Path,
    tables: DeltaTables,
    registry: MlflowRegistry,
    namespace: str,
    spec: FleetSpec,
    run: "pd.Series[Any]",
    ledger: pd.DataFrame,
) -> FleetModel:
    """The model of a run, from a pack that is written into a folder."""
    options = tables.storage_options
    digest = write_pack(
        folder,
        [PackedRun(Generation.of_run(run), ledger)],
        lambda names: _boosters(tables, namespace, run, names),
        store=pack_store(tables, namespace, spec),
        before=_challenger(registry, namespace, options) if spec.pack == SHARED else [],
    )
    return FleetModel(folder, digest=digest, options=options)


def _version_of_the_same_answers(
    tables: DeltaTables, registry: MlflowRegistry, namespace: str, spec: FleetSpec, run: "pd.Series[Any]", ledger: pd.DataFrame
) -> Version | None:
    """The newest version, if it gives the answers of this run; None where it does not, or is not whole."""
    version = registry.find(namespace, CHALLENGER)
    runs = read_runs(tables, namespace)
    before = runs[runs["run_id"] == (version.fleet_version if version else None)]
    if version is None or before.empty or before["spec_digest"].iloc[0] != run["spec_digest"]:
        return None
    earlier = PackedRun(Generation.of_run(before.iloc[0]), ledger_of(tables, namespace, version.fleet_version))
    if not answers_alike(earlier, PackedRun(Generation.of_run(run), ledger)):
        return None
    try:
        model = registry.open_pack(version, tables.storage_options)
        model.check_files()
    except PackError:
        return None
    return version if (model.root is not None) == (spec.pack == SHARED) else None


def run_parameters(run: "pd.Series[Any]", spec: FleetSpec) -> dict[str, Any]:
    """What the MLflow run shows as parameters."""
    pinned = {name: str(run[name]) for name in ("as_of", "tune_start", "report_start", "features_version", "n_groups", "spec_digest")}
    return {
        **pinned,
        "task": spec.task,
        "objective": spec.objective,
        "pooling": spec.pooling,
        "grains": str([list(grain) for grain in spec.grains]),
        **{f"tuning.{k}": v for k, v in spec.tuning.model_dump().items() if v is not None},
    }


def run_metrics(ledger: pd.DataFrame, spec: FleetSpec) -> dict[str, float]:
    """Aggregate metrics of a run; what was not measured is absent."""
    metrics = {f"groups_{status}": float(count) for status, count in ledger["status"].value_counts().items()}
    for error in fleet_errors(ledger, spec):
        name = error.name.replace(" ", "_")
        metrics |= {f"{name}_{unit}": value for unit, value in shown_measures(error).items() if value is not None}
    return metrics


def _boosters(tables: DeltaTables, namespace: str, run: "pd.Series[Any]", names: Sequence[str]) -> Iterator[dict[str, Any]]:
    where = {"wave": waves_of(run), "booster_id": list(names)}
    yield from tables.read_arrow(tables.location(namespace, BOOSTERS.name), where=where).to_pylist()


def pack_store(tables: DeltaTables, namespace: str, spec: FleetSpec) -> PackStore | None:
    """Where the fleet's packs keep their boosters; None for in themselves."""
    if spec.pack != SHARED:
        return None
    root = tables.location(namespace, "packs")
    return PackStore(root, *filesystem_of(root, tables.storage_options))


def _challenger(registry: MlflowRegistry, namespace: str, options: Mapping[str, str]) -> list[FleetModel]:
    """The newest version, whose boosters need not be stored again; none where there is none that can be opened, as one of an earlier release."""
    version = registry.find(namespace, CHALLENGER)
    try:
        return [] if version is None else [registry.open_pack(version, options)]
    except PackError:
        return []


def _registered_versions_are_whole(registry: MlflowRegistry, namespace: str, options: Mapping[str, str]) -> dg.AssetCheckResult:
    found, is_whole = {}, True
    for alias in (CHAMPION, CHALLENGER):
        version = registry.find(namespace, alias)
        if version is None:
            continue
        try:
            registry.open_pack(version, options).check_files()
            found[alias] = f"version {version.number} is whole"
        except PackError as error:
            found[alias], is_whole = str(error), False
    return dg.AssetCheckResult(
        check_name="registered_versions_are_whole",
        passed=is_whole,
        metadata=found,
        description="; ".join(f"{a}: {told}" for a, told in found.items()),
    )


def _registered_model_answers(registered: FleetModel, answering: FleetModel, sample: pd.DataFrame) -> dg.AssetCheckResult:
    expected, found = (_numbers_of(model, sample) for model in (answering, registered))
    same = bool(np.array_equal(expected, found, equal_nan=True))
    return dg.AssetCheckResult(
        check_name="registered_model_answers", passed=same and bool(np.isfinite(found).all()), metadata={"rows": len(sample), "equal": same}
    )


def _numbers_of(model: FleetModel, sample: pd.DataFrame) -> "np.ndarray[Any, Any]":
    """A model's answers: predictions, or for classes their probabilities."""
    answers = model.predict(sample)
    return np.stack(answers["probabilities"].to_list()) if "probabilities" in answers else answers["prediction"].to_numpy()
