from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

from pipeline.models.importance import group_importance
from pipeline.models.meta_model import design_matrix
from pipeline.testing.data import group_rows, with_classes
from pipeline.training.trainer import TrainingSettings

OBJECTIVES: dict[str, dict[str, Any]] = {
    "regression": {"objective": "l2"},
    "binary": {"objective": "binary"},
    "multiclass": {"objective": "multiclass", "num_class": 3},
}


def booster_of(matrix: Any, target: Any, **parameters: Any) -> lgb.Booster:
    data = lgb.Dataset(matrix, target, params={"verbosity": -1})
    fitted = lgb.train(
        {"verbosity": -1, "num_threads": 1, "num_leaves": 7, **parameters}, data, num_boost_round=12
    )
    return lgb.Booster(model_str=fitted.model_to_string())


def target_of(rows: pd.DataFrame, task: str) -> Any:
    if task == "regression":
        return rows["sales"].to_numpy()
    names = ("no", "yes") if task == "binary" else ("low", "mid", "top")
    return pd.factorize(with_classes(rows, names)["label"], sort=True)[0]


@pytest.fixture(scope="module")
def oslo(rows: pd.DataFrame) -> pd.DataFrame:
    return group_rows(rows, city="oslo")


@pytest.mark.parametrize("task", OBJECTIVES)
def test_gain_splits_and_shap_are_lightgbms_own(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings, task: str
) -> None:
    model_spec = fleet_settings.model_spec
    matrix = design_matrix(oslo, model_spec)
    booster = booster_of(matrix, target_of(oslo, task), **OBJECTIVES[task])
    found = group_importance(booster, oslo, model_spec)
    assert tuple(found["feature"]) == model_spec.features
    gain = booster.feature_importance("gain")
    assert found["gain"].tolist() == gain.tolist()
    assert found["gain_share"].tolist() == (gain / gain.sum()).tolist()
    assert found["gain_share"].sum() == pytest.approx(1.0)
    assert found["n_splits"].tolist() == booster.feature_importance("split").tolist()
    n_classes = OBJECTIVES[task].get("num_class", 1)
    parts = booster.predict(matrix, pred_contrib=True).reshape(len(oslo), n_classes, -1)
    assert parts.shape[2] == len(model_spec.features) + 1
    np.testing.assert_allclose(
        found["shap"],
        [np.abs(parts[:, :, place]).mean() for place in range(len(model_spec.features))],
        rtol=1e-12,
    )
    assert set(found["n_rows"]) == {len(oslo)}


def test_shap_values_and_their_base_add_up_to_the_raw_score(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    matrix = design_matrix(oslo, fleet_settings.model_spec)
    booster = booster_of(matrix, target_of(oslo, "binary"), objective="binary")
    one = oslo.head(1)
    found = group_importance(booster, one, fleet_settings.model_spec)
    score = booster.predict(matrix[:1], raw_score=True)[0]
    base = booster.predict(matrix[:1], pred_contrib=True)[0, -1]
    # Of one row the absolute values are those of its parts: log odds, not probabilities.
    assert found["shap"].sum() >= abs(score - base) - 1e-9
    assert found["shap"].max() > 0


def test_ranks_are_by_gain_and_a_feature_without_splits_has_none(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    model_spec = fleet_settings.model_spec
    constant = oslo.assign(promotion=0.0)
    booster = booster_of(design_matrix(constant, model_spec), target_of(oslo, "regression"))
    found = group_importance(booster, constant, model_spec).set_index("feature")
    assert found["gain"]["promotion"] == 0.0
    assert found["gain_share"]["promotion"] == 0.0
    assert pd.isna(found["rank"]["promotion"])
    ranked = found.dropna(subset="rank").sort_values("rank")
    assert ranked["rank"].tolist() == list(range(1, len(ranked) + 1))
    assert ranked["gain"].is_monotonic_decreasing
    assert ranked.index[0] == "price"


def test_a_booster_without_splits_has_no_shares_and_no_ranks(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    matrix = design_matrix(oslo, fleet_settings.model_spec)
    found = group_importance(
        booster_of(matrix, np.ones(len(oslo))), oslo, fleet_settings.model_spec
    )
    assert found["gain"].tolist() == [0.0] * len(found)
    assert found[["gain_share", "rank"]].isna().all(axis=None)
    assert found["shap"].tolist() == [0.0] * len(found)


def test_without_rows_there_is_gain_and_no_shap(
    oslo: pd.DataFrame, fleet_settings: TrainingSettings
) -> None:
    booster = booster_of(
        design_matrix(oslo, fleet_settings.model_spec), target_of(oslo, "regression")
    )
    found = group_importance(booster, oslo.head(0), fleet_settings.model_spec)
    assert found["gain"].sum() > 0
    assert found["shap"].isna().all()
    assert set(found["n_rows"]) == {0}
