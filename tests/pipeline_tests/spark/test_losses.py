"""Ways to answer compared in the fleet's own loss: the means are those of the rows, and groups that lose are answered by another."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf

from pipeline.spark.blending import constant_column
from pipeline.spark.losses import (
    Paired,
    answer_losers_otherwise,
    compare_answers,
    in_target_units,
    row_loss,
)
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec
from pipeline.training.blend import Constants, GroupSkill

pytestmark = pytest.mark.spark

START = pd.Timestamp("2024-06-01")
N_DAYS = 48


def spec_of(**changes: Any) -> FleetSpec:
    return small_spec(grains=[[], ["city"]], entity=["city"], **changes)


def report_rows(predictions: dict[str, tuple[float, float]], seed: int = 1) -> pd.DataFrame:
    """One row per city and day, as `judged_rows` has them: an actual of about 0, and each grain's prediction, the city's last."""
    random = np.random.default_rng(seed)
    parts = []
    for city, (pooled, own) in predictions.items():
        times = pd.date_range(START, periods=N_DAYS, freq="D").as_unit("us")
        part = pd.DataFrame(
            {"time": times, "actual": random.normal(0, 0.3, N_DAYS), "p0": pooled, "p1": own}
        )
        part["group_ids"] = [["[]", f'["{city}"]']] * N_DAYS
        parts.append(part)
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(
        split="report", residual=rows["actual"], offset=0.0, scale=1.0, weight=1.0, class_name=None
    )


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> Any:
    return spark.createDataFrame(rows.astype({"class_name": "string"}))


def test_groups_that_lose_are_answered_by_their_parent_or_by_the_constant(
    spark: SparkSession,
) -> None:
    rows = report_rows(
        {
            "sound": (0.5, 0.0),
            "lost": (0.2, 3.0),
            "hopeless": (2.0, 3.0),
            "even": (0.5, 0.5),
            "thin": (0.2, 3.0),
        }
    )
    rows = rows[
        (rows["p0"] != 0.2)
        | (rows["time"] < "2024-06-29")
        | (rows["group_ids"].str[1] == '["lost"]')
    ]
    groups = [f'["{city}"]' for city in ("sound", "lost", "hopeless", "even", "thin")]
    skills = {(1, group): GroupSkill(1.0, 1.0, 1.0, 1.0, 0.8, 0.9, 0.7) for group in groups}
    skills[0, "[]"] = skills[1, groups[0]]
    constant = constant_column(Constants(0.6, 0.6), [])
    found = answer_losers_otherwise(
        in_spark(spark, rows), spec_of(), skills, [{"[]"}, set(groups)], constant, START
    )
    told = {group: (skill.weight, skill.answered_by) for (_, group), skill in found.items()}
    assert told == {
        # Over all rows the pooled model is worse than the constant; what leans on it is not.
        "[]": (1.0, None),
        '["sound"]': (1.0, None),
        '["lost"]': (0.0, "parent"),
        '["hopeless"]': (0.0, "constant"),
        '["even"]': (1.0, None),
        # 28 rows say nothing for sure.
        '["thin"]': (1.0, None),
    }
    assert (found[1, '["lost"]'].report_blend, found[1, '["hopeless"]'].report_blend) == (0.8, 0.7)


LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "l2": ({}, lambda y, a: (y - a) ** 2),
    "l1": ({"tuning": {"objective": "l1"}}, lambda y, a: np.abs(y - a)),
    "quantile": (
        {"tuning": {"objective": "quantile", "alpha": 0.9}},
        lambda y, a: np.where(y > a, 0.9 * (y - a), 0.1 * (a - y)),
    ),
    "huber": (
        {"tuning": {"objective": "huber", "alpha": 0.5}},
        lambda y, a: np.where(np.abs(y - a) <= 1.0, (y - a) ** 2 / 2, np.abs(y - a) - 0.5),
    ),
    "poisson": ({"tuning": {"objective": "poisson"}}, lambda y, a: 2 * (y * np.log(y / a) - y + a)),
    "log target": ({"target": {"column": "sales", "transform": "log"}}, lambda y, a: (y - a) ** 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_fleets_own_on_the_targets_scale_with_its_weights(
    spark: SparkSession, name: str
) -> None:
    changes, loss = LOSSES[name]
    spec = spec_of(**changes)
    rows = report_rows({"oslo": (0.8, 0.5)}).assign(offset=0.25, scale=2.0)
    rows["actual"] = np.random.default_rng(2).uniform(0.5, 6.0, len(rows))
    rows["weight"] = np.where(np.arange(len(rows)) % 3 == 0, 0.0, np.arange(len(rows)))
    ours, rival = (row_loss(spec, in_target_units(spec, sf.col(column))) for column in ("p1", "p0"))
    # A rival that does not answer every row is compared on those that it answers.
    rival = sf.when(sf.col("time") >= sf.lit("2024-06-20"), rival)
    paired = [Paired(1, sf.col("group_ids")[1], ours, {"rival": rival})]
    (found,) = compare_answers(in_spark(spark, rows), spec, paired, START).to_dict("records")
    in_units = np.exp if "transform" in changes.get("target", {}) else np.asarray
    losses = {
        column: loss(rows["actual"], in_units(0.25 + 2.0 * rows[column])) for column in ("p0", "p1")
    }
    counted = rows["weight"] > 0
    assert found["n_rows"] == counted.sum()
    assert found["loss"] == pytest.approx(np.average(losses["p1"], weights=rows["weight"]))
    late = rows["time"] >= pd.Timestamp("2024-06-20")
    assert found["n_rows_rival"] == (counted & late).sum()
    gains = (
        (losses["p0"] - losses["p1"]).where(late)
        if isinstance(losses["p0"], pd.Series)
        else np.where(late, losses["p0"] - losses["p1"], np.nan)
    )
    mean = np.average(gains[late], weights=rows["weight"][late])
    assert found["gain_rival"] == pytest.approx(mean)
    # Two days are a stretch; the error is that of a ratio of sums over stretches.
    stretch = np.arange(len(rows))[late] // 2
    d = np.bincount(stretch, (rows["weight"] * gains)[late])[9:]
    w = np.bincount(stretch, rows["weight"][late])[9:]
    n = len(d)
    expected = np.sqrt(n / (n - 1) * ((d - mean * w) ** 2).sum()) / w.sum()
    assert (found["n_blocks_rival"], found["gain_error_rival"]) == (n, pytest.approx(expected))
