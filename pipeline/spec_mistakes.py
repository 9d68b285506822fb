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

# What pydantic expected, by the type of its error.
_EXPECTED = {
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "text"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"
    ),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("is_instance_of", "list_type", "sequence_str", "tuple_type"), "a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type"), "a mapping"
    ),
}
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
        """The mistake of a message that may begin with the field it is about."""
        field = _FIELD.match(message)
        if field is None:
            return cls((), message)
        return cls(tuple(field[1].split(".")), message)


def describe(file: str, mistakes: Sequence[Mistake], line_of: LineOf | None = None) -> str:
    """All mistakes of a file as one message of ten lines at most.

    Args:
        file: where they are.
        mistakes: at least one.
        line_of: gives a field's line; without it messages have none.
    """
    lines = [_with_line(mistake, line_of) for mistake in mistakes[:MAX_SHOWN]]
    if len(mistakes) == 1:
        separator = ": "
        if lines[0].startswith("line "):
            separator = ", "
        return f"{file}{separator}{lines[0]}"
    if len(mistakes) > MAX_SHOWN:
        lines.append(f"... and {len(mistakes) - MAX_SHOWN} more")
    return "\n  ".join([f"{file} has {len(mistakes)} mistakes:", *lines])


def _with_line(mistake: Mistake, line_of: LineOf | None) -> str:
    if line_of is None:
        return mistake.message
    line = line_of(mistake.path)
    if not line:
        return mistake.message
    return f"line {line}: {mistake.message}"


def explain(error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
    """What pydantic found when it validated the model, in plain words."""
    mistakes: list[Mistake] = []
    for problem in error.errors():
        mistakes += _explained(problem, model)
    return mistakes


def _explained(problem: Any, model: type[BaseModel]) -> Iterator[Mistake]:
    path: Path = problem["loc"]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InconsistentSpec):
        yield from map(Mistake.from_message, cause.problems)
        return
    field = ".".join(map(str, path))
    message = _message(problem, path, model)
    if field:
        message = f"{field}: {message}"
    yield Mistake(path, message)


def _message(problem: Any, path: Path, model: type[BaseModel]) -> str:
    kind = problem["type"]
    pattern = _pattern(path, model)
    if kind == "extra_forbidden":
        fields = _fields_at(path[:-1], model)
        return f"unknown field{_suggestion(str(path[-1]), fields)} Available: {', '.join(fields)}"
    if kind == "missing":
        message = "missing required field"
        if pattern in EXAMPLES:
            message += f", e.g. {EXAMPLES[pattern]}"
        return message
    if kind == "literal_error":
        return _choice_message(problem["ctx"]["expected"], problem["input"])
    if kind in _BOUNDS:
        expected = _BOUNDS[kind].format(**problem["ctx"])
        return f"expected {expected}, got {_abbreviated(problem['input'])}"
    if kind in _EXPECTED:
        return _kind_message(_EXPECTED[kind], pattern, problem["input"])
    return _validator_message(problem["msg"], problem["input"])


def _kind_message(expected: str, pattern: str, value: Any) -> str:
    """What to say of a value of the wrong kind."""
    example = _adapted_example(pattern, value)
    if example is not None:
        expected += f" such as {example}"
    return f"expected {expected}, got {_abbreviated(value)}"


def _validator_message(message: str, value: Any) -> str:
    """A validator's own message, with the value unless the message already has it."""
    message = message.removeprefix("Value error, ")
    if isinstance(value, Mapping | BaseModel) or repr(value) in message:
        return message
    return f"{message}, got {_abbreviated(value)}"


def _choice_message(expected: str, value: Any) -> str:
    """What to say of a value that is not one of the choices in pydantic's words."""
    choices = re.findall(r"'([^']*)'", expected)
    if choices:
        expected = f"one of {', '.join(choices)}"
    suggestion = _suggestion(str(value), choices).rstrip(".")
    return f"expected {expected}, got {_abbreviated(value)}{suggestion}"


def _abbreviated(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    if len(text) > MAX_VALUE_CHARACTERS:
        return f"{text[:MAX_VALUE_CHARACTERS]}..."
    return text


def _suggestion(name: str, names: Sequence[str]) -> str:
    """The end of a sentence: a question with the nearest name, or a full stop."""
    nearest = difflib.get_close_matches(name, names, n=1)
    if not nearest:
        return "."
    return f"; did you mean {nearest[0]!r}?"


def _adapted_example(pattern: str, value: Any) -> str | None:
    """A field's example, with the user's own text in it where that is what was meant."""
    example = EXAMPLES.get(pattern)
    if not isinstance(value, str) or not re.fullmatch(r"[\w./*-]+", value):
        return example
    if pattern == "target":
        return f"{{column: {value}}}"
    if pattern == "sources.*":
        name = re.sub(r"\W", "_", PurePosixPath(value).name.partition(".")[0]) or "sales"
        return f"{{name: {name}, uri: {value}}}"
    if pattern == "grains.*":
        return f"[{value}], as in grains: [[], [{value}]]"
    if example is not None and re.fullmatch(r"\[[\w, ]+\]", example):  # a list of names
        return f"[{value}]"
    return example


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
    for argument in getattr(annotation, "__args__", ()):
        model = _part_model(argument)
        if model is not None:
            return model
    return None
