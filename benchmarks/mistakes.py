"""Mistakes of users through the real commands: how long the message is, and whether it says where and what next.

Each mistake is made in a copy of a small project, and taken back afterwards.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.runs import NOT_INHERITED, NotMeasured, copy_repository

BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 300
DEFS = "pipeline/defs/shop/defs.yaml"
SQL = "pipeline/defs/shop/features.sql"
CSV = "pipeline/defs/shop/sales.csv"

FLEET = """type: assets.fleet.Fleet
attributes:
  name: shop
  sources:
    - {name: sales, uri: sales.csv}
  features:
    lags: [{column: amount, periods: [1]}]
    derived: {trend: amount_lag_1 * 2}
    calendar: [month]
  grains: [[], [store]]
  entity: [store]
  time: sold_on
  period: 1 month
  horizon: 1 month
  target: {column: amount}
  splits: {report: 6 months, tune: 6 months}
  tuning: {max_trials: 1, fit_rows: 10, tune_rows: 2}
  scoring: {score: future}
"""
SELECT = "SELECT store, CAST(sold_on AS DATE) AS sold_on, amount FROM sales\n"

CHECK = ("many-models", "check")
RUN = ("many-models", "run", "shop")
SCORE = ("many-models", "score", "shop", "--to", "answers", "--from")
STREAM = ("many-models", "stream", "shop", "--to", "live", "--from")
LAUNCH = ("dg", "launch", "--assets", 'group:"shop"')
CONSOLE = ("--config-json", '{"loggers": {"console": {"config": {}}}}')


@dataclass(frozen=True)
class Mistake:
    """A mistake, the command that meets it, and what its message must name.

    Args:
        what: for people.
        command: what is run.
        named: texts for where the mistake is: file, field, column or value.
        next_step: a pattern of what can be done about it.
        file: that is changed; none for a mistake in the command or its environment.
        old: text in that file; empty writes the whole file.
        new: what stands there instead.
        environment: variables of the command.
        status: exit status of the command; a stream that sets a file aside ends well.
    """

    what: str
    command: Sequence[str]
    named: tuple[str, ...]
    next_step: str
    file: str = ""
    old: str = ""
    new: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    status: int = 1


def _in_defs(
    old: str, new: str, named: str, next_step: str, command: Sequence[str] = CHECK
) -> Mistake:
    """A mistake in the fleet's defs.yaml."""
    return Mistake(f"{old} -> {new}", command, (DEFS, named), next_step, DEFS, old, new)


def _in_sql(
    new: str, named: tuple[str, ...], next_step: str, command: Sequence[str] = CHECK
) -> Mistake:
    """A mistake in the fleet's features.sql."""
    return Mistake(new, command, ("features.sql", *named), next_step, SQL, "", new)


MISTAKES = (
    _in_defs("period: 1 month", "perod: 1 month", "line 13: perod", "did you mean 'period'"),
    _in_defs("{column: amount}\n", "amount\n", "line 15: target", r"such as \{column: amount\}"),
    _in_defs("report: 6 months", "report: 0.2", "line 16: splits.report", "such as 12 months"),
    _in_defs("[[], [store]]", "[store]", "grains.0", r"such as \[store\]"),
    _in_defs("{name: sales, uri: sales.csv}", "sales.csv", "sources.0", r"such as \{name: sales"),
    _in_defs("max_trials: 1", "search: {num_leaves: 1}", "num_leaves", "2 or more"),
    _in_defs("max_trials: 1", "search: {learning_rate: 0}", "learning_rate", "more than 0"),
    _in_defs("max_trials: 1", "max_trials: many", "tuning.max_trials", "a whole number"),
    _in_defs("entity: [store]", "entity: [stoer]", "line 11: entity", "it gives: amount"),
    _in_defs("horizon: 1 month", "horizon: 3 months", "features.lags", "use a larger lag"),
    _in_defs("time: sold_on", "as_of: soon\n  time: sold_on", "as_of", "such as 2013-12-24"),
    _in_defs("score: future", "score: futur", "scoring.score", "did you mean 'future'"),
    _in_defs("[month]", "[mnth]", "features.calendar.0", "did you mean 'month'"),
    _in_defs("amount_lag_1 * 2", "amount * 2", "features.derived.trend", "known: amount_lag_1"),
    _in_defs("  period:", " period:", "line 13", "check indentation"),
    _in_defs("assets.fleet.Fleet", "assets.fleet.Flet", "Flet", "expected `type: assets"),
    _in_defs("name: shop", "name: housing", "line 3: name", "a name of its own"),
    _in_defs("target: {", "targt: {", "2 mistakes", "many-models check", ("dg", "check", "defs")),
    _in_defs("target: {", "targt: {", "line 15: targt", "did you mean", (*LAUNCH, *CONSOLE)),
    _in_sql("SELEC store FROM sales\n", (), "expected", CHECK),
    _in_sql("SELECT * FROM orders\n", ("orders",), "sales", CHECK),
    _in_sql(SELECT.replace("amount", "amont AS amount"), ("amont",), "has store, sold_on", RUN),
    Mistake(
        "a source that does not exist",
        RUN,
        ("'sales'", "/pipeline/defs/shop/nowhere.csv"),
        "expected a file",
        DEFS,
        "uri: sales.csv",
        "uri: nowhere.csv",
    ),
    Mistake(
        "a second date format",
        RUN,
        ("column 'sold_on'", "sales.csv", "'14.03.2021'"),
        "try_to_timestamp",
        CSV,
        "2021-03-01",
        "14.03.2021",
    ),
    Mistake(
        "a row that is listed twice",
        RUN,
        ('["a","2020-01-01 00:00:00"]', "features.sql"),
        "deduplicate",
        CSV,
        "a,2020-01-01,100.0\n",
        "a,2020-01-01,100.0\na,2020-01-01,100.0\n",
    ),
    Mistake(
        "an as-of that is not a date",
        RUN,
        ("MANY_MODELS_AS_OF", "'someday'"),
        "2013-12-24",
        environment={"MANY_MODELS_AS_OF": "someday"},
    ),
    Mistake(
        "a limit that is not a number",
        (*LAUNCH, *CONSOLE),
        ("MANY_MODELS_LIMIT_GROUPS", "'abc'", "a whole number of at least 1"),
        "correct or unset the variable",
        environment={"MANY_MODELS_LIMIT_GROUPS": "abc"},
    ),
    Mistake(
        "an as-of that is not a date, in a check",
        ("dg", "check", "defs"),
        ("MANY_MODELS_AS_OF", "'yesterdayish'", "2013-12-24"),
        "correct or unset the variable",
        environment={"MANY_MODELS_AS_OF": "yesterdayish"},
    ),
    Mistake(
        "an unknown fleet",
        ("many-models", "run", "shp"),
        ("'shp'",),
        "did you mean 'shop'",
        status=2,
    ),
    Mistake("a path without rows", (*SCORE, "nowhere.csv"), ("/nowhere.csv",), "expected a Delta"),
    Mistake(
        "rows without a column",
        (*SCORE, "rows.csv"),
        ("rows.csv", "missing columns: store"),
        "needs: ",
        "rows.csv",
        "",
        "stoer,month\na,1\n",
    ),
    Mistake(
        "a half-written file in a stream",
        (*STREAM, "incoming"),
        ("incoming/b.parquet",),
        "repair or remove the file",
        "incoming/b.parquet",
        "",
        "PAR1 half of a file",
        status=0,
    ),
)  # fmt: skip


def message_lines(folder: Path) -> Mapping[str, float]:
    """Make every mistake, and look at what a person sees.

    Args:
        folder: empty, for the project's copy and its data.

    Raises:
        NotMeasured: if the project does not work without a mistake, or a mistake is not met.
    """
    project = _project(folder)
    _run_sound_fleet(project)
    lines, named = [], 0
    for mistake in MISTAKES:
        started = time.monotonic()
        text = _message(project, mistake)
        n_lines = len(text.splitlines())
        missing = [part for part in mistake.named if part not in text]
        if not re.search(mistake.next_step, text):
            missing.append(mistake.next_step)
        lines.append(n_lines)
        named += not missing
        command, seconds = " ".join(mistake.command[:3]), time.monotonic() - started
        lacking = f"; not said: {missing}" if missing else ""
        print(
            f"  {n_lines:>3} lines, {seconds:>4.0f} s  {command}: {mistake.what!r}{lacking}",
            flush=True,
        )
        if missing or n_lines > 12:  # noqa: PLR2004 - what is short of the target is shown
            print("".join(f"      | {line}\n" for line in text.splitlines()[:40]), flush=True)
    return {"": max(lines), "named": named / len(MISTAKES), "mistakes": len(MISTAKES)}


def _project(folder: Path) -> Path:
    project = folder / "project"
    copy_repository(project)
    shutil.rmtree(project / "pipeline" / "defs" / "flights")
    for file, text in ((DEFS, FLEET), (SQL, SELECT)):
        (project / file).parent.mkdir(parents=True, exist_ok=True)
        (project / file).write_text(text)
    months = pd.date_range("2020-01-01", periods=36, freq="MS").strftime("%Y-%m-%d")
    rows = [
        (store, month, 100.0 * (place + 1) + number)
        for place, store in enumerate("abc")
        for number, month in enumerate(months)
    ]
    sales = pd.DataFrame(rows, columns=["store", "sold_on", "amount"])
    sales.to_csv(project / CSV, index=False)
    home = project / ".data" / "dagster"
    home.mkdir(parents=True)
    shutil.copy(project / "dagster.local.yaml", home / "dagster.yaml")
    return project


def _run_sound_fleet(project: Path) -> None:
    """Without a mistake everything works; `score` and `stream` need the model that it leaves."""
    for command in (CHECK, RUN):
        ended = _run(project, command, {})
        if ended.returncode:
            raise NotMeasured(
                f"{' '.join(command)} fails without a mistake:\n{ended.stdout[-4000:]}"
            )
    incoming = project / "incoming"
    incoming.mkdir()
    features = pd.read_parquet(min((project / ".data/tables/shop/features").glob("*.parquet")))
    features.head(5).to_parquet(incoming / "a.parquet")


def _message(project: Path, mistake: Mistake) -> str:
    """What the terminal shows of a mistake."""
    path = project / mistake.file if mistake.file else None
    before = path.read_text() if path is not None and path.exists() else None
    if path is not None:
        if mistake.old and mistake.old not in (before or ""):
            raise NotMeasured(f"{mistake.file} has no {mistake.old!r} to be mistaken in")
        wrong = (before or "").replace(mistake.old, mistake.new, 1) if mistake.old else mistake.new
        path.write_text(wrong)
    try:
        ended = _run(project, mistake.command, mistake.environment)
    finally:
        if before is not None and path is not None:
            path.write_text(before)
        elif path is not None:
            path.unlink()
    is_check_of_code = mistake.command[:2] == ("dg", "check")  # passes, as the README says
    if not is_check_of_code and ended.returncode != mistake.status:
        raise NotMeasured(
            f"{mistake.what!r} ended with {ended.returncode}, expected "
            f"{mistake.status}:\n{ended.stdout[-4000:]}"
        )
    return ended.stdout


def _run(
    project: Path, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """A command as in an activated virtual environment.

    Its two outputs as a terminal mixes them.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith(("MANY_MODELS_", "MLFLOW_"))
    }
    settings = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(BIN.parent),
        "PYTHONPATH": str(project),  # before the checkout that is installed
        "DAGSTER_HOME": str(project / ".data" / "dagster"),
    }
    return subprocess.run(
        command,
        cwd=project,
        env={**inherited, **settings, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
