"""The only body that Spark runs to train: one group's rows in, one row out, whatever happens to the group."""

import json
import traceback
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.tables import HOLDOUT
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import POOLED, TrainingSettings, judged_without_model, train_group

OUTCOME_COLUMNS = "grain int, group_id string, ledger string, booster_id string, sha256 string, n_bytes long, text binary, holdout binary"
_MESSAGE_LENGTH = 2000

TrainGroup = Callable[[pd.DataFrame, int, TrainingSettings], Outcome]


def run_group(frame: pd.DataFrame, settings: TrainingSettings, train: TrainGroup = train_group) -> pd.DataFrame:
    """Train one group and never raise: an exception is the group's outcome.

    Args:
        frame: the group's rows, with grain, group_id and task beside the features.
        settings: the run's.
        train: what trains; another function only in tests.

    Returns:
        One row of OUTCOME_COLUMNS; the ledger part as JSON, the holdout part as an Arrow stream.
    """
    grain, group, task = int(frame["grain"].iloc[0]), str(frame["group_id"].iloc[0]), int(frame["task"].iloc[0])
    try:
        outcome = train(frame, grain, settings)
    except Exception as error:  # noqa: BLE001 - whatever a group does to us is that group's ledger row
        origin = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{_text_of(error)} ({origin.name}, line {origin.lineno})"[:_MESSAGE_LENGTH]
        holdout = _judged_anyway(frame, settings) if grain == POOLED else None
        outcome = Outcome("failed", "error", {"error_class": type(error).__name__, "error_message": message}, None, holdout)
    booster = outcome.booster
    return pd.DataFrame(
        {
            "grain": [grain],
            "group_id": [group],
            "ledger": [json.dumps({"task": task, "status": outcome.status, "reason": outcome.reason, **outcome.ledger})],
            "booster_id": [booster.booster_id if booster else None],
            "sha256": [booster.sha256 if booster else None],
            "n_bytes": pd.array([booster.n_bytes if booster else None], dtype="Int64"),
            "text": [booster.text if booster else None],
            "holdout": [_holdout_stream(outcome.holdout, settings.run_id, grain, group)],
        }
    )


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a message may itself be broken
        return "its message cannot be printed"


def _judged_anyway(frame: pd.DataFrame, settings: TrainingSettings) -> pd.DataFrame | None:
    try:
        return judged_without_model(frame, settings)
    except Exception:  # noqa: BLE001 - the first error is the one to report
        return None


def _holdout_stream(holdout: pd.DataFrame | None, run_id: str, grain: int, group: str) -> bytes | None:
    if holdout is None or not len(holdout):
        return None
    table = pa.Table.from_pandas(holdout.assign(run_id=run_id, grain=grain, group_id=group), schema=_NAIVE_HOLDOUT, preserve_index=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _NAIVE_HOLDOUT, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


# Spark hands times to pandas without a zone (the session's is UTC); the zone comes back when the rows are written.
_NAIVE_HOLDOUT: Any = pa.schema([pa.field(f.name, pa.timestamp("us") if pa.types.is_timestamp(f.type) else f.type) for f in HOLDOUT.schema])
