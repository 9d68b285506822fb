from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreError
from pipeline.models.boosters import encode_booster
from pipeline.models.pack import model_spec, write_pack
from pipeline.testing.data import small_spec

SPEC = {**model_spec(small_spec(), {"kind": ["a"]}), "fleet_version": "run-1", "constant": 0.0, "constant_without_offset": 0.0}
ONE, TWO, OTHER = (encode_booster(text) for text in ("one", "two", "other"))


def ledger(*boosters: str | None) -> pd.DataFrame:
    groups = ["[]", '["north"]', '["south"]'][: len(boosters)]
    return pd.DataFrame({"grain": [0, 1, 1][: len(boosters)], "group_id": groups, "booster_id": boosters, "weight": 0.5, "interval": None})


def test_a_booster_that_the_ledger_names_and_the_store_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"lacks 1 boosters that the ledger names, e.g. {TWO.booster_id}"):
        write_pack(tmp_path / "pack", SPEC, ledger(ONE.booster_id, TWO.booster_id), [vars(ONE)])


def test_boosters_are_written_one_to_a_row_group_once_and_only_if_named(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", SPEC, ledger(ONE.booster_id, TWO.booster_id, TWO.booster_id), map(vars, [TWO, OTHER, TWO, ONE]))
    file = pq.ParquetFile(tmp_path / "pack" / "boosters.parquet")
    assert file.num_row_groups == 2
    assert file.read().column("booster_id").to_pylist() == [TWO.booster_id, ONE.booster_id]


def test_a_pack_is_the_same_whichever_wave_wrote_its_boosters(tmp_path: Path) -> None:
    for wave in ("run-1-0", "run-2-7"):
        write_pack(tmp_path / wave, SPEC, ledger(ONE.booster_id), [{**vars(ONE), "wave": wave, "run_id": wave[:5]}])
    for name in ("boosters.parquet", "chains.parquet", "spec.json"):
        assert (tmp_path / "run-1-0" / name).read_bytes() == (tmp_path / "run-2-7" / name).read_bytes()


def test_groups_without_a_booster_have_a_chain_all_the_same(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", SPEC, ledger(ONE.booster_id, None), [vars(ONE)])
    chains = pq.read_table(tmp_path / "pack" / "chains.parquet").to_pylist()
    assert chains[1] == {"grain": 1, "group_id": '["north"]', "booster_id": None, "weight": 0.5, "interval": None}


def test_a_model_needs_keys_features_offset_and_scale_each_once() -> None:
    spec = model_spec(small_spec(target={"offset": "level", "scale": "price"}, features={"categoricals": ["kind", "region"]}), {})
    assert spec["required"] == ["region", "city", "price", "promotion", "day_of_week", "kind", "level"]
    assert "sales" not in spec["required"]
