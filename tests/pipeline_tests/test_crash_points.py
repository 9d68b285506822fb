import multiprocessing as mp
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.crash_points import DECISION_POINTS, POINTS, STREAM_POINTS, arm, crash_point
from pipeline.errors import SpecError


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Signals that would have been sent, with the process that would have got them."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "nowhere:KILL",
        "run_committed:NOSUCH",
        "run_committed",
        "run_committed:",
        ":KILL",
        "run_committed#0:KILL",
        "run_committed#x:KILL",
        "run_committed:9",
        " run_committed:KILL",
        "run_committed:KILL\n",
    ],
)
def test_a_point_or_signal_that_does_not_exist_is_refused_with_those_that_do(text: str) -> None:
    with pytest.raises(SpecError, match="FLEET_CRASH_AT is") as told:
        arm(text)
    assert repr(text) in str(told.value)
    assert "boosters_committed, holdout_committed, wave_committed" in str(told.value)


def test_nothing_happens_unless_armed(sent: list[tuple[int, int]]) -> None:
    for point in POINTS:
        crash_point(point)
    assert sent == []


@pytest.mark.parametrize(
    ("name", "number"),
    [("KILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM), ("SEGV", signal.SIGSEGV)],
)
@pytest.mark.parametrize("armed", [*POINTS, *STREAM_POINTS, *DECISION_POINTS])
def test_the_armed_point_alone_sends_this_process_its_signal(
    sent: list[tuple[int, int]], armed: str, name: str, number: signal.Signals
) -> None:
    arm(f"{armed}:{name}")
    for point in (*POINTS, *STREAM_POINTS, *DECISION_POINTS):
        crash_point(point)
    assert sent == [(os.getpid(), number)]


def test_only_the_named_turn_counts(sent: list[tuple[int, int]]) -> None:
    arm("wave_committed#3:TERM")
    seen = []
    for _ in range(5):
        crash_point("wave_committed")
        seen.append(len(sent))
    assert seen == [0, 0, 1, 1, 1]


def test_arming_again_counts_from_the_beginning_and_nothing_disarms(
    sent: list[tuple[int, int]],
) -> None:
    arm("wave_committed#2:TERM")
    crash_point("wave_committed")
    arm("wave_committed#2:TERM")
    crash_point("wave_committed")
    arm("")
    crash_point("wave_committed")
    assert sent == []


@pytest.mark.parametrize(
    ("text", "number", "came_to"),
    [("wave_trained:KILL", signal.SIGKILL, 0), ("wave_trained#2:TERM", signal.SIGTERM, 1)],
)
def test_a_process_dies_at_the_point(
    tmp_path: Path, text: str, number: signal.Signals, came_to: int
) -> None:
    def run() -> None:
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # Spark and Dagster, in tests before this one, handle it
        arm(text)
        for turn in range(3):
            crash_point("run_planned")
            crash_point("wave_trained")
            (tmp_path / f"{turn}").touch()

    child = mp.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == -number
    assert len(list(tmp_path.iterdir())) == came_to


def test_every_point_is_somewhere_on_the_way_of_a_run_or_a_stream() -> None:
    root = Path(__file__).parents[2]
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("pipeline", "assets")
        for path in (root / folder).rglob("*.py")
    )
    computed = {"boosters_committed", "holdout_committed"}
    assert [
        point
        for point in (*POINTS, *STREAM_POINTS, *DECISION_POINTS)
        if point not in computed and f'crash_point("{point}")' not in code
    ] == []
