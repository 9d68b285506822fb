"""`many-models check` and `many-models run`: checking fleets, and launching one."""

import difflib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

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


def launch_fleet(project: Path, fleet: str, *, dry_run: bool = False) -> int:
    """Launch a fleet's assets with `dg launch`, and wait for it.

    Args:
        project: folder of the project.
        fleet: its name or folder.
        dry_run: whether only the plan is wanted, for which no asset after `models` is needed.

    Returns:
        The launch's exit status.

    Raises:
        SpecError: if the fleet is broken.
        ModelNotFound: if it is unknown.
    """
    name = known_fleet(fleet_names(project), fleet)
    check_fleets(project, name)
    launcher = str(Path(sys.executable).with_name("dg"))
    selection = f'+key:"{name}/models"' if dry_run else f'group:"{name}"'
    return _run_apart(
        [launcher, "launch", "--assets", selection, "--config-json", json.dumps(CONSOLE)]
    )


def _run_apart(command: Sequence[str]) -> int:
    """Run a command that alone hears of Ctrl-C, not every process that it starts.

    A terminal sends Ctrl-C to all of them: Spark's JVM and the processes that bring a step's lines
    to the terminal would be gone before the launch can say what is kept.
    """
    child = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - our own launcher

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, pass_on)
    status = child.wait()
    return status if status >= 0 else 128 - status


def fleet_names(project: Path) -> Mapping[str, str]:
    """The asset group of each folder below pipeline/defs."""
    files = sorted((project / "pipeline" / "defs").glob("*/defs.yaml"))
    return {
        file.parent.name: fleet_name(file.parent, {"name": declared_name(file)}) for file in files
    }


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
    raise ModelNotFound(
        f"unknown fleet {fleet!r}: pipeline/defs/{fleet}/defs.yaml does not exist; "
        f"{hint}Available: {', '.join(known) or 'none'}"
    )
