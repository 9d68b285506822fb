from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from benchmarks.generated import GeneratedFleet, tuning_gain, write_features
from pipeline.training.splits import FIT, REPORT, TUNE, resolve_cutoffs


def shares(rows: pd.DataFrame, fleet: GeneratedFleet) -> pd.DataFrame:
    """Per group the share of its rows in each split."""
    newest = rows["time"].max()
    cutoffs = resolve_cutoffs(fleet.spec().splits, newest, newest)
    split = cutoffs.assign(rows["time"].to_numpy(), rows["known_at"].to_numpy())
    return pd.crosstab(rows["group"], split, normalize="index")


def test_one_seed_gives_one_fleet() -> None:
    pd.testing.assert_frame_equal(
        GeneratedFleet(3, seed=5).rows(), GeneratedFleet(3, seed=5).rows()
    )
    assert not np.allclose(
        GeneratedFleet(3, seed=5).rows()["y"], GeneratedFleet(3, seed=6).rows()["y"]
    )


def test_groups_are_the_same_asked_for_alone() -> None:
    fleet = GeneratedFleet(6, 200, skew=1.0)
    rows = fleet.rows()
    wanted = rows[rows["group"].isin(["g00002", "g00003"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(fleet.rows(2, 4), wanted)


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.1, 2.0])
@pytest.mark.parametrize("n_groups", [1, 7, 1000])
def test_skewed_groups_have_as_many_rows_as_equal_ones(n_groups: int, skew: float) -> None:
    sizes = GeneratedFleet(n_groups, 500, skew=skew, minimum_rows=150).sizes()
    assert sizes.sum() == n_groups * 500
    assert sizes.min() >= 150
    assert (np.diff(sizes) <= 0).all()
    if skew == 0:
        assert set(sizes) == {500}


def test_sizes_above_the_minimum_follow_zipf() -> None:
    above = GeneratedFleet(100, 500, skew=1.0, minimum_rows=100).sizes() - 100
    np.testing.assert_allclose(above[0] / above[[1, 3, 9]], [2, 4, 10], rtol=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"n_groups": 0},
        {"skew": -1},
        {"n_features": 0},
        {"signal": "loud"},
        {"rows_per_group": 20_000_000},
    ],
)
def test_an_impossible_fleet_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        GeneratedFleet(**{"n_groups": 2, **change})


@pytest.mark.parametrize("signal", ["tuned", "tiny"])
def test_a_row_is_a_row_of_a_feature_table(signal: str) -> None:
    fleet = GeneratedFleet(3, 200, skew=0.5, signal=signal, n_features=4)
    rows = fleet.rows()
    assert list(rows) == [
        "group",
        "time",
        "known_at",
        "is_future",
        "row_key",
        "x0",
        "x1",
        "x2",
        "x3",
        "y",
    ]
    assert rows["time"].dtype == "datetime64[us]"
    assert rows["row_key"].is_unique
    assert rows["row_key"][0] == f'["g00000","{rows["time"][0]}"]'
    assert np.isfinite(rows[[*fleet.features, "y"]]).all(axis=None)
    assert not rows["is_future"].any()
    assert (rows["known_at"] == rows["time"]).all()


def test_every_group_of_500_rows_is_split_70_15_15() -> None:
    fleet = GeneratedFleet(3, 500)
    found = shares(fleet.rows(), fleet)
    np.testing.assert_allclose(found[[FIT, TUNE, REPORT]], np.tile([0.70, 0.15, 0.15], (3, 1)))


def test_groups_of_any_size_are_split_about_70_15_15() -> None:
    fleet = GeneratedFleet(30, 500, skew=1.2)
    found = shares(fleet.rows(), fleet)
    np.testing.assert_allclose(
        found[[FIT, TUNE, REPORT]], np.tile([0.70, 0.15, 0.15], (30, 1)), atol=0.01
    )


def test_a_tiny_group_has_about_60_rows_to_learn_from_and_is_large_enough() -> None:
    fleet = GeneratedFleet(1, 70, signal="tiny")
    n_rows = 70 * shares(fleet.rows(), fleet).iloc[0]
    assert n_rows[FIT] + n_rows[TUNE] == pytest.approx(59)
    tuning = fleet.spec().tuning
    assert n_rows[FIT] >= tuning.fit_rows
    assert n_rows[TUNE] >= tuning.tune_rows


def test_rivals_get_the_cutoffs_of_a_run() -> None:
    fleet = GeneratedFleet(2, 160, skew=1.0)
    newest = fleet.rows()["time"].max()
    cutoffs = resolve_cutoffs(fleet.spec().splits, newest, newest)
    problem = fleet.problem()
    assert (problem.tune_start, problem.report_start) == (cutoffs.tune_start, cutoffs.report_start)


def test_attributes_are_changed_field_by_field() -> None:
    spec = GeneratedFleet(2).spec(
        tuning={"max_trials": 3}, baselines={"first": "x0"}, pooling="none"
    )
    assert (spec.tuning.max_trials, spec.tuning.patience, spec.pooling) == (3, 20, "none")
    assert GeneratedFleet(2).spec(tuning=None).tuning.max_trials == 12


def test_features_are_written_in_several_files(tmp_path: Path) -> None:
    fleet = GeneratedFleet(9, 200, skew=0.8, n_features=2)
    write_features(GeneratedFleet(4, 200), tmp_path / "features")
    write_features(fleet, tmp_path / "features", n_files=3)
    table = DeltaTable(tmp_path / "features")
    assert 2 <= len(table.file_uris()) <= 3
    found = table.to_pyarrow_table().sort_by([("row_key", "ascending")])
    assert found.schema.field("time").type == pa.timestamp("us", tz="UTC")
    wanted = fleet.rows().sort_values("row_key", ignore_index=True)
    pd.testing.assert_frame_equal(
        found.to_pandas()[["group", "row_key", "x0", "x1", "y"]],
        wanted[["group", "row_key", "x0", "x1", "y"]],
    )
    assert (found["time"].to_pandas().dt.tz_localize(None) == wanted["time"]).all()


def test_tuning_pays() -> None:
    assert tuning_gain(GeneratedFleet(3, 500), 3) > 0.03
