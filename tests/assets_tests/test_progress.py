"""What people read while a run trains, when they stop it, and after a dry run."""

import logging
from typing import Any

import pytest

from assets.console import is_for_people
from assets.progress import progress_lines, rough_duration
from pipeline.spark.progress import Done


class Log:
    """Keeps lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (1, "about 5 s"),
        (43, "about 45 s"),
        (99, "about 100 s"),
        (170, "about 3 min"),
        (5400, "about 90 min"),
        (10_149, "about 3 h"),
    ],
)
def test_durations_are_told_as_far_as_they_can_be_believed(seconds: float, told: str) -> None:
    assert rough_duration(seconds) == told


def test_a_line_tells_what_is_done_and_a_time_only_where_there_is_evidence() -> None:
    log: Any = Log()
    report = progress_lines(log)
    for done in (
        Done(0, 0, 40, None),
        Done(3, 0, 40, None),
        Done(3, 0, 40, 100.0),
        Done(20, 1, 40, 170.0),
        Done(40, 1, 40, None),
    ):
        report(done)
    assert log.lines == [
        "3 of 40 groups done, 0 failed, 0 s",
        "20 of 40 groups done, 1 failed, 0 s, about 3 min left",
        "40 of 40 groups done, 1 failed, 0 s",
    ]


def test_a_large_fleet_is_told_of_in_about_a_hundred_lines() -> None:
    log: Any = Log()
    report = progress_lines(log)
    for number in range(10_001):
        report(Done(number, 0, 10_000, None))
    assert len(log.lines) <= 100
    assert log.lines[-1].startswith("10,000 of 10,000")


def record(text: str, level: int = logging.INFO, *, event: object = None) -> logging.LogRecord:
    made = logging.LogRecord("dagster", level, "", 0, text, None, None)
    made.dagster_meta = {"orig_message": text, "dagster_event": event}
    return made


def test_a_dry_run_prints_no_line_that_looks_like_a_fault() -> None:
    skipped = (
        "Skipping step housing__importance due to skipped dependencies: ['housing__models.result']."
    )
    missing = (
        "Blocking asset check 'housing/models:x' emitted no result in step "
        "'housing__models_checks'; downstream step 'y' will proceed"
    )
    assert not is_for_people(record(skipped))
    assert not is_for_people(record(missing, logging.WARNING))
    assert is_for_people(record("dry run: nothing was trained"))
