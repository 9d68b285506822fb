"""A console logger for people: the time and the message, without run ids and event names."""

import logging
import sys

import dagster as dg


class _Message(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta = getattr(record, "dagster_meta", None) or {}
        text = meta.get("orig_message") or record.getMessage()
        step = (meta.get("step_key") or "").rsplit("__", 1)[-1]
        lead = f"{self.formatTime(record, '%H:%M:%S')} {step:<12} "
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        return lead + level + str(text) + _cause(meta.get("dagster_event"))


def _cause(event: dg.DagsterEvent | None) -> str:
    """What a failed step says of itself."""
    if event is None or not event.is_step_failure:
        return ""
    failure = event.step_failure_data
    told = failure.user_failure_data.description if failure.user_failure_data else None
    return f"\n{told or (failure.error.to_string() if failure.error else '')}"


def _is_for_people(record: logging.LogRecord) -> bool:
    """Whether a person wants to see it: what we say, and where something went wrong.

    After a dry run Dagster says of every later asset that it is skipped, and of its checks that they are missing, as if that
    were a fault.
    """
    meta = getattr(record, "dagster_meta", None) or {}
    text = str(meta.get("orig_message") or record.getMessage())
    if " due to skipped dependencies:" in text or " emitted no result in step " in text:
        return False
    return record.levelno >= logging.WARNING or not meta.get("dagster_event")


@dg.logger(config_schema={}, description="Time, asset and message: what a person wants to see of a run.")
def console_logger(context: dg.InitLoggerContext) -> logging.Logger:  # noqa: ARG001
    """Messages of our own at INFO and above; Dagster's events only where something went wrong."""
    logger = logging.Logger("many-models", level=logging.INFO)  # noqa: LOG001 - one per run, like Dagster's own; a shared one would add a handler a run
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Message())
    handler.addFilter(_is_for_people)
    logger.addHandler(handler)
    return logger
