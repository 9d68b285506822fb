"""Training runs that are killed at random moments and at every named crash point, and what is left in the end: a straight run's tables, to the byte.

`python -m benchmarks.kills --train FOLDER` is the process that is killed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow.parquet as pq
from deltalake import DeltaTable

from benchmarks.engine import Engine
from benchmarks.generated import GeneratedFleet, write_features
from benchmarks.invariants import check_fleet, compare_runs
from benchmarks.runs import PROJECT, NotMeasured
from pipeline import crash_points
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.spark.planning import plan_run
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from pipeline.testing.runs import own_tables, quiet_context
from pipeline.training.trainer import train_group
from pipeline.training.worker import TrainGroup
from resources.lease import hold_lease

Victim = Literal["driver", "worker", "training child"]

NAME = "killed"
GRAINS = ((), ("group",))
# No clock may end a study: results would depend on the machine.
TUNING: Mapping[str, Any] = {"max_trials": 2, "patience": 2, "max_rounds": 60}
# Checkpoints so short that so small a fleet is trained in several waves.
WAVE_SECONDS = 0.3
SLOTS = 2
WAVES_REPEATED = 2
MARK = "MANY_MODELS_KILLED_TRIAL"
PATIENCE_SECONDS = 300.0
GONE_SECONDS = 30.0
POLL_SECONDS = 0.01
ATTEMPTS = 4
# One driver in so many dies at a named point instead of at a moment.
AT_A_POINT = 4


def small_fleet() -> GeneratedFleet:
    """The fleet that is trained."""
    return GeneratedFleet(32, rows_per_group=200, seed=17)


# --- the process that is killed


def train(folder: Path) -> None:
    """Train the fleet of a folder, as the asset does, and tell in its events how far it came.

    Args:
        folder: with the feature table at tables/killed/features.
    """
    crash_points.arm(os.environ.get(crash_points.VARIABLE, ""))
    train_told(folder, small_fleet().spec(tuning={**TUNING, "checkpoint_seconds": WAVE_SECONDS}))


def train_told(
    folder: Path,
    spec: FleetSpec,
    *,
    trainer: TrainGroup | None = None,
    planned: Callable[[PlannedRun], PlannedRun] = lambda run: run,
) -> None:
    """Train a fleet, as the asset does, and tell in the folder's events how far it came.

    Args:
        folder: with the feature table at tables/killed/features.
        spec: the fleet.
        trainer: trains a group; by default what the asset has.
        planned: changes what was planned.
    """
    with Engine(folder, memory="1g", slots=SLOTS) as engine:
        spark = engine.spark.session
        _tell(folder, "session")
        run_id = uuid.uuid4().hex[:12]
        with hold_lease(engine.tables, NAME, run_id) as lease:
            crash_points.crash_point("lease_taken")
            location = engine.tables.location(NAME, "features")
            version = engine.tables.version(location)
            history = History.read(own_tables(engine.tables, NAME))
            features = engine.tables.read_spark(spark, location, version)
            run = planned(
                plan_run(
                    quiet_context(spark, slots=SLOTS), features, spec, Request(run_id), history
                )
            )
            _tell(
                folder,
                "planned",
                run_id=run.run_id,
                resumed=run.is_resumed,
                waves=run.plan.n_waves,
                groups=len(run.plan.to_train),
            )
            cluster = quiet_context(
                spark, memory_bytes=engine.spark.group_memory_bytes, train=trainer or train_group
            )
            train_run(
                cluster,
                own_tables(engine.tables, NAME),
                run,
                spec,
                features_version=version,
                lease=lease,
            )
        _tell(folder, "trained")


def _tell(folder: Path, event: str, **details: Any) -> None:
    line = json.dumps({"event": event, "moment": time.monotonic(), "pid": os.getpid(), **details})
    with (folder / "events.jsonl").open("a") as file:
        file.write(line + "\n")


# --- processes


@dataclass
class Child:
    """A training process that was started in a folder, with all that it starts.

    Args:
        folder: as for `train`.
        crash_at: as `crash_points.arm` takes it.
        module: that is run, with `--train FOLDER`.
        options: further ones.
    """

    folder: Path
    crash_at: str = ""
    module: str = "benchmarks.kills"
    options: Sequence[str] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> Self:
        self._told = len(_events(self.folder))
        self._log = (self.folder / "log").open("a")
        environment = {
            **os.environ,
            MARK: self.mark,
            crash_points.VARIABLE: self.crash_at,
            "TMPDIR": str(self.folder / "tmp"),
        }
        (self.folder / "tmp").mkdir(exist_ok=True)
        command = [sys.executable, "-m", self.module, "--train", str(self.folder), *self.options]
        self.process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def event(self, name: str) -> Mapping[str, Any] | None:
        """What this child told under a name; None if it has not."""
        return next(
            (event for event in _events(self.folder)[self._told :] if event["event"] == name), None
        )

    def wait_for(self, name: str) -> Mapping[str, Any] | None:
        """Wait until the child tells something; None if it ends before.

        Raises:
            NotMeasured: if neither happens.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up:
            ended = self.process.poll() is not None
            found = self.event(name)
            if found is not None or ended:
                return found
            time.sleep(POLL_SECONDS)
        raise NotMeasured(
            f"a training process did not come to {name!r} within {PATIENCE_SECONDS:g} s: "
            f"{end_of(self.folder / 'log')}"
        )

    def end(self) -> int:
        """Wait for the child's exit status.

        Raises:
            NotMeasured: if it does not end.
        """
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise NotMeasured(
                f"a training process did not end within {PATIENCE_SECONDS:g} s: "
                f"{end_of(self.folder / 'log')}"
            ) from error

    def python_below(self) -> tuple[list[int], list[int]]:
        """Spark's Python workers, and the processes in which they train."""
        parents = _parents()
        machines = [pid for pid in _below(self.process.pid, parents) if _name_of(pid) == "java"]
        daemons = [pid for pid, parent in parents.items() if parent in machines]
        workers = [pid for pid, parent in parents.items() if parent in daemons]
        return workers, [pid for pid, parent in parents.items() if parent in workers]


def _events(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def end_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _parents() -> dict[int, int]:
    """The parent of every process that is not dead."""
    found = {}
    for pid in _processes():
        with contextlib.suppress(OSError):
            state, parent = (
                Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            )
            if state not in "ZX":
                found[pid] = int(parent)
    return found


def _below(pid: int, parents: Mapping[int, int]) -> list[int]:
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [deeper for child in children for deeper in _below(child, parents)]


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _marked(mark: str) -> dict[int, str]:
    """The processes that inherited a child's mark, whoever their parent is by now, with their names."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for pid in _parents():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found[pid] = _name_of(pid)
    return found


def left_over(marks: Sequence[str]) -> list[str]:
    """I9: what is still running of ended children after a while; it is killed."""
    give_up = time.monotonic() + GONE_SECONDS
    there: dict[int, str] = {}
    while time.monotonic() < give_up:
        there = {pid: name for mark in marks for pid, name in _marked(mark).items()}
        if not there:
            return []
        time.sleep(0.1)
    for pid in there:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    alive = ", ".join(f"{name} ({pid})" for pid, name in sorted(there.items()))
    return [f"I9: {GONE_SECONDS:g} s after the end there are still {alive}"]


# --- trials


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed.

    Args:
        folder: of it.
        seconds: from the session's start to the end of training.
        planned_seconds: of these until the waves begin.
    """

    folder: Path
    seconds: float
    planned_seconds: float

    @property
    def tables(self) -> Path:
        """Its tables."""
        return tables_of(self.folder)


@dataclass(frozen=True)
class Trial:
    """What is done to a run.

    Args:
        victim: what is killed.
        moment: when, as a share of the reference's seconds: of all for a driver, of those of its
            waves for a worker.
        crash_at: a named crash point instead of a moment.
    """

    victim: Victim
    moment: float = 0.0
    crash_at: str = ""

    def __str__(self) -> str:
        return (
            f"driver at {self.crash_at}" if self.crash_at else f"{self.victim} at {self.moment:.0%}"
        )


@dataclass(frozen=True)
class Killed:
    """What became of the trials.

    Args:
        survived: trials after which everything held.
        trials: trials.
        messages: what did not hold, one line each.
        seconds: wall seconds per trial.
        reference_seconds: wall seconds of the undisturbed run, from its session's start.
    """

    survived: int
    trials: int
    messages: Sequence[str]
    seconds: float
    reference_seconds: float


def kill_trials(n: int, seed: int, folder: Path) -> Killed:
    """Kill training runs at random moments: the driver, Spark's Python workers, and the processes in which they train.

    Args:
        n: trials.
        seed: of what is killed when.
        folder: empty or absent; it is left with what did not survive.
    """
    return _try_all(random_trials(n, seed), folder)


def kill_points(folder: Path, points: Sequence[str] = tuple(crash_points.POINTS)) -> Killed:
    """Kill the driver once at each of the named crash points.

    At those that come with each wave, in the second one.
    """
    return _try_all([Trial("driver", crash_at=_at(point)) for point in points], folder)


def kills(folder: Path, n: int = 25, seed: int = 1) -> Mapping[str, float]:
    """The figure: how many runs were, in the end, what a straight run is.

    Args:
        folder: empty or absent.
        n: random trials.
        seed: of them.

    Returns:
        Trials survived, named crash points survived, and wall seconds per random trial.
    """
    drawn, points = kill_trials(n, seed, folder / "random"), kill_points(folder / "points")
    for message in (*drawn.messages, *points.messages):
        print(f"  {message}", flush=True)
    return {
        "survived": drawn.survived,
        "points": points.survived,
        "seconds-per-trial": drawn.seconds,
    }


def random_trials(n: int, seed: int) -> list[Trial]:
    """Half of them kill the driver; the same ones for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - repeatable on purpose
    victims: list[Victim] = [
        ("driver", "worker", "driver", "training child")[number % 4] for number in range(n)
    ]
    rng.shuffle(victims)
    trials = []
    for victim in victims:
        at_a_point = victim == "driver" and rng.randrange(AT_A_POINT) == 0
        crash_at = (
            _at(rng.choice(list(crash_points.POINTS)), rng.randrange(1, 4)) if at_a_point else ""
        )
        trials.append(Trial(victim, rng.random(), crash_at))
    return trials


def _at(point: str, turn: int = 2) -> str:
    """A crash point as it is armed; only those of waves come more than once."""
    each_wave = crash_points.POINTS[point].startswith("*")
    return f"{point}#{turn}:KILL" if each_wave else f"{point}:KILL"


def _try_all(trials: Sequence[Trial], folder: Path) -> Killed:
    reference = straight_run(folder / "reference")
    messages: list[str] = []
    survived, started = 0, time.monotonic()
    for number, trial in enumerate(trials):
        began = time.monotonic()
        wrong = survive(trial, reference, folder / f"trial-{number}")
        survived += not wrong
        messages += [f"trial {number} ({trial}): {line}" for line in wrong]
        print(
            f"  trial {number}: {trial}: {'; '.join(wrong) or 'survived'} "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if not wrong:
            shutil.rmtree(folder / f"trial-{number}", ignore_errors=True)
    return Killed(
        survived,
        len(trials),
        messages,
        (time.monotonic() - started) / max(1, len(trials)),
        reference.seconds,
    )


def straight_run(folder: Path) -> Reference:
    """Train the fleet undisturbed.

    Raises:
        NotMeasured: if that fails, or an invariant does not hold.
    """
    folder.mkdir(parents=True)
    write_features(small_fleet(), tables_of(folder) / "features")
    with Child(folder) as child:
        status = child.end()
        session, planned, trained = (
            child.event(name) for name in ("session", "planned", "trained")
        )
    if status or not session or not planned or not trained:
        raise NotMeasured(
            f"a run that nobody disturbed ended with exit status {status}: {end_of(folder / 'log')}"
        )
    wrong = _checked(folder, [child.mark])
    if wrong:
        raise NotMeasured(f"a run that nobody disturbed is not sound: {'; '.join(wrong)}")
    print(
        f"  reference: {trained['moment'] - session['moment']:.1f} s, {planned['waves']} waves of "
        f"{planned['groups']} groups",
        flush=True,
    )
    return Reference(
        folder, trained["moment"] - session["moment"], planned["moment"] - session["moment"]
    )


def survive(trial: Trial, reference: Reference, folder: Path) -> list[str]:
    """Do what a trial does in a folder of its own, let the run be finished, and check all.

    Returns:
        What does not hold; empty if the trial survived.
    """
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(reference.tables / "features", tables_of(folder) / "features")
        wrong = _killed_and_finished(trial, reference, folder)
        if wrong is not None:
            return wrong + _compared(reference, folder)
        # The run was faster than the reference: nothing was there to be killed.
        trial = replace(trial, moment=trial.moment / 2)
    return [f"in {ATTEMPTS} attempts the run ended before anything could be killed"]


def _compared(reference: Reference, folder: Path) -> list[str]:
    if not _is_finished(folder):
        return ["no run was finished"]
    return [f"I6: {line}" for line in compare_runs(reference.tables, tables_of(folder))]


def _checked(folder: Path, marks: Sequence[str]) -> list[str]:
    """The invariants of the tables, and I9."""
    tables = tables_of(folder)
    return left_over(marks) + check_fleet(tables, features=tables / "features", grains=GRAINS)


def _killed_and_finished(trial: Trial, reference: Reference, folder: Path) -> list[str] | None:
    """Violations after the run was killed and finished.

    None if the run ended before it could be killed.
    """
    with Child(folder, trial.crash_at) as child:
        hit = _kill(trial, reference, child)
        status = child.end()
        if not hit:
            return None
    if trial.victim != "driver":
        return _checked(folder, [child.mark]) + (
            [f"the run ended with exit status {status}"] if status else []
        )
    if status != -signal.SIGKILL:
        return [f"the driver ended with exit status {status}, not killed: {end_of(folder / 'log')}"]
    wrong, marks = [], [child.mark]
    lost = _waves_lost(folder)
    if len(lost) > WAVES_REPEATED:
        wrong.append(f"I8: {len(lost)} waves are to be repeated: {', '.join(sorted(lost))}")
    if not _is_finished(folder):
        again, mark = _finish(folder, _run_ids(folder))
        wrong, marks = wrong + again, [*marks, mark]
    return wrong + _checked(folder, marks)


def _finish(folder: Path, interrupted: Sequence[str]) -> tuple[list[str], str]:
    """Start the same command again; what it did wrong, and its mark."""
    with Child(folder) as child:
        status = child.end()
        planned = child.event("planned")
    if status or planned is None:
        return [
            f"started again, the run ended with exit status {status}: {end_of(folder / 'log')}"
        ], child.mark
    wanted = interrupted[-1] if interrupted else planned["run_id"]
    if (planned["run_id"], planned["resumed"]) != (wanted, bool(interrupted)):
        run = f"run {planned['run_id']} (resumed: {planned['resumed']})"
        return [f"{run} did not finish the interrupted {wanted}"], child.mark
    return [], child.mark


def _kill(trial: Trial, reference: Reference, child: Child) -> bool:
    """Kill what the trial says, when it says; whether it was there to be killed."""
    if trial.crash_at:
        return child.end() == -signal.SIGKILL
    return (
        _kill_driver(trial, reference, child)
        if trial.victim == "driver"
        else _kill_below(trial, reference, child)
    )


def _kill_driver(trial: Trial, reference: Reference, child: Child) -> bool:
    started = child.wait_for("session")
    if started is None or not sleep_until(
        started["moment"] + trial.moment * reference.seconds, child
    ):
        return False
    child.process.kill()
    return True


def _kill_below(trial: Trial, reference: Reference, child: Child) -> bool:
    planned = child.wait_for("planned")
    if planned is None:
        return False
    there = sleep_until(
        planned["moment"] + trial.moment * (reference.seconds - reference.planned_seconds), child
    )
    while there:
        workers, trainers = child.python_below()
        victims = workers if trial.victim == "worker" else trainers
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(victims[int(trial.moment * len(victims))], signal.SIGKILL)
            return True
        there = sleep_until(time.monotonic() + POLL_SECONDS, child)
    return False


def sleep_until(moment: float, child: Child) -> bool:
    """Whether the child has not finished training by then; if it has, that is told at once."""
    while child.process.poll() is None and child.event("trained") is None:
        if time.monotonic() >= moment:
            return True
        time.sleep(POLL_SECONDS)
    return False


# --- tables


def tables_of(folder: Path) -> Path:
    """The tables of a training in a folder."""
    return folder / "tables" / NAME


def _run_ids(folder: Path) -> list[str]:
    """The runs that have a manifest, oldest first."""
    if not (tables_of(folder) / "runs" / "_delta_log").exists():
        return []
    runs = DeltaTable(tables_of(folder) / "runs").to_pandas()
    return [str(name) for name in runs.sort_values("started_at")["run_id"]]


def _is_finished(folder: Path) -> bool:
    if not _run_ids(folder):
        return False
    runs = DeltaTable(tables_of(folder) / "runs").to_pandas()
    return bool(runs["finished_at"].notna().any())


def _waves_lost(folder: Path) -> set[str]:
    """I8: the waves that wrote boosters but have no ledger rows.

    Also those whose files nobody committed.
    """
    tables = tables_of(folder)
    named: set[str] = set()
    if (tables / "ledger" / "_delta_log").exists():
        named = set(DeltaTable(tables / "ledger").to_pandas()["wave"].dropna())
    written: set[str] = set()
    for file in (tables / "boosters").glob("*.parquet"):
        # A file that was being written has no end yet.
        with contextlib.suppress(OSError, ValueError):
            written.update(
                pq.read_table(file, columns=["wave"], partitioning=None)["wave"].to_pylist()
            )
    return written - named


def main(arguments: Sequence[str]) -> int:
    """Train as a child, or run trials: `--train FOLDER`, or `FOLDER [TRIALS|points [SEED]]`."""
    if len(arguments) == 2 and arguments[0] == "--train":  # noqa: PLR2004
        train(Path(arguments[1]))
        return 0
    if not arguments:
        print("usage: python -m benchmarks.kills FOLDER [TRIALS|points [SEED]]")
        return 2
    folder, n, seed = (*arguments, *("3", "1")[len(arguments) - 1 :])
    found = (
        kill_points(Path(folder)) if n == "points" else kill_trials(int(n), int(seed), Path(folder))
    )
    print(
        "\n".join(
            [
                *found.messages,
                f"{found.survived} of {found.trials} survived, {found.seconds:.0f} s per trial",
            ]
        )
    )
    return int(found.survived != found.trials)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
