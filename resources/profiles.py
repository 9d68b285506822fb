"""The only reader of the environment: which profile is in force, and its settings."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SpecError

DATA = "MANY_MODELS_DATA"
PROFILE = "MANY_MODELS_PROFILE"
AS_OF = "MANY_MODELS_AS_OF"
LIMIT_GROUPS = "MANY_MODELS_LIMIT_GROUPS"
DRY_RUN = "MANY_MODELS_DRY_RUN"
PROFILES = ("local",)


@dataclass(frozen=True)
class Profile:
    """Where things are kept and how a launch begins.

    Args:
        data_root: absolute folder of every table, registry and scratch file.
        spark_master: Spark's master URL.
        tracking_uri: MLflow's tracking and registry server.
        as_of: default of a launch's as-of; None leaves it to the fleet.
        limit_groups: default of a launch's limit.
        dry_run: whether a launch only plans by default.
    """

    data_root: str
    spark_master: str
    tracking_uri: str
    as_of: str | None
    limit_groups: int | None
    dry_run: bool


def current_profile(project: Path) -> Profile:
    """Read the environment.

    Args:
        project: folder that relative data roots count from.

    Raises:
        SpecError: naming the variable and what it may be.
    """
    name = os.environ.get(PROFILE, "local")
    if name not in PROFILES:
        raise SpecError(f"{PROFILE} is {name!r}; expected one of: {', '.join(PROFILES)}")
    data_root = (project / os.environ.get(DATA, ".data")).resolve()
    return Profile(
        data_root=str(data_root),
        spark_master=f"local[{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1},4]",
        tracking_uri=f"sqlite:///{data_root}/mlflow/mlflow.db",
        as_of=os.environ.get(AS_OF) or None,
        limit_groups=_whole_number(LIMIT_GROUPS),
        dry_run=_switch(DRY_RUN),
    )


def java_home() -> str | None:
    """JAVA_HOME as set by the user."""
    return os.environ.get("JAVA_HOME") or None


def _whole_number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"{name} is {text!r}; expected a whole number of at least 1")
    return int(text)


def _switch(name: str) -> bool:
    text = os.environ.get(name, "").lower()
    if text not in ("", "0", "1", "false", "true", "no", "yes"):
        raise SpecError(f"{name} is {text!r}; expected 1 or 0")
    return text in ("1", "true", "yes")
