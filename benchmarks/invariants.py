"""What must hold of a fleet's tables after any run, crash or fault, checked from the outside.

`python -m benchmarks.invariants FOLDER`.

Nothing here is imported from the project. The numbers I1 to I15 are those of the project's list of
invariants.
"""

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

WITH_MODEL = ("trained", "refreshed", "reused")
STATUSES = (*WITH_MODEL, "inherited", "failed", "crashed")
# What two runs over the same data may differ in: names, and what a clock says.
OF_THE_RUN = (
    "run_id",
    "source_run_id",
    "wave",
    "seconds",
    "lightgbm_seconds",
    "planned_seconds",
    "task",
)
# Put together from sums over rows, whose order may differ.
SUMMED = re.compile(
    r"weight|tune_own|tune_parent|report_(own|parent|blend|constant)|(pooled_)?(rmse|mae|mape)|baselines|metrics|intervals"
)
PINNED = (
    "as_of",
    "constant",
    "constant_without_offset",
    "data_digest",
    "n_groups",
    "report_start",
    "request",
    "spec_digest",
    "tune_start",
)
TOLERANCE = 1e-9
MAX_SHOWN = 3
# A group with fewer rows is never sampled.
SAMPLED_WHOLE = 1000
_UNREADABLE = (DeltaError, OSError, ValueError, KeyError, pa.ArrowException)

Grains = Sequence[Sequence[str]]
Group = tuple[int, str]
Place = tuple[str, str]


def check_fleet(
    tables: Path,
    *,
    features: Path | None,
    grains: Grains | None = None,
    champion: str | None = None,
) -> list[str]:
    """Check a fleet's tables.

    Args:
        tables: folder with the tables runs, ledger, boosters and holdout; any others that are there
            are checked for missing files.
        features: the feature table; None leaves out what needs it (I1 but for counts and doubles).
        grains: key columns of each grain, coarse to fine; None takes them from what each run
            pinned.
        champion: number of the registered version under that alias; None leaves out whether a
            decision put it there.

    Returns:
        One line per violation, beginning with its invariant; empty if all hold.
    """
    found = _files(tables) + (
        [] if features is None or features.parent == tables else _files_of(features)
    )
    try:
        runs, ledger = (_read(tables / name) for name in ("runs", "ledger"))
    except _UNREADABLE as error:
        return [*found, f"{tables}: the tables of runs and of the ledger cannot be read: {error}"]
    found += _runs(runs, ledger) + _rows(ledger)
    for run in _records(runs[runs["finished_at"].notna()]):
        found += _conserved(run, ledger, features, grains)
    found += (
        _boosters(tables, ledger)
        + _holdout(tables, ledger)
        + _judged_groups(tables, runs, ledger)
        + _reused(ledger)
    )
    return found + find_hindsight(tables, runs) + find_wrong_decisions(tables, champion)


def compare_runs(left: Path, right: Path) -> list[str]:
    """Compare the newest finished runs of two fleets' tables: what they pinned, their ledgers, boosters and held-out predictions.

    Args:
        left: folder of tables.
        right: folder of tables.

    Returns:
        One line per difference, but for names and times; empty if there is none.
    """
    try:
        ours, theirs = _finished(left), _finished(right)
    except _UNREADABLE as error:
        return [f"a finished run cannot be read: {error}"]
    found = [
        f"run: {name} is {ours.run[name]!r} and {theirs.run[name]!r}"
        for name in PINNED
        if not _equal(ours.run[name], theirs.run[name])
    ]
    missing = sorted(set(ours.groups) ^ set(theirs.groups))
    found += _told("ledger: groups of only one side", missing)
    for group in sorted(set(ours.groups) & set(theirs.groups)):
        found += [
            f"ledger of {group}: {line}"
            for line in _row_differences(ours.groups[group], theirs.groups[group])
        ]
    found += _told("boosters differ of groups", _differing(ours.texts(), theirs.texts()))
    return found + _told(
        "held-out predictions differ", _differing(ours.answers(), theirs.answers())
    )


@dataclass(frozen=True)
class _Finished:
    """The newest finished run of a folder of tables."""

    tables: Path
    run: Mapping[str, Any]
    groups: Mapping[Group, Mapping[str, Any]]

    def texts(self) -> dict[Group, str]:
        """Digest of each group's decompressed booster."""
        stored = {(row["wave"], row["booster_id"]): row for row in _stored(self.tables)}
        found = {}
        for group, row in self.groups.items():
            booster = stored.get((row["wave"], row["booster_id"]))
            if row["booster_id"] is not None:
                found[group] = (
                    "missing" if booster is None else hashlib.sha256(_text(booster)).hexdigest()
                )
        return found

    def answers(self) -> dict[tuple[Any, ...], str]:
        """Each held-out prediction of the run's groups."""
        places = {(row["wave"], *group) for group, row in self.groups.items()}
        if not (self.tables / "holdout" / "_delta_log").exists():
            return {}
        rows = _read(self.tables / "holdout").drop(columns=["run_id"], errors="ignore")
        keys = _holdout_keys(rows)
        return {
            tuple(row[name] for name in keys if name != "wave"): repr(
                sorted((name, str(value)) for name, value in row.items() if name != "wave")
            )
            for row in _records(rows)
            if (row["wave"], row["grain"], row["group_id"]) in places
        }


def _finished(tables: Path) -> _Finished:
    runs = _read(tables / "runs")
    done = runs[runs["finished_at"].notna()].sort_values("started_at")
    if done.empty:
        raise ValueError(f"{tables}: no run has finished")
    run = _records(done)[-1]
    ledger = _read(tables / "ledger")
    rows = _records(ledger[ledger["run_id"] == run["run_id"]])
    return _Finished(tables, run, {(int(row["grain"]), row["group_id"]): row for row in rows})


def _row_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(set(ours) | set(theirs)):
        if name in OF_THE_RUN:
            continue
        equal = _close if SUMMED.fullmatch(name) else _equal
        if name not in ours or name not in theirs or not equal(ours[name], theirs[name]):
            yield f"{name} is {ours.get(name)!r} and {theirs.get(name)!r}"


def _equal(ours: Any, theirs: Any) -> bool:
    return bool(ours == theirs) or (_is_null(ours) and _is_null(theirs))


def _close(ours: Any, theirs: Any) -> bool:
    """Equal, but for the last digits of the numbers in it."""
    if isinstance(ours, str) and isinstance(theirs, str) and ours[:1] == theirs[:1] == "{":
        return _close(json.loads(ours), json.loads(theirs))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(
            _close(ours[name], theirs[name]) for name in ours
        )
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=1e-12) or (
            _is_null(ours) and _is_null(theirs)
        )
    return _equal(ours, theirs)


def _differing(ours: Mapping[Any, str], theirs: Mapping[Any, str]) -> list[Any]:
    return sorted(key for key in set(ours) | set(theirs) if ours.get(key) != theirs.get(key))


def _files(tables: Path) -> list[str]:
    """I5 of every table of a fleet."""
    folders = sorted(path.parent for path in tables.glob("*/_delta_log"))
    absent = sorted({"runs", "ledger"} - {folder.name for folder in folders})
    return [f"I5: {tables / name} is not a table" for name in absent] + [
        line for folder in folders for line in _files_of(folder)
    ]


def _files_of(table: Path) -> list[str]:
    """I5 of one table: no committed file is missing, or of another size, or outside."""
    try:
        actions = pa.table(DeltaTable(table).get_add_actions(flatten=True))
    except _UNREADABLE as error:
        return [f"I5: {table} cannot be opened: {error}"]
    found = []
    for name, size in zip(
        actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True
    ):
        file = table / name
        if "://" in name or not file.resolve().is_relative_to(table.resolve()):
            found.append(f"I5: {table} names a file outside: {name}")
        elif not file.is_file():
            found.append(f"I5: {file} is missing")
        elif file.stat().st_size != size:
            found.append(f"I5: {file} has {file.stat().st_size} bytes, {size} were committed")
    return found


def _runs(runs: pd.DataFrame, ledger: pd.DataFrame) -> list[str]:
    """What every run says of itself."""
    names = set(runs["run_id"])
    found = _told("runs: listed twice", _doubled(runs["run_id"]))
    found += _told("runs: ledger rows of unknown runs", sorted(set(ledger["run_id"]) - names))
    for run in _records(runs):
        told = f"runs: run {run['run_id']}"
        previous = run["previous_run_id"]
        if previous is not None and (previous not in names or previous == run["run_id"]):
            found.append(f"{told} builds on run {previous!r}, which is missing")
        if run["started_at"] is None:
            found.append(f"{told} has no started_at")
        if run["finished_at"] is None:
            continue
        if run["started_at"] is not None and run["finished_at"] < run["started_at"]:
            found.append(f"{told} finished before it started")
        rows = ledger[ledger["run_id"] == run["run_id"]]
        if json.loads(run["waves"] or "null") != sorted(set(rows["wave"].dropna())):
            found.append(f"{told} names other waves than its ledger rows do")
    needed = set(runs["previous_run_id"].dropna())
    open_runs = set(runs.loc[runs["finished_at"].isna(), "run_id"])
    return found + _told("runs: built on, but without finished_at", sorted(needed & open_runs))


def _rows(ledger: pd.DataFrame) -> list[str]:
    """What every ledger row says."""
    found = []
    for row in _records(ledger):
        told, status, weight = (
            f"ledger: run {row['run_id']}, group {row['group_id']} of grain {row['grain']}",
            row["status"],
            row["weight"],
        )
        if status not in STATUSES:
            found.append(f"{told} has the unknown status {status!r}")
        if (row["booster_id"] is not None) != (status in WITH_MODEL):
            found.append(
                f"{told} is {status} and has {'no' if row['booster_id'] is None else 'a'} booster "
                "id"
            )
        if weight is None or not 0 <= weight <= 1:
            found.append(f"{told} has the weight {weight}, outside 0 to 1")
        elif weight != 0 and status not in WITH_MODEL:
            found.append(f"{told} is {status} and has the weight {weight}")
        if row.get("intervals") is not None and not _rise(json.loads(row["intervals"])):
            found.append(
                f"{told} has the intervals {row['intervals']}, which do not rise with their level"
            )
    return found


def _rise(intervals: Mapping[str, float | None]) -> bool:
    """Whether half widths by level are such: from 0 on, and none smaller than that of a lower level."""
    halves = [
        half
        for _, half in sorted((float(level), half) for level, half in intervals.items())
        if half is not None
    ]
    return all(later >= earlier for earlier, later in zip([0.0, *halves], halves, strict=False))


def _conserved(
    run: Mapping[str, Any], ledger: pd.DataFrame, features: Path | None, grains: Grains | None
) -> list[str]:
    """I1 of one finished run: groups in are ledger rows, each exactly once."""
    told = f"I1: run {run['run_id']}"
    rows = ledger[ledger["run_id"] == run["run_id"]]
    groups = [
        (int(grain), str(group))
        for grain, group in zip(rows["grain"], rows["group_id"], strict=True)
    ]
    found = _told(f"{told} has more than one ledger row of", _doubled(groups))
    if len(rows) != run["n_groups"]:
        found.append(f"{told} has {len(rows)} ledger rows for {run['n_groups']} groups")
    if features is None:
        return found
    try:
        visible = _visible_groups(features, run, grains or json.loads(run["model_spec"])["grains"])
    except _UNREADABLE as error:
        return [*found, f"{told}: its feature table cannot be read: {error}"]
    limit = json.loads(run["request"] or "{}").get("limit_groups")
    if limit is not None:
        visible = _limited(visible, set(groups), limit)
    before = ledger[ledger["run_id"] == run["previous_run_id"]]
    expected = set().union(*visible) | {
        (int(grain), str(group))
        for grain, group in zip(before["grain"], before["group_id"], strict=True)
    }
    found += _told(f"{told} has no ledger row of", sorted(expected - set(groups)))
    return found + _told(
        f"{told} has ledger rows of groups that are not in the data:",
        sorted(set(groups) - expected),
    )


def _visible_groups(
    features: Path, run: Mapping[str, Any], grains: Grains
) -> list[tuple[Group, ...]]:
    """For each combination of keys that the run could see, its group in each grain."""
    finest = list(dict.fromkeys(key for grain in grains for key in grain))
    table = DeltaTable(features, version=int(run["features_version"])).to_pyarrow_table(
        columns=[*finest, "known_at", "is_future"]
    )
    known = table["known_at"].cast(pa.int64())
    as_of = pa.scalar(run["as_of"].value // 1000, pa.int64())
    seen = table.filter(pc.and_(pc.less_equal(known, as_of), pc.invert(table["is_future"])))
    texts = pa.table(
        {key: seen[key].cast(pa.string()) for key in finest}
        or {"_": pa.nulls(len(seen), pa.string())}
    )
    rows = texts.group_by(texts.column_names).aggregate([]).to_pylist()
    return [
        tuple((level, _name([row[key] for key in keys])) for level, keys in enumerate(grains))
        for row in rows
    ]


def _limited(
    visible: list[tuple[Group, ...]], named: set[Group], limit: int
) -> list[tuple[Group, ...]]:
    """Those of a run that was to take only so many finest groups; which ones, it chose."""
    chosen = [levels for levels in visible if levels[-1] in named]
    return chosen if len(chosen) == min(limit, len(visible)) else visible


def _name(keys: Sequence[str | None]) -> str:
    """A group id, as the tables write it."""
    return json.dumps(keys, ensure_ascii=False, separators=(",", ":"))


def _boosters(tables: Path, ledger: pd.DataFrame) -> list[str]:
    """I2: each booster that the ledger names is there, and is what its id and digests say."""
    owner: dict[Place, str] = {}
    for row in _records(ledger):
        if row["booster_id"] is not None:
            owner.setdefault(
                (str(row["wave"]), row["booster_id"]),
                f"group {row['group_id']} of grain {row['grain']}",
            )
    there: dict[Place, str] = {}
    found = []
    try:
        for row in _stored(tables):
            place = row["wave"], row["booster_id"]
            told = (
                f"I2: booster {row['booster_id'][:12]} of wave {row['wave']} "
                f"({owner.get(place, 'not in the ledger')})"
            )
            if there.setdefault(place, row["sha256"]) != row["sha256"]:
                found.append(f"{told} is stored twice with different texts")
            found += [f"{told} {wrong}" for wrong in _booster_damage(row)]
    except _UNREADABLE as error:
        found.append(f"I2: {tables / 'boosters'} cannot be read: {error}")
    return found + _told(
        "I2: boosters that are not in the store under their wave, of",
        sorted(owner[place] for place in owner.keys() - there.keys()),
    )


def _stored(tables: Path) -> Iterator[dict[str, Any]]:
    """The rows of the booster store, a few at a time; none if there is no store."""
    if not (tables / "boosters" / "_delta_log").exists():
        return
    dataset = DeltaTable(tables / "boosters").to_pyarrow_dataset()
    for batch in dataset.to_batches(
        columns=["wave", "booster_id", "sha256", "n_bytes", "text"], batch_size=64
    ):
        yield from batch.to_pylist()


def _booster_damage(row: Mapping[str, Any]) -> Iterator[str]:
    try:
        text = _text(row)
    except _UNREADABLE as error:
        yield f"cannot be decompressed to {row['n_bytes']} bytes: {error}"
        return
    if hashlib.sha256(text).hexdigest() != row["sha256"]:
        yield "differs from its sha256"
    if _booster_id(text) != row["booster_id"]:
        yield "is not the booster of its id"


def _text(row: Mapping[str, Any]) -> bytes:
    """A booster's native text, decompressed."""
    decompressed = pa.Codec("zstd").decompress(
        row["text"], decompressed_size=row["n_bytes"], asbytes=True
    )
    if len(decompressed) != row["n_bytes"]:
        raise ValueError(f"it has {len(decompressed)}")
    return bytes(decompressed)


def _booster_id(text: bytes) -> str:
    """Hash of a booster's text without its section of parameters."""
    first, last = b"\nparameters:\n", b"\nend of parameters\n"
    start = text.find(first)
    end = text.find(last, start + len(first)) if start >= 0 else -1
    if end >= 0:
        text = text[:start] + b"\n" + text[end + len(last) :]
    return hashlib.sha256(text).hexdigest()


def _holdout(tables: Path, ledger: pd.DataFrame) -> list[str]:
    """I3: of the held-out rows that the ledger names, each is there once.

    And groups with a model and report rows have some.
    """
    if not (tables / "holdout" / "_delta_log").exists():
        return (
            [f"I3: {tables / 'holdout'} is not a table"]
            if ledger["booster_id"].notna().any()
            else []
        )
    try:
        rows = DeltaTable(tables / "holdout")
        keys = _holdout_keys(rows.schema().to_arrow().names)
        counted = (
            rows.to_pandas(columns=keys)
            .groupby(keys, dropna=False)
            .size()
            .reset_index(name="_rows")
        )
    except _UNREADABLE as error:
        return [f"I3: {tables / 'holdout'} cannot be read: {error}"]
    place = ["wave", "grain", "group_id"]
    named = ledger.loc[ledger["wave"].notna(), place].drop_duplicates()
    doubled = counted[counted["_rows"] > 1].merge(named, on=place)
    there = set(counted[place].itertuples(index=False, name=None))
    wanted = ledger[ledger["booster_id"].notna() & (ledger["n_report"] > 0)]
    absent = sorted(
        {
            (group, wave)
            for wave, grain, group in wanted[place].itertuples(index=False, name=None)
            if (wave, grain, group) not in there
        }
    )
    found = _told(
        "I3: held-out rows that are there more than once:",
        doubled[keys].astype(str).agg(" ".join, axis=1).tolist() if len(doubled) else [],
    )
    return found + _told("I3: no held-out rows of groups with a model:", absent)


def _judged_groups(tables: Path, runs: pd.DataFrame, ledger: pd.DataFrame) -> list[str]:
    """I11: every group that a held-out row lies in is a group of the ledger, and no small group with report rows has null errors."""
    place = ["wave", "grain", "group_id"]
    if not (tables / "holdout" / "_delta_log").exists():
        return []
    try:
        rows = DeltaTable(tables / "holdout").to_pandas(columns=[*place, "group_ids"])
    except _UNREADABLE as error:
        return [f"I11: {tables / 'holdout'} cannot be read: {error}"]
    named = rows.merge(ledger[place].drop_duplicates(), on=place)
    lain_in = {
        (grain, group)
        for groups in named["group_ids"].map(tuple).unique()
        for grain, group in enumerate(groups)
    }
    known = {
        (int(grain), str(group))
        for grain, group in zip(ledger["grain"], ledger["group_id"], strict=True)
    }
    found = _told("I11: groups of held-out rows that no ledger row names:", sorted(lain_in - known))
    # A group that kept an older model, or whose ancestor did, was held out at older dates; a large
    # one may not be in a sample.
    finished = set(runs.loc[runs["finished_at"].notna(), "run_id"])
    moved_on = set(ledger.loc[ledger["reason"].isin(["not_listed", "vanished"]), "run_id"])
    is_whole = (ledger["n_report"] > 0) & (ledger["n_target"] < SAMPLED_WHOLE)
    unmeasured = ledger[
        is_whole & ledger["run_id"].isin(finished - moved_on) & ledger["metrics"].isna()
    ]
    names = [f"{row['group_id']} of run {row['run_id']}" for row in _records(unmeasured)]
    return found + _told("I11: groups with report rows and no errors:", names)


def _holdout_keys(names: Iterable[str]) -> list[str]:
    return [
        "wave",
        "grain",
        "group_id",
        "row_key",
        *(["class_name"] if "class_name" in set(names) else []),
    ]


def _reused(ledger: pd.DataFrame) -> list[str]:
    """I7: a reused group has the fingerprint and the booster of its source."""
    rows = {(row["run_id"], row["grain"], row["group_id"]): row for row in _records(ledger)}
    found = []
    for (run_id, grain, group), row in rows.items():
        if row["status"] != "reused":
            continue
        told = f"I7: run {run_id}, group {group} of grain {grain}"
        source = rows.get((row["source_run_id"], grain, group))
        if source is None or source["status"] not in ("trained", "refreshed"):
            found.append(
                f"{told} is reused from run {row['source_run_id']!r}, which did not train it"
            )
            continue
        different = [
            name
            for name in ("fingerprint", "booster_id")
            if row[name] is None or row[name] != source[name]
        ]
        found += [
            f"{told} has another {name} than in run {row['source_run_id']}, from which it is reused"
            for name in different
        ]
    return found


def find_hindsight(tables: Path, runs: pd.DataFrame) -> list[str]:
    """I10: no row is answered by a run that saw rows later than the row's as-of."""
    if not (tables / "predictions" / "_delta_log").exists():
        return []
    rows = (
        DeltaTable(tables / "predictions")
        .to_pyarrow_table(columns=["as_of", "fleet_version"])
        .to_pandas()
    )
    seen = dict(zip(runs["run_id"], runs["as_of"], strict=True))
    found = []
    for as_of, run_id in (
        rows.drop_duplicates()
        .sort_values(["as_of", "fleet_version"])
        .itertuples(index=False, name=None)
    ):
        told = f"I10: rows as of {as_of} are answered by run {run_id}, which"
        if run_id not in seen:
            found.append(f"{told} is not in the table of runs")
        elif seen[run_id] > pd.Timestamp(as_of, tz="UTC"):
            found.append(f"{told} saw rows until {seen[run_id]}")
    return found


def find_wrong_decisions(tables: Path, champion: str | None) -> list[str]:
    """I15: an alias that moved has its decision, and a decision that moved it was carried out."""
    columns = ["decision_id", "decided_at", "champion_before", "champion_after", "moved"]
    rows = pd.DataFrame(columns=columns)
    if (tables / "decisions" / "_delta_log").exists():
        rows = DeltaTable(tables / "decisions").to_pyarrow_table(columns=columns).to_pandas()
    unfinished = sorted(set(rows.loc[rows["moved"].isna(), "decision_id"]))
    found = _told("I15: decisions that were not carried out:", unfinished)
    serves: str | None = None
    for row in _records(rows.drop_duplicates("decision_id").sort_values("decided_at")):
        if row["champion_before"] != serves:
            found.append(
                f"I15: decision {row['decision_id']} found version {row['champion_before']} "
                "serving, and none left it there"
            )
        serves = row["champion_after"]
    if champion is not None and champion != serves:
        found.append(f"I15: version {champion} serves, and no decision put it there")
    return found


def _read(table: Path) -> pd.DataFrame:
    found: pd.DataFrame = DeltaTable(table).to_pandas()
    return found


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts; what is missing is None."""
    return [
        {str(name): None if _is_null(value) else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _is_null(value: Any) -> bool:
    return (
        value is None
        or value is pd.NaT
        or value is pd.NA
        or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
    )


def _doubled(values: Iterable[Any]) -> list[Any]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _told(what: str, which: Sequence[Any]) -> list[str]:
    """One line that names the first few; none if there are none."""
    if not which:
        return []
    more = f" and {len(which) - MAX_SHOWN} more" if len(which) > MAX_SHOWN else ""
    return [f"{what} {', '.join(str(name) for name in which[:MAX_SHOWN])}{more}"]


def main(arguments: Sequence[str]) -> int:
    """Print the violations of a folder of tables; the exit status tells whether there are any."""
    if len(arguments) != 1:
        print(
            "usage: python -m benchmarks.invariants FOLDER (of a fleet's tables: runs, ledger, "
            "boosters, holdout, features)"
        )
        return 2
    tables = Path(arguments[0])
    features = tables / "features"
    violations = check_fleet(tables, features=features if features.exists() else None)
    print("\n".join(violations) or f"{tables}: all invariants hold")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
