"""Puts every group's rows into the task that the plan chose, and brings them into pandas unchanged.

Spark puts a row into partition `pmod(hash(column), n)` of the column that it repartitions by. The
plan says which task a group belongs to, so that column holds an integer whose hash leads to the
task: its salt.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import Column, DataFrame, GroupedData
from pyspark.sql import functions as sf
from pyspark.sql.types import DataType, IntegralType, TimestampNTZType, TimestampType

SALT = "_salt"
# The seed of the hash that Spark partitions by.
_SEED = 42
# Integers hashed at a time, per task: about as many as chance needs for a few thousand tasks.
_CANDIDATES_PER_TASK = 12
# The integer behind numpy's NaT.
_NO_MOMENT = np.iinfo(np.int64).min


def find_salts(n_tasks: int) -> npt.NDArray[np.int32]:
    """For each task the smallest integer, from 0, that Spark's hash partitioning puts into it.

    Args:
        n_tasks: partitions of the exchange; a salt leads to its task only among as many.
    """
    salts = np.full(n_tasks, -1, dtype=np.int32)
    n_candidates = _CANDIDATES_PER_TASK * n_tasks
    first = 0
    while (salts < 0).any():
        candidates = np.arange(first, first + n_candidates, dtype=np.int32)
        tasks, places = np.unique(
            hash_integers(candidates).astype(np.int64) % n_tasks, return_index=True
        )
        is_new = salts[tasks] < 0
        salts[tasks[is_new]] = candidates[places[is_new]]
        first += n_candidates
    return salts


def hash_integers(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Spark's `hash` of an int column: Murmur3 of 32 bits, one block of four bytes.

    Source: `Murmur3_x86_32.hashInt` in Spark; the constants are those of Austin Appleby's
    MurmurHash3.
    """
    mixed = values.astype(np.uint32) * np.uint32(0xCC9E2D51)
    mixed = _rotated(mixed, 15) * np.uint32(0x1B873593)
    hashed = _rotated(mixed ^ np.uint32(_SEED), 13) * np.uint32(5) + np.uint32(0xE6546B64)
    # The length in bytes, and the final mix.
    hashed ^= np.uint32(4)
    hashed = (hashed ^ (hashed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashed = (hashed ^ (hashed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (hashed ^ (hashed >> np.uint32(16))).astype(np.int32)


def _rotated(values: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
    rotated: npt.NDArray[np.uint32] = (values << np.uint32(bits)) | (values >> np.uint32(32 - bits))
    return rotated


def place_by_salt(rows: DataFrame, n_tasks: int) -> DataFrame:
    """The rows in the Spark partition that is their task; one exchange.

    Args:
        rows: with the salt of their task in `_salt`, from `find_salts(n_tasks)`.
        n_tasks: partitions of the result.
    """
    return rows.repartition(n_tasks, SALT)


def group_placed(placed: DataFrame) -> GroupedData:
    """The placed rows by group, for `applyInPandas`.

    As the salt is among the keys, Spark knows that groups are together already: no row moves.
    """
    return placed.groupBy(SALT, "grain", "group_id")


def travel_types(rows: DataFrame, named: Collection[str]) -> tuple[DataFrame, list[str]]:
    """The rows in types that Spark hands to pandas as they are.

    In pandas, an integer beside nulls becomes a float, which above 2^53 is another integer. Spark
    would convert moments to nanoseconds, which end in 2262, on the clocks of the session's zone.

    Args:
        rows: the placed rows.
        named: keys, categories and classes; where these are integers, they travel as text.

    Returns:
        The rows, and which columns are moments: they travel as microseconds since 1970, UTC, and
        `restore_moments` makes moments of them again.
    """
    moments = [
        field.name
        for field in rows.schema
        if isinstance(field.dataType, TimestampType | TimestampNTZType)
    ]
    columns = [_travelling(field.name, field.dataType, named) for field in rows.schema]
    return rows.select(*columns), moments


def _travelling(name: str, kind: DataType, named: Collection[str]) -> Column:
    column = sf.col(f"`{name}`")
    if isinstance(kind, TimestampType | TimestampNTZType):
        micros = sf.unix_micros(column.cast("timestamp"))
        return sf.coalesce(micros, sf.lit(int(_NO_MOMENT))).alias(name)
    if name in named and isinstance(kind, IntegralType):
        return column.cast("string").alias(name)
    return column


def restore_moments(frame: pd.DataFrame, moments: Sequence[str]) -> pd.DataFrame:
    """The rows with moments as moments, in UTC without a zone.

    Args:
        frame: as it comes out of Spark; it is changed in place, as nothing else holds it.
        moments: columns that travelled as microseconds, as from `travel_types`.
    """
    for name in moments:
        frame[name] = frame[name].to_numpy(dtype=np.int64).view("datetime64[us]")
    return frame
