"""A real launch that somebody ends with Ctrl-C: what it says is kept is kept, and the same command goes on."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deltalake import DeltaTable

PROJECT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.integration, pytest.mark.slow]


@contextmanager
def launched(data: Path, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """`make run` of the smaller example, in a session of its own as a terminal's is; all of it is ended."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "run", "FLEET=housing", f"MANY_MODELS_DATA={data}", *settings]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def planned(data: Path) -> str:
    """What a dry run prints."""
    with launched(data, "DRY_RUN=1") as process:
        told, _ = process.communicate(timeout=180)
    assert process.returncode == 0, told
    return told


def test_a_dry_run_and_a_run_that_is_ended_by_hand_say_what_they_do(tmp_path: Path) -> None:
    before = planned(tmp_path)
    assert before.rstrip().endswith("dry run: nothing was trained")
    # Nothing of Dagster's about assets that a dry run does not come to.
    assert "emitted no result" not in before
    assert "43 to train" in before

    ledger = tmp_path / "tables" / "housing" / "ledger"
    with launched(tmp_path) as process:
        deadline = time.monotonic() + 180
        while not (ledger / "_delta_log" / f"{0:020}.json").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in told
    (kept, of, run_id), *others = re.findall(
        (
            r"stopped: (\d+) of (\d+) groups are kept; the next launch with the same "
            r"settings resumes run (\S+)"
        ),
        told,
    )
    assert not others
    assert int(of) == 43
    rows = DeltaTable(ledger).to_pandas()
    assert set(rows["run_id"]) == {run_id}
    assert len(rows) == int(kept) > 0

    again = planned(tmp_path)
    assert f"{int(of) - int(kept)} to train" in again
    assert f"{kept} done before the interruption" in again
