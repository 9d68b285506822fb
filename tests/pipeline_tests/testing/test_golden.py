from typing import Any

import pytest

from pipeline.testing.golden import differences

EXPECTED = {"groups": {"0 []": ["trained", 0.5]}, "chains": {"0 []": "abc"}}


def test_equal_values_do_not_differ() -> None:
    assert list(differences(EXPECTED, EXPECTED, exact=True)) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"groups": {"0 []": ["trained", 0.5]}}, ["/chains: gone"]),
        ({**EXPECTED, "answers": []}, ["/answers: new"]),
        (
            {**EXPECTED, "groups": {"0 []": ["reused", 0.5]}},
            ["/groups/0 [][0]: 'reused', expected 'trained'"],
        ),
        (
            {**EXPECTED, "groups": {"0 []": ["trained"]}},
            ["/groups/0 []: ['trained'], expected ['trained', 0.5]"],
        ),
        (
            {**EXPECTED, "groups": {"0 []": ["trained", 0.5000000000000001]}},
            ["/groups/0 [][1]: 0.5000000000000001, expected 0.5"],
        ),
    ],
)
def test_each_difference_is_named(found: Any, expected: list[str]) -> None:
    assert list(differences(found, EXPECTED, exact=True)) == expected


def test_on_another_processor_last_digits_may_differ_and_nothing_else() -> None:
    close = {"groups": {"0 []": ["trained", 0.5000000000000001]}, "chains": {"0 []": "other"}}
    assert list(differences(close, EXPECTED, exact=False)) == []
    far = {"groups": {"0 []": ["trained", 0.500001]}, "chains": {"0 []": "abc"}}
    assert list(differences(far, EXPECTED, exact=False)) == [
        "/groups/0 [][1]: 0.500001, expected 0.5"
    ]
