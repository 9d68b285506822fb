"""The terminal command `many-models`: check, run, show, score, stream and clean."""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from assets.failure_log import first_line, keep_trace
from pipeline.crash_points import arm
from pipeline.errors import FleetError, ModelNotFound, SpecError
from pipeline.models.meta_model import group_id
from pipeline.reporting.group_history import close_matches, describe_history
from pipeline.runs.fleet_tables import FleetTables
from pipeline.spark.data_errors import readable_model_errors
from pipeline.tables import LEDGER
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
CHECK = (
    "Find what can be found without data in defs.yaml and features.sql. Exit status 1 if "
    "a fleet is broken."
)
RUN = (
    "Check one fleet, then launch its assets with `dg launch`. Launch settings are environment "
    "variables, as in `make run`."
)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its words; by default those of the process.

    Returns:
        0; the launch's own for `run`; 1 where rows or tables cannot be read or the settings are
        wrong; 2 for an unknown fleet, group or version.
    """
    arguments = _parser().parse_args(argv)
    logs: Path | None = None
    try:
        profile = current_profile(PROJECT)
        logs = Path(profile.data_root) / "logs"
        with readable_model_errors():
            return _run(profile, arguments)
    except FleetError as error:
        trace = keep_trace(logs, error) if logs and error.__cause__ else ""
        _say_failure(str(error), trace)
        return 2 if isinstance(error, ModelNotFound) else 1
    except Exception as error:  # noqa: BLE001 - a person gets a message, the log the trace
        trace = keep_trace(logs, error) if logs else ""
        _say_failure(f"{type(error).__name__}: {first_line(str(error))}", trace)
        return 1


def _run(profile: Profile, arguments: argparse.Namespace) -> int:
    """One command; its exit status."""
    if arguments.command in ("check", "run"):
        # Loading fleets takes a second or two, which the other commands do without.
        from assets.fleet_commands import check_fleets, launch_fleet

        if arguments.command == "run":
            return launch_fleet(PROJECT, arguments.fleet, dry_run=profile.dry_run)
        _say(check_fleets(PROJECT, arguments.fleet))
        return 0
    namespace = f"{arguments.fleet}-trial" if arguments.trial else str(arguments.fleet)
    if arguments.command in ("score", "stream"):
        _answer(profile, namespace, arguments)
        return 0
    built = build_resources(profile)
    tables = built.tables
    own = FleetTables(tables, namespace, arguments.fleet)
    if not tables.exists(own.location(LEDGER)):
        raise ModelNotFound(_unknown_fleet(tables, namespace))
    if arguments.command == "show":
        _say(describe_history(own, _asked_id(arguments.keys, arguments.group_id)))
    else:
        keep = timedelta(hours=arguments.keep_hours)
        _say(
            clean(
                tables,
                built.registry,
                namespace,
                keep=keep,
                keep_runs=arguments.keep_runs,
                dry_run=arguments.dry_run,
            ).text
        )
    return 0


def _say_failure(message: str, trace: str) -> None:
    lines = [f"many-models: {_printable(message)}", *([trace] if trace else [])]
    sys.stderr.write("\n".join(lines) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{_printable(text)}\n")
    sys.stdout.flush()


def _answer(profile: Profile, namespace: str, arguments: argparse.Namespace) -> None:
    """Score, or stream."""
    # Spark, its Python side and MLflow take a second to import, which the other commands do
    # without.
    from assets.scoring_commands import Scorer, stop_signals

    arm(profile.crash_at)
    scorer = Scorer.of(profile)
    if arguments.command == "score":
        _say(
            scorer.score(
                namespace,
                arguments.source,
                arguments.target,
                period=arguments.period,
                version=arguments.version,
            )
        )
        return
    with stop_signals() as stopping:
        scorer.stream(
            namespace,
            arguments.source,
            arguments.target,
            checkpoint=arguments.checkpoint,
            every=arguments.every,
            max_files=arguments.max_files,
            skip_changes=arguments.skip_changes,
            stopping=stopping,
            report=lambda line: _say(f"{datetime.now().astimezone():%H:%M:%S} {line}"),
        )


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="many-models",
        description="Look into the tables of a fleet, answer rows, and tidy up.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="check|run|show|score|stream|clean"
    )

    def add(name: str, words: str, description: str) -> argparse.ArgumentParser:
        """A command about the tables of a fleet or of its trial."""
        command = commands.add_parser(
            name, help=words, description=description, epilog=EXAMPLES, formatter_class=raw
        )
        command.add_argument("fleet", metavar="FLEET", help="name of the fleet")
        command.add_argument(
            "--trial", action="store_true", help="the tables of the fleet's trial, <fleet>-trial"
        )
        return command

    check = commands.add_parser(
        "check", help="find mistakes in the descriptions of fleets", description=CHECK
    )
    check.add_argument("fleet", metavar="FLEET", nargs="?", help="one fleet (default: all)")
    run = commands.add_parser(
        "run", help="build a fleet, raw tables to predictions", description=RUN
    )
    run.add_argument("fleet", metavar="FLEET", help="name of the fleet, or its folder")
    show = "print the history of one group"
    _add_show_arguments(add("show", show, "Print the history of one group."))
    _add_clean_arguments(add("clean", "remove what no kept run needs", CLEAN))
    _add_score_arguments(add("score", "answer every row of a table or of files", SCORE))
    _add_stream_arguments(add("stream", "answer rows as they come", STREAM))
    return parser


def _add_show_arguments(show: argparse.ArgumentParser) -> None:
    show.add_argument(
        "keys",
        metavar="KEY",
        nargs="*",
        help="the group's keys in the grain's order; null for null, none for the pooled group; -- "
        "before a -KEY",
    )
    show.add_argument(
        "--group-id", metavar="JSON", help="the group as a JSON array of its keys, instead of KEYs"
    )


def _add_source_and_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="a Delta table, or a folder or glob of Parquet, CSV, TSV or JSON files",
    )
    command.add_argument(
        "--to",
        dest="target",
        required=True,
        metavar="TABLE",
        help="Delta table of the answers; created if it does not exist",
    )


def _add_score_arguments(score: argparse.ArgumentParser) -> None:
    _add_source_and_target(score)
    score.add_argument(
        "--period",
        default="all",
        metavar="NAME",
        help="what the rows are called in the table; replaced as a whole (default: all)",
    )
    score.add_argument(
        "--version",
        type=_version,
        default=CHAMPION,
        metavar="VERSION",
        help=f"{CHAMPION}, {CHALLENGER} or a number (default: {CHAMPION})",
    )


def _add_stream_arguments(stream: argparse.ArgumentParser) -> None:
    _add_source_and_target(stream)
    stream.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="remembers what was answered (default: one per fleet, source and table in the data "
        "root)",
    )
    stream.add_argument(
        "--every",
        type=_seconds,
        metavar="SECONDS",
        help=(
            "keep looking for new rows, this often, until interrupted (default: "
            "answer what is there and end)"
        ),
    )
    stream.add_argument(
        "--max-files",
        type=_number_of("files"),
        default=1000,
        metavar="N",
        help="files of a micro batch (default: 1000)",
    )
    stream.add_argument(
        "--skip-changes",
        action="store_true",
        help="pass over versions of a Delta table that remove or rewrite rows",
    )


def _add_clean_arguments(clean_: argparse.ArgumentParser) -> None:
    clean_.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clean_.add_argument(
        "--keep-hours",
        type=_hours,
        default=24.0,
        metavar="HOURS",
        help="keep files that were written or needed within the last HOURS hours (default: 24)",
    )
    clean_.add_argument(
        "--keep-runs",
        type=_number_of("runs"),
        default=KEPT_RUNS,
        metavar="N",
        help=f"keep all of the newest N runs (default: {KEPT_RUNS})",
    )


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours; expected 0 or more")
    return hours


def _number_of(what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of {what}; expected 1 or more"
            )
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.001 <= seconds < math.inf:  # noqa: PLR2004 - Spark counts milliseconds
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds; expected more than 0"
        )
    return seconds


def _version(text: str) -> str:
    if text not in (CHAMPION, CHALLENGER) and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a version; expected {CHAMPION}, {CHALLENGER} or a number"
        )
    return text


def _asked_id(keys: Sequence[str], written: str | None) -> str:
    if written is None:
        return group_id([None if key == "null" else key for key in keys])
    if keys:
        raise SpecError(
            f"both the keys {shlex.join(keys)} and --group-id {written} were given; give one of "
            "them"
        )
    try:
        values = json.loads(written)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(
        value is None or isinstance(value, str) for value in values
    ):
        raise SpecError(
            f"--group-id is {written!r}; expected a JSON array of strings or null, "
            'such as ["EWR","IAH"]'
        )
    return group_id(values)


def _unknown_fleet(tables: DeltaTables, namespace: str) -> str:
    trained = [
        name for name in tables.namespaces() if tables.exists(tables.location(name, LEDGER.name))
    ]
    return (
        f"no group of a fleet {namespace!r} was trained below {tables.root}; "
        f"{close_matches(namespace, trained)}"
        f"available: {', '.join(trained) or 'nothing'}; materialise "
        f"{namespace.removesuffix('-trial')}/models to train it"
    )


def _printable(text: str) -> str:
    """Without control characters: a key or a message may carry some that a terminal obeys."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1]
        for character in text
    )


if __name__ == "__main__":
    raise SystemExit(main())
