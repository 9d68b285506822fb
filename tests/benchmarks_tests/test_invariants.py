"""The checker names every damage done to tables that it finds sound; the tables are made by hand, as the checker's own reading of the contract."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from benchmarks.invariants import (
    check_fleet,
    compare_runs,
    find_hindsight,
    find_wrong_decisions,
    main,
)

GRAINS = ((), ("shop", "size"))
MOMENT = pd.Timestamp("2024-03-01", tz="UTC").as_unit("us")
GROUPS = ('["a/b \\"ü","1"]', '["b",null]', '["c","3"]')
STRINGS = (
    "status",
    "reason",
    "booster_id",
    "fingerprint",
    "source_run_id",
    "wave",
    "baselines",
    "metrics",
    "intervals",
)


def native(group: str) -> bytes:
    return (
        f"tree\nof {group}\n\nparameters:\n[num_threads: 2]\n\nend of "
        "parameters\n\npandas_categorical:null\n"
    ).encode()


def booster_id(group: str) -> str:
    return hashlib.sha256(f"tree\nof {group}\n\n\npandas_categorical:null\n".encode()).hexdigest()


def ledger_row(run_id: str, grain: int, group: str, **changes: Any) -> dict[str, Any]:
    trained = {
        "status": "trained",
        "reason": None,
        "booster_id": booster_id(group),
        "fingerprint": f"made of {group}",
        "weight": 0.4,
    }
    told = {
        "n_target": 20,
        "n_report": 2,
        "rmse": 1.5,
        "mape": None,
        "baselines": '{"naive":{"rmse":2.5}}',
        "metrics": '{"fleet":{"rmse":1.5}}',
        "seconds": 0.1,
    }
    intervals = {"intervals": '{"0.8": 1.5, "0.95": 2.5}' if grain == 0 else None}
    place = {
        "run_id": run_id,
        "grain": grain,
        "group_id": group,
        "source_run_id": run_id,
        "wave": f"{run_id}-0",
    }
    return {**place, **trained, **told, **intervals, **changes}


def without_model(status: str, **changes: Any) -> dict[str, Any]:
    return {
        "status": status,
        "booster_id": None,
        "wave": None,
        "source_run_id": None,
        "weight": 0.0,
        "n_report": 0,
        **changes,
    }


def run_row(
    run_id: str, previous: str | None, waves: list[str] | None, n_groups: int, **changes: Any
) -> dict[str, Any]:
    started = MOMENT + pd.Timedelta(hours=len(run_id))
    pinned = {
        "data_digest": "rows",
        "as_of": MOMENT,
        "tune_start": MOMENT,
        "report_start": MOMENT,
        "features_version": 1,
        "spec_digest": "spec",
    }
    request = json.dumps({"limit_groups": None})
    times = {"started_at": started, "finished_at": started + pd.Timedelta(minutes=1)}
    constants = {
        "constant": 1.0,
        "constant_without_offset": 2.0,
        "model_spec": json.dumps({"grains": GRAINS}),
    }
    told = {
        "previous_run_id": previous,
        "request": request,
        "n_groups": n_groups,
        "waves": waves and json.dumps(waves),
    }
    return {"run_id": run_id, **times, **pinned, **constants, **told, **changes}


def write(table: Path, frame: pd.DataFrame, partition_by: str | None = None) -> None:
    texts = {
        name: frame[name].astype(object).where(frame[name].notna(), None)
        for name in STRINGS
        if name in frame
    }
    schema = pa.Table.from_pandas(frame.assign(**texts), preserve_index=False)
    for number, field in enumerate(schema.schema):
        if pa.types.is_null(field.type):
            schema = schema.set_column(
                number,
                field.name,
                schema.column(number).cast(pa.string() if field.name in STRINGS else pa.float64()),
            )
    write_deltalake(
        table,
        schema.replace_schema_metadata(),
        mode="overwrite",
        schema_mode="overwrite",
        partition_by=partition_by,
    )


def feature_rows() -> pd.DataFrame:
    shops, sizes = ['a/b "ü', "b", "c", "too late", "made up"], [1, None, 3, 4, 5]
    frame = pd.DataFrame(
        {
            "shop": shops,
            "size": pd.array(sizes, "Int64"),
            "known_at": MOMENT,
            "is_future": [False, False, False, False, True],
        }
    )
    frame.loc[3, "known_at"] = MOMENT + pd.Timedelta(microseconds=1)
    return pd.concat([frame, frame.head(2)])


def make_fleet(tables: Path) -> Path:
    """Two finished runs, the second of which reuses a group and has lost one, and one run that was interrupted."""
    # The group that vanished was in the data of the first run.
    lost = pd.DataFrame(
        {"shop": ["gone"], "size": pd.array([9], "Int64"), "known_at": MOMENT, "is_future": False}
    )
    write(tables / "features", pd.concat([feature_rows(), lost]))
    write(tables / "features", feature_rows())
    gone = '["gone","9"]'
    first = [
        ledger_row("1", 0, "[]"),
        *(ledger_row("1", 1, group) for group in (*GROUPS[:2], gone)),
        ledger_row("1", 1, GROUPS[2]),
    ]
    kept = {"source_run_id": "1", "wave": "1-0", "status": "reused", "seconds": None}
    second = [
        ledger_row("22", 0, "[]", status="refreshed"),
        ledger_row("22", 1, GROUPS[0], **kept),
        ledger_row("22", 1, GROUPS[1], **without_model("inherited")),
        ledger_row("22", 1, GROUPS[2], **without_model("crashed")),
        ledger_row("22", 1, gone, **kept, reason="vanished"),
    ]
    write(tables / "ledger", pd.DataFrame([*first, *second, ledger_row("333", 0, "[]")]), "run_id")
    runs = [
        run_row("1", None, ["1-0"], 5, features_version=0),
        run_row("22", "1", ["1-0", "22-0"], 5),
        run_row("333", "22", None, 4, finished_at=pd.NaT),
    ]
    write(tables / "runs", pd.DataFrame(runs), "run_id")
    trained = [*first, second[0], ledger_row("333", 0, "[]")]
    write(tables / "boosters", pd.DataFrame([stored(row) for row in trained]), "wave")
    held = [
        {
            **{name: row[name] for name in ("wave", "grain", "group_id")},
            "row_key": key,
            "prediction": 0.5,
            "group_ids": ids_of(row["group_id"]),
        }
        for row in trained
        for key in "xy"
    ]
    write(tables / "holdout", pd.DataFrame(held), "wave")
    return tables


def ids_of(group: str) -> list[str]:
    """The groups of a row, one of each grain."""
    return ["[]", GROUPS[0] if group == "[]" else group]


def rounded_ids(rows: pd.DataFrame) -> pd.DataFrame:
    """Held-out rows whose finest group is one that nobody trained."""
    return rows.assign(group_ids=[[ids[0], '["rounded","2"]'] for ids in rows["group_ids"]])


def stored(row: dict[str, Any]) -> dict[str, Any]:
    text = native(row["group_id"])
    packed = pa.Codec("zstd").compress(text, asbytes=True)
    return {
        "wave": row["wave"],
        "booster_id": row["booster_id"],
        "sha256": hashlib.sha256(text).hexdigest(),
        "n_bytes": len(text),
        "text": packed,
    }


def change(tables: Path, name: str, how: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    write(
        tables / name,
        how(DeltaTable(tables / name).to_pandas()),
        DeltaTable(tables / name).metadata().partition_columns[0],
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fleet(tmp_path_factory.mktemp("fleet") / "tables")


@pytest.fixture
def tables(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tables"))


def violations(tables: Path) -> list[str]:
    return check_fleet(tables, features=tables / "features", grains=GRAINS)


def test_nothing_is_said_of_sound_tables(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert violations(sound) == []
    assert check_fleet(sound, features=None) == []
    assert main([str(sound)]) == 0
    assert "all invariants hold" in capsys.readouterr().out


def test_the_command_wants_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def at(run_id: str, group: str, **values: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Other values in one ledger row."""

    def changed(rows: pd.DataFrame) -> pd.DataFrame:
        place = (rows["run_id"] == run_id) & (rows["group_id"] == group)
        assert place.sum() == 1
        for name, value in values.items():
            rows[name] = rows[name].astype(object).where(~place, value)
        return rows.infer_objects()

    return changed


def in_column(
    name: str, value: Any, where: str, wanted: str
) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda rows: rows.assign(
        **{name: rows[name].astype(object).where(rows[where] != wanted, value)}
    ).infer_objects()


def flipped(rows: pd.DataFrame) -> pd.DataFrame:
    """A damaged bit in a booster's text, as packed as it was."""
    place = (rows["booster_id"] == booster_id(GROUPS[0])).idxmax()
    text = bytearray(native(GROUPS[0]))
    text[3] ^= 1
    rows["text"] = rows["text"].astype(object)
    rows.loc[place, "text"] = pa.Codec("zstd").compress(bytes(text), asbytes=True)
    return rows


def renamed(rows: pd.DataFrame) -> pd.DataFrame:
    """Another booster under the id, with a digest that fits."""
    place = (rows["booster_id"] == booster_id(GROUPS[0])).idxmax()
    for name, value in stored({"wave": "", "booster_id": "", "group_id": GROUPS[1]}).items():
        if name in ("sha256", "n_bytes", "text"):
            rows.loc[place, name] = value
    return rows


A, B, C = GROUPS
DAMAGES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a ledger row is gone": ("ledger", lambda rows: rows[(rows["run_id"] != "22") | (rows["group_id"] != B)], "I1: run 22 has no ledger row of (1, '[\"b\",null]')"),
    "a ledger row is doubled": ("ledger", lambda rows: pd.concat([rows, rows[(rows["run_id"] == "22") & (rows["group_id"] == B)]]), "I1: run 22 has more than one ledger row of"),
    "a ledger row is of no group": ("ledger", at("22", C, group_id='["made up","5"]'), "I1: run 22 has ledger rows of groups that are not in the data: (1, '[\"made up\""),
    "the run counted other groups": ("runs", in_column("n_groups", 6, "run_id", "22"), "I1: run 22 has 5 ledger rows for 6 groups"),
    "a booster is gone": ("boosters", lambda rows: rows[rows["booster_id"] != booster_id(A)], "I2: boosters that are not in the store under their wave, of group"),
    "a booster is in another wave": ("boosters", in_column("wave", "9-0", "booster_id", booster_id(A)), "I2: boosters that are not in the store under their wave, of group"),
    "a bit of a booster": ("boosters", flipped, "differs from its sha256"),
    "a booster under another's id": ("boosters", renamed, "is not the booster of its id"),
    "a booster of another size": ("boosters", in_column("n_bytes", 17, "booster_id", booster_id(A)), "cannot be decompressed to 17 bytes"),
    "a booster that is not packed": ("boosters", in_column("text", b"tree", "booster_id", booster_id(A)), "cannot be decompressed"),
    "a held-out row is doubled": ("holdout", lambda rows: pd.concat([rows, rows.head(1)]), "I3: held-out rows that are there more than once: "),
    "held-out rows are gone": ("holdout", lambda rows: rows[rows["group_id"] != A], "I3: no held-out rows of groups with a model: "),
    "held-out rows of a group that nobody knows": ("holdout", rounded_ids, "I11: groups of held-out rows that no ledger row names: (1, '[\"rounded\""),
    "a group that is not measured": ("ledger", at("1", B, metrics=None), f"I11: groups with report rows and no errors: {B} of run 1"),
    "another fingerprint": ("ledger", at("22", A, fingerprint="of other rows"), "has another fingerprint than in run 1, from which it is reused"),
    "another booster": ("ledger", at("22", A, booster_id=booster_id(B)), "has another booster_id than in run 1, from which it is reused"),
    "reused from nowhere": ("ledger", at("22", A, source_run_id="0"), "is reused from run '0', which did not train it"),
    "an unknown status": ("ledger", at("22", B, status="lost"), "has the unknown status 'lost'"),
    "no status": ("ledger", at("22", B, status=None), "has the unknown status None"),
    "trained without booster": ("ledger", at("22", B, status="trained"), "is trained and has no booster id"),
    "inherited with booster": ("ledger", at("1", B, status="inherited"), "is inherited and has a booster id"),
    "a weight above 1": ("ledger", at("22", A, weight=1.0000001), "has the weight 1.0000001, outside 0 to 1"),
    "no weight": ("ledger", at("22", A, weight=None), "has the weight None, outside 0 to 1"),
    "intervals that fall": ("ledger", at("22", A, intervals='{"0.95": 1.0, "0.8": 2.0}'), 'has the intervals {"0.95": 1.0, "0.8": 2.0}, which do not rise'),
    "a negative interval": ("ledger", at("22", A, intervals='{"0.8": -1.0, "0.95": null}'), "which do not rise with their level"),
    "a weight without model": ("ledger", at("22", C, weight=0.5), "is crashed and has the weight 0.5"),
    "an unknown previous run": ("runs", in_column("previous_run_id", "0", "run_id", "22"), "run 22 builds on run '0', which is missing"),
    "a previous run that is not finished": ("runs", in_column("finished_at", pd.NaT, "run_id", "1"), "runs: built on, but without finished_at 1"),
    "a run is gone": ("runs", lambda rows: rows[rows["run_id"] != "333"], "runs: ledger rows of unknown runs 333"),
    "a run is doubled": ("runs", lambda rows: pd.concat([rows, rows.head(1)]), "runs: listed twice"),
    "a run that ended before its start": ("runs", in_column("finished_at", MOMENT, "run_id", "22"), "run 22 finished before it started"),
    "waves that are not named": ("runs", in_column("waves", "[]", "run_id", "22"), "run 22 names other waves than its ledger rows do"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, tables: Path) -> None:
    name, how, told = DAMAGES[damage]
    change(tables, name, how)
    found = violations(tables)
    assert any(told in line for line in found), found
    assert main([str(tables)]) == 1


@pytest.mark.parametrize("name", ["runs", "ledger", "boosters", "holdout", "features"])
def test_a_file_that_is_gone_is_named(name: str, tables: Path) -> None:
    file = (
        tables
        / name
        / pa.table(DeltaTable(tables / name).get_add_actions(flatten=True))["path"][0].as_py()
    )
    file.unlink()
    assert f"I5: {file} is missing" in violations(tables)


def test_a_file_of_another_size_is_named(tables: Path) -> None:
    file = (
        tables
        / "boosters"
        / pa.table(DeltaTable(tables / "boosters").get_add_actions(flatten=True))["path"][0].as_py()
    )
    file.write_bytes(file.read_bytes()[:-1])
    assert any(
        line.startswith(f"I5: {file} has {file.stat().st_size} bytes")
        for line in violations(tables)
    )


@pytest.mark.parametrize("name", ["runs", "ledger", "boosters", "holdout"])
def test_a_table_that_is_gone_is_named(name: str, tables: Path) -> None:
    shutil.rmtree(tables / name)
    assert any(name in line for line in violations(tables))


def test_any_flipped_byte_of_the_store_is_noticed_or_does_no_harm(tables: Path) -> None:
    before = (
        DeltaTable(tables / "boosters")
        .to_pandas()
        .sort_values(["wave", "booster_id"], ignore_index=True)
    )
    file = max((tables / "boosters").rglob("*.parquet"), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    for place in range(4, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        if not any(line.startswith("I2") for line in violations(tables)):
            after = (
                DeltaTable(tables / "boosters")
                .to_pandas()
                .sort_values(["wave", "booster_id"], ignore_index=True)
            )
            pd.testing.assert_frame_equal(before, after[before.columns])


def test_a_limited_run_takes_as_many_groups_as_it_was_to(tables: Path) -> None:
    change(
        tables,
        "runs",
        lambda rows: rows[rows["run_id"] == "1"].assign(request='{"limit_groups": 1}', n_groups=2),
    )
    change(
        tables,
        "ledger",
        lambda rows: rows[(rows["run_id"] == "1") & rows["group_id"].isin(["[]", A])],
    )
    assert violations(tables) == []
    change(tables, "runs", lambda rows: rows.assign(request='{"limit_groups": 2}'))
    assert any("I1: run 1 has no ledger row of" in line for line in violations(tables))


def test_equal_runs_are_equal(sound: Path, tables: Path) -> None:
    assert compare_runs(sound, tables) == []


def test_names_times_and_last_digits_do_not_matter(sound: Path, tables: Path) -> None:
    def renamed_run(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.replace(
            {
                "run_id": {"22": "other"},
                "source_run_id": {"22": "other"},
                "wave": {"22-0": "other-0"},
            }
        )

    for name in ("runs", "ledger", "boosters", "holdout"):
        change(tables, name, renamed_run)
    change(
        tables,
        "ledger",
        lambda rows: rows.assign(
            rmse=1.5 * (1 + 1e-12), seconds=9.0, metrics='{"fleet":{"rmse":1.5000000000001}}'
        ),
    )
    digits = '{"0.8": 1.5, "0.95": 2.5000000000001}'
    change(
        tables,
        "ledger",
        lambda rows: rows.assign(intervals=rows["intervals"].where(rows["grain"] != 0, digits)),
    )
    assert compare_runs(sound, tables) == []


def repacked(rows: pd.DataFrame) -> pd.DataFrame:
    """Another text of the same booster: only its parameters section differs."""
    text = native("[]").replace(b"2", b"4")
    place = (rows["booster_id"] == booster_id("[]")) & (rows["wave"] == "22-0")
    rows["text"] = (
        rows["text"].astype(object).where(~place, pa.Codec("zstd").compress(text, asbytes=True))
    )
    return rows


DIFFERENCES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a group less": ("ledger", lambda rows: rows[(rows["run_id"] != "22") | (rows["group_id"] != B)], "ledger: groups of only one side (1,"),
    "an error": ("ledger", at("22", "[]", rmse=1.5 * (1 + 1e-8)), "rmse is 1.5 and 1.500000015"),
    "an error of a baseline": ("ledger", at("22", "[]", baselines='{"naive":{"rmse":2.6}}'), "baselines is"),
    "a half width": ("ledger", at("22", "[]", intervals='{"0.8": 1.5, "0.95": 2.6}'), "intervals is"),
    "a status": ("ledger", at("22", C, status="failed"), "status is 'crashed' and 'failed'"),
    "a fingerprint": ("ledger", at("22", A, fingerprint="other"), "fingerprint is"),
    "the data": ("runs", in_column("data_digest", "other", "run_id", "22"), "run: data_digest is 'rows' and 'other'"),
    "a booster's text": ("boosters", repacked, "boosters differ of groups (0, '[]')"),
    "a prediction": ("holdout", in_column("prediction", 0.5000000001, "wave", "22-0"), "held-out predictions differ (0, '[]', 'x')"),
}  # fmt: skip


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named(difference: str, sound: Path, tables: Path) -> None:
    name, how, told = DIFFERENCES[difference]
    change(tables, name, how)
    found = compare_runs(sound, tables)
    assert any(told in line for line in found), found


def test_a_folder_without_finished_run_cannot_be_compared(sound: Path, tables: Path) -> None:
    change(tables, "runs", lambda rows: rows[rows["run_id"] == "333"])
    assert compare_runs(sound, tables) == [
        f"a finished run cannot be read: {tables}: no run has finished"
    ]


def decisions(*moves: tuple[Any, Any, Any]) -> pd.DataFrame:
    """Decisions in their order: version before, version after, and whether it was carried out."""
    rows = pd.DataFrame(moves, columns=["champion_before", "champion_after", "moved"]).astype(
        {"moved": "boolean"}
    )
    rows["decision_id"] = [f"d{number}" for number in range(len(rows))]
    return rows.assign(
        decided_at=[MOMENT + pd.Timedelta(hours=number) for number in range(len(rows))]
    )


@pytest.mark.parametrize(
    ("moves", "champion", "expected"),
    [
        ([(None, "1", True), ("1", "1", False), ("1", "3", True)], "3", []),
        (
            [(None, "1", True), ("1", "2", None)],
            None,
            ["I15: decisions that were not carried out: d1"],
        ),
        (
            [(None, "1", True), ("2", "3", True)],
            "3",
            ["I15: decision d1 found version 2 serving, and none left it there"],
        ),
        ([(None, "1", True)], "2", ["I15: version 2 serves, and no decision put it there"]),
    ],
)
def test_an_alias_that_moved_has_its_decision(
    tmp_path: Path, moves: list[Any], champion: str | None, expected: list[str]
) -> None:
    table = pa.Table.from_pandas(decisions(*moves), preserve_index=False).replace_schema_metadata()
    write_deltalake(tmp_path / "decisions", table)
    assert find_wrong_decisions(tmp_path, champion) == expected


def test_no_row_is_answered_by_a_run_that_saw_later_rows(tmp_path: Path) -> None:
    answered = [
        ("2024-03-01T00:00:00", "run"),
        ("2024-03-02T00:00:00", "run"),
        ("2024-02-29T00:00:00", "run"),
        ("2024-03-01T00:00:00", "lost"),
    ]
    write_deltalake(
        tmp_path / "predictions",
        pa.Table.from_pylist(
            [dict(zip(("as_of", "fleet_version"), row, strict=True)) for row in answered]
        ),
    )
    found = find_hindsight(tmp_path, pd.DataFrame([{"run_id": "run", "as_of": MOMENT}]))
    assert found == [
        (
            "I10: rows as of 2024-02-29T00:00:00 are answered by run run, "
            "which saw rows until 2024-03-01 00:00:00+00:00"
        ),
        (
            "I10: rows as of 2024-03-01T00:00:00 are answered by run lost, "
            "which is not in the table of runs"
        ),
    ]
