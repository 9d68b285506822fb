"""Spark's errors about values and statements, as errors that name source, column and remedy."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import or_

from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as sf
from pyspark.sql import types as st

from pipeline.errors import (
    DataError,
    FleetError,
    ModelNotFound,
    SpecError,
    StoreError,
    UnreadableFile,
)
from pipeline.models.meta_model import InputError, PackError

# Conditions in which a value does not fit the type that the SQL wants it in.
UNFIT = ("CAST_INVALID_INPUT", "CANNOT_PARSE_TIMESTAMP", "CANNOT_PARSE_TIME", "CAST_OVERFLOW")
_QUOTED = re.compile(r"'((?:[^']|'')*)'")


# Errors by the name that their text begins with. The self-contained file of the registered model
# has two of its own, which stand for those of our tree.
_OURS: dict[str, type[FleetError]] = {
    "InputError": DataError,
    "PackError": StoreError,
    "UnreadableFile": UnreadableFile,
    "SpecError": SpecError,
    "DataError": DataError,
    "StoreError": StoreError,
    "ModelNotFound": ModelNotFound,
}


def in_error_tree(error: Exception | None) -> FleetError | None:
    """An error as one of our tree, whoever raised it.

    Args:
        error: raised by us, by the registered model, or by a Python process of Spark, which hands
            on its text only.

    Returns:
        The error of our tree; None if it is none of ours.
    """
    if error is None or isinstance(error, FleetError):
        return error
    if isinstance(error, InputError | PackError):
        return _OURS[type(error).__name__](str(error))
    raised = re.search(rf"^(?:[\w.]+\.)?({'|'.join(_OURS)}): (.+)$", str(error), re.MULTILINE)
    if raised is None:
        return None
    name, message = raised.groups()
    return _OURS[name](message)


@contextmanager
def readable_model_errors() -> Iterator[None]:
    """Translate what a registered model raises, here or in Spark's Python processes.

    Raises:
        StoreError: if its pack is damaged.
        DataError: if it cannot answer the rows.
    """
    try:
        yield
    except (InputError, PackError, PySparkException) as error:
        ours = in_error_tree(error)
        if ours is None:
            raise
        raise ours from error


@contextmanager
def readable_spark_errors(file: str, raw: Mapping[str, DataFrame]) -> Iterator[None]:
    """Translate what Spark raises while it runs a fleet's SQL.

    Args:
        file: of the SQL, for messages.
        raw: the raw tables by source name, in which a value that does not fit is looked up.

    Raises:
        DataError: if a value does not fit; it names source, file and column where they are found.
        SpecError: if Spark cannot run the statement on these rows.
    """
    try:
        yield
    except PySparkException as error:
        condition = error.getCondition() or ""
        parameters = error.getMessageParameters() or {}
        if condition.partition(".")[0] in UNFIT:
            raise DataError(_unfit_value(file, raw, parameters, str(error))) from error
        if isinstance(error, AnalysisException) or condition:
            raise SpecError(f"{file}: {_plain(error)}; correct the expression there") from error
        raise


def _unfit_value(
    file: str, raw: Mapping[str, DataFrame], parameters: Mapping[str, str], message: str
) -> str:
    """A message about a value that does not fit the type that the SQL casts it to."""
    target = parameters.get("targetType", "").strip('"') or "TIMESTAMP"
    quoted = _QUOTED.search(parameters.get("expression", "") or message)
    if quoted is None:
        return f"{file}: {message.splitlines()[0]}"
    value = quoted[1]
    column = "column"
    where = f"{file}: a computed value"
    place = _find_value(raw, value)
    if place is not None:
        source, column, path = place
        where = f"source {source!r}, column {column!r} ({path})"
    if target in ("DATE", "TIMESTAMP", "TIMESTAMP_NTZ"):
        remedy = (
            f"coalesce(try_to_timestamp({column}), try_to_timestamp({column}, "
            "'dd.MM.yyyy')) reads two formats, and gives null for others"
        )
    else:
        remedy = f"try_cast({column} AS {target}) gives null for such values"
    return (
        f"{where}: {value!r} is not a {target}, which {file} makes of it\n"
        f"Correct the file; or, in {file}: {remedy};\n"
        f"or, where a wrong type was guessed, set it under types: of the source"
    )


def _find_value(raw: Mapping[str, DataFrame], value: str) -> tuple[str, str, str] | None:
    """Source, column and file of the first row with a text; one Spark job per source."""
    for source, frame in raw.items():
        columns = [
            field.name
            for field in frame.schema
            if isinstance(field.dataType, st.StringType) and not field.name.startswith("_")
        ]
        if not columns:
            continue
        anywhere = reduce(or_, (sf.col(f"`{name}`") == value for name in columns))
        for row in frame.where(anywhere).limit(1).collect():
            values = row.asDict()
            column = next(name for name in columns if values[name] == value)
            return source, column, values.get("_source", source)
    return None


def _plain(error: PySparkException) -> str:
    """Spark's message without its class of error, statement and trace."""
    lines = str(error.getMessage() or error).splitlines()
    first = next(filter(str.strip, lines), "no reason was given")
    without_class = re.sub(r"^\[[A-Z_.0-9]+\]\s*", "", first)
    return re.sub(r"\.?\s*(SQLSTATE: \w+)?;?\s*$", "", without_class)
