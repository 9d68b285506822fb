"""Columns of every kind reach the trainer as they are: Spark and pandas train the same boosters."""

import datetime as dt
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.models.start import Start
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.runs.wave import TrainedFiles, Wave
from pipeline.spark.execution import without_adaptive_execution
from pipeline.spark.keys import group_id_column
from pipeline.spark.planning import plan_run
from pipeline.spark.progress import Progress
from pipeline.spark.rows import is_learnt_from
from pipeline.spark.training import placed_rows, train_wave
from pipeline.spec import FleetSpec, parse_spec
from pipeline.tables import LEDGER, RUNS
from pipeline.testing.runs import own_tables, quiet_context
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import TrainingSettings, train_group
from pipeline.training.worker import TrainGroup, named_columns, rows_in_pandas
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark

KEYS = ["shop", "open", "since", "brand"]
CATEGORICALS = [
    "c_text",
    "c_long",
    "c_double",
    "c_decimal",
    "c_bool",
    "c_date",
    "c_moment",
    "c_local",
]
NUMBERS = ["shop", "x_double", "x_float", "x_int", "x_long", "x_large", "x_decimal", "x_bool"]
LARGE = 2**53
N_ROWS = 900
# Clocks in New York skip an hour within the first half, and repeat one within the second.
STARTS = ["2024-03-01 00:00:00.000001", "2024-11-01 00:00:00.000001"]


def spec_of(**target: Any) -> FleetSpec:
    spec: dict[str, Any] = {
        "name": "kinds",
        "sources": [{"name": "rows", "uri": "rows.csv"}],
        "features": {"columns": NUMBERS, "categoricals": CATEGORICALS},
        "grains": [[], ["shop"], KEYS],
        "entity": KEYS,
        "time": "time",
        "splits": {"report": "2 days", "tune": "3 days"},
        "tuning": {
            "max_trials": 2,
            "patience": 1,
            "max_rounds": 10,
            "fit_rows": 30,
            "tune_rows": 4,
            "seed": 3,
        },
        **target,
    }
    return parse_spec(spec, file="kinds/defs.yaml")


SPECS = {
    "regression": spec_of(target={"column": "y", "weight": "w", "offset": "x_decimal"}),
    "multiclass": spec_of(target={"column": "label"}, task="multiclass"),
}


def table_of_all_kinds() -> pa.Table:
    random = np.random.default_rng(11)

    def some(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([values[place] for place in random.integers(0, len(values), N_ROWS)], kind)

    moments = [
        None,
        *(
            pd.Timestamp(text).to_pydatetime()
            for text in ("2024-03-10 07:00:00.000123", "2024-11-03 05:30:00.5", "1960-02-29")
        ),
    ]
    # Rows are an hour and a few microseconds apart; the last days are tuned and reported on.
    steps = np.arange(N_ROWS // 2) * pd.Timedelta("61min 7us").value // 1000
    micros = np.concatenate(
        [pd.Timestamp(start).as_unit("us").asm8.astype("int64") + steps for start in STARTS]
    )
    x_double = random.normal(size=N_ROWS)
    x_int = random.integers(-5, 5, N_ROWS)
    shops = [LARGE + 1, None, LARGE + 3]
    shop = random.integers(0, 3, N_ROWS)
    y = x_double + 0.3 * x_int + 0.5 * shop + 0.1 * random.normal(size=N_ROWS)
    holes = random.random((5, N_ROWS)) < 0.1
    zoned = pa.timestamp("us", "UTC")
    return pa.table(
        {
            "shop": pa.array([shops[place] for place in shop], pa.int64()),
            "open": pa.array([[True, None, False][place] for place in shop], pa.bool_()),
            "since": pa.array(
                [[dt.date(1, 1, 1), dt.date(2024, 2, 29), None][place] for place in shop],
                pa.date32(),
            ),
            "brand": some(["é", None], pa.string()),
            "c_text": some(["1.0", "", "é", None], pa.string()),
            "c_long": some([LARGE + 1, -LARGE - 3, 7, None], pa.int64()),
            "c_double": some([1.0, 1.5, float("nan"), None], pa.float64()),
            "c_decimal": some(
                [Decimal("1.00"), Decimal("12345678901234567890.5"), None], pa.decimal128(38, 10)
            ),
            "c_bool": some([True, False, None], pa.bool_()),
            "c_date": some([dt.date(1, 1, 1), dt.date(2024, 2, 29), None], pa.date32()),
            "c_moment": some([*moments, dt.datetime(9999, 12, 31, 23, 59, 59, 999999)], zoned),  # noqa: DTZ001 - in UTC, as Arrow takes it
            "c_local": some(moments, pa.timestamp("us")),
            "x_double": pa.array(
                [
                    None if hole else value
                    for hole, value in zip(
                        holes[0], np.where(holes[1], np.nan, x_double), strict=True
                    )
                ]
            ),
            "x_float": pa.array(np.where(holes[2], np.nan, x_double).astype(np.float32)),
            "x_int": pa.array(
                [None if hole else int(value) for hole, value in zip(holes[3], x_int, strict=True)],
                pa.int32(),
            ),
            "x_long": pa.array(
                [
                    None if hole else LARGE + int(value)
                    for hole, value in zip(holes[4], x_int, strict=True)
                ],
                pa.int64(),
            ),
            "x_large": pa.array(LARGE + x_int * 2**33 + 1, pa.int64()),
            "x_decimal": some(
                [Decimal("0.10"), Decimal("-1.25"), Decimal("0.3")], pa.decimal128(10, 2)
            ),
            "x_bool": some([True, False, None], pa.bool_()),
            "y": pa.array(
                [
                    None if place % 50 == 0 else float("nan") if place % 50 == 1 else value
                    for place, value in enumerate(y)
                ]
            ),
            "w": some([1, 2, 1, 2, None], pa.int32()),
            "label": pa.array(
                [
                    None if place % 50 == 0 else LARGE + 1 + 2 * int(value > 0.5)
                    for place, value in enumerate(y)
                ],
                pa.int64(),
            ),
            "time": pa.array(micros, pa.int64()).cast(zoned),
            "known_at": pa.array(micros + 1, pa.int64()).cast(zoned),
            "row_key": pa.array([f"{number:05d}" for number in random.permutation(N_ROWS)]),
            "is_future": pa.array([False] * N_ROWS),
        }
    )


@pytest.fixture(scope="module")
def features(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(table_of_all_kinds()).repartition(3)


@pytest.fixture(scope="module", params=sorted(SPECS))
def spec(request: pytest.FixtureRequest) -> FleetSpec:
    return SPECS[request.param]


@pytest.fixture(scope="module")
def run(features: DataFrame, spec: FleetSpec) -> PlannedRun:
    no_history = History(
        RUNS.schema.empty_table().to_pandas(), lambda _: LEDGER.schema.empty_table().to_pandas()
    )
    return plan_run(
        quiet_context(features.sparkSession), features, spec, Request(run_id="run-1"), no_history
    )


@pytest.fixture(scope="module")
def groups(run: PlannedRun, spec: FleetSpec) -> dict[tuple[int, str], pa.Table]:
    """The rows that each group learns from, in Arrow."""
    found: dict[tuple[int, str], pa.Table] = {}
    for grain, keys in enumerate(spec.grains):
        rows = (
            run.rows.where(is_learnt_from(spec))
            .withColumn("_group", group_id_column(keys))
            .toArrow()
        )
        for group in rows["_group"].unique().to_pylist():
            found[grain, group] = rows.filter(pc.equal(rows["_group"], group)).drop_columns(
                ["_group"]
            )
    return found


def trained(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    tables: DeltaTables,
    train: TrainGroup = train_group,
) -> TrainedFiles:
    groups = run.plan.to_train.assign(task=np.arange(len(run.plan.to_train)) % 3)
    # A worker of Spark knows a wave's settings by its name.
    name = f"kinds-{uuid.uuid4().hex}"
    with without_adaptive_execution(spark):
        placed = placed_rows(spark, run.rows, spec, groups)
        context = quiet_context(spark, train=train or train_group)
        progress = Progress(spark, lambda *_: None)
        wave = Wave(name, groups)
        return train_wave(
            context, own_tables(tables, "kinds"), placed, wave, run.settings, progress
        )


def stored(tables: DeltaTables, files: Sequence[Any], table: str) -> pd.DataFrame:
    root = Path(tables.location("kinds", table))
    return pa.concat_tables(
        [pq.read_table(root / file.path, partitioning=None) for file in files]
    ).to_pandas()


def test_spark_trains_on_every_kind_of_column_what_pandas_trains(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    groups: dict[tuple[int, str], pa.Table],
    tmp_path: Path,
) -> None:
    tables = DeltaTables(root=str(tmp_path))
    files = trained(spark, run, spec, tables)
    holdout = stored(tables, files.holdout, "holdout")
    outcomes = {(outcome["grain"], outcome["group_id"]): outcome for outcome in files.outcomes}
    assert set(outcomes) == set(groups)
    n_boosters = 0
    for (grain, group), rows in groups.items():
        expected = train_group(rows_in_pandas(rows, run.settings.model_spec), grain, run.settings)
        outcome = outcomes[grain, group]
        assert (outcome["status"], outcome["reason"]) == (expected.status, expected.reason), outcome
        for name in (
            "n_fit",
            "n_tune",
            "n_report",
            "n_invalid",
            "booster_id",
            "n_rounds",
            "parameters",
            "tune_loss",
        ):
            assert outcome.get(name) == expected.ledger.get(name), (grain, group, name)
        n_boosters += expected.booster is not None
        found = holdout[(holdout["grain"] == grain) & (holdout["group_id"] == group)]
        if expected.holdout is None:
            assert not len(found)
            continue
        by = ["row_key", "class_name"]
        found, wanted = (
            part.sort_values(by, ignore_index=True) for part in (found, expected.holdout)
        )
        assert found["row_key"].tolist() == wanted["row_key"].tolist()
        assert found["time"].dt.tz_localize(None).tolist() == wanted["time"].tolist()
        assert [list(ids) for ids in found["group_ids"]] == [
            list(ids) for ids in wanted["group_ids"]
        ]
        for name in ("actual", "offset", "scale", "weight", "prediction"):
            np.testing.assert_array_equal(found[name].to_numpy(float), wanted[name].to_numpy(float))
    assert n_boosters == len(groups) == 10


def test_trainers_are_given_the_values_that_arrow_holds(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    groups: dict[tuple[int, str], pa.Table],
    tmp_path: Path,
) -> None:
    def keep(frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start) -> Outcome:
        frame.to_pickle(tmp_path / f"{grain}-{frame['row_key'].min()}.pickle")
        return Outcome("inherited", "looked", {})

    model = run.settings.model_spec
    trained(spark, run, spec, DeltaTables(root=str(tmp_path)), keep)
    for (grain, _), rows in groups.items():
        path = tmp_path / f"{grain}-{pc.min(rows['row_key'])}.pickle"
        found = pd.read_pickle(path)  # noqa: S301 - written above
        found = found.sort_values("row_key", ignore_index=True)
        wanted = rows_in_pandas(rows.sort_by("row_key"), model)
        needed = [*KEYS, *CATEGORICALS, *NUMBERS, spec.target.column, "time", "known_at", "row_key"]
        for name in dict.fromkeys(needed):
            is_text = name in named_columns(model) and wanted[name].dtype == np.int64
            pd.testing.assert_series_equal(
                found[name], wanted[name].astype(str) if is_text else wanted[name]
            )
            # Of objects, the check above says only that both are missing: not whether null or NaN.
            assert is_text or [type(value) for value in found[name]] == [
                type(value) for value in wanted[name]
            ]


def test_no_clock_of_the_machine_moves_a_row(tmp_path: Path) -> None:
    """In a process of its own: Java and Python read the zone as they start."""
    chosen = f"{__file__}::{test_trainers_are_given_the_values_that_arrow_holds.__name__}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'tests'}",
        chosen,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "TZ": "America/New_York"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "2 passed" in done.stdout
