"""The only function that Spark runs to train: one group's rows in, one row out."""

import json
import pickle
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.models.meta_model import GroupKey, ModelSpec
from pipeline.models.start import Start
from pipeline.tables import HOLDOUT
from pipeline.training.isolation import GroupProcess
from pipeline.training.outcome import ERROR, Outcome
from pipeline.training.trainer import (
    NO_START,
    POOLED,
    TrainingSettings,
    judged_without_model,
    train_group,
)

OUTCOME_SCHEMA: Any = pa.schema(
    [
        ("grain", pa.int32()),
        ("group_id", pa.string()),
        ("ledger", pa.string()),
        ("booster_id", pa.string()),
        ("sha256", pa.string()),
        ("n_bytes", pa.int64()),
        ("text", pa.binary()),
        ("holdout", pa.binary()),
    ]
)
_MESSAGE_LENGTH = 2000
# Status of a group that a worker did not start; it is trained by a later wave, and has no ledger
# row yet.
NOT_STARTED = "not_started"

TrainGroup = Callable[[pd.DataFrame, int, TrainingSettings, Start], Outcome]


class TaskWorker:
    """Trains the groups of one Spark task, each in a child process.

    Args:
        settings: the run's.
        starts: how each group begins, as JSON (see `Start`), by group; those absent have nothing to
            start from.
        train: what trains; another function only in tests.
        memory_bytes: memory a group may take beyond what the process has at its start; None is
            unlimited.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        starts: Mapping[GroupKey, str],
        train: TrainGroup = train_group,
        memory_bytes: int | None = None,
    ) -> None:
        self._settings = settings
        self._starts = starts
        self._train = train
        self._process = GroupProcess(
            self._answer,
            limit_seconds=settings.tuning.kill_after_seconds,
            memory_bytes=memory_bytes,
        )

    def train(self, rows: pd.DataFrame) -> pa.Table:
        """Train one group; never raises for what the group does.

        Args:
            rows: the group's rows, with grain, group_id and task beside the features.

        Returns:
            One row of OUTCOME_SCHEMA; the ledger part as JSON, the holdout part as an Arrow stream.
        """
        key = _key_of(rows)
        task = int(rows["task"].iloc[0])
        # As they lie in memory: nothing is converted once more on the way to the child.
        answer = self._process.run(pickle.dumps(rows, protocol=pickle.HIGHEST_PROTOCOL))
        if isinstance(answer, Outcome):
            holdout = _judge_without_model(rows, key.grain, self._settings)
            answer = stream_of(_outcome_table(replace(answer, holdout=holdout), key))
        outcome = pa.ipc.open_stream(answer).read_all()
        ledger = {"task": task, **json.loads(outcome["ledger"][0].as_py())}
        return outcome.set_column(2, "ledger", pa.array([json.dumps(ledger)]))

    def close(self) -> None:
        """End the child process."""
        self._process.close()

    def _answer(self, message: bytes) -> bytes:
        frame: pd.DataFrame = pickle.loads(message)  # noqa: S301 - from our own parent
        key = _key_of(frame)
        start = Start.from_json(self._starts.get(key, "{}"))
        outcome = train_one(frame, key.grain, self._settings, start, self._train)
        return stream_of(_outcome_table(outcome, key))


def not_started(rows: pd.DataFrame) -> pa.Table:
    """One row of OUTCOME_SCHEMA for a group that is left to a later wave."""
    row = {**_key_of(rows)._asdict(), "ledger": json.dumps({"status": NOT_STARTED})}
    return pa.Table.from_pylist([row], schema=OUTCOME_SCHEMA)


def _key_of(rows: pd.DataFrame) -> GroupKey:
    return GroupKey(int(rows["grain"].iloc[0]), str(rows["group_id"].iloc[0]))


def train_one(
    frame: pd.DataFrame,
    grain: int,
    settings: TrainingSettings,
    start: Start = NO_START,
    train: TrainGroup = train_group,
) -> Outcome:
    """Train one group and never raise: an exception is the group's outcome."""
    try:
        return train(frame, grain, settings, start)
    except Exception as error:  # noqa: BLE001 - whatever a group does to us is that group's ledger row
        origin = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{_text_of(error)} ({origin.name}, line {origin.lineno})"[:_MESSAGE_LENGTH]
        ledger = {"error_class": type(error).__name__, "error_message": message}
        holdout = _judge_without_model(frame, grain, settings)
        return Outcome("failed", ERROR, ledger, None, holdout)


def named_columns(model_spec: ModelSpec) -> frozenset[str]:
    """Columns whose values are names to the model: keys, categories and classes."""
    if not model_spec.classes:
        return model_spec.text_columns
    return model_spec.text_columns | {model_spec.target.column}


def rows_in_pandas(table: pa.Table, model_spec: ModelSpec) -> pd.DataFrame:
    """The rows in pandas: times in UTC without a zone; keys, categories and classes as text.

    In pandas an integer beside nulls becomes a float, which above 2^53 is another integer.
    """
    named = named_columns(model_spec)
    for position, field in enumerate(table.schema):
        column = table.column(position)
        if pa.types.is_timestamp(field.type) and field.type.tz:
            column = column.cast(pa.timestamp("us"))
        elif field.name in named and pa.types.is_integer(field.type) and column.null_count:
            column = column.cast(pa.string())
        else:
            continue
        table = table.set_column(position, field.name, column)
    frame: pd.DataFrame = table.replace_schema_metadata().to_pandas()
    return frame


def _outcome_table(outcome: Outcome, key: GroupKey) -> pa.Table:
    """The outcome as one row of OUTCOME_SCHEMA; without a booster its columns are null."""
    ledger = {"status": outcome.status, "reason": outcome.reason, **outcome.ledger}
    row = {
        **key._asdict(),
        "ledger": json.dumps(ledger),
        "holdout": _holdout_stream(outcome.holdout, key),
    }
    if outcome.booster is not None:
        row.update(asdict(outcome.booster))
    return pa.Table.from_pylist([row], schema=OUTCOME_SCHEMA)


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a message may itself be broken
        return "its message cannot be printed"


def _judge_without_model(
    frame: pd.DataFrame, grain: int, settings: TrainingSettings
) -> pd.DataFrame | None:
    """Holdout rows of a pooled group that was not trained; None for any other group."""
    if grain != POOLED:
        return None
    try:
        return judged_without_model(frame, settings)
    except Exception:  # noqa: BLE001 - the first error is the one to report
        return None


def _holdout_stream(holdout: pd.DataFrame | None, key: GroupKey) -> bytes | None:
    if holdout is None or holdout.empty:
        return None
    rows = holdout.assign(grain=key.grain, group_id=key.group_id)
    return stream_of(pa.Table.from_pandas(rows, schema=_HOLDOUT, preserve_index=False))


def stream_of(table: pa.Table) -> bytes:
    """The table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


# The run and the wave are added where the rows are written.
_HOLDOUT: Any = pa.schema(
    [field for field in HOLDOUT.schema if field.name not in ("run_id", "wave")]
)
