"""The shape of the code: its length and density, and the imports that run against its layers.

Everything is counted in the syntax tree of each file; nothing of the measured code is imported.
"""

import ast
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import NotMeasured

PACKAGES = ("pipeline", "assets", "resources")
# Lowest first; a module belongs to the longest entry that it lies in.
ROOMS = (
    "pipeline",
    "pipeline.reading",
    "pipeline.features",
    "pipeline.grouping",
    "pipeline.models",
    "pipeline.training",
    "pipeline.runs",
    "pipeline.scoring",
    "pipeline.reporting",
    "pipeline.spark",
    "pipeline.testing",
    "resources",
    "assets",
    "pipeline.definitions",
)
NOT_LOOKED_AT = "pipeline.defs"
TESTING = "pipeline.testing"

MAX_LINE_CHARACTERS = 100
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
MAX_PLACES_SHOWN = 10

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
CONDITIONALS = (ast.IfExp,)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One Python file.

    Args:
        file: its path below the root.
        module: its dotted name; that of the package for an `__init__.py`.
        lines: without their ends.
        tree: its syntax tree.
    """

    file: str
    module: str
    lines: Sequence[str]
    tree: ast.Module


@dataclass(frozen=True)
class Place:
    """Somewhere to go and look.

    Args:
        file: path below the root.
        line: counted from 1.
        number: what is too large there, in the unit of its kind.
        name: the function, class or imported module; empty for a line.
    """

    file: str
    line: int
    number: int
    name: str = ""


def measure_shape(root: Path) -> Mapping[str, float]:
    """Count what makes code hard to read, and print the worst places of each kind.

    Args:
        root: folder that holds pipeline/, assets/ and resources/; one that lacks some is measured
            without them.

    Returns:
        Each value by its part: `over-100` in percent of all lines, `comprehensions` and
        `conditionals` per 1,000 non-blank lines, the others as counts.

    Raises:
        NotMeasured: if there is no code, a file is not Python, or a package has no place in ROOMS.
    """
    sources = read_sources(root)
    modules = {source.module for source in sources}
    n_lines = 0
    n_filled = 0
    long_lines: list[Place] = []
    comprehensions: list[Place] = []
    conditionals: list[Place] = []
    long_functions: list[Place] = []
    wide_functions: list[Place] = []
    upward: list[Place] = []
    for source in sources:
        n_lines += len(source.lines)
        n_filled += sum(bool(line.strip()) for line in source.lines)
        long_lines += find_long_lines(source)
        comprehensions += count_expressions(source, COMPREHENSIONS)
        conditionals += count_expressions(source, CONDITIONALS)
        long_functions += find_long_functions(source)
        wide_functions += find_wide_functions(source)
        upward += find_upward_imports(source, modules)
    if not n_filled:
        raise NotMeasured(f"{root} holds no Python code under {', '.join(PACKAGES)}")

    _print_worst("characters of a line", long_lines)
    _print_worst("comprehensions of a function", comprehensions)
    _print_worst("conditional expressions of a function", conditionals)
    _print_worst("lines of a function", long_functions)
    _print_worst("parameters of a function", wide_functions)
    _print_worst("rooms that an import goes up", upward)
    return {
        "over-100": 100 * len(long_lines) / n_lines,
        "comprehensions": 1000 * _add_numbers(comprehensions) / n_filled,
        "conditionals": 1000 * _add_numbers(conditionals) / n_filled,
        "functions-over-60": float(len(long_functions)),
        "parameters-over-6": float(len(wide_functions)),
        "upward": float(len(upward)),
    }


def read_sources(root: Path) -> list[Source]:
    """Read every Python file of the measured packages, in the order of their paths.

    Raises:
        NotMeasured: if a file is not Python, naming it.
    """
    sources: list[Source] = []
    for package in PACKAGES:
        paths = sorted((root / package).rglob("*.py"))
        sources += [_read_source(path, path.relative_to(root)) for path in paths]
    return sources


def _read_source(path: Path, below_root: Path) -> Source:
    try:
        # Reads the encoding that the file declares, and every kind of line end as \n.
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text, filename=str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise NotMeasured(f"{path} is not Python: {error}") from error
    # Not str.splitlines, which also ends a line at a form feed.
    lines = text.removesuffix("\n").split("\n") if text else []
    parts = list(below_root.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return Source(below_root.as_posix(), ".".join(parts), lines, tree)


def find_long_lines(source: Source) -> list[Place]:
    """Find the lines of more than 100 characters; `number` is their length."""
    places: list[Place] = []
    for line, text in enumerate(source.lines, start=1):
        if len(text) > MAX_LINE_CHARACTERS:
            places.append(Place(source.file, line, len(text)))
    return places


def count_expressions(source: Source, kinds: tuple[type[ast.expr], ...]) -> list[Place]:
    """Count expressions of some kinds by the innermost function or class around them.

    Returns:
        One place per function or class that holds any; those of neither stand at line 1.
    """
    counts: dict[ast.AST, int] = {}

    def visit(node: ast.AST, owner: ast.AST) -> None:
        if isinstance(node, kinds):
            counts[owner] = counts.get(owner, 0) + 1
        inner = node if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else owner
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(source.tree, source.tree)
    places: list[Place] = []
    for owner, number in counts.items():
        line = getattr(owner, "lineno", 1)
        name = getattr(owner, "name", source.module)
        places.append(Place(source.file, line, number, name))
    return places


def find_long_functions(source: Source) -> list[Place]:
    """Find functions and methods of more than 60 lines; `number` is their length.

    Counted from `def`, so without decorators, to the last line, docstring included.
    """
    places: list[Place] = []
    for function in _functions(source.tree):
        last_line = function.end_lineno or function.lineno
        length = last_line - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            places.append(Place(source.file, function.lineno, length, function.name))
    return places


def find_wide_functions(source: Source) -> list[Place]:
    """Find functions and methods of more than six parameters; `number` is how many they have.

    Keyword-only ones, `*args` and `**kwargs` count; a leading `self` or `cls` does not.
    """
    places: list[Place] = []
    for function in _functions(source.tree):
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        if positional and positional[0].arg in ("self", "cls"):
            positional = positional[1:]
        number = len(positional) + len(arguments.kwonlyargs)
        number += arguments.vararg is not None
        number += arguments.kwarg is not None
        if number > MAX_PARAMETERS:
            places.append(Place(source.file, function.lineno, number, function.name))
    return places


def find_upward_imports(source: Source, modules: set[str]) -> list[Place]:
    """Find imports of a module in a higher room, wherever in the file they stand.

    Args:
        source: the file that imports.
        modules: dotted names of all measured modules; they tell a module from a name in one.

    Returns:
        One place per imported module and statement; `number` is how many rooms higher it is.

    Raises:
        NotMeasured: if the file lies in a package that ROOMS does not list.
    """
    if _lies_in(source.module, NOT_LOOKED_AT):
        return []
    room = find_room(source.module)
    places: list[Place] = []
    for node in ast.walk(source.tree):
        for module in sorted(_imported_modules(node, source, modules)):
            if _lies_in(module, NOT_LOOKED_AT):
                continue
            if room == TESTING and _lies_in(module, "pipeline"):
                continue
            n_rooms_up = ROOMS.index(find_room(module)) - ROOMS.index(room)
            if n_rooms_up > 0:
                places.append(Place(source.file, node.lineno, n_rooms_up, module))  # type: ignore[attr-defined]
    return places


def find_room(module: str) -> str:
    """Find the room of a module of the measured packages.

    Raises:
        NotMeasured: if it lies in a package that ROOMS does not list.
    """
    room = max((room for room in ROOMS if _lies_in(module, room)), key=len)
    is_directly_below = module.count(".") <= 1
    if room == "pipeline" and not is_directly_below:
        package = ".".join(module.split(".")[:2])
        raise NotMeasured(f"{package} has no place in ROOMS of benchmarks/shape.py; add it there")
    return room


def _imported_modules(node: ast.AST, source: Source, modules: set[str]) -> set[str]:
    """The measured modules that a statement imports; empty for any other node."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        origin = _origin(node, source)
        names = [f"{origin}.{alias.name}" for alias in node.names]
    imported: set[str] = set()
    for name in names:
        # What is imported from a module may be a module or a name in it.
        known = name
        while known and known not in modules:
            known = known.rpartition(".")[0]
        if known:
            imported.add(known)
    return imported


def _origin(node: ast.ImportFrom, source: Source) -> str:
    """The dotted name after `from`, with leading dots replaced by what they stand for."""
    if not node.level:
        return node.module or ""
    parts = source.module.split(".")
    is_package = source.file.endswith("__init__.py")
    n_dropped = node.level - is_package
    kept = parts[: len(parts) - n_dropped]
    return ".".join([*kept, node.module] if node.module else kept)


def _lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            yield node


def _add_numbers(places: Sequence[Place]) -> int:
    return sum(place.number for place in places)


def _print_worst(title: str, places: Sequence[Place]) -> None:
    if not places:
        return
    worst = sorted(places, key=lambda place: (-place.number, place.file, place.line))
    print(f"  {title}, largest first:", flush=True)
    for place in worst[:MAX_PLACES_SHOWN]:
        print(f"    {place.file}:{place.line} {place.number} {place.name}".rstrip(), flush=True)
