"""Whatever a batch looks like, each of its rows is answered as if it were alone: to the last bit."""

import json
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

from pipeline.models.boosters import EncodedBooster, encode_booster
from pipeline.models.meta_model import FleetModel, Generation, group_id
from pipeline.models.pack import PackedRun, build_model_spec, write_pack
from pipeline.spec import parse_spec

SPEC = parse_spec(
    {
        "name": "mixed",
        "sources": [{"name": "rows", "uri": "rows.csv"}],
        "features": {"columns": ["x", "amount", "count"], "categoricals": ["kind"]},
        "grains": [[], ["region"], ["region", "store"]],
        "entity": ["region", "store"],
        "time": "day",
        "target": {"column": "y", "transform": "log", "offset": "level", "scale": "size"},
        "splits": {"report": "1 month", "tune": "1 month"},
    },
    file="mixed/defs.yaml",
)
KINDS = ["large", "medium", "small"]
REGIONS: list[str | None] = ["north", "süd", "", None]
STORES: list[int | None] = [-1, 0, 7, 100, None]
WIDTHS = ["int8", "int16", "int32", "int64", "float32", "float64", "Int8", "Int64", "Float64"]


def booster(seed: int) -> EncodedBooster:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(300, 4)).astype(np.float32)
    rows[:, 3] = random.integers(0, 3, 300)
    rows[random.random((300, 4)) < 0.1] = np.nan
    target = np.nansum(rows[:, :3] * random.normal(size=3), axis=1)
    data = lgb.Dataset(rows, target, categorical_feature=[3], params={"verbosity": -1})
    settings = {"num_threads": 1, "verbosity": -1, "min_data_per_group": 5, "num_leaves": 7}
    return encode_booster(lgb.train(settings, data, num_boost_round=8).model_to_string())


@pytest.fixture(scope="module", params=["independent", "correction"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FleetModel:
    random = np.random.default_rng(1)
    keys = [
        (0, []),
        *((1, [region]) for region in REGIONS),
        *((2, [region, store]) for region in REGIONS[:3] for store in STORES),
    ]
    boosters = [booster(number) for number in range(len(keys))]
    ledger = pd.DataFrame(
        {
            "grain": [grain for grain, _ in keys],
            "group_id": [group_id(values) for _, values in keys],
            # Some have no model of their own, and some that have one leave the word to their parent.
            "booster_id": [
                None if number % 5 == 4 else one.booster_id for number, one in enumerate(boosters)
            ],
            "weight": np.where(np.arange(len(keys)) % 7 == 6, 0.0, random.random(len(keys))),
            "intervals": [
                None if number % 3 == 2 else json.dumps({"0.8": random.random(), "0.95": None})
                for number in range(len(keys))
            ],
        }
    )
    ledger.loc[0, "intervals"] = '{"0.8": 0.5, "0.95": 0.75}'
    model_spec = build_model_spec(SPEC, {"kind": KINDS}, own=request.param, nullable=["x", "kind"])
    generation = Generation(model_spec, "run-1", constant=0.125, constant_without_offset=0.25)
    folder = tmp_path_factory.mktemp("pack")
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: map(vars, boosters))
    return FleetModel(folder)


def batch_of(seed: int) -> pd.DataFrame:
    """Known and unknown groups, null keys, unseen categories, nulls and infinities in between; some columns that nobody asked for."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 40))

    def some(values: list[Any]) -> Any:
        return pd.Series(
            [values[place] for place in random.integers(0, len(values), n)], dtype=object
        )

    return pd.DataFrame(
        {
            "region": some([*REGIONS, "nowhere"]),
            "store": some([*STORES, 55]),
            "x": random.normal(size=n).round(1),
            "amount": some([1.5, -2.0, 0.0, np.nan, None, np.inf, 1e40]),
            "count": random.integers(0, 5, n),
            "kind": some([*KINDS, "unheard of", None]),
            "level": random.choice([0.0, 1.5, np.nan, np.inf], n, p=[0.4, 0.4, 0.1, 0.1]),
            "size": random.choice([1.0, 0.5, 0.0, -1.0, np.nan], n, p=[0.4, 0.3, 0.1, 0.1, 0.1]),
            "note": "unasked",
        },
        index=random.permutation(n),
    )


def check_equal(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    for name in ("prediction", "lower", "upper"):
        assert found[name].to_numpy().tobytes() == expected[name].to_numpy().tobytes(), name


@pytest.mark.parametrize("interval", [0.8, 0.95])
@pytest.mark.parametrize("seed", range(12))
def test_a_mixed_batch_is_the_same_rows_asked_one_at_a_time(
    model: FleetModel, seed: int, interval: float
) -> None:
    batch = batch_of(seed)
    alone = [model.predict(batch.iloc[[place]], interval=interval) for place in range(len(batch))]
    check_equal(model.predict(batch, interval=interval), pd.concat(alone))


def test_the_batches_hold_all_that_they_should(model: FleetModel) -> None:
    batches = pd.concat([batch_of(seed) for seed in range(12)])
    answers = model.predict(batches.reset_index(drop=True))
    assert set(answers["answered_by"]) == {"constant", "[]", "[region]", "[region, store]"}
    assert answers["booster_id"].nunique() > 10
    assert answers["lower"].isna().sum() > 10
    assert np.isfinite(answers["prediction"]).all()


@pytest.mark.parametrize("seed", range(12))
def test_neither_the_order_of_columns_nor_that_of_rows_matters(
    model: FleetModel, seed: int
) -> None:
    batch, random = batch_of(seed), np.random.default_rng(seed)
    expected = model.predict(batch)
    check_equal(model.predict(batch[random.permutation(batch.columns)]), expected)
    order = random.permutation(len(batch))
    check_equal(model.predict(batch.iloc[order]), expected.iloc[order])


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_of_any_width_are_the_same_keys_and_features(model: FleetModel, width: str) -> None:
    batch = batch_of(3)
    batch = batch.assign(
        store=[55 if store is None else store for store in batch["store"]],
        amount=batch["count"] - 2,
    )
    expected = model.predict(batch)
    assert (expected["answered_by"] == "[region, store]").any()
    check_equal(
        model.predict(batch.astype(dict.fromkeys(("store", "count", "amount"), width))), expected
    )
    check_equal(model.predict(batch.astype({"store": width})), expected)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_a_null_key_is_a_key_of_its_own_however_it_is_written(
    model: FleetModel, missing: Any
) -> None:
    batch = batch_of(4).assign(region="north")
    stores = pd.Series([7, None] * len(batch), dtype=object)[: len(batch)].set_axis(batch.index)
    expected = model.predict(batch.assign(store=stores))
    assert len(set(expected["booster_id"].dropna())) > 1
    check_equal(
        model.predict(
            batch.assign(store=[missing if store is None else store for store in stores])
        ),
        expected,
    )
    check_equal(model.predict(batch.assign(store=stores.astype("Float64"))), expected)


@pytest.mark.parametrize("lacking", [["x"], ["kind"], ["x", "kind"]])
@pytest.mark.parametrize("seed", range(4))
def test_an_optional_column_that_is_missing_is_null_in_every_row(
    model: FleetModel, seed: int, lacking: list[str]
) -> None:
    batch = batch_of(seed)
    check_equal(
        model.predict(batch.drop(columns=lacking)),
        model.predict(batch.assign(**dict.fromkeys(lacking))),
    )


def test_an_unseen_category_is_answered_as_a_null_one(model: FleetModel) -> None:
    batch = batch_of(5)
    check_equal(
        model.predict(batch.assign(kind="unheard of")), model.predict(batch.assign(kind=None))
    )


@pytest.mark.parametrize("rows", [slice(0), []])
def test_an_empty_batch_has_the_columns_of_any_other(model: FleetModel, rows: Any) -> None:
    batch = batch_of(6)
    found = model.predict(batch.iloc[rows])
    assert (len(found), list(found.columns)) == (0, list(model.predict(batch).columns))
    assert len(model.predict(pd.DataFrame(columns=model.required))) == 0
