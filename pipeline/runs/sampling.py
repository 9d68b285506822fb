"""Which coarse groups are too large for one worker, and how much they are thinned out."""

import numpy as np
import numpy.typing as npt

# The rows that a finest group keeps in any sample, at least and roughly.
SAMPLED_WHOLE = 1000


def sampling_exponents(
    n_rows: npt.NDArray[np.int64], *, is_coarse: npt.NDArray[np.bool_], max_rows: int
) -> npt.NDArray[np.int64]:
    """Per group the power of 1/2 that brings it below `max_rows`; 0 keeps all rows.

    A row of a sampled group stays if the hash of its key is below its rate; a rate is 1/2 to the
    group's exponent, more for a row of a small finest group. Rates are powers of 1/2, so that a
    sample of one rate is part of that of the next larger one, and a group that grows does not get a
    new sample each time.

    Args:
        n_rows: rows with a target of each group.
        is_coarse: whether a group has finer ones within it; a finest group is never sampled.
        max_rows: what a worker takes.
    """
    exponents = np.zeros(len(n_rows), dtype=np.int64)
    is_too_large = is_coarse & (n_rows > max_rows)
    while is_too_large.any():
        exponents[is_too_large] += 1
        is_too_large = is_coarse & (n_rows > max_rows << exponents)
    return exponents
