"""What each feature does in one group's model, as LightGBM itself reports it."""

from typing import Any

import numpy as np
import pandas as pd

from pipeline.models.meta_model import Floats, ModelSpec, design_matrix

# Rows per group that SHAP values are computed for; they take far longer than predictions.
SAMPLED_ROWS = 200


def group_importance(booster: Any, rows: pd.DataFrame, model_spec: ModelSpec) -> pd.DataFrame:
    """Gain, splits and mean absolute SHAP value of every feature.

    Args:
        booster: of the group.
        rows: of the group, in a fixed order, with the features; may be none.
        model_spec: of the run: its features and categories.

    Returns:
        One row per feature, in the spec's order: feature, gain, gain_share, n_splits, shap, n_rows
        and rank, as in `tables.IMPORTANCE`. SHAP values are those of Lundberg, Erion and Lee 2018
        ("Consistent individualized feature attribution for tree ensembles"), as LightGBM computes
        them.
    """
    gain: Floats = np.asarray(booster.feature_importance("gain"), dtype=np.float64)
    gain_share: Floats = np.full(len(gain), np.nan)
    if gain.sum() > 0:
        gain_share = gain / gain.sum()
    rank = pd.Series(gain).rank(method="first", ascending=False).where(gain > 0)
    return pd.DataFrame(
        {
            "feature": list(model_spec.features),
            "gain": gain,
            "gain_share": gain_share,
            "n_splits": np.asarray(booster.feature_importance("split"), dtype=np.int64),
            "shap": mean_shap(booster, rows, model_spec),
            "n_rows": len(rows),
            "rank": rank.astype("Int32"),
        }
    )


def mean_shap(booster: Any, rows: pd.DataFrame, model_spec: ModelSpec) -> Floats:
    """Mean absolute SHAP value of each feature over rows and, for multiclass, classes.

    NaN without rows.
    """
    n_features = len(model_spec.features)
    if rows.empty:
        return np.full(n_features, np.nan)
    parts: Floats = booster.predict(
        design_matrix(rows, model_spec), pred_contrib=True, num_threads=1
    )
    # Per row and class one number per feature, and last the expected score.
    mean: Floats = np.abs(parts.reshape(-1, n_features + 1)[:, :-1]).mean(axis=0)
    return mean
