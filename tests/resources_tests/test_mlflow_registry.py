"""One contract for the MLflow registry and its double; then what only MLflow has."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import ModelNotFound, StoreError
from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import (
    Generation,
    answer_columns,
    group_id,
    index_digest,
    read_index,
)
from pipeline.models.pack import PackedRun, write_pack
from pipeline.models.registry import ModelInterface, RunRecord
from pipeline.testing.doubles import MemoryRegistry
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, input_types

SPEC = {
    "fleet": "shop",
    "grains": [[], ["store"]],
    "features": ["x"],
    "categories": {},
    "required": ["store", "x"],
    "optional": [],
    "interval": 0.8,
    "intervals": [0.8, 0.95],
    "task": "regression",
    "own": "independent",
    "classes": [],
    "prior": [],
    "target": {"column": "y", "transform": "none", "offset": None, "scale": None},
    "constant": 2.0,
    "constant_without_offset": 2.0,
}


@pytest.fixture(scope="module")
def booster_text() -> str:
    import lightgbm as lgb

    x = np.linspace(0, 1, 100).reshape(-1, 1)
    settings = {"verbosity": -1, "min_data_in_leaf": 5, "num_threads": 1}
    return str(
        lgb.train(
            settings, lgb.Dataset(x, x[:, 0], params={"verbosity": -1}), num_boost_round=2
        ).model_to_string()
    )


def pack_of(
    folder: Path, booster_text: str, n_groups: int, fleet_version: str, **changes: Any
) -> Path:
    booster = encode_booster(booster_text)
    ledger = pd.DataFrame(
        {
            "grain": [0] + [1] * n_groups,
            "group_id": ["[]", *(group_id([str(number)]) for number in range(n_groups))],
            "booster_id": [booster.booster_id] * (n_groups + 1),
            "weight": [0.5] * (n_groups + 1),
            "intervals": ['{"0.8": 1.0, "0.95": 3.0}'] + [None] * n_groups,
        }
    )
    generation = Generation.from_dict({**SPEC, "fleet_version": fleet_version, **changes})
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: [vars(booster)])
    return folder


@pytest.fixture(scope="module")
def mlflow_registry(tmp_path_factory: pytest.TempPathFactory) -> MlflowRegistry:
    root = tmp_path_factory.mktemp("ml flow [x] ü")
    return MlflowRegistry(
        tracking_uri=f"sqlite:///{root}/store/mlflow.db",
        artifact_root=f"{root}/artifacts",
        scratch=f"{root}/scratch",
    )


@pytest.fixture(params=["mlflow", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return (
        request.getfixturevalue("mlflow_registry")
        if request.param == "mlflow"
        else MemoryRegistry(tmp_path / "packs")
    )


def register(registry: Any, name: str, fleet_version: str, pack: Path, **changes: Any) -> Any:
    interface = ModelInterface(
        {"store": "string", "x": "double"}, [], answer_columns("regression"), 0.8
    )
    record = RunRecord(
        parameters={"pooling": "blend"},
        metrics={"fleet_rmse": 1.5},
        tables={"ledger.json": pd.DataFrame({"group_id": ["[]"]})},
        plots={"training.png": b"\x89PNG"},
    )
    alias = {"alias": changes.pop("alias")} if "alias" in changes else {}
    of_interface = {field.name for field in fields(interface)}
    interface = replace(interface, **{n: v for n, v in changes.items() if n in of_interface})
    record = replace(record, **{n: v for n, v in changes.items() if n not in of_interface})
    return registry.register(
        name, fleet_version, pack=pack, interface=interface, record=record, **alias
    )


def test_a_version_goes_from_challenger_to_champion(
    registry: Any, tmp_path: Path, booster_text: str
) -> None:
    name = "contract"
    assert registry.find(name, CHALLENGER) is None
    with pytest.raises(
        ModelNotFound,
        match=(
            r"'contract' has no champion.*materialise contract/models, "
            r"meta_model and champion first"
        ),
    ):
        registry.get(name, CHAMPION)
    first = register(
        registry, name, "run-1", pack_of(tmp_path / "one" / "pack", booster_text, 2, "run-1")
    )
    assert (first.name, first.number, first.fleet_version) == (name, "1", "run-1")
    assert registry.find(name, CHALLENGER) == registry.get(name, CHALLENGER) == first
    assert registry.find(name, CHAMPION) is None
    registry.promote(first)
    second = register(
        registry, name, "run-2", pack_of(tmp_path / "two" / "pack", booster_text, 3, "run-2")
    )
    assert registry.get(name, CHAMPION) == first
    assert registry.get(name, CHALLENGER) == second
    assert second.number == "2"
    registry.promote(second)
    assert registry.get(name, CHAMPION) == second
    registry.promote(first)  # back
    assert registry.get(name, CHAMPION) == first
    assert [registry.get(name, number) for number in ("1", "2")] == [first, second]
    with pytest.raises(ModelNotFound, match="'contract' has no version 3"):
        registry.get(name, "3")
    for version, n_groups in ((first, 3), (second, 4)):
        fetched = registry.open_pack(version)
        assert fetched.fleet_version == version.fleet_version
        assert len(fetched.groups()) == n_groups
        assert fetched.predict(pd.DataFrame({"store": ["0", "new"], "x": [0.1, 0.9]}))[
            "answered_by"
        ].tolist() == ["[store]", "[]"]


def test_a_version_tells_the_types_of_its_inputs(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    version = register(
        mlflow_registry, "typed", "run-1", pack_of(tmp_path / "pack", booster_text, 2, "run-1")
    )
    assert mlflow_registry.inputs(version) == {"store": "string", "x": "double"}


def artifacts_of(registry: MlflowRegistry, number: str, name: str) -> list[str]:
    import mlflow

    folder = Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"models:/{name}/{number}", tracking_uri=registry.tracking_uri
        )
    )
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "registered_model_meta"
    )


@pytest.mark.slow
def test_the_number_of_artifacts_does_not_grow_with_the_groups(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    found = []
    for number, n_groups in enumerate((1, 500), start=1):
        register(
            mlflow_registry,
            "counted",
            f"run-{number}",
            pack_of(tmp_path / str(n_groups) / "pack", booster_text, n_groups, f"run-{number}"),
        )
        found.append(artifacts_of(mlflow_registry, str(number), "counted"))
    assert found[0] == found[1]
    assert [path for path in found[0] if path.startswith("artifacts/pack/")] == [
        f"artifacts/pack/{file}"
        for file in ("boosters.parquet", "chains.parquet", "index.json", "spec.json")
    ]


def test_a_run_says_what_it_was(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    register(
        mlflow_registry, "described", "run-7", pack_of(tmp_path / "pack", booster_text, 1, "run-7")
    )
    client = mlflow_registry.make_client()
    experiment = client.get_experiment_by_name("described")
    assert experiment.artifact_location.startswith(mlflow_registry.artifact_root)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == run.data.tags["fleet_version"] == "run-7"
    assert run.data.params["pooling"] == "blend"
    assert run.data.metrics == {"fleet_rmse": 1.5}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "ledger.json",
        "plots",
    }
    (version,) = client.search_model_versions("name='described'")
    assert version.tags["fleet_version"] == "run-7"
    import mlflow

    info = mlflow.models.get_model_info("models:/described/1")
    assert info.signature.inputs.input_names() == ["store", "x"]
    assert info.metadata == {
        "inputs": {"store": "string", "x": "double"},
        "required": ["store", "x"],
        "optional": [],
    }
    assert {one.name: one.default for one in info.signature.params.params} == {
        "explain": False,
        "interval": 0.8,
    }
    assert info.signature.outputs.input_names() == [
        "prediction",
        "lower",
        "upper",
        "answered_by",
        "booster_id",
        "fleet_version",
    ]


def test_the_signature_of_classes_holds_their_probabilities(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    pack = pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    register(
        mlflow_registry,
        "classes",
        "run-1",
        pack,
        outputs=answer_columns("multiclass"),
        interval=None,
    )
    import mlflow

    signature = mlflow.models.get_model_info("models:/classes/1").signature
    kinds = {column["name"]: column["type"] for column in signature.outputs.to_dict()}
    assert (kinds["prediction"], kinds["probabilities"]) == ("string", "array")
    assert [one.name for one in signature.params.params] == ["explain"]


def test_a_pack_is_fetched_once(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    version = register(
        mlflow_registry, "fetched", "run-1", pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    )
    first = mlflow_registry.open_pack(version).folder
    stamp = (first / "boosters.parquet").stat().st_mtime_ns
    assert mlflow_registry.open_pack(version).folder == first
    assert (first / "boosters.parquet").stat().st_mtime_ns == stamp
    assert (
        json.loads((first / "spec.json").read_text(encoding="utf-8"))["generations"][0]["fleet"]
        == "shop"
    )


def test_a_registry_that_refuses_is_told_with_the_next_step(
    tmp_path: Path, booster_text: str, mlflow_registry: MlflowRegistry
) -> None:
    pack = pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    with pytest.raises(
        StoreError, match=r"sqlite:///.*registering 'refused' failed .*materialise meta_model again"
    ):
        register(mlflow_registry, "refused", "run-1", pack, parameters={"a bad name\n\u2028!?": 1})


def test_numbers_are_doubles_and_all_else_is_text() -> None:
    types = {
        "a": "bigint",
        "b": "double",
        "c": "decimal(10,2)",
        "d": "string",
        "e": "boolean",
        "f": "date",
        "g": "int",
    }
    assert input_types(list(types), types) == {
        "a": "double",
        "b": "double",
        "c": "double",
        "d": "string",
        "e": "string",
        "f": "string",
        "g": "double",
    }


def test_a_registered_version_explains_itself_when_asked(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    version = register(
        mlflow_registry, "explained", "run-1", pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    )
    import mlflow

    served = mlflow.pyfunc.load_model(f"models:/explained/{version.number}")
    question = pd.DataFrame({"store": ["0", "new"], "x": [0.1, 0.9]})
    plain, explained = served.predict(question), served.predict(question, params={"explain": True})
    pd.testing.assert_frame_equal(explained.drop(columns="contributions"), plain)
    sums = [sum(part["contribution"] for part in parts) for parts in explained["contributions"]]
    assert sums == pytest.approx(plain["prediction"].tolist(), rel=1e-12)


def test_a_registered_version_gives_intervals_of_the_level_that_is_asked_for(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    version = register(
        mlflow_registry, "levels", "run-1", pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    )
    import mlflow

    served = mlflow.pyfunc.load_model(f"models:/levels/{version.number}")
    question = pd.DataFrame({"store": ["0", "new"], "x": [0.1, 0.9]})
    halves = {
        level: _half(served.predict(question, params={"interval": level})) for level in (0.8, 0.95)
    }
    assert halves == {0.8: pytest.approx([1.0, 1.0]), 0.95: pytest.approx([3.0, 3.0])}
    assert _half(served.predict(question)) == pytest.approx(halves[0.8])
    with pytest.raises(
        ValueError,
        match=r"interval: 0.5; version 'run-1' of fleet 'shop' has intervals of 0.8, 0.95",
    ):
        served.predict(question, params={"interval": 0.5})


def _half(answers: pd.DataFrame) -> list[float]:
    return ((answers["upper"] - answers["lower"]) / 2).tolist()


@pytest.mark.parametrize(
    "kind",
    [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint64",
        "float32",
        "float64",
        "Int64",
        "Float64",
        "object",
    ],
)
def test_a_registered_version_takes_numbers_of_any_width(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str, kind: str
) -> None:
    name = f"width_{kind}"
    version = register(
        mlflow_registry,
        name,
        "run-1",
        pack_of(tmp_path / "pack", booster_text, 3, "run-1"),
        inputs={"store": "double", "x": "double"},
    )
    import mlflow

    served = mlflow.pyfunc.load_model(f"models:/{name}/{version.number}")
    rows = pd.DataFrame({"x": [0, 1, 1], "store": [2, 0, 7]}, index=[5, 3, 3])
    expected = served.predict(rows.astype({"store": "float64", "x": "float64"}))
    assert expected["answered_by"].tolist() == ["[store]", "[store]", "[]"]
    pd.testing.assert_frame_equal(served.predict(rows.astype(kind)), expected)


def test_a_registered_version_names_the_columns_that_it_misses_and_those_that_are_there(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    pack = pack_of(tmp_path / "pack", booster_text, 1, "run-1", required=["store"], optional=["x"])
    version = register(mlflow_registry, "lacking", "run-1", pack, optional=["x"])
    import mlflow

    served = mlflow.pyfunc.load_model(f"models:/lacking/{version.number}")
    assert served.metadata.metadata["required"] == ["store"]
    assert served.metadata.metadata["optional"] == ["x"]
    with pytest.raises(
        ValueError,
        match=(
            r"missing columns: store; the batch has: x; fleet 'shop' needs: "
            r"store, and may lack: x"
        ),
    ) as caught:
        served.predict(pd.DataFrame({"x": [0.1], "unknown": [1]}))
    # Ours for callers of the class, and MLflow's for its server, which answers 400 with the message alone.
    assert [kind.__name__ for kind in type(caught.value).__mro__[1:3]] == [
        "MlflowException",
        "InputError",
    ]
    assert caught.value.get_http_status_code() == 400
    assert json.loads(caught.value.serialize_as_json())["message"] == str(caught.value)
    without = served.predict(pd.DataFrame({"store": ["0", None]}))
    pd.testing.assert_frame_equal(
        without, served.predict(pd.DataFrame({"x": [None, np.nan], "store": ["0", None]}))
    )
    assert without["answered_by"].tolist() == ["[store]", "[]"]


def test_a_registered_pack_that_was_exchanged_is_refused(
    mlflow_registry: MlflowRegistry, tmp_path: Path, booster_text: str
) -> None:
    version = register(
        mlflow_registry, "exchanged", "run-1", pack_of(tmp_path / "pack", booster_text, 1, "run-1")
    )
    import mlflow

    local = Path(
        mlflow.artifacts.download_artifacts(
            f"models:/exchanged/{version.number}", dst_path=str(tmp_path / "local")
        )
    )
    pack_of(tmp_path / "other", booster_text, 2, "run-2")
    for file in (tmp_path / "other").iterdir():
        (local / "artifacts" / "pack" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Exception, match="version 'run-2', not the pack that was registered"):
        mlflow.pyfunc.load_model(str(local))


# Opens a version when told to; the store, which is a folder, is so slow that all processes find no copy.
OPENER = """
import shutil, sys, time, types
from pathlib import Path
from resources.mlflow_registry import MlflowRegistry, Version

store, scratch, digest = sys.argv[1:]

def download(artifact_uri, dst_path):
    print("fetched", flush=True)
    time.sleep(0.5)
    return shutil.copytree(store, Path(dst_path) / "pack")

sys.modules["mlflow"] = types.SimpleNamespace(artifacts=types.SimpleNamespace(download_artifacts=download))
MlflowRegistry._connected = lambda self: None
print("ready", flush=True)
sys.stdin.readline()
model = MlflowRegistry(tracking_uri="", scratch=scratch).open_pack(Version("raced", "1", "run-1", digest))
print(len(model.groups()), flush=True)
"""


@pytest.mark.slow
def test_processes_that_open_an_uncached_version_at_once_fetch_it_once(
    tmp_path: Path, booster_text: str
) -> None:
    pack = pack_of(tmp_path / "pack", booster_text, 3, "run-1")
    packs = tmp_path / "scratch" / "packs"
    # What an interrupted download left.
    (packs / "raced-1-run-1").mkdir(parents=True)
    digest = index_digest(read_index(pack))
    command = [sys.executable, "-W", "ignore", "-c", OPENER, str(pack), str(packs.parent), digest]
    checkout = Path(__file__).parents[2]
    openers = [
        subprocess.Popen(
            command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdout
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin
        opener.stdin.write("go\n")
        opener.stdin.flush()
    said = [opener.communicate()[0].split() for opener in openers]
    assert sorted(said) == [["4"], ["4"], ["fetched", "4"]]
    assert [path.name for path in packs.iterdir()] == ["raced-1-run-1"]
