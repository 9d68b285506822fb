"""What a user would do, done from the outside and timed: set-up from nothing, and fleets in fresh data roots."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
PROJECT = Path(__file__).parent.parent
SHOWN_LINES = 40
# `make bench` hands its own variables on; a measured command starts without them, and without the
# user's launch settings and MLflow server.
NOT_INHERITED = (
    "AS_OF",
    "DAGSTER_HOME",
    "DRY_RUN",
    "FLEET",
    "GNUMAKEFLAGS",
    "LIMIT_GROUPS",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "MFLAGS",
)


class NotMeasured(Exception):
    """A figure has no value: a command failed, or what it left cannot be judged. The message says which and why."""


@dataclass(frozen=True)
class Run:
    """A finished `make run`.

    Args:
        seconds: wall time of the command.
        tables: folder of the fleet's Delta tables.
    """

    seconds: float
    tables: Path


class Runs:
    """The runs of one invocation.

    Figures that need the same run share it. A context, whose end removes all data.

    Args:
        panels: folder of further panels to blend; None for none.
    """

    def __init__(self, panels: Path | None = None) -> None:
        self.panels = panels
        self._temporary = tempfile.TemporaryDirectory(
            prefix="many-models-bench-", ignore_cleanup_errors=True
        )
        self._folder = Path(self._temporary.name)
        self._finished: dict[tuple[str, str | None], Run] = {}
        self._measured: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._temporary.cleanup()

    def fleet(self, name: str, as_of: str | None = None) -> Run:
        """Run a fleet in a data root of its own, unless this invocation has done so.

        Args:
            name: the fleet.
            as_of: as `make run` takes it; None leaves it to the fleet.

        Raises:
            NotMeasured: if the command fails.
        """
        if (name, as_of) in self._finished:
            print(f"  uses the run of {name}{f' as of {as_of}' if as_of else ''} above", flush=True)
            return self._finished[name, as_of]
        if not self._finished:
            self._timed(["make", "setup"], PROJECT, {})
        data = self._folder / f"data-{len(self._finished)}"
        command = ["make", "run", f"FLEET={name}", *([f"AS_OF={as_of}"] if as_of else [])]
        seconds = self._timed(command, PROJECT, {"MANY_MODELS_DATA": str(data)})
        self._finished[name, as_of] = Run(seconds, data / "tables" / name)
        return self._finished[name, as_of]

    def new_folder(self) -> Path:
        """An empty folder that goes with the rest."""
        return Path(tempfile.mkdtemp(dir=self._folder))

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """What a measurement gave, made once per invocation."""
        if name not in self._measured:
            self._measured[name] = measure()
        found: T = self._measured[name]
        return found

    def set_up(self) -> float:
        """Set up a copy of the repository, with empty download caches; returns wall seconds.

        Raises:
            NotMeasured: if the command fails.
        """
        folder = Path(tempfile.mkdtemp(prefix="setup-", dir=self._folder))
        copy_repository(folder / "copy")
        caches = {
            name: str(folder / "cache")
            for name in ("PIP_CACHE_DIR", "UV_CACHE_DIR", "XDG_CACHE_HOME")
        }
        try:
            return self._timed(["make", "setup"], folder / "copy", caches)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _timed(self, command: list[str], folder: Path, settings: dict[str, str]) -> float:
        print(
            f"  $ {' '.join([*(f'{name}={value}' for name, value in settings.items()), *command])}",
            flush=True,
        )
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in NOT_INHERITED and not name.startswith(("MANY_MODELS_", "MLFLOW_"))
        }
        log = self._folder / "log"
        with log.open("w") as output:
            started = time.monotonic()
            ended = subprocess.run(
                command,
                cwd=folder,
                env=inherited | settings,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
            seconds = time.monotonic() - started
        if ended.returncode:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
            raise NotMeasured(
                f"{' '.join(command)} ended with exit status {ended.returncode} after "
                f"{seconds:.0f} s:\n{last}"
            )
        print(f"    {seconds:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
        return seconds


def copy_repository(target: Path) -> None:
    """Copy what git tracks, and what it would track: nothing that a set-up or a run has made.

    Raises:
        NotMeasured: outside a git checkout.
    """
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(
            listed, cwd=PROJECT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotMeasured(
            f"{PROJECT} cannot be listed with git ({error}); set-up is measured on a copy of a git "
            "checkout"
        ) from error
    # A file that is deleted but still tracked is listed, too.
    for source in (PROJECT / name for name in names if name and (PROJECT / name).is_file()):
        copy = target / source.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
    print(f"  copied the tracked files of {PROJECT}", flush=True)


def describe_machine() -> str:
    """Cores, memory, Python and date: what a figure depends on besides the code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB"
    return (
        f"{system}; Python {platform.python_version()} at {sys.executable}; "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def package_file(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        NotMeasured: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        if (Path(place) / name).exists():
            return Path(place) / name
    raise NotMeasured(f"{package} is not installed, which carries {name}; run make setup")
