"""Schedules, sensors and retries under a real daemon, which launches real runs of a small real fleet."""

from pathlib import Path

import pytest

from benchmarks.automation import automation_live, listed_automation

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_daemon_launches_what_is_due_and_what_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))  # put back afterwards
    found = automation_live(tmp_path / "live")
    assert not found.messages
    assert found.assets == {
        "schedule": {
            "sales",
            "features",
            "models",
            "importance",
            "meta_model",
            "champion",
            "predictions",
        },
        "sensor": {"sales"},
        "condition": {"features", "predictions"},
    }
    assert found.was_resumed
    assert (
        "groups of shop are kept; the next launch with the same settings resumes training run"
    ) in found.told


def test_the_examples_show_theirs() -> None:
    # Of each: when to score, when to train again, new files, and what follows them.
    assert listed_automation() == 3 * 4
