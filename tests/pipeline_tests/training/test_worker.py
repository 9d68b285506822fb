import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.models.meta_model import decode_booster, group_ids
from pipeline.models.pack import build_model_spec
from pipeline.models.start import Start
from pipeline.tables import HOLDOUT
from pipeline.testing.data import group_rows, small_spec
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import NO_START, TrainingSettings, train_group
from pipeline.training.worker import (
    OUTCOME_SCHEMA,
    TaskWorker,
    TrainGroup,
    rows_in_pandas,
    train_one,
)


@pytest.fixture
def placed(rows: pd.DataFrame) -> pd.DataFrame:
    return group_rows(rows, city="oslo").assign(grain=2, group_id='["north","oslo"]', task=7)


def failing(error: BaseException) -> Any:
    def train(frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start) -> Outcome:
        raise error

    return train


KEY = (2, '["north","oslo"]')


def run_group(
    frame: pd.DataFrame,
    settings: TrainingSettings,
    train: TrainGroup = train_group,
    starts: Mapping[tuple[int, str], str] | None = None,
) -> pa.Table:
    with closing(TaskWorker(settings, starts or {}, train)) as worker:
        return worker.train(frame)


def only_row(found: pa.Table) -> dict[str, Any]:
    assert found.schema.names == OUTCOME_SCHEMA.names
    assert found.schema.types == OUTCOME_SCHEMA.types
    [row] = found.to_pylist()
    return dict(row)


def test_a_trained_group_is_one_row_with_its_booster(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    row = only_row(run_group(placed, fleet_settings))
    expected = train_group(placed, 2, fleet_settings)
    assert expected.booster is not None
    assert (row["grain"], row["group_id"]) == (2, '["north","oslo"]')
    assert row["booster_id"] == expected.booster.booster_id
    assert decode_booster(row, "here").startswith("tree\n")
    ledger = json.loads(row["ledger"])
    assert (ledger["status"], ledger["reason"], ledger["task"]) == ("trained", None, 7)
    assert ledger["n_rounds"] == expected.ledger["n_rounds"]


def test_holdout_rows_travel_as_a_stream_and_come_back(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    row = only_row(run_group(placed, fleet_settings))
    table = pa.ipc.open_stream(row["holdout"]).read_all()
    assert table.schema.names == [
        name for name in HOLDOUT.schema.names if name not in ("run_id", "wave")
    ]
    found, sent = table.to_pandas(), train_group(placed, 2, fleet_settings).holdout
    assert sent is not None
    assert set(found["grain"]) == {2}
    assert set(found["group_id"]) == {'["north","oslo"]'}
    plain = ["row_key", "split", "actual", "offset", "scale", "weight", "prediction"]
    pd.testing.assert_frame_equal(found[plain], sent[plain])
    assert found["time"].dt.tz_localize(None).tolist() == sent["time"].tolist()
    assert found["group_ids"].map(list).tolist() == sent["group_ids"].map(list).tolist()


@pytest.mark.parametrize(
    "error", [ValueError("price is odd"), MemoryError("no room"), KeyError("price"), RuntimeError()]
)
def test_an_exception_is_the_groups_outcome(
    placed: pd.DataFrame, fleet_settings: TrainingSettings, error: Exception
) -> None:
    row = only_row(run_group(placed, fleet_settings, failing(error)))
    ledger = json.loads(row["ledger"])
    assert (ledger["status"], ledger["reason"], ledger["task"]) == ("failed", "error", 7)
    assert ledger["error_class"] == type(error).__name__
    assert ledger["error_message"].startswith(f"{error} (train, line ")
    assert (row["grain"], row["group_id"]) == (2, '["north","oslo"]')
    assert all(
        pd.isna(row[name]) for name in ("booster_id", "sha256", "n_bytes", "text", "holdout")
    )


def test_a_damaged_column_is_the_groups_outcome(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    ledger = json.loads(only_row(run_group(placed.drop(columns="sales"), fleet_settings))["ledger"])
    assert (ledger["status"], ledger["error_class"]) == ("failed", "KeyError")
    assert "sales" in ledger["error_message"]


def test_a_long_message_is_cut(placed: pd.DataFrame, fleet_settings: TrainingSettings) -> None:
    ledger = json.loads(
        only_row(run_group(placed, fleet_settings, failing(ValueError("x" * 10**6))))["ledger"]
    )
    assert len(ledger["error_message"]) == 2000


def test_an_error_that_cannot_even_be_printed_is_the_groups_outcome(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    ledger = json.loads(
        only_row(run_group(placed, fleet_settings, failing(Unprintable())))["ledger"]
    )
    assert (ledger["status"], ledger["error_class"]) == ("failed", "Unprintable")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_whoever_stops_the_process_is_not_held_back(
    placed: pd.DataFrame, fleet_settings: TrainingSettings, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        train_one(placed, 2, fleet_settings, NO_START, failing(error))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_a_group_that_stops_its_process_stops_only_its_own(
    placed: pd.DataFrame, fleet_settings: TrainingSettings, error: BaseException
) -> None:
    ledger = json.loads(only_row(run_group(placed, fleet_settings, failing(error)))["ledger"])
    assert (ledger["status"], ledger["reason"], ledger["task"]) == ("crashed", "native_crash", 7)


def test_rows_of_a_failed_pooled_group_are_judged_all_the_same(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    row = only_row(
        run_group(
            rows.assign(grain=0, group_id="[]", task=0), fleet_settings, failing(ValueError("x"))
        )
    )
    judged = pa.ipc.open_stream(row["holdout"]).read_all()
    assert judged.num_rows > 0
    assert judged["prediction"].null_count == judged.num_rows


def test_a_pooled_group_that_cannot_be_judged_either_reports_its_first_error(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    frame = rows.drop(columns="sales").assign(grain=0, group_id="[]", task=0)
    row = only_row(run_group(frame, fleet_settings, failing(ValueError("the first"))))
    assert json.loads(row["ledger"])["error_message"].startswith("the first")
    assert row["holdout"] is None


def test_an_inherited_group_is_one_row_without_a_booster(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    row = only_row(run_group(placed.assign(sales=1.0), fleet_settings))
    assert json.loads(row["ledger"])["reason"] == "constant_target"
    assert row["text"] is None
    assert row["holdout"] is None


def test_a_group_begins_as_the_run_has_pinned_it(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    start = Start(refit={"learning_rate": 0.1, "num_leaves": 3}, n_rounds=9)
    ledger = json.loads(
        only_row(run_group(placed, fleet_settings, starts={KEY: start.to_json(), (2, "[]"): "{}"}))[
            "ledger"
        ]
    )
    assert (ledger["status"], ledger["n_rounds"], json.loads(ledger["parameters"])) == (
        "refreshed",
        9,
        start.refit,
    )


def harmful(frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start) -> Outcome:
    """Does what the group's first price says."""
    if (price := frame["price"].iloc[0]) < 0:
        os.kill(os.getpid(), -int(price))
    if price == 0:
        time.sleep(60)
    return train_group(frame, grain, settings, start)


@pytest.fixture
def worker(fleet_settings: TrainingSettings) -> Iterator[TaskWorker]:
    tuning = fleet_settings.tuning.model_copy(update={"kill_after_seconds": 5.0})
    with closing(
        TaskWorker(TrainingSettings(**{**vars(fleet_settings), "tuning": tuning}), {}, harmful)
    ) as worker:
        yield worker


@pytest.mark.parametrize(
    ("price", "status", "reason"),
    [(-signal.SIGKILL, "crashed", "native_crash"), (0, "failed", "timeout")],
)
def test_a_group_that_dies_or_hangs_is_one_row_and_others_are_trained(
    worker: TaskWorker, placed: pd.DataFrame, price: int, status: str, reason: str
) -> None:
    bad = only_row(worker.train(placed.assign(price=float(price))))
    ledger = json.loads(bad["ledger"])
    assert (ledger["status"], ledger["reason"], ledger["task"]) == (status, reason, 7)
    assert (bad["grain"], bad["group_id"], bad["text"], bad["holdout"]) == (*KEY, None, None)
    for _ in range(2):
        assert json.loads(only_row(worker.train(placed))["ledger"])["status"] == "trained"


def test_rows_of_a_crashed_pooled_group_are_judged_all_the_same(
    worker: TaskWorker, rows: pd.DataFrame
) -> None:
    frame = rows.assign(grain=0, group_id="[]", task=0, price=-float(signal.SIGKILL))
    row = only_row(worker.train(frame))
    assert json.loads(row["ledger"])["status"] == "crashed"
    judged = pa.ipc.open_stream(row["holdout"]).read_all()
    assert judged.num_rows > 0
    assert judged["prediction"].null_count == judged.num_rows


def test_a_message_that_is_no_text_for_a_file_is_told(
    placed: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    ledger = json.loads(
        only_row(run_group(placed, fleet_settings, failing(ValueError("\ud800 \x00 🐟"))))["ledger"]
    )
    assert (ledger["status"], ledger["error_class"]) == ("failed", "ValueError")
    assert "🐟" in ledger["error_message"]


def test_integers_beside_nulls_keep_every_digit() -> None:
    large = [2**53 + 1, None, 2**53 + 3]
    whole = pa.array(large, pa.int64())
    table = pa.table({"store": whole, "brand": whole, "label": whole, "size": whole})
    spec = small_spec(
        task="binary",
        grains=[[], ["store"]],
        entity=["store"],
        target={"column": "label", "classes": ["1", "2"]},
        features={"columns": ["size"], "calendar": [], "categoricals": ["brand"]},
        baselines=None,
    )
    model = build_model_spec(spec, {"brand": []}, ["1", "2"])
    found = rows_in_pandas(table, model)
    texts = [None if number is None else str(number) for number in large]
    for name in ("store", "brand", "label"):
        assert found[name].tolist() == texts
    assert group_ids(found, ["store"]).tolist() == [
        '["9007199254740993"]',
        "[null]",
        '["9007199254740995"]',
    ]
    # A feature is a number to LightGBM, and stays one.
    assert found["size"].dtype == float
    without_nulls = rows_in_pandas(table.slice(0, 1), model)
    assert without_nulls["store"].tolist() == [2**53 + 1]
