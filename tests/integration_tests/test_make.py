"""What `make` starts, it ends."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent.parent
PORT = 3917


def marked(mark: str) -> list[str]:
    """Command lines of all processes with a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended, or is another user's
            continue
    return found


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interface_whose_make_is_ended_leaves_no_process_behind(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    with (tmp_path / "log").open("w") as log:
        made = subprocess.Popen(
            ["make", "ui", f"PORT={PORT}", f"MANY_MODELS_DATA={tmp_path}/data"],
            cwd=PROJECT,
            env={**inherited, "MARK": mark},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 90
            while not is_up():
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.3)
            assert len(marked(mark)) > 3
            made.send_signal(signal.SIGTERM)  # make alone, as a process manager does
            made.wait(30)
            deadline = time.monotonic() + 30
            while marked(mark) and time.monotonic() < deadline:
                time.sleep(0.3)
            assert marked(mark) == []
        finally:
            if marked(mark):
                os.killpg(made.pid, signal.SIGKILL)


def is_up() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/server_info", timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
