"""Held-out predictions of a panel's models: what blending rules are replayed on, without training.

The engine's own `train_group` trains every group of every grain, in processes of this machine and
without Spark.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.panels import Panel
from pipeline.models.boosters import EncodedBooster
from pipeline.models.meta_model import (
    design_matrix,
    group_ids,
    link,
    load_booster,
    offset_and_scale,
)
from pipeline.spec import FleetSpec
from pipeline.testing.data import training_settings
from pipeline.training.splits import EARLIER, FIT, TUNE, Cutoffs
from pipeline.training.trainer import TrainingSettings, judged_without_model, train_group

Floats = npt.NDArray[np.float64]
# Rows that nothing was trained or chosen on.
LATER = "later"
FACTS = ["row_key", "split", "time", "actual", "offset", "scale", "weight"]


@dataclass(frozen=True)
class HeldOut:
    """Predictions of rows that the predicting models were not fitted on.

    Args:
        name: of the panel.
        kind: of the panel.
        spec: the fleet's.
        rows: as from `spark.evaluation.judged_rows`, and those whose split is `later`; only rows
            with a usable target.
        has_model: per grain the groups that have a model.
        constant: what answers without any model.
        seconds: of training, per grain.
    """

    name: str
    kind: str
    spec: FleetSpec
    rows: pd.DataFrame
    has_model: Sequence[set[str]]
    constant: float
    seconds: Sequence[float]


@dataclass(frozen=True)
class _Group:
    """One group to train, and the later rows to predict."""

    grain: int
    group_id: str
    seen: pd.DataFrame
    later: pd.DataFrame
    settings: TrainingSettings


@dataclass(frozen=True)
class _Trained:
    """A group's held-out and later rows, one prediction each."""

    grain: int
    group_id: str
    rows: pd.DataFrame
    has_model: bool
    seconds: float


def collect(panel: Panel) -> HeldOut:
    """Train a panel's fleet, and predict what it was not trained on."""
    spec, frame = panel.spec, panel.read()
    is_later = frame["time"] >= panel.later_from
    seen = frame[~is_later].reset_index(drop=True)
    settings = training_settings(spec, seen)
    groups = list(_groups(spec, seen, frame[is_later], settings))
    # The largest first, so that no core waits for it.
    groups.sort(key=lambda group: -len(group.seen))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        trained = list(pool.map(_train, groups, chunksize=4))
    has_model: list[set[str]] = [set() for _ in spec.grains]
    seconds = [0.0] * len(spec.grains)
    for group in trained:
        seconds[group.grain] += group.seconds
        if group.has_model:
            has_model[group.grain].add(group.group_id)
    rows = _side_by_side(trained, len(spec.grains)).merge(
        _ids_of_rows(frame, spec), on="row_key", validate="many_to_one"
    )
    linked = link(rows["actual"].to_numpy(dtype=float), spec.target.transform)
    rows["residual"] = (linked - rows["offset"]) / rows["scale"]
    rows["stretch"] = _stretches(rows, settings.cutoffs)
    usable = rows[np.isfinite(rows["residual"])].reset_index(drop=True)
    constant = _constant(seen, spec, settings)
    return HeldOut(panel.name, panel.kind, spec, usable, has_model, constant, seconds)


def _groups(
    spec: FleetSpec, seen: pd.DataFrame, later: pd.DataFrame, settings: TrainingSettings
) -> Iterator[_Group]:
    for grain, keys in enumerate(spec.grains):
        later_of = {str(name): rows for name, rows in later.groupby(group_ids(later, keys))}
        for name, rows in seen.groupby(group_ids(seen, keys)):
            of_group = later_of.get(str(name), later.iloc[:0])
            yield _Group(grain, str(name), rows, of_group, settings)


def _train(group: _Group) -> _Trained:
    outcome = train_group(group.seen, group.grain, group.settings)
    parts = []
    if outcome.holdout is not None:
        parts.append(outcome.holdout[[*FACTS, "prediction"]])
    if outcome.booster is not None or group.grain == 0:
        parts.append(_later_rows(group, outcome.booster))
    rows = pd.DataFrame(columns=[*FACTS, "prediction"])
    if parts:
        rows = pd.concat([part for part in parts if len(part)])
    has_model = outcome.booster is not None
    return _Trained(group.grain, group.group_id, rows, has_model, outcome.ledger["seconds"])


def _later_rows(group: _Group, booster: EncodedBooster | None) -> pd.DataFrame:
    """Later rows as they are judged, with the served booster's predictions."""
    rows = judged_without_model(group.later, group.settings).assign(split=LATER)
    if booster is not None and len(rows):
        served = load_booster(vars(booster), group.group_id)
        matrix = design_matrix(group.later, group.settings.model_spec)
        answers = pd.Series(served.predict(matrix, num_threads=1), index=group.later["row_key"])
        rows["prediction"] = rows["row_key"].map(answers)
    return rows[[*FACTS, "prediction"]]


def _side_by_side(trained: Sequence[_Trained], n_grains: int) -> pd.DataFrame:
    """One row per held-out row, with each grain's prediction."""
    of_grains = []
    for grain in range(n_grains):
        of_grain = [group.rows for group in trained if group.grain == grain and len(group.rows)]
        of_grains.append(pd.concat(of_grain) if of_grain else trained[0].rows.iloc[:0])
    rows = pd.concat(of_grains)[FACTS].drop_duplicates(["row_key", "split"])
    for grain, predictions in enumerate(of_grains):
        named = predictions.rename(columns={"prediction": f"p{grain}"})
        rows = rows.merge(
            named[["row_key", "split", f"p{grain}"]], on=["row_key", "split"], how="left"
        )
    return rows.astype({f"p{grain}": float for grain in range(n_grains)})


def _ids_of_rows(frame: pd.DataFrame, spec: FleetSpec) -> pd.DataFrame:
    ids = np.stack([group_ids(frame, keys) for keys in spec.grains], axis=1)
    return pd.DataFrame({"row_key": frame["row_key"].to_numpy(), "group_ids": ids.tolist()})


def _stretches(rows: pd.DataFrame, cutoffs: Cutoffs) -> npt.NDArray[np.float64]:
    """As `spark.evaluation.judged_rows` numbers them."""
    stretch = np.full(len(rows), np.nan)
    # From the oldest on, so that the newest start that a row has reached counts.
    for number, start in reversed(cutoffs.stretch_starts):
        stretch[(rows["time"] >= start) & rows["split"].isin([EARLIER, TUNE])] = number
    return stretch


def _constant(seen: pd.DataFrame, spec: FleetSpec, settings: TrainingSettings) -> float:
    """The least loss on fit rows without any model, in link space less the offset."""
    split = settings.cutoffs.assign(seen["time"].to_numpy(), seen["known_at"].to_numpy())
    rows = seen[split == FIT]
    labels = rows[settings.target]
    if settings.model_spec.classes:
        return float((labels == settings.model_spec.classes[-1]).mean())
    offset, scale = offset_and_scale(rows, settings.model_spec.target)
    residual = (link(labels.to_numpy(dtype=float), spec.target.transform) - offset) / scale
    residual = residual[np.isfinite(residual)]
    if spec.learnt_quantile is not None:
        return float(np.quantile(residual, spec.learnt_quantile))
    return float(residual.mean())
