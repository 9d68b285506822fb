"""`python -m benchmarks`: list the figures; `python -m benchmarks NAME ...`: measure some.

`all`: measure every one.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import FIGURES, Figure
from benchmarks.runs import NotMeasured, Runs, describe_machine

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for.

    Returns:
        0 where every value holds, 1 where one falls short or could not be measured; a wrong name
        ends the process with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure figures from the outside, each on fresh data. Without a name: list "
        "them.",
        epilog="The last lines are one per value: NAME VALUE UNIT target OP LIMIT "
        "ok|short|printed. "
        "Exit status: 0 all hold, 1 one falls short or could not be measured, 2 there is no such "
        "figure.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a figure, or all; figures that need the same run share it",
    )
    parser.add_argument(
        "--panels",
        type=Path,
        metavar="FOLDER",
        help="further panels for blend-safety and blend-truth, as Parquet files",
    )
    parsed = parser.parse_args(arguments)
    names = parsed.names
    for name in names:
        if name not in FIGURES and name != ALL:
            near = difflib.get_close_matches(name, [*FIGURES, ALL])
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(FIGURES)}"
            )
            parser.error(f"there is no figure {name!r}; {hint}")
    if not names:
        print("\n".join(_listed(figure) for figure in FIGURES.values()))
        return 0
    return _measure(
        list(FIGURES.values())
        if ALL in names
        else [FIGURES[name] for name in dict.fromkeys(names)],
        parsed.panels,
    )


def _listed(figure: Figure) -> str:
    targets = ", ".join(
        f"{value.part or 'value'} {value.target} {value.unit}"
        for value in figure.values
        if value.limit is not None
    )
    return f"{figure.name}  (about {figure.minutes:g} min)\n    {figure.what}\n    {targets}"


def _measure(figures: Sequence[Figure], panels: Path | None) -> int:
    print(describe_machine())
    lines, failures, held = [], [], True
    with Runs(panels) as runs:
        for figure in figures:
            print(f"{figure.name}: {figure.what}", flush=True)
            try:
                measured = figure.measure(runs)
            except NotMeasured as error:
                failures.append(f"{figure.name} could not be measured: {error}")
                continue
            lines += [value.line(figure.name, measured[value.part]) for value in figure.values]
            held = held and all(value.holds(measured[value.part]) for value in figure.values)
    for failure in failures:
        print(failure, file=sys.stderr)
    print("\n".join(lines))
    return 0 if held and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
