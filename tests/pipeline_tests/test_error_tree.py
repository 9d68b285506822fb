"""Errors of the registered model's own file, and those that only their text is left of, belong to the error tree."""

import pytest

from pipeline.errors import DataError, FleetError, StoreError, UnreadableFile
from pipeline.models.meta_model import InputError, PackError
from pipeline.spark.data_errors import in_error_tree, readable_model_errors


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PackError("index.json is damaged"), StoreError, "index.json is damaged"),
        (InputError("missing columns: price"), DataError, "missing columns: price"),
        (DataError("as it is"), DataError, "as it is"),
        # What Spark tells of a Python process of its own.
        (
            RuntimeError(
                "Job aborted\nTraceback\nmlflow_code.InputError: price: 'x' is not a number\n"
            ),
            DataError,
            "price: 'x' is not a number",
        ),
        (
            RuntimeError("x\npipeline.models.meta_model.PackError: chains.parquet differs\n"),
            StoreError,
            "chains.parquet differs",
        ),
        (
            RuntimeError("x\npipeline.errors.UnreadableFile: a.csv cannot be read as csv\n"),
            UnreadableFile,
            "a.csv cannot be read as csv",
        ),
    ],
)
def test_an_error_of_ours_keeps_its_message_and_gets_its_place(
    error: Exception, kind: type[FleetError], message: str
) -> None:
    found = in_error_tree(error)
    assert type(found) is kind
    assert str(found) == message


def test_what_is_none_of_ours_stays_what_it_is() -> None:
    assert in_error_tree(None) is None
    assert in_error_tree(ValueError("no InputError: here")) is None
    with pytest.raises(KeyError), readable_model_errors():
        raise KeyError("x")
    with pytest.raises(StoreError, match=r"^cut$"), readable_model_errors():
        raise PackError("cut")
