"""The MLflow registry: one run and one registered version per training run, a constant number of calls."""

import importlib
import logging
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
from pydantic import Field, PrivateAttr

from pipeline.errors import ModelNotFound, StoreError
from pipeline.models import meta_model
from pipeline.models.meta_model import FleetModel, PackError
from resources.process_environment import set_for_children

CHAMPION, CHALLENGER = "champion", "challenger"
FLEET_VERSION, PACK_DIGEST = "fleet_version", "pack_sha256"
# What a registered version needs beside MLflow: see meta_model.py.
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pyarrow", "lightgbm")


@dataclass(frozen=True)
class Version:
    """A registered version.

    Args:
        name: of the registered model.
        number: the registry's version.
        fleet_version: the training run it comes from.
        pack_digest: of its pack's index; empty for a version of an earlier release.
    """

    name: str
    number: str
    fleet_version: str
    pack_digest: str


class MlflowRegistry(dg.ConfigurableResource):
    """Registers meta models, moves aliases, fetches packs; called from the driver only."""

    tracking_uri: str = Field(description="MLflow's tracking and registry server, or sqlite:///path.")
    artifact_root: str | None = Field(default=None, description="Where a new experiment keeps its artifacts; by default what the server decides.")
    scratch: str = Field(description="Local folder for packs in use.")
    _starter: threading.Thread | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["MlflowRegistry"]:  # noqa: ARG002
        """Open MLflow's store beside the run's first steps: a new one takes seconds.

        Imports happen here and not in the thread: a half-imported sqlalchemy.orm makes Dagster's own queries fail.
        """
        for module in ("sqlalchemy.orm", "mlflow", "mlflow.store.db.utils"):
            importlib.import_module(module)
        self._starter = threading.Thread(target=self._warm_up, name="mlflow-start", daemon=True)
        self._starter.start()
        try:
            yield self
        finally:
            self._starter.join()

    def _warm_up(self) -> None:
        try:
            self._client().search_experiments(max_results=1)
        except Exception:  # whoever needs the registry asks again and then reports
            logging.getLogger(__name__).debug("MLflow did not answer at start", exc_info=True)

    def _client(self) -> Any:
        set_for_children(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.tracking_uri.startswith("sqlite:///"):
            Path(self.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_registry_uri(self.tracking_uri)
        return mlflow.MlflowClient()

    def _connected(self) -> Any:
        if self._starter is not None and threading.current_thread() is not self._starter:
            self._starter.join()
        return self._client()

    def register(
        self,
        name: str,
        fleet_version: str,
        *,
        pack: Path,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        parameters: Mapping[str, Any],
        metrics: Mapping[str, float],
        tables: Mapping[str, pd.DataFrame],
        plots: Mapping[str, bytes],
    ) -> Version:
        """Log one run and register its model as the challenger.

        Args:
            name: of the experiment and the registered model.
            fleet_version: the training run.
            pack: folder with the pack.
            inputs: MLflow type (double or string) of each column that the model needs.
            outputs: type of each column of its answers (double, string or array<double>), as from `meta_model.answer_columns`.
            parameters: the run's.
            metrics: the run's aggregate metrics.
            tables: table artifacts by file name (.json).
            plots: PNG artifacts by file name.

        Raises:
            StoreError: if the registry refuses.
            PackError: if the pack has no readable index.
        """
        digest = meta_model.index_digest(meta_model.read_index(pack))
        client = self._connected()
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
        from mlflow.types.schema import Array

        signature = ModelSignature(
            Schema([ColSpec(kind, column, required=False) for column, kind in inputs.items()]),
            Schema(
                [ColSpec(Array(DataType.double) if kind == "array<double>" else kind, column, required=False) for column, kind in outputs.items()]
            ),
            ParamSchema([ParamSpec("explain", DataType.boolean, default=False)]),
        )
        requirements = [f"{package}=={installed_version(package)}" for package in REQUIREMENTS]
        try:
            with (
                mlflow.start_run(experiment_id=self._experiment(client, name), run_name=fleet_version),
                tempfile.TemporaryDirectory() as folder,
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", UserWarning)
                mlflow.set_tag(FLEET_VERSION, fleet_version)
                mlflow.log_params(dict(parameters))
                mlflow.log_metrics(dict(metrics))
                for file, table in tables.items():
                    mlflow.log_table(table, file)
                for file, png in plots.items():
                    (Path(folder) / file).write_bytes(png)
                mlflow.log_artifacts(folder, "plots")
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=meta_model.__file__,
                    artifacts={"pack": str(pack)},
                    # Whoever loads a shared pack from a store of their own gives its options: load_model(uri, model_config={"storage_options": ...}).
                    model_config={"pack_sha256": digest, "storage_options": {}},
                    signature=signature,
                    pip_requirements=requirements,
                )
            number = self._new_version(client, name, logged, {FLEET_VERSION: fleet_version, PACK_DIGEST: digest})
            client.set_registered_model_alias(name, CHALLENGER, number)
        except (MlflowException, OSError) as error:
            raise StoreError(
                f"{self.tracking_uri}: registering {name!r} failed ({error}); the training is kept: materialise meta_model again"
            ) from error
        return Version(name, number, fleet_version, digest)

    def _new_version(self, client: Any, name: str, logged: Any, tags: Mapping[str, str]) -> str:
        """Register a logged model; the registry's number."""
        if not client.search_registered_models(filter_string=f"name = '{name}'", max_results=1):
            client.create_registered_model(name)
        found = client.create_model_version(name, logged.model_uri, logged.run_id, tags=dict(tags), model_id=logged.model_id)
        return str(found.version)

    def _experiment(self, client: Any, name: str) -> str:
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None if self.artifact_root is None else f"{self.artifact_root.rstrip('/')}/{name}"
        return str(client.create_experiment(name, artifact_location=location))

    def find(self, name: str, alias: str) -> Version | None:
        """The version under an alias, or of that number; None if there is no such model, alias or version."""
        client = self._connected()
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_model_version(name, alias) if alias.isdecimal() else client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise StoreError(f"{self.tracking_uri}: {error}") from error
        return Version(name, str(found.version), str(found.tags.get(FLEET_VERSION, "")), str(found.tags.get(PACK_DIGEST, "")))

    def get(self, name: str, alias: str) -> Version:
        """The version under an alias, or of that number.

        Raises:
            ModelNotFound: if there is none.
        """
        found = self.find(name, alias)
        if found is None:
            wanted = f"version {alias}" if alias.isdecimal() else alias
            raise ModelNotFound(
                f"registered model {name!r} has no {wanted} at {self.tracking_uri}; materialise {name}/models, meta_model and champion first"
            )
        return found

    def inputs(self, version: Version) -> dict[str, str]:
        """MLflow type (double or string) of each column that a version needs, as from `input_types`.

        Raises:
            StoreError: if the registry refuses.
        """
        self._connected()
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            signature = mlflow.models.get_model_info(f"models:/{version.name}/{version.number}").signature
        except (MlflowException, OSError) as error:
            raise StoreError(f"{self.tracking_uri}: version {version.number} of {version.name!r} cannot be read ({error})") from error
        return {column.name: column.type.name for column in signature.inputs.inputs}

    def promote(self, version: Version) -> None:
        """Let a version serve."""
        self._connected().set_registered_model_alias(version.name, CHAMPION, version.number)

    def open_pack(self, version: Version, options: Mapping[str, str] | None = None) -> FleetModel:
        """A version's model, opened from a local copy of its pack that is under a name of its own.

        Args:
            version: as found.
            options: of the object store that a shared pack is in.

        Raises:
            PackError: if the pack is damaged or not the one that was registered.
        """
        target = Path(self.scratch) / "packs" / f"{version.name}-{version.number}-{version.fleet_version}"
        if target.exists():
            try:
                return FleetModel(target, digest=version.pack_digest or None, options=options)
            except PackError:
                shutil.rmtree(target)  # an interrupted download, or the local copy was damaged: fetched again
        self._connected()
        import mlflow

        found = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{version.name}/{version.number}")
        shutil.copytree(Path(found) / "artifacts" / "pack", target)
        return FleetModel(target, digest=version.pack_digest or None, options=options)


def input_types(required: Sequence[str], dtypes: Mapping[str, str]) -> dict[str, str]:
    """MLflow types of the columns a model needs: every number, integer keys too, as an optional double; the rest as string.

    MLflow refuses null for a long and an integer for a string before our code runs; a double takes both.

    Args:
        required: columns.
        dtypes: Spark type of each, e.g. `bigint`.
    """
    numbers = ("double", "float", "tinyint", "smallint", "int", "bigint")
    return {name: "double" if dtypes[name].startswith((*numbers, "decimal")) else "string" for name in required}
