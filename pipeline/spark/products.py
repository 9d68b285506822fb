"""Sums of products of columns, two by two, and the symmetric matrices that they are in Python."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import Column
from pyspark.sql import functions as sf


def sums_of_products(columns: Sequence[Column], weight: Column | None = None) -> list[Column]:
    """The sum of the product of each pair of columns, as aggregates `_s<i>_<j>` with i <= j.

    Args:
        columns: numbered from 0.
        weight: of the rows; None is 1.
    """
    sums = []
    for i, j in combinations_with_replacement(range(len(columns)), 2):
        first = columns[i]
        if weight is not None:
            first = weight * first
        sums.append(sf.sum(first * columns[j]).alias(f"_s{i}_{j}"))
    return sums


def symmetric_matrices(sums: pd.DataFrame, n_columns: int) -> npt.NDArray[np.float64]:
    """A matrix per row from columns as from `sums_of_products`, shape (rows, columns, columns)."""
    matrices = np.zeros((len(sums), n_columns, n_columns))
    for i, j in combinations_with_replacement(range(n_columns), 2):
        matrices[:, i, j] = matrices[:, j, i] = sums[f"_s{i}_{j}"]
    return matrices
