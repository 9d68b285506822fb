import pytest

from pipeline.errors import DataError, FleetError, ModelNotFound, SpecError, StoreError


@pytest.mark.parametrize("child", [SpecError, DataError, StoreError, ModelNotFound])
def test_everything_raised_on_purpose_is_a_fleet_error(child: type[Exception]) -> None:
    assert issubclass(child, FleetError)


@pytest.mark.parametrize(("child", "builtin"), [(SpecError, ValueError), (ModelNotFound, KeyError)])
def test_an_error_is_also_the_builtin_that_callers_expect(
    child: type[Exception], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin):
        raise child("what, value, expected, next step")


def test_children_do_not_catch_each_other() -> None:
    assert not issubclass(DataError, SpecError | StoreError)
    assert not issubclass(StoreError, OSError)


def test_a_model_not_found_reads_as_written() -> None:
    assert (
        str(ModelNotFound("alias 'champion' of 'housing' is not set;\npromote a version"))
        == "alias 'champion' of 'housing' is not set;\npromote a version"
    )
    assert str(ModelNotFound()) == ""
