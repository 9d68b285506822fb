"""A real Dagster daemon over a small real fleet: a schedule and sensors that launch what they should, and a run whose process is killed.

`location(folder)` is what the daemon's code server loads.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
from deltalake import DeltaTable

from assets import automation
from assets.fleet import DescribedFleet
from assets.fleets import load_fleets
from assets.settings import FleetFiles
from benchmarks.runs import PROJECT, NotMeasured
from pipeline.spec import parse_spec
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

NAME = "shop"
SQL = "SELECT store, CAST(day AS DATE) AS day, amount, warm FROM sales"
ATTRIBUTES: Mapping[str, Any] = {
    "name": NAME,
    "sources": [{"name": "sales", "uri": "sales.csv"}],
    "features": {"columns": ["warm"], "lags": [{"column": "amount", "periods": [1, 7]}]},
    "grains": [[], ["store"]],
    "entity": ["store"],
    "time": "day",
    "period": "1 day",
    "horizon": "1 day",
    "target": {"column": "amount"},
    "splits": {"report": "30 days", "tune": "30 days"},
    # Short checkpoints, so that a run that is killed early has something to keep.
    "tuning": {"max_trials": 12, "patience": 12, "checkpoint_seconds": 2},
    "scoring": {"score": "new"},
    # Each minute, as nobody waits a day; the first tick is the only one that is let through.
    "automation": {"retrain": "* * * * *", "on_new_files": True},
}
N_STORES, N_DAYS = 24, 240
LOOK_SECONDS = 5
PATIENCE_SECONDS = 240.0
WHOLE = {"sales", "features", "models", "importance", "meta_model", "champion", "predictions"}


def location(folder: Path) -> dg.Definitions:
    """The code location of a folder with sales.csv."""
    # Looks as often as a test can wait for.
    automation.LOOK_SECONDS = LOOK_SECONDS
    described = DescribedFleet(parse_spec(ATTRIBUTES, file="defs.yaml"), FleetFiles(folder, SQL))
    resources = {
        "spark": SparkSessionResource(master="local[2]", scratch=str(folder / "scratch")),
        "tables": DeltaTables(root=str(folder / "tables")),
        "registry": MlflowRegistry(
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
            artifact_root=str(folder / "artifacts"),
            scratch=str(folder / "scratch"),
        ),
        "launch": LaunchSettings(),
    }
    common = dg.Definitions(
        resources=resources,
        sensors=[automation.what_dead_runs_kept],
        executor=dg.in_process_executor,
    )
    return dg.Definitions.merge(described.build_defs(), common)


def write_sales(folder: Path, n_days: int = N_DAYS) -> None:
    """Write sales.csv, the same rows for the same days; as a whole, as a careful writer does."""
    random = np.random.default_rng(5)
    days = pd.date_range("2026-01-01", periods=N_DAYS + 30, freq="D")
    parts = []
    for store in range(N_STORES):
        warm = random.normal(size=len(days))
        amount = 50 + store + 3 * warm + random.normal(size=len(days))
        parts.append(
            pd.DataFrame(
                {"store": f"s{store:02}", "day": days, "warm": warm, "amount": amount}
            ).head(n_days)
        )
    pd.concat(parts).to_csv(folder / "sales.new", index=False)
    (folder / "sales.new").replace(folder / "sales.csv")


@dataclass(frozen=True)
class Ticked:
    """What a daemon did.

    Args:
        assets: names of the assets of each run that succeeded, by what launched it.
        dead_seconds: from the kill of a run's process until the run was marked as failed.
        told: what the log of the dead run says is kept.
        was_resumed: whether the run that was launched again resumed the dead one's training.
        messages: what was not as it should be.
    """

    assets: Mapping[str, set[str]]
    dead_seconds: float
    told: str
    was_resumed: bool
    messages: list[str]

    @property
    def right(self) -> int:
        """Runs that materialised just what they should."""
        wanted = {"schedule": WHOLE, "sensor": {"sales"}, "condition": {"features", "predictions"}}
        return sum(self.assets.get(name) == assets for name, assets in wanted.items())


def automation_figures(folder: Path) -> Mapping[str, float]:
    """The figures: schedules and sensors of the examples, ticks that launched the right assets, and how fast a dead run is marked."""
    found = automation_live(folder)
    for line in (*found.messages, found.told):
        print(f"  {line}", flush=True)
    resumed = float(found.was_resumed)
    return {
        "listed": listed_automation(),
        "right": found.right,
        "dead-run-seconds": found.dead_seconds,
        "resumed": resumed,
    }


def listed_automation() -> int:
    """Schedules and sensors of the examples."""
    defs = load_fleets(PROJECT)
    return len(list(defs.schedules or ())) + len(list(defs.sensors or ()))


def automation_live(folder: Path) -> Ticked:
    """Let a daemon tick a schedule, kill the run that it launches, let it be launched again, then bring new rows.

    Args:
        folder: empty or absent.

    Raises:
        NotMeasured: if something that must come does not come.
    """
    (folder / "home").mkdir(parents=True)
    (folder / "home" / "dagster.yaml").write_text((PROJECT / "dagster.local.yaml").read_text())
    (folder / "location.py").write_text(
        "from pathlib import Path\n\nfrom benchmarks.automation import location\n\ndefs = "
        "location(Path(__file__).parent)\n"
    )
    (folder / "workspace.yaml").write_text(
        f"load_from:\n  - python_file: {{relative_path: location.py, working_directory: "
        f"{PROJECT}}}\n"
    )
    write_sales(folder)
    os.environ["DAGSTER_HOME"] = str(folder / "home")
    # The instance first: whoever comes first makes its databases.
    with dg.DagsterInstance.get() as instance, daemon(folder):
        switch(folder, "schedule", "start", f"{NAME}_retrain_schedule")
        first = wait(
            lambda: newest(instance, "dagster/schedule_name"),
            "the schedule launched nothing",
            folder,
        )
        switch(folder, "schedule", "stop", f"{NAME}_retrain_schedule")
        dead_seconds = killed(instance, first.run_id, folder)
        told = wait(
            lambda: engine_event(instance, first.run_id, "are kept"),
            "nobody said what the dead run kept",
            folder,
        )
        again = wait(
            lambda: newest(instance, "dagster/parent_run_id"),
            "the dead run was not launched again",
            folder,
        )
        succeed(instance, again.run_id, folder)
        runs = DeltaTable(folder / "tables" / NAME / "runs").to_pandas()
        was_resumed = runs["run_id"].tolist() == [first.run_id] and bool(
            runs["finished_at"].notna().all()
        )
        # What was done before the kill is not done again.
        found = {
            "schedule": materialised(instance, first.run_id) | materialised(instance, again.run_id)
        }

        # Conditions compare with their last evaluation: without one, nothing is new.
        switch(folder, "sensor", "start", f"{NAME}_follow")
        wait(
            lambda: re.search(rf"Tick produced .* for {NAME}_follow", ticks(folder)),
            "no condition was evaluated",
            folder,
        )
        write_sales(folder, N_DAYS + 3)
        switch(folder, "sensor", "start", f"{NAME}_new_files")
        read = wait(
            lambda: newest(instance, "dagster/sensor_name", f"{NAME}_new_files"),
            "the sensor saw no new file",
            folder,
        )
        succeed(instance, read.run_id, folder)
        found["sensor"] = materialised(instance, read.run_id)
        followed = wait(
            lambda: newest(instance, "dagster/sensor_name", f"{NAME}_follow"),
            "nothing followed the new raw table",
            folder,
        )
        succeed(instance, followed.run_id, folder)
        found["condition"] = materialised(instance, followed.run_id)
    raw = DeltaTable(folder / "tables" / NAME / "raw" / "sales").to_pandas()
    messages = (
        []
        if raw["day"].nunique() == N_DAYS + 3
        else [f"the raw table has {raw['day'].nunique()} days, not {N_DAYS + 3}"]
    )
    return Ticked(found, dead_seconds, told, was_resumed, messages)


def ticks(folder: Path) -> str:
    """What the daemon has written."""
    return (folder / "daemon.log").read_text(errors="replace")


@contextmanager
def daemon(folder: Path) -> Iterator[None]:
    """A Dagster daemon with its code server; ended, with all that it started, at the end."""
    environment = {**os.environ, "DAGSTER_HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)}
    command = [
        str(Path(sys.executable).with_name("dagster-daemon")),
        "run",
        "-w",
        str(folder / "workspace.yaml"),
    ]
    with (folder / "daemon.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def switch(folder: Path, kind: str, what: str, name: str) -> None:
    """Switch a schedule or sensor on or off, as a person does."""
    command = [
        str(Path(sys.executable).with_name("dagster")),
        kind,
        what,
        "-w",
        str(folder / "workspace.yaml"),
        name,
    ]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NotMeasured(f"{' '.join(command)}: {done.stderr[-2000:]}")


def wait(found: Callable[[], Any], otherwise: str, folder: Path) -> Any:
    """What a look finds, as soon as it finds something.

    Raises:
        NotMeasured: if it never does.
    """
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        if value := found():
            return value
        time.sleep(0.1)
    raise NotMeasured(f"{otherwise}: {(folder / 'daemon.log').read_text()[-3000:]}")


def newest(
    instance: dg.DagsterInstance, tag: str, value: str | None = None
) -> dg.DagsterRun | None:
    """The newest run with a tag."""
    runs = instance.get_runs(limit=20)
    return next((run for run in runs if tag in run.tags and value in (None, run.tags[tag])), None)


def engine_event(instance: dg.DagsterInstance, run_id: str, part: str) -> str | None:
    """A message in a run's log that has a part."""
    events = (entry for entry in instance.all_logs(run_id) if entry.dagster_event is not None)
    return next(
        (text for entry in events if part in (text := entry.dagster_event.message or "")), None
    )


def killed(instance: dg.DagsterInstance, run_id: str, folder: Path) -> float:
    """Kill the process of a run once some of its groups are committed.

    Seconds until the run is marked as failed.
    """
    started = wait(
        lambda: engine_event(instance, run_id, "Started process for run"),
        "the run has no process",
        folder,
    )
    ledger = folder / "tables" / NAME / "ledger" / "_delta_log" / f"{0:020}.json"
    wait(ledger.exists, "the run commits nothing", folder)
    pid = re.search(r"pid: (\d+)", started)
    if pid is None or instance.get_run_by_id(run_id).status != dg.DagsterRunStatus.STARTED:
        raise NotMeasured(f"the run cannot be killed: {started}")
    os.kill(int(pid[1]), signal.SIGKILL)
    moment = time.monotonic()
    wait(
        lambda: instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.FAILURE,
        "the dead run is not marked as failed",
        folder,
    )
    return time.monotonic() - moment


def succeed(instance: dg.DagsterInstance, run_id: str, folder: Path) -> None:
    """Wait for a run's success."""
    wait(lambda: instance.get_run_by_id(run_id).is_finished, f"run {run_id} does not end", folder)
    if (status := instance.get_run_by_id(run_id).status) != dg.DagsterRunStatus.SUCCESS:
        errors = [entry.user_message for entry in instance.all_logs(run_id) if entry.level >= 40]  # noqa: PLR2004 - logging.ERROR
        raise NotMeasured(f"run {run_id} ended as {status.value}: {errors[:3]}")


def materialised(instance: dg.DagsterInstance, run_id: str) -> set[str]:
    """Names of the assets that a run materialised."""
    events = (
        entry.dagster_event
        for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    )
    return {
        event.asset_key.path[-1]
        for event in events
        if event is not None and event.asset_key is not None
    }
