"""Spark expressions that give exactly what their twins in `pipeline.models.meta_model` give."""

from collections.abc import Iterable, Sequence

import pandas as pd
from pyspark.sql import Column
from pyspark.sql import functions as sf
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import DataType, FractionalType, TimestampNTZType, TimestampType

from pipeline.models.meta_model import key_text


def quoted(names: Iterable[str]) -> list[str]:
    """Names of columns as Spark parses them, so that dots and spaces mean themselves."""
    return [f"`{name}`" for name in names]


def group_id_column(keys: Sequence[str]) -> Column:
    """The id of a row's group, as `meta_model.group_id` writes it."""
    if not keys:
        return sf.lit("[]")
    return sf.to_json(sf.array(*(sf.col(f"`{key}`").cast("string") for key in keys)))


def text_column(column: Column, kind: DataType) -> Column:
    """A category of that type as text, as `meta_model.key_text` writes it."""
    if isinstance(kind, FractionalType):
        # Java writes other digits than Python does, and other ones from release to release.
        texts: Column = pandas_udf(_texts_of_numbers, "string")(column)  # type: ignore[call-overload]
        return texts
    if isinstance(kind, TimestampType | TimestampNTZType):
        is_midnight = sf.date_trunc("day", column) == column
        return sf.when(is_midnight, column.cast("date").cast("string")).otherwise(
            column.cast("string")
        )
    return column.cast("string")


def _texts_of_numbers(values: pd.Series) -> pd.Series:
    return pd.Series(list(map(key_text, values)), dtype=object)


def moment_column(moment: pd.Timestamp) -> Column:
    """A moment (UTC, without a zone) as Spark's timestamp.

    Spark would read a plain literal in the zone of this machine.
    """
    return sf.timestamp_micros(sf.lit(int(moment.as_unit("us").asm8.astype("int64"))))


def latest_moment(column: Column) -> Column:
    """The latest moment as `moment_of` takes it.

    A timestamp would be collected in the zone of this machine.
    """
    return sf.unix_micros(sf.max(column))


def moment_of(micros: int) -> pd.Timestamp:
    """A moment (UTC, without a zone) from microseconds since 1970."""
    return pd.Timestamp(micros, unit="us")


def link_column(value: Column, transform: str) -> Column:
    """Target units to link space; null where the result is not finite."""
    linked = {
        "none": value,
        "log": sf.when(value > 0, sf.log(value)),
        "log1p": sf.when(value > -1, sf.log1p(value)),
    }[transform]
    return finite(linked)


def inverse_link_column(linked: Column, transform: str) -> Column:
    """Link space to target units."""
    return {"none": linked, "log": sf.exp(linked), "log1p": sf.expm1(linked)}[transform]


def finite(value: Column) -> Column:
    """The value, or null where it is NaN or infinite."""
    number = value.cast("double")
    return sf.when(~sf.isnan(number) & (sf.abs(number) < float("inf")), number)


def number_or(name: str | None, default: float) -> Column:
    """A column, null where it is not finite; the default in every row where none is named."""
    if not name:
        return sf.lit(default)
    return finite(sf.col(f"`{name}`"))
