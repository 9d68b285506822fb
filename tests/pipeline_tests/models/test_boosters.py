import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import PackError, booster_digest, decode_booster


def trained(*, threads: int = 1, seed: int = 1) -> lgb.Booster:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(500, 4))
    parameters = {
        "verbosity": -1,
        "num_threads": threads,
        "deterministic": True,
        "force_row_wise": True,
        "seed": seed,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
    }
    return lgb.train(
        parameters,
        lgb.Dataset(matrix, matrix[:, 0] + rng.normal(size=500), params={"verbosity": -1}),
        num_boost_round=20,
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_text_comes_back_as_it_was(text: str) -> None:
    assert decode_booster(vars(encode_booster(text)), "here") == text


def test_a_booster_comes_back_and_predicts_the_same() -> None:
    booster = trained()
    encoded = encode_booster(booster.model_to_string())
    again = lgb.Booster(model_str=decode_booster(vars(encoded), "here"))
    rows = np.random.default_rng(1).normal(size=(50, 4))
    assert np.array_equal(again.predict(rows), booster.predict(rows))
    assert encoded.n_bytes > len(encoded.text)


def test_a_boosters_id_does_not_depend_on_the_number_of_threads() -> None:
    one, two = (encode_booster(trained(threads=threads).model_to_string()) for threads in (1, 2))
    assert one.booster_id == two.booster_id
    assert one.sha256 != two.sha256  # the text says how many threads there were


def test_other_trees_have_another_id() -> None:
    assert (
        encode_booster(trained(seed=1).model_to_string()).booster_id
        != encode_booster(trained(seed=2).model_to_string()).booster_id
    )


def test_only_the_parameters_are_left_out_of_the_id() -> None:
    text = (
        "tree\nTree=0\n\nparameters:\n[num_threads: 1]\nend of "
        "parameters\n\npandas_categorical:null\n"
    )
    assert booster_digest(text) == booster_digest(text.replace("threads: 1", "threads: 8"))
    assert booster_digest(text) != booster_digest(text.replace("Tree=0", "Tree=1"))
    assert booster_digest(text) != booster_digest(text.replace("null", "[]"))


def test_the_same_text_is_stored_the_same() -> None:
    assert encode_booster("tree") == encode_booster("tree")


def test_a_message_says_where_the_damage_is() -> None:
    row = vars(encode_booster("tree")) | {"sha256": "0" * 64}
    with pytest.raises(
        PackError,
        match=(
            r"^s3://bucket/boosters: booster [0-9a-f]{64} is damaged: "
            r"its digest is [0-9a-f]{64}, expected 0{64}; restore"
        ),
    ):
        decode_booster(row, "s3://bucket/boosters")
