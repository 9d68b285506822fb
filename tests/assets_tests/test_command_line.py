"""The terminal command: one group's history, and files of interrupted runs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from assets.command_line import main
from pipeline.reporting.group_history import describe_history
from pipeline.tables import IMPORTANCE, LEDGER, RUNS
from pipeline.testing.runs import own_tables
from pipeline.testing.tables import write_arrow
from resources.delta_tables import DeltaTables

FIRST, SECOND = "aaaaaaaa-1111-2222", "bbbbbbbb-1111-2222"
ROUTES = [["EWR", "IAH"], ["EWR", "ORD"], ["JFK", None], ["LGA", "a b"]]


def written(values: list[str | None]) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def outcome(run_id: str, values: list[str | None], **changes: Any) -> dict[str, Any]:
    names = ["[]", "[origin]", "[origin, dest]"]
    return {
        "run_id": run_id,
        "grain": len(values),
        "grain_name": names[len(values)],
        "group_id": written(values),
        "parent_id": written(values[:-1]) if values else None,
        "status": "trained",
        "n_rows": 1234,
        "n_trials": 7,
        "weight": 0.25,
        "rmse": 17.123,
        "pooled_rmse": 17.5,
        "seconds": 0.125,
        "booster_id": f"{len(values)}0123456789",
        "parameters": '{"num_leaves": 31, "learning_rate": 0.1}',
        "stopped_by": "patience",
        **changes,
    }


def append(
    tables: DeltaTables,
    namespace: str,
    contract: Any,
    rows: list[dict[str, Any]],
    without: tuple[str, ...] = (),
) -> None:
    schema = pa.schema([field for field in contract.schema if field.name not in without])
    write_arrow(
        tables,
        [pa.Table.from_pylist(rows, schema=schema)],
        schema,
        tables.location(namespace, contract.name),
        mode="append",
    )


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaTables:
    """Two runs of a fleet, in the data root of the environment."""
    monkeypatch.setenv("MANY_MODELS_DATA", str(tmp_path))
    made = DeltaTables(root=f"{tmp_path}/tables")
    groups: list[list[str | None]] = [[], ["EWR"], ["JFK"], ["LGA"], *ROUTES]
    failed = {
        "status": "failed",
        "reason": "error",
        "error_class": "ValueError",
        "error_message": "bad\x1b[31m target",
        "booster_id": None,
    }
    append(
        made,
        "flights",
        LEDGER,
        [
            outcome(SECOND, one, **(failed if one == ROUTES[0] else {}), weight=0.5)
            for one in groups
        ],
    )
    append(made, "flights", LEDGER, [outcome(FIRST, one) for one in groups])
    runs = [
        {
            "run_id": SECOND,
            "as_of": pd.Timestamp("2013-12-24 18:00", tz="UTC"),
            "started_at": pd.Timestamp("2026-11-02", tz="UTC"),
        },
        {
            "run_id": FIRST,
            "as_of": pd.Timestamp("2013-12-01", tz="UTC"),
            "started_at": pd.Timestamp("2026-11-01", tz="UTC"),
        },
    ]
    append(made, "flights", RUNS, runs)
    append(made, "flights-trial", LEDGER, [outcome("cccccccc-trial", [])])
    return made


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_group_has_a_line_per_run_and_the_newest_is_last(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, "flights", "EWR", "IAH")
    assert lines[0] == 'fleet flights, group ["EWR","IAH"], grain [origin, dest]'
    head = lines[2].split()
    assert head == [
        "as",
        "of",
        "run",
        "status",
        "reason",
        "rows",
        "trials",
        "weight",
        "rmse",
        "pooled",
        "rmse",
        "seconds",
        "booster",
    ]
    assert lines[3].split() == [
        "2013-12-01",
        "aaaaaaaa",
        "trained",
        "-",
        "1,234",
        "7",
        "0.25",
        "17.12",
        "17.50",
        "0.125",
        "20123456",
    ]
    assert lines[4].split() == [
        "2013-12-24",
        "18:00",
        "bbbbbbbb",
        "failed",
        "error",
        "1,234",
        "7",
        "0.5",
        "17.12",
        "17.50",
        "0.125",
        "-",
    ]


def test_the_newest_row_is_explained(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, "flights", "EWR", "IAH")
    text = "\n".join(lines)
    assert f"newest run    {SECOND}" in lines
    assert "error         ValueError: bad\\x1b[31m target" in lines
    assert "stopped by    patience" in lines
    assert "parameters\n  num_leaves     31\n  learning_rate  0.1\n" in text
    ancestors = lines[
        next(number for number, line in enumerate(lines) if line.startswith("ancestors")) :
    ]
    assert [line.split() for line in ancestors] == [
        ["ancestors", "status", "weight", "rmse", "booster"],
        ['["EWR"]', "trained", "0.5", "17.12", "10123456"],
        ["[]", "trained", "0.5", "17.12", "00123456"],
    ]


def test_the_newest_models_features_are_shown_by_gain(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "top features" not in "\n".join(shown(capsys, "flights", "JFK"))
    of_jfk = {
        "grain": 1,
        "grain_name": "[origin]",
        "group_id": '["JFK"]',
        "booster_id": "10123456789",
        "n_rows": 200,
    }
    rows = [
        {
            "feature": "temp",
            "gain": 0.0,
            "gain_share": 0.0,
            "n_splits": 0,
            "shap": 0.0,
            "rank": None,
        },
        {
            "feature": "wind",
            "gain": 1.0,
            "gain_share": 0.25,
            "n_splits": 1200,
            "shap": 0.5,
            "rank": 2,
        },
        {
            "feature": "hour",
            "gain": 3.0,
            "gain_share": 0.75,
            "n_splits": 30,
            "shap": 1.25,
            "rank": 1,
        },
    ]
    append(tables, "flights", IMPORTANCE, [{**row, **of_jfk, "run_id": SECOND} for row in rows])
    append(tables, "flights", IMPORTANCE, [{**rows[1], **of_jfk, "run_id": FIRST, "n_splits": 7}])
    lines = shown(capsys, "flights", "JFK")
    start = next(number for number, line in enumerate(lines) if line.startswith("top features"))
    assert [line.split() for line in lines[start : start + 4]] == [
        ["top", "features", "gain", "%", "splits", "shap"],
        ["hour", "75.0", "30", "1.25"],
        ["wind", "25.0", "1,200", "0.5"],
        [],
    ]
    # A group that nobody looked at.
    assert "top features" not in "\n".join(shown(capsys, "flights", "EWR", "IAH"))


@pytest.mark.parametrize(
    ("words", "group"),
    [
        ([], "[]"),
        (["JFK"], '["JFK"]'),
        (["JFK", "null"], '["JFK",null]'),
        (["LGA", "a b"], '["LGA","a b"]'),
        (["--group-id", '["JFK", null]'], '["JFK",null]'),
        (["--group-id", "[]"], "[]"),
    ],
)
def test_a_group_is_asked_for_by_its_keys(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str], words: list[str], group: str
) -> None:
    lines = shown(capsys, "flights", *words)
    assert f"group {group}," in lines[0]
    assert ("ancestors" in "\n".join(lines)) is (group != "[]")


def test_a_trial_has_tables_of_its_own(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, "flights", "--trial")
    assert lines[0].startswith("fleet flights-trial")
    assert lines[3].split()[:3] == ["-", "cccccccc", "trained"]


def test_an_unknown_fleet_is_refused_with_near_names(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "show", "flihgts")
    assert "no group of a fleet 'flihgts' was trained" in told
    assert "did you mean: flights" in told
    assert "available: flights, flights-trial; materialise flihgts/models" in told
    assert "no group of a fleet 'retail'" in refused(capsys, "clean", "retail")


def test_nothing_was_trained_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANY_MODELS_DATA", str(tmp_path))
    assert "available: nothing" in refused(capsys, "show", "flights")


def test_an_unknown_group_is_refused_with_near_groups(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "show", "flights", "ewr", "IHA")
    assert """fleet 'flights' has no group ["ewr","IHA"]; did you mean: EWR IAH;""" in told
    assert "[origin]: 3 groups, such as EWR; JFK; LGA" in told
    assert "[origin, dest]: 4 groups, such as EWR IAH; EWR ORD; JFK null" in told
    assert "[]: 1 group, such as (no key)" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EWR", "--group-id", '["EWR"]'], "give one of them"),
        (["--group-id", "EWR"], "expected a JSON array"),
        (["--group-id", "[1]"], "expected a JSON array"),
    ],
)
def test_a_group_asked_for_wrongly_is_an_error(
    tables: DeltaTables, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["show", "flights", *words]) == 1
    assert message in capsys.readouterr().err


def test_columns_that_a_table_lacks_or_has_beyond_ours_do_not_matter(tmp_path: Path) -> None:
    tables = DeltaTables(root=str(tmp_path))
    absent = (
        "weight",
        "parameters",
        "stopped_by",
        "error_class",
        "error_message",
        "fingerprint",
        "tuned_as_of",
        "started_from",
        "source_run_id",
    )
    append(tables, "flights", LEDGER, [outcome(FIRST, [], status="crashed")], without=absent)
    lines = describe_history(own_tables(tables, "flights"), "[]").splitlines()
    assert lines[3].split()[:8] == ["-", "aaaaaaaa", "crashed", "-", "1,234", "7", "-", "17.12"]
    assert "stopped by    -" in lines
    assert "parameters    -" in lines
    assert not any(line.startswith("error") for line in lines)
    row = outcome(
        FIRST,
        [],
        metrics='{"fleet": {"pinball": 1.5, "rmse": null}}',
        fingerprint="f00",
        status="reused",
        beyond="ours",
    )
    known = pa.Table.from_pylist([row], schema=pa.schema([*LEDGER.schema, ("beyond", pa.string())]))
    write_arrow(tables, [known], known.schema, tables.location("retail", "ledger"), mode="append")
    text = describe_history(own_tables(tables, "retail"), "[]")
    assert "metrics\n  fleet  pinball 1.5, rmse -" in text
    assert "fingerprint   f00" in text


@pytest.mark.skipif(
    "finished_at" not in RUNS.schema.names, reason="the runs table does not say when a run finished"
)
def test_a_run_that_did_not_finish_is_named(tables: DeltaTables) -> None:
    assert "not finished: aaaaaaaa, bbbbbbbb" in describe_history(
        own_tables(tables, "flights"), "[]"
    )


def test_a_refit_of_other_groups_is_no_line_of_a_groups_history(tables: DeltaTables) -> None:
    refit = {
        "run_id": "dddddddd-0",
        "started_at": pd.Timestamp("2026-11-03", tz="UTC"),
        "request": '{"recipes": "1f"}',
    }
    append(tables, "flights", RUNS, [refit])
    other = {"status": "inherited", "reason": "not_listed", "booster_id": None}
    append(
        tables,
        "flights",
        LEDGER,
        [
            outcome("dddddddd-0", ["JFK"], **other),
            outcome("dddddddd-0", ["EWR"], status="refreshed"),
        ],
    )
    assert "dddddddd" not in describe_history(own_tables(tables, "flights"), '["JFK"]')
    assert "dddddddd" in describe_history(own_tables(tables, "flights"), '["EWR"]')


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["show", "--help"], ["clean", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert "many-models show flights EWR IAH" in capsys.readouterr().out


@pytest.mark.parametrize("hours", ["-1", "soon", "nan", "inf"])
def test_hours_are_checked(capsys: pytest.CaptureFixture[str], hours: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["clean", "flights", f"--keep-hours={hours}"])
    assert ended.value.code == 2
    assert "expected 0 or more" in capsys.readouterr().err
