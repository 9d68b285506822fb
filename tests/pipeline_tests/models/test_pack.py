import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.fs as pf
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoreError
from pipeline.models.boosters import EncodedBooster, encode_booster
from pipeline.models.meta_model import (
    FleetModel,
    Generation,
    PackError,
    filesystem_of,
    open_boosters,
)
from pipeline.models.pack import (
    PackedRun,
    PackStore,
    answers_alike,
    build_model_spec,
    write_boosters,
    write_pack,
)
from pipeline.testing.data import small_spec

GENERATION = Generation(
    build_model_spec(small_spec(), {"kind": ["a"]}),
    "run-1",
    constant=0.0,
    constant_without_offset=0.0,
)
ONE, TWO, OTHER = (encode_booster(text) for text in ("one", "two", "other"))


def ledger(*boosters: str | None) -> pd.DataFrame:
    groups = ["[]", '["north"]', '["south"]'][: len(boosters)]
    return pd.DataFrame(
        {
            "grain": [0, 1, 1][: len(boosters)],
            "group_id": groups,
            "booster_id": boosters,
            "weight": 0.5,
            "intervals": None,
        }
    )


def write(folder: Path, names: Sequence[str | None], boosters: Iterable[Mapping[str, Any]]) -> Path:
    write_pack(folder, [PackedRun(GENERATION, ledger(*names))], lambda _: boosters)
    return folder


def test_a_booster_that_the_ledger_names_and_the_store_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=f"lacks 1 boosters that the ledger names, e.g. {TWO.booster_id}"
    ):
        write(tmp_path / "pack", [ONE.booster_id, TWO.booster_id], [vars(ONE)])


def test_boosters_are_written_once_and_only_if_named_in_the_order_of_their_groups(
    tmp_path: Path,
) -> None:
    names = [ONE.booster_id, TWO.booster_id, TWO.booster_id]
    pack = write(tmp_path / "pack", names, map(vars, [TWO, OTHER, TWO, ONE]))
    found = pq.read_table(pack / "boosters.parquet").to_pylist()
    assert found == [{"booster_id": one.booster_id, "text": one.text} for one in (ONE, TWO)]


def test_a_booster_is_the_bytes_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.pack.ROW_GROUP_BYTES", 20)
    boosters = [encode_booster(f"text {number} " * number) for number in range(1, 40)]
    places = write_boosters(tmp_path / "boosters.parquet", [vars(one) for one in boosters])
    content = (tmp_path / "boosters.parquet").read_bytes()
    assert [content[start : start + size] for start, size in places.values()] == [
        one.text for one in boosters
    ]
    assert pq.ParquetFile(tmp_path / "boosters.parquet").num_row_groups > 1


def test_a_pack_is_the_same_whichever_wave_wrote_its_boosters(tmp_path: Path) -> None:
    for wave in ("run-1-0", "run-2-7"):
        write(tmp_path / wave, [ONE.booster_id], [{**vars(ONE), "wave": wave, "run_id": wave[:5]}])
    for name in ("boosters.parquet", "chains.parquet", "spec.json", "index.json"):
        assert (tmp_path / "run-1-0" / name).read_bytes() == (
            tmp_path / "run-2-7" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("spec", "rows", "alike"),
    [
        ({"fleet_version": "run-2", "constant": 1e-12}, {}, True),
        ({"constant": 0.1}, {}, False),
        ({"interval": 0.5}, {}, False),
        ({}, {"weight": 0.5 + 1e-9}, True),
        ({}, {"weight": [0.5, 0.6]}, False),
        ({}, {"booster_id": [ONE.booster_id, None]}, False),
        ({}, {"intervals": '{"0.8": 1.0}'}, False),
        ({}, {"answered_by": [None, "constant"]}, False),
        ({}, {"answered_by": None, "status": "reused"}, True),
        ({}, {"group_id": ["[]", '["west"]']}, False),
    ],
)
def test_runs_answer_alike_where_all_that_decides_an_answer_is_the_same(
    spec: dict[str, Any], rows: dict[str, Any], alike: bool
) -> None:
    before = ledger(ONE.booster_id, TWO.booster_id)
    after = before.assign(**rows).iloc[::-1]
    generation = Generation.from_dict({**GENERATION.to_dict(), **spec})
    assert answers_alike(PackedRun(GENERATION, before), PackedRun(generation, after)) is alike


# Shared packs


def shared(
    folder: Path, root: Path, boosters: Sequence[EncodedBooster], before: Sequence[FleetModel] = ()
) -> FleetModel:
    names = [one.booster_id for one in boosters]
    store = PackStore(str(root), pf.LocalFileSystem(), str(root))

    def only_what_is_asked_for(asked: Sequence[str]) -> list[dict[str, Any]]:
        return [vars(one) for one in boosters if one.booster_id in asked]

    write_pack(
        folder,
        [PackedRun(GENERATION, ledger(*names))],
        only_what_is_asked_for,
        store=store,
        before=before,
    )
    return FleetModel(folder)


def texts_of(model: FleetModel) -> dict[str, bytes]:
    """The stored text of every booster, as it is read."""
    found = {}
    for chain in model.chains():
        number, offset, size = chain.place
        with open_boosters(model.folder, model.root, model.files[number], model._options) as file:
            found[str(chain.booster_id)] = file.read_at(size, offset)
    return found


def test_a_shared_pack_adds_only_its_new_boosters_to_the_store(tmp_path: Path) -> None:
    root = tmp_path / "a store [x]"
    first = shared(tmp_path / "1", root, [ONE, TWO])
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == [
        "chains.parquet",
        "index.json",
        "spec.json",
    ]
    second = shared(tmp_path / "2", root, [TWO, OTHER], [first])
    third = shared(tmp_path / "3", root, [OTHER, TWO], [second])
    assert len(list(root.iterdir())) == 2
    assert [len(model.files) for model in (first, second, third)] == [1, 2, 2]
    for model, boosters in ((first, [ONE, TWO]), (second, [TWO, OTHER]), (third, [OTHER, TWO])):
        assert texts_of(model) == {one.booster_id: one.text for one in boosters}
        model.check_files()


def test_a_pack_of_another_store_is_written_whole(tmp_path: Path) -> None:
    first = shared(tmp_path / "1", tmp_path / "one", [ONE, TWO])
    moved = shared(tmp_path / "2", tmp_path / "two", [ONE, TWO], [first])
    assert texts_of(moved) == texts_of(first)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        path.name for path in (tmp_path / "two").iterdir()
    }


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_file_that_the_store_has_lost_is_named(tmp_path: Path, damage: str) -> None:
    model = shared(tmp_path / "1", tmp_path / "store", [ONE, TWO])
    (path,) = (tmp_path / "store").iterdir()
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(
            content[:-1]
            if damage == "truncated"
            else content[:4] + content[4:-20] + b"x" * 12 + content[-8:]
        )
    with pytest.raises(PackError, match=path.name.replace(".", r"\.")):
        model.check_files()


def test_a_shared_pack_may_be_in_an_object_store(
    tmp_path: Path, object_store: dict[str, str]
) -> None:
    root = "s3://fleets/shared/packs"
    store = PackStore(root, *filesystem_of(root, object_store))
    write_pack(
        tmp_path / "pack",
        [PackedRun(GENERATION, ledger(ONE.booster_id))],
        lambda _: [vars(ONE)],
        store=store,
    )
    model = FleetModel(tmp_path / "pack", options=object_store)
    model.check_files()
    assert texts_of(model) == {ONE.booster_id: ONE.text}


def test_groups_without_a_booster_have_a_chain_all_the_same(tmp_path: Path) -> None:
    chain = pq.read_table(
        write(tmp_path / "pack", [ONE.booster_id, None], [vars(ONE)]) / "chains.parquet"
    ).to_pylist()[1]
    assert {name: value for name, value in chain.items() if value is not None} == {
        "grain": 1,
        "group_id": '["north"]',
        "generation": 0,
        "serves": True,
        "weight": 0.5,
    }


@pytest.mark.parametrize("per_row_group", [1, 2, 3, 5, 100])
def test_all_generations_of_a_group_are_in_one_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_row_group: int
) -> None:
    monkeypatch.setattr("pipeline.models.pack.CHAINS_PER_ROW_GROUP", per_row_group)
    write_pack(
        tmp_path / "pack", [PackedRun(GENERATION, ledger(None, None, None))] * 3, lambda _: []
    )
    file = pq.ParquetFile(tmp_path / "pack" / "chains.parquet")
    groups = [
        file.read_row_group(number).column("group_id").to_pylist()
        for number in range(file.num_row_groups)
    ]
    assert sum(len(set(part)) for part in groups) == len(set().union(*groups)) == 3
    first = json.loads((tmp_path / "pack" / "index.json").read_text())["index"]["chains.parquet"][
        "first"
    ]
    assert [group for _, group in first] == [part[0] for part in groups]


NEEDS_MUCH = small_spec(
    target={"offset": "level", "scale": "price"}, features={"categoricals": ["kind", "region"]}
)


def test_a_model_needs_keys_features_offset_and_scale_each_once() -> None:
    model_spec = build_model_spec(NEEDS_MUCH, {})
    assert model_spec.required == (
        "region",
        "city",
        "price",
        "promotion",
        "day_of_week",
        "kind",
        "level",
    )
    assert model_spec.optional == ()
    assert "sales" not in model_spec.required


def test_what_training_saw_nulls_in_is_optional_but_for_keys_offset_and_scale() -> None:
    model_spec = build_model_spec(
        NEEDS_MUCH, {}, nullable=("kind", "level", "price", "promotion", "region")
    )
    assert model_spec.required == ("region", "city", "price", "day_of_week", "level")
    assert model_spec.optional == ("promotion", "kind")


def test_half_widths_are_kept_in_the_order_of_the_levels(tmp_path: Path) -> None:
    found = build_model_spec(
        small_spec(scoring={"interval": 0.9, "intervals": [0.5, 0.99]}), {"kind": ["a"]}
    )
    written = ['{"0.5": 1.0, "0.9": 2.0, "0.99": null}', '{"0.99": 9.0}', None]
    write_pack(
        tmp_path / "pack",
        [
            PackedRun(
                replace(GENERATION, model_spec=found),
                ledger(None, None, None).assign(intervals=written),
            )
        ],
        lambda _: [],
    )
    model = FleetModel(tmp_path / "pack")
    assert (model.interval, model.intervals) == (0.9, [0.5, 0.9, 0.99])
    assert [chain.intervals for chain in model.chains()] == [
        [1.0, 2.0, None],
        [None, None, 9.0],
        None,
    ]
