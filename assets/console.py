"""A console logger for people: the time and the message, without run ids and event names."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.plan.objects import ErrorSource

from assets.failure_log import first_line, keep_trace


class _Message(logging.Formatter):
    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._logs = logs

    def format(self, record: logging.LogRecord) -> str:
        step = (_dagster_meta(record).get("step_key") or "").rsplit("__", 1)[-1]
        line = f"{self.formatTime(record, '%H:%M:%S')} {step:<12} "
        if record.levelno >= logging.WARNING:
            line += f"{record.levelname}: "
        return line + _message(record) + _cause(_event(record), self._logs)


def console_logger(logs: Path) -> dg.LoggerDefinition:
    """The console's logger.

    Args:
        logs: folder that takes the traces of failures.
    """

    @dg.logger(
        config_schema={},
        description="Time, asset and message: what a person wants to see of a run.",
    )
    def console(context: dg.InitLoggerContext) -> logging.Logger:  # noqa: ARG001
        """Messages of our own at INFO and above; of Dagster's events, what went wrong and where."""
        # One per run, like Dagster's own: a shared one would add a handler each run.
        logger = logging.Logger("many-models", level=logging.INFO)  # noqa: LOG001
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Message(logs))
        handler.addFilter(is_for_people)
        logger.addHandler(handler)
        return logger

    return console


def _dagster_meta(record: logging.LogRecord) -> Mapping[str, Any]:
    return getattr(record, "dagster_meta", None) or {}


def _message(record: logging.LogRecord) -> str:
    return str(_dagster_meta(record).get("orig_message") or record.getMessage())


def _event(record: logging.LogRecord) -> dg.DagsterEvent | None:
    event: dg.DagsterEvent | None = _dagster_meta(record).get("dagster_event")
    return event


# What Dagster says of every later step: after a failed one, and after a dry run, as if that were a
# fault.
_OF_LATER_STEPS = (
    "Dependencies for step",
    " due to skipped dependencies:",
    " emitted no result in step ",
)


def is_for_people(record: logging.LogRecord) -> bool:
    """Whether a person wants to see it: our own messages, and where something went wrong."""
    event = _event(record)
    if event is None:
        message = _message(record)
        return not any(part in message for part in _OF_LATER_STEPS)
    if event.is_step_failure:
        # Whoever interrupted a step knows; the step itself says what is kept.
        return event.step_failure_data.error_source != ErrorSource.INTERRUPT
    if event.event_type == dg.DagsterEventType.RUN_FAILURE:
        # A step that failed has said why; a run may also fail before its first step.
        error = event.job_failure_data.error
        is_ended_by_hand = (
            error is not None and error.cls_name == dg.DagsterExecutionInterruptedError.__name__
        )
        return event.job_failure_data.first_step_failure_event is None and not is_ended_by_hand
    return record.levelno >= logging.WARNING


def _cause(event: dg.DagsterEvent | None, logs: Path) -> str:
    """Why a step failed, or a run before its first step, and where the trace is."""
    if event is None:
        return ""
    message = None
    if event.is_step_failure:
        error = event.step_failure_data.error
        user_failure = event.step_failure_data.user_failure_data
        if user_failure is not None:
            message = user_failure.description
    elif event.event_type == dg.DagsterEventType.RUN_FAILURE:
        error = event.job_failure_data.error
    else:
        return ""
    if error is None:
        return _lines_below(message or "no reason was given")
    if message is None:
        message = _root_message(error)
    return _lines_below(message, keep_trace(logs, error.to_string()))


def _lines_below(*lines: str) -> str:
    """Lines to follow a line; empty ones are left out."""
    return "".join(f"\n{line}" for line in lines if line)


def _root_message(error: Any) -> str:
    """The first line of what caused an error."""
    while error.cause is not None:
        error = error.cause
    return first_line(str(error.message))
