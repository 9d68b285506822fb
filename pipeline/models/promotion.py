"""The gates between a challenger and the champion's alias."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import StoreError


@dataclass(frozen=True)
class Gate:
    """One condition of promotion.

    Args:
        name: what it asks.
        passed: whether it holds.
        found: what was found.
        expected: what would pass.
    """

    name: str
    passed: bool
    found: str
    expected: str


def judge_challenger(ledger: pd.DataFrame, groups_in_pack: Sequence[tuple[int, str]]) -> list[Gate]:
    """Ask whether a version is fit to serve.

    Args:
        ledger: the rows of its training run.
        groups_in_pack: grain index and id of every group that has an answer chain in it.

    Raises:
        StoreError: if the ledger has no such run.
    """
    chains = set(groups_in_pack)
    lacking = [key for key in zip(ledger["grain"], ledger["group_id"], strict=True) if (int(key[0]), key[1]) not in chains]
    pooled = ledger[ledger["grain"] == 0]
    if pooled.empty:
        raise StoreError("the ledger does not know the challenger's run: registry and data root do not belong together; materialise models again")
    blend, constant, measure = _errors(pooled.iloc[0])
    # Without report rows there is nothing to compare, and a first model beats none.
    unmeasured = pd.isna(blend) or pd.isna(constant)
    n_failed = int((ledger["status"] == "failed").sum())
    return [
        Gate("every group has an answer chain", not lacking, f"{len(lacking)} of {len(ledger)} lack one", "0"),
        Gate(
            "the fleet beats its constant",
            bool(unmeasured or (np.isfinite(blend) and blend <= constant)),
            "not measured" if unmeasured else f"error {blend:.6g}",
            "any" if unmeasured else f"at most {constant:.6g} ({measure} on report rows)",
        ),
        Gate("some group has a model", bool(ledger["booster_id"].notna().any()), f"{ledger['booster_id'].notna().sum()}", "at least 1"),
        Gate("few groups failed", n_failed <= 0.1 * len(ledger), f"{n_failed} of {len(ledger)}", "at most 10 %"),
    ]


def _errors(pooled: "pd.Series[Any]") -> tuple[Any, Any, str]:
    """Errors of the fleet and of its constant over all rows, and what they are.

    Quantiles and counts are judged by the loss that they are learnt by: no quantile but the middle one is close in RMSE.
    """
    metrics = json.loads(pooled["metrics"]) if isinstance(pooled.get("metrics"), str) else {}
    for name, title in _OWN_LOSSES.items():
        blend, constant = (metrics.get(way, {}).get(name) for way in ("fleet", "constant"))
        if blend is not None and constant is not None:
            return blend, constant, title
    return pooled["report_blend"], pooled["report_constant"], "link space RMSE"


_OWN_LOSSES = {"pinball": "pinball loss", "deviance": "mean deviance"}
