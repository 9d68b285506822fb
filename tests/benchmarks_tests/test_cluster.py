"""A fleet on a cluster: what counts as a difference."""

import pandas as pd

from benchmarks.cluster import n_differing

ROWS = pd.DataFrame(
    {"prediction": [0.1, None, 0.3], "answered_by": ["[]", "[]", None]}, index=["a", "b", "c"]
)


def test_the_same_in_another_order_does_not_differ() -> None:
    assert n_differing(ROWS, ROWS.iloc[::-1]) == 0


def test_the_last_bit_and_a_null_differ() -> None:
    other = ROWS.copy()
    other.loc["a", "prediction"] = 0.1 + 2**-55
    other.loc["c", "answered_by"] = "[]"
    assert n_differing(ROWS, other) == 2


def test_rows_that_only_one_has_differ() -> None:
    assert n_differing(ROWS, ROWS.drop(index="b")) == 1
    assert n_differing(ROWS.drop(index=["a", "b"]), ROWS) == 2
