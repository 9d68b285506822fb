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
    """Check what can be checked without data.

    Args:
        project: folder of the project.
        fleet: name or folder of one fleet; None checks all.

    Returns:
        Which fleets were checked, for people.

    Raises:
        SpecError: naming each broken fleet and its mistakes.
        ModelNotFound: if the fleet is unknown.
    """
    names = fleet_names(project)
    checked = list(names.values())
    if fleet:
        checked = [known_fleet(names, fleet)]
    broken = broken_fleets(load_fleets(project))
    messages = [message for name, message in broken.items() if not fleet or name in checked]
    if messages:
        raise SpecError("\n".join([*messages, NEXT_STEP]))
    return f"well described: {', '.join(checked)}"


def launch_fleet(project: Path, fleet: str, *, dry_run: bool = False) -> int:
    """Launch a fleet's assets with `dg launch`, and wait for it.

    Args:
        project: folder of the project.
        fleet: its name or folder.
        dry_run: launch no asset after `models`, which then only prints its plan.

    Returns:
        The launch's exit status.

    Raises:
        SpecError: if the fleet is broken.
        ModelNotFound: if it is unknown.
    """
    name = known_fleet(fleet_names(project), fleet)
    check_fleets(project, name)
    launcher = str(Path(sys.executable).with_name("dg"))
    selection = f'group:"{name}"'
    if dry_run:
        selection = f'+key:"{name}/models"'
    return run_apart(
        [launcher, "launch", "--assets", selection, "--config-json", json.dumps(CONSOLE)]
    )


def run_apart(command: Sequence[str]) -> int:
    """Run a command so that Ctrl-C reaches it alone, and not every process that it starts.

    A terminal sends Ctrl-C to all of them: Spark's JVM and the processes that bring a step's lines
    to the terminal would be gone before the launch can say what is kept.
    """
    child = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - our own launcher

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, pass_on)
    status = child.wait()
    if status < 0:  # ended by a signal; as a shell reports it
        return 128 - status
    return status


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
    available = sorted(names.values())
    message = f"unknown fleet {fleet!r}: pipeline/defs/{fleet}/defs.yaml does not exist; "
    nearest = difflib.get_close_matches(fleet, available, n=1)
    if nearest:
        message += f"did you mean {nearest[0]!r}? "
    raise ModelNotFound(f"{message}Available: {', '.join(available) or 'none'}")
