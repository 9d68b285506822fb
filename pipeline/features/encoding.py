"""The fleet's categories: which values of a categorical feature get a number.

Learnt once for all groups.
"""

from collections.abc import Mapping, Sequence


def choose_categories(
    counts: Mapping[str, Mapping[str, int]],
    max_categories: int,
    known: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Keep the most frequent values of each categorical, in alphabetical order.

    New ones follow those that have a number already.

    Args:
        counts: rows per value (as text) and categorical, counted on fit rows only; null is not a
            value.
        max_categories: values kept per categorical; ties are kept in alphabetical order.
        known: lists of an earlier run; their values keep their numbers, so that groups without new
            values need no training.

    Returns:
        Per categorical its values; a value's number is its place in the list.
    """
    chosen = {}
    for name, values in counts.items():
        before = list((known or {}).get(name, ()))[:max_categories]
        new = {value: count for value, count in values.items() if value not in before}
        chosen[name] = before + sorted(_most_frequent(new, max_categories - len(before)))
    return chosen


def _most_frequent(values: Mapping[str, int], limit: int) -> Sequence[str]:
    return sorted(values, key=lambda value: (-values[value], value))[:limit]
