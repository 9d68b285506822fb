import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runs.sampling import sampling_exponents


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [(0, 0), (1, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (8000, 3), (10**6, 10)],
)
def test_a_coarse_group_is_halved_until_it_fits(n_rows: int, expected: int) -> None:
    assert sampling_exponents(
        np.array([n_rows]), is_coarse=np.array([True]), max_rows=1000
    ).tolist() == [expected]


def test_a_finest_group_is_never_sampled() -> None:
    assert sampling_exponents(
        np.array([10**9, 10**9]), is_coarse=np.array([False, True]), max_rows=1000
    ).tolist() == [0, 20]


@given(st.integers(0, 10**12), st.integers(1, 10**7))
def test_a_sample_is_below_the_limit_and_more_than_half_of_it(n_rows: int, max_rows: int) -> None:
    [exponent] = sampling_exponents(
        np.array([n_rows]), is_coarse=np.array([True]), max_rows=max_rows
    )
    assert n_rows / 2.0**exponent <= max_rows
    assert exponent == 0 or n_rows / 2.0**exponent > max_rows / 2
