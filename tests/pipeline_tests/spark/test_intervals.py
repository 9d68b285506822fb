"""Half widths are the order statistics that split conformal prediction asks for, whatever the rows."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from pipeline.spark.evaluation import MIN_INTERVAL_ROWS, half_widths

pytestmark = pytest.mark.spark

LEVELS = (0.07, 0.5, 0.55, 0.8, 0.95, 0.99, 0.9999)
# Where k = ceil((n + 1) level) is a whole number before it is rounded up, and on either side of that.
SIZES = (
    1,
    MIN_INTERVAL_ROWS - 1,
    MIN_INTERVAL_ROWS,
    38,
    39,
    40,
    98,
    99,
    100,
    101,
    500,
    9_998,
    9_999,
)


def of_numpy(misses: npt.NDArray[np.float64]) -> list[float | None]:
    n, ordered = len(misses), np.sort(misses)
    ranks = [math.ceil((n + 1) * Fraction(str(level))) for level in LEVELS]
    return [float(ordered[k - 1]) if k <= n and n >= MIN_INTERVAL_ROWS else None for k in ranks]


@pytest.fixture(scope="module")
def groups() -> dict[str, npt.NDArray[np.float64]]:
    random = np.random.default_rng(3)
    found = {f"of {n}": random.exponential(size=n) for n in SIZES}
    found["with ties"] = random.integers(0, 4, 700).astype(float)
    found["all equal"] = np.full(64, 1.5)
    found["all zero"] = np.zeros(40)
    found["huge and tiny"] = np.concatenate(
        [random.exponential(1e300, 50), random.exponential(1e-300, 50)]
    )
    return found


@pytest.fixture(scope="module")
def found(
    spark: SparkSession, groups: dict[str, npt.NDArray[np.float64]]
) -> dict[str, list[float | None]]:
    rows = pd.concat(
        [
            pd.DataFrame({"grain": 1, "group_id": name, "miss": misses})
            for name, misses in groups.items()
        ]
    )
    # A row without an offset has no miss.
    nulls = pd.DataFrame(
        {"grain": 1, "group_id": ["of 100"] * 50 + ["only nulls"] * 50, "miss": np.nan}
    )
    other = rows[rows["group_id"] == "of 100"].assign(grain=2, miss=7.0)
    shuffled = pd.concat([rows, other, nulls]).sample(frac=1.0, random_state=4)
    frame = spark.createDataFrame(
        pa.Table.from_pandas(shuffled, preserve_index=False).replace_schema_metadata()
    )
    table = half_widths(frame.repartition(7), LEVELS).collect()
    assert [row["half_widths"] for row in table if row["grain"] == 2] == [[7.0] * 6 + [None]]
    return {row["group_id"]: row["half_widths"] for row in table if row["grain"] == 1}


def test_half_widths_are_exact_order_statistics(
    found: dict[str, list[float | None]], groups: dict[str, npt.NDArray[np.float64]]
) -> None:
    assert found == {name: of_numpy(misses) for name, misses in groups.items()}


def test_half_widths_rise_with_the_level(found: dict[str, list[float | None]]) -> None:
    for halves in found.values():
        there = [half for half in halves if half is not None]
        assert there == sorted(there)


def test_too_few_rows_for_a_level_leave_it_to_the_parent(
    found: dict[str, list[float | None]],
) -> None:
    at = {level: number for number, level in enumerate(LEVELS)}
    assert found[f"of {MIN_INTERVAL_ROWS - 1}"] == [None] * len(LEVELS)
    assert found["of 38"][at[0.95]] is not None
    assert [found[f"of {n}"][at[0.99]] is None for n in (98, 99)] == [True, False]
    assert [found[f"of {n}"][at[0.9999]] is None for n in (9_998, 9_999)] == [True, False]


def test_rows_to_come_are_within_as_often_as_the_level_says() -> None:
    """Of the rule itself: coverage is from the level to 1 / (n + 1) above it, here averaged over many groups."""
    random = np.random.default_rng(5)
    for n in (MIN_INTERVAL_ROWS, 99):
        misses, later = random.exponential(size=(4_000, n)), random.exponential(size=4_000)
        halves: Any = np.array([of_numpy(row) for row in misses], dtype=float)
        for number, level in enumerate(LEVELS):
            covered = (later <= halves[:, number])[~np.isnan(halves[:, number])]
            if len(covered):
                assert level - 0.025 <= covered.mean() <= level + 1 / (n + 1) + 0.025, (n, level)
