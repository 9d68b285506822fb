"""What answers without any model minimises the fleet's own loss on the fit rows."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from pipeline.spark.counting import count_groups
from pipeline.testing.data import feature_rows, small_spec
from pipeline.testing.run_parts import CUTOFFS
from pipeline.training.objective import row_losses

pytestmark = pytest.mark.spark

GOALS: dict[str, dict[str, Any]] = {
    "l2": {"objective": "l2"},
    "l1": {"objective": "l1"},
    "quantile": {"objective": "quantile", "alpha": 0.8},
}


@pytest.mark.parametrize("weight", [None, "promotion_weight"])
@pytest.mark.parametrize("objective", GOALS)
def test_constants_minimise_the_loss_of_weighted_fit_rows(
    spark: SparkSession, objective: str, weight: str | None
) -> None:
    rows = feature_rows().assign(kind="small")
    rows["promotion_weight"] = 1.0 + 9.0 * rows["promotion"]
    rows["sales"] = np.exp(rows["sales"] / 40.0)
    spec = small_spec(tuning=GOALS[objective], target={"column": "sales", "weight": weight})
    counted = count_groups(spark.createDataFrame(rows), spec, CUTOFFS, {"kind": ["small"]})
    fit = rows[rows["time"] < CUTOFFS.tune_start]
    weights = np.ones(len(fit)) if weight is None else fit[weight].to_numpy()
    target = fit["sales"].to_numpy()

    def loss(answer: float) -> float:
        losses = row_losses(GOALS[objective], target, np.full(len(fit), answer))
        return float(np.average(losses, weights=weights))

    best = min(loss(answer) for answer in np.linspace(target.min(), target.max(), 2000))
    assert loss(counted.constants.with_offset) <= best * 1.001
    assert counted.constants.with_offset == counted.constants.without_offset


def test_a_group_without_targets_changes_no_other_groups_hash(spark: SparkSession) -> None:
    """Beside a null pandas would round the sums of the others."""
    rows = feature_rows().assign(kind="small")
    spec = small_spec()

    def hashes(frame: pd.DataFrame) -> dict[str, str]:
        counted = count_groups(spark.createDataFrame(frame), spec, CUTOFFS, {"kind": ["small"]})
        return dict(zip(counted.counts["group_id"], counted.counts["rows_hash"], strict=True))

    alone = hashes(rows[rows["city"] != "roma"])
    with_empty = hashes(rows.assign(sales=rows["sales"].where(rows["city"] != "roma")))
    assert with_empty['["south","roma"]'] == "0-0-0"
    for group in ('["north","oslo"]', '["north"]', '["south"]', "[]"):
        assert with_empty[group] == alone[group]
