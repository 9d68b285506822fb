import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.start import CrossSelection, Start, Winner

parameters = st.dictionaries(
    st.sampled_from(["learning_rate", "num_leaves", "lambda_l2"]),
    st.floats(0, 100) | st.integers(0, 100),
)
tuned = st.builds(
    Start,
    trials=st.lists(parameters, max_size=3).map(tuple),
    max_trials=st.none() | st.integers(1, 9),
    judge=st.booleans(),
)
winners = st.none() | st.builds(Winner, parameters=parameters, n_rounds=st.integers(1, 1000))
crosses = st.builds(
    CrossSelection,
    middle=st.datetimes().map(lambda moment: moment.isoformat()),
    earlier=winners,
    later=winners,
)
refitted = st.builds(
    Start, refit=parameters, n_rounds=st.integers(1, 1000), cross=st.none() | crosses
)


@given(tuned | refitted)
def test_a_start_comes_back_from_its_text(start: Start) -> None:
    assert Start.from_json(start.to_json()) == start


@given(st.permutations([("learning_rate", 0.1), ("num_leaves", 3), ("lambda_l2", 5.0)]))
def test_equal_starts_have_equal_text(pairs: list[tuple[str, Any]]) -> None:
    named = {"lambda_l2": 5.0, "num_leaves": 3, "learning_rate": 0.1}
    assert Start(trials=(dict(pairs),)).to_json() == Start(trials=(named,)).to_json()
    assert (
        Start(refit=dict(pairs), n_rounds=3).to_json() == Start(refit=named, n_rounds=3).to_json()
    )


@pytest.mark.parametrize(
    "other",
    [
        Start(trials=({"a": 2},)),
        Start(trials=({"a": 1}, {"a": 2})),
        Start(refit={"a": 1}, n_rounds=1),
        Start(refit={"a": 1}, n_rounds=2),
        Start(
            refit={"a": 1},
            n_rounds=2,
            cross=CrossSelection("2024-01-01", Winner({"a": 1}, 1), None),
        ),
        Start(trials=({"a": 1},), max_trials=1),
        Start(judge=True),
        Start(),
    ],
)
def test_other_starts_have_other_text(other: Start) -> None:
    assert Start(trials=({"a": 1},)).to_json() != other.to_json()


def test_nothing_to_start_from_is_an_empty_object() -> None:
    assert json.loads(Start().to_json()) == {}
