"""A small fleet and its feature rows, from a seed: daily sales of shops in cities in regions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.features.encoding import choose_categories
from pipeline.models.meta_model import group_id, key_text
from pipeline.models.pack import build_model_spec
from pipeline.spec import FleetSpec, parse_spec
from pipeline.training.splits import resolve_cutoffs
from pipeline.training.trainer import TrainingSettings

SMALL_FLEET: Mapping[str, Any] = {
    "name": "small",
    "sources": [{"name": "sales", "uri": "sales.csv"}],
    "features": {
        "columns": ["price", "promotion"],
        "calendar": ["day_of_week"],
        "categoricals": ["kind"],
    },
    "grains": [[], ["region"], ["region", "city"]],
    "entity": ["region", "city"],
    "time": "day",
    "period": "1 day",
    "horizon": "1 day",
    "target": {"column": "sales"},
    "splits": {"report": "1 month", "tune": "2 months"},
    "tuning": {"max_trials": 2, "patience": 2, "max_rounds": 40, "fit_rows": 50, "tune_rows": 10},
    "baselines": {"usual": "usual_sales"},
}

SHOP: Mapping[str, Any] = {
    "name": "shop",
    "sources": [{"name": "sales", "uri": "sales.csv"}],
    "features": {
        "columns": ["size"],
        "lags": [{"column": "amount", "periods": [1, 2]}],
        "rolling": [{"column": "amount", "window": "3 months", "statistics": ["mean", "max"]}],
        "calendar": ["month"],
        "categoricals": ["region"],
        "derived": {"change": "amount_lag_1 - amount_lag_2"},
    },
    "grains": [[], ["region"], ["region", "store"]],
    "entity": ["region", "store"],
    "time": "sold_on",
    "period": "1 month",
    "horizon": "1 month",
    "target": {"column": "amount"},
    "splits": {"report": "6 months", "tune": "6 months"},
    "tuning": {"max_trials": 2, "patience": 1, "max_rounds": 20, "fit_rows": 20, "tune_rows": 5},
    "baselines": {"last value": "amount_lag_1"},
}

CITIES: Mapping[str, tuple[str, ...]] = {"north": ("oslo", "bergen"), "south": ("roma", "napoli")}

SATURDAY = 5


def small_attributes(**changes: Any) -> dict[str, Any]:
    """The attributes of the small fleet's defs.yaml.

    Mappings are changed field by field; a field changed to None is left out.
    """
    return with_changes(SMALL_FLEET, changes)


def with_changes(attributes: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a defs.yaml, of which some are changed.

    Mappings are changed field by field, a field changed to None is left out.
    """
    attributes = dict(attributes)
    for name, value in changes.items():
        before = attributes.get(name)
        if value is None:
            attributes.pop(name, None)
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            attributes[name] = {**before, **value}
        else:
            attributes[name] = value
    return attributes


def small_spec(**changes: Any) -> FleetSpec:
    """The small fleet, with changes as in `small_attributes`."""
    return parse_spec(small_attributes(**changes), file="defs.yaml")


def feature_rows(
    n_days: int = 300,
    *,
    seed: int = 0,
    cities: Mapping[str, tuple[str, ...]] | None = None,
    noise: float = 1.0,
) -> pd.DataFrame:
    """Rows of the small fleet's feature table: one per city and day, from 1 January 2024.

    Sales depend on the price, the promotion and the day of the week; each city has its own level
    and its own sensitivity to prices.

    Args:
        n_days: days per city.
        seed: of everything that is random.
        cities: cities by region; by default `CITIES`.
        noise: standard deviation of the sales that no feature explains.
    """
    rng = np.random.default_rng(seed)
    days = pd.date_range("2024-01-01", periods=n_days, freq="D", unit="us")
    parts = []
    if cities is None:
        cities = CITIES
    for region, names in cities.items():
        for city in names:
            level = rng.uniform(50, 150)
            slope = rng.uniform(1, 4)
            price = rng.uniform(5, 15, n_days)
            promotion = rng.integers(0, 2, n_days).astype(float)
            weekday = days.weekday.to_numpy().astype(float)
            expected = level - slope * price + 8 * promotion + 3 * (weekday >= SATURDAY)
            parts.append(
                pd.DataFrame(
                    {
                        "region": region,
                        "city": city,
                        "time": days,
                        "known_at": days,
                        "row_key": [group_id([region, city, day.isoformat()]) for day in days],
                        "is_future": False,
                        "price": price,
                        "promotion": promotion,
                        "day_of_week": weekday,
                        "kind": rng.choice(["small", "large"], n_days),
                        "usual_sales": level,
                        "sales": expected + noise * rng.normal(size=n_days),
                    }
                )
            )
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(sales_lag_7=rows.groupby(["region", "city"])["sales"].shift(7))


def with_classes(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Rows with a column `label`: sales relative to the city's mean, cut into quantiles.

    There are as many quantiles as names.
    """
    mean_sales = rows.groupby(["region", "city"])["sales"].transform("mean")
    steps = pd.qcut(rows["sales"] - mean_sales, len(names), labels=False)
    return rows.assign(label=np.array(names, dtype=object)[steps.to_numpy()])


def group_rows(rows: pd.DataFrame, **keys: str) -> pd.DataFrame:
    """The rows whose keys have these values."""
    chosen = np.ones(len(rows), dtype=bool)
    for name, value in keys.items():
        chosen &= (rows[name] == value).to_numpy()
    return rows[chosen].reset_index(drop=True)


def training_settings(
    spec: FleetSpec, rows: pd.DataFrame, *, run_id: str = "run-1", threads: int = 1
) -> TrainingSettings:
    """The settings of a run over these rows: its cutoffs, categories and classes."""
    newest = pd.Timestamp(rows["time"].max())
    counts: dict[str, dict[Any, int]] = {}
    for name in spec.features.categoricals:
        counts[name] = rows[name].value_counts().rename(index=key_text).to_dict()
    classes: list[str] = []
    prior: list[float] = []
    if spec.is_class_task:
        labels = rows[spec.target.column]
        shares = labels.value_counts(normalize=True).rename(index=key_text)
        classes = list(spec.target.classes or sorted(shares.index))
        prior = shares.reindex(classes, fill_value=0.0).tolist()
    categories = choose_categories(counts, spec.features.max_categories)
    settings = TrainingSettings.of_fleet(
        spec,
        build_model_spec(spec, categories, classes, prior),
        run_id=run_id,
        cutoffs=resolve_cutoffs(spec.splits, newest, newest),
    )
    return replace(settings, threads=threads)
