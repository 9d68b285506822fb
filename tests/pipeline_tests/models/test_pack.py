import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreError
from pipeline.models.boosters import encode_booster
from pipeline.models.pack import Generation, model_spec, write_boosters, write_pack
from pipeline.testing.data import small_spec

SPEC = {**model_spec(small_spec(), {"kind": ["a"]}), "fleet_version": "run-1", "constant": 0.0, "constant_without_offset": 0.0}
ONE, TWO, OTHER = (encode_booster(text) for text in ("one", "two", "other"))


def ledger(*boosters: str | None) -> pd.DataFrame:
    groups = ["[]", '["north"]', '["south"]'][: len(boosters)]
    return pd.DataFrame({"grain": [0, 1, 1][: len(boosters)], "group_id": groups, "booster_id": boosters, "weight": 0.5, "interval": None})


def write(folder: Path, names: Sequence[str | None], boosters: Iterable[Mapping[str, Any]]) -> Path:
    write_pack(folder, [Generation(SPEC, ledger(*names))], boosters)
    return folder


def test_a_booster_that_the_ledger_names_and_the_store_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"lacks 1 boosters that the ledger names, e.g. {TWO.booster_id}"):
        write(tmp_path / "pack", [ONE.booster_id, TWO.booster_id], [vars(ONE)])


def test_boosters_are_written_once_and_only_if_named_in_the_order_of_their_groups(tmp_path: Path) -> None:
    names = [ONE.booster_id, TWO.booster_id, TWO.booster_id]
    pack = write(tmp_path / "pack", names, map(vars, [TWO, OTHER, TWO, ONE]))
    found = pq.read_table(pack / "boosters.parquet").to_pylist()
    assert found == [{"booster_id": one.booster_id, "text": one.text} for one in (ONE, TWO)]


def test_a_booster_is_the_bytes_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.pack.ROW_GROUP_BYTES", 20)
    boosters = [encode_booster(f"text {number} " * number) for number in range(1, 40)]
    places = write_boosters(tmp_path / "boosters.parquet", [vars(one) for one in boosters])
    content = (tmp_path / "boosters.parquet").read_bytes()
    assert [content[start : start + size] for start, size in places.values()] == [one.text for one in boosters]
    assert pq.ParquetFile(tmp_path / "boosters.parquet").num_row_groups > 1


def test_a_pack_is_the_same_whichever_wave_wrote_its_boosters(tmp_path: Path) -> None:
    for wave in ("run-1-0", "run-2-7"):
        write(tmp_path / wave, [ONE.booster_id], [{**vars(ONE), "wave": wave, "run_id": wave[:5]}])
    for name in ("boosters.parquet", "chains.parquet", "spec.json", "index.json"):
        assert (tmp_path / "run-1-0" / name).read_bytes() == (tmp_path / "run-2-7" / name).read_bytes()


def test_groups_without_a_booster_have_a_chain_all_the_same(tmp_path: Path) -> None:
    chain = pq.read_table(write(tmp_path / "pack", [ONE.booster_id, None], [vars(ONE)]) / "chains.parquet").to_pylist()[1]
    assert {name: value for name, value in chain.items() if value is not None} == {
        "grain": 1,
        "group_id": '["north"]',
        "generation": 0,
        "serves": True,
        "weight": 0.5,
    }


@pytest.mark.parametrize("per_row_group", [1, 2, 3, 5, 100])
def test_all_generations_of_a_group_are_in_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_row_group: int) -> None:
    monkeypatch.setattr("pipeline.models.pack.CHAINS_PER_ROW_GROUP", per_row_group)
    write_pack(tmp_path / "pack", [Generation(SPEC, ledger(None, None, None))] * 3, [])
    file = pq.ParquetFile(tmp_path / "pack" / "chains.parquet")
    groups = [file.read_row_group(number).column("group_id").to_pylist() for number in range(file.num_row_groups)]
    assert sum(len(set(part)) for part in groups) == len(set().union(*groups)) == 3
    first = json.loads((tmp_path / "pack" / "index.json").read_text())["index"]["chains.parquet"]["first"]
    assert [group for _, group in first] == [part[0] for part in groups]


def test_a_model_needs_keys_features_offset_and_scale_each_once() -> None:
    spec = model_spec(small_spec(target={"offset": "level", "scale": "price"}, features={"categoricals": ["kind", "region"]}), {})
    assert spec["required"] == ["region", "city", "price", "promotion", "day_of_week", "kind", "level"]
    assert "sales" not in spec["required"]
