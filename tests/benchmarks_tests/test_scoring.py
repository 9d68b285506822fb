"""The scoring figures in small: every rival answers the rows that ours answers, and as it should."""

import time
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from benchmarks.rivals import load_everywhere, usual_scoring
from benchmarks.runs import NotMeasured
from benchmarks.scoring import (
    SPEC,
    Case,
    boosters_of,
    check_equal,
    log_recipe,
    our_answers,
    plain_processes,
    rates,
    udf_answers,
    write_case,
)
from benchmarks.serving import generated_pack, registered
from pipeline.models.meta_model import FleetModel, group_id

pytestmark = [
    pytest.mark.spark,
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*Any type hint is inferred as AnyType"
    ),  # mlflow 3.17: of its own classes, when they are imported
]

GROUPS, ROWS = 4, 30


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("scoring")
    return write_case(folder, generated_pack(folder / "pack", GROUPS), GROUPS, ROWS)


@pytest.fixture(scope="module")
def ours(spark: SparkSession, case: Case) -> pd.DataFrame:
    return our_answers(case.read(spark), case.pack).toPandas()


def test_ours_are_the_packs_answers_and_plain_lightgbm_gives_the_same(
    case: Case, ours: pd.DataFrame
) -> None:
    frame = case.frame()
    direct = FleetModel(case.pack).predict(frame).set_index(frame["row_key"])
    assert ours.set_index("row_key")["prediction"].to_dict() == direct["prediction"].to_dict()
    with plain_processes(case) as plain:
        answers = plain()
    check_equal(ours, case, answers)
    with pytest.raises(NotMeasured, match="1 of 120 answers differ"):
        check_equal(ours, case, np.append(answers[:-1], 0.0))


def test_the_recipe_answers_with_the_finest_models_whether_it_keeps_them_or_not(
    spark: SparkSession, case: Case, tmp_path: Path
) -> None:
    logged = log_recipe(case, tmp_path)
    rows, frame, stored = case.read(spark), case.frame(), boosters_of(case.pack)
    expected = {}
    for values, part in frame.groupby(list(SPEC.finest)):
        own = lgb.Booster(model_str=stored[2, group_id(values)][2])
        expected |= dict(
            zip(part["row_key"], own.predict(part[list(SPEC.feature_columns)]), strict=True)
        )
    load_everywhere(spark, case.groups, logged, 2)
    for keeps in (False, True):
        found = usual_scoring(
            rows, SPEC.finest, SPEC.feature_columns, logged, keeps=keeps
        ).toPandas()
        assert found.set_index("row_key")["prediction"].to_dict() == expected


def test_spark_udf_gives_our_answers(
    spark: SparkSession, case: Case, ours: pd.DataFrame, tmp_path: Path
) -> None:
    found = udf_answers(case.read(spark), *registered(case.pack, tmp_path)).toPandas()
    names = [
        "row_key",
        "prediction",
        "lower",
        "upper",
        "answered_by",
        "booster_id",
        "fleet_version",
    ]
    first, second = (
        frame[names].sort_values("row_key", ignore_index=True) for frame in (ours, found)
    )
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_sides_take_turns() -> None:
    runs: list[str] = []
    found = rates(
        {
            "quick": lambda: runs.append("quick"),
            "slow": lambda: runs.append("slow") or time.sleep(0.01),
        },
        10,
        warm=1,
        timed=3,
    )
    assert runs == ["quick", "slow"] * 4
    assert found["quick"] > found["slow"] > 0
