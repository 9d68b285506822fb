"""A console logger for people: the time and the message, without run ids and event names."""

import logging
import sys
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
        meta = getattr(record, "dagster_meta", None) or {}
        text = meta.get("orig_message") or record.getMessage()
        step = (meta.get("step_key") or "").rsplit("__", 1)[-1]
        lead = f"{self.formatTime(record, '%H:%M:%S')} {step:<12} "
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        return lead + level + str(text) + _cause(_event(record), self._logs)


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
        handler.addFilter(_is_for_people)
        logger.addHandler(handler)
        return logger

    return console


def _event(record: logging.LogRecord) -> dg.DagsterEvent | None:
    meta = getattr(record, "dagster_meta", None) or {}
    event: dg.DagsterEvent | None = meta.get("dagster_event")
    return event


# What Dagster says of every later step: after a failed one, and after a dry run, as if that were a
# fault.
_OF_LATER_STEPS = (
    "Dependencies for step",
    " due to skipped dependencies:",
    " emitted no result in step ",
)


def _is_for_people(record: logging.LogRecord) -> bool:
    """Whether a person wants to see it: what we say, and where something went wrong."""
    event = _event(record)
    meta = getattr(record, "dagster_meta", None) or {}
    text = str(meta.get("orig_message") or record.getMessage())
    if event is None:
        return not any(part in text for part in _OF_LATER_STEPS)
    if event.is_step_failure:
        # Who ended it knows; the step says itself what is kept.
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
    """What a failed step, or a run that failed before its steps, says of itself."""
    if event is None:
        return ""
    if event.is_step_failure:
        failure = event.step_failure_data
        message = failure.user_failure_data.description if failure.user_failure_data else None
        error = failure.error
    elif event.event_type == dg.DagsterEventType.RUN_FAILURE:
        message, error = None, event.job_failure_data.error
    else:
        return ""
    if message is None:
        message = _root_message(error) if error else "no reason was given"
    trace = keep_trace(logs, error.to_string()) if error else ""
    return "\n".join(["", message, *([trace] if trace else [])])


def _root_message(error: Any) -> str:
    """The first line of what caused an error."""
    while error.cause is not None:
        error = error.cause
    return first_line(str(error.message))
