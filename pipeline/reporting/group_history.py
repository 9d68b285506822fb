"""One group's history, for people: a line per run, and what the newest run says of it."""

import difflib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
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
    location, read_pandas = tables.location(LEDGER), tables.tables.read_pandas
    rows = read_pandas(location, where={"group_id": group_id})
    if rows.empty:
        known = read_pandas(location, columns=["run_id", "grain", "grain_name", "group_id"])
        raise ModelNotFound(_unknown_group(known, tables.namespace, group_id))
    runs = _read_runs(tables)
    # A run that only refitted earlier recipes says nothing of the other groups.
    if "request" in runs:
        is_refit = rows["run_id"].isin(set(runs["run_id"]) - set(fleet_runs(runs)["run_id"]))
        rows = rows[~(is_refit & rows["reason"].eq(NOT_LISTED))]
    rows = rows.merge(
        runs.drop_duplicates("run_id", keep="last"), on="run_id", how="left"
    ).sort_values("started_at", kind="stable")
    past = records(rows)
    history, newest = [_history_line(row) for row in past], past[-1]
    run = read_pandas(location, where={"run_id": newest["run_id"]})
    unfinished = [
        str(row["run_id"])[:SHOWN_ID]
        for row in past
        if "finished_at" in row and row["finished_at"] is None
    ]
    parts = [
        f"fleet {tables.namespace}, group {group_id}, grain {_text(newest, 'grain_name')}",
        text_table(list(_COLUMNS), history),
        f"not finished: {', '.join(unfinished)}" if unfinished else "",
        _newest_text(newest),
        _importance_text(tables, newest),
        _ancestors_text(newest, records(run)),
    ]
    return "\n\n".join(part for part in parts if part)


def _read_runs(tables: FleetTables) -> pd.DataFrame:
    """Run, as-of, start and, where the table has it, end.

    Tables of earlier releases are read as they are.
    """
    location = tables.location(RUNS)
    found = tables.tables.read_pandas(location) if tables.tables.exists(location) else no_rows(RUNS)
    return found[
        [
            name
            for name in ("run_id", "as_of", "started_at", "finished_at", "request")
            if name in found.columns
        ]
    ]


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
    return "\n".join(
        [title, *(f"  {name:<{width}}  {_entry(value)}" for name, value in found.items())]
    )


def _entry(value: object) -> str:
    """One value; the measures of one way to answer side by side."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(
        f"{name} {NONE if number is None else format(number, '.6g')}"
        for name, number in value.items()
    )


def _importance_text(tables: FleetTables, row: Record) -> str:
    """The features that the newest row's model gains most by; nothing where nobody looked."""
    location = tables.location(IMPORTANCE)
    if not tables.tables.exists(location):
        return ""
    found = tables.tables.read_pandas(
        location, where={"run_id": str(row["run_id"]), "group_id": str(row["group_id"])}
    )
    top = records(found[found["rank"] <= SHOWN_FEATURES].sort_values("rank"))
    return text_table(
        ["top features", "gain %", "splits", "shap"], [_importance_line(one) for one in top]
    )


def _importance_line(row: Record) -> list[str]:
    return [
        _text(row, "feature"),
        f"{100 * row['gain_share']:.1f}",
        _count(row, "n_splits"),
        _number(row, "shap"),
    ]


def _ancestors_text(row: Record, run: Sequence[Record]) -> str:
    """The groups that answer beside the newest row's, finest first."""
    by_group = {(other["grain"], other["group_id"]): other for other in run}
    lines, grain, parent = [], row.get("grain"), row.get("parent_id")
    while parent is not None and grain is not None and grain > 0:
        grain -= 1
        found = by_group.get((grain, parent), {})
        lines.append(
            [
                str(parent),
                *(
                    _text(found, "status"),
                    _number(found, "weight"),
                    _number(found, "rmse"),
                    _short(found, "booster_id"),
                ),
            ]
        )
        parent = found.get("parent_id")
    return text_table(["ancestors", "status", "weight", "rmse", "booster"], lines)


def _unknown_group(ledger: pd.DataFrame, namespace: str, wanted: str) -> str:
    ids = sorted(ledger["group_id"].dropna().unique())
    grains = []
    for (_, name), rows in ledger.groupby(["grain", "grain_name"]):
        groups = sorted(rows["group_id"].unique())
        examples = "; ".join(_keys_as_words(group) or "(no key)" for group in groups[:3])
        grains.append(
            f"  {name}: {len(groups):,} group{'s' * (len(groups) > 1)}, such as {examples}"
        )
    near = close_matches(_keys_as_words(wanted), {_keys_as_words(found): found for found in ids})
    return f"fleet {namespace!r} has no group {wanted}; {near}there is, by grain:\n" + "\n".join(
        grains
    )


def _keys_as_words(written: str) -> str:
    """The words that ask for a group."""
    return shlex.join("null" if key is None else key for key in json.loads(written))


def close_matches(word: str, known: Mapping[str, str]) -> str:
    """A question that names what was meant, for a message; empty where nothing is close.

    Args:
        word: as it was given.
        known: what it may have been, by how it is written.
    """
    folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=MAX_SUGGESTIONS, cutoff=0.5)
    return f"did you mean: {'; '.join(folded[name] for name in found)}? " if found else ""
