"""The terminal command `many-models`: fleets checked and launched, one group's history, rows to be answered, and tidying up."""

import argparse
import difflib
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.fs as pf

from assets.failure_log import first_line, keep_trace
from pipeline.crash_points import arm
from pipeline.errors import FleetError, ModelNotFound, SpecError
from pipeline.models.meta_model import filesystem_of, group_id
from pipeline.reporting.summary import text_table
from pipeline.spark.data_errors import readable_model_errors
from pipeline.tables import IMPORTANCE, LEDGER, RUNS, fleet_runs, records
from pipeline.training.outcome import NOT_LISTED
from resources.build import build_resources
from resources.cleaning import KEPT_RUNS, clean
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import CHALLENGER, CHAMPION
from resources.profiles import Profile, current_profile

PROJECT = Path(__file__).parent.parent
EXAMPLES = """examples:
  many-models check                                    is every fleet well described?
  many-models run housing                              what `make run FLEET=housing` does
  many-models show flights                             the pooled group
  many-models show flights EWR IAH                     one route of the grain [origin, dest]
  many-models show flights EWR null                    the group whose second key is null
  many-models show flights --group-id '["EWR","IAH"]'  the same, as the tables write it
  many-models show flights EWR --trial                 from the tables of a trial (limit_groups)
  many-models score housing --from new.csv --to answers --period 2015-08
                                                       every row of a file, folder or Delta table, in one commit
  many-models stream housing --from incoming/ --to answers-live
                                                       the rows that are new since the last call
  many-models stream housing --from .data/tables/housing/features --to answers-live --every 30
                                                       rows as they come, until Ctrl-C
  many-models clean flights --dry-run                  what no kept run needs, with files and bytes
  many-models clean flights --keep-runs 10             remove it; keep all of the ten newest runs
"""
CHECK = "Find what can be found without data in defs.yaml and features.sql. Exit status 1 if a fleet is broken."
RUN = "Check one fleet, then launch its assets with `dg launch`. Launch settings are environment variables, as in `make run`."
SCORE = """Answer every row of a Delta table or of files with a registered version, in one commit.

The columns of the source are kept, the answers stand beside them. The rows of a period (--period) are replaced as a whole: the same command
again gives the same table. Columns that the model needs are found by name, in any order; what is missing is said before any work is spent."""
STREAM = """Answer the rows of a folder or of a Delta table as they come, with the version that is champion at that moment.

Each micro batch is one commit, and each row is answered exactly once, whatever is killed when: the same command goes on where it was. Without
--every it answers all there is and ends, as a schedule wants it. Put files into the folder by renaming: one that is seen is not read again."""
CLEAN = """Remove what no kept run needs: files of old versions of every table (raw, features, predictions, models, ledger), rows of old runs,
and files that interrupted runs left.

Everything stays of the newest runs (--keep-runs), of what was started since, and of the newest registered version. Ledger rows of every
run that a registered version answers with, or that ever served, stay too: any version can be rolled back to. Predictions of every as-of
and decisions stay. A file goes only once it has been unneeded for --keep-hours, so that whoever reads an old version may finish: a stream
of one of these tables must not lag behind by more. A backtest is cleaned by its own name, e.g. flights-backtest-2013-12-01."""
NONE = "-"
SHOWN_ID = 8
NEAR = 5
SHOWN_FEATURES = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its words; by default those of the process.

    Returns:
        0; the launch's own for `run`; 1 where rows or tables cannot be read or the settings are wrong; 2 for an unknown fleet, group or version.
    """
    told = _parser().parse_args(argv)
    logs: Path | None = None
    try:
        profile = current_profile(PROJECT)
        logs = Path(profile.data_root) / "logs"
        with readable_model_errors():
            return _run(profile, told)
    except FleetError as error:
        trace = keep_trace(logs, error) if logs and error.__cause__ else ""
        _say_failure(str(error), trace)
        return 2 if isinstance(error, ModelNotFound) else 1
    except Exception as error:  # noqa: BLE001 - a person gets a message, the log the trace
        trace = keep_trace(logs, error) if logs else ""
        _say_failure(f"{type(error).__name__}: {first_line(str(error))}", trace)
        return 1


def _run(profile: Profile, told: argparse.Namespace) -> int:
    """One command; its exit status."""
    if told.command in ("check", "run"):
        # Loading fleets takes a second or two, which the other commands do without.
        from assets.fleet_commands import check_fleets, launch_fleet

        if told.command == "run":
            return launch_fleet(PROJECT, told.fleet, dry_run=profile.dry_run)
        _say(check_fleets(PROJECT, told.fleet))
        return 0
    built = build_resources(profile)
    tables = built.tables
    namespace = f"{told.fleet}-trial" if told.trial else str(told.fleet)
    if told.command == "show":
        _say(history_text(tables, namespace, _asked_id(told.keys, told.group_id)))
    elif told.command == "clean":
        if not tables.exists(tables.location(namespace, LEDGER.name)):
            raise ModelNotFound(_unknown_fleet(tables, namespace))
        keep = timedelta(hours=told.keep_hours)
        _say(clean(tables, built.registry, namespace, keep=keep, keep_runs=told.keep_runs, dry_run=told.dry_run).text)
    else:
        _answer(profile, namespace, told)
    return 0


def _say_failure(message: str, trace: str) -> None:
    lines = [f"many-models: {_printable(message)}", *([trace] if trace else [])]
    sys.stderr.write("\n".join(lines) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{_printable(text)}\n")
    sys.stdout.flush()


def _answer(profile: Profile, namespace: str, told: argparse.Namespace) -> None:
    """Score, or stream."""
    # Spark, its Python side and MLflow take a second to import, which the other commands do without.
    from assets.scoring_commands import Scorer, stop_signals

    arm(profile.crash_at)
    scorer = Scorer.of(profile)
    if told.command == "score":
        _say(scorer.score(namespace, told.source, told.target, period=told.period, version=told.version))
        return
    with stop_signals() as stopping:
        scorer.stream(
            namespace,
            told.source,
            told.target,
            checkpoint=told.checkpoint,
            every=told.every,
            max_files=told.max_files,
            skip_changes=told.skip_changes,
            stopping=stopping,
            report=lambda line: _say(f"{datetime.now().astimezone():%H:%M:%S} {line}"),
        )


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="many-models", description="Look into the tables of a fleet, answer rows, and tidy up.", epilog=EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|run|show|score|stream|clean")
    check = commands.add_parser("check", help="find mistakes in the descriptions of fleets", description=CHECK)
    check.add_argument("fleet", metavar="FLEET", nargs="?", help="one fleet (default: all)")
    run = commands.add_parser("run", help="build a fleet, raw tables to predictions", description=RUN)
    run.add_argument("fleet", metavar="FLEET", help="name of the fleet, or its folder")
    show = commands.add_parser("show", help="print the history of one group", description="Print the history of one group.", epilog=EXAMPLES)
    clean_ = commands.add_parser("clean", help="remove what no kept run needs", description=CLEAN, epilog=EXAMPLES)
    score = commands.add_parser("score", help="answer every row of a table or of files", description=SCORE, epilog=EXAMPLES)
    stream = commands.add_parser("stream", help="answer rows as they come", description=STREAM, epilog=EXAMPLES)
    for command in (show, score, stream, clean_):
        command.formatter_class = raw
        command.add_argument("fleet", metavar="FLEET", help="name of the fleet")
        command.add_argument("--trial", action="store_true", help="the tables of the fleet's trial, <fleet>-trial")
    show.add_argument(
        "keys", metavar="KEY", nargs="*", help="the group's keys in the grain's order; null for null, none for the pooled group; -- before a -KEY"
    )
    show.add_argument("--group-id", metavar="JSON", help="the group as a JSON array of its keys, instead of KEYs")
    for command in (score, stream):
        command.add_argument(
            "--from", dest="source", required=True, metavar="SOURCE", help="a Delta table, or a folder or glob of Parquet, CSV or JSON files"
        )
        command.add_argument("--to", dest="target", required=True, metavar="TABLE", help="Delta table of the answers; made if it is not there")
    score.add_argument("--period", default="all", metavar="NAME", help="what the rows are called in the table; replaced as a whole (default: all)")
    score.add_argument(
        "--version", type=_version, default=CHAMPION, metavar="VERSION", help=f"{CHAMPION}, {CHALLENGER} or a number (default: {CHAMPION})"
    )
    stream.add_argument("--checkpoint", metavar="DIR", help="remembers what was answered (default: one per fleet, source and table in the data root)")
    stream.add_argument("--every", type=_seconds, metavar="SECONDS", help="go on until interrupted, looking so often (default: answer what is there)")
    stream.add_argument("--max-files", type=_files, default=1000, metavar="N", help="files of a micro batch (default: 1000)")
    stream.add_argument("--skip-changes", action="store_true", help="pass over versions of a Delta table that remove or rewrite rows")
    clean_.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clean_.add_argument(
        "--keep-hours", type=_hours, default=24.0, metavar="HOURS", help="keep files that were written or needed so lately (default: 24)"
    )
    clean_.add_argument("--keep-runs", type=_runs_kept, default=KEPT_RUNS, metavar="N", help=f"keep all of the newest N runs (default: {KEPT_RUNS})")
    return parser


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours; expected 0 or more")
    return hours


def _runs_kept(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs; expected 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.001 <= seconds < math.inf:  # noqa: PLR2004 - Spark counts milliseconds
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds; expected more than 0")
    return seconds


def _files(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of files; expected 1 or more")
    return int(text)


def _version(text: str) -> str:
    if text not in (CHAMPION, CHALLENGER) and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no version; expected {CHAMPION}, {CHALLENGER} or a number")
    return text


def _asked_id(keys: Sequence[str], written: str | None) -> str:
    if written is None:
        return group_id([None if key == "null" else key for key in keys])
    if keys:
        raise SpecError(f"both the keys {shlex.join(keys)} and --group-id {written} were given; give one of them")
    try:
        values = json.loads(written)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(value is None or isinstance(value, str) for value in values):
        raise SpecError(f'--group-id is {written!r}; expected a JSON array of strings or null, such as ["EWR","IAH"]')
    return group_id(values)


def history_text(tables: DeltaTables, namespace: str, wanted: str) -> str:
    """One group's history: a line per run, newest last, then what the newest run says of it.

    Args:
        tables: where the fleet's tables are.
        namespace: the fleet, or its trial.
        wanted: the group's id.

    Raises:
        ModelNotFound: if the fleet or the group is unknown; it names near ones.
    """
    location = tables.location(namespace, LEDGER.name)
    if not tables.exists(location):
        raise ModelNotFound(_unknown_fleet(tables, namespace))
    rows = tables.read_pandas(location, where={"group_id": wanted})
    if rows.empty:
        raise ModelNotFound(_unknown_group(tables.read_pandas(location, columns=["run_id", "grain", "grain_name", "group_id"]), namespace, wanted))
    runs = _runs(tables, namespace)
    # A run that only refitted earlier recipes says nothing of the other groups.
    if "request" in runs:
        is_refit = rows["run_id"].isin(set(runs["run_id"]) - set(fleet_runs(runs)["run_id"]))
        rows = rows[~(is_refit & rows["reason"].eq(NOT_LISTED))]
    rows = rows.merge(runs.drop_duplicates("run_id", keep="last"), on="run_id", how="left").sort_values("started_at", kind="stable")
    past = records(rows)
    history, newest = [_history_line(row) for row in past], past[-1]
    run = tables.read_pandas(location, where={"run_id": newest["run_id"]})
    unfinished = [str(row["run_id"])[:SHOWN_ID] for row in past if "finished_at" in row and row["finished_at"] is None]
    parts = [
        f"fleet {namespace}, group {wanted}, grain {_text(newest, 'grain_name')}",
        text_table(list(_COLUMNS), history),
        f"not finished: {', '.join(unfinished)}" if unfinished else "",
        _newest_text(newest),
        _importance_text(tables, namespace, newest),
        _ancestors_text(newest, records(run)),
    ]
    return "\n\n".join(part for part in parts if part)


def _runs(tables: DeltaTables, namespace: str) -> pd.DataFrame:
    """Run, as-of, start and, where the table has it, end."""
    location = tables.location(namespace, RUNS.name)
    found = tables.read_pandas(location) if tables.exists(location) else RUNS.schema.empty_table().to_pandas()
    return found[[name for name in ("run_id", "as_of", "started_at", "finished_at", "request") if name in found.columns]]


Record = Mapping[str, Any]


def _text(row: Record, name: str) -> str:
    value = row.get(name)
    return NONE if value is None else str(value)


def _short(row: Record, name: str) -> str:
    return _text(row, name)[:SHOWN_ID]


def _count(row: Record, name: str) -> str:
    value = row.get(name)
    return NONE if value is None else f"{value:,.0f}"


def _number(row: Record, name: str) -> str:
    value = row.get(name)
    return NONE if value is None else f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}"


def _moment(row: Record, name: str) -> str:
    value = row.get(name)
    return NONE if value is None else f"{value:%Y-%m-%d %H:%M}".removesuffix(" 00:00")


_COLUMNS: dict[str, tuple[str, Callable[[Record, str], str]]] = {
    "as of": ("as_of", _moment),
    "run": ("run_id", _short),
    "status": ("status", _text),
    "reason": ("reason", _text),
    "rows": ("n_rows", _count),
    "trials": ("n_trials", _count),
    "weight": ("weight", _number),
    "rmse": ("rmse", _number),
    "pooled rmse": ("pooled_rmse", _number),
    "seconds": ("seconds", _number),
    "booster": ("booster_id", _short),
}


def _history_line(row: Record) -> list[str]:
    return [form(row, name) for name, form in _COLUMNS.values()]


def _newest_text(row: Record) -> str:
    """What the newest row says beyond its line."""
    lines = [f"newest run    {_text(row, 'run_id')}"]
    if row.get("error_class") is not None or row.get("error_message") is not None:
        lines.append(f"error         {_text(row, 'error_class')}: {_text(row, 'error_message')}")
    lines += [
        f"stopped by    {_text(row, 'stopped_by')}",
        f"tuned as of   {_moment(row, 'tuned_as_of')}",
        f"trained by    {_text(row, 'source_run_id')}",
        f"fingerprint   {_text(row, 'fingerprint')}",
        _json_lines("parameters", row.get("parameters")),
        _json_lines("started from", row.get("started_from")),
        _json_lines("metrics", row.get("metrics")),
    ]
    return "\n".join(lines)


def _json_lines(title: str, written: object) -> str:
    """A JSON object as one line per entry; what is none, as it is."""
    try:
        found = json.loads(written) if isinstance(written, str) else None
    except ValueError:
        found = written
    if not isinstance(found, dict) or not found:
        return f"{title:<13} {NONE if found is None else found}"
    width = max(len(name) for name in found)
    return "\n".join([title, *(f"  {name:<{width}}  {_entry(value)}" for name, value in found.items())])


def _entry(value: object) -> str:
    """One value; the measures of one way to answer side by side."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {NONE if number is None else format(number, '.6g')}" for name, number in value.items())


def _importance_text(tables: DeltaTables, namespace: str, row: Record) -> str:
    """The features that the newest row's model gains most by; nothing where nobody looked."""
    location = tables.location(namespace, IMPORTANCE.name)
    if not tables.exists(location):
        return ""
    found = tables.read_pandas(location, where={"run_id": str(row["run_id"]), "group_id": str(row["group_id"])})
    top = records(found[found["rank"] <= SHOWN_FEATURES].sort_values("rank"))
    return text_table(["top features", "gain %", "splits", "shap"], [_importance_line(one) for one in top])


def _importance_line(row: Record) -> list[str]:
    return [_text(row, "feature"), f"{100 * row['gain_share']:.1f}", _count(row, "n_splits"), _number(row, "shap")]


def _ancestors_text(row: Record, run: Sequence[Record]) -> str:
    """The groups that answer beside the newest row's, finest first."""
    by_group = {(other["grain"], other["group_id"]): other for other in run}
    lines, grain, parent = [], row.get("grain"), row.get("parent_id")
    while parent is not None and grain is not None and grain > 0:
        grain -= 1
        found = by_group.get((grain, parent), {})
        lines.append([str(parent), *(_text(found, "status"), _number(found, "weight"), _number(found, "rmse"), _short(found, "booster_id"))])
        parent = found.get("parent_id")
    return text_table(["ancestors", "status", "weight", "rmse", "booster"], lines)


def _unknown_fleet(tables: DeltaTables, namespace: str) -> str:
    filesystem, root = filesystem_of(tables.root, tables.storage_options)
    folders = filesystem.get_file_info(pf.FileSelector(root, allow_not_found=True))
    fleets = sorted(info.base_name for info in folders if info.type == pf.FileType.Directory)
    trained = [fleet for fleet in fleets if tables.exists(tables.location(fleet, LEDGER.name))]
    return (
        f"no group of a fleet {namespace!r} was trained below {tables.root}; {_near(namespace, {fleet: fleet for fleet in trained})}"
        f"there is: {', '.join(trained) or 'nothing'}; materialise {namespace.removesuffix('-trial')}/models to train it"
    )


def _unknown_group(ledger: pd.DataFrame, namespace: str, wanted: str) -> str:
    ids = sorted(ledger["group_id"].dropna().unique())
    grains = [
        f"  {name}: {len(groups):,} group{'s' * (len(groups) > 1)}, such as {'; '.join(_words(one) or '(no key)' for one in sorted(groups)[:3])}"
        for (_, name), groups in ((key, frame["group_id"].unique()) for key, frame in ledger.groupby(["grain", "grain_name"]))
    ]
    near = _near(_words(wanted), {_words(found): found for found in ids})
    return f"fleet {namespace!r} has no group {wanted}; {near}there is, by grain:\n" + "\n".join(grains)


def _words(written: str) -> str:
    """The words that ask for a group."""
    return shlex.join("null" if key is None else key for key in json.loads(written))


def _near(word: str, known: Mapping[str, str]) -> str:
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=NEAR, cutoff=0.5)
    return f"did you mean: {'; '.join(folded[name] for name in found)}? " if found else ""


def _printable(text: str) -> str:
    """Without control characters: a key or a message may carry some that a terminal obeys."""
    return "".join(character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text)


if __name__ == "__main__":
    raise SystemExit(main())
