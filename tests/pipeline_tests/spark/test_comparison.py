"""Challenger against champion on the same rows, for every kind of task: a twin errs as its own run says that it did."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.models.promotion import NEW_RECIPE, REFRESH, UNCHANGED, ComparedRun, Judgement
from pipeline.runs.history import History
from pipeline.runs.request import Request
from pipeline.spark.comparison import Comparison, judge
from pipeline.spark.planning import plan_run
from pipeline.spec import FleetSpec
from pipeline.testing.data import feature_rows, small_spec, with_classes
from pipeline.testing.runs import own_tables, quiet_context, train_quietly
from resources.delta_tables import DeltaTables

pytestmark = [pytest.mark.spark, pytest.mark.slow]

STUMPS: Mapping[str, Any] = {
    "max_trials": 1,
    "patience": 1,
    "max_rounds": 30,
    "search": {"num_leaves": 2},
}
TREES: Mapping[str, Any] = {**STUMPS, "search": {"num_leaves": 8}}


def in_spark(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(
        time=rows["time"].dt.tz_localize("UTC"), known_at=rows["known_at"].dt.tz_localize("UTC")
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


def judged(
    spark: SparkSession,
    root: Path,
    before: FleetSpec,
    after: FleetSpec,
    rows: pd.DataFrame,
    later: pd.DataFrame | None = None,
) -> tuple[Judgement, dict[str, pd.DataFrame]]:
    """Train by two specs, let the second challenge the first; the judgement, and both ledgers."""
    tables, ledgers, sides = DeltaTables(root=str(root)), {}, {}
    context = quiet_context(spark)
    for name, spec, seen in (
        ("old", before, rows),
        ("new", after, rows if later is None else later),
    ):
        run = plan_run(
            context,
            in_spark(spark, seen),
            spec,
            Request(name),
            History.read(own_tables(tables, spec.name)),
        )
        ledgers[name] = train_quietly(spark, own_tables(tables, spec.name), run, spec)
    for name in ("old", "new"):
        found = own_tables(tables, after.name).run(name)
        assert found is not None
        sides[name] = ComparedRun.of_ledger(found.generation, ledgers[name]), found
    (champion, _), (challenger, run) = sides["old"], sides["new"]
    contest = Comparison(run, challenger, {"old": champion}, dict.fromkeys(champion.groups, "old"))
    features = in_spark(spark, rows if later is None else later)
    return judge(context, own_tables(tables, after.name), features, after, contest), ledgers


@pytest.mark.parametrize(
    ("changes", "measure"),
    [
        ({}, "rmse"),
        ({"own": "correction"}, "rmse"),
        ({"tuning": {"objective": "quantile", "alpha": 0.8}}, "pinball"),
        ({"tuning": {"objective": "poisson"}}, "deviance"),
        ({"task": "binary", "target": {"column": "label"}, "baselines": None}, "log_loss"),
        ({"task": "multiclass", "target": {"column": "label"}, "baselines": None}, "log_loss"),
    ],
)
def test_a_twin_errs_as_its_own_run_did_on_the_same_rows(
    spark: SparkSession, tmp_path: Path, changes: dict[str, Any], measure: str
) -> None:
    names = {"binary": ("low", "high"), "multiclass": ("low", "middle", "high")}.get(
        str(changes.get("task")), ("any", "other")
    )
    rows = with_classes(feature_rows(335), names)
    specs = [
        small_spec(**{**changes, "tuning": {**changes.get("tuning", {}), **recipe}})
        for recipe in (STUMPS, TREES)
    ]
    judgement, ledgers = judged(spark, tmp_path, specs[0], specs[1], rows)
    decided = judgement.decisions.set_index("group_id")
    assert set(decided["kind"]) == {NEW_RECIPE}
    assert decided["p_value"].notna().all()
    for side, run in (("champion", "old"), ("challenger", "new")):
        finest = ledgers[run][ledgers[run]["grain"] == 2].set_index("group_id")
        for group, row in finest.iterrows():
            stated = json.loads(row["metrics"])["fleet"][measure]
            assert decided.loc[group, f"loss_{side}"] == pytest.approx(
                stated**2 if measure == "rmse" else stated, rel=1e-9
            )


def test_a_recipe_with_other_features_is_fitted_with_those(
    spark: SparkSession, tmp_path: Path
) -> None:
    rows = feature_rows(335)
    with_promotion = small_spec(tuning=STUMPS)
    without = small_spec(tuning=STUMPS, features={"columns": ["price"]})
    judgement, ledgers = judged(spark, tmp_path, with_promotion, without, rows)
    decided = judgement.decisions.set_index("group_id")
    assert not decided.loc[decided["grain"] == 2, "promoted"].any()
    expected = ledgers["old"].set_index("group_id")["report_blend"] ** 2
    pd.testing.assert_series_equal(
        decided["loss_champion"],
        expected.reindex(decided.index),
        check_names=False,
        check_exact=False,
        rtol=1e-9,
    )


def test_the_same_recipe_on_newer_rows_is_a_refresh_and_takes_no_fit(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.spark import comparison

    def fit(*_: Any) -> Any:
        raise AssertionError("a twin was fitted")

    monkeypatch.setattr(comparison, "train_aside", fit)
    # No grain's weight leaves 0 or comes to it, which would make another recipe of it.
    spec, rows = small_spec(tuning=STUMPS), feature_rows(340, seed=1)
    judgement, _ = judged(spark, tmp_path, spec, spec, rows[rows["time"] < "2024-12-01"], rows)
    decided = judgement.decisions
    assert set(decided["kind"]) == {REFRESH}
    assert decided["promoted"].all()
    again, _ = judged(spark, tmp_path / "again", spec, spec, rows)
    assert set(again.decisions["kind"]) == {UNCHANGED}
    assert again.is_whole
    assert not again.changes_answers
