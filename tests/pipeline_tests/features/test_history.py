import datetime as dt
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.history import ON_LAST_DAYS, add_history, plan_passes
from pipeline.periods import Period
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec

STATISTICS = ["mean", "sum", "count", "std", "min", "max", "last"]
DAY = pd.Timedelta(days=1)
FEATURES = {
    "columns": [],
    "categoricals": [],
    "calendar": [],
    "lags": [{"column": "sales", "periods": [2, 3, 7]}, {"column": "visits", "periods": [2]}],
    "rolling": [
        {"column": "sales", "window": "3 days", "statistics": STATISTICS},
        {"column": "visits", "window": "2 weeks", "statistics": STATISTICS, "over": ["region"]},
        {
            "column": "sales",
            "window": "1 month",
            "statistics": ["mean", "count", "last"],
            "over": [],
        },
    ],
}
SPEC = small_spec(features=FEATURES, horizon="2 days", known_at="landed", baselines=None)
AT_ITS_TIME = small_spec(
    features={**FEATURES, "lags": [{"column": "sales", "periods": [1]}]},
    horizon=None,
    known_at="landed",
    baselines=None,
)

numbers = st.one_of(
    st.none(),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)),
    st.sampled_from([0.0, 1.0, 1e-9, 1e15]),
)
# Days off the grid, missing days, outcomes that are known at once, late, or before their time; keys may be null.
history_rows = st.lists(
    st.tuples(
        st.sampled_from(["north", "south", None]),
        st.sampled_from(["oslo", "roma", None]),
        st.integers(0, 25),
        st.sampled_from([0, 0, 0, 7]),
        st.sampled_from([0, 0, 24, 48, 73, 400, -30]),
        numbers,
        numbers,
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda row: row[:4],
)


def frame_of(rows: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["region", "city", "day", "hour", "late", "sales", "visits"])
    time = (
        pd.Timestamp("2024-02-20")
        + pd.to_timedelta(frame["day"], unit="D")
        + pd.to_timedelta(frame["hour"], unit="h")
    )
    known_at = time + pd.to_timedelta(frame["late"], unit="h")
    numeric = frame[["sales", "visits"]].astype(float)
    return frame[["region", "city"]].assign(
        time=time.astype("datetime64[us]"), known_at=known_at.astype("datetime64[us]"), **numeric
    )


def featured(frame: pd.DataFrame, spec: FleetSpec) -> pd.DataFrame:
    keys, times, values = (
        dict.fromkeys(("region", "city"), pa.string()),
        dict.fromkeys(("time", "known_at"), pa.timestamp("us")),
        ("sales", "visits"),
    )
    marks = {name: pa.bool_() for name in frame.columns if name == ON_LAST_DAYS}
    schema = pa.schema({**keys, **times, **dict.fromkeys(values, pa.float64()), **marks})
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    for features in plan_passes(spec):
        table = add_history(table, spec, features)
    return table.select(list(spec.history_columns)).to_pandas()


def series(
    days: Sequence[str], values: Sequence[float | None], **columns: Sequence[Any]
) -> pd.DataFrame:
    time = pd.Series(pd.to_datetime(list(days))).astype("datetime64[us]")
    frame = pd.DataFrame(
        {
            "region": "north",
            "city": "oslo",
            "time": time,
            "known_at": time,
            "sales": pd.Series(values, dtype=float),
            "visits": np.nan,
        }
    )
    return frame.assign(**columns)


def same_keys(row: Any, other: Any, keys: Sequence[str]) -> bool:
    return all(row[key] == other[key] or (row[key] is None and other[key] is None) for key in keys)


def is_known(other: Any, row: Any, deadline: pd.Timestamp) -> bool:
    return bool(other["known_at"] <= deadline and other["known_at"] < row["time"])


def oracle_statistic(statistic: str, values: list[float]) -> float:
    if statistic == "count":
        return float(len(values))
    if not values or (statistic == "std" and len(values) < 2):
        return np.nan
    if statistic == "last":
        return values[-1]
    if statistic == "std":
        return float(np.std(np.array(values, dtype=np.longdouble), ddof=1))
    functions = {"mean": np.mean, "sum": np.sum, "min": np.min, "max": np.max}
    return float(functions[statistic](np.array(values, dtype=np.longdouble)))


def oracle(frame: pd.DataFrame, spec: FleetSpec) -> pd.DataFrame:
    """The declared meaning of every feature, row by row."""
    records = frame.astype({"region": object, "city": object}).to_dict("records")
    found: dict[str, list[float]] = {name: [] for name in spec.history_columns}
    for row in records:
        deadline = spec.horizon_period.add(row["time"], -1)
        for lag in spec.features.lags:
            for periods in lag.periods:
                wanted = Period.parse(spec.period or "").times(periods).add(row["time"], -1)
                past = [
                    o
                    for o in records
                    if same_keys(row, o, spec.entity)
                    and o["time"] == wanted
                    and is_known(o, row, deadline)
                ]
                found[f"{lag.column}_lag_{periods}"].append(past[0][lag.column] if past else np.nan)
        for window in spec.features.rolling:
            start = window.period.add(deadline, -1)
            keys = spec.finest if window.over is None else window.over
            past = [
                o
                for o in records
                if same_keys(row, o, keys)
                and o["known_at"] > start
                and is_known(o, row, deadline)
                and not np.isnan(o[window.column])
            ]
            values = [
                o[window.column]
                for o in sorted(past, key=lambda o: (o["known_at"], o[window.column]))
            ]
            for statistic in window.statistics:
                found[window.name(statistic)].append(oracle_statistic(statistic, values))
    return pd.DataFrame(found)


@settings(max_examples=60)
@given(history_rows)
def test_every_feature_is_what_its_declaration_says(rows: list[tuple[Any, ...]]) -> None:
    for spec in (SPEC, AT_ITS_TIME):
        frame = frame_of(rows)
        pd.testing.assert_frame_equal(
            featured(frame, spec), oracle(frame, spec), rtol=1e-9, atol=1e-6
        )


@settings(max_examples=100)
@given(history_rows, st.data())
def test_nothing_known_after_a_rows_deadline_touches_its_features(
    rows: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    frame = frame_of(rows)
    for spec in (SPEC, AT_ITS_TIME):
        row = data.draw(st.integers(0, len(frame) - 1))
        deadline = min(
            spec.horizon_period.add(frame["time"][row], -1),
            frame["time"][row] - pd.Timedelta(microseconds=1),
        )
        late = (frame["known_at"] > deadline).to_numpy()
        changed = frame.copy()
        changed.loc[late, ["sales", "visits"]] = [
            data.draw(st.sampled_from([np.nan, -5.0, 1e300])),
            data.draw(st.sampled_from([np.nan, 1e17])),
        ]
        others = late & (np.arange(len(frame)) != row)
        changed.loc[others, "known_at"] += data.draw(st.integers(0, 40)) * DAY
        before, after = (featured(table, spec).iloc[[row]] for table in (frame, changed))
        # To the last bit: a rounding error that the future causes is a leak, too.
        pd.testing.assert_frame_equal(before, after, check_exact=True)


@settings(max_examples=60)
@given(history_rows, st.data())
def test_rows_known_after_the_deadline_might_as_well_not_be_there(
    rows: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    frame = frame_of(rows)
    row = data.draw(st.integers(0, len(frame) - 1))
    deadline = SPEC.horizon_period.add(frame["time"][row], -1)
    kept = (frame["known_at"] <= deadline).to_numpy() | (np.arange(len(frame)) == row)
    number = int(kept[:row].sum())
    without = (
        featured(frame[kept].reset_index(drop=True), SPEC).iloc[[number]].reset_index(drop=True)
    )
    pd.testing.assert_frame_equal(
        featured(frame, SPEC).iloc[[row]].reset_index(drop=True), without, check_exact=True
    )


@settings(max_examples=40)
@given(history_rows, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: list[tuple[Any, ...]], random: Random) -> None:
    frame = frame_of(rows)
    order = list(range(len(frame)))
    random.shuffle(order)
    shuffled = featured(frame.iloc[order].reset_index(drop=True), SPEC)
    pd.testing.assert_frame_equal(
        shuffled, featured(frame, SPEC).iloc[order].reset_index(drop=True), check_exact=True
    )


def rolled(
    frame: pd.DataFrame,
    statistics: Sequence[str],
    *,
    window: str = "3 days",
    horizon: str | None = "1 day",
    **changes: Any,
) -> pd.DataFrame:
    rolling = [{"column": "sales", "window": window, "statistics": list(statistics), **changes}]
    spec = small_spec(
        features={"columns": [], "categoricals": [], "calendar": [], "rolling": rolling},
        horizon=horizon,
        baselines=None,
    )
    return featured(frame, spec)


def test_a_windows_start_is_excluded_and_its_end_included() -> None:
    frame = series(
        ["2024-01-01", "2024-01-02", "2024-01-04", "2024-01-05"], [1.0, 10.0, 100.0, 1000.0]
    )
    # For 5 January the deadline is the 4th, and the window (1st, 4th].
    found = rolled(frame, ["sum", "count"])
    assert found.iloc[3].tolist() == [110.0, 2.0]


def test_a_window_without_a_horizon_does_not_hold_the_rows_own_outcome() -> None:
    frame = series(["2024-01-01", "2024-01-02", "2024-01-03"], [1.0, 10.0, 100.0])
    found = rolled(frame, ["sum", "count", "last"], horizon=None)
    assert found["sales_count_3_days"].tolist() == [0.0, 1.0, 2.0]
    assert found["sales_last_3_days"].iloc[1:].tolist() == [1.0, 10.0]


def test_a_window_without_a_horizon_does_not_hold_what_comes_true_at_the_same_moment() -> None:
    frame = series(["2024-01-02", "2024-01-02"], [1.0, 10.0], city=["oslo", "bergen"])
    assert rolled(frame, ["count"], horizon=None, over=["region"])[
        "sales_count_3_days_by_region"
    ].tolist() == [0.0, 0.0]


def test_a_lag_counts_periods_and_not_rows() -> None:
    frame = series(["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-06"], [1.0, 2.0, 5.0, 6.0])
    spec = small_spec(
        features={
            "columns": [],
            "categoricals": [],
            "calendar": [],
            "lags": [{"column": "sales", "periods": [1]}],
        },
        baselines=None,
    )
    assert featured(frame, spec)["sales_lag_1"].fillna(-1).tolist() == [-1, 1, -1, 5]


def test_a_lag_that_was_not_known_in_time_is_null() -> None:
    time = pd.to_datetime(["2024-01-01", "2024-01-02"])
    frame = series(["2024-01-01", "2024-01-02"], [1.0, 2.0], known_at=time + pd.Timedelta(hours=1))
    spec = small_spec(
        features={
            "columns": [],
            "categoricals": [],
            "calendar": [],
            "lags": [{"column": "sales", "periods": [1]}],
        },
        baselines=None,
    )
    assert featured(frame, spec)["sales_lag_1"].isna().all()


def test_lags_of_months_follow_the_calendar() -> None:
    frame = series(["2024-01-28", "2024-02-28", "2024-03-28", "2024-05-28"], [1.0, 2.0, 3.0, 5.0])
    spec = small_spec(
        features={
            "columns": [],
            "categoricals": [],
            "calendar": [],
            "lags": [{"column": "sales", "periods": [1]}],
        },
        period="1 month",
        horizon="1 month",
        baselines=None,
    )
    assert featured(frame, spec)["sales_lag_1"].fillna(-1).tolist() == [-1, 1, 2, -1]


def calendar_spec(
    unit: str,
    *,
    lags: Sequence[int] = (1,),
    rolling: Sequence[Any] = (),
    horizon: str | None = None,
) -> FleetSpec:
    """A fleet of months, quarters or years, predicted one of them ahead."""
    features = {
        "columns": [],
        "categoricals": [],
        "calendar": [],
        "lags": [{"column": "sales", "periods": list(lags)}],
        "rolling": list(rolling),
    }
    return small_spec(
        features=features,
        period=f"1 {unit}",
        horizon=horizon or f"1 {unit}",
        baselines={"seasonal naive": "usual"},
    )


ENDS = {"month": "ME", "quarter": "QE", "year": "YE"}


@given(
    st.sampled_from(list(ENDS)),
    st.integers(1, 40),
    st.dates(dt.date(1960, 1, 1), dt.date(2060, 1, 1)),
    st.sampled_from([0, 86_399]),
)
def test_a_series_of_month_ends_lacks_no_lag_but_its_first(
    unit: str, length: int, first: dt.date, second: int
) -> None:
    days = pd.date_range(first, periods=length, freq=ENDS[unit]) + pd.Timedelta(seconds=second)
    frame = series(days.astype(str), range(length)).assign(**{ON_LAST_DAYS: True})
    window = {"column": "sales", "window": f"2 {unit}s", "statistics": ["count", "last"]}
    found = featured(frame, calendar_spec(unit, rolling=[window]))
    assert found["sales_lag_1"].fillna(-1).tolist() == list(range(-1, length - 1))
    # What a window of two periods holds a period ahead: the two rows before, not three of them where months are short.
    assert found[f"sales_count_2_{unit}s"].tolist() == [min(place, 2) for place in range(length)]
    assert found[f"sales_last_2_{unit}s"].equals(
        found["sales_lag_1"].rename(f"sales_last_2_{unit}s")
    )


def test_a_lag_of_months_finds_the_month_whatever_its_day() -> None:
    frame = series(["2024-01-31", "2024-02-10", "2024-03-05", "2024-05-20"], [1.0, 2.0, 3.0, 5.0])
    at_its_time = calendar_spec("month", lags=[1, 2], horizon="0 days")
    assert featured(frame, at_its_time)["sales_lag_1"].fillna(-1).tolist() == [-1, 1, 2, -1]
    assert featured(frame, at_its_time)["sales_lag_2"].fillna(-1).tolist() == [-1, -1, 1, 3]
    # A month ahead of 10 February, that is on 10 January, the value of 31 January is not known.
    assert featured(frame, calendar_spec("month"))["sales_lag_1"].fillna(-1).tolist() == [
        -1,
        -1,
        -1,
        -1,
    ]


def test_of_several_rows_of_a_month_the_one_on_the_very_day_counts_or_else_the_last() -> None:
    frame = series(
        ["2024-01-05", "2024-01-20", "2024-01-25", "2024-02-20", "2024-02-21"],
        [1.0, 2.0, 3.0, 20.0, 21.0],
    )
    found = featured(frame, calendar_spec("month", horizon="0 days"))
    assert found["sales_lag_1"].fillna(-1).tolist() == [-1, -1, -1, 2, 3]
    # What was known too late counts for nothing, on the very day as well as last.
    late = frame.assign(
        known_at=frame["known_at"].mask(frame["sales"].isin([2.0, 3.0]), pd.Timestamp("2024-02-21"))
    )
    assert featured(late, calendar_spec("month", horizon="0 days"))["sales_lag_1"].fillna(
        -1
    ).tolist() == [-1, -1, -1, 1, 1]


calendar_rows = st.lists(
    st.tuples(
        st.sampled_from(["oslo", None]),
        st.integers(0, 150),
        st.sampled_from([0, 0, 3, 40]),
        numbers,
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[:2],
)


@settings(max_examples=100)
@given(calendar_rows, st.sampled_from(["0 days", "10 days", "1 month"]), st.data())
def test_a_lag_of_months_is_what_its_declaration_says(
    rows: list[tuple[Any, ...]], horizon: str, data: st.DataObject
) -> None:
    days = [str(pd.Timestamp("2024-01-01") + place * DAY) for _, place, _, _ in rows]
    late = pd.to_timedelta([late for _, _, late, _ in rows], unit="D")
    frame = series(days, [value for _, _, _, value in rows], city=[city for city, _, _, _ in rows])
    frame["known_at"] = frame["time"] + late
    spec = calendar_spec("month", lags=[1, 2], horizon=horizon)
    found = featured(frame, spec)
    number = data.draw(st.integers(0, len(frame) - 1))
    row = frame.iloc[number]
    deadline = spec.horizon_period.add(row["time"], -1)
    known = [
        other
        for _, other in frame.iterrows()
        if same_keys(row, other, spec.entity) and is_known(other, row, deadline)
    ]
    for periods in (1, 2):
        month = row["time"].to_period("M") - periods
        of_month = sorted(
            (other for other in known if other["time"].to_period("M") == month),
            key=lambda other: other["time"],
        )
        on_the_day = [
            other
            for other in of_month
            if other["time"] == row["time"] - pd.DateOffset(months=periods)
        ]
        expected = [*of_month, *on_the_day][-1]["sales"] if of_month else np.nan
        np.testing.assert_equal(found[f"sales_lag_{periods}"][number], expected)
    # Rows that are known later might as well not be there.
    kept = (frame["known_at"] <= deadline).to_numpy() | (np.arange(len(frame)) == number)
    without = featured(frame[kept].reset_index(drop=True), spec).iloc[int(kept[:number].sum())]
    assert without.equals(found.iloc[number])


def test_a_wild_value_costs_the_other_rows_no_digit() -> None:
    days = [str(day.date()) for day in pd.date_range("2024-01-01", periods=6)]
    frame = series(days, [0.1, 0.2, 0.3, 1e300, 0.1, 0.2])
    found = rolled(frame, ["mean", "std"], window="2 days")
    assert found.iloc[3].tolist() == pytest.approx([0.25, np.std([0.2, 0.3], ddof=1)], rel=1e-12)
    assert found["sales_mean_2_days"].iloc[1] == pytest.approx(0.1, rel=1e-12)


def test_a_constant_has_no_deviation_at_all() -> None:
    days = [str(day.date()) for day in pd.date_range("2024-01-01", periods=9)]
    found = rolled(series(days, [0.1] * 9), ["std", "mean"], window="7 days")
    assert set(found["sales_std_7_days"].iloc[3:]) == {0.0}
    assert set(found["sales_mean_7_days"].iloc[1:]) == {0.1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_number_are_not_observed(value: float) -> None:
    frame = series(["2024-01-01", "2024-01-02", "2024-01-03"], [1.0, value, 3.0])
    assert rolled(frame, ["count", "mean", "last"]).iloc[2].tolist() == [1.0, 1.0, 1.0]


def test_without_any_value_only_the_count_is_known() -> None:
    found = rolled(series(["2024-01-01", "2024-01-02"], [np.nan, np.nan]), STATISTICS)
    assert found["sales_count_3_days"].tolist() == [0.0, 0.0]
    assert found.drop(columns="sales_count_3_days").isna().all(axis=None)


def test_an_empty_table_gets_its_columns() -> None:
    assert list(featured(series([], []), SPEC).columns) == list(SPEC.history_columns)


def test_null_keys_are_a_group_of_their_own() -> None:
    frame = series(
        ["2024-01-01", "2024-01-02", "2024-01-03"], [1.0, 2.0, 4.0], city=[None, "oslo", None]
    )
    assert rolled(frame, ["sum"])["sales_sum_3_days"].fillna(0).tolist() == [0, 0, 1]


def test_of_values_known_at_the_same_moment_the_largest_is_last() -> None:
    frame = series(
        ["2024-01-01", "2024-01-01", "2024-01-03"], [7.0, 5.0, 0.0], city=["a", "b", "c"]
    )
    for table in (frame, frame.iloc[[1, 0, 2]].reset_index(drop=True)):
        assert rolled(table, ["last"], over=[])["sales_last_3_days_by_all"].iloc[2] == 7.0


def over(*keys: Sequence[str] | None, lag: bool = False) -> list[tuple[tuple[str, ...], int]]:
    rolling = [
        {
            "column": "sales",
            "window": f"{number + 1} days",
            **({} if key is None else {"over": list(key)}),
        }
        for number, key in enumerate(keys)
    ]
    lags = [{"column": "sales", "periods": [1]}] if lag else []
    spec = small_spec(
        features={
            "columns": [],
            "categoricals": [],
            "calendar": [],
            "rolling": rolling,
            "lags": lags,
        },
        baselines={"seasonal naive": "usual"},
    )
    return [
        (features.keys, len(features.windows) + len(features.lags))
        for features in plan_passes(spec)
    ]


def test_features_over_more_keys_are_computed_where_fewer_bring_their_rows_together() -> None:
    assert over(["dest", "carrier"], ["dest"], ["dest", "flight", "carrier"]) == [(("dest",), 3)]


def test_unrelated_keys_need_passes_of_their_own() -> None:
    assert over(["dest"], ["origin"]) == [(("dest",), 1), (("origin",), 1)]


def test_only_features_over_everything_bring_all_rows_together() -> None:
    assert over([], ["dest"]) == [((), 1), (("dest",), 1)]


def test_windows_default_to_the_finest_grain_and_lags_to_the_entity() -> None:
    assert over(None, ["region"], lag=True) == [(("region",), 3)]
    assert over(None, lag=True) == [(("region", "city"), 2)]


def test_every_declared_feature_is_in_exactly_one_pass() -> None:
    passes = plan_passes(SPEC)
    assert sorted(window.window for features in passes for window in features.windows) == sorted(
        window.window for window in SPEC.features.rolling
    )
    assert sum(len(features.lags) for features in passes) == len(SPEC.features.lags)


def test_a_series_of_local_midnights_has_all_its_lags_where_the_fleet_has_its_time_zone() -> None:
    midnights = (
        pd.date_range("2024-01-01", "2024-12-31", freq="D", tz="Europe/Berlin")
        .tz_convert("UTC")
        .tz_localize(None)
    )
    frame = series(
        [str(moment) for moment in midnights], list(np.arange(len(midnights), dtype=float))
    )
    rolling = [{"column": "sales", "window": "2 days", "statistics": ["count"]}]
    lags = [{"column": "sales", "periods": [1, 7]}]
    features = {"columns": [], "categoricals": [], "calendar": [], "lags": lags, "rolling": rolling}

    def found(timezone: str | None) -> pd.DataFrame:
        return featured(
            frame, small_spec(features=features, horizon="1 day", baselines=None, timezone=timezone)
        )

    at_home = found("Europe/Berlin")
    for lag in (1, 7):
        assert at_home[f"sales_lag_{lag}"].iloc[lag:].tolist() == list(
            np.arange(len(midnights) - lag, dtype=float)
        )
    assert at_home["sales_count_2_days"].iloc[2:].eq(2).all()
    # Counted in UTC, a day after each change of the clocks misses its row, and a week seven of them.
    assert found(None)["sales_lag_1"].isna().sum() > 1
    assert found(None)["sales_lag_7"].isna().sum() > 7 + 6
