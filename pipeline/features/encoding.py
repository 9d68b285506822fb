"""The fleet's lists of categories: which values of a categorical feature get a number, learnt once for all groups."""

from collections.abc import Mapping, Sequence


def choose_categories(counts: Mapping[str, Mapping[str, int]], max_categories: int) -> dict[str, list[str]]:
    """Keep the most frequent values of each categorical, in alphabetical order.

    Args:
        counts: rows per value (as text) and categorical, counted on fit rows only; null is not a value.
        max_categories: values kept per categorical; ties are kept in alphabetical order.

    Returns:
        Per categorical its values; a value's number is its place in the list.
    """
    return {name: sorted(_most_frequent(values, max_categories)) for name, values in counts.items()}


def _most_frequent(values: Mapping[str, int], limit: int) -> Sequence[str]:
    return sorted(values, key=lambda value: (-values[value], value))[:limit]
