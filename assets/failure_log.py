"""Traces of failures, kept in files so that a terminal shows the message alone."""

import os
import traceback
from datetime import UTC, datetime
from pathlib import Path


def keep_trace(folder: Path, trace: str | BaseException) -> str:
    """Keep a trace.

    Args:
        folder: of the logs; made if it does not exist.
        trace: its text, or the error that has it.

    Returns:
        A line for people that says where it is; empty where it could not be written.
    """
    if isinstance(trace, BaseException):
        trace = "".join(traceback.format_exception(trace))
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(trace, encoding="utf-8")
    except OSError:  # the failure itself matters more, and a full disk may be its cause
        return ""
    return f"trace: {path}"


def first_line(text: str) -> str:
    """The first line that says anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason was given")
