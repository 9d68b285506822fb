"""Mistakes in a fleet's description: line, field, what is expected, and the value."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]
LineOf = Callable[[Path], int | None]

MAX_SHOWN = 8
MAX_VALUE_CHARACTERS = 60

# What a field may look like, where a value alone does not say it. `*` stands for any position or
# key.
EXAMPLES: Mapping[str, str] = {
    "owners": "[team:pricing]",
    "sources": "[{name: sales, uri: data/sales-*.csv}]",
    "sources.*": "{name: sales, uri: data/sales-*.csv}",
    "sources.*.types": "{zip_code: string}",
    "sources.*.null_values": "[NA, unknown]",
    "features": "{columns: [price], calendar: [month]}",
    "features.columns": "[price]",
    "features.lags": "[{column: amount, periods: [1, 12]}]",
    "features.lags.*": "{column: amount, periods: [1, 12]}",
    "features.lags.*.periods": "[1, 12]",
    "features.rolling": "[{column: amount, window: 12 months}]",
    "features.rolling.*": "{column: amount, window: 12 months}",
    "features.rolling.*.window": "12 months",
    "features.rolling.*.statistics": "[mean, std]",
    "features.rolling.*.over": "[store]",
    "features.derived": "{trend: ln(amount_lag_1)}",
    "features.calendar": "[month]",
    "features.categoricals": "[store]",
    "features.monotone": "{price: -1}",
    "features.exclude": "[amount_lag_1]",
    "grains": "[[], [store]]",
    "grains.*": "[store], as in grains: [[], [store]]",
    "entity": "[store]",
    "period": "1 month",
    "horizon": "1 month",
    "target": "{column: amount}",
    "target.classes": "[no_show, show]",
    "splits": "{report: 12 months, tune: 12 months}",
    "splits.report": "12 months",
    "splits.tune": "12 months",
    "tuning": "{max_trials: 12}",
    "tuning.retune_after": "1 month",
    "tuning.search": "{num_leaves: {low: 4, high: 64}}",
    "tuning.search.*": "{low: 4, high: 64}",
    "baselines": "{last value: amount_lag_1}",
    "scoring": "{score: future}",
    "scoring.intervals": "[0.8, 0.95]",
    "as_of": "2013-12-24",
}

_KINDS = {
    "text": ("string_type", "string_sub_type", "string_unicode"),
    "a whole number": ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
    "a number": ("float_type", "float_parsing", "finite_number"),
    "true or false": ("bool_type", "bool_parsing"),
    "a list": ("is_instance_of", "list_type", "sequence_str", "tuple_type"),
    "a mapping": ("dict_type", "mapping_type", "model_type", "model_attributes_type"),
}
_KIND_OF = {kind: words for words, kinds in _KINDS.items() for kind in kinds}
_BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "too_short": "a list that is not empty",
    "string_too_short": "text that is not empty",
}
# A message that begins with the field it is about, e.g. `features.lags: ...`.
_FIELD = re.compile(r"([a-z_]+(?:\.[^:\s]+)*):? ")


class InconsistentSpec(ValueError):
    """Fields that contradict each other; one text for each, which begins with its field."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Args:
        path: of the field, from the attributes down.
        message: for people; it names the field.
    """

    path: Path
    message: str

    @classmethod
    def from_message(cls, message: str) -> "Mistake":
        """Of a message that may begin with the field it is about."""
        field = _FIELD.match(message)
        return cls(tuple(field[1].split(".")) if field else (), message)


def describe(file: str, mistakes: Sequence[Mistake], line_of: LineOf | None = None) -> str:
    """All mistakes of a file as one message of ten lines at most.

    Args:
        file: where they are.
        mistakes: at least one.
        line_of: gives a field's line; without it messages have none.
    """
    lines = []
    for mistake in mistakes[:MAX_SHOWN]:
        line = line_of(mistake.path) if line_of else None
        lines.append(f"line {line}: {mistake.message}" if line else mistake.message)
    if len(mistakes) == 1:
        return f"{file}, {lines[0]}" if lines[0].startswith("line ") else f"{file}: {lines[0]}"
    if len(mistakes) > MAX_SHOWN:
        lines.append(f"... and {len(mistakes) - MAX_SHOWN} more")
    return "\n  ".join([f"{file} has {len(mistakes)} mistakes:", *lines])


def explain(error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
    """What pydantic found, in plain words.

    Args:
        error: of a validation of the model.
        model: whose fields are named where one is unknown.
    """
    return [mistake for problem in error.errors() for mistake in _explained(problem, model)]


def _explained(problem: Any, model: type[BaseModel]) -> Iterator[Mistake]:
    path: Path = problem["loc"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InconsistentSpec):
        yield from map(Mistake.from_message, cause.problems)
        return
    field = ".".join(str(part) for part in path)
    yield Mistake(
        path, f"{field}: {_said(problem, path, model)}" if field else _said(problem, path, model)
    )


def _said(problem: Any, path: Path, model: type[BaseModel]) -> str:
    kind, value = problem["type"], problem["input"]
    example = EXAMPLES.get(_pattern(path, model))
    if kind == "extra_forbidden":
        fields = _fields_at(path[:-1], model)
        return f"unknown field{_near(str(path[-1]), fields)} Available: {', '.join(fields)}"
    if kind == "missing":
        return f"missing required field{f', e.g. {example}' if example else ''}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        expected = f"one of {', '.join(allowed)}" if allowed else problem["ctx"]["expected"]
        return f"expected {expected}, got {_shown(value)}{_near(str(value), allowed).rstrip('.')}"
    if kind in _BOUNDS:
        return f"expected {_BOUNDS[kind].format(**problem['ctx'])}, got {_shown(value)}"
    if kind in _KIND_OF:
        example = _adapted(_pattern(path, model), value, example)
        such_as = f" such as {example}" if example else ""
        return f"expected {_KIND_OF[kind]}{such_as}, got {_shown(value)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    is_shown = isinstance(value, Mapping | BaseModel) or repr(value) in message
    return message if is_shown else f"{message}, got {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _adapted(pattern: str, value: Any, example: str | None) -> str | None:
    """The example with the user's own text in it, where that is what was meant."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w./*-]+", value):
        return example
    if pattern == "target":
        return f"{{column: {value}}}"
    if pattern == "sources.*":
        name = re.sub(r"\W", "_", PurePosixPath(value).name.partition(".")[0]) or "sales"
        return f"{{name: {name}, uri: {value}}}"
    if pattern == "grains.*":
        return f"[{value}], as in grains: [[], [{value}]]"
    is_list_of_names = example is not None and re.fullmatch(r"\[[\w, ]+\]", example)
    return f"[{value}]" if is_list_of_names else example


def _pattern(path: Path, model: type[BaseModel]) -> str:
    """A path with `*` for each position in a list or key of a mapping."""
    parts: list[str] = []
    current: Any = model
    for part in path:
        if current is not None and part in current.model_fields:
            current = _part_model(current.model_fields[str(part)].annotation)
            parts.append(str(part))
        else:
            parts.append("*")
    return ".".join(parts)


def _fields_at(path: Path, model: type[BaseModel]) -> list[str]:
    current = model
    for part in path:
        if part in current.model_fields:  # otherwise a position in a list, or a key of a mapping
            current = _part_model(current.model_fields[str(part)].annotation) or current
    return sorted(current.model_fields)


def _part_model(annotation: Any) -> Any:
    """The model inside an annotation such as ``Sequence[LagSpec]``; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_part_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((found for found in inner if found is not None), None)
