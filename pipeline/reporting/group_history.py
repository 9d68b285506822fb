"""One group's history, for people: a line per run, and what the newest run says of it."""

import difflib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from pipeline.errors import ModelNotFound
from pipeline.reporting.summary import text_table
from pipeline.runs.fleet_tables import FleetTables, no_rows
from pipeline.tables import IMPORTANCE, LEDGER, RUNS, fleet_runs, records
from pipeline.training.outcome import NOT_LISTED

NONE = "-"
SHOWN_ID = 8
MAX_SUGGESTIONS = 5
SHOWN_FEATURES = 10


def describe_history(tables: FleetTables, group_id: str) -> str:
    """One group's history: a line per run, newest last, then what the newest run says of it.

    Args:
        tables: of the fleet, or of its trial.
        group_id: the group.

    Raises:
        ModelNotFound: if the group is unknown; it names near ones.
    """
    location = tables.location(LEDGER)
    rows = tables.tables.read_pandas(location, where={"group_id": group_id})
    if rows.empty:
        columns = ["run_id", "grain", "grain_name", "group_id"]
        ledger = tables.tables.read_pandas(location, columns=columns)
        raise ModelNotFound(_unknown_group(ledger, tables.namespace, group_id))
    rows = _with_runs(rows, _read_runs(tables))
    past = records(rows)
    newest = past[-1]
    run = tables.tables.read_pandas(location, where={"run_id": newest["run_id"]})
    parts = [
        f"fleet {tables.namespace}, group {group_id}, grain {_field(newest, 'grain_name')}",
        text_table(list(_COLUMNS), list(map(_history_line, past))),
        _unfinished_text(rows),
        _newest_text(newest),
        _importance_text(tables, newest),
        _ancestors_text(newest, run),
    ]
    return "\n\n".join(filter(None, parts))


def _read_runs(tables: FleetTables) -> pd.DataFrame:
    """Run, as-of, start and, where the table has them, end and request.

    Tables of earlier releases are read as they are.
    """
    location = tables.location(RUNS)
    runs = no_rows(RUNS)
    if tables.tables.exists(location):
        runs = tables.tables.read_pandas(location)
    return runs.filter(items=["run_id", "as_of", "started_at", "finished_at", "request"])


def _with_runs(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One group's ledger rows beside their runs, newest last.

    A run that only refitted earlier recipes says nothing of the other groups: those rows are left
    out.
    """
    if "request" in runs:
        refits = set(runs["run_id"]) - set(fleet_runs(runs)["run_id"])
        rows = rows[~(rows["run_id"].isin(refits) & rows["reason"].eq(NOT_LISTED))]
    latest = runs.drop_duplicates("run_id", keep="last")
    merged = rows.merge(latest, on="run_id", how="left")
    return merged.sort_values("started_at", kind="stable")


def _unfinished_text(rows: pd.DataFrame) -> str:
    if "finished_at" not in rows:
        return ""
    unfinished = rows.loc[rows["finished_at"].isna(), "run_id"].map(_short)
    if unfinished.empty:
        return ""
    return f"not finished: {', '.join(unfinished)}"


Record = Mapping[str, Any]


def _field(row: Record, name: str, form: Callable[[Any], str] = str) -> str:
    """One value of a row in a form; a dash where it is missing."""
    value = row.get(name)
    if value is None:
        return NONE
    return form(value)


def _short(value: object) -> str:
    return str(value)[:SHOWN_ID]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    if abs(value) < 1:
        return f"{value:.4g}"
    return f"{value:,.2f}"


def _moment(value: pd.Timestamp) -> str:
    return f"{value:%Y-%m-%d %H:%M}".removesuffix(" 00:00")


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "as of": ("as_of", _moment),
    "run": ("run_id", _short),
    "status": ("status", str),
    "reason": ("reason", str),
    "rows": ("n_rows", _count),
    "trials": ("n_trials", _count),
    "weight": ("weight", _number),
    "rmse": ("rmse", _number),
    "pooled rmse": ("pooled_rmse", _number),
    "seconds": ("seconds", _number),
    "booster": ("booster_id", _short),
}


def _history_line(row: Record) -> list[str]:
    return [_field(row, name, form) for name, form in _COLUMNS.values()]


def _newest_text(row: Record) -> str:
    """What the newest row says beyond its line."""
    lines = [f"newest run    {_field(row, 'run_id')}"]
    if row.get("error_class") is not None or row.get("error_message") is not None:
        lines.append(f"error         {_field(row, 'error_class')}: {_field(row, 'error_message')}")
    lines += [
        f"stopped by    {_field(row, 'stopped_by')}",
        f"tuned as of   {_field(row, 'tuned_as_of', _moment)}",
        f"trained by    {_field(row, 'source_run_id')}",
        f"fingerprint   {_field(row, 'fingerprint')}",
        _json_lines("parameters", row.get("parameters")),
        _json_lines("started from", row.get("started_from")),
        _json_lines("metrics", row.get("metrics")),
    ]
    return "\n".join(lines)


def _json_lines(title: str, written: object) -> str:
    """A JSON object as one line per entry; anything else on the title's line."""
    entries = _parse(written)
    if isinstance(entries, dict) and entries:
        width = max(map(len, entries))
        lines = [f"  {name:<{width}}  {_entry(value)}" for name, value in entries.items()]
        return "\n".join([title, *lines])
    if entries is None:
        entries = NONE
    return f"{title:<13} {entries}"


def _parse(written: object) -> Any:
    """What a JSON text says; the text itself if it is not JSON, and None if it is not a text."""
    if not isinstance(written, str):
        return None
    try:
        return json.loads(written)
    except ValueError:
        return written


def _entry(value: object) -> str:
    """One value; the measures of one way to answer side by side."""
    if not isinstance(value, dict):
        return str(value)
    measures = [f"{name} {_field(value, name, '{:.6g}'.format)}" for name in value]
    return ", ".join(measures)


def _importance_text(tables: FleetTables, row: Record) -> str:
    """The features that the newest row's model gains most by; empty if nothing was computed."""
    location = tables.location(IMPORTANCE)
    if not tables.tables.exists(location):
        return ""
    importance = tables.tables.read_pandas(
        location, where={"run_id": str(row["run_id"]), "group_id": str(row["group_id"])}
    )
    top = importance[importance["rank"] <= SHOWN_FEATURES].sort_values("rank")
    return text_table(
        ["top features", "gain %", "splits", "shap"], list(map(_importance_line, records(top)))
    )


def _importance_line(row: Record) -> list[str]:
    return [
        _field(row, "feature"),
        f"{100 * row['gain_share']:.1f}",
        _field(row, "n_splits", _count),
        _field(row, "shap", _number),
    ]


def _ancestors_text(row: Record, run: pd.DataFrame) -> str:
    """The groups that answer beside the newest row's, finest first."""
    lines = []
    grain = row.get("grain")
    parent = row.get("parent_id")
    while parent is not None and grain is not None and grain > 0:
        grain -= 1
        ancestor = _ledger_row(run, grain, parent)
        line = [
            str(parent),
            _field(ancestor, "status"),
            _field(ancestor, "weight", _number),
            _field(ancestor, "rmse", _number),
            _field(ancestor, "booster_id", _short),
        ]
        lines.append(line)
        parent = ancestor.get("parent_id")
    return text_table(["ancestors", "status", "weight", "rmse", "booster"], lines)


def _ledger_row(run: pd.DataFrame, grain: int, group_id: str) -> Record:
    """One group's row of a run; empty if the run has none."""
    rows = run[(run["grain"] == grain) & (run["group_id"] == group_id)]
    return next(iter(records(rows)), {})


def _unknown_group(ledger: pd.DataFrame, namespace: str, group_id: str) -> str:
    by_grain = []
    for (_, name), rows in ledger.groupby(["grain", "grain_name"]):
        groups = sorted(rows["group_id"].unique())
        plural = "s" * (len(groups) > 1)
        examples = "; ".join(_keys_as_words(group) or "(no key)" for group in groups[:3])
        by_grain.append(f"  {name}: {len(groups):,} group{plural}, such as {examples}")
    ids = sorted(ledger["group_id"].dropna().unique())
    suggestion = close_matches(_keys_as_words(group_id), map(_keys_as_words, ids))
    lines = [f"fleet {namespace!r} has no group {group_id}; {suggestion}available, by grain:"]
    return "\n".join([*lines, *by_grain])


def _keys_as_words(written: str) -> str:
    """A group's keys as they are given on the command line."""
    return shlex.join("null" if key is None else key for key in json.loads(written))


def close_matches(word: str, names: Iterable[str]) -> str:
    """A question that suggests names close to a word, for a message; empty if there are none."""
    by_folded = {name.casefold(): name for name in names}
    matches = difflib.get_close_matches(word.casefold(), by_folded, n=MAX_SUGGESTIONS, cutoff=0.5)
    if not matches:
        return ""
    return f"did you mean: {'; '.join(map(by_folded.__getitem__, matches))}? "
