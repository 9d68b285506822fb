"""Random actions against a stream that scores: rows added, starts, stops, `kill -9`, champions changed; then every row is answered exactly once.

`python -m benchmarks.stream_kills --child FOLDER` is the process that is killed. It opens its Spark
session, and then does what it is told on stdin. While one child works the next one warms up.
"""

import collections
import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from assets.scoring_commands import Scorer
from benchmarks.runs import PROJECT, NotMeasured
from pipeline import crash_points
from pipeline.models.meta_model import FleetModel
from pipeline.testing.packs import ASKED, asked_pack, asked_rows, register_asked
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

# Of the actions, this many in a hundred go to a stream over a Delta table, the others to one over a
# folder.
ON_DELTA = 65
MAX_ROWS = 200
MAX_FILES = 3
EVERY_SECONDS = 0.2
PATIENCE_SECONDS = 180.0
GONE_SECONDS = 5.0
# Longest wait before a kill: some come at once, some in the middle of a micro batch, some after it.
KILL_WITHIN_SECONDS = 1.5
VERSIONS = ("run-a", "run-b", "run-c")
RUNNING = {"add": 36, "compact": 4, "champion": 16, "kill": 16, "stop": 10, "check": 18}
STOPPED = {"add": 30, "compact": 4, "champion": 12, "start": 54}


# --- the process that is killed


def child(folder: Path) -> None:
    """Run streams of a folder as `many-models stream` does, as told: one JSON object a line."""
    spark = SparkSessionResource(
        master="local[2,4]", memory="768m", scratch=str(folder / f"scratch-{os.getpid()}")
    )
    scorer = Scorer(
        DeltaTables(root=str(folder / "tables")), _registry(folder), spark, folder / "streams"
    )
    running: threading.Thread | None = None
    stopping = threading.Event()
    with spark.yield_for_execution(None):
        scorer.registry.get(ASKED, "champion")
        # A first job starts the Python workers.
        spark.session.range(2).mapInArrow(lambda batches: batches, "id long").collect()
        _tell("ready")
        for line in sys.stdin:
            told = json.loads(line)
            if told["do"] == "start":
                crash_points.arm(told["crash_at"])
                stopping = threading.Event()
                running = threading.Thread(
                    target=_stream, args=(scorer, told, stopping), daemon=True
                )
                running.start()
            elif running is not None:
                if told["do"] == "stop":
                    stopping.set()
                running.join()
                _tell("ended")


def _stream(scorer: Scorer, told: Mapping[str, Any], stopping: threading.Event) -> None:
    try:
        scorer.stream(
            ASKED,
            told["source"],
            told["target"],
            every=told["every"],
            max_files=MAX_FILES,
            stopping=stopping,
            report=_tell,
        )
    except Exception as error:  # noqa: BLE001 - told to the parent
        _tell(f"failed: {type(error).__name__}: {error}")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _registry(folder: Path) -> MlflowRegistry:
    root = folder / "mlflow"
    return MlflowRegistry(
        tracking_uri=f"sqlite:///{root}/mlflow.db",
        artifact_root=f"{root}/artifacts",
        scratch=str(folder / "scratch"),
    )


class Child:
    """Such a process.

    Args:
        folder: as for `child`.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-m", "benchmarks.stream_kills", "--child", str(folder)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 - asked for above
        with self.process.stdout as said:
            for line in said:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, **told: Any) -> None:
        """Tell it to do something; one that is dead does nothing."""
        assert self.process.stdin is not None  # noqa: S101 - asked for above
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(told) + "\n")
            self.process.stdin.flush()

    def wait_for(self, line: str) -> bool:
        """Wait until it says a line; False if it ends before.

        Raises:
            NotMeasured: if neither happens, or its stream failed.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        while (left := give_up - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                said = self._lines.get(timeout=left)
                if said is None:
                    return False
                if said.startswith("failed: "):
                    raise NotMeasured(f"a stream {said}")
                if said == line:
                    return True
        raise NotMeasured(
            f"a streaming process did not say {line!r} within {PATIENCE_SECONDS:g} s: "
            f"{self.log.read_text(errors='replace')[-2000:]}"
        )

    def kill(self, *, group: bool) -> None:
        """`kill -9`: the driver, or also its JVM."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None  # noqa: S101 - asked for above
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        # Its JVM has the same output, and ends a moment later.
        self._reader.join(GONE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(group=True)


# --- what is done to it


@dataclass
class Sides:
    """A stream's source and target, and what was put in.

    Args:
        kind: delta or folder.
        source: of rows.
        target: of answers.
        n_added: rows put in; row_id counts them.
        n_files: times that rows were put in.
    """

    kind: str
    source: Path
    target: Path
    n_added: int = 0
    n_files: int = 0
    rows: list[pd.DataFrame] = field(default_factory=list)

    def add(self, dice: random.Random) -> None:
        """Put rows in: a version of the table, or a file whose columns have an order of their own."""
        rows = asked_rows(dice.randrange(1, MAX_ROWS), dice.randrange(1 << 30), self.n_added)
        self.n_added += len(rows)
        self.n_files += 1
        self.rows.append(rows)
        if self.kind == "delta":
            write_deltalake(
                self.source, pa.Table.from_pandas(rows, preserve_index=False), mode="append"
            )
            return
        columns = list(rows.columns)
        dice.shuffle(columns)
        hidden = self.source / f".{self.n_files}"
        rows[columns].to_csv(hidden, index=False)
        hidden.rename(self.source / f"{self.n_files}.csv")

    def compact(self) -> None:
        """Put files of the table together otherwise; no row changes."""
        if self.kind == "delta":
            DeltaTable(self.source).optimize.compact()


@dataclass
class Found:
    """What became of rows.

    Args:
        lost: rows without an answer.
        doubled: rows with several.
        wrong: answers that are not those of the version that they name.
    """

    lost: int
    doubled: int
    wrong: int


@dataclass
class Torment:
    """A seeded course of actions.

    Args:
        folder: empty.
        dice: what happens.
    """

    folder: Path
    dice: random.Random

    def __post_init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._registry = _registry(self.folder)
        packs = {
            name: asked_pack(self.folder / "made" / name / "pack", name, seed)
            for seed, name in enumerate(VERSIONS)
        }
        self._versions = [
            register_asked(self._registry, pack, name) for name, pack in packs.items()
        ]
        self._models = {name: FleetModel(pack) for name, pack in packs.items()}
        self._spare = Child(self.folder)
        self._child: Child | None = None
        self._is_running = False

    def run(self, kind: str, n: int) -> Found:
        """So many actions against a new stream, and a check at the end."""
        sides = Sides(kind, self.folder / f"{kind} source", self.folder / f"{kind} answers")
        sides.source.mkdir()
        sides.add(self.dice)
        for number in range(n):
            weights = RUNNING if self._is_running else STOPPED
            (action,) = self.dice.choices(list(weights), list(weights.values()))
            began = time.monotonic()
            self.counts[action] += 1
            does: Mapping[str, Callable[[Sides], Any]] = {
                "add": lambda sides: sides.add(self.dice),
                "compact": lambda sides: sides.compact(),
                "champion": lambda _: self._registry.promote(self.dice.choice(self._versions)),
                "start": self._start,
                "stop": lambda _: self._stop(),
                "kill": self._kill,
                "check": self._check,
            }
            does[action](sides)
            print(
                f"  {kind} {number}: {action} ({time.monotonic() - began:.1f} s), "
                f"{sides.n_added:,} rows",
                flush=True,
            )
        return self._check(sides)

    def close(self) -> None:
        """End what is left."""
        for one in (self._child, self._spare):
            if one is not None:
                one.kill(group=True)

    def _start(
        self, sides: Sides, *, crash_at: str = "", every: float | None = EVERY_SECONDS
    ) -> Child:
        if self._child is None:
            self._child, self._spare = self._spare, Child(self.folder)
            if not self._child.wait_for("ready"):
                raise NotMeasured(
                    "a streaming process did not start: "
                    f"{self._child.log.read_text(errors='replace')[-2000:]}"
                )
            self.counts["processes"] += 1
        self._child.send(
            do="start",
            source=str(sides.source),
            target=str(sides.target),
            every=every,
            crash_at=crash_at,
        )
        self._is_running = True
        return self._child

    def _stop(self) -> None:
        if self._is_running and self._child is not None:
            self._child.send(do="stop")
            if not self._child.wait_for("ended"):
                raise NotMeasured("a streaming process ended by itself")
        self._is_running = False

    def _kill(self, sides: Sides) -> None:
        """The running child at a random moment, or a new start of it at a named point of a micro batch."""
        if self.dice.random() < 0.5:  # noqa: PLR2004 - half of them
            self._stop()
            point, turn = (
                self.dice.choice(list(crash_points.STREAM_POINTS)),
                self.dice.randrange(1, 3),
            )
            sides.add(self.dice)
            # One after the other: with no row there is no micro batch, and one that has died twice
            # need not die again.
            killed = self._start(sides, crash_at=f"{point}#{turn}:KILL", every=None)
            killed.send(do="wait")
            died = not killed.wait_for("ended")
            self.counts[f"died at {point}"] += died
            self._is_running = False
            if not died:
                return
        elif self._child is not None:
            time.sleep(self.dice.random() * KILL_WITHIN_SECONDS)
            sides.add(self.dice)
            time.sleep(self.dice.random() * KILL_WITHIN_SECONDS)
        if self._child is not None:
            self._child.kill(group=self.dice.random() < 0.5)  # noqa: PLR2004 - half of them
        self.counts["kills"] += 1
        self._child, self._is_running = None, False

    def _check(self, sides: Sides) -> Found:
        """Let the stream answer all there is, and compare."""
        self._stop()
        running = self._start(sides, every=None)
        running.send(do="wait")
        if not running.wait_for("ended"):
            raise NotMeasured("a streaming process ended by itself")
        self._is_running = False
        answers = DeltaTable(sides.target).to_pandas()
        answers["row_id"] = answers["row_id"].astype("int64")
        times = answers["row_id"].value_counts()
        found = Found(
            len(set(range(sides.n_added)) - set(times.index)),
            int((times > 1).sum()),
            self._wrong(answers, pd.concat(sides.rows)),
        )
        print(f"    {sides.n_added:,} rows, {len(answers):,} answers: {found}", flush=True)
        return found

    def _wrong(self, answers: pd.DataFrame, rows: pd.DataFrame) -> int:
        n_wrong = 0
        asked = rows.set_index("row_id", drop=False)
        for name, part in answers.groupby("fleet_version"):
            expected = (
                self._models[str(name)].predict(asked.loc[part["row_id"]])["prediction"].to_numpy()
            )
            n_wrong += int(
                (
                    ~(
                        (expected == part["prediction"].to_numpy())
                        | (np.isnan(expected) & part["prediction"].isna().to_numpy())
                    )
                ).sum()
            )
        return n_wrong


def stream_kills(folder: Path, n: int = 300, seed: int = 1) -> Mapping[str, float]:
    """The figure: rows lost and doubled after random actions.

    Args:
        folder: empty or absent.
        n: actions.
        seed: of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torment = Torment(folder, random.Random(seed))  # noqa: S311 - repeatable on purpose
    on_delta = n * ON_DELTA // 100
    try:
        found = [torment.run("delta", on_delta), torment.run("folder", n - on_delta)]
        n_rows = sum(
            len(DeltaTable(folder / f"{kind} answers").to_pandas(columns=["row_id"]))
            for kind in ("delta", "folder")
        )
    finally:
        torment.close()
    print(f"  {dict(torment.counts)}", flush=True)
    return {
        "lost": sum(one.lost for one in found),
        "doubled": sum(one.doubled for one in found),
        "wrong": sum(one.wrong for one in found),
        "actions": n,
        "kills": torment.counts["kills"],
        "restarts": torment.counts["start"] + torment.counts["processes"],
        "champion-changes": torment.counts["champion"],
        "rows": n_rows,
    }


def main(arguments: Sequence[str]) -> int:
    """Be a child, or run the actions: `--child FOLDER`, or `FOLDER [ACTIONS [SEED]]`."""
    if len(arguments) == 2 and arguments[0] == "--child":  # noqa: PLR2004
        child(Path(arguments[1]))
        return 0
    if not arguments:
        print("usage: python -m benchmarks.stream_kills FOLDER [ACTIONS [SEED]]")
        return 2
    folder, n, seed = (*arguments, *("300", "1")[len(arguments) - 1 :])
    found = stream_kills(Path(folder), int(n), int(seed))
    print(dict(found))
    return int(found["lost"] + found["doubled"] + found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
