from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.features.history import add_history, plan_passes
from pipeline.features.suspicions import Suspicions, columns_looked_at, find_suspicions
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec

N_DAYS = 120


def shops(**columns: Any) -> pd.DataFrame:
    """Two shops' sales by day: a slow wave, jumps from day to day, and days without any sale."""
    random = np.random.default_rng(1)
    parts = []
    for city, level in (("oslo", 100.0), ("bergen", 30.0)):
        sales = level + 5 * np.sin(np.arange(N_DAYS) / 20) + random.normal(0, 3, N_DAYS)
        sales[random.random(N_DAYS) < 0.3] = 0.0
        time = pd.date_range("2024-01-01", periods=N_DAYS, unit="us")
        parts.append(
            pd.DataFrame(
                {"region": "north", "city": city, "time": time, "known_at": time, "sales": sales}
            )
        )
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(
        usual_sales=rows["sales"], **{name: make(rows, random) for name, make in columns.items()}
    )


def suspicions(rows: pd.DataFrame, *columns: str, **changes: Any) -> Suspicions:
    features = {"columns": list(columns), "categoricals": [], **changes.pop("features", {})}
    spec = small_spec(features=features, **changes)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    for features in plan_passes(spec):
        table = add_history(table, spec, features)
    return find_suspicions(table.select(columns_looked_at(spec)), spec)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (lambda rows, _: rows["sales"], "equal to the target in 100.0%"),
        # Rounding hides some of it; the days without sales are equal anyway.
        (
            lambda rows, random: rows["sales"].where(random.random(len(rows)) > 0.03, 7.0),
            "equal to the target in 9",
        ),
        (
            lambda rows, random: rows["sales"] * (1 + random.normal(0, 0.02, len(rows))),
            "correlation 0.99",
        ),
        (lambda rows, _: 1000 - 2 * rows["sales"], "correlation 1.000"),
    ],
    ids=["copy", "almost", "noise", "mirrored"],
)
def test_a_column_that_follows_every_change_of_the_target_is_named(column: Any, words: str) -> None:
    found = suspicions(shops(leak=column), "leak")
    assert list(found.like_the_target) == ["leak"]
    assert words in found.like_the_target["leak"]


@pytest.mark.parametrize(
    "column",
    [
        lambda rows, _: rows.groupby("city")["sales"].shift(1),
        lambda rows, _: rows.groupby("city")["sales"].transform("mean"),
        lambda rows, random: rows["sales"] * (1 + random.normal(0, 0.2, len(rows))),
        lambda rows, _: (rows["sales"] > 0).astype(float),
        lambda rows, _: rows["time"].dt.dayofweek.astype(float),
        lambda rows, _: 1.0,
        lambda rows, _: np.nan,
    ],
    ids=["yesterday", "level", "a good forecast", "open", "weekday", "constant", "null"],
)
def test_what_is_known_before_is_not_named(column: Any) -> None:
    assert suspicions(shops(known=column), "known").like_the_target == {}


def test_zeros_in_common_are_no_copy() -> None:
    rows = shops(promotion=lambda rows, random: (random.random(len(rows)) < 0.02).astype(float))
    rows["sales"] = rows["sales"].where(np.arange(len(rows)) % 10 == 0, 0.0)
    equal = (rows["promotion"] == rows["sales"]).mean()
    assert equal > 0.85
    assert suspicions(rows, "promotion").like_the_target == {}


def test_a_column_that_moves_as_it_did_before_is_not_named() -> None:
    # Both rise and fall with the year, slowly: the column knows no change before it happens.
    wave = np.sin(np.arange(N_DAYS) / 20)
    rows = shops().assign(
        sales=np.tile(wave, 2), temperature=np.tile(np.sin((np.arange(N_DAYS) + 0.6) / 20), 2)
    )
    assert suspicions(rows, "temperature").like_the_target == {}


@pytest.mark.parametrize("classes", [("no", "yes"), ("0", "1"), ("false", "true")])
def test_classes_are_looked_at_as_well(classes: tuple[str, str]) -> None:
    rows = shops(
        leak=lambda rows, _: (rows["sales"] > 0).astype(float),
        other=lambda rows, _: rows["sales"].shift(3),
    )
    rows["sales"] = rows["leak"].map(dict(enumerate(classes)))
    found = suspicions(rows, "leak", "other", task="binary", baselines={"usual": "other"})
    assert list(found.like_the_target) == ["leak"]


def lagged(rows: pd.DataFrame, **changes: Any) -> dict[str, str]:
    return suspicions(
        rows,
        features={"lags": [{"column": "sales", "periods": [1, 2]}]},
        baselines={"seasonal naive": "usual_sales"},
        **changes,
    ).missed_lags


def test_lags_at_the_end_of_a_series_or_beside_a_gap_are_no_misses() -> None:
    rows = shops()
    rows = rows[~rows["time"].between("2024-01-10", "2024-01-12")]
    rows.loc[rows.index[40:43], "sales"] = np.nan
    assert lagged(rows) == {}


def test_lags_that_an_hour_keeps_from_their_day_are_named() -> None:
    rows = shops()
    rows["time"] -= pd.to_timedelta((rows["time"] >= "2024-03-31").astype(int), unit="h")
    rows["known_at"] = rows["time"]
    assert lagged(rows) == {"sales_lag_1": "2 of 240 rows", "sales_lag_2": "4 of 240 rows"}


def test_a_gap_beside_a_change_of_the_clocks_is_a_gap() -> None:
    days = pd.date_range("2024-03-20", periods=20, freq="D", tz="Europe/Berlin")
    time = days.tz_convert("UTC").tz_localize(None).as_unit("us")
    rows = shops().iloc[:20].assign(time=time, known_at=time)
    # Between 30 March and 1 April lie 47 hours.
    with_gap = rows[days != pd.Timestamp("2024-03-31", tz="Europe/Berlin")]
    assert lagged(with_gap, timezone="Europe/Berlin") == {}


def test_lags_of_months_that_were_known_too_late_are_named() -> None:
    rows = (
        shops()
        .iloc[:4]
        .assign(
            time=pd.to_datetime(["2024-01-31", "2024-02-10", "2024-03-05", "2024-05-20"]).astype(
                "datetime64[us]"
            )
        )
    )
    rows["known_at"] = rows["time"]
    assert lagged(rows, period="1 month", horizon="1 month") == {"sales_lag_1": "2 of 4 rows"}
    assert lagged(rows, period="1 month", horizon="0 days") == {}


def test_a_fleet_without_lags_and_columns_has_nothing_to_look_at() -> None:
    spec: FleetSpec = small_spec(
        features={"columns": []}, baselines={"seasonal naive": "usual_sales"}
    )
    table = pa.Table.from_pandas(shops(), preserve_index=False)
    assert find_suspicions(table.select(columns_looked_at(spec)), spec) == Suspicions({}, {}, {})


@pytest.mark.parametrize(
    ("zone", "hours"),
    [
        ("Europe/Berlin", "22:00 or 23:00"),
        ("Asia/Kolkata", "18:30"),
        ("America/New_York", "04:00 or 05:00"),
        ("UTC", None),
    ],
)
def test_midnights_of_another_zone_are_named(zone: str, hours: str | None) -> None:
    time = (
        pd.date_range("2024-01-01", periods=2 * N_DAYS, freq="D", tz=zone)
        .tz_convert("UTC")
        .tz_localize(None)
        .as_unit("us")
    )
    rows = shops().assign(time=time, known_at=time)
    expected = {} if hours is None else {"day": f"all rows lie at {hours} UTC"}
    assert suspicions(rows).other_midnights == expected
    assert suspicions(rows, timezone=zone).other_midnights == {}
    # Hours begin everywhere alike, and times all over the day are no midnights.
    assert (
        suspicions(
            rows, period="1 hour", baselines={"seasonal naive": "usual_sales"}
        ).other_midnights
        == {}
    )
    spread = time + pd.to_timedelta(np.arange(len(time)) % 5, unit="h")
    assert suspicions(rows.assign(time=spread)).other_midnights == {}
