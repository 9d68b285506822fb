"""Whether as many answers are within their intervals as these promise, in the period after the one that the intervals were made from.

A fleet is run as of one moment. Its registered model, as anybody would load it, then answers the
rows of the next period, whose truth is in the packages' files; nothing is imported from the
project.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from deltalake import DeltaTable

from benchmarks.judging import flights_truth, housing_truth
from benchmarks.runs import NotMeasured, Run, Runs

LEVELS = (0.8, 0.95)


@dataclass(frozen=True)
class Case:
    """A fleet, and a period to judge its intervals on.

    Args:
        as_of: the moment that the run pretends it is; the model and its intervals know nothing
            later.
        truth: actual target by row key, of rows after that.
    """

    as_of: str
    truth: Callable[[], pd.DataFrame]


CASES: Mapping[str, Case] = {
    # Intervals from August 2013 to July 2014, judged on the twelve months after.
    "housing": Case("2014-07-01", housing_truth),
    # Intervals from November, judged on December.
    "flights": Case("2013-12-01", flights_truth),
}


def interval_coverage(runs: Runs) -> Mapping[str, float]:
    """Per fleet and level the share of actual targets within the interval, and how far that is from the level."""
    measured: dict[str, float] = {}
    for fleet, case in CASES.items():
        answers = answers_after(runs.fleet(fleet, case.as_of), fleet, case)
        measured[f"{fleet}.rows"] = len(next(iter(answers.values())))
        for level, rows in answers.items():
            within = (rows["lower"] <= rows["actual"]) & (rows["actual"] <= rows["upper"])
            part = f"{fleet}.{100 * level:g}"
            measured |= {part: abs(within.mean() - level), f"{part}-coverage": within.mean()}
            print(f"  {fleet} at {level:g}: {_told(rows, within)}", flush=True)
    return measured


def answers_after(run: Run, fleet: str, case: Case) -> dict[float, pd.DataFrame]:
    """The registered model's answers to the rows after the as-of, and their actual target, per level.

    Raises:
        NotMeasured: if a row of the truth is not in the feature table, or is not after the as-of.
    """
    import mlflow

    truth = case.truth()
    features = DeltaTable(run.tables / "features").to_pandas().set_index("row_key")
    missing = truth.index.difference(features.index)
    if len(missing):
        raise NotMeasured(
            f"{fleet}: {len(missing)} rows of the truth are not in the feature table, e.g. "
            f"{missing[0]}"
        )
    rows = features.loc[truth.index]
    known = rows.index[rows["known_at"] <= pd.Timestamp(case.as_of, tz="UTC")]
    if len(known):
        raise NotMeasured(
            f"{fleet}: {len(known)} rows were known as of {case.as_of}, e.g. {known[0]}"
        )
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(_tracking_uri(run.tables))
    mlflow.set_registry_uri(_tracking_uri(run.tables))
    model = mlflow.pyfunc.load_model(f"models:/{fleet}@champion")
    questions = rows[[name for name in model.metadata.metadata["inputs"] if name in rows]]
    return {
        level: model.predict(questions, params={"interval": level}).assign(
            actual=truth["actual"], time=rows["time"], known_at=rows["known_at"]
        )
        for level in LEVELS
    }


def _tracking_uri(tables: Path) -> str:
    """Of the registry beside a fleet's tables, as a local run leaves it."""
    return f"sqlite:///{tables.parent.parent / 'mlflow' / 'mlflow.db'}"


def _told(rows: pd.DataFrame, within: "pd.Series[bool]") -> str:
    width = rows["upper"] - rows["lower"]
    below, above = (rows["actual"] < rows["lower"]).mean(), (rows["actual"] > rows["upper"]).mean()
    return (
        f"{within.mean():.4f} of {len(rows):,} rows within, {below:.4f} below, {above:.4f} above, "
        f"{np.isnan(width).sum():,} without interval; "
        f"width {width.median():.4g} (median)"
    )
