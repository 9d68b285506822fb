import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.reporting.plots import importance_plot
from pipeline.reporting.summary import (
    ClassError,
    Error,
    describe_outcomes,
    fleet_errors,
    markdown_table,
    slowest_groups,
    status_counts,
    summarise,
    text_table,
    top_features,
    worst_groups,
)
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec

GROUPS = [
    (0, "[]"),
    (1, '["north"]'),
    (2, '["north","oslo"]'),
    (2, '["north","bergen"]'),
    (2, '["north","new"]'),
]


def baseline(n: int, rmse: float | None, mape: float | None, fleet_mape: float | None) -> str:
    return json.dumps(
        {"usual": {"n": n, "rmse": rmse, "mape": mape, "fleet_rmse": 1.0, "fleet_mape": fleet_mape}}
    )


def ledger(**changes: Any) -> pd.DataFrame:
    frame = pd.DataFrame(GROUPS, columns=["grain", "group_id"]).assign(
        grain_name=["[]", "[region]", *["[region, city]"] * 3],
        status=["trained", "trained", "trained", "failed", "inherited"],
        reason=[None, None, None, "error", "too_few_rows"],
        n_rows=[300, 300, 200, 90, 10],
        n_trials=[3, 3, 2, None, None],
        n_rounds=[50, 40, 30, None, None],
        weight=[1.0, 0.5, 0.5, 0.0, 0.0],
        report_rows=[60, 60, 40, 20, np.nan],
        rmse=[1.5, 1.5, 1.0, 2.0, np.nan],
        mape=[9.0, 9.0, 4.0, 8.0, np.nan],
        pooled_rmse=[1.75, 1.75, 1.5, 2.0, np.nan],
        pooled_mape=[10.0, 10.0, 7.0, 7.0, np.nan],
        baselines=[
            baseline(50, 2.5, 11.0, 9.5),
            baseline(50, 2.5, 11.0, 9.5),
            baseline(40, 2.0, 12.0, 4.0),
            baseline(0, None, None, None),
            None,
        ],
        seconds=[3.0, 2.0, 1.0, np.nan, np.nan],
    )
    return frame.assign(**changes)


def test_the_fleet_stands_beside_the_pooled_model_and_every_baseline(spec: FleetSpec) -> None:
    assert fleet_errors(ledger(), spec) == [
        Error("fleet", 1.5, 6.0, 60, None, 2),
        Error("pooled model", 1.75, 7.0, 60, 1, 2),
        Error("usual", 2.5, 12.0, 50, 1, 1),
        Error("seasonal naive", None, None, 0, 0, 0),
    ]


def test_what_was_not_measured_is_null(spec: FleetSpec) -> None:
    nothing = ledger(
        report_rows=np.nan,
        rmse=np.nan,
        mape=np.nan,
        pooled_rmse=np.nan,
        pooled_mape=np.nan,
        baselines=None,
    )
    assert fleet_errors(nothing, spec) == [
        Error("fleet", None, None, 0, None, 0),
        Error("pooled model", None, None, 0, 0, 0),
        Error("usual", None, None, 0, 0, 0),
        Error("seasonal naive", None, None, 0, 0, 0),
    ]


@pytest.fixture
def class_spec() -> FleetSpec:
    return small_spec(task="binary")


def metrics(fleet: float, pooled: float, usual: float | None, accuracy: float = 0.75) -> str:
    losses = {"fleet": fleet, "pooled": pooled, "constant": 0.9, "usual": usual}
    return json.dumps(
        {
            way: {"log_loss": loss, "brier": 0.1, "accuracy": accuracy if loss else None}
            for way, loss in losses.items()
        }
    )


def compared(n: int, fleet: float | None) -> str:
    return json.dumps(
        {
            "usual": {
                "n": n,
                "log_loss": 0.6,
                "accuracy": 0.5,
                "fleet_log_loss": fleet,
                "fleet_accuracy": 0.5,
            }
        }
    )


def class_ledger() -> pd.DataFrame:
    return ledger(
        rmse=np.nan,
        mape=np.nan,
        pooled_rmse=np.nan,
        pooled_mape=np.nan,
        metrics=[
            metrics(0.5, 0.55, 0.6),
            None,
            metrics(0.4, 0.5, 0.6),
            metrics(0.8, 0.7, None),
            None,
        ],
        # On the rows that the baseline answers, the fleet is worse.
        baselines=[compared(50, 0.5), None, compared(30, 0.7), compared(0, None), None],
    )


def test_classes_are_compared_by_log_loss_and_accuracy(class_spec: FleetSpec) -> None:
    assert fleet_errors(class_ledger(), class_spec) == [
        ClassError("fleet", 0.5, 0.75, 60, None, 2),
        ClassError("pooled model", 0.55, 0.75, 60, 1, 2),
        ClassError("constant", 0.9, 0.75, 60, 2, 2),
        ClassError("usual", 0.6, 0.75, 50, 0, 1),
    ]


def test_classes_that_were_not_measured_are_null(class_spec: FleetSpec) -> None:
    nothing = ledger(report_rows=np.nan, rmse=np.nan, mape=np.nan, metrics=None, baselines=None)
    assert fleet_errors(nothing, class_spec)[0] == ClassError("fleet", None, None, 0, None, 0)
    assert "nan" not in summarise(nothing, class_spec, {})


def test_the_worst_group_of_classes_has_the_largest_log_loss() -> None:
    healthy = class_ledger().assign(status="trained")
    worst = worst_groups(healthy)
    assert worst["group_id"].tolist()[:2] == ['["north","bergen"]', '["north","oslo"]']
    assert worst["log_loss"].tolist()[:2] == [0.8, 0.4]
    assert list(worst.columns[-2:]) == ["log_loss", "accuracy"]


def test_a_summary_of_classes_speaks_of_classes(class_spec: FleetSpec) -> None:
    text = summarise(class_ledger(), class_spec, {})
    for part in ("log loss", "accuracy", "0.5500", "1 of 2 groups"):
        assert part in text
    for part in ("RMSE", "MAPE", "nan", "None"):
        assert part not in text


def test_every_group_is_counted_once() -> None:
    counts = status_counts(ledger())
    assert counts["groups"].sum() == len(GROUPS)
    failed = counts[counts["status"] == "failed"].iloc[0]
    assert (failed["grain"], failed["reason"], failed["groups"]) == ("[region, city]", "error", 1)


def test_failed_groups_come_before_bad_ones() -> None:
    assert worst_groups(ledger())["group_id"].tolist()[:2] == [
        '["north","bergen"]',
        '["north","oslo"]',
    ]
    assert len(worst_groups(ledger(), n=1)) == 1


def test_only_trained_groups_are_slow() -> None:
    assert slowest_groups(ledger())["group_id"].tolist() == ["[]", '["north"]', '["north","oslo"]']


def test_a_summary_is_for_people(spec: FleetSpec) -> None:
    text = summarise(ledger(), spec, {"report": "here"})
    assert text.startswith("fleet small: 5 groups")
    assert "1 of 2 groups" in text
    assert "nan" not in text
    assert "None" not in text
    assert text.endswith("report       here")


def test_a_text_table_is_aligned() -> None:
    assert text_table(["name", "n"], [["a", "1"], ["long name", "1,000"], ["b", "-"]]).split(
        "\n"
    ) == [
        "name           n",
        "a              1",
        "long name  1,000",
        "b              -",
    ]


def test_a_text_table_of_nothing_is_nothing() -> None:
    assert text_table(["name"], []) == ""


NASTY = [
    "a|b",
    "<script>alert(1)</script>",
    "one\ntwo",
    "one\r\ntwo",
    "[x](javascript:alert(1))",
    "`code`",
    "![i](x)",
    "&lt;",
    "**bold**",
    "_it_",
    "~~x~~",
    "a\\",
    "# x",
    "\u2028x",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_cell_cannot_break_out_of_its_table_or_become_markup(name: str) -> None:
    table = markdown_table(pd.DataFrame({"group": [name], "n": [1]}))
    lines = table.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| ")
    assert lines[2].endswith(" | 1 |")
    assert lines[2].count("|") == 3
    assert not set("<>[]`*_~\\") & set(lines[2])
    assert "&lt;" not in name or "&amp;lt;" in lines[2]


def test_headers_are_as_safe_as_cells() -> None:
    assert "<script>" not in markdown_table(pd.DataFrame({"<script>": [1]}))


def test_numbers_are_short_and_nothing_is_empty() -> None:
    frame = pd.DataFrame({"a": [1.23456, 1234567.8, 3.0, np.nan, None]}, dtype=object)
    cells = [line.strip("| ") for line in markdown_table(frame).splitlines()[2:]]
    assert cells == ["1.23", "1,234,568", "3", "", ""]


def test_an_infinite_number_is_not_measured() -> None:
    assert markdown_table(pd.DataFrame({"a": [np.inf]})).splitlines()[2] == "| - |"


def test_top_features_are_those_of_the_finest_grain_with_models() -> None:
    shares = {
        (0, "[]"): {"price": 0.9, "kind": 0.1, "day": 0.0},
        (2, "a"): {"price": 0.5, "kind": 0.5, "day": 0.0},
        (2, "b"): {"price": 0.1, "kind": 0.9, "day": 0.0},
        (2, "no splits"): {"price": np.nan, "kind": np.nan, "day": np.nan},
    }
    rows = pd.DataFrame(
        [
            (grain, group, name, share)
            for (grain, group), found in shares.items()
            for name, share in found.items()
        ],
        columns=["grain", "group_id", "feature", "gain_share"],
    )
    rows["rank"] = (
        rows["gain_share"]
        .where(rows["gain_share"] > 0)
        .groupby([rows["grain"], rows["group_id"]])
        .rank(method="first", ascending=False)
    )
    for frame in (rows, rows.astype({"feature": "category", "group_id": "category"})):
        found = top_features(frame).set_index("feature")
        assert list(found.index) == ["kind", "price", "day"]
        assert found["mean_share_percent"].to_list() == pytest.approx([70.0, 30.0, 0.0])
        assert found["first_in"].to_list() == [1, 1, 0]
        assert found["groups"].to_list() == [3, 3, 3]
        assert found["pooled_share_percent"].to_list() == pytest.approx([10.0, 90.0, 0.0])
    assert list(top_features(rows, 1)["feature"]) == ["kind"]
    without_pooled = top_features(rows[rows["grain"] == 2])
    assert without_pooled["pooled_share_percent"].isna().all()


def test_without_any_model_there_are_no_top_features_and_an_empty_plot(spec: FleetSpec) -> None:
    nothing = pd.DataFrame(
        {
            "grain": pd.array([], dtype="int32"),
            "group_id": [],
            "feature": [],
            "gain_share": [],
            "rank": [],
        }
    )
    top = top_features(nothing)
    assert top.empty
    assert markdown_table(top).startswith("| feature | mean_share_percent |")
    assert importance_plot(top, spec).startswith(b"\x89PNG")


def test_models_that_reached_the_limit_of_rounds_are_counted() -> None:
    assert describe_outcomes(ledger(), 51) == "5 groups: 3 trained, 1 failed, 1 inherited"
    assert describe_outcomes(ledger(), 40) == (
        "5 groups: 3 trained, 1 failed, 1 inherited; "
        "2 reached tuning.max_rounds (40) and might gain from more"
    )
