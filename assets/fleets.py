"""Every fleet below pipeline/defs.

One that Dagster cannot even read is shown as broken and stops no other.
"""

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import yaml
from pydantic import ValidationError

from assets.broken_fleet import BrokenFleet, declared_name, fleet_name, shown_path

DEFS = "pipeline.defs"
EXPECTED = "expected `type: assets.fleet.Fleet`, and the fleet's fields below `attributes:`"


def load_fleets(project: Path) -> dg.Definitions:
    """The definitions of all fleets.

    Args:
        project: folder with pyproject.toml and pipeline/defs.

    Raises:
        Exception: what Dagster raised, where no single folder is to blame.
    """
    try:
        return dg.load_from_defs_folder(path_within_project=project / "pipeline")
    except Exception:
        # A component reports its own mistakes. What is raised comes from before that: a file that
        # is not YAML, an unknown type, a Python module. Dagster reads all files at once, so each
        # folder is now tried alone.
        parts = list(_load_one_by_one(project))
        if not any(isinstance(part, BrokenFleet) for part in parts):
            raise
    return dg.Definitions.merge(*map(_definitions_of, parts))


def _definitions_of(part: dg.Definitions | BrokenFleet) -> dg.Definitions:
    if isinstance(part, BrokenFleet):
        return part.build_defs()
    return part


def _load_one_by_one(project: Path) -> Iterator[dg.Definitions | BrokenFleet]:
    for folder in sorted((project / "pipeline" / "defs").iterdir()):
        if not folder.is_dir() or folder.name.startswith((".", "__")):
            continue
        try:
            module = importlib.import_module(f"{DEFS}.{folder.name}")
            tree = dg.ComponentTree(defs_module=module, project_root=project)
            # As dg.load_from_defs_folder does: they are about Dagster's own code.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                definitions = tree.build_defs()
        except Exception as error:  # noqa: BLE001 - shown in the fleet's place
            name = fleet_name(folder, {"name": declared_name(folder / "defs.yaml")})
            yield BrokenFleet(name, _explained(error, folder))
        else:
            # Definitions with a component tree of their own cannot be merged.
            yield dg.Definitions(
                assets=definitions.assets,
                asset_checks=definitions.asset_checks,
                jobs=definitions.jobs,
                schedules=definitions.schedules,
                sensors=definitions.sensors,
            )


def _explained(error: BaseException, folder: Path) -> str:
    """What is wrong with a file that Dagster could not read."""
    place = f"{shown_path(folder)}/defs.yaml"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, yaml.MarkedYAMLError):
        if cause.problem_mark:
            place += f", line {cause.problem_mark.line + 1}"
        return (
            f"{place}: not YAML: {cause.problem or cause.context}; check indentation, "
            "colons and quotes there"
        )
    if isinstance(cause, ValidationError):
        problem = cause.errors()[0]
        # Dagster adds ` at file:line` to the field.
        field, _, position = str(problem["loc"][0]).partition(" at ")
        if position:
            place += f", line {position.rpartition(':')[2]}"
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = "unknown field"
        return f"{place}: {field}: {message}; {EXPECTED}"
    first_line = next(iter(str(cause).splitlines()), "")
    return f"{place}: {type(cause).__name__}: {first_line} ({EXPECTED})"
