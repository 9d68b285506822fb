"""First runs whose seconds were guessed ten times too low, killed at random moments: how much work each kill costs.

`python -m benchmarks.first_run_kills --train FOLDER SCALE` is the process that is killed.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from deltalake import DeltaTable

from benchmarks.generated import GeneratedFleet, write_features
from benchmarks.kills import SLOTS, Child, end_of, left_over, sleep_until, tables_of, train_told
from benchmarks.runs import NotMeasured
from pipeline.models.meta_model import GroupKey
from pipeline.models.start import Start
from pipeline.runs.planned_run import PlannedRun
from pipeline.spec import FleetSpec
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import TrainingSettings, train_group

CHECKPOINT_SECONDS = 3.0
TOO_LOW = 10
KILLS = 10
FLEET = GeneratedFleet(90, rows_per_group=500, skew=0.5, seed=29)
# What a group's trainer tells, a line when it begins and one when it ends.
GROUPS_TOLD = "groups.jsonl"
MODULE = "benchmarks.first_run_kills"


def spec() -> FleetSpec:
    """The fleet that is trained."""
    return FLEET.spec(tuning={"checkpoint_seconds": CHECKPOINT_SECONDS})


@dataclass(frozen=True)
class ToldTrainer:
    """Trains a group as always, and tells when it begins and ends.

    Args:
        file: that it tells in, a line of JSON each time: grain, group_id, event, moment (of the
            monotonic clock, seconds).
    """

    file: Path

    def __call__(
        self, frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start
    ) -> Outcome:
        """Train one group."""
        key = {"grain": grain, "group_id": json.dumps([frame["group"].iloc[0]] if grain else [])}
        self._tell({**key, "event": "begun"})
        try:
            return train_group(frame, grain, settings, start)
        finally:
            self._tell({**key, "event": "ended"})

    def _tell(self, what: Mapping[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({**what, "moment": time.monotonic()}) + "\n")


def train(folder: Path, scale: float) -> None:
    """Train the fleet of a folder with planned seconds that are scaled, and tell when each group begins and ends."""

    def scaled(run: PlannedRun) -> PlannedRun:
        groups = run.plan.groups
        return replace(
            run,
            plan=replace(
                run.plan, groups=groups.assign(cost_seconds=groups["cost_seconds"] * scale)
            ),
        )

    train_told(folder, spec(), trainer=ToldTrainer(folder / GROUPS_TOLD), planned=scaled)


def first_run_kills(folder: Path, n: int = KILLS, seed: int = 1) -> Mapping[str, float]:
    """The figure: what a kill of a first run costs, when its seconds were guessed ten times too low.

    Args:
        folder: empty or absent.
        n: kills.
        seed: of their moments.

    Returns:
        Work that a kill loses, in `checkpoint_seconds` per slot: the most, and the mean. A group
        that was being trained and took longer than two checkpoints so far is apart, as any kill
        loses that.
    """
    reference = folder / "reference"
    write_features(FLEET, tables_of(reference) / "features")
    seconds, waves = _straight(reference, 1.0)
    ledger = DeltaTable(tables_of(reference) / "ledger").to_pandas()
    guessed = float(ledger["planned_seconds"].sum() / ledger["seconds"].sum())
    scale = 1 / (TOO_LOW * guessed)
    print(
        f"  undisturbed: {seconds:.0f} s in {waves} waves; the plan foresaw {guessed:.2f} of them, "
        f"in what follows {1 / TOO_LOW:g}",
        flush=True,
    )
    rng = random.Random(seed)  # noqa: S311 - repeatable on purpose
    lost = [
        _lost_by_kill(folder / f"kill-{number}", reference, scale, rng.random() * seconds)
        for number in range(n)
    ]
    return {"worst": max(lost), "mean": sum(lost) / len(lost)}


def _straight(folder: Path, scale: float) -> tuple[float, int]:
    """Train undisturbed: seconds from the plan to the end of training, and the waves that were committed."""
    with Child(folder, module=MODULE, options=[str(scale)]) as child:
        status = child.end()
        planned, trained = child.event("planned"), child.event("trained")
    if status or planned is None or trained is None:
        raise NotMeasured(
            f"a run that nobody disturbed ended with exit status {status}: {end_of(folder / 'log')}"
        )
    waves = DeltaTable(tables_of(folder) / "ledger").to_pandas()["wave"].nunique()
    return trained["moment"] - planned["moment"], waves


def _lost_by_kill(folder: Path, reference: Path, scale: float, after: float) -> float:
    """Kill a run so many seconds after its plan.

    The work lost, in `checkpoint_seconds` per slot.
    """
    shutil.copytree(tables_of(reference) / "features", tables_of(folder) / "features")
    with Child(folder, module=MODULE, options=[str(scale)]) as child:
        planned = child.wait_for("planned")
        if planned is None or not sleep_until(planned["moment"] + after, child):
            raise NotMeasured(
                f"a run ended before it was killed after {after:.0f} s: {end_of(folder / 'log')}"
            )
        child.process.kill()
        killed = time.monotonic()
        child.end()
    if wrong := left_over([child.mark]):
        raise NotMeasured("; ".join(wrong))
    told = (
        [json.loads(line) for line in (folder / GROUPS_TOLD).read_text().splitlines()]
        if (folder / GROUPS_TOLD).exists()
        else []
    )
    finished, in_flight = _work(told, killed)
    kept = _committed(folder)
    waiting = {key: seconds for key, seconds in finished.items() if key not in kept}
    held = [seconds for seconds in in_flight.values() if seconds <= 2 * CHECKPOINT_SECONDS]
    lost = (sum(waiting.values()) + sum(held)) / SLOTS / CHECKPOINT_SECONDS
    print(
        f"  killed after {after:.0f} s: {len(kept)} groups kept, {len(waiting)} trained and lost "
        f"({sum(waiting.values()):.1f} s), "
        f"{len(in_flight)} in flight ({sum(in_flight.values()):.1f} s): {lost:.2f}",
        flush=True,
    )
    return lost


def _work(
    told: Sequence[Mapping[str, Any]], killed: float
) -> tuple[dict[GroupKey, float], dict[GroupKey, float]]:
    """Seconds of the groups that ended before a moment, and of those that were being trained then."""
    begun: dict[GroupKey, float] = {}
    finished: dict[GroupKey, float] = {}
    for line in told:
        key, moment = GroupKey.of(line), float(line["moment"])
        if moment > killed:
            continue
        if line["event"] == "begun":
            begun[key] = moment
        else:
            finished[key] = moment - begun.pop(key)
    return finished, {key: killed - moment for key, moment in begun.items()}


def _committed(folder: Path) -> set[GroupKey]:
    """Groups that have a ledger row."""
    location = tables_of(folder) / "ledger"
    if not (location / "_delta_log").exists():
        return set()
    rows = DeltaTable(location).to_pandas()
    return set(GroupKey.of_rows(rows))


if __name__ == "__main__":
    train(Path(sys.argv[2]), float(sys.argv[3]))
