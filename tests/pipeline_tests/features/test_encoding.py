from hypothesis import given
from hypothesis import strategies as st

from pipeline.features.encoding import choose_categories

counts = st.dictionaries(st.text(max_size=5), st.integers(1, 9), max_size=12)


def test_the_most_frequent_values_are_kept_in_alphabetical_order() -> None:
    assert choose_categories({"kind": {"c": 5, "a": 1, "b": 9}}, 2) == {"kind": ["b", "c"]}


def test_ties_are_kept_in_alphabetical_order() -> None:
    assert choose_categories({"kind": {"d": 1, "b": 1, "a": 1, "c": 2}}, 2) == {"kind": ["a", "c"]}


def test_a_categorical_without_a_value_has_an_empty_list() -> None:
    assert choose_categories({"kind": {}}, 250) == {"kind": []}


@given(counts, st.integers(2, 6))
def test_no_left_out_value_is_more_frequent_than_a_kept_one(
    values: dict[str, int], limit: int
) -> None:
    kept = choose_categories({"x": values}, limit)["x"]
    assert len(kept) == min(limit, len(values))
    assert kept == sorted(set(kept))
    left_out = set(values) - set(kept)
    assert all(values[out] <= values[inside] for out in left_out for inside in kept)


@given(counts)
def test_the_order_of_the_counts_does_not_matter(values: dict[str, int]) -> None:
    backwards = dict(reversed(values.items()))
    assert choose_categories({"x": values}, 3) == choose_categories({"x": backwards}, 3)
