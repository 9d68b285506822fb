"""A small registered version, made without a training run, and awkward rows to ask it about."""

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd

from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import Generation, answer_columns, group_id
from pipeline.models.pack import PackedRun, build_model_spec, write_pack
from pipeline.models.registry import ModelInterface, RunRecord
from pipeline.spec import FleetSpec, parse_spec

ASKED = "asked"
KINDS = ("large", "small")
STORES = (("north", 1), ("north", 2), ("south", 3))
MISSING = 0.1
INPUTS = {
    "region": "string",
    "store": "double",
    "price": "double",
    "size": "double",
    "kind": "string",
    "base": "double",
}


def asked_spec() -> FleetSpec:
    """Numbered stores in regions; a category, a number and an integer as features.

    The target is learnt as a logarithm, with an offset.
    """
    return parse_spec(
        {
            "name": ASKED,
            "sources": [{"name": "rows", "uri": "rows.csv"}],
            "features": {"columns": ["price", "size"], "categoricals": ["kind"]},
            "grains": [[], ["region"], ["region", "store"]],
            "entity": ["region", "store"],
            "time": "day",
            "period": "1 day",
            "target": {"column": "y", "transform": "log", "offset": "base"},
            "splits": {"report": "1 month", "tune": "1 month"},
        },
        file="asked.yaml",
    )


def asked_pack(folder: Path, fleet_version: str, seed: int = 0) -> Path:
    """Write a pack with a model for the pool, each region and each store.

    Args:
        folder: empty or absent; named `pack`, if it is to be registered.
        fleet_version: of the pack.
        seed: of the models; another seed gives other answers.
    """
    keys: list[tuple[Any, ...]] = [(), ("north",), ("south",), *STORES]
    weights = np.linspace(1.0, 0.3, len(keys))
    encoded = []
    rows = []
    for number, key in enumerate(keys):
        booster = encode_booster(_booster_text(100 * seed + number))
        encoded.append(booster)
        rows.append((len(key), group_id(key), booster.booster_id, weights[number]))
    ledger = pd.DataFrame(rows, columns=["grain", "group_id", "booster_id", "weight"])
    ledger["intervals"] = '{"0.8": 0.25, "0.95": 0.5}'
    generation = Generation(
        build_model_spec(asked_spec(), {"kind": KINDS}),
        fleet_version,
        constant=0.1,
        constant_without_offset=1.0,
    )
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: map(vars, encoded))
    return folder


def _booster_text(seed: int) -> str:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(400, 3)).astype(np.float32)
    target = (
        0.1 * rng.normal()
        + 0.2 * inputs[:, 0]
        + 0.1 * (inputs[:, 1] > rng.normal())
        + 0.05 * rng.normal(size=400)
    )
    settings = {
        "verbosity": -1,
        "num_threads": 1,
        "num_leaves": 7,
        "min_data_in_leaf": 10,
        "seed": seed,
    }
    data = lightgbm.Dataset(inputs, target, params={"verbosity": -1})
    return str(lightgbm.train(settings, data, num_boost_round=10).model_to_string())


def asked_rows(n: int, seed: int = 0, first: int = 0) -> pd.DataFrame:
    """Rows to ask about: known and unseen stores mixed, nulls in every input, inexact floats.

    Returns:
        One row per question: row_id (unique, from `first` on), the columns of `INPUTS`, and a note
        that no model needs.
    """
    rng = np.random.default_rng([seed, first])
    unseen = [("north", 77), ("west", 1), (None, 2), ("south", None)]
    stores = pd.DataFrame([*STORES, *unseen], columns=["region", "store"])
    rows = stores.iloc[rng.integers(0, len(stores), n)].reset_index(drop=True)
    rows["store"] = rows["store"].astype("Int64")
    rows.insert(0, "row_id", np.arange(first, first + n))
    rows["price"] = np.where(rng.random(n) < MISSING, np.nan, rng.normal(size=n) / 3)
    rows["size"] = pd.Series(rng.integers(-3, 4, n), dtype="Int64").mask(
        pd.Series(rng.random(n) < MISSING)
    )
    rows["kind"] = rng.choice(np.array([*KINDS, "unseen", None], dtype=object), n)
    rows["base"] = np.where(rng.random(n) < MISSING, np.nan, rng.uniform(MISSING, 5.0, n).round(3))
    rows["note"] = [f'note, "{number}" ü' for number in range(n)]
    return rows


def register_asked(registry: Any, pack: Path, fleet_version: str, *, champion: bool = True) -> Any:
    """Register a pack as a fleet's is, by default as the champion; returns the version."""
    interface = ModelInterface(INPUTS, [], answer_columns("regression"), 0.8)
    version = registry.register(
        ASKED, fleet_version, pack=pack, interface=interface, record=RunRecord()
    )
    if champion:
        registry.promote(version)
    return version
