"""The MLflow registry: one run and one version per training run, a constant number of calls."""

import contextlib
import fcntl
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
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, PrivateAttr

from pipeline.errors import ModelNotFound, StoreError
from pipeline.models import meta_model
from pipeline.models.meta_model import FleetModel, PackError
from pipeline.models.registry import ModelInterface, Registry, RunRecord
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

    tracking_uri: str = Field(
        description="MLflow's tracking and registry server, or sqlite:///path."
    )
    artifact_root: str | None = Field(
        default=None,
        description="Where a new experiment keeps its artifacts; by default what the server "
        "decides.",
    )
    scratch: str = Field(description="Local folder for packs in use.")
    _starter: threading.Thread | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["MlflowRegistry"]:  # noqa: ARG002
        """Open MLflow's store while the run's first steps work: a new one takes seconds.

        Imports happen here and not in the thread: a half-imported sqlalchemy.orm makes Dagster's
        own queries fail.
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
            self.make_client().search_experiments(max_results=1)
        except Exception:  # whoever needs the registry asks again and then reports
            logging.getLogger(__name__).debug("MLflow did not answer at start", exc_info=True)

    def make_client(self) -> Any:
        """An MLflow client of this registry, which logs warnings only."""
        set_for_children(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.tracking_uri.startswith("sqlite:///"):
            Path(self.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(
                parents=True, exist_ok=True
            )
        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_registry_uri(self.tracking_uri)
        return mlflow.MlflowClient()

    def _connected(self) -> Any:
        if self._starter is not None and threading.current_thread() is not self._starter:
            self._starter.join()
        return self.make_client()

    def register(
        self,
        name: str,
        fleet_version: str,
        *,
        pack: Path,
        interface: ModelInterface,
        record: RunRecord,
        alias: str | None = CHALLENGER,
    ) -> Version:
        """Log one run and register its model, by default as the challenger.

        Args:
            name: of the experiment and the registered model.
            fleet_version: the training run.
            pack: folder with the pack.
            interface: what the model is asked with, and answers with.
            record: what the run shows.
            alias: that the version gets; None for none.

        Raises:
            StoreError: if the registry refuses.
            PackError: if the pack has no readable index.
        """
        digest = meta_model.index_digest(meta_model.read_index(pack))
        client = self._connected()
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            with (
                mlflow.start_run(
                    experiment_id=self._experiment(client, name), run_name=fleet_version
                ),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", UserWarning)
                mlflow.set_tag(FLEET_VERSION, fleet_version)
                _log_record(record)
                logged = _log_model(pack, digest, interface)
            tags = {FLEET_VERSION: fleet_version, PACK_DIGEST: digest}
            number = self._new_version(client, name, logged, tags)
            if alias is not None:
                client.set_registered_model_alias(name, alias, number)
        except (MlflowException, OSError) as error:
            raise StoreError(
                f"{self.tracking_uri}: registering {name!r} failed ({error}); the training is "
                "kept: materialise meta_model again"
            ) from error
        return Version(name, number, fleet_version, digest)

    def _new_version(self, client: Any, name: str, logged: Any, tags: Mapping[str, str]) -> str:
        """Register a logged model; returns the version's number."""
        if not client.search_registered_models(filter_string=f"name = '{name}'", max_results=1):
            client.create_registered_model(name)
        version = client.create_model_version(
            name, logged.model_uri, logged.run_id, tags=dict(tags), model_id=logged.model_id
        )
        return str(version.version)

    def _experiment(self, client: Any, name: str) -> str:
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self.artifact_root is not None:
            location = f"{self.artifact_root.rstrip('/')}/{name}"
        return str(client.create_experiment(name, artifact_location=location))

    def find(self, name: str, alias: str) -> Version | None:
        """The version with an alias, or with that number.

        None if there is no such model, alias or version.
        """
        client = self._connected()
        from mlflow.exceptions import MlflowException

        get_version = client.get_model_version_by_alias
        if alias.isdecimal():
            get_version = client.get_model_version
        try:
            version = get_version(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise StoreError(f"{self.tracking_uri}: {error}") from error
        return Version(
            name,
            str(version.version),
            str(version.tags.get(FLEET_VERSION, "")),
            str(version.tags.get(PACK_DIGEST, "")),
        )

    def get(self, name: str, alias: str) -> Version:
        """The version with an alias, or with that number.

        Raises:
            ModelNotFound: if there is none.
        """
        version = self.find(name, alias)
        if version is not None:
            return version
        if alias.isdecimal():
            versions = self._connected().search_model_versions(f"name = '{name}'")
            numbers = sorted(int(version.version) for version in versions)
            raise ModelNotFound(
                f"registered model {name!r} has no version {alias} at {self.tracking_uri}; "
                f"available: {', '.join(map(str, numbers)) or 'none'}"
            )
        raise ModelNotFound(
            f"registered model {name!r} has no {alias} at {self.tracking_uri}; materialise "
            f"{name}/models, meta_model and champion first"
        )

    def challenger_run(self, name: str) -> str | None:
        """The training run of the challenger; None where there is none.

        Raises:
            StoreError: if the registry refuses.
        """
        challenger = self.find(name, CHALLENGER)
        if challenger is None:
            return None
        return challenger.fleet_version

    def fleet_versions(self, name: str) -> set[str]:
        """The training runs that registered versions come from.

        Raises:
            StoreError: if the registry refuses.
        """
        client = self._connected()
        from mlflow.exceptions import MlflowException

        runs: set[str] = set()
        token: str | None = None
        try:
            while True:
                page = client.search_model_versions(f"name = '{name}'", page_token=token)
                for version in page:
                    if FLEET_VERSION in version.tags:
                        runs.add(str(version.tags[FLEET_VERSION]))
                token = page.token or None
                if token is None:
                    return runs
        except MlflowException as error:
            raise StoreError(f"{self.tracking_uri}: {error}") from error

    def inputs(self, version: Version) -> dict[str, str]:
        """Type (double or string) of each column that a version reads, as from `input_types`.

        Raises:
            StoreError: if the registry refuses.
        """
        self._connected()
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            metadata = mlflow.models.get_model_info(
                f"models:/{version.name}/{version.number}"
            ).metadata
        except (MlflowException, OSError) as error:
            raise StoreError(
                f"{self.tracking_uri}: version {version.number} of {version.name!r} cannot be read "
                f"({error})"
            ) from error
        return dict((metadata or {})["inputs"])

    def promote(self, version: Version) -> None:
        """Let a version serve."""
        self._connected().set_registered_model_alias(version.name, CHAMPION, version.number)

    def open_pack(self, version: Version, options: Mapping[str, str] | None = None) -> FleetModel:
        """A version's model, opened from a local copy of its pack, which is made once.

        Args:
            version: as found.
            options: of the object store that a shared pack is in.

        Raises:
            PackError: if the pack is damaged or not the one that was registered.
        """
        packs = Path(self.scratch) / "packs"
        packs.mkdir(parents=True, exist_ok=True)
        target = packs / f"{version.name}-{version.number}-{version.fleet_version}"
        with contextlib.suppress(PackError):
            return FleetModel(target, digest=version.pack_digest or None, options=options)
        # Several processes may find at once that there is no complete copy: the first fetches it,
        # the others wait and use it.
        with _locked(packs.with_suffix(".lock")):
            try:
                return FleetModel(target, digest=version.pack_digest or None, options=options)
            except PackError:
                shutil.rmtree(target, ignore_errors=True)
            self._fetch_pack(version, target)
        return FleetModel(target, digest=version.pack_digest or None, options=options)

    def _fetch_pack(self, version: Version, target: Path) -> None:
        """Copy a version's pack to a new local folder, which appears only when it is complete."""
        self._connected()
        import mlflow

        # Only the pack: with a whole model, MLflow would write into the model's own folder, which
        # may be the store itself.
        uri = f"models:/{version.name}/{version.number}/artifacts/pack"
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            copied = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
            Path(copied).replace(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one thread of one process work at a time; a process that dies releases the lock."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _log_record(record: RunRecord) -> None:
    """Log what the open run shows."""
    import mlflow

    mlflow.log_params(dict(record.parameters))
    mlflow.log_metrics(dict(record.metrics))
    for file, table in record.tables.items():
        mlflow.log_table(table, file)
    with tempfile.TemporaryDirectory() as folder:
        for file, png in record.plots.items():
            (Path(folder) / file).write_bytes(png)
        mlflow.log_artifacts(folder, "plots")


def _log_model(pack: Path, digest: str, interface: ModelInterface) -> Any:
    """Log the self-contained file with its pack, in the open run."""
    import mlflow

    required = [column for column in interface.inputs if column not in interface.optional]
    return mlflow.pyfunc.log_model(
        name="model",
        python_model=meta_model.__file__,
        artifacts={"pack": str(pack)},
        # Whoever loads a shared pack from an object store passes its options:
        # load_model(uri, model_config={"storage_options": ...}).
        model_config={"pack_sha256": digest, "storage_options": {}},
        metadata={
            "inputs": dict(interface.inputs),
            "required": required,
            "optional": list(interface.optional),
        },
        signature=_signature(interface),
        pip_requirements=[f"{package}=={installed_version(package)}" for package in REQUIREMENTS],
    )


def _signature(interface: ModelInterface) -> Any:
    """The model's signature, which refuses as little as possible.

    MLflow enforces signatures before our code runs: it refuses a 64-bit integer for a double, null
    for a long and a number for a string, and its message about a missing column does not list those
    that are present. So the types of columns, and whether they may be missing, are in the metadata.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array

    inputs: list[Any] = [ColSpec(AnyType(), column, required=False) for column in interface.inputs]  # type: ignore[no-untyped-call]
    outputs: list[Any] = []
    for column, kind in interface.outputs.items():
        column_type: Any = kind
        if kind == "array<double>":
            column_type = Array(DataType.double)
        outputs.append(ColSpec(column_type, column, required=False))
    parameters = [ParamSpec("explain", DataType.boolean, default=False)]
    if interface.interval is not None:
        parameters.append(ParamSpec("interval", DataType.double, default=interface.interval))
    return ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(parameters))


def interface_of(model: FleetModel, dtypes: Mapping[str, str]) -> ModelInterface:
    """What a model is asked with, and answers with.

    Args:
        model: as it will be registered.
        dtypes: Spark type of each column of the feature table.
    """
    return ModelInterface(
        inputs=input_types([*model.required, *model.optional], dtypes),
        optional=model.optional,
        outputs=meta_model.answer_columns(model.task),
        interval=model.interval,
    )


def input_types(names: Sequence[str], dtypes: Mapping[str, str]) -> dict[str, str]:
    """MLflow types of the columns that a model reads.

    Every number, integer keys included, is a double; the rest are strings.

    Args:
        names: of the columns.
        dtypes: Spark type of each, e.g. `bigint`.
    """
    numbers = ("double", "float", "tinyint", "smallint", "int", "bigint", "decimal")
    types = {}
    for name in names:
        types[name] = "string"
        if dtypes[name].startswith(numbers):
            types[name] = "double"
    return types


if TYPE_CHECKING:
    # The adapter fulfils the protocol.
    _REGISTRY: Registry[Version] = MlflowRegistry(tracking_uri="", scratch="")
