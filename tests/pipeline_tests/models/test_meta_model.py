import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.boosters import EncodedBooster, encode_booster
from pipeline.models.meta_model import (
    CHAINS,
    CONSTANT,
    NOT_FINITE,
    Contributions,
    FleetModel,
    Generation,
    GroupKey,
    InputError,
    ModelTarget,
    PackError,
    answer_columns,
    design_matrix,
    find_structure_fault,
    group_id,
    group_ids,
    index_digest,
    inverse_link,
    key_text,
    link,
    list_contributions,
    load_booster,
    offset_and_scale,
    read_footer,
    replace_nan_by_none,
)
from pipeline.models.pack import PackedRun, build_model_spec, combine_versions, write_pack
from pipeline.testing.data import small_spec

NASTY = [
    "../x",
    "a/b",
    "a\\b",
    "🦊",
    "",
    None,
    "\x00",
    "\x1f",
    "\n",
    '"',
    "null",
    '","',
    "[]",
    " ",
    "é",
    "e\u0301",
    "\u2028",
    "'",
    "%2F",
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
keys = st.one_of(st.none(), texts, st.sampled_from(NASTY))


# Group ids


def test_a_group_key_is_the_plain_tuple_of_grain_and_id() -> None:
    row = {"grain": np.int32(1), "group_id": '["north"]', "parent_id": "[]", "n_rows": 3}
    key = GroupKey.of(row)
    assert (key, hash(key), {key: 1}[1, '["north"]']) == (
        (1, '["north"]'),
        hash((1, '["north"]')),
        1,
    )
    assert (type(key.grain), key.group_id, json.dumps(key)) == (
        int,
        '["north"]',
        '[1, "[\\"north\\"]"]',
    )
    assert GroupKey.parent_of(row) == (0, "[]")
    assert GroupKey.of_rows(pd.DataFrame([row, row])) == [key, key]


def test_the_ancestry_of_a_group_is_coarsest_first() -> None:
    grains = [[], ["region"], ["region", "city"]]
    assert GroupKey(2, '["north",null]').list_ancestry(grains) == [
        (0, "[]"),
        (1, '["north"]'),
        (2, '["north",null]'),
    ]
    assert GroupKey(0, "[]").list_ancestry(grains) == [(0, "[]")]


@given(
    st.lists(
        st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cc", "Cs"]))), max_size=4
    )
)
def test_a_group_id_is_the_json_array_of_its_keys(values: list[str | None]) -> None:
    assert group_id(values) == json.dumps(values, ensure_ascii=False, separators=(",", ":"))


@given(st.lists(keys, max_size=4))
def test_a_group_id_is_one_line_of_json_that_gives_the_keys_back(values: list[str | None]) -> None:
    found = group_id(values)
    assert json.loads(found) == values
    assert not any(
        unicodedata.category(character) == "Cc" and ord(character) < 32 for character in found
    )


@given(st.lists(keys, max_size=3), st.lists(keys, max_size=3))
def test_different_keys_have_different_ids(one: list[str | None], other: list[str | None]) -> None:
    assert (group_id(one) == group_id(other)) == (one == other)


def test_nasty_keys_have_ids_of_their_own() -> None:
    assert len({group_id([one, other]) for one in NASTY for other in NASTY}) == len(NASTY) ** 2


def test_the_pooled_group_has_the_empty_array() -> None:
    assert group_id(()) == "[]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (np.nan, None),
        (pd.NA, None),
        (pd.NaT, None),
        (np.datetime64("NaT"), None),
        (7, "7"),
        (7.0, "7"),
        (np.float64(-3), "-3"),
        (np.int32(5), "5"),
        (-0.0, "0"),
        (True, "true"),
        (np.bool_(False), "false"),
        (2.5, "2.5"),
        (pd.Timestamp("2024-01-31"), "2024-01-31"),
        (np.datetime64("2024-01-31"), "2024-01-31"),
        ("7.0", "7.0"),
        ("", ""),
    ],
)
def test_a_key_value_has_one_text(value: Any, text: str | None) -> None:
    assert key_text(value) == text


@given(st.lists(st.tuples(keys, keys), max_size=20))
def test_ids_of_a_batch_are_those_of_its_rows(pairs: list[tuple[str | None, str | None]]) -> None:
    frame = pd.DataFrame(pairs, columns=["a", "b"], dtype=object)
    assert group_ids(frame, ["a", "b"]).tolist() == [group_id(pair) for pair in pairs]
    assert group_ids(frame, []).tolist() == ["[]"] * len(pairs)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 1],
        [1.0, np.nan, 1.0],
        pd.array([1, None, 2], dtype="Int64"),
        pd.Categorical(["a", None, "a"]),
        [True, False, True],
    ],
)
def test_ids_of_a_batch_do_not_depend_on_the_type_of_the_column(values: Any) -> None:
    frame = pd.DataFrame({"a": values}, index=[5, 5, 9])
    assert group_ids(frame, ["a"]).tolist() == [group_id([value]) for value in list(frame["a"])]


def test_many_keys_of_many_values_do_not_collide() -> None:
    frame = pd.DataFrame(
        np.random.default_rng(0).integers(0, 10**9, (2000, 6)), columns=list("abcdef")
    )
    assert len(set(group_ids(frame, list("abcdef")))) == len(frame)


# The design matrix

MATRIX_SPEC = replace(
    build_model_spec(small_spec(), {"kind": ["10", "large", "small"]}),
    features=("price", "kind", "n"),
)


def matrix(**columns: Any) -> list[list[float]]:
    length = len(next(iter(columns.values())))
    found = design_matrix(
        pd.DataFrame({"price": [1.0] * length, "kind": "small", "n": 3} | columns), MATRIX_SPEC
    )
    assert found.dtype == np.float32
    return [[float(value) for value in row] for row in found]


def same(found: list[float], expected: list[float]) -> bool:
    return bool(
        np.array_equal(
            np.asarray(found, dtype=float), np.asarray(expected, dtype=float), equal_nan=True
        )
    )


@pytest.mark.parametrize("value", ["medium", None, np.nan, "SMALL", ""])
def test_unseen_rare_and_null_categories_are_missing(value: Any) -> None:
    assert same(matrix(kind=["large", value])[1], [1.0, np.nan, 3.0])


def test_a_category_is_its_place_in_the_list() -> None:
    assert [row[1] for row in matrix(kind=["small", "large", "10"])] == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("value", [10, 10.0, np.int64(10), "10"])
def test_integer_categories_may_come_as_floats(value: Any) -> None:
    assert matrix(kind=[value])[0][1] == 0.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, None, pd.NA, Decimal("NaN"), 1e308])
def test_what_is_no_finite_number_is_missing(value: Any) -> None:
    assert same(
        [row[0] for row in matrix(price=pd.Series([2.0, value], dtype=object))], [2.0, np.nan]
    )


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("12.5", 12.5),
        (" 7 ", 7.0),
        ("1e3", 1000.0),
        (True, 1.0),
        (Decimal("1.50"), 1.5),
        (2**70, float(2**70)),
    ],
)
def test_text_of_a_number_is_that_number(value: Any, number: float) -> None:
    assert [row[0] for row in matrix(price=pd.Series([2.0, value], dtype=object))] == [2.0, number]


@pytest.mark.parametrize(
    "value", ["text", "", "12,5", [1.0], {"a": 1}, pd.Timestamp("2024-01-01"), "x" * 500]
)
def test_what_is_no_number_at_all_is_refused_with_its_column_and_row(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        matrix(price=pd.Series([2.0, None, value, value], dtype=object))
    assert str(caught.value).startswith(f"price: {repr(value)[:60]}")
    assert str(caught.value).endswith(
        " is not a number (row 3 of 4); expected a number, text such as '12.5', or null"
    )
    assert len(str(caught.value)) < 150


def test_a_column_of_moments_is_no_number() -> None:
    with pytest.raises(
        InputError,
        match=r"price: Timestamp\('2024-01-01 00:00:00'\) is not a number \(row 1 of 1\)",
    ):
        matrix(price=pd.to_datetime(["2024-01-01"]))


@pytest.mark.parametrize("value", [["small"], {"kind": "small"}])
def test_a_key_or_category_that_is_no_single_value_is_refused(value: Any) -> None:
    rows = pd.DataFrame({"kind": pd.Series(["large", value], dtype=object)})
    expected = re.escape(
        f"kind: {value!r} is not a value of a key or category; expected text, a number, or null"
    )
    with pytest.raises(InputError, match=expected):
        design_matrix(rows, MATRIX_SPEC)
    with pytest.raises(InputError, match=expected):
        group_ids(rows, ["kind"])


def test_booleans_and_nullable_integers_are_numbers() -> None:
    assert same(
        [row[2] for row in matrix(n=pd.array([True, None], dtype="boolean"))], [1.0, np.nan]
    )
    assert same([row[2] for row in matrix(n=pd.array([7, None], dtype="Int64"))], [7.0, np.nan])


def test_a_feature_that_is_not_there_is_missing() -> None:
    found = design_matrix(pd.DataFrame({"kind": ["small"]}), MATRIX_SPEC)
    assert same(found[0].tolist(), [np.nan, 2.0, np.nan])


def test_the_order_of_the_columns_and_further_columns_do_not_matter() -> None:
    frame = pd.DataFrame({"price": [1.0, 2.0], "kind": ["small", "large"], "n": [3, 4]})
    mixed = frame[["n", "kind", "price"]].assign(extra="x")
    assert np.array_equal(design_matrix(frame, MATRIX_SPEC), design_matrix(mixed, MATRIX_SPEC))


def test_numbers_are_kept_in_single_precision_and_what_that_cannot_hold_is_missing() -> None:
    assert matrix(price=[1.0])[0] == matrix(price=[1.0 + 1e-9])[0] != matrix(price=[1.0 + 1e-6])[0]
    assert same(
        [row[0] for row in matrix(price=[3e38, 4e38, -4e38])],
        [float(np.float32(3e38)), np.nan, np.nan],
    )


# Links


@pytest.mark.parametrize("transform", ["none", "log", "log1p"])
def test_a_link_has_its_inverse(transform: str) -> None:
    values = np.array([0.5, 1.0, 1e6])
    assert inverse_link(link(values, transform), transform) == pytest.approx(values)


def test_what_a_transform_cannot_take_is_not_finite() -> None:
    assert not np.isfinite(link(np.array([0.0, -1.0]), "log")).any()
    assert link(np.array([0.0]), "log1p").tolist() == [0.0]
    assert not np.isfinite(link(np.array([-1.0, -2.0]), "log1p")).any()


def test_an_offset_or_scale_that_cannot_serve_is_missing() -> None:
    frame = pd.DataFrame({"o": [1.0, np.inf, np.nan, 2.0, 3.0], "s": [2.0, 1.0, 1.0, 0.0, -1.0]})
    offset, scale = offset_and_scale(frame, ModelTarget("y", "none", "o", "s"))
    assert np.isfinite(offset).tolist() == [True, False, False, True, True]
    assert np.isfinite(scale).tolist() == [True, True, True, False, False]
    assert np.isnan(offset_and_scale(frame, ModelTarget("y", "none", "absent", None))[0]).all()


# The fleet model


def booster(slope: float, level: float = 0.0) -> EncodedBooster:
    """A booster of two leaves: level - slope below price 10, level + slope above."""
    price = np.repeat([5.0, 15.0], 50)
    data = lgb.Dataset(
        np.column_stack([price, *[np.zeros(100)] * 3]),
        level + slope * np.sign(price - 10),
        params={"verbosity": -1},
    )
    parameters = {
        "learning_rate": 1.0,
        "num_leaves": 2,
        "verbosity": -1,
        "num_threads": 1,
        "objective": "l2",
        "boost_from_average": True,
    }
    return encode_booster(lgb.train(parameters, data, num_boost_round=1).model_to_string())


BOOSTERS = {"pooled": booster(1.0, 10.0), "north": booster(2.0, 20.0), "oslo": booster(3.0, 40.0)}
CHAINS_OF = [  # grain, group, booster, weight, half width at 80 %; at 95 % it is twice that
    (0, "[]", "pooled", 1.0, 4.0),
    (1, '["north"]', "north", 0.5, None),
    (1, '["south"]', None, 0.0, None),
    (2, '["north","oslo"]', "oslo", 0.25, 8.0),
    (2, '["north","bergen"]', None, 0.0, None),
    (2, '["south","roma"]', "oslo", 0.0, None),
    (2, '["north",null]', "oslo", 1.0, None),
]


def ledger_of(chains: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    ledger = pd.DataFrame(
        [chain[:4] for chain in chains], columns=["grain", "group_id", "booster", "weight"]
    )
    halves = [
        chain[4] if isinstance(chain[4], dict | None) else {"0.8": chain[4], "0.95": 2 * chain[4]}
        for chain in chains
    ]
    return ledger.assign(
        booster_id=[
            None if name is None else BOOSTERS[name].booster_id for name in ledger["booster"]
        ],
        intervals=[None if half is None else json.dumps(half) for half in halves],
    )


def make_pack(
    folder: Path,
    target: Mapping[str, Any] | None = None,
    chains: Sequence[tuple[Any, ...]] = CHAINS_OF,
    fleet_version: str = "run-1",
) -> Path:
    model_spec = build_model_spec(small_spec(target=target or {}), {"kind": ["large", "small"]})
    rows = [vars(encoded) for encoded in BOOSTERS.values()]
    generation = Generation(model_spec, fleet_version, constant=100.0, constant_without_offset=7.0)
    write_pack(folder, [PackedRun(generation, ledger_of(chains))], lambda _: rows)
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack") / "pack")


def batch(
    *groups: tuple[Any, Any], price: float = 15.0, index: list[Any] | None = None, **columns: Any
) -> pd.DataFrame:
    frame = pd.DataFrame(groups, columns=["region", "city"], dtype=object, index=index)
    return frame.assign(price=price, promotion=0.0, day_of_week=1.0, kind="small", **columns)


def test_a_column_that_is_listed_twice_is_refused_where_it_is_read(pack: Path) -> None:
    rows = batch(("north", "oslo"))
    model = FleetModel(pack)
    with pytest.raises(
        InputError,
        match=(
            "the batch: columns listed more than once: region, price; "
            "rename or remove all but one of each"
        ),
    ):
        model.predict(pd.concat([rows, rows[["price", "region"]]], axis=1))
    # Columns that nobody reads may be there as often as they like.
    notes = pd.DataFrame([[1.0, 2.0]], columns=["note", "note"])
    noted = pd.concat([rows, notes], axis=1)
    pd.testing.assert_frame_equal(model.predict(noted), model.predict(rows))


def test_a_mixed_batch_is_answered_group_by_group(pack: Path) -> None:
    found = FleetModel(pack).predict(
        batch(
            ("north", "oslo"),
            ("north", "bergen"),
            ("south", "roma"),
            ("north", "new"),
            ("east", "new"),
            ("north", None),
            ("north", "oslo"),
        )
    )
    north = 0.5 * 22 + 0.5 * 11
    expected = [0.25 * 43 + 0.75 * north, north, 11.0, north, 11.0, 43.0, 0.25 * 43 + 0.75 * north]
    assert found["prediction"].tolist() == pytest.approx(expected)
    assert found["answered_by"].tolist() == [
        "[region, city]",
        "[region]",
        "[]",
        "[region]",
        "[]",
        "[region, city]",
        "[region, city]",
    ]
    names = ["oslo", "north", "pooled", "north", "pooled", "oslo", "oslo"]
    assert found["booster_id"].tolist() == [BOOSTERS[name].booster_id for name in names]
    assert set(found["fleet_version"]) == {"run-1"}


def test_unseen_group_is_answered_by_its_parent(pack: Path) -> None:
    model = FleetModel(pack)
    unseen, parent = (model.predict(batch(("north", city))) for city in ("atlantis", "bergen"))
    pd.testing.assert_frame_equal(unseen, parent)


def test_each_row_is_answered_as_if_it_were_alone(pack: Path) -> None:
    model = FleetModel(pack)
    frame = batch(
        ("north", "oslo"),
        ("south", "x"),
        ("north", None),
        (None, None),
        ("north", "bergen"),
        ("north", "oslo"),
    )
    frame["price"] = [15.0, 5.0, 1.0, np.nan, 19.0, 2.0]
    together = model.predict(frame)
    alone = pd.concat([model.predict(frame.iloc[[row]]) for row in range(len(frame))])
    pd.testing.assert_frame_equal(together, alone)


def test_an_interval_comes_from_the_nearest_group_that_has_one(pack: Path) -> None:
    found = FleetModel(pack).predict(batch(("north", "oslo"), ("north", "bergen"), ("east", "x")))
    assert ((found["upper"] - found["lower"]) / 2).tolist() == pytest.approx([8.0, 4.0, 4.0])


def half_widths(
    model: FleetModel, *groups: tuple[Any, Any], interval: float | None = None
) -> list[float]:
    found = model.predict(batch(*groups), interval=interval)
    return [float(half) for half in (found["upper"] - found["lower"]) / 2]


def test_an_interval_has_the_level_that_is_asked_for_or_else_the_specs(pack: Path) -> None:
    model = FleetModel(pack)
    groups = ("north", "oslo"), ("north", "bergen"), ("east", "x")
    assert (
        half_widths(model, *groups, interval=0.8)
        == half_widths(model, *groups)
        == pytest.approx([8.0, 4.0, 4.0])
    )
    assert half_widths(model, *groups, interval=0.95) == pytest.approx([16.0, 8.0, 8.0])
    assert half_widths(model, *groups, interval=np.float64(0.95)) == pytest.approx([16.0, 8.0, 8.0])


@pytest.mark.parametrize("level", [0.5, 0, 1.0, 95, "0.95", float("nan"), True])
def test_a_level_that_a_version_does_not_have_is_refused_with_those_it_has(
    pack: Path, level: Any
) -> None:
    with pytest.raises(
        InputError,
        match=(
            rf"interval: {level!r}; version 'run-1' of fleet 'small' has "
            r"intervals of 0\.8, 0\.95"
        ),
    ):
        FleetModel(pack).predict(batch(("north", "oslo")), interval=level)


def test_classes_have_no_level(tmp_path: Path, task: str) -> None:
    model = FleetModel(class_pack(tmp_path / "pack", task))
    assert (model.interval, model.intervals) == (None, [])
    with pytest.raises(
        InputError, match=r"interval: 0\.8; .* answers with classes, which have no interval"
    ):
        model.predict(batch(("north", "x")), interval=0.8)


def test_a_level_with_too_few_rows_is_the_parents_and_never_narrower_than_a_lower_one(
    tmp_path: Path,
) -> None:
    chains = [
        (0, "[]", "pooled", 1.0, {"0.8": 2.0, "0.95": 3.0}),
        (1, '["north"]', None, 0.0, {"0.8": 1.0, "0.95": None}),
        (1, '["south"]', None, 0.0, {"0.8": 5.0, "0.95": None}),
    ]
    model = FleetModel(make_pack(tmp_path / "pack", chains=chains))
    groups = ("north", "x"), ("south", "x"), ("east", "x")
    assert half_widths(model, *groups, interval=0.8) == pytest.approx([1.0, 5.0, 2.0])
    assert half_widths(model, *groups, interval=0.95) == pytest.approx([3.0, 5.0, 3.0])


def test_a_level_that_nobody_has_rows_for_gives_no_interval(tmp_path: Path) -> None:
    model = FleetModel(
        make_pack(tmp_path / "pack", chains=[(0, "[]", "pooled", 1.0, {"0.8": 2.0, "0.95": None})])
    )
    assert half_widths(model, ("north", "x")) == pytest.approx([2.0])
    assert np.isnan(half_widths(model, ("north", "x"), interval=0.95)).all()


def test_the_same_share_is_answered_by_wider_intervals_at_higher_levels(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    levels = [0.5, 0.8, 0.9, 0.99]
    model_spec = build_model_spec(
        small_spec(scoring={"intervals": levels}), {"kind": ["large", "small"]}
    )
    ids = [
        (0, "[]"),
        *((1, group_id([f"r{n}"])) for n in range(9)),
        *((2, group_id([f"r{n}", f"c{m}"])) for n in range(9) for m in range(9)),
    ]
    own = [
        dict(
            zip(
                map(repr, levels),
                np.sort(random.exponential(size=4)) + np.where(random.random(4) < 0.4, np.nan, 0),
                strict=True,
            )
        )
        for _ in ids
    ]
    written = [
        json.dumps({level: None if np.isnan(half) else half for level, half in halves.items()})
        for halves in own
    ]
    ledger = pd.DataFrame(ids, columns=["grain", "group_id"]).assign(
        booster_id=None, weight=0.0, intervals=written
    )
    generation = Generation(model_spec, "run-1", constant=1.0, constant_without_offset=1.0)
    write_pack(tmp_path / "pack", [PackedRun(generation, ledger)], lambda _: [])
    model = FleetModel(tmp_path / "pack")
    groups = [(f"r{n}", f"c{m}") for n in range(10) for m in range(10)]
    found = np.array([half_widths(model, *groups, interval=level) for level in levels])
    for lower, upper in itertools.pairwise(found):
        both = ~np.isnan(lower) & ~np.isnan(upper)
        assert both.sum() > 40
        assert (upper[both] >= lower[both]).all()


def test_a_fleet_without_any_model_answers_with_its_constant(tmp_path: Path) -> None:
    model_spec = build_model_spec(small_spec(), {"kind": []})
    ledger = pd.DataFrame(
        {
            "grain": [0],
            "group_id": ["[]"],
            "booster_id": [None],
            "weight": [0.0],
            "intervals": [None],
        }
    )
    generation = Generation(model_spec, "run-1", constant=100.0, constant_without_offset=7.0)
    write_pack(tmp_path / "pack", [PackedRun(generation, ledger)], lambda _: [])
    found = FleetModel(tmp_path / "pack").predict(batch(("north", "oslo")))
    assert found["prediction"].tolist() == [100.0]
    assert found["answered_by"].tolist() == [CONSTANT]
    assert found["booster_id"].isna().all()
    assert found[["lower", "upper"]].isna().all(axis=None)


def test_no_rows_are_explained_as_no_rows(tmp_path: Path) -> None:
    found = FleetModel(make_pack(tmp_path / "pack")).predict(
        batch(("north", "oslo")).iloc[:0], explain=True
    )
    assert len(found) == 0
    assert "contributions" in found


@pytest.mark.parametrize(("transform", "level"), [("none", 1.79e308), ("log", 800.0)])
def test_an_answer_that_no_double_holds_is_missing_and_says_so(
    tmp_path: Path, transform: str, level: float
) -> None:
    model = FleetModel(
        make_pack(tmp_path / "pack", {"offset": "level", "scale": "size", "transform": transform})
    )
    rows = batch(*[("north", "oslo")] * 3, level=[1.0, level, np.inf], size=[1.0, 1e306, 1.0])
    found = model.predict(rows, explain=True)
    assert found["answered_by"].tolist() == ["[region, city]", NOT_FINITE, CONSTANT]
    assert np.isnan(found.loc[1, ["prediction", "lower", "upper"]].astype(float)).all()
    assert found.loc[1, "booster_id"] is None
    assert np.isfinite(found.loc[[0, 2], "prediction"].astype(float)).all()
    told = replace_nan_by_none(found.copy())
    json.dumps(told.to_dict(orient="records"), allow_nan=False)
    assert told["prediction"].tolist() == [found["prediction"][0], None, found["prediction"][2]]


def test_whole_answers_keep_their_types_for_json(pack: Path) -> None:
    found = FleetModel(pack).predict(batch(("north", "oslo")))
    pd.testing.assert_frame_equal(replace_nan_by_none(found.copy()), found)


def test_a_row_without_an_offset_is_answered_by_the_constant(tmp_path: Path) -> None:
    model = FleetModel(make_pack(tmp_path / "pack", {"offset": "level"}))
    found = model.predict(batch(*[("east", "x")] * 3).assign(level=[5.0, np.nan, np.inf]))
    assert found["prediction"].tolist() == pytest.approx([16.0, 7.0, 7.0])
    assert found["answered_by"].tolist() == ["[]", CONSTANT, CONSTANT]
    assert found["booster_id"].notna().tolist() == [True, False, False]
    assert found["lower"].notna().tolist() == [True, False, False]


def test_answers_are_in_the_targets_units(tmp_path: Path) -> None:
    model = FleetModel(make_pack(tmp_path / "pack", {"transform": "log", "scale": "size"}))
    found = model.predict(batch(("east", "x")).assign(size=0.1))
    assert found["prediction"].tolist() == pytest.approx([np.exp(1.1)])
    assert found["lower"].tolist() == pytest.approx([np.exp(1.1 - 0.4)])


def test_missing_columns_are_listed_with_those_that_are_there(pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        FleetModel(pack).predict(batch(("north", "oslo")).drop(columns=["price", "city"]))
    assert str(caught.value).startswith(
        "missing columns: city, price; the batch has: region, promotion, day_of_week, kind;"
    )


def test_columns_that_may_be_missing_are_null_where_they_are(tmp_path: Path) -> None:
    model_spec = build_model_spec(
        small_spec(), {"kind": ["large", "small"]}, nullable=["price", "kind"]
    )
    generation = Generation(model_spec, "run-1", constant=1.0, constant_without_offset=1.0)
    write_pack(
        tmp_path / "pack",
        [PackedRun(generation, ledger_of(CHAINS_OF))],
        lambda _: [vars(one) for one in BOOSTERS.values()],
    )
    model = FleetModel(tmp_path / "pack")
    assert (model.required, model.optional) == (
        ["region", "city", "promotion", "day_of_week"],
        ["price", "kind"],
    )
    rows = batch(("north", "oslo"), ("east", "x"), ("north", "bergen"))
    nulls = model.predict(rows.assign(price=np.nan, kind=None))
    pd.testing.assert_frame_equal(model.predict(rows.drop(columns=["price", "kind"])), nulls)
    pd.testing.assert_frame_equal(
        model.predict(rows.assign(kind=None).drop(columns="price")), nulls
    )
    with pytest.raises(InputError) as caught:
        model.predict(rows.drop(columns=["price", "promotion"]))
    assert str(caught.value) == (
        "missing columns: promotion; the batch has: region, city, day_of_week, kind; "
        "fleet 'small' needs: region, city, promotion, day_of_week, and may lack: price, kind"
    )


def test_an_empty_batch_has_no_answer_and_all_columns(pack: Path) -> None:
    model = FleetModel(pack)
    frame = batch(("north", "oslo"))
    found = model.predict(frame.iloc[:0])
    assert len(found) == 0
    assert list(found.columns) == list(model.predict(frame).columns)


def test_order_and_index_of_the_batch_are_kept(pack: Path) -> None:
    model = FleetModel(pack)
    frame = batch(("north", "oslo"), ("east", "x"), ("north", "bergen"), index=["z", "a", "a"])
    backwards = model.predict(frame.iloc[::-1])
    assert list(backwards.index) == ["a", "a", "z"]
    pd.testing.assert_frame_equal(backwards.iloc[::-1], model.predict(frame))


def test_a_batch_is_not_changed(pack: Path) -> None:
    frame = batch(("north", "oslo"), kind_of_note="x")
    before = frame.copy()
    FleetModel(pack).predict(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_boosters_are_loaded_at_first_use_into_a_bounded_cache(pack: Path) -> None:
    size = max(encoded.n_bytes for encoded in BOOSTERS.values())
    model = FleetModel(pack, cache_bytes=size + 10)
    assert model.cached_bytes == 0
    frame = batch(("north", "oslo"), ("east", "x"), ("north", None))
    first = model.predict(frame)
    # Room for one booster, whichever was the last.
    assert model.cached_bytes in {encoded.n_bytes for encoded in BOOSTERS.values()}
    assert model.cached_bytes <= size + 10
    pd.testing.assert_frame_equal(model.predict(frame), first)


def test_a_booster_that_is_larger_than_the_cache_is_kept_until_the_next(pack: Path) -> None:
    model = FleetModel(pack, cache_bytes=1)
    frame = batch(("north", "oslo"), ("east", "x"))
    expected = FleetModel(pack).predict(frame)
    pd.testing.assert_frame_equal(model.predict(frame), expected)
    assert model.cached_bytes in {encoded.n_bytes for encoded in BOOSTERS.values()}


def test_a_cache_that_is_large_enough_loads_each_booster_once(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def recorded(stored: Mapping[str, Any], where: str) -> lgb.Booster:
        loaded.append(str(stored["booster_id"]))
        return load_booster(stored, where)

    monkeypatch.setattr("pipeline.models.meta_model.load_booster", recorded)
    model = FleetModel(pack)
    model.predict(batch(("north", "oslo")))
    assert len(loaded) == 3
    model.predict(batch(("north", "oslo"), ("north", "bergen")))
    model.predict(batch(("north", "oslo"), ("north", "bergen")))
    assert len(loaded) == len(set(loaded))
    assert model.cached_bytes == sum(
        encoded.n_bytes for encoded in BOOSTERS.values() if encoded.booster_id in loaded
    )


def test_all_answer_chains_are_listed(pack: Path) -> None:
    assert set(FleetModel(pack).groups()) == {(grain, group) for grain, group, *_ in CHAINS_OF}


# Damaged packs


@pytest.fixture
def copied(pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pack, tmp_path / "copy"))


@pytest.fixture
def never_lightgbm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged text would end the process: nothing may reach LightGBM."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("damaged text reached LightGBM")

    monkeypatch.setattr(lgb, "Booster", refuse)


ROWS_OF_ALL = batch(("north", "oslo"), ("east", "x"), ("north", None), ("north", "bergen"))


def reseal(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict, **index_changes: Any
) -> None:
    """Change every chain, and let the index agree: only what is checked of each booster can find it."""
    path = folder / "chains.parquet"
    rows = [change(row) for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=CHAINS), path, write_page_checksum=True)
    index = json.loads((folder / "index.json").read_text())["index"]
    index["chains.parquet"] |= read_footer(path)
    if (folder / "boosters.parquet").exists():
        index["boosters"]["files"][0] |= read_footer(folder / "boosters.parquet")
    index |= index_changes
    (folder / "index.json").write_text(json.dumps({"sha256": index_digest(index), "index": index}))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def flip_booster(folder: Path, name: str, share: float) -> None:
    """Flip a bit of a booster's stored text."""
    (chain,) = [
        row
        for row in pq.read_table(folder / "chains.parquet").to_pylist()
        if row["booster_id"] == name
    ][:1]
    path = folder / "boosters.parquet"
    path.write_bytes(
        flipped(path.read_bytes(), chain["offset"] + int(share * (chain["stored_bytes"] - 1)))
    )


POOLED, OSLO = BOOSTERS["pooled"].booster_id, BOOSTERS["oslo"].booster_id


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.usefixtures("never_lightgbm")
def test_a_flipped_byte_of_a_booster_is_found_before_lightgbm_sees_it(
    copied: Path, share: float
) -> None:
    flip_booster(copied, POOLED, share)
    with pytest.raises(
        PackError, match=rf"boosters\.parquet: booster {POOLED} (is damaged|cannot be decompressed)"
    ):
        FleetModel(copied).predict(ROWS_OF_ALL)


@pytest.mark.parametrize(
    "change",
    [
        *({"n_bytes": size} for size in (0, -1, 10, 1 << 31, None)),
        *({"sha256": digest} for digest in ("0" * 64, None)),
        *({"offset": offset} for offset in (0, 5, -1, 1 << 40, None)),
        *({"stored_bytes": size} for size in (0, -1, 1, 1 << 40, None)),
        {"file": 1},
    ],
    ids=str,
)
@pytest.mark.usefixtures("never_lightgbm")
def test_a_chain_that_names_another_place_size_or_digest_is_refused(
    copied: Path, change: dict[str, Any]
) -> None:
    reseal(copied, lambda row: row | (change if row["booster_id"] else {}))
    with pytest.raises(PackError, match=r"booster [0-9a-f]{64}"):
        FleetModel(copied).predict(ROWS_OF_ALL)


def test_a_damaged_booster_does_not_stop_groups_that_do_not_need_it(copied: Path) -> None:
    flip_booster(copied, OSLO, 0.5)
    model = FleetModel(copied)
    assert model.predict(batch(("north", "bergen")))["prediction"].notna().all()
    with pytest.raises(PackError, match=OSLO):
        model.predict(batch(("north", "oslo")))


FILES = ["index.json", "spec.json", "chains.parquet", "boosters.parquet"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "a byte short", "a byte more"])
@pytest.mark.usefixtures("never_lightgbm")
def test_a_missing_or_truncated_file_is_refused_at_once(
    copied: Path, file: str, damage: str
) -> None:
    path = copied / file
    data = path.read_bytes()
    path.unlink()
    damaged = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "a byte short": data[:-1],
        "a byte more": data + b"x",
    }
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(PackError) as caught:
        FleetModel(copied)
    assert file in str(caught.value)


@pytest.mark.parametrize("file", FILES[1:])
@pytest.mark.usefixtures("never_lightgbm")
def test_a_file_of_another_pack_of_the_same_fleet_is_refused(
    copied: Path, tmp_path: Path, file: str
) -> None:
    other = make_pack(tmp_path / "other" / "pack", chains=CHAINS_OF[:3], fleet_version="run-2")
    shutil.copy(other / file, copied / file)
    with pytest.raises(PackError, match=file.replace(".", r"\.")):
        FleetModel(copied)


def test_another_pack_than_the_registered_one_is_refused(pack: Path, tmp_path: Path) -> None:
    registered = json.loads((pack / "index.json").read_text())["sha256"]
    assert FleetModel(pack, digest=registered).fleet_version == "run-1"
    other = make_pack(tmp_path / "other" / "pack", fleet_version="run-2")
    with pytest.raises(
        PackError,
        match=r"index\.json: of fleet .*, version 'run-2', not the pack that was registered",
    ):
        FleetModel(other, digest=registered)


@pytest.mark.parametrize("form", [2, 4, "3", None])
def test_another_format_is_refused(copied: Path, form: Any) -> None:
    reseal(copied, format=form)
    with pytest.raises(
        PackError,
        match=(
            rf"index\.json: format {form!r}, expected 3: .* materialise meta_model "
            r"and champion again"
        ),
    ):
        FleetModel(copied)


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "null", '{"index": {}}', '{"sha256": "0", "index": {"format": 2}}', "not JSON"],
)
def test_an_index_that_is_none_is_refused(copied: Path, content: str) -> None:
    (copied / "index.json").write_text(content)
    with pytest.raises(PackError, match=r"index\.json"):
        FleetModel(copied)


def test_a_file_of_other_columns_is_refused(copied: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), copied / "chains.parquet")
    index = json.loads((copied / "index.json").read_text())["index"]
    index["chains.parquet"] |= read_footer(copied / "chains.parquet")
    (copied / "index.json").write_text(json.dumps({"sha256": index_digest(index), "index": index}))
    with pytest.raises(PackError, match=r"chains\.parquet: not a table of chains"):
        FleetModel(copied)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="not the index of a readable pack"):
        FleetModel(tmp_path / "nowhere")


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_is_found_or_harmless(pack: Path, copied: Path, file: str) -> None:
    expected = FleetModel(pack).predict(ROWS_OF_ALL)
    data = (pack / file).read_bytes()
    for position in np.linspace(0, len(data) - 1, 400).astype(int):
        (copied / file).write_bytes(flipped(data, int(position)))
        try:
            found = FleetModel(copied).predict(ROWS_OF_ALL)
        except PackError:
            continue
        pd.testing.assert_frame_equal(found, expected)


# Structure of a booster


@pytest.fixture(scope="module")
def model_text() -> str:
    """A model of several trees, one of them split by categories."""
    random = np.random.default_rng(5)
    inputs = np.column_stack([random.normal(size=400), random.integers(0, 40, 400)])
    target = inputs[:, 0] + inputs[:, 1] % 3
    settings = {
        "verbosity": -1,
        "num_threads": 1,
        "num_leaves": 5,
        "min_data_per_group": 1,
        "cat_smooth": 1,
        "max_cat_to_onehot": 1,
    }
    data = lgb.Dataset(inputs, target, categorical_feature=[1], params={"verbosity": -1})
    return str(lgb.train(settings, data, num_boost_round=4).model_to_string())


def test_what_lightgbm_writes_has_a_sound_structure(model_text: str) -> None:
    assert "cat_threshold" in model_text
    assert find_structure_fault(model_text) is None
    missing = np.where(
        np.arange(200) % 2 == 0, np.nan, np.random.default_rng(1).normal(size=200)
    ).reshape(-1, 1)
    by_what_is_missing = lgb.train(
        {"verbosity": -1},
        lgb.Dataset(missing, np.isnan(missing[:, 0]), params={"verbosity": -1}),
        num_boost_round=1,
    )
    assert "threshold=inf" in by_what_is_missing.model_to_string()
    assert find_structure_fault(by_what_is_missing.model_to_string()) is None
    constant = lgb.train(
        {"verbosity": -1},
        lgb.Dataset(np.ones((50, 1)), np.ones(50), params={"verbosity": -1}),
        num_boost_round=1,
    )
    assert find_structure_fault(constant.model_to_string()) is None


def test_a_model_without_trees_is_refused(model_text: str) -> None:
    header, rest = model_text.split("Tree=0\n", 1)
    text = re.sub(r"tree_sizes=.*", "tree_sizes=", header) + rest[rest.index("end of trees") :]
    assert find_structure_fault(text) is not None


def first_number(text: str, name: str, value: object) -> str:
    """The text with the first number of the first such line replaced, and the tree's size in the header put right."""
    found = re.search(rf"^{name}=(\S+)", text, re.MULTILINE)
    assert found is not None
    size = re.search(r"^tree_sizes=(\d+)", text, re.MULTILINE)
    assert size is not None
    changed = text[: found.start(1)] + str(value) + text[found.end(1) :]
    return changed.replace(
        size[0], f"tree_sizes={int(size[1]) + len(str(value)) - len(found[1])}", 1
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("left_child", 0),
        ("left_child", 99),
        ("left_child", -99),
        ("right_child", 1),
        ("right_child", -1),
        ("split_feature", 7),
        ("num_leaves", 1 << 40),
        ("num_leaves", 4),
        ("num_leaves", 0),
        ("num_cat", 7),
        ("decision_type", 99),
        ("leaf_value", "x"),
        ("leaf_value", "1 1"),
        ("threshold", "1e999x"),
        ("cat_boundaries", 1),
        ("cat_threshold", "1 1"),
        ("is_linear", 1),
        ("split_gain", "1.2.3"),
        ("split_gain", "1 1"),
        ("internal_value", "x"),
        ("internal_count", "1e3e"),
        ("leaf_weight", ""),
    ],
)
def test_a_tree_that_is_none_is_refused(model_text: str, name: str, value: object) -> None:
    text = first_number(model_text, name, value)
    assert text != model_text
    assert find_structure_fault(text) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version=v4", "version=v3"),
        ("max_feature_idx=1", "max_feature_idx=0"),
        ("max_feature_idx=1", "max_feature_idx=x"),
        ("num_tree_per_iteration=1", "num_tree_per_iteration=3"),
        ("num_tree_per_iteration=1", "num_tree_per_iteration=0"),
        ("Tree=1", "Tree=2"),
        ("tree_sizes=", "tree_sizes=1 "),
        ("tree_sizes=", "sizes="),
        ("end of trees", "end of tree"),
        ("\nend of parameters\n", "\n"),
        ("[boosting: gbdt]", "[boosting"),
    ],
)
def test_a_header_that_does_not_fit_its_trees_is_refused(
    model_text: str, old: str, new: str
) -> None:
    assert old in model_text
    assert find_structure_fault(model_text.replace(old, new, 1)) is not None


def test_a_booster_of_unsound_structure_never_reaches_lightgbm(
    model_text: str, never_lightgbm: None
) -> None:
    encoded = encode_booster(first_number(model_text, "left_child", 99))
    with pytest.raises(
        PackError,
        match=(
            f"here: booster {encoded.booster_id} is not a LightGBM model that can be loaded: "
            "a node has a child"
        ),
    ):
        load_booster(vars(encoded), "here")


@pytest.mark.parametrize("explain", [False, True])
def test_a_group_that_the_constant_answers_leans_on_no_model(tmp_path: Path, explain: bool) -> None:
    cut = [None, None, None, "constant", None, "parent", None]
    ledger = ledger_of(
        [
            (*chain[:3], 0.0, chain[4]) if by else chain
            for chain, by in zip(CHAINS_OF, cut, strict=True)
        ]
    )
    model_spec = build_model_spec(small_spec(), {"kind": ["large", "small"]})
    generation = Generation(model_spec, "run-1", constant=100.0, constant_without_offset=7.0)
    rows = [vars(encoded) for encoded in BOOSTERS.values()]
    write_pack(
        tmp_path / "pack", [PackedRun(generation, ledger.assign(answered_by=cut))], lambda _: rows
    )
    question = batch(("north", "oslo"), ("north", "bergen"), ("south", "roma"))
    model = FleetModel(tmp_path / "pack")
    found = model.predict(question, explain=explain)
    assert found["prediction"].tolist() == pytest.approx([100.0, 0.5 * 22 + 0.5 * 11, 11.0])
    assert found["answered_by"].tolist() == ["constant", "[region]", "[]"]
    assert found["booster_id"].isna().tolist() == [True, False, False]
    assert found.loc[0, "upper"] == pytest.approx(108.0)
    if explain:
        assert sum(part["contribution"] for part in found.loc[0, "contributions"]) == pytest.approx(
            100.0
        )
    # A version that is put together from this one's chains keeps it.
    both = combine_versions(model.serving(), [model])
    write_pack(tmp_path / "both", both, model.stored_boosters)
    pd.testing.assert_frame_equal(
        FleetModel(tmp_path / "both").predict(question, explain=explain), found
    )


# Several generations in one version


def generations(
    chains: Sequence[tuple[Any, ...]], version: str, constant: float, **columns: Any
) -> PackedRun:
    model_spec = build_model_spec(small_spec(), {"kind": ["large", "small"]})
    generation = Generation(model_spec, version, constant=constant, constant_without_offset=7.0)
    return PackedRun(generation, ledger_of(chains).assign(**columns))


def test_a_group_is_answered_by_its_generation_with_that_ones_ancestors(tmp_path: Path) -> None:
    """Bergen and oslo stay with the old run; the pooled model and north are of the new one."""
    old_chains = [
        (0, "[]", "pooled", 1.0, 4.0),
        (1, '["north"]', "north", 0.5, None),
        (2, '["north","oslo"]', "oslo", 0.25, 8.0),
    ]
    new_chains = [
        (0, "[]", "north", 1.0, 5.0),
        (1, '["north"]', None, 0.0, None),
        (2, '["north","bergen"]', None, 0.0, None),
    ]
    old = generations(old_chains, "run-1", 100.0)
    boosters = [vars(encoded) for encoded in BOOSTERS.values()]
    question = batch(
        ("north", "oslo"), ("north", "bergen"), ("north", "new"), ("east", "x"), index=[3, 1, 2, 0]
    )
    write_pack(tmp_path / "old", [old], lambda _: boosters)
    before = FleetModel(tmp_path / "old").predict(question)
    new = generations(new_chains, "run-2", 50.0)
    write_pack(tmp_path / "new", [new], lambda _: boosters)
    after = FleetModel(tmp_path / "new").predict(question)
    kept = generations(old_chains, "run-1", 100.0, serves=[False, False, True])
    write_pack(tmp_path / "both", [new, kept], lambda _: boosters)
    both = FleetModel(tmp_path / "both")
    found = both.predict(question)
    pd.testing.assert_frame_equal(found.loc[[3]], before.loc[[3]])
    pd.testing.assert_frame_equal(found.loc[[1, 2, 0]], after.loc[[1, 2, 0]])
    assert found["fleet_version"].tolist() == ["run-1", "run-2", "run-2", "run-2"]
    assert (both.fleet_version, both.groups()) == (
        "run-2",
        [(0, "[]"), (1, '["north"]'), (2, '["north","bergen"]'), (2, '["north","oslo"]')],
    )


def test_chains_are_read_by_row_group_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.pack.CHAINS_PER_ROW_GROUP", 2)
    pack = make_pack(tmp_path / "pack")
    n_row_groups = pq.ParquetFile(pack / "chains.parquet").num_row_groups
    expected = FleetModel(make_pack(tmp_path / "one" / "pack")).predict(ROWS_OF_ALL)
    read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def recorded(file: pq.ParquetFile, number: int, *args: Any, **kwargs: Any) -> pa.Table:
        read.append(number)
        return read_row_group(file, number, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    model = FleetModel(pack)
    assert read == []
    model.predict(batch(("north", "oslo")))
    assert 0 < len(read) < n_row_groups
    pd.testing.assert_frame_equal(model.predict(ROWS_OF_ALL), expected)
    # None was read twice.
    assert len(read) == len(set(read)) > 1


# Classes


def class_booster(n_classes: int) -> EncodedBooster:
    """A booster whose likeliest class depends on the price: the first below 10, the last above."""
    price = np.repeat([5.0, 15.0], 50)
    data = lgb.Dataset(
        np.column_stack([price, *[np.zeros(100)] * 3]),
        np.repeat([0.0, n_classes - 1.0], 50),
        params={"verbosity": -1},
    )
    goal = (
        {"objective": "binary"}
        if n_classes == 2
        else {"objective": "multiclass", "num_class": n_classes}
    )
    return encode_booster(
        lgb.train(
            {**goal, "verbosity": -1, "num_threads": 1}, data, num_boost_round=3
        ).model_to_string()
    )


CLASS_NAMES = {"binary": ["no", "yes"], "multiclass": ["low", "mid", "top"]}
PRIORS = {"binary": [0.75, 0.25], "multiclass": [0.5, 0.3, 0.2]}


def class_pack(folder: Path, task: str, weights: tuple[float, float] = (1.0, 0.5)) -> Path:
    names = CLASS_NAMES[task]
    model_spec = build_model_spec(
        small_spec(task=task, baselines=None), {"kind": ["large", "small"]}, names, PRIORS[task]
    )
    booster = class_booster(len(names))
    ledger = pd.DataFrame(
        {
            "grain": [0, 1],
            "group_id": ["[]", '["north"]'],
            "weight": weights,
            "intervals": [None, None],
        }
    )
    constant = PRIORS[task][1] if task == "binary" else None
    generation = Generation(model_spec, "run-1", constant=constant, constant_without_offset=None)
    write_pack(
        folder,
        [PackedRun(generation, ledger.assign(booster_id=booster.booster_id))],
        lambda _: [vars(booster)],
    )
    return folder


@pytest.fixture(params=CLASS_NAMES)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def probabilities_of(found: pd.DataFrame) -> Any:
    return np.stack(found["probabilities"].to_list())


def test_classes_are_answered_with_their_probabilities(tmp_path: Path, task: str) -> None:
    found = FleetModel(class_pack(tmp_path / "pack", task)).predict(
        batch(("north", "x"), ("south", "y"), ("north", "z"), index=[7, 8, 9])
    )
    assert list(found.columns) == list(answer_columns(task))
    probabilities = probabilities_of(found)
    assert probabilities.shape == (3, len(CLASS_NAMES[task]))
    assert probabilities.sum(axis=1) == pytest.approx(1.0)
    assert found[["lower", "upper"]].isna().all(axis=None)
    assert found.index.tolist() == [7, 8, 9]
    if task == "binary":
        assert found["prediction"].tolist() == probabilities[:, 1].tolist()
    else:
        assert found["prediction"].tolist() == ["top"] * 3


def test_probabilities_are_pooled_in_a_straight_line(tmp_path: Path, task: str) -> None:
    question = batch(("north", "x"))
    own, none, blended = (
        probabilities_of(
            FleetModel(class_pack(tmp_path / str(weights), task, weights)).predict(question)
        )
        for weights in ((1.0, 0.0), (0.0, 0.0), (0.25, 0.0))
    )
    assert none[0] == pytest.approx(PRIORS[task])
    assert blended == pytest.approx(0.25 * own + 0.75 * none)


def test_without_a_model_the_likeliest_class_is_that_of_the_prior(tmp_path: Path) -> None:
    found = FleetModel(class_pack(tmp_path / "pack", "multiclass", (0.0, 0.0))).predict(
        batch(("north", "x"))
    )
    assert (found["prediction"].tolist(), found["answered_by"].tolist()) == (["low"], [CONSTANT])


def test_an_empty_batch_of_classes_has_the_columns_of_an_answer(tmp_path: Path, task: str) -> None:
    found = FleetModel(class_pack(tmp_path / "pack", task)).predict(batch(("north", "x")).head(0))
    assert (len(found), list(found.columns)) == (0, list(answer_columns(task)))


# Explanations


def summed(found: pd.DataFrame) -> Any:
    return np.array(
        [sum(part["contribution"] for part in parts) for parts in found["contributions"]]
    )


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"offset": "level"},
        {"transform": "log", "scale": "size"},
        {"transform": "log1p", "offset": "level"},
    ],
)
def test_contributions_add_up_to_the_prediction_in_link_space(
    tmp_path: Path, target: dict[str, Any]
) -> None:
    model = FleetModel(make_pack(tmp_path / "pack", target))
    rows = batch(
        ("north", "oslo"),
        ("north", "bergen"),
        ("east", "x"),
        ("north", "oslo"),
        level=0.01,
        size=[0.1, 0.2, 0.3, np.nan],
        index=[4, 2, 0, 1],
    )
    found = model.predict(rows, explain=True)
    pd.testing.assert_frame_equal(found.drop(columns="contributions"), model.predict(rows))
    assert summed(found) == pytest.approx(
        link(found["prediction"].to_numpy(), target.get("transform", "none")), rel=1e-12
    )
    features = [[part["feature"] for part in parts] for parts in found["contributions"]]
    assert all(parts[-1] == "(base)" for parts in features)
    assert all(("(offset)" in parts) == ("offset" in target) for parts in features)


def test_the_feature_that_decides_contributes(pack: Path) -> None:
    (parts,) = FleetModel(pack).predict(batch(("north", "oslo")), explain=True)["contributions"]
    told = {part["feature"]: part["contribution"] for part in parts}
    # Half of the rows that each was trained on are on either side of price 10: its mean is the base.
    assert told["price"] == pytest.approx(0.25 * 3.0 + 0.75 * (0.5 * 2.0 + 0.5 * 1.0))
    assert told["(base)"] == pytest.approx(0.25 * 40.0 + 0.75 * (0.5 * 20.0 + 0.5 * 10.0))
    assert told["promotion"] == told["kind"] == 0.0


def test_contributions_of_classes_add_up_to_the_probability(tmp_path: Path, task: str) -> None:
    model = FleetModel(class_pack(tmp_path / "pack", task))
    found = model.predict(batch(("north", "x"), ("south", "y")), explain=True)
    answered = (
        probabilities_of(found)[:, 1] if task == "binary" else probabilities_of(found).max(axis=1)
    )
    assert summed(found) == pytest.approx(answered, rel=1e-12)
    assert all(
        parts[0]["feature"] == "price" and parts[0]["contribution"] > 0
        for parts in found["contributions"]
    )


@pytest.mark.parametrize("is_count", [True, False])
def test_contributions_of_an_output_that_is_no_sum_are_stretched(is_count: bool) -> None:
    model_spec = replace(build_model_spec(small_spec(), {}), features=("a", "b"), is_count=is_count)
    generation = Generation(model_spec, "run-1", constant=1.0, constant_without_offset=0.0)
    contributions = Contributions(generation, np.array([1.0, 1.0]))
    shap = np.array([[0.5, -0.2, 0.1], [0.0, 0.0, 0.1]])
    output = np.exp(shap.sum(axis=1)) if is_count else shap.sum(axis=1)
    contributions.add(np.arange(2), shap, output, 0.5, corrects=False)
    told = contributions.describe_rows(
        pd.Series([0.0, 0.0]), np.array([True, True]), np.zeros(2), np.ones(2)
    )
    assert [sum(part["contribution"] for part in parts) for parts in told] == pytest.approx(
        0.5 * output + 0.5
    )
    assert told[0][0]["contribution"] / told[0][1]["contribution"] == pytest.approx(0.5 / -0.2)


def test_few_features_are_told_and_the_others_summed_up() -> None:
    model_spec = replace(
        build_model_spec(small_spec(target={"offset": "o"}), {}), features=tuple("abcdefg")
    )
    told = list_contributions(
        model_spec, np.array([1.0, -7.0, 3.0, 0.5, 6.0, 5.0, 0.25, 10.0]), 2.0
    )
    assert [part["feature"] for part in told] == [
        "b",
        "e",
        "f",
        "c",
        "a",
        "(other features)",
        "(offset)",
        "(base)",
    ]
    assert (
        sum(part["contribution"] for part in told)
        == 1.0 - 7.0 + 3.0 + 0.5 + 6.0 + 5.0 + 0.25 + 10.0 + 2.0
    )
