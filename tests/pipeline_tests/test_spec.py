import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.defs
from pipeline.errors import SpecError
from pipeline.features.sql import check_features
from pipeline.spec import RESERVED, FleetSpec, parse_spec
from pipeline.spec_mistakes import EXAMPLES
from pipeline.testing.data import small_attributes, small_spec

FLEETS = Path(pipeline.defs.__file__).parent


def refusal(**changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(small_attributes(**changes), file="fleets/small/defs.yaml")
    return str(caught.value)


def with_history(**features: Any) -> dict[str, Any]:
    return {"features": features}


@pytest.mark.parametrize("fleet", ["housing", "flights"])
def test_shipped_fleets_are_valid_and_fit_their_sql(fleet: str) -> None:
    folder = FLEETS / fleet
    spec = parse_spec(
        yaml.safe_load((folder / "defs.yaml").read_text())["attributes"], file=f"{fleet}/defs.yaml"
    )
    check_features(spec, (folder / spec.features.sql).read_text(), file=spec.features.sql)
    assert spec.name == fleet
    assert spec.target.column not in spec.feature_columns


def test_a_message_names_the_file() -> None:
    assert refusal(name="9lives").startswith(
        "fleets/small/defs.yaml: name: '9lives' is not a usable name"
    )
    assert refusal(name="9lives", grain=[]).startswith("fleets/small/defs.yaml has 2 mistakes:")


def test_an_unknown_field_is_refused_with_the_field_that_was_meant() -> None:
    message = refusal(grain=[[]])
    assert "grain: unknown field" in message
    assert "did you mean 'grains'?" in message
    assert "sources" in message


@pytest.mark.parametrize(
    ("changes", "path", "meant"),
    [
        ({"target": {"transfrom": "log"}}, "target.transfrom", "transform"),
        (
            {"features": {"lags": [{"column": "price", "period": [1]}]}},
            "features.lags.0.period",
            "periods",
        ),
        ({"sources": [{"name": "sales", "url": "x.csv"}]}, "sources.0.url", "uri"),
        (
            {
                "features": {
                    "rolling": [{"column": "price", "window": "3 days", "statistic": ["mean"]}]
                }
            },
            "features.rolling.0.statistic",
            "statistics",
        ),
        ({"tuning": {"max_trial": 3}}, "tuning.max_trial", "max_trials"),
    ],
)
def test_an_unknown_nested_field_is_refused_with_what_is_allowed_there(
    changes: dict[str, Any], path: str, meant: str
) -> None:
    message = refusal(**changes)
    assert f"{path}: unknown field; did you mean {meant!r}?" in message


def test_an_unknown_field_like_no_other_gets_no_guess() -> None:
    message = refusal(zzz=1)
    assert "did you mean" not in message
    assert "Available: as_of, automation, baselines," in message


@pytest.mark.parametrize(
    "field", ["name", "sources", "features", "grains", "entity", "time", "target", "splits"]
)
def test_a_missing_field_is_named(field: str) -> None:
    assert f"{field}: missing required field" in refusal(**{field: None})


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(name="9lives", grain=[], tuning={"max_trials": 0}, scoring={"interval": 1.5})
    assert all(
        part in message
        for part in (
            "'9lives'",
            "grain: unknown field",
            "tuning.max_trials",
            "scoring.interval",
            "got 1.5",
        )
    )


@pytest.mark.parametrize(
    ("scoring", "levels"),
    [
        ({}, (0.8, 0.95)),
        ({"interval": 0.9}, (0.8, 0.9, 0.95)),
        ({"interval": 0.9, "intervals": []}, (0.9,)),
        ({"intervals": [0.99, 0.5, 0.5, 0.8]}, (0.5, 0.8, 0.99)),
    ],
)
def test_intervals_are_kept_for_all_levels_and_always_for_that_of_lower_and_upper(
    scoring: dict[str, Any], levels: tuple[float, ...]
) -> None:
    assert small_spec(scoring=scoring).scoring.levels == levels


@pytest.mark.parametrize("level", [0, 1, 80, -0.1])
def test_a_level_that_is_no_share_is_refused_and_shown(level: float) -> None:
    message = refusal(scoring={"intervals": [0.5, level]})
    assert "scoring.intervals.1: " in message
    assert f"got {level!r}" in message
    assert "scoring.intervals: " in refusal(scoring={"intervals": 0.9})


def test_all_contradictions_are_told_at_once() -> None:
    message = refusal(
        grains=[["region"], ["city"]],
        features={"columns": ["sales"]},
        period=None,
        scoring={"score": "future"},
    )
    assert all(
        part in message
        for part in (
            "the first is ['region']",
            "['city'] does not extend",
            "'sales' is the answer",
            "period: needed",
        )
    )


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_attributes_that_are_no_mapping_are_refused(value: Any) -> None:
    with pytest.raises(SpecError, match=r"^defs\.yaml: expected a mapping, got "):
        parse_spec(value, file="defs.yaml")


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "a.b", "../a", "ä", "a" * 101, "a\n"])
def test_an_unusable_name_is_refused_and_shown(name: str) -> None:
    message = refusal(name=name)
    assert repr(name) in message
    assert "expected a letter" in message


@pytest.mark.parametrize(
    "text", ["", "month", "one month", "1.5 months", "-1 month", "1 fortnight", "1 m", "12"]
)
def test_an_unusable_period_is_refused_with_the_units_there_are(text: str) -> None:
    message = refusal(splits={"report": text})
    assert repr(text) in message
    assert "units: minute, hour, day, week, month, quarter, year" in message


@pytest.mark.parametrize("field", ["report", "tune"])
def test_an_empty_split_is_refused(field: str) -> None:
    assert f"splits.{field}" in refusal(splits={field: "0 days"})


def test_an_empty_window_is_refused() -> None:
    assert "window" in refusal(**with_history(rolling=[{"column": "price", "window": "0 days"}]))


def test_the_first_grain_is_the_pooled_model() -> None:
    assert "grains: the first is ['region'], expected []" in refusal(
        grains=[["region"], ["region", "city"]]
    )


@pytest.mark.parametrize(
    "grains",
    [
        [[], ["region"], ["city"]],
        [[], ["region", "city"], ["region"]],
        [[], ["region"], ["city", "region"]],
        [[], ["region"], ["region"]],
        [[], []],
    ],
)
def test_each_grain_extends_the_one_before(grains: list[list[str]]) -> None:
    assert "does not extend" in refusal(grains=grains)


def test_a_doubled_key_is_refused() -> None:
    assert "'region' is listed twice" in refusal(grains=[[], ["region", "region"]])


def test_text_where_a_list_belongs_is_refused() -> None:
    assert "entity" in refusal(entity="city")
    assert "grains.1" in refusal(grains=[[], "region"])


def test_a_lag_shorter_than_the_horizon_would_leak() -> None:
    message = refusal(
        **with_history(lags=[{"column": "sales", "periods": [1, 7]}]), horizon="3 days"
    )
    assert "sales 1 x 1 day back is not known 3 days ahead" in message
    assert "7 x" not in message


def test_a_lag_as_long_as_the_horizon_is_allowed() -> None:
    spec = small_spec(**with_history(lags=[{"column": "sales", "periods": [3]}]), horizon="3 days")
    assert "sales_lag_3" in spec.feature_columns


def test_lags_need_a_period_and_it_is_not_empty() -> None:
    lags = with_history(lags=[{"column": "sales", "periods": [1]}])
    assert "period: needed for features.lags" in refusal(**lags, period=None)
    assert "'0 days' is empty" in refusal(**lags, period="0 days")


@pytest.mark.parametrize("periods", [[0], [-1], [], ["x"]])
def test_a_lag_looks_back(periods: list[Any]) -> None:
    assert "features.lags.0.periods" in refusal(
        **with_history(lags=[{"column": "sales", "periods": periods}])
    )


@pytest.mark.parametrize("field", ["columns", "categoricals"])
def test_the_target_is_not_a_feature(field: str) -> None:
    assert "'sales' is the answer itself" in refusal(features={field: ["sales"]})


def test_when_the_target_becomes_known_is_not_a_feature() -> None:
    assert "'landed' is the answer itself" in refusal(
        known_at="landed", features={"columns": ["landed"]}
    )


@pytest.mark.parametrize("field", ["offset", "scale"])
def test_the_target_is_neither_its_own_offset_nor_scale(field: str) -> None:
    assert f"target.{field}: 'sales' is the answer itself" in refusal(target={field: "sales"})


def test_the_target_is_not_a_key() -> None:
    assert "'sales' is a key" in refusal(grains=[[], ["sales"]])


def test_the_target_is_not_its_own_baseline() -> None:
    assert "baselines.cheat: 'sales'" in refusal(baselines={"cheat": "sales"})


@pytest.mark.parametrize("name", RESERVED)
def test_a_column_that_would_be_overwritten_is_refused(name: str) -> None:
    assert f"column {name!r} is reserved" in refusal(features={"columns": [name]})
    assert f"column {name!r} is reserved" in refusal(features={"derived": {name: "price + 1"}})


def test_reserved_names_are_reserved_in_any_case() -> None:
    assert "column 'Row_Key' is reserved" in refusal(features={"columns": ["Row_Key"]})


def test_time_and_known_at_may_carry_their_own_names() -> None:
    assert small_spec(time="time", known_at="known_at").time == "time"


def test_a_key_cannot_be_called_time() -> None:
    assert "'time' is reserved" in refusal(time="time", entity=["region", "time"])


def test_doubled_sources_are_refused() -> None:
    source = {"name": "sales", "uri": "sales.csv"}
    assert "sources: 'sales' is listed twice" in refusal(sources=[source, source])


def test_a_source_cannot_take_the_name_of_a_link() -> None:
    assert "'models' is the name of a link" in refusal(sources=[{"name": "models", "uri": "x.csv"}])


@pytest.mark.parametrize(
    "features",
    [
        {"lags": [{"column": "sales", "periods": [1, 1]}]},
        {
            "rolling": [
                {"column": "sales", "window": "3 days"},
                {"column": "sales", "window": "3 day"},
            ]
        },
        {"rolling": [{"column": "sales", "window": "3 days", "statistics": ["mean", "mean"]}]},
        {
            "rolling": [
                {"column": "sales", "window": "3 days", "over": ["a_b"]},
                {"column": "sales", "window": "3 days", "over": ["a", "b"]},
            ]
        },
        {"lags": [{"column": "sales", "periods": [1]}], "derived": {"sales_lag_1": "price"}},
        {"calendar": ["month", "month"]},
    ],
)
def test_a_feature_made_twice_is_refused(features: dict[str, Any]) -> None:
    assert "is defined twice" in refusal(features=features)


@pytest.mark.parametrize("name", ["sales", "city", "day", "price", "Price"])
def test_a_derived_column_cannot_replace_what_the_sql_gives(name: str) -> None:
    assert f"{name!r} is both made and a column of features.sql" in refusal(
        features={"derived": {name: "promotion + 1"}}
    )


def test_a_calendar_part_may_be_a_categorical() -> None:
    spec = small_spec(features={"categoricals": ["kind", "day_of_week"]})
    assert spec.feature_columns.count("day_of_week") == 1
    assert "day_of_week" not in spec.sql_columns


def test_a_fleet_without_a_feature_is_refused() -> None:
    assert "no feature is declared" in refusal(
        features={"columns": [], "calendar": [], "categoricals": []}
    )


def test_excluding_what_is_not_there_is_refused() -> None:
    assert "features.exclude: 'colour' is not a declared feature; declared: day_of_week" in refusal(
        features={"exclude": ["colour"]}
    )


def test_made_up_rows_have_no_loose_columns() -> None:
    message = refusal(scoring={"score": "future"}, features={"categoricals": ["kind", "region"]})
    assert all(
        f"{name!r} has no value in rows that score: future makes up" in message
        for name in ("price", "promotion", "kind")
    )
    assert "'region' has no value" not in message


def test_made_up_rows_need_a_step_and_a_horizon() -> None:
    message = refusal(scoring={"score": "future"}, period=None, horizon=None)
    assert "period: needed for score: future" in message
    assert "horizon: needed for score: future" in message


def test_a_wrong_choice_is_answered_with_the_choices() -> None:
    message = refusal(pooling="average")
    assert "expected one of blend, select, none, got 'average'" in message
    assert "'average'" in message


def test_a_spec_is_frozen(spec: FleetSpec) -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


def test_features_keep_their_order_and_leave_out_the_excluded() -> None:
    spec = small_spec(
        features={
            "lags": [{"column": "sales", "periods": [1]}],
            "rolling": [
                {"column": "sales", "window": "7 days", "statistics": ["mean", "max"], "over": []}
            ],
            "derived": {"ratio": "sales_lag_1 / sales_mean_7_days_by_all"},
            "exclude": ["sales_lag_1"],
        }
    )
    made = ("sales_mean_7_days_by_all", "sales_max_7_days_by_all", "ratio")
    assert spec.feature_columns == ("price", "promotion", *made, "day_of_week", "kind")


def test_columns_asked_of_the_sql_are_traced_to_their_field() -> None:
    spec = small_spec(
        target={"offset": "level", "weight": "size"},
        features={"rolling": [{"column": "visits", "window": "7 days", "over": ["kind"]}]},
    )
    asked: Mapping[str, str] = spec.sql_columns
    assert asked["visits"] == "features.rolling"
    assert asked["level"] == "target.offset"
    assert asked["size"] == "target.weight"
    assert asked["usual_sales"] == "baselines.usual"
    assert asked["city"] == "grains"
    assert "day_of_week" not in asked


def test_the_training_digest_ignores_what_is_said_to_people() -> None:
    digest = small_spec().training_digest
    assert small_spec(scoring={"interval": 0.9, "intervals": [0.5]}).training_digest == digest
    assert small_spec(description="Sales.", owners=["team:shops"]).training_digest == digest
    assert small_spec(tuning={"seed": 2}).training_digest != digest
    assert small_spec(features={"derived": {"x": "price * 2"}}).training_digest != digest


# The search space


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (
            {"num_leaf": 3},
            (
                "'num_leaf' cannot be searched; did you mean 'num_leaves'? Available: "
                "bagging_fraction, "
            ),
        ),
        ({"objective": 3}, "'objective' cannot be searched; Available: "),
        (
            {"learning_rate": {"low": 0.3, "high": 0.1}},
            "0.3 to 0.1 is not a range to search; expected low <= high",
        ),
        (
            {"learning_rate": {"low": 0, "high": 0.1, "log": True}},
            "0 to 0.1 is not a range to search",
        ),
        (
            {"num_leaves": {"low": 3, "high": 7.5}},
            "num_leaves is searched from 3 to 7.5; expected whole numbers",
        ),
        ({"max_depth": 3.5}, "max_depth is searched from 3.5 to 3.5; expected whole numbers"),
        (
            {"learning_rate": {"low": 0.1}},
            "tuning.search.learning_rate.high: missing required field",
        ),
        ({"learning_rate": "fast"}, "tuning.search.learning_rate"),
        ({"learning_rate": True}, "tuning.search.learning_rate"),
    ],
)
def test_a_search_that_cannot_be_is_refused(search: dict[str, Any], expected: str) -> None:
    message = refusal(tuning={"search": search})
    assert "tuning.search" in message
    assert expected in message


def test_a_search_is_a_number_or_a_range() -> None:
    spec = small_spec(
        tuning={
            "search": {"num_leaves": 7, "learning_rate": {"low": 0.01, "high": 0.3, "log": True}}
        }
    )
    found = {
        name: (wanted.low, wanted.high, wanted.log) for name, wanted in spec.tuning.search.items()
    }
    assert found == {"num_leaves": (7, 7, False), "learning_rate": (0.01, 0.3, True)}


@pytest.mark.parametrize(
    "tuning",
    [
        {"budget_seconds": 0},
        {"checkpoint_seconds": 0},
        {"kill_after_seconds": 0},
        {"max_rows": 999},
        {"retune_after": "soon"},
    ],
)
def test_budgets_that_allow_nothing_are_refused(tuning: dict[str, Any]) -> None:
    assert f"tuning.{next(iter(tuning))}" in refusal(tuning=tuning)


# Tasks


CLASSES: dict[str, Any] = {"task": "multiclass", "target": {"column": "label"}, "baselines": None}


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_classes_have_the_objective_of_their_task(task: str) -> None:
    assert small_spec(task=task).objective == task
    message = refusal(task=task, tuning={"objective": "l1"})
    assert (
        f"tuning.objective: 'l1' is for task: regression; task '{task}' has an objective of its own"
        in message
    )


def test_regression_learns_squares_unless_told_otherwise() -> None:
    assert small_spec().objective == "l2"
    assert small_spec(tuning={"objective": "poisson"}).objective == "poisson"
    message = refusal(tuning={"objective": "gamma"})
    assert all(name in message for name in ("tuning.objective", "'gamma'", "tweedie"))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "binary"},
        {"task": "multiclass"},
        *({"tuning": {"objective": name}} for name in ("poisson", "tweedie")),
    ],
)
@pytest.mark.parametrize(("field", "value"), [("transform", "log"), ("offset", "usual_sales")])
def test_what_has_a_link_of_its_own_takes_no_other(
    changes: dict[str, Any], field: str, value: str
) -> None:
    assert f"target.{field}: {value!r} does not go with" in refusal(
        **changes, target={field: value}
    )


def test_classes_are_not_scaled_and_counts_may_be() -> None:
    assert "target.scale: 'size' does not go with task 'binary'" in refusal(
        task="binary", target={"scale": "size"}
    )
    assert (
        small_spec(tuning={"objective": "poisson"}, target={"scale": "size"}).target.scale == "size"
    )


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            {"alpha": 0.9},
            "tuning.alpha: 0.9 is for tuning.objective quantile or huber; the objective is 'l2'",
        ),
        (
            {"objective": "quantile", "alpha": 1.0},
            "tuning.alpha: 1 is not a quantile; expected a number between 0 and 1",
        ),
        ({"objective": "quantile", "alpha": 0}, "tuning.alpha: expected more than 0, got"),
        (
            {"variance_power": 1.2},
            "tuning.variance_power: 1.2 is for tuning.objective tweedie; the objective is 'l2'",
        ),
        (
            {"objective": "tweedie", "variance_power": 2},
            "tuning.variance_power: expected less than 2, got",
        ),
    ],
)
def test_parameters_belong_to_their_objective(tuning: dict[str, Any], message: str) -> None:
    assert message in refusal(tuning=tuning)


def test_a_huber_alpha_is_an_error_and_no_share() -> None:
    assert small_spec(tuning={"objective": "huber", "alpha": 3.0}).alpha == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "regression"},
            (
                "target.classes: ['a', 'b'] are for task: binary or multiclass; "
                "the task is 'regression'"
            ),
        ),
        (
            {"task": "binary", "target": {"classes": ["a", "b", "c"]}},
            "target.classes: there are 3, expected exactly 2 for task 'binary'",
        ),
        (
            {"task": "multiclass", "target": {"classes": ["a"]}},
            "target.classes: there are 1, expected 2 to 100 for task 'multiclass'",
        ),
        (
            {"task": "multiclass", "target": {"classes": ["a", "b", "a"]}},
            "target.classes: 'a' is listed twice",
        ),
    ],
)
def test_declared_classes_fit_the_task(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**{"target": {"classes": ["a", "b"]}, **changes})


@pytest.mark.parametrize(
    "features",
    [
        {"lags": [{"column": "label", "periods": [1]}]},
        {"rolling": [{"column": "label", "window": "3 days"}]},
    ],
)
def test_a_class_is_no_number_to_look_back_on(features: dict[str, Any]) -> None:
    assert (
        "'label' is a class and not a number; make a number of it under another name in features.sql"
        in refusal(**CLASSES, features=features)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": {"monotone": {"kind": 1}}},
            "features.monotone: 'kind' is a categorical, which has no order",
        ),
        (
            {"features": {"monotone": {"cost": 1}}},
            "features.monotone: 'cost' is not a model feature; features: price, promotion",
        ),
        (
            {"features": {"monotone": {"price": 2}}},
            "features.monotone.price: expected -1, 0 or 1, got",
        ),
        (
            {"task": "multiclass", "features": {"monotone": {"price": 1}}},
            "features.monotone: task 'multiclass' has no one answer to rise or fall",
        ),
        (
            {"tuning": {"objective": "l1"}, "features": {"monotone": {"price": 1}}},
            "LightGBM cannot keep tuning.objective 'l1' monotone",
        ),
        (
            {"tuning": {"objective": "quantile"}, "features": {"monotone": {"price": 1}}},
            "LightGBM cannot keep tuning.objective 'quantile' monotone",
        ),
    ],
)
def test_only_what_can_be_monotone_is_asked_to_be(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(**changes)


def test_a_baseline_does_not_take_the_name_of_what_is_always_measured() -> None:
    assert "baselines: 'constant' is a way to answer that is always reported" in refusal(
        baselines={"constant": "usual_sales"}
    )


# The baseline that a series has by itself


@pytest.mark.parametrize(
    ("period", "horizon", "lag"),
    [
        ("1 month", "1 month", 12),
        ("1 quarter", None, 4),
        ("1 week", "1 week", 52),
        ("1 day", "1 day", 7),
        ("1 hour", "1 hour", 24),
        ("6 hours", "6 hours", 4),
        ("1 day", "7 days", 7),
        ("1 day", "8 days", 14),
        ("1 month", "2 years", 24),
        ("1 month", "25 months", 36),
        ("1 minute", None, None),
        ("1 year", None, None),
        ("5 hours", None, None),
        ("7 days", None, None),
    ],
)
def test_a_series_is_compared_with_its_last_season_that_was_known(
    period: str, horizon: str | None, lag: int | None
) -> None:
    spec = small_spec(period=period, horizon=horizon)
    assert spec.seasonal_lag == lag
    assert spec.all_baselines == {
        "usual": "usual_sales",
        **({} if lag is None else {"seasonal naive": f"sales_lag_{lag}"}),
    }


def test_the_last_season_is_computed_and_not_shown_to_the_models() -> None:
    spec = small_spec()
    assert [(lag.column, tuple(lag.periods)) for lag in spec.all_lags] == [("sales", (7,))]
    assert "sales_lag_7" not in spec.feature_columns
    assert "sales_lag_7" not in spec.sql_columns


def test_a_declared_lag_of_a_season_is_computed_once() -> None:
    spec = small_spec(features={"lags": [{"column": "sales", "periods": [1, 7]}]})
    assert spec.all_lags == tuple(spec.features.lags)
    assert spec.all_baselines["seasonal naive"] == "sales_lag_7"
    assert "sales_lag_7" in spec.feature_columns


@pytest.mark.parametrize(
    "changes",
    [
        {"period": None, "horizon": None},
        {"baselines": {"seasonal naive": "usual_sales"}},
        {"task": "binary"},
        {"features": {"columns": ["sales_lag_7"]}},
        {"features": {"derived": {"sales_lag_7": "price + 1"}}},
    ],
)
def test_there_is_no_last_season_without_a_series_of_numbers_or_beside_a_declared_one(
    changes: dict[str, Any],
) -> None:
    spec = small_spec(**changes)
    assert spec.seasonal_lag is None
    assert spec.all_baselines == spec.baselines
    assert spec.all_lags == ()


# Corrections


@pytest.mark.parametrize("own", ["correction", "auto"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "binary", "baselines": None}, "does not go with binary"),
        ({"tuning": {"objective": "poisson"}}, "does not go with poisson"),
        ({"pooling": "none"}, "pooling is none"),
        ({"grains": [[]]}, "there is only the grain []"),
        ({"tuning": {"budget_seconds": 10}}, "leave out tuning.budget_seconds"),
    ],
)
def test_a_correction_needs_a_parent_and_a_number(
    own: str, changes: dict[str, Any], expected: str
) -> None:
    message = refusal(own=own, **changes)
    assert f"own: {own!r}" in message
    assert expected in message


def test_a_time_zone_that_nobody_knows_is_refused_with_near_ones() -> None:
    with pytest.raises(
        SpecError, match=r"timezone: 'Europe/Berln' is not a time zone; did you mean Europe/Berlin"
    ):
        small_spec(timezone="Europe/Berln")
    assert small_spec(timezone=None).training_digest == small_spec().training_digest
    assert small_spec(timezone="Europe/Berlin").training_digest != small_spec().training_digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "trips"}, "target: expected a mapping such as {column: trips}, got 'trips'"),
        ({"splits": {"report": 0.2}}, "splits.report: expected text such as 12 months, got 0.2"),
        ({"grains": ["store"]}, "grains.0: expected a list such as [store], as in grains: [[], [store]], got 'store'"),
        ({"sources": ["raw/x.csv"]}, "sources.0: expected a mapping such as {name: x, uri: raw/x.csv}, got 'raw/x.csv'"),
        ({"entity": "store"}, "entity: expected a list such as [store], got 'store'"),
        ({"task": "clasification"}, "task: expected one of regression, binary, multiclass, got 'clasification'"),
        ({"features": {"calendar": ["mnth"]}}, "minute, got 'mnth'; did you mean 'month'?"),
        ({"tuning": {"max_trials": "a lot"}}, "tuning.max_trials: expected a whole number, got 'a lot'"),
        ({"tuning": {"max_trials": 0}}, "tuning.max_trials: expected 1 or more, got 0"),
        ({"target": None}, "target: missing required field, e.g. {column: amount}"),
        ({"sources": []}, "sources: expected a list that is not empty, got []"),
        ({"features": {"columns": None}}, "features.columns: expected a list such as [price], got nothing"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_answered_with_the_right_one(
    changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(**changes)


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_an_example_in_a_message_is_what_the_field_takes(pattern: str) -> None:
    example = yaml.safe_load(EXAMPLES[pattern].partition(", as in")[0])
    *parents, last = (
        part.replace("*", "0")
        for part in pattern.replace("search.*", "search.num_leaves").split(".")
    )
    history = {
        "lags": [{"column": "x", "periods": [1]}],
        "rolling": [{"column": "x", "window": "1 day"}],
    }
    attributes: Any = copy.deepcopy(
        small_attributes(features=history, tuning={"search": {}}, scoring={})
    )
    place: Any = attributes
    for name in parents:
        place = place[int(name) if name == "0" else name]
    place[int(last) if last == "0" else last] = example
    message = ""
    try:
        parse_spec(attributes, file="defs.yaml")
    except SpecError as error:  # other fields may contradict the example
        message = str(error)
    assert ": expected" not in message
    assert "unknown field" not in message


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"num_leaves": 1}, "num_leaves cannot be 1; expected 2 or more"),
        (
            {"feature_fraction": 7},
            "feature_fraction cannot be 7; expected more than 0, and at most 1",
        ),
        ({"learning_rate": 0}, "learning_rate cannot be 0; expected more than 0"),
        ({"learning_rate": {"low": 0, "high": 0.1}}, "learning_rate cannot be 0"),
        ({"bagging_fraction": {"low": 0.5, "high": 1.5}}, "bagging_fraction cannot be 1.5"),
        ({"lambda_l2": -1}, "lambda_l2 cannot be -1; expected 0 or more"),
    ],
)
def test_a_search_range_that_lightgbm_cannot_take_is_refused(
    search: dict[str, Any], message: str
) -> None:
    assert f"tuning.search: {message}" in refusal(tuning={"search": search})


def test_the_ends_of_what_lightgbm_takes_are_allowed() -> None:
    search = {"num_leaves": 2, "feature_fraction": 1, "lambda_l1": 0, "max_depth": -1}
    assert set(small_spec(tuning={"search": search}).tuning.search) == set(search)


@pytest.mark.parametrize("as_of", ["yesterday", "2013-13-01", "NaT", ""])
def test_an_as_of_that_is_not_a_moment_is_refused(as_of: str) -> None:
    assert f"as_of: {as_of!r} is not a date or time" in refusal(as_of=as_of)


def test_an_as_of_may_be_written_without_quotes() -> None:
    assert small_spec(**yaml.safe_load("as_of: 2013-12-24")).as_of == "2013-12-24"


def test_a_message_has_the_line_of_each_mistake_and_ten_lines_at_most() -> None:
    changes = {f"zzz{number}": 1 for number in range(20)}
    with pytest.raises(SpecError) as caught:
        parse_spec(
            small_attributes(**changes), file="defs.yaml", line_of=lambda path: len(str(path[-1]))
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "defs.yaml has 20 mistakes:"
    assert lines[1].startswith("  line 4: zzz0: unknown field. Available: as_of")
    assert lines[-1] == "  ... and 12 more"
    assert len(lines) == 10


def test_contradictions_stand_in_the_line_of_their_field() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(
            small_attributes(grains=[["region"]]),
            file="defs.yaml",
            line_of=lambda path: 7 if path == ("grains",) else None,
        )
    assert "line 7: grains: the first is ['region']" in str(caught.value)
