# ruff: noqa: INP001
"""Draw the pictures of docs/concepts.md: ``python docs/images/concepts.py``.

The numbers are facts of the example fleets (their files, ``defs.yaml`` and runs of them),
except where a picture says that a number is made up. The same matplotlib writes the same bytes.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent / "concepts"
WIDTH_INCHES = 8.0
WIDTH = 100.0  # pictures are drawn in hundredths of their width

INK = "#1f2933"
MUTED = "#5f6b76"
BLUE = "#2f6690"
PALE_BLUE = "#dce8f1"
ORANGE = "#c8590a"
PALE_ORANGE = "#fbe6d4"
GREY = "#c3c9cf"
PALE_GREY = "#eef0f2"

LARGE = 14.0
MEDIUM = 12.0
SMALL = 11.0

POINTS_PER_UNIT = WIDTH_INCHES * 72 / WIDTH
HALF_CAPITAL = 0.365  # of the font's size


def make_canvas(height: float) -> tuple[Figure, Axes]:
    """An empty white picture, 100 wide and ``height`` high, with the origin at the bottom left."""
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * height / WIDTH), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def draw_text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = MEDIUM,
    color: str = INK,
    align: str = "center",
    bold: bool = False,
) -> None:
    """Write text with its middle at the height y; words of one line share a baseline."""
    one_line = "\n" not in text
    drop = HALF_CAPITAL * size / POINTS_PER_UNIT if one_line else 0.0
    axes.text(
        x,
        y - drop,
        text,
        fontsize=size,
        color=color,
        ha=align,
        va="baseline" if one_line else "center",
        fontweight="bold" if bold else "normal",
        linespacing=1.35,
    )


def draw_box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    *,
    fill: str = PALE_BLUE,
    edge: str = BLUE,
    size: float = MEDIUM,
    color: str = INK,
    bold: bool = False,
    dashed: bool = False,
) -> None:
    """Draw a box whose lower left corner is (x, y), with text in its middle."""
    box = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=1",
        facecolor=fill,
        edgecolor=edge,
        linewidth=1.5,
        linestyle="--" if dashed else "-",
    )
    axes.add_patch(box)
    draw_text(axes, x + width / 2, y + height / 2, text, size=size, color=color, bold=bold)


def draw_line(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    color: str = MUTED,
    arrow: str = "-",
    dashed: bool = False,
    thick: float = 1.5,
) -> None:
    """Draw a line, or with ``arrow="-|>"`` an arrow."""
    style = {
        "arrowstyle": arrow,
        "color": color,
        "linewidth": thick,
        "linestyle": "--" if dashed else "-",
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 14,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_dot(axes: Axes, x: float, y: float, *, color: str = BLUE, hollow: bool = False) -> None:
    """Draw a point; a hollow one is not known yet."""
    axes.plot(
        [x],
        [y],
        marker="o",
        markersize=9,
        markeredgewidth=1.8,
        markeredgecolor=color,
        markerfacecolor="white" if hollow else color,
    )


def draw_fleet() -> Figure:
    """One file, many models, one registered model."""
    figure, axes = make_canvas(36)
    draw_box(axes, 2, 9, 21, 17, fill=PALE_GREY, edge=MUTED)
    draw_text(axes, 12.5, 22.5, "defs.yaml", bold=True)
    draw_text(axes, 4, 15, "name: housing\ngrains: [[], [city]]\n...", size=SMALL, align="left")
    draw_line(axes, (24, 17.5), (30, 17.5), arrow="-|>")

    draw_box(axes, 31, 24, 34, 6, "all cities together", fill=BLUE, color="white", bold=True)
    for row, names in enumerate((("Austin", "Dallas", "El Paso"), ("Houston", "Waco", "..."))):
        for column, name in enumerate(names):
            draw_box(axes, 31 + 11.75 * column, 16 - 7.5 * row, 10.5, 6, name, size=SMALL)
    draw_text(axes, 48, 4, "47 groups: 46 cities, and all of Texas", size=SMALL, color=MUTED)
    draw_line(axes, (66, 17.5), (72, 17.5), arrow="-|>")

    draw_box(axes, 73, 9, 25, 17, fill=PALE_ORANGE, edge=ORANGE)
    draw_text(axes, 85.5, 21.5, "housing", bold=True)
    draw_text(axes, 85.5, 14.5, "one registered model\nanswers for every city", size=SMALL)
    draw_text(axes, 12.5, 33, "you write", color=MUTED)
    draw_text(axes, 48, 33, "a run trains", color=MUTED)
    draw_text(axes, 85.5, 33, "you deploy", color=MUTED)
    return figure


def draw_grain() -> Figure:
    """The tree of the flights fleet, with the rows of some groups."""
    figure, axes = make_canvas(48)
    levels = (
        (41, "[]", "1 group"),
        (25.5, "[origin]", "3 groups"),
        (8, "[origin, dest]", "224 groups"),
    )
    for y, grain, count in levels:
        draw_text(axes, 1, y + 1.3, grain, align="left", bold=True, color=BLUE)
        draw_text(axes, 1, y - 1.7, count, align="left", size=SMALL, color=MUTED)

    origins = (("EWR", "120,835", 34.5), ("JFK", "111,279", 61), ("LGA", "104,662", 86))
    routes = (
        ("EWR, IAH", "3,973", 28.5, 34.5),
        ("EWR, MSN", "354", 45, 34.5),
        ("JFK, LAX", "11,262", 61, 61),
        ("LGA, ATL", "10,263", 77, 86),
        ("LGA, LEX", "1", 92, 86),
    )
    for name, rows, x in origins:
        draw_line(axes, (60, 37.5), (x, 29))
        draw_box(axes, x - 8, 22, 16, 7, f"{name}\n{rows} flights", size=SMALL)
    draw_box(axes, 46, 37.5, 28, 7.5, "all flights\n336,776", fill=BLUE, color="white", bold=True)
    for name, rows, x, parent in routes:
        draw_line(axes, (parent, 22), (x, 12.5))
        unit = "flight" if rows == "1" else "flights"
        fill, edge = (PALE_ORANGE, ORANGE) if rows == "1" else ("white", BLUE)
        text = f"{name}\n{rows}\n{unit}"
        draw_box(axes, x - 6.7, 3.5, 13.4, 9, text, size=SMALL, fill=fill, edge=edge)
    draw_text(axes, 6, 33.3, "finer", align="left", size=SMALL, color=MUTED)
    draw_line(axes, (4, 36.5), (4, 30), arrow="-|>")
    draw_text(axes, 6, 17, "finer", align="left", size=SMALL, color=MUTED)
    draw_line(axes, (4, 21), (4, 13), arrow="-|>")
    return figure


def draw_entity() -> Figure:
    """Rows of the group LGA to ATL: two entities, and the columns that name a row."""
    figure, axes = make_canvas(40)
    columns = (
        (10, "carrier"),
        (22, "flight"),
        (33, "origin"),
        (43, "dest"),
        (58, "scheduled_at"),
        (75, "arr_delay"),
    )
    draw_box(axes, 4, 3.5, 43.5, 28.5, fill=PALE_BLUE, edge=BLUE)
    for x, heading, color in (
        (25.7, "entity: what is observed\nagain and again", BLUE),
        (58, "time: which\nobservation", ORANGE),
        (75, "target: what\nwas observed", MUTED),
    ):
        draw_text(axes, x, 36.5, heading, color=color, bold=True, size=SMALL)
    for x, name in columns:
        draw_text(axes, x, 29.5, name, bold=True, size=SMALL)
    rows = (
        ("DL", "1747", "LGA", "ATL", "1 April, 9:00", "-24"),
        ("DL", "1747", "LGA", "ATL", "2 April, 9:00", "-3"),
        ("DL", "1747", "LGA", "ATL", "3 April, 9:00", "8"),
        ("DL", "1847", "LGA", "ATL", "2 April, 10:00", "-24"),
        ("DL", "1947", "LGA", "ATL", "2 April, 12:00", "-15"),
    )
    heights = (25, 21, 17, 11, 6)
    for cells, y in zip(rows, heights, strict=True):
        for (x, _), cell in zip(columns, cells, strict=True):
            draw_text(axes, x, y, cell, size=SMALL)
    draw_line(axes, (6, 14), (80, 14), color=GREY, thick=1)
    draw_line(axes, (6, 8.5), (80, 8.5), color=GREY, thick=1)
    draw_text(axes, 82.5, 21, "one entity,\nthree rows", align="left", size=SMALL, color=BLUE)
    draw_text(axes, 82.5, 11, "another", align="left", size=SMALL, color=BLUE)
    draw_text(axes, 82.5, 6, "and another", align="left", size=SMALL, color=BLUE)
    return figure


def draw_as_of() -> Figure:
    """The flights fleet pretends that 24 December has just begun."""
    figure, axes = make_canvas(37)
    as_of = 62
    draw_box(axes, 2, 12.5, as_of - 2, 9, fill=PALE_BLUE, edge="white")
    draw_box(axes, as_of, 12.5, 98 - as_of, 9, fill=PALE_GREY, edge="white")
    draw_text(axes, 31, 17, "known: models learn from it", bold=True, color=BLUE)
    draw_text(axes, 80.5, 17, "hidden from training", bold=True, color=MUTED)
    draw_line(axes, (2, 12.5), (98, 12.5), arrow="-|>", color=INK)
    draw_line(axes, (as_of, 10), (as_of, 31), color=ORANGE, thick=2.5)
    draw_text(axes, as_of, 34, 'as_of: "2013-12-24"', color=ORANGE, bold=True)
    for x, label in ((9, "22 Dec"), (35.5, "23 Dec"), (as_of, "24 Dec"), (88.5, "25 Dec")):
        draw_line(axes, (x, 11.7), (x, 13.3), color=INK)
        draw_text(axes, x, 8, label, size=SMALL)
    draw_line(axes, (58.3, 25), (63.5, 25), color=INK, thick=2)
    draw_dot(axes, 58.3, 25)
    draw_dot(axes, 63.5, 25, hollow=True)
    draw_text(axes, 56.5, 26.5, "DL 2065, New York to Fort Lauderdale", align="right", size=SMALL)
    draw_text(axes, 56.5, 23.5, "due to leave at 20:35", align="right", size=SMALL)
    draw_text(axes, 65.5, 26.5, "lands at 1:23, so its", align="left", size=SMALL)
    draw_text(axes, 65.5, 23.5, "delay is not known yet", align="left", size=SMALL)
    note = "flights due to leave from here on are predicted"
    draw_text(axes, 98, 3, note, align="right", size=SMALL)
    return figure


def draw_horizon() -> Figure:
    """Austin's median price: August is predicted one month ahead."""
    figure, axes = make_canvas(42)
    prices = (243.8, 238.9, 239.6, 242.1, 245.7, 237.5, 245.3, 253.9, 270.3, 271.2, 270.2, 264.6)
    autumn = ("Aug\n2014", "Sep", "Oct", "Nov", "Dec")
    months = (*autumn, "Jan\n2015", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug")
    left, step = 8.0, 6.9
    places = [left + step * number for number in range(len(months))]
    heights = [12 + (price - 235) * 0.42 for price in prices]
    july, august = places[-2], places[-1]
    draw_line(axes, (3, 9), (98, 9), color=INK, arrow="-|>")
    for x, month in zip(places, months, strict=True):
        draw_text(axes, x, 5.2, month, size=SMALL)
    axes.plot(places[:-1], heights, color=BLUE, linewidth=1.5)
    for x, y in zip(places[:-1], heights, strict=True):
        draw_dot(axes, x, y)
    draw_dot(axes, august, heights[-1], color=ORANGE, hollow=True)
    draw_text(axes, august + 2.3, heights[-1], "?", size=LARGE, color=ORANGE, bold=True)
    draw_line(axes, (july, 9), (july, 35.5), color=MUTED, dashed=True)
    draw_line(axes, (august, 9), (august, 35.5), color=ORANGE, dashed=True)
    draw_line(axes, (july, 34), (august, 34), color=ORANGE, arrow="<|-|>", thick=2)
    draw_text(axes, (july + august) / 2 - 1, 38.5, "horizon: 1 month", bold=True, color=ORANGE)
    draw_line(axes, (july - 0.7, 34), (3, 34), color=BLUE, arrow="-|>", thick=2)
    draw_text(axes, 39, 38.5, "what the answer for August may use", bold=True, color=BLUE)
    draw_text(axes, 3, 28.5, "Austin, median price", size=SMALL, color=MUTED, align="left")
    draw_text(axes, places[0], heights[0] + 3.5, "243,800 (lag 12)", size=SMALL, align="left")
    draw_text(axes, july - 1.5, heights[-1] - 5, "264,600 (lag 1)", size=SMALL, align="right")
    return figure


def draw_known_at() -> Figure:
    """A flight of 9:00 whose delay is known at 11:40, and two flights that follow it."""
    figure, axes = make_canvas(42)

    def place(hour: float) -> float:
        return 34 + (hour - 8.75) * 16.5

    landing = 11 + 40 / 60
    draw_box(axes, place(landing), 8.5, 98 - place(landing), 27, fill=PALE_BLUE, edge="white")
    draw_line(axes, (32, 8.5), (98, 8.5), color=INK, arrow="-|>")
    for hour in (9, 10, 11, 12):
        draw_line(axes, (place(hour), 7.7), (place(hour), 9.3), color=INK)
        draw_text(axes, place(hour), 5, f"{hour}:00", size=SMALL)

    draw_text(axes, 2, 31, "DL 1747 at 9:00", align="left", bold=True)
    draw_text(axes, 2, 28, "New York to Atlanta", align="left", size=SMALL, color=MUTED)
    draw_line(axes, (place(9), 30), (place(landing), 30), color=BLUE, thick=4)
    draw_dot(axes, place(9), 30)
    draw_dot(axes, place(landing), 30, color=ORANGE)
    draw_text(axes, place(9), 34, "due to leave: time", size=SMALL, color=BLUE, bold=True)
    landed = "lands at 11:40: known_at"
    draw_text(axes, place(landing), 39, landed, size=SMALL, color=ORANGE, bold=True)
    draw_text(axes, 89.5, 30, "3 minutes\nearly", size=SMALL)
    draw_line(axes, (place(landing), 8.5), (place(landing), 37), color=ORANGE, dashed=True)

    draw_text(axes, 2, 22.5, "DL 1647 at 11:00", align="left", bold=True)
    draw_text(axes, 2, 19.5, "New York to Atlanta", align="left", size=SMALL, color=MUTED)
    draw_dot(axes, place(11), 21, color=MUTED)
    draw_text(axes, place(11) - 2.5, 21, "must not use the delay", align="right", size=SMALL)

    draw_text(axes, 2, 14.5, "DL 1947 at 12:00", align="left", bold=True)
    draw_text(axes, 2, 11.5, "New York to Atlanta", align="left", size=SMALL, color=MUTED)
    draw_dot(axes, place(12), 13)
    draw_text(axes, place(12) - 7.5, 13, "may use it", align="right", size=SMALL)
    return figure


def draw_split() -> Figure:
    """The three parts of the flights fleet's year."""
    figure, axes = make_canvas(37)

    def place(month: float) -> float:
        return 3 + (month - 5) * 13.2

    as_of = 11 + 23 / 31
    parts = (
        (5, 9, "fit", BLUE, "white"),
        (9, 11, "tune", PALE_BLUE, INK),
        (11, as_of, "report", PALE_ORANGE, INK),
    )
    for start, end, name, fill, color in parts:
        width = place(end) - place(start)
        draw_box(axes, place(start), 12, width, 9, fill=fill, edge="white")
        draw_text(axes, place(start) + width / 2, 16.5, name, bold=True, color=color)
    draw_text(axes, 5, 16.5, "... since January", color="white", align="left", size=SMALL)
    draw_line(axes, (3, 10), (98, 10), color=INK, arrow="-|>")
    for number, name in enumerate(("Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), start=5):
        draw_line(axes, (place(number), 9.2), (place(number), 10.8), color=INK)
        draw_text(axes, place(number) + 6, 7, name, size=SMALL)
    draw_text(axes, place(7), 25, "trees are fitted on it", size=SMALL)
    tasks = "stops boosting, chooses\nparameters and weights"
    draw_text(axes, place(10) - 3, 25.5, tasks, size=SMALL)
    draw_text(axes, place(11) - 2, 31, "judges the result", align="right", size=SMALL)
    draw_line(axes, (place(11) - 1, 31), (place(11.37), 31), color=MUTED)
    draw_line(axes, (place(11.37), 31), (place(11.37), 21.5), color=MUTED, arrow="-|>")
    draw_line(axes, (place(as_of), 5), (place(as_of), 30), color=ORANGE, thick=2.5)
    label = "as-of: 24 December 2013"
    draw_text(axes, place(as_of), 2.5, label, color=ORANGE, bold=True, align="right", size=SMALL)
    return figure


def draw_blend() -> Figure:
    """One flight, three models, one answer: the weights are the README's, the minutes made up."""
    figure, axes = make_canvas(46)
    rows = (
        (33, "[]", "all flights", "10.0", "1.00: its own alone", "10.0"),
        (
            19.5,
            '["EWR"]',
            "from Newark",
            "15.0",
            "0.40 \u00d7 15.0 + 0.60 \u00d7 10.0\n= 6.0 + 6.0",
            "12.0",
        ),
        (
            6,
            '["EWR","MSN"]',
            "Newark to Madison",
            "21.0",
            "0.20 \u00d7 21.0 + 0.80 \u00d7 12.0\n= 4.2 + 9.6",
            "13.8",
        ),
    )
    headings = ((12, "group"), (34, "its own model"), (59, "weights"), (85, "its answer"))
    for x, heading in headings:
        draw_text(axes, x, 42.5, heading, size=SMALL, color=MUTED)
    for y, group, label, own, terms, answer in rows:
        last = group == '["EWR","MSN"]'
        draw_text(axes, 12, y + 4.4, group, bold=True, size=SMALL)
        draw_text(axes, 12, y + 1.4, label, size=SMALL, color=MUTED)
        draw_box(axes, 28, y, 12, 6, own, bold=True)
        draw_line(axes, (40.5, y + 3), (45, y + 3), color=BLUE, arrow="-|>")
        draw_text(axes, 59.5, y + 3, terms, size=SMALL)
        draw_line(axes, (74, y + 3), (78.5, y + 3), color=ORANGE, arrow="-|>")
        fill = ORANGE if last else PALE_ORANGE
        color = "white" if last else INK
        draw_box(axes, 79, y, 12, 6, answer, fill=fill, edge=ORANGE, bold=True, color=color)
        if not last:
            draw_line(axes, (85, y - 0.3), (70, y - 6.8), color=ORANGE, arrow="-|>")
            draw_text(axes, 83, y - 4.8, "parent's", size=SMALL, color=ORANGE, align="left")
    note = "minutes late; the weights are those of a real run, the minutes are made up"
    draw_text(axes, 98, 2, note, size=SMALL, color=MUTED, align="right")
    return figure


def draw_weight() -> Figure:
    """Where real groups stand between their parent and themselves."""
    figure, axes = make_canvas(43)

    def place(weight: float) -> float:
        return 8 + 84 * weight

    draw_line(axes, (place(0), 17), (place(1), 17), color=INK, thick=2.5)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw_line(axes, (place(tick), 16), (place(tick), 18), color=INK)
        draw_text(axes, place(tick), 13, f"{tick:g}", bold=True)
    notes = (
        (2.0, "left", "the parent answers"),
        (50.0, "center", "half and half"),
        (98.0, "right", "the group's own model answers"),
    )
    for x, align, note in notes:
        draw_text(axes, x, 9, note, align=align, color=MUTED, size=SMALL)
    groups = (
        (0.0, '["LGA","EYW"]: 0.00', "10 rows, too few for a model", 38.5, 35.5, 2, "left"),
        (0.2, '["EWR","MSN"]: 0.20', "337 rows; all routes share it", 31.5, 28.5, 24, "left"),
        (0.4, '["EWR"]: 0.40', "114,739 rows; all airports share it", 24.5, 21.5, 41, "left"),
        (1.0, "[]: 1.00", "all 320,458 rows", 24.5, 21.5, 98, "right"),
    )
    for weight, group, rows, y, top, x, align in groups:
        draw_line(axes, (place(weight), 17), (place(weight), top), color=BLUE)
        draw_dot(axes, place(weight), 17, color=ORANGE if weight == 0 else BLUE)
        draw_text(axes, x, y + 1.4, group, align=align, bold=True, size=SMALL)
        draw_text(axes, x, y - 1.4, rows, align=align, size=SMALL, color=MUTED)
    rule = "answer = weight \u00d7 own + (1 - weight) \u00d7 parent's"
    draw_text(axes, 50, 3.5, rule, bold=True, color=BLUE)
    return figure


def draw_champion() -> Figure:
    """A challenger replaces the champion group by group; the outcomes are made up."""
    figure, axes = make_canvas(50)
    draw_text(axes, 13, 46, "version 1\nthe champion: serves", bold=True, size=SMALL, color=BLUE)
    draw_text(axes, 42, 46, "version 2\nthe challenger", bold=True, size=SMALL, color=ORANGE)
    draw_text(axes, 86, 46, "version 3\nserves from now on", bold=True, size=SMALL)
    rows = (
        (33, "EWR, IAH", "EWR, IAH", "version 2 is better\non 259 report rows", True),
        (
            20,
            "JFK, LAX",
            "JFK, LAX\nfitted again",
            "no clear difference\non 707 report rows",
            False,
        ),
        (7, "EWR, MSN", "EWR, MSN", "21 report rows are too\nfew: as its parent, EWR", True),
    )
    for y, group, served, verdict, moves in rows:
        draw_box(axes, 5, y, 16, 7, group, size=SMALL)
        draw_text(axes, 27.5, y + 3.5, "against", size=SMALL, color=MUTED)
        draw_box(axes, 34, y, 16, 7, group, fill=PALE_ORANGE, edge=ORANGE, size=SMALL)
        fill, edge = (PALE_ORANGE, ORANGE) if moves else (PALE_BLUE, BLUE)
        draw_box(axes, 78, y, 16, 7, served, fill=fill, edge=edge, size=SMALL)
        draw_text(axes, 64, y + 6.4, verdict, size=SMALL)
        draw_line(axes, (51, y + 2), (77, y + 2), arrow="-|>")
    note = "real groups and rows, made-up outcomes"
    draw_text(axes, 98, 2, note, size=SMALL, color=MUTED, align="right")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "fleet": draw_fleet,
    "grain": draw_grain,
    "entity": draw_entity,
    "as-of": draw_as_of,
    "horizon": draw_horizon,
    "known-at": draw_known_at,
    "split": draw_split,
    "blend": draw_blend,
    "weight": draw_weight,
    "champion": draw_champion,
}


def write_pictures(folder: Path = FOLDER) -> None:
    """Write every picture as ``<folder>/<name>.svg``."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, draw in PICTURES.items():
        with mpl.rc_context(
            {
                "svg.hashsalt": "many-models",  # the ids in the file do not change from run to run
                "svg.fonttype": "path",  # the words look the same on every machine
                "font.family": "DejaVu Sans",
                "text.color": INK,
            }
        ):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    write_pictures()
