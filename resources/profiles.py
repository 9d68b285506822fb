"""The only reader of the environment: which profile applies, and its settings."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.crash_points import VARIABLE
from pipeline.errors import SpecError
from pipeline.models.meta_model import group_id
from pipeline.periods import MOMENT_EXAMPLES, parse_moment

DATA = "MANY_MODELS_DATA"
PROFILE = "MANY_MODELS_PROFILE"
AS_OF = "MANY_MODELS_AS_OF"
LIMIT_GROUPS = "MANY_MODELS_LIMIT_GROUPS"
DRY_RUN = "MANY_MODELS_DRY_RUN"
RETRAIN = "MANY_MODELS_RETRAIN"
GROUPS = "MANY_MODELS_GROUPS"
TRACKING_URI = "MLFLOW_TRACKING_URI"
RETRAINS = ("changed", "stale", "listed", "all")
LOCAL, CLUSTER = "local", "cluster"
PROFILES = (LOCAL, CLUSTER)
SPARK_MASTER = "MANY_MODELS_SPARK_MASTER"
WORKER_PYTHON = "PYSPARK_PYTHON"
_DATA_FOLDER = ".data"


@dataclass(frozen=True)
class Profile:
    """Where things are kept and how a launch begins.

    Args:
        is_cluster: whether Spark runs elsewhere than in this machine's processes.
        data_root: absolute local folder of scratch files, logs, checkpoints and, without a server,
            the registry.
        tables_root: absolute folder or object-store URL of every table; every worker must reach it.
        spark_master: Spark's master URL.
        worker_python: Python that a cluster's workers run; None is the driver's.
        tracking_uri: MLflow's tracking and registry server; None is a SQLite file below the data
            root.
        as_of: default of a launch's as-of; None leaves it to the fleet.
        limit_groups: default of a launch's limit.
        dry_run: whether a launch only plans by default.
        retrain: default of a launch's choice of groups to train again.
        groups: default of a launch's listed groups.
        crash_at: named crash point and signal, for tests of recovery; empty for none.
    """

    is_cluster: bool
    data_root: str
    tables_root: str
    spark_master: str
    worker_python: str | None
    tracking_uri: str | None
    as_of: str | None
    limit_groups: int | None
    dry_run: bool
    retrain: Any
    groups: tuple[str, ...]
    crash_at: str

    @property
    def mlflow_uri(self) -> str:
        """Address of the tracking and registry server, or of the file below the data root."""
        return self.tracking_uri or f"sqlite:///{self.data_root}/mlflow/mlflow.db"

    @property
    def mlflow_artifacts(self) -> str | None:
        """Where a new experiment keeps its artifacts; a server decides that itself."""
        return None if self.tracking_uri else f"{self.data_root}/mlflow/artifacts"


def current_profile(project: Path) -> Profile:
    """Read the environment.

    Args:
        project: folder that relative data roots count from.

    Raises:
        SpecError: naming the variable and what it may be.
    """
    return _profile(project, os.environ)


def fallback_profile(project: Path) -> Profile:
    """A profile for a code location whose environment has a mistake.

    Folders and addresses are the environment's where they are usable; launch settings are ignored.
    """
    places = {}
    for name in (PROFILE, DATA, SPARK_MASTER, TRACKING_URI):
        if name in os.environ:
            places[name] = os.environ[name]
    try:
        return _profile(project, places)
    except SpecError:
        return _profile(project, {})


def _profile(project: Path, environment: Mapping[str, str]) -> Profile:
    name = environment.get(PROFILE, LOCAL)
    if name not in PROFILES:
        raise SpecError(f"{PROFILE} is {name!r}; expected one of: {', '.join(PROFILES)}")
    is_cluster = name == CLUSTER
    data = environment.get(DATA, _DATA_FOLDER)
    data_root, tables_root = _roots(project, data, is_cluster=is_cluster)
    if is_cluster:
        spark_master = _cluster_master(environment)
        worker_python = environment.get(WORKER_PYTHON) or None
    else:
        spark_master = _local_master()
        worker_python = None
    return Profile(
        is_cluster=is_cluster,
        data_root=data_root,
        tables_root=tables_root,
        spark_master=spark_master,
        worker_python=worker_python,
        tracking_uri=environment.get(TRACKING_URI) or None,
        as_of=_moment(environment, AS_OF),
        limit_groups=_whole_number(environment, LIMIT_GROUPS),
        dry_run=_switch(environment, DRY_RUN),
        retrain=_choice(environment, RETRAIN, RETRAINS),
        groups=_group_ids(environment, GROUPS),
        crash_at=environment.get(VARIABLE, ""),
    )


def _roots(project: Path, data: str, *, is_cluster: bool) -> tuple[str, str]:
    """The data root, and the root of the tables, which alone may be in an object store."""
    if is_cluster and "://" in data:
        data_root = str((project / _DATA_FOLDER).resolve())
        tables_root = f"{data.rstrip('/')}/tables"
    else:
        data_root = str((project / data).resolve())
        tables_root = f"{data_root}/tables"
    _check_data_root(data_root)
    return data_root, tables_root


def _local_master() -> str:
    n_cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    return f"local[{n_cores},4]"


def _cluster_master(environment: Mapping[str, str]) -> str:
    master = environment.get(SPARK_MASTER, "")
    if not master:
        raise SpecError(
            f"{PROFILE} is {CLUSTER!r} but {SPARK_MASTER} is not set; expected Spark's master URL, "
            f"e.g. {SPARK_MASTER}=spark://host:7077"
        )
    return master


def _check_data_root(folder: str) -> None:
    """Refuse a folder whose path some library would misread, writing or reading elsewhere.

    SQLite addresses of Dagster and MLflow end at a question mark; deltalake decodes %41 as an A and
    takes a backslash for a slash.
    """
    misread = re.search(r"\?|\\|%[0-9A-Fa-f]{2}", folder)
    if misread:
        raise SpecError(
            f"{DATA}: the data root {folder!r} has {misread[0]!r} in its path, which SQLite or "
            "Delta addresses cannot hold; nothing was written: choose a folder without ?, "
            "backslashes and escapes such as %20"
        )


def java_home() -> str | None:
    """JAVA_HOME as set by the user."""
    return os.environ.get("JAVA_HOME") or None


def _moment(environment: Mapping[str, str], name: str) -> str | None:
    text = environment.get(name, "")
    if not text:
        return None
    try:
        parse_moment(text)
    except SpecError:
        raise SpecError(f"{name} is {text!r}; expected {MOMENT_EXAMPLES}") from None
    return text


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"{name} is {text!r}; expected a whole number of at least 1")
    return int(text)


def _choice(environment: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    text = environment.get(name) or allowed[0]
    if text not in allowed:
        raise SpecError(f"{name} is {text!r}; expected one of: {', '.join(allowed)}")
    return text


def _group_ids(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Group ids, each a JSON array of its keys, separated by spaces or line breaks."""
    ids = []
    text = environment.get(name, "").strip()
    decoder = json.JSONDecoder()
    while text:
        try:
            keys, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            keys, end = None, 0
        if not isinstance(keys, list):
            raise SpecError(
                f"{name}: {text!r} is not a group; expected JSON arrays of keys, "
                'such as ["EWR","IAH"] ["JFK","LAX"]'
            )
        ids.append(group_id(keys))
        text = text[end:].lstrip(" ,\n")
    return tuple(ids)


def _switch(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "").lower()
    if text not in ("", "0", "1", "false", "true", "no", "yes"):
        raise SpecError(f"{name} is {text!r}; expected 1 or 0")
    return text in ("1", "true", "yes")
