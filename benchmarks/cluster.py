"""A fleet on a cluster, a standalone master with two worker processes: the whole chain, `score` and `stream`, compared with a local run.

The workers' Python has our dependencies and not our code, so that all that tasks need must have
been shipped to them. `python -m benchmarks.cluster FOLDER` prints what differs.
"""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import dagster as dg
import pandas as pd
import pyspark
from deltalake import DeltaTable

from assets.scoring_commands import Scorer
from benchmarks.first_run import generated_rows, links_of, spec_of
from benchmarks.kills import end_of
from benchmarks.runs import PROJECT, NotMeasured
from pipeline.testing.packs import ASKED, asked_pack, asked_rows, register_asked
from resources.java import find_java
from resources.launch_settings import LaunchSettings
from resources.profiles import CLUSTER, DATA, PROFILE, SPARK_MASTER, WORKER_PYTHON, current_profile

LOOPBACK = "127.0.0.1"
N_WORKERS = 2
FLEET = "generated"
KIND, SEED = "heavy tails", 34
VERSIONS = (1, 2)
ASKED_ROWS = 500
PATIENCE_SECONDS = 60.0
RUN_SECONDS = 600.0
# What an ordinary spark-defaults.conf says of a cluster: the settings that no profile has.
SPARK_DEFAULTS = f"""spark.driver.host {LOOPBACK}
spark.executor.instances {N_WORKERS}
spark.executor.memory 512m
"""
ANSWER = ["prediction", "lower", "upper", "answered_by", "booster_id"]
GROUP = ["grain", "group_id"]


# --- a cluster on this machine


def bare_python(folder: Path) -> Path:
    """A Python that imports our dependencies and not our code.

    A line of a .pth file adds a folder to the path and not what the .pth files in there add, such
    as an editable checkout.
    """
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n", encoding="utf-8"
    )
    return folder / "bin" / "python"


class LocalCluster:
    """A standalone master and its workers, processes on the loopback interface that end with the context.

    Args:
        folder: for logs, the workers' files and their Python.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = bare_python(folder / "python")
        self.master = f"spark://{LOOPBACK}:{_free_port()}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What a driver's environment has for this cluster."""
        return {
            PROFILE: CLUSTER,
            SPARK_MASTER: self.master,
            WORKER_PYTHON: str(self.python),
            "SPARK_CONF_DIR": str(self.folder / "conf"),
            "SPARK_LOCAL_IP": LOOPBACK,
        }

    def files_of_workers(self, pattern: str) -> list[Path]:
        """What executors have in their folders, by name."""
        return sorted(self.folder.glob(f"worker-*/app-*/*/{pattern}"))

    def __enter__(self) -> Self:
        (self.folder / "conf").mkdir(parents=True)
        (self.folder / "conf" / "spark-defaults.conf").write_text(SPARK_DEFAULTS, encoding="utf-8")
        with ExitStack() as held:
            port = self.master.rpartition(":")[2]
            self._start(held, "master", "master.Master", "--port", port)
            self._wait_for("master", r"I have been elected leader")
            for number in range(N_WORKERS):
                work = str(self.folder / f"worker-{number}")
                self._start(
                    held,
                    f"worker-{number}",
                    "worker.Worker",
                    "--cores",
                    "1",
                    "--memory",
                    "1g",
                    "--work-dir",
                    work,
                    self.master,
                )
            for number in range(N_WORKERS):
                self._wait_for(f"worker-{number}", r"Successfully registered with master")
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def _start(self, held: ExitStack, name: str, main_class: str, *arguments: str) -> None:
        home = Path(pyspark.__file__).parent
        command = [
            str(home / "bin" / "spark-class"),
            f"org.apache.spark.deploy.{main_class}",
            "--host",
            LOOPBACK,
            "--webui-port",
            "0",
        ]
        environment = {
            "PATH": os.environ["PATH"],
            "JAVA_HOME": find_java(self.folder),
            "SPARK_HOME": str(home),
            "SPARK_CONF_DIR": str(self.folder / "conf"),
            "SPARK_LOCAL_IP": LOOPBACK,
            "SPARK_LOCAL_DIRS": str(self.folder / "local"),
            "SPARK_DAEMON_MEMORY": "256m",
        }
        log = held.enter_context((self.folder / f"{name}.log").open("w"))
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        held.callback(_end, process)

    def _wait_for(self, name: str, line: str) -> None:
        log = self.folder / f"{name}.log"
        waited_until = time.monotonic() + PATIENCE_SECONDS
        while not re.search(line, log.read_text(encoding="utf-8", errors="replace")):
            if time.monotonic() > waited_until:
                raise NotMeasured(
                    f"{name} of the cluster did not start within {PATIENCE_SECONDS:.0f} "
                    f"s:\n{end_of(log)}"
                )
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        port: int = listening.getsockname()[1]
    return port


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- a fleet, run whole by the profile in force


def run_whole(folder: Path) -> None:
    """Run a small fleet's chain, then answer its rows by `score` from files and by `stream` from its feature table."""
    scorer = Scorer.of(current_profile(folder))
    rows = generated_rows(KIND, SEED, n_waiting=2)
    rows.to_parquet(folder / "rows.parquet", index=False)
    spec = spec_of(KIND, is_future=False)
    # One session for all: what opens it is not a resource of the launch, which would stop it.
    session = Scorer.of(current_profile(folder)).spark
    with session.yield_for_execution(None):
        resources = {
            "spark": dg.ResourceDefinition.hardcoded_resource(session),
            "tables": scorer.tables,
            "registry": scorer.registry,
            "launch": LaunchSettings(),
        }
        dg.materialize(links_of(spec, folder), resources=resources)
        features = scorer.tables.location(FLEET, "features")
        incoming = folder / "incoming"
        incoming.mkdir()
        scorer.tables.read_pandas(features).to_parquet(incoming / "rows.parquet", index=False)
        print(scorer.score(FLEET, str(incoming), str(folder / "scored")))
        scorer.stream(
            FLEET, features, str(folder / "streamed"), stopping=threading.Event(), report=print
        )
        _score_two_versions(scorer, folder)


def _score_two_versions(scorer: Scorer, folder: Path) -> None:
    """Answer the same rows by two versions of another fleet, in one session."""
    rows = folder / "asked.parquet"
    asked_rows(ASKED_ROWS).to_parquet(rows, index=False)
    for number in VERSIONS:
        run = f"run-{number}"
        register_asked(scorer.registry, asked_pack(folder / run / "pack", run, seed=number), run)
    for number in VERSIONS:
        print(
            scorer.score(ASKED, str(rows), str(folder / f"version-{number}"), version=str(number))
        )


def run_in_process(folder: Path, environment: Mapping[str, str]) -> None:
    """`run_whole` in a process of its own, as one process has one Spark session.

    Raises:
        NotMeasured: if it fails.
    """
    folder.mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MANY_MODELS_", "MLFLOW_", "SPARK_", "PYSPARK_"))
    }
    settings = {DATA: str(folder / "data"), "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    command = [sys.executable, "-m", "benchmarks.cluster", "run", str(folder)]
    log = folder / "log"
    with log.open("w") as output:
        ended = subprocess.run(
            command,
            cwd=PROJECT,
            env=inherited | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=RUN_SECONDS,
        )
    if ended.returncode:
        raise NotMeasured(
            f"{' '.join(command)} with {dict(environment)} ended with exit status "
            f"{ended.returncode}:\n{end_of(log)}"
        )


# --- what differs


@dataclass(frozen=True)
class Differences:
    """What a cluster's run has otherwise than the local one.

    A row that only one of them has differs.

    Args:
        boosters: groups with another status or booster.
        weights: groups with another weight.
        answers: rows of predictions, `score` (of two versions of another fleet, too) and `stream`
            with another answer.
        groups: of the local run.
        rows: answers of the local run.
    """

    boosters: int
    weights: int
    answers: int
    groups: int
    rows: int


def compare(local: Path, cluster: Path) -> Differences:
    """Compare what two runs of `run_whole` left."""
    ledgers = [
        _table(folder / "data" / "tables" / FLEET / "ledger").set_index(GROUP)
        for folder in (local, cluster)
    ]
    answers = [_answers(folder) for folder in (local, cluster)]
    return Differences(
        boosters=n_differing(*(ledger[["status", "booster_id"]] for ledger in ledgers)),
        weights=n_differing(*(ledger[["weight"]] for ledger in ledgers)),
        answers=n_differing(*answers),
        groups=len(ledgers[0]),
        rows=len(answers[0]),
    )


def n_differing(one: pd.DataFrame, other: pd.DataFrame) -> int:
    """Rows, by a unique index, that are not the same to the last bit in both frames.

    Null equals null.
    """
    index = one.index.union(other.index)
    left, right = one.reindex(index), other.reindex(index)
    same = ((left == right) | (left.isna() & right.isna())).all(axis=1)
    in_both = index.isin(one.index) & index.isin(other.index)
    return int((~(same & in_both)).sum())


def _table(location: Path) -> pd.DataFrame:
    frame: pd.DataFrame = DeltaTable(location).to_pandas()
    return frame


def _answers(folder: Path) -> pd.DataFrame:
    """Every answer of a run, by its table and row."""
    tables = [
        folder / "data" / "tables" / FLEET / "predictions",
        folder / "scored",
        folder / "streamed",
    ]
    parts = {table.name: _table(table).set_index("row_key")[ANSWER] for table in tables}
    for number in VERSIONS:
        answers = _table(folder / f"version-{number}")
        parts[f"version-{number}"] = answers.set_index(answers["row_id"].astype(str))[ANSWER]
    return pd.concat(parts)


def cluster_differences(folder: Path) -> Differences:
    """Run the fleet on one machine, then on a cluster, and compare.

    Raises:
        NotMeasured: if a run fails, or the cluster's Python has our code.
    """
    run_in_process(folder / "on one machine", {})
    with LocalCluster(folder / "cluster") as cluster:
        imported = subprocess.run(
            [str(cluster.python), "-c", "import lightgbm, pipeline"],
            cwd=cluster.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if "No module named 'pipeline'" not in imported.stderr:
            raise NotMeasured(
                "the workers' Python must have our dependencies and not our code: "
                f"{imported.stderr or 'it imports pipeline'}"
            )
        run_in_process(folder / "on a cluster", cluster.environment)
        if not cluster.files_of_workers("pack-*.zip"):
            raise NotMeasured("no executor has unpacked a pack")
    return compare(folder / "on one machine", folder / "on a cluster")


def cluster_identical(folder: Path) -> Mapping[str, float]:
    """The figure: what differs between a cluster's run and a local one."""
    return vars(cluster_differences(folder))


def main(arguments: Sequence[str]) -> int:
    """Compare, or be one of the runs; the exit status tells whether nothing differs."""
    if len(arguments) == 2 and arguments[0] == "run":  # noqa: PLR2004 - run FOLDER
        run_whole(Path(arguments[1]))
        return 0
    if len(arguments) != 1:
        print("usage: python -m benchmarks.cluster FOLDER (for everything that it writes)")
        return 2
    found = cluster_differences(Path(arguments[0]))
    print(found)
    return int(found.boosters + found.weights + found.answers > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
