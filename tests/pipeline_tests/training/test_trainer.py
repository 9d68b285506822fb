import json
from dataclasses import replace
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

import pipeline.training.trainer as trainer_module
from pipeline.models.meta_model import decode_booster, design_matrix, group_id
from pipeline.models.start import CrossSelection, Start, Winner
from pipeline.testing.data import (
    feature_rows,
    group_rows,
    small_spec,
    training_settings,
    with_classes,
)
from pipeline.training.outcome import Outcome
from pipeline.training.splits import EARLIER, FIT, GAP, REPORT, TUNE
from pipeline.training.trainer import RATE, TrainingSettings, judged_without_model, train_group
from pipeline.training.tuner import Learner, TrainingSet

FINEST = 2


@pytest.fixture(scope="session")
def oslo(rows: pd.DataFrame) -> pd.DataFrame:
    return group_rows(rows, region="north", city="oslo")


@pytest.fixture
def trained(oslo: pd.DataFrame, fleet_settings: TrainingSettings) -> Outcome:
    return train_group(oslo, FINEST, fleet_settings)


def split_of(frame: pd.DataFrame, settings: TrainingSettings) -> "pd.Series[str]":
    return pd.Series(
        settings.cutoffs.assign(frame["time"].to_numpy(), frame["known_at"].to_numpy()),
        index=frame.index,
    )


def settings_with(rows: pd.DataFrame, **changes: Any) -> TrainingSettings:
    return training_settings(small_spec(**changes), rows)


def holdout_of(outcome: Outcome) -> pd.DataFrame:
    assert outcome.holdout is not None
    return outcome.holdout


def booster_of(outcome: Outcome) -> lgb.Booster:
    assert outcome.booster is not None
    return lgb.Booster(model_str=decode_booster(vars(outcome.booster), "here"))


def test_a_trained_group_tells_all_about_itself(
    trained: Outcome, oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    counts = split_of(oslo, fleet_settings).value_counts()
    assert (trained.status, trained.reason) == ("trained", None)
    assert [trained.ledger[f"n_{name}"] for name in (FIT, TUNE, REPORT)] == [
        counts[name] for name in (FIT, TUNE, REPORT)
    ]
    assert trained.ledger["n_invalid"] == 0
    assert trained.ledger["booster_id"] == booster_id_of(trained)
    assert 1 <= trained.ledger["n_trials"] <= 2
    assert set(json.loads(trained.ledger["parameters"])) >= {"learning_rate", "num_leaves"}
    assert trained.ledger["seconds"] > 0


def booster_id_of(outcome: Outcome) -> str:
    assert outcome.booster is not None
    return outcome.booster.booster_id


def timeless(outcome: Outcome) -> dict[str, Any]:
    return {**outcome.ledger, "seconds": 0, "lightgbm_seconds": 0}


def test_a_group_trains_the_same_whatever_the_order_of_its_rows(
    trained: Outcome, oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    shuffled = oslo.sample(frac=1.0, random_state=3)
    again = train_group(shuffled[list(reversed(shuffled.columns))], FINEST, fleet_settings)
    assert booster_id_of(again) == booster_id_of(trained)
    pd.testing.assert_frame_equal(holdout_of(again), holdout_of(trained))
    assert timeless(again) == timeless(trained)


def test_a_group_trains_the_same_with_any_number_of_threads(
    trained: Outcome, oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    again = train_group(oslo, FINEST, training_settings(small_spec(), rows, threads=2))
    assert booster_id_of(again) == booster_id_of(trained)


def test_another_seed_trains_another_model(
    trained: Outcome, oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    assert booster_id_of(
        train_group(oslo, FINEST, settings_with(rows, tuning={"seed": 2}))
    ) != booster_id_of(trained)


def test_rows_are_not_changed(oslo: pd.DataFrame, fleet_settings: TrainingSettings) -> None:
    before = oslo.copy()
    train_group(oslo, FINEST, fleet_settings)
    pd.testing.assert_frame_equal(oslo, before)


def test_a_model_learns_what_there_is_to_learn(trained: Outcome) -> None:
    judged = holdout_of(trained)
    report = judged[judged["split"] == REPORT]
    error = np.sqrt(((report["actual"] - report["prediction"]) ** 2).mean())
    assert error < 0.7 * report["actual"].std()


# What must not be trained


def reason_of(frame: pd.DataFrame, settings: TrainingSettings, grain: int = FINEST) -> str | None:
    outcome = train_group(frame, grain, settings)
    assert (
        (outcome.status == "trained") == (outcome.reason is None) == (outcome.booster is not None)
    )
    return outcome.reason


@pytest.mark.parametrize("target", [None, np.nan, pd.NA])
def test_a_group_without_a_target_is_inherited(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, target: Any
) -> None:
    assert reason_of(oslo.assign(sales=target), fleet_settings) == "no_target"


def test_no_row_at_all_is_no_target(oslo: pd.DataFrame, fleet_settings: TrainingSettings) -> None:
    assert reason_of(oslo.iloc[:0], fleet_settings) == "no_target"


def test_a_constant_target_is_inherited(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    assert reason_of(oslo.assign(sales=3.0), fleet_settings) == "constant_target"


def test_a_target_that_is_constant_where_it_is_fitted_is_inherited(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    fit = split_of(oslo, fleet_settings) == FIT
    assert (
        reason_of(oslo.assign(sales=oslo["sales"].mask(fit, 3.0)), fleet_settings)
        == "constant_target"
    )


def test_a_target_that_equals_its_offset_is_constant(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    settings = settings_with(rows, target={"offset": "usual_sales"})
    assert reason_of(oslo.assign(usual_sales=oslo["sales"]), settings) == "constant_target"


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_target_is_inherited(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, value: float
) -> None:
    outcome = train_group(
        oslo.assign(sales=oslo["sales"].where(oslo.index > 10, value)), FINEST, fleet_settings
    )
    assert (outcome.status, outcome.reason, outcome.ledger["n_invalid"]) == (
        "inherited",
        "infinite_target",
        11,
    )


def test_infinite_targets_are_left_out_of_the_pooled_group_and_counted(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    bad = (rows["city"] == "oslo").to_numpy()
    outcome = train_group(rows.assign(sales=rows["sales"].mask(bad, np.inf)), 0, fleet_settings)
    without = train_group(rows[~bad], 0, fleet_settings)
    assert (outcome.status, outcome.ledger["n_invalid"]) == ("trained", bad.sum())
    assert booster_id_of(outcome) == booster_id_of(without)
    pd.testing.assert_frame_equal(holdout_of(outcome), holdout_of(without))


def test_one_bad_row_in_hundreds_does_not_cost_a_group_its_model(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    outcome = train_group(
        oslo.assign(sales=oslo["sales"].where(oslo.index > 0, np.inf)), FINEST, fleet_settings
    )
    assert (outcome.status, outcome.ledger["n_invalid"]) == ("trained", 1)


def test_targets_outside_the_transforms_domain_are_invalid(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    settings = settings_with(rows, target={"transform": "log"})
    assert (
        reason_of(oslo.assign(sales=oslo["sales"].where(oslo.index > 10, 0.0)), settings)
        == "infinite_target"
    )
    pooled = train_group(
        rows.assign(sales=rows["sales"].where(rows.index % 50 > 0, -1.0)), 0, settings
    )
    assert (pooled.status, pooled.ledger["n_invalid"]) == ("trained", 24)
    assert np.isfinite(holdout_of(pooled)["prediction"]).all()
    assert (holdout_of(pooled)["actual"] > 0).all()
    assert holdout_of(pooled)["prediction"].max() < 10  # the link's units


def test_a_pooled_group_of_nothing_but_invalid_targets_is_inherited(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    outcome = train_group(rows.assign(sales=np.inf), 0, fleet_settings)
    assert (outcome.status, outcome.ledger["n_invalid"]) == ("inherited", len(rows))


@pytest.mark.parametrize("needed", [{"fit_rows": 10_000}, {"tune_rows": 10_000}])
def test_too_few_rows_are_inherited(
    oslo: pd.DataFrame, rows: pd.DataFrame, needed: dict[str, int]
) -> None:
    assert reason_of(oslo, settings_with(rows, tuning=needed)) == "too_few_rows"


def test_exactly_enough_rows_are_enough(
    oslo: pd.DataFrame, rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    counts = split_of(oslo, fleet_settings).value_counts()
    enough = {"fit_rows": int(counts[FIT]), "tune_rows": int(counts[TUNE])}
    assert reason_of(oslo, settings_with(rows, tuning=enough)) is None
    assert (
        reason_of(oslo, settings_with(rows, tuning=enough | {"fit_rows": enough["fit_rows"] + 1}))
        == "too_few_rows"
    )
    assert (
        reason_of(oslo, settings_with(rows, tuning=enough | {"tune_rows": enough["tune_rows"] + 1}))
        == "too_few_rows"
    )


def test_a_group_of_one_row_is_inherited(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    assert reason_of(oslo.iloc[[0]], fleet_settings) == "too_few_rows"
    assert reason_of(oslo.iloc[[-1]], fleet_settings, grain=0) == "too_few_rows"


def test_rows_without_an_offset_do_not_count_as_fit_rows(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    settings = settings_with(rows, target={"offset": "usual_sales"})
    assert reason_of(oslo.assign(usual_sales=np.nan), settings) == "too_few_rows"


# Report rows and the served booster


def test_report_rows_neither_tune_nor_choose(
    oslo: pd.DataFrame, trained: Outcome, fleet_settings: TrainingSettings
) -> None:
    report = split_of(oslo, fleet_settings) == REPORT
    again = train_group(
        oslo.assign(sales=oslo["sales"].mask(report, oslo["sales"] * 3 + 1)), FINEST, fleet_settings
    )
    same = ["n_rounds", "parameters", "tune_loss", "n_trials", "stopped_by"]
    assert [again.ledger[name] for name in same] == [trained.ledger[name] for name in same]
    pd.testing.assert_series_equal(
        holdout_of(again)["prediction"], holdout_of(trained)["prediction"], check_exact=True
    )
    assert booster_id_of(again) != booster_id_of(trained)  # which is fitted on all rows


def test_tune_predictions_know_no_report_row_and_report_predictions_know_tune_rows(
    oslo: pd.DataFrame, trained: Outcome, fleet_settings: TrainingSettings
) -> None:
    tune = split_of(oslo, fleet_settings) == TUNE
    again = train_group(
        oslo.assign(sales=oslo["sales"].mask(tune, oslo["sales"] + 40)), FINEST, fleet_settings
    )
    before, after = (holdout_of(outcome).set_index("row_key") for outcome in (trained, again))
    report = before["split"] == REPORT
    assert after.loc[report, "prediction"].mean() > before.loc[report, "prediction"].mean() + 2


def test_rows_before_the_tune_split_are_predicted_from_what_lies_before_them(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    settings = settings_with(rows, splits={"report": "1 month", "tune": "1 month"})
    trained = train_group(oslo, FINEST, settings)
    judged = holdout_of(trained).set_index("row_key")
    end = settings.cutoffs.tune_start
    for start in settings.cutoffs.earlier_starts:
        stretch = oslo[(oslo["time"] >= start) & (oslo["time"] < end)]
        expected = refitted(oslo, settings, oslo["time"] < start, trained).predict(
            design_matrix(stretch, settings.model_spec)
        )
        assert np.array_equal(judged.loc[stretch["row_key"], "prediction"], expected)
        assert set(judged.loc[stretch["row_key"], "split"]) == {EARLIER}
        end = start


@pytest.mark.parametrize(("fit_rows", "n_stretches"), [(50, 1), (180, 0)])
def test_a_stretch_with_too_few_rows_before_it_is_not_held_out(
    oslo: pd.DataFrame, rows: pd.DataFrame, fit_rows: int, n_stretches: int
) -> None:
    """There are 213 fit rows, 152 of them before the newer stretch and 91 before the older one."""
    settings = settings_with(rows, tuning={"fit_rows": fit_rows})
    outcome = train_group(oslo, FINEST, settings)
    assert outcome.ledger["n_fit"] == 213
    judged = holdout_of(outcome)
    earlier = judged.loc[judged["split"] == EARLIER, "time"]
    newer, older = settings.cutoffs.earlier_starts
    assert [(oslo["time"] < start).sum() for start in (newer, older)] == [152, 91]
    if n_stretches:
        last = settings.cutoffs.tune_start - pd.Timedelta("1D")
        assert (earlier.min(), earlier.max()) == (newer, last)
    else:
        assert earlier.empty


def test_a_stretch_that_nothing_can_be_learnt_for_is_not_held_out(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    """Nothing was sold before it: some objectives refuse such targets."""
    settings = settings_with(rows, tuning={"objective": "poisson"})
    start = settings.cutoffs.earlier_starts[0]
    new = oslo.assign(sales=oslo["sales"].where(oslo["time"] >= start, 0.0))
    outcome = train_group(new, FINEST, settings)
    assert (outcome.status, outcome.reason) == ("trained", None)
    assert EARLIER not in set(holdout_of(outcome)["split"])


def refitted(
    frame: pd.DataFrame, settings: TrainingSettings, chosen: "pd.Series[bool]", outcome: Outcome
) -> lgb.Booster:
    ordered = frame[chosen].sort_values(["time", "row_key"])
    matrix = design_matrix(ordered, settings.model_spec)
    categoricals = settings.model_spec.categorical_positions
    parameters = json.loads(outcome.ledger["parameters"])
    rows = TrainingSet(matrix, ordered["sales"].to_numpy(), None)
    learner = Learner(settings.goal, settings.tuning, categoricals)
    return learner.fit(rows, parameters, outcome.ledger["n_rounds"])


def test_the_served_booster_is_fitted_on_all_rows(
    oslo: pd.DataFrame, trained: Outcome, fleet_settings: TrainingSettings
) -> None:
    matrix = design_matrix(oslo, fleet_settings.model_spec)
    everything = pd.Series(data=True, index=oslo.index)
    assert np.array_equal(
        booster_of(trained).predict(matrix),
        refitted(oslo, fleet_settings, everything, trained).predict(matrix),
    )
    assert booster_of(trained).num_trees() == trained.ledger["n_rounds"]


def test_report_rows_are_predicted_from_fit_and_tune_rows(
    oslo: pd.DataFrame, trained: Outcome, fleet_settings: TrainingSettings
) -> None:
    split = split_of(oslo, fleet_settings)
    judged = holdout_of(trained).set_index("row_key")
    report = oslo[split == REPORT]
    expected = refitted(oslo, fleet_settings, split.isin([FIT, TUNE]), trained).predict(
        design_matrix(report, fleet_settings.model_spec)
    )
    assert np.array_equal(judged.loc[report["row_key"], "prediction"], expected)


def test_a_group_without_report_rows_is_trained(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    outcome = train_group(oslo[split_of(oslo, fleet_settings) != REPORT], FINEST, fleet_settings)
    assert (outcome.status, outcome.ledger["n_report"]) == ("trained", 0)
    assert set(holdout_of(outcome)["split"]) == {EARLIER, TUNE}


def test_every_group_is_fitted_four_times_and_no_more(
    monkeypatch: pytest.MonkeyPatch, oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    trains: list[int] = []
    train = lgb.train
    monkeypatch.setattr(
        lgb, "train", lambda *args, **kwargs: trains.append(1) or train(*args, **kwargs)
    )
    train_group(oslo, FINEST, settings_with(rows, tuning={"max_trials": 1}))
    # The trial, the one that is reported, the one before the tune split, the one that is served.
    assert len(trains) == 4


# Holdout rows


def test_holdout_rows_are_every_judged_row_with_its_groups(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    outcome = train_group(rows, 0, fleet_settings)
    judged = holdout_of(outcome).set_index("row_key")
    first = fleet_settings.cutoffs.earlier_starts[0]
    expected = rows[rows["time"] >= first].set_index("row_key")
    assert judged.index.is_unique
    is_fit = (split_of(rows, fleet_settings) == FIT).set_axis(rows["row_key"])
    assert set(judged.index[judged["split"] == EARLIER]) == set(
        expected.index[is_fit[expected.index]]
    )
    assert set(judged.index) == set(expected.index)
    expected = expected.loc[judged.index]
    assert judged["actual"].tolist() == expected["sales"].tolist()
    ids = [
        ["[]", group_id([r]), group_id([r, c])]
        for r, c in zip(expected["region"], expected["city"], strict=True)
    ]
    assert [list(found) for found in judged["group_ids"]] == ids
    assert judged["class_name"].isna().all()
    assert (judged["weight"] == 1).all()
    assert (judged[["offset", "scale"]] == [0.0, 1.0]).all(axis=None)


def test_gap_rows_are_neither_fitted_nor_judged_but_served(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    late = oslo["time"].between("2024-06-01", "2024-06-20")
    frame = oslo.assign(known_at=oslo["known_at"].mask(late, oslo["time"].max()))
    assert (split_of(frame, fleet_settings) == GAP).sum() == late.sum()
    outcome = train_group(frame, FINEST, fleet_settings)
    wild = train_group(
        frame.assign(sales=frame["sales"].mask(late, frame["sales"] + 30)), FINEST, fleet_settings
    )
    assert not set(oslo.loc[late, "row_key"]) & set(holdout_of(outcome)["row_key"])
    pd.testing.assert_frame_equal(holdout_of(outcome), holdout_of(wild))
    assert booster_id_of(outcome) != booster_id_of(wild)


@pytest.mark.parametrize(
    "frame_of",
    [lambda rows: rows.assign(sales=3.0), lambda rows: rows[rows["time"] >= "2024-10-01"]],
)
def test_a_pooled_group_without_a_model_still_has_its_rows_judged(
    rows: pd.DataFrame, fleet_settings: TrainingSettings, frame_of: Any
) -> None:
    frame = frame_of(rows)
    outcome = train_group(frame, 0, fleet_settings)
    judged = holdout_of(outcome)
    assert outcome.status == "inherited"
    assert len(judged) == split_of(frame, fleet_settings).isin([TUNE, REPORT]).sum() > 0
    assert judged["prediction"].isna().all()
    pd.testing.assert_frame_equal(judged, judged_without_model(frame, fleet_settings))


def test_a_finer_group_without_a_model_has_no_holdout_rows(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    assert train_group(oslo.assign(sales=3.0), FINEST, fleet_settings).holdout is None


def test_judged_rows_without_an_offset_have_no_prediction(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    settings = settings_with(rows, target={"offset": "usual_sales"})
    outcome = train_group(
        oslo.assign(usual_sales=oslo["usual_sales"].mask(oslo.index % 10 == 0)), FINEST, settings
    )
    judged = holdout_of(outcome)
    assert outcome.status == "trained"
    assert judged["offset"].isna().any()
    assert (judged["prediction"].isna() == judged["offset"].isna()).all()


def test_a_pooled_group_of_no_row_has_nothing_to_judge(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    assert len(holdout_of(train_group(rows.iloc[:0], 0, fleet_settings))) == 0


# Targets, offsets, weights


def test_an_offset_and_a_scale_are_taken_off_before_learning(
    oslo: pd.DataFrame, rows: pd.DataFrame, trained: Outcome
) -> None:
    settings = settings_with(rows, target={"offset": "level", "scale": "size"})
    outcome = train_group(
        oslo.assign(level=1000.0, size=2.0, sales=oslo["sales"] * 2 + 1000), FINEST, settings
    )
    one, other = (holdout_of(found)["prediction"] for found in (outcome, trained))
    assert one.to_numpy() == pytest.approx(other.to_numpy(), rel=1e-6)


def test_rows_of_no_weight_do_not_count(oslo: pd.DataFrame, rows: pd.DataFrame) -> None:
    settings = settings_with(rows, target={"weight": "size"})
    light = oslo.index.to_numpy() % 3 == 0
    weighted = [
        train_group(
            oslo.assign(size=np.where(light, nothing, 1.0), sales=oslo["sales"].mask(light, wild)),
            FINEST,
            settings,
        )
        for nothing, wild in ((0.0, 1.0), (np.nan, 900.0), (-1.0, 900.0), (np.inf, 900.0))
    ]
    assert {outcome.status for outcome in weighted} == {"trained"}
    predictions = [holdout_of(outcome)["prediction"].to_numpy() for outcome in weighted]
    for found in predictions[1:]:
        assert found == pytest.approx(predictions[0], rel=1e-6)
    # Not even as rows that are judged, or that fill a leaf: the group is the one without them.
    without = train_group(oslo[~light].assign(size=1.0), FINEST, settings)
    for outcome in weighted:
        assert timeless(outcome) == timeless(without)
        pd.testing.assert_frame_equal(holdout_of(outcome), holdout_of(without))


def test_weights_change_what_is_learnt(oslo: pd.DataFrame, rows: pd.DataFrame) -> None:
    settings = settings_with(rows, target={"weight": "size"})
    cheap = oslo["price"].to_numpy() < 10
    one, other = (
        train_group(oslo.assign(size=np.where(cheap, a, b)), FINEST, settings)
        for a, b in ((1.0, 1.0), (20.0, 0.1))
    )
    assert booster_id_of(one) != booster_id_of(other)


def test_a_group_in_which_no_row_has_weight_does_not_end_the_run(
    oslo: pd.DataFrame, rows: pd.DataFrame
) -> None:
    outcome = train_group(
        oslo.assign(size=0.0), FINEST, settings_with(rows, target={"weight": "size"})
    )
    assert (outcome.status, outcome.reason) == ("inherited", "no_target")


def test_categories_are_learnt_from(fleet_settings: TrainingSettings) -> None:
    frame = group_rows(feature_rows(seed=4, noise=0.5), city="oslo")
    frame["sales"] += 60 * (frame["kind"] == "large")
    judged = holdout_of(train_group(frame, FINEST, fleet_settings)).merge(
        frame[["row_key", "kind"]], on="row_key"
    )
    means = judged.groupby("kind")["prediction"].mean()
    assert means["large"] - means["small"] > 25


def test_the_library_trains_with_the_rounds_that_the_study_found(
    monkeypatch: pytest.MonkeyPatch, oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    rounds: list[int] = []
    fit = Learner.fit
    monkeypatch.setattr(Learner, "fit", lambda *args: rounds.append(args[3]) or fit(*args))
    outcome = train_group(oslo, FINEST, fleet_settings)
    assert rounds == [outcome.ledger["n_rounds"]] * 3


# What earlier runs left


@pytest.fixture
def refit(trained: Outcome) -> Start:
    cross = CrossSelection.from_json(trained.ledger["cross_selection"])
    return Start(
        refit=json.loads(trained.ledger["parameters"]),
        n_rounds=trained.ledger["n_rounds"],
        cross=cross,
    )


def test_a_refitted_group_is_the_one_that_was_tuned_so(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, trained: Outcome, refit: Start
) -> None:
    found = train_group(oslo, FINEST, fleet_settings, refit)
    assert (found.status, found.reason, found.ledger["n_trials"], found.ledger["n_pruned"]) == (
        "refreshed",
        None,
        0,
        0,
    )
    assert booster_id_of(found) == booster_id_of(trained)
    for name in ("parameters", "cross_selection", "n_rounds", "n_fit", "n_tune", "n_report"):
        assert found.ledger[name] == trained.ledger[name]
    assert {"tune_loss", "stopped_by"}.isdisjoint(found.ledger)
    judged, before = holdout_of(found), holdout_of(trained)
    assert judged["prediction"].notna().all()
    # Tune rows, too: each is predicted by the winner of the half that it does not lie in.
    pd.testing.assert_frame_equal(judged, before)


def test_a_refit_predicts_each_tune_row_with_what_was_chosen_without_it(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, refit: Start
) -> None:
    # Since the halves were cut, the tune rows have moved on: the cut lies early among them.
    tune_start, report_start = (
        fleet_settings.cutoffs.tune_start,
        fleet_settings.cutoffs.report_start,
    )
    middle = tune_start + (report_start - tune_start) / 4
    earlier, later = (
        Winner({**(refit.refit or {}), "num_leaves": 3}, 7),
        Winner({**(refit.refit or {}), "num_leaves": 5}, 19),
    )

    def rows_of(split: str, cross: CrossSelection | None) -> pd.DataFrame:
        judged = holdout_of(train_group(oslo, FINEST, fleet_settings, replace(refit, cross=cross)))
        return judged[judged["split"] == split]

    def tune_rows(cross: CrossSelection) -> pd.DataFrame:
        return rows_of(TUNE, cross)

    both = tune_rows(CrossSelection(middle.isoformat(), earlier, later))
    # Where one half had no rows, the other half's winner predicts all.
    only_earlier, only_later = (
        tune_rows(CrossSelection(middle.isoformat(), *pair))
        for pair in ((earlier, None), (None, later))
    )
    is_before = both["time"] < middle
    assert is_before.any()
    assert not is_before.all()
    assert (
        both["prediction"] == only_later["prediction"].where(is_before, only_earlier["prediction"])
    ).all()
    assert (only_earlier["prediction"] != only_later["prediction"]).any()
    # Rows before the tune split may be tune rows of the run that chose the parameters.
    by_winners, by_one, by_recipe = (
        rows_of(EARLIER, cross)["prediction"].to_numpy()
        for cross in (
            CrossSelection(middle.isoformat(), earlier, later),
            CrossSelection(middle.isoformat(), None, later),
            None,
        )
    )
    assert np.array_equal(by_winners, by_one)
    assert not np.array_equal(by_winners, by_recipe)


def test_a_refit_is_deterministic_and_searches_nothing(
    monkeypatch: pytest.MonkeyPatch,
    oslo: pd.DataFrame,
    fleet_settings: TrainingSettings,
    refit: Start,
) -> None:
    monkeypatch.setattr(trainer_module, "Study", None)
    one, other = (
        train_group(oslo.sample(frac=1.0, random_state=seed), FINEST, fleet_settings, refit)
        for seed in (1, 2)
    )
    assert booster_id_of(one) == booster_id_of(other)
    pd.testing.assert_frame_equal(holdout_of(one), holdout_of(other))
    assert timeless(one) == timeless(other)


def test_tune_rows_of_a_refit_are_predicted_without_having_been_seen(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, refit: Start
) -> None:
    later = oslo.assign(
        sales=oslo["sales"].mask(split_of(oslo, fleet_settings) != FIT, oslo["sales"] + 500)
    )
    one, other = (
        holdout_of(train_group(frame, FINEST, fleet_settings, refit)) for frame in (oslo, later)
    )
    tune = one["split"] == TUNE
    assert np.array_equal(one.loc[tune, "prediction"], other.loc[tune, "prediction"])


def test_a_refit_is_checked_before_like_any_group(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, refit: Start
) -> None:
    assert (
        train_group(oslo.assign(sales=3.0), FINEST, fleet_settings, refit).reason
        == "constant_target"
    )


def test_a_group_that_only_judges_is_not_trained(
    rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    outcome = train_group(rows, 0, fleet_settings, Start(judge=True))
    assert (outcome.status, outcome.reason, outcome.booster) == ("inherited", "pooling_none", None)
    pd.testing.assert_frame_equal(holdout_of(outcome), judged_without_model(rows, fleet_settings))


def test_a_sampled_row_stands_for_those_that_were_left_out(
    oslo: pd.DataFrame, rows: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    rate = np.where(oslo.index % 2, 1.0, 0.25)
    sampled = train_group(oslo.assign(**{RATE: rate}), 0, fleet_settings)
    weighted = train_group(
        oslo.assign(size=1 / rate), 0, settings_with(rows, target={"weight": "size"})
    )
    assert booster_id_of(sampled) == booster_id_of(weighted)
    assert set(holdout_of(sampled)["weight"]) == {1.0, 4.0}
    pd.testing.assert_frame_equal(holdout_of(sampled), holdout_of(weighted))


def test_weights_and_rates_multiply(oslo: pd.DataFrame, rows: pd.DataFrame) -> None:
    settings = settings_with(rows, target={"weight": "size"})
    found = holdout_of(train_group(oslo.assign(size=3.0, **{RATE: 0.5}), 0, settings))
    assert set(found["weight"]) == {6.0}


# Tasks


STEPS = {"binary": ("no", "yes"), "multiclass": ("low", "mid", "top")}


def class_settings(frame: pd.DataFrame, task: str, **changes: Any) -> TrainingSettings:
    target = {"column": "label", "classes": list(STEPS[task]), **changes.pop("target", {})}
    return settings_with(frame, task=task, target=target, baselines=None, **changes)


@pytest.fixture(params=STEPS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def labelled(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    return with_classes(rows, STEPS[task])


def test_classes_are_learnt(labelled: pd.DataFrame, task: str) -> None:
    settings = class_settings(labelled, task)
    judged = holdout_of(train_group(group_rows(labelled, city="oslo"), FINEST, settings))
    names = STEPS[task] if task == "multiclass" else (None,)
    assert [
        name if isinstance(name, str) else None for name in judged["class_name"].unique()
    ] == list(names)
    assert set(judged["actual"]) == {0.0, 1.0}
    assert judged["prediction"].between(0, 1).all()
    report = judged[judged["split"] == REPORT]
    error = ((report["actual"] - report["prediction"]) ** 2).mean()
    assert error < 0.8 * report["actual"].var()


def test_labels_that_are_booleans_or_integers_are_classes(rows: pd.DataFrame) -> None:
    high = rows["sales"] > rows["sales"].median()
    outcomes = []
    for labels, classes in (
        (high, ["false", "true"]),
        (high.astype(int), ["0", "1"]),
        (high.map({True: "yes", False: "no"}), ["no", "yes"]),
    ):
        frame = rows.assign(label=labels)
        outcomes.append(
            train_group(frame, 0, class_settings(frame, "binary", target={"classes": classes}))
        )
    assert len({booster_id_of(outcome) for outcome in outcomes}) == 1


def test_the_positive_class_is_the_last(rows: pd.DataFrame) -> None:
    frame = with_classes(rows, STEPS["binary"])
    one, other = (
        holdout_of(
            train_group(frame, 0, class_settings(frame, "binary", target={"classes": classes}))
        )
        for classes in (["no", "yes"], ["yes", "no"])
    )
    assert one["actual"].to_numpy() == pytest.approx(1 - other["actual"].to_numpy())
    assert one["prediction"].to_numpy() == pytest.approx(
        1 - other["prediction"].to_numpy(), abs=1e-6
    )


def test_a_group_of_one_class_is_constant(labelled: pd.DataFrame, task: str) -> None:
    settings = class_settings(labelled, task)
    assert (
        reason_of(group_rows(labelled, city="oslo").assign(label=STEPS[task][1]), settings)
        == "constant_target"
    )


def test_a_group_that_lacks_a_class_is_trained_all_the_same(rows: pd.DataFrame) -> None:
    frame = with_classes(rows, STEPS["multiclass"])
    frame["label"] = frame["label"].replace("mid", "low")
    outcome = train_group(
        group_rows(frame, city="oslo"), FINEST, class_settings(frame, "multiclass")
    )
    judged = holdout_of(outcome)
    assert outcome.status == "trained"
    assert judged.loc[judged["class_name"] == "mid", "prediction"].max() < 1e-3
    assert booster_of(outcome).predict(np.zeros((2, 4))).shape == (2, 3)


def test_a_label_of_no_class_is_invalid(labelled: pd.DataFrame, task: str) -> None:
    settings, oslo = class_settings(labelled, task), group_rows(labelled, city="oslo")
    one = train_group(
        oslo.assign(label=oslo["label"].where(oslo.index > 0, "odd")), FINEST, settings
    )
    assert (one.status, one.ledger["n_invalid"]) == ("trained", 1)
    many = train_group(
        oslo.assign(label=oslo["label"].where(oslo.index > 10, "odd")), FINEST, settings
    )
    assert (many.status, many.reason, many.ledger["n_invalid"]) == (
        "inherited",
        "unknown_class",
        11,
    )
    pooled = train_group(
        labelled.assign(label=labelled["label"].where(labelled.index % 50 > 0, "odd")), 0, settings
    )
    assert (pooled.status, pooled.ledger["n_invalid"]) == ("trained", 24)
    odd = set(labelled.loc[labelled.index % 50 == 0, "row_key"])
    assert not odd & set(holdout_of(pooled)["row_key"])


def test_a_row_without_a_label_is_left_out_and_not_invalid(
    labelled: pd.DataFrame, task: str
) -> None:
    oslo = group_rows(labelled, city="oslo")
    outcome = train_group(
        oslo.assign(label=oslo["label"].where(oslo.index > 20)),
        FINEST,
        class_settings(labelled, task),
    )
    assert (outcome.status, outcome.ledger["n_invalid"]) == ("trained", 0)
    assert (
        train_group(oslo.assign(label=None), FINEST, class_settings(labelled, task)).reason
        == "no_target"
    )


def test_a_pooled_group_of_classes_without_a_model_still_has_its_rows_judged(
    labelled: pd.DataFrame, task: str
) -> None:
    settings = class_settings(labelled, task, tuning={"fit_rows": 100_000})
    judged = holdout_of(train_group(labelled, 0, settings))
    n_classes = 3 if task == "multiclass" else 1
    assert len(judged) == n_classes * split_of(labelled, settings).isin([TUNE, REPORT]).sum()
    assert judged["prediction"].isna().all()
    pd.testing.assert_frame_equal(judged, judged_without_model(labelled, settings))


def test_rows_of_no_weight_teach_no_class(labelled: pd.DataFrame, task: str) -> None:
    oslo = group_rows(labelled, city="oslo")
    settings = class_settings(labelled, task, target={"weight": "size"})
    light = oslo.index.to_numpy() % 3 == 0
    first, last = STEPS[task][0], STEPS[task][-1]
    predictions = [
        holdout_of(
            train_group(
                oslo.assign(size=np.where(light, 0.0, 1.0), label=oslo["label"].mask(light, label)),
                FINEST,
                settings,
            )
        )["prediction"]
        for label in (first, last)
    ]
    assert predictions[0].to_numpy() == pytest.approx(predictions[1].to_numpy(), abs=1e-6)


TASKS: dict[str, dict[str, Any]] = {
    **{name: {"task": name, "target": {"column": "label"}} for name in STEPS},
    **{
        name: {"tuning": {"objective": name}}
        for name in ("l2", "quantile", "poisson", "tweedie", "huber")
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_unseen_categories_and_nulls_are_missing_values_in_every_task(
    rows: pd.DataFrame, name: str
) -> None:
    frame = with_classes(rows, STEPS.get(name, ("a", "b"))).assign(
        sales=rows["sales"].clip(lower=0.0)
    )
    settings = settings_with(frame, baselines=None, **TASKS[name])
    late = split_of(frame, settings) == REPORT
    unseen, missing = (
        holdout_of(train_group(frame.assign(kind=frame["kind"].mask(late, kind)), 0, settings))
        for kind in ("huge", None)
    )
    assert np.array_equal(unseen["prediction"], missing["prediction"])
    assert np.isfinite(unseen["prediction"]).all()
    empty = train_group(frame.assign(price=np.nan, kind=None), 0, settings)
    assert empty.status == "trained"
    assert np.isfinite(holdout_of(empty)["prediction"]).all()


@pytest.mark.parametrize("objective", ["poisson", "tweedie"])
def test_counts_below_zero_are_invalid_and_the_answer_is_the_mean(
    oslo: pd.DataFrame, rows: pd.DataFrame, objective: str
) -> None:
    settings = settings_with(rows, tuning={"objective": objective})
    counts = oslo.assign(sales=oslo["sales"].clip(lower=0.0).round())
    few = train_group(
        counts.assign(sales=counts["sales"].where(counts.index > 0, -1.0)), FINEST, settings
    )
    assert (few.status, few.ledger["n_invalid"]) == ("trained", 1)
    many = train_group(
        counts.assign(sales=counts["sales"].where(counts.index > 10, -1.0)), FINEST, settings
    )
    assert (many.status, many.reason) == ("inherited", "infinite_target")
    judged = holdout_of(train_group(counts, FINEST, settings))
    report = judged[judged["split"] == REPORT]
    assert report["prediction"].mean() == pytest.approx(report["actual"].mean(), rel=0.1)
    assert train_group(counts.assign(sales=0.0), FINEST, settings).reason == "constant_target"


def test_a_quantile_lies_where_it_should(rows: pd.DataFrame) -> None:
    shares = []
    for alpha in (0.1, 0.5, 0.9):
        settings = settings_with(
            rows, tuning={"objective": "quantile", "alpha": alpha, "max_rounds": 300}
        )
        judged = holdout_of(train_group(rows, 0, settings))
        shares.append(float((judged["actual"] < judged["prediction"]).mean()))
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[2] > 0.7


@pytest.mark.parametrize("name", ["l2", "huber", "poisson", "tweedie", "binary"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_monotone_answer_only_rises_or_only_falls(
    rows: pd.DataFrame, name: str, sign: int
) -> None:
    frame = with_classes(rows, ("no", "yes")).assign(sales=rows["sales"].clip(lower=0.0))
    changes = (
        {"task": "binary", "target": {"column": "label"}}
        if name == "binary"
        else {"tuning": {"objective": name}}
    )
    boosters = [
        booster_of(
            train_group(
                frame,
                0,
                settings_with(frame, baselines=None, features={"monotone": monotone}, **changes),
            )
        )
        for monotone in ({"price": sign}, {})
    ]
    prices = np.linspace(5, 15, 50)
    questions = np.column_stack([prices, np.ones(50), np.full(50, 2.0), np.zeros(50)])
    constrained, free = (np.diff(booster.predict(questions)) * sign for booster in boosters)
    assert (constrained >= 0).all()
    assert (
        sign == -1 or (free < 0).any()
    )  # sales fall with the price: left alone, so do the answers
