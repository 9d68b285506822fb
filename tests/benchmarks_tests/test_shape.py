"""The figure `shape` on small folders: what counts, what does not, and the places it names."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from benchmarks.figures import FIGURES
from benchmarks.runs import PROJECT, NotMeasured
from benchmarks.shape import ROOMS, find_room, measure_shape, read_sources

Measure = Callable[[Mapping[str, str]], Mapping[str, float]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Writes files and measures their folder."""

    def write_and_measure(files: Mapping[str, str]) -> Mapping[str, float]:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return measure_shape(tmp_path)

    return write_and_measure


def count_upward(measure: Measure, importer: str, statement: str) -> float:
    """Imports of a higher room that one statement in one file of a made project has."""
    project = {
        "pipeline/__init__.py": "NAME = 1\n",
        "pipeline/errors.py": "",
        "pipeline/definitions.py": "",
        "pipeline/defs/__init__.py": "",
        "resources/__init__.py": "",
        "resources/tables.py": "",
        "assets/__init__.py": "",
        "assets/raw.py": "",
    }
    rooms = [
        room for room in ROOMS if room.startswith("pipeline.") and room != "pipeline.definitions"
    ]
    for room in rooms:
        folder = room.replace(".", "/")
        project[f"{folder}/__init__.py"] = ""
        project[f"{folder}/first.py"] = "def act() -> None: ...\n"
        project[f"{folder}/second.py"] = ""
    return measure({**project, importer: statement})["upward"]


def test_the_figure_has_every_value_that_is_measured() -> None:
    parts = {value.part for value in FIGURES["shape"].values}
    assert parts == set(measure_shape(PROJECT))


def test_long_lines_are_a_share_of_all_lines_by_characters(measure: Measure) -> None:
    exactly_100 = "#" * 100
    over_100 = "#" * 101
    # 100 characters of two bytes each are not too long.
    two_bytes = "#" + "ü" * 99
    files = {
        "pipeline/a.py": f"{exactly_100}\n{over_100}\n{two_bytes}\n\n\n\n",
        "assets/b.py": "x = 1\ny = 2\n",
        "resources/c.py": f"{over_100}\n\n",
    }
    assert measure(files)["over-100"] == 20


def test_comprehensions_of_all_four_kinds_count_per_thousand_lines_that_are_not_blank(
    measure: Measure,
) -> None:
    text = """
rows = [1]

pairs = [(a, b) for a in rows for b in rows if a]
names = {str(row) for row in rows}

lengths = {row: len(str(row)) for row in rows}
total = sum(row for row in rows)
   \t
for row in rows:
    print(row)
nested = [[b for b in a] for a in pairs]
also = rows if rows else names
# the tenth line
"""
    values = measure({"pipeline/a.py": text})
    assert values["comprehensions"] == pytest.approx(1000 * 6 / 10)
    assert values["conditionals"] == pytest.approx(1000 * 1 / 10)


def test_conditional_expressions_count_and_statements_do_not(measure: Measure) -> None:
    text = """
def choose(a: int) -> int:
    if a:
        return 1
    b = 1 if a else 2 if a > 3 else 4
    return (lambda c: c if c else b)(a)
"""
    values = measure({"resources/a.py": text})
    assert values["conditionals"] == 1000 * 3 / 5
    assert values["comprehensions"] == 0


def function_of(n_lines: int, head: str = "def act() -> None:", indent: str = "") -> str:
    body = [f"{indent}    x = {number}" for number in range(n_lines - 2)]
    return "\n".join([f"{indent}{head}", f'{indent}    """Act."""', *body]) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (function_of(60), 0),
        (function_of(61), 1),
        (function_of(61, "async def act() -> None:"), 1),
        ("@decorated\n" * 5 + function_of(60), 0),
        ("class Actor:\n" + function_of(61, indent="    "), 1),
        (
            "class Actor:\n"
            + function_of(40, indent="    ")
            + function_of(40, "def two() -> None:", "    "),
            0,
        ),
        # A function in another adds to its length.
        ("def outer() -> None:\n" + function_of(60, indent="    "), 1),
        ('def act() -> None:\n    """Act.\n' + "\n" * 57 + '    """\n    return\n', 1),
    ],
)
def test_functions_of_more_than_60_lines_count_from_def_to_the_last_line(
    measure: Measure, text: str, expected: int
) -> None:
    assert measure({"assets/a.py": text})["functions-over-60"] == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("a, b, c, d, e, f", 0),
        ("a, b, c, d, e, f, g", 1),
        ("a, /, b, c, d, e, f, g", 1),
        ("a, b, c, d, *, e, f, g", 1),
        ("a, b, c, d, e, f, *args", 1),
        ("a, b, c, d, e, f, **kwargs", 1),
        ("a, b, c, d, *args, **kwargs", 0),
        ("self, a, b, c, d, e, f", 0),
        ("cls, a, b, c, d, e, f", 0),
        ("self, /, a, b, c, d, e, f", 0),
        ("self, a, b, c, d, e, f, g", 1),
        ("a, b, c, d, e, f, self", 1),
    ],
)
def test_functions_of_more_than_six_parameters_count(
    measure: Measure, parameters: str, expected: int
) -> None:
    text = f"class Actor:\n    async def act({parameters}): ...\n    def also({parameters}): ...\n"
    assert measure({"pipeline/a.py": text})["parameters-over-6"] == 2 * expected


@pytest.mark.parametrize(
    ("importer", "statement", "expected"),
    [
        ("pipeline/errors.py", "from pipeline.reading.first import act", 1),
        ("pipeline/reading/first.py", "from pipeline.errors import FleetError", 0),
        ("pipeline/reading/first.py", "from pipeline.reading.second import act", 0),
        ("pipeline/reading/first.py", "import pipeline.features.first as first", 1),
        ("pipeline/features/first.py", "import pipeline.reading.first as first", 0),
        ("pipeline/features/first.py", "from pipeline.models import first", 1),
        ("pipeline/models/first.py", "from pipeline import NAME, errors, training", 1),
        ("pipeline/training/first.py", "from pipeline.runs import first, second", 2),
        ("pipeline/training/first.py", "from pipeline.runs.first import act, also", 1),
        ("pipeline/runs/first.py", "from ..scoring.first import act", 1),
        ("pipeline/runs/__init__.py", "from .first import act", 0),
        ("pipeline/runs/__init__.py", "from .. import spark", 1),
        (
            "pipeline/scoring/first.py",
            "def act() -> None:\n    from pipeline.reporting.first import act",
            1,
        ),
        (
            "pipeline/reporting/first.py",
            (
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from "
                "pipeline.spark.first import act"
            ),
            1,
        ),
        ("pipeline/spark/first.py", "from pipeline.testing.first import act", 1),
        ("pipeline/spark/first.py", "import assets.raw, resources.tables, pipeline.errors", 2),
        (
            "pipeline/testing/first.py",
            "from pipeline.spark.first import act\nimport pipeline.definitions",
            0,
        ),
        ("pipeline/testing/first.py", "from resources.tables import Tables", 1),
        ("resources/tables.py", "from pipeline.testing.first import act", 0),
        ("resources/tables.py", "from assets import raw", 1),
        ("assets/raw.py", "from resources.tables import Tables", 0),
        ("assets/raw.py", "from pipeline.definitions import defs", 1),
        ("pipeline/definitions.py", "import assets.raw", 0),
        ("pipeline/defs/__init__.py", "import assets.raw", 0),
        (
            "pipeline/errors.py",
            "import pandas.pipeline.spark\nfrom pipelines.spark import first",
            0,
        ),
    ],
)
def test_imports_of_a_higher_room_count(
    measure: Measure, importer: str, statement: str, expected: int
) -> None:
    assert count_upward(measure, importer, statement) == expected


def test_rooms_are_in_this_order() -> None:
    modules = [
        "pipeline.storage",
        "pipeline.reading.files",
        "pipeline.features.sql",
        "pipeline.models.pack",
        "pipeline.training.tuner",
        "pipeline.runs.plan",
        "pipeline.scoring.rows",
        "pipeline.reporting.plots",
        "pipeline.spark.training",
        "pipeline.testing.doubles",
        "resources.build",
        "assets.raw",
        "pipeline.definitions",
    ]
    places = [ROOMS.index(find_room(module)) for module in modules]
    assert places == sorted(places)
    assert len(set(places)) == len(modules)
    # A file whose name only begins like a room's is ground.
    assert find_room("pipeline.spark_names") == find_room("pipeline.errors") == "pipeline"


def test_a_package_without_a_place_is_refused_by_name(measure: Measure) -> None:
    with pytest.raises(NotMeasured, match=r"pipeline\.monitoring has no place in ROOMS"):
        measure({"pipeline/monitoring/drift.py": "x = 1\n"})


def test_other_folders_are_not_measured(measure: Measure) -> None:
    files = {
        "tests/a.py": "#" * 200,
        "benchmarks/a.py": "#" * 200,
        "pipeline/a.sql": "-" * 200,
        "pipeline/a.py": "x = 1\n",
    }
    assert measure(files)["over-100"] == 0


def test_a_folder_without_code_and_a_file_that_is_not_python_have_no_shape(
    measure: Measure,
) -> None:
    with pytest.raises(NotMeasured, match="holds no Python code"):
        measure({"pipeline/a.py": "\n"})
    with pytest.raises(NotMeasured, match=r"assets/b\.py is not Python"):
        measure({"assets/b.py": "def"})


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.py").write_bytes(b"x = 1\r\n\x0c\r\ny = 2")
    (source,) = read_sources(tmp_path)
    assert list(source.lines) == ["x = 1", "\x0c", "y = 2"]


def test_the_worst_ten_places_of_each_kind_are_printed_largest_first(
    measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join("#" * (101 + number) + "\n" for number in range(11))
    functions = """
class Actor:
    first = [a for a in ()]

    @decorated
    def act(self, a, b, c, d, e, f, g):
        def inner():
            return [1 if a else 2 for a in ()], {a for a in ()}

        from assets import raw
"""
    measure(
        {"pipeline/a.py": lines, "pipeline/b.py": functions, "assets/raw.py": "x = 1 if y else 2\n"}
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "  characters of a line, largest first:"
    assert printed[1:11] == [f"    pipeline/a.py:{line} {100 + line}" for line in range(11, 1, -1)]
    assert printed[11:] == [
        "  comprehensions of a function, largest first:",
        "    pipeline/b.py:7 2 inner",
        "    pipeline/b.py:2 1 Actor",
        "  conditional expressions of a function, largest first:",
        "    assets/raw.py:1 1 assets.raw",
        "    pipeline/b.py:7 1 inner",
        "  parameters of a function, largest first:",
        "    pipeline/b.py:6 7 act",
        "  rooms that an import goes up, largest first:",
        "    pipeline/b.py:10 12 assets.raw",
    ]
