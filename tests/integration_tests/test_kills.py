"""A run that is killed and started again leaves what a straight run leaves; poisoned groups harm nobody but themselves."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.generated import GeneratedFleet
from benchmarks.kills import (
    WAVES_REPEATED,
    Reference,
    Trial,
    kill_trials,
    random_trials,
    straight_run,
    survive,
)
from benchmarks.poison import POISONS, TRAINED, train_poisoned
from pipeline.crash_points import POINTS
from pipeline.runs.schedule import Schedule
from pipeline.runs.wave import TrainedFiles, Wave, train_overlapping

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return straight_run(tmp_path_factory.mktemp("kills") / "reference")


def test_three_random_kills_are_survived(tmp_path: Path) -> None:
    found = kill_trials(3, 1, tmp_path)
    assert found.messages == []
    assert found.survived == 3


@pytest.mark.parametrize("crash_at", ["boosters_committed#2:KILL", "ledger_committed:KILL"])
def test_a_run_killed_at_a_named_point_is_resumed(
    crash_at: str, reference: Reference, tmp_path: Path
) -> None:
    assert survive(Trial("driver", crash_at=crash_at), reference, tmp_path) == []


def test_however_slow_commits_are_two_waves_at_most_are_not_committed() -> None:
    trained: list[str] = []

    def train(wave: Wave) -> TrainedFiles:
        trained.append(wave.name)
        return TrainedFiles([], [], [])

    groups = pd.DataFrame(
        {
            "grain": 1,
            "group_id": [f"g{number}" for number in range(24)],
            "cost_seconds": 1.0,
            "task": 0,
        }
    )
    schedule = Schedule(groups, slots=2, checkpoint_seconds=4.0, has_history=True)
    committed = []
    for wave, _ in train_overlapping(schedule, "run", train, lambda: None):
        time.sleep(0.1)
        assert len(trained) <= len(committed) + WAVES_REPEATED
        schedule.ended(wave.groups, [])
        committed += wave.groups["group_id"].tolist()
    assert committed == groups["group_id"].tolist()
    assert len(trained) == 6


def test_trials_are_repeatable_and_kill_each_kind_of_process() -> None:
    trials = random_trials(25, 1)
    assert trials == random_trials(25, 1) != random_trials(25, 2)
    assert {trial.victim for trial in trials} == {"driver", "worker", "training child"}
    assert any(trial.crash_at for trial in trials)
    assert all(trial.crash_at.split("#")[0].split(":")[0] in ("", *POINTS) for trial in trials)


def test_poisoned_groups_harm_nobody_but_themselves(tmp_path: Path) -> None:
    fleet = GeneratedFleet(12, rows_per_group=170, seed=23)
    poisons = [
        replace(one, group=group) for one, group in zip(POISONS, fleet.groups[1:], strict=False)
    ]
    found = train_poisoned(tmp_path, poisons, fleet)
    assert found.poisons["is_right"].all(), found.poisons.to_string()
    assert found.violations == []
    assert found.counts["trained"] == 12 - sum(one.expected != TRAINED for one in POISONS)
    assert found.counts["pooled-trained"] == 1


def test_the_checker_imports_nothing_of_the_project() -> None:
    script = (
        "import sys, benchmarks.invariants; print([name for name in sys.modules if "
        "name.split('.')[0] in ('pipeline', 'assets', 'resources')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
