"""`many-models check` and `many-models run`: whether fleets are well described, and launching one."""

import difflib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from assets.broken_fleet import broken_fleets, declared_name, fleet_name
from assets.fleets import load_fleets
from pipeline.errors import ModelNotFound, SpecError

# A console for people instead of Dagster's own.
CONSOLE: Mapping[str, object] = {"loggers": {"console": {"config": {}}}}
NEXT_STEP = "Correct the file, then: many-models check"


def check_fleets(project: Path, fleet: str | None) -> str:
    """Look at what can be found without data.

    Args:
        project: folder of the project.
        fleet: name or folder of one fleet; None looks at all.

    Returns:
        What was looked at, for people.

    Raises:
        SpecError: naming each broken fleet and its mistakes.
        ModelNotFound: if the fleet is unknown.
    """
    names = fleet_names(project)
    chosen = [known_fleet(names, fleet)] if fleet else [*names.values()]
    broken = broken_fleets(load_fleets(project))
    messages = [broken[name] for name in (chosen if fleet else broken) if name in broken]
    if messages:
        raise SpecError("\n".join([*messages, NEXT_STEP]))
    return f"well described: {', '.join(chosen)}"


def launch_fleet(project: Path, fleet: str) -> None:
    """Become `dg launch` of a fleet's assets, so that signals and the exit status are its own.

    Args:
        project: folder of the project.
        fleet: its name or folder.

    Raises:
        SpecError: if the fleet is broken.
        ModelNotFound: if it is unknown.
    """
    name = known_fleet(fleet_names(project), fleet)
    check_fleets(project, name)
    launcher = str(Path(sys.executable).with_name("dg"))
    arguments = ["--assets", f'group:"{name}"', "--config-json", json.dumps(CONSOLE)]
    os.execv(launcher, [launcher, "launch", *arguments])  # noqa: S606 - our own launcher


def fleet_names(project: Path) -> Mapping[str, str]:
    """The asset group of each folder below pipeline/defs."""
    files = sorted((project / "pipeline" / "defs").glob("*/defs.yaml"))
    return {file.parent.name: fleet_name(file.parent, {"name": declared_name(file)}) for file in files}


def known_fleet(names: Mapping[str, str], fleet: str) -> str:
    """The asset group of a fleet that is given by name or folder.

    Raises:
        ModelNotFound: listing the fleets.
    """
    if fleet in names.values():
        return fleet
    if fleet in names:
        return names[fleet]
    known = sorted(names.values())
    near = difflib.get_close_matches(fleet, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelNotFound(f"unknown fleet {fleet!r}: pipeline/defs/{fleet}/defs.yaml does not exist; {hint}Available: {', '.join(known) or 'none'}")
