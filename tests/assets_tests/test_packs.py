"""Registered versions and the tables they came from: what is deleted there, and what is damaged in a pack."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from pipeline.models.meta_model import PackError
from pipeline.spec import parse_spec
from resources.mlflow_registry import CHAMPION

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SQL = "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, amount, size FROM sales"
Checks = Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]


def test_shared_versions_answer_when_the_tables_are_gone(
    shop_attributes: dict[str, Any],
    launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]],
    checks: Checks,
) -> None:
    fleet, result = launched(
        parse_spec({**shop_attributes, "pack": "shared"}, file="defs.yaml"), SQL
    )
    assert result.success
    assert [name for name, found in checks(result).items() if not found.passed] == []
    registry, tables = fleet.resources["registry"], fleet.resources["tables"]
    predictions, features = fleet.table("predictions"), fleet.table("features")
    first = registry.get("shop", CHAMPION)
    pack = registry.open_pack(first)
    store = Path(tables.location("shop", "packs"))
    assert pack.root == str(store)
    assert not (pack.folder / "boosters.parquet").exists()
    # A second version of the same boosters adds nothing.
    stored = {path.name for path in store.iterdir()}
    wider = parse_spec(
        {**shop_attributes, "pack": "shared", "scoring": {"interval": 0.95}}, file="defs.yaml"
    )
    assert (
        type(fleet)(wider, fleet.files, fleet.resources)
        .launch("models", "meta_model", "champion")
        .success
    )
    assert {path.name for path in store.iterdir()} == stored
    assert int(registry.get("shop", CHAMPION).number) == int(first.number) + 1
    for name in ("boosters", "ledger", "holdout", "runs"):
        shutil.rmtree(tables.location("shop", name))
    for version in (first, registry.get("shop", CHAMPION)):
        model = registry.open_pack(version)
        model.check_files()
        rows = features[features["row_key"].isin(predictions["row_key"])].set_index("row_key")
        pd.testing.assert_series_equal(
            model.predict(rows)["prediction"],
            predictions.set_index("row_key")["prediction"].reindex(rows.index),
        )
    (lost, *_) = sorted(store.iterdir())
    lost.unlink()
    with pytest.raises(PackError, match=lost.name):
        registry.open_pack(first).check_files()


def test_a_damaged_local_copy_is_fetched_again_and_a_damaged_version_is_told(
    shop_attributes: dict[str, Any],
    launched: Callable[..., tuple[Any, dg.ExecuteInProcessResult]],
    checks: Checks,
) -> None:
    fleet, result = launched(parse_spec(shop_attributes, file="defs.yaml"), SQL)
    assert checks(result)["registered_versions_are_whole"].passed
    registry = fleet.resources["registry"]
    version = registry.get("shop", CHAMPION)
    copy = registry.open_pack(version).folder
    (copy / "chains.parquet").write_bytes(b"x")
    assert registry.open_pack(version).groups()
    (registered,) = Path(registry.artifact_root).rglob("artifacts/pack/index.json")
    registered.write_text(registered.read_text().replace("shop", "shoq"))
    shutil.rmtree(copy)
    with pytest.raises(PackError, match=r"index\.json: damaged"):
        registry.open_pack(version)
