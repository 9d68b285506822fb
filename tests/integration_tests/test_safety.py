"""The registered version alone: with nothing but what it names, from a store that cannot be written to, and without a pickle anywhere."""

import gzip
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.models import meta_model
from pipeline.models.meta_model import FleetModel
from resources.mlflow_registry import REQUIREMENTS, MlflowRegistry

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]

ANSWERS = ["prediction", "lower", "upper", "answered_by", "booster_id", "fleet_version"]
NOT_NEEDED = (
    "assets",
    "benchmarks",
    "dagster",
    "deltalake",
    "optuna",
    "pipeline",
    "pyspark",
    "resources",
)

# With nothing but what the version's requirements ask for, and what these ask for in turn.
BLOCK = """
import importlib, json, sys
allowed, refused = json.loads(sys.argv.pop(1))
allowed = set(allowed) | sys.stdlib_module_names


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)


sys.meta_path.insert(0, Refuse())
for name in refused:
    assert name not in sys.modules, name
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} can be imported here")
"""

ANSWER = """
import json, os, sys
import mlflow, pandas as pd
tracking_uri, rows_file, model_uri, dst_path = sys.argv[1:]
mlflow.set_tracking_uri(tracking_uri)
model = mlflow.pyfunc.load_model(model_uri, dst_path=dst_path or None)
rows = pd.read_parquet(rows_file)
answers = model.predict(rows)
wide = model.predict(rows, params={"interval": 0.95})
assert (wide["upper"] - wide["lower"] >= answers["upper"] - answers["lower"]).all()
print(json.dumps(answers.to_dict("list")))
"""

# A process of root without the right to pass over permissions is bound by them as the owner of the files is.
UNPRIVILEGED = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            sys.exit(77)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
CANNOT = 77

CANNOT_WRITE = """
import os, sys
store = sys.argv.pop(1)
for folder, _, files in os.walk(store):
    for attempt in (os.path.join(folder, "new"), *(os.path.join(folder, file) for file in files)):
        try:
            open(attempt, "ab").close()
        except PermissionError:
            continue
        raise AssertionError(f"{attempt} can be written to")
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Installed distributions that the named ones need, and these themselves."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        wanted = (Requirement(text) for text in needs)
        waiting += [
            one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return found


def modules_of(distributions: set[str]) -> list[str]:
    """Top-level modules of installed distributions."""
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if {canonicalize_name(owner) for owner in owners} & distributions
    )


@pytest.fixture(scope="module")
def questions(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that the chain has scored, one of an unseen city, and one of none."""
    features = chain.table("housing", "features")
    rows = features[features["is_future"]].sort_values("row_key")
    batch = pd.concat(
        [rows, rows.iloc[[0]].assign(city="Atlantis"), rows.iloc[[0]].assign(city=None)],
        ignore_index=True,
    )
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    batch.drop(columns=["median"]).to_parquet(file)
    return file


def bare(
    script: str, *arguments: str, first: tuple[str, ...] = (), folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter over the installed packages: neither the checkout nor its editable installation is on its path."""
    site_packages = [path for path in sys.path if path.endswith("site-packages")]
    whole = f"import sys; sys.path[:0] = {site_packages!r}\n{script}"
    # `mlflow.set_registry_uri` exports MLFLOW_REGISTRY_URI, which may name another test's registry.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment = {**outer, "HOME": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, *first, "-I", "-S", "-c", whole, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def check_answers(chain: Any, run: subprocess.CompletedProcess[str]) -> None:
    """They are those of the chain; strangers are answered by the pooled model."""
    assert run.returncode == 0, run.stderr
    answers = pd.DataFrame(json.loads(run.stdout.splitlines()[-1]))
    expected = chain.table("housing", "predictions").sort_values("row_key", ignore_index=True)
    assert len(answers) == len(expected) + 2
    pd.testing.assert_frame_equal(
        answers.loc[expected.index, ANSWERS], expected[ANSWERS], check_exact=True, check_dtype=False
    )
    strangers = answers.iloc[len(expected) :]
    assert set(strangers["answered_by"]) == {"[]"}
    assert (strangers["prediction"] > 0).all()


def test_a_registered_version_needs_nothing_but_what_it_names(
    chain: Any, questions: Path, tmp_path: Path
) -> None:
    allowed = modules_of(closure(REQUIREMENTS))
    assert {"lightgbm", "mlflow", "numpy", "pandas", "pyarrow"} <= set(allowed)
    assert not set(NOT_NEEDED) & set(allowed)
    uri, copy = chain.resources["registry"].tracking_uri, tmp_path / "copy"
    copy.mkdir()
    run = bare(
        BLOCK + ANSWER,
        json.dumps([allowed, NOT_NEEDED]),
        uri,
        str(questions),
        "models:/housing@champion",
        str(copy),
        folder=tmp_path,
    )
    check_answers(chain, run)


def test_the_pack_needs_no_mlflow_either(chain: Any, questions: Path, tmp_path: Path) -> None:
    allowed = [
        module
        for module in modules_of(closure(tuple(set(REQUIREMENTS) - {"mlflow"})))
        if module != "mlflow"
    ]
    code, pack = model_folder(chain) / "meta_model.py", model_folder(chain) / "artifacts" / "pack"
    script = """
import importlib.util, sys
code, pack, rows_file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("pipeline.models.meta_model", code)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
import pandas as pd
print(pd.DataFrame(module.FleetModel(pack).predict(pd.read_parquet(rows_file))).to_json(orient="columns", double_precision=15))
"""
    run = bare(
        BLOCK + script,
        json.dumps([allowed, [*NOT_NEEDED, "mlflow"]]),
        str(code),
        str(pack),
        str(questions),
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    found = pd.DataFrame(json.loads(run.stdout.splitlines()[-1])).reset_index(drop=True)
    expected = FleetModel(pack).predict(pd.read_parquet(questions))
    assert found["prediction"].tolist() == pytest.approx(expected["prediction"].tolist(), rel=1e-12)
    assert found["booster_id"].tolist() == expected["booster_id"].tolist()


def model_folder(chain: Any) -> Path:
    """Where the artifacts of the registered version are."""
    (found,) = (
        path.parent
        for path in (chain.root / "mlflow" / "artifacts").rglob("MLmodel")
        if "trial" not in str(path)
    )
    return Path(found)


@pytest.fixture
def read_only(chain: Any, tmp_path: Path) -> Iterator[Path]:
    """The artifacts of the registered version, in place, with every right to write taken away."""
    store = chain.root / "mlflow" / "artifacts"
    before = {path: path.stat().st_mode for path in [store, *store.rglob("*")]}
    for path, mode in before.items():
        path.chmod(mode & ~0o222)
    yield store
    for path, mode in before.items():
        path.chmod(mode)


def unprivileged(
    store: Path, script: str, *arguments: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that cannot write to a store; whatever user runs the tests."""
    run = bare(
        CANNOT_WRITE + script, str(store), *arguments, first=("-c", UNPRIVILEGED), folder=folder
    )
    if run.returncode == CANNOT:
        pytest.skip(
            "this process is root and may not give up the right to write everywhere "
            "(prctl PR_CAPBSET_DROP)"
        )
    return run


def test_a_store_that_can_only_be_read_is_enough(
    chain: Any, questions: Path, read_only: Path, tmp_path: Path
) -> None:
    uri = chain.resources["registry"].tracking_uri
    before = contents(read_only)
    # As a folder, and by its name in the registry; there MLflow itself would write beside the model, unless it is told to copy it.
    check_answers(
        chain,
        unprivileged(
            read_only, ANSWER, uri, str(questions), str(model_folder(chain)), "", folder=tmp_path
        ),
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    check_answers(
        chain,
        unprivileged(
            read_only,
            ANSWER,
            uri,
            str(questions),
            "models:/housing@champion",
            str(copy),
            folder=tmp_path,
        ),
    )
    assert contents(read_only) == before


FETCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from resources.mlflow_registry import CHAMPION, MlflowRegistry
import pandas as pd
uri, scratch, rows_file = sys.argv[1:]
registry = MlflowRegistry(tracking_uri=uri, scratch=scratch)
model = registry.open_pack(registry.get("housing", CHAMPION))
assert len(model.predict(pd.read_parquet(rows_file))) > 2
"""


def test_a_pack_is_fetched_from_a_store_that_can_only_be_read(
    chain: Any, questions: Path, read_only: Path, tmp_path: Path
) -> None:
    checkout = str(Path(__file__).parents[2])
    uri = chain.resources["registry"].tracking_uri
    run = unprivileged(
        read_only, FETCH, checkout, uri, str(tmp_path / "scratch"), str(questions), folder=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert [path.name[:10] for path in (tmp_path / "scratch" / "packs").iterdir()] == ["housing-1-"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Pickles

NAMED = re.compile(
    r"\.(pkl|pickle|p|joblib|dill|cloudpickle|pt|pth|npy|npz|skops)(\.|$)", re.IGNORECASE
)
MOST = 1 << 20


def is_pickle(data: bytes) -> bool:
    """Whether the bytes are, or begin with, a pickle of any protocol."""
    if len(data) < 2 or (data[:1] == b"\x80" and data[1] > pickle.HIGHEST_PROTOCOL):
        return False
    try:
        operations = [operation.name for operation, _, _ in pickletools.genops(io.BytesIO(data))]
    except Exception:  # noqa: BLE001 - whatever a parser of other people's bytes may raise
        return False
    # A text such as "." or "N." is one by accident; those that hold anything make or call something.
    return len(operations) > 2 or data[:1] == b"\x80"


def pickles_in(path: Path) -> Iterator[str]:
    """What of a file is pickled, by name, as a whole, as a member of an archive, as a cell of a table."""
    if NAMED.search(path.name):
        yield f"{path}: its name"
    data = path.read_bytes()
    yield from (f"{path}: {found}" for found in pickles_in_bytes(data))
    if data[:4] == b"PAR1":
        table = pq.read_table(path)
        for name in table.column_names:
            if pa.types.is_binary(table.schema.field(name).type) or pa.types.is_large_binary(
                table.schema.field(name).type
            ):
                yield from (
                    f"{path}: a cell of {name}: {found}"
                    for cell in table[name].to_pylist()
                    if cell
                    for found in pickles_in_bytes(cell)
                )
    if data[:15] == b"SQLite format 3":
        yield from (f"{path}: {found}" for found in _pickles_in_database(path))


def pickles_in_bytes(data: bytes) -> Iterator[str]:
    """What of some bytes is pickled: they themselves, what they are compressed from, or a member of the archive that they are."""
    if is_pickle(data):
        yield "its bytes"
    if data[:2] == b"\x1f\x8b":
        yield from (f"compressed, {found}" for found in pickles_in_bytes(gzip.decompress(data)))
    if data[:4] == b"\x28\xb5\x2f\xfd":
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            yield from (f"compressed, {found}" for found in pickles_in_bytes(stream.read()))
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                inner = [
                    *pickles_in_bytes(archive.read(member)),
                    *(["its name"] if NAMED.search(member) else []),
                ]
                yield from (f"member {member}: {found}" for found in inner)


def _pickles_in_database(path: Path) -> Iterator[str]:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        names = [
            name
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        for name in names:
            for row in database.execute(f'SELECT * FROM "{name}"'):
                yield from (
                    f"table {name}: {found}"
                    for cell in row
                    if isinstance(cell, bytes)
                    for found in pickles_in_bytes(cell)
                )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_found_wherever_it_is_hidden(tmp_path: Path, protocol: int) -> None:
    pickled = pickle.dumps({"a": [1.0, None], "b": "text"}, protocol=protocol)
    places = {
        "model.json": pickled,
        "model.gz": gzip.compress(pickled),
        "model.zst": pa.Codec("zstd").compress(pickled, asbytes=True),
    }
    for name, data in places.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "model.whl", "w") as archive:
        archive.writestr("inner.bin", pickled)
    pq.write_table(pa.table({"text": [b"tree", pickled]}), tmp_path / "cells.parquet")
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("CREATE TABLE t (a INTEGER, b BLOB)")
        database.execute("INSERT INTO t VALUES (1, ?)", (pickled,))
    (tmp_path / "python_model.PKL").write_bytes(b"harmless")
    for path in tmp_path.iterdir():
        assert list(pickles_in(path)), path
    for harmless in (
        b"",
        b".",
        b"{}",
        b"tree\nversion=v4\n",
        b"\x89PNG\r\n",
        b"PAR1",
        b"artifact_path: model\n",
    ):
        assert not list(pickles_in_bytes(harmless)), harmless


def test_nothing_that_a_whole_run_leaves_is_pickled(chain: Any) -> None:
    files = [
        path
        for part in ("tables", "mlflow", "scratch")
        for path in (chain.root / part).rglob("*")
        if path.is_file()
    ]
    assert {path.name for path in files} >= {
        "MLmodel",
        "meta_model.py",
        "index.json",
        "spec.json",
        "chains.parquet",
        "boosters.parquet",
        "mlflow.db",
    }
    assert {path.suffix for path in files} >= {".parquet", ".json", ".yaml", ".png"}
    assert {path.relative_to(chain.root).parts[0] for path in files} == {
        "tables",
        "mlflow",
        "scratch",
    }
    assert [told for path in files for told in pickles_in(path)] == []


def test_a_registered_version_is_code_that_is_read_and_no_object_that_is_loaded(chain: Any) -> None:
    folder = model_folder(chain)
    text = (folder / "MLmodel").read_text()
    flavours = yaml.safe_load(text)["flavors"]
    assert list(flavours) == ["python_function"]
    flavour = flavours["python_function"]
    assert flavour["loader_module"] == "mlflow.pyfunc.loaders.code_model"
    assert flavour["code"] is None
    assert "python_model" not in flavour
    assert Path(flavour["model_code_path"]).name == "meta_model.py"
    assert (folder / "meta_model.py").read_bytes() == Path(meta_model.__file__).read_bytes()
    listed = [path.name for path in folder.rglob("*") if path.is_file()]
    # MLflow notes which version of it is installed, whether or not it is used.
    text = text.replace("cloudpickle_version: ", "")
    for word in ("pickle", "pkl", "joblib", "skops"):
        assert word not in text.lower()
        assert not [name for name in listed if word in name.lower()]
        for file in ("requirements.txt", "conda.yaml", "python_env.yaml"):
            assert word not in (folder / file).read_text().lower()


def test_a_fetched_pack_is_whole_and_leaves_nothing_else_behind(chain: Any, tmp_path: Path) -> None:
    registry = MlflowRegistry(
        tracking_uri=chain.resources["registry"].tracking_uri, scratch=str(tmp_path / "scratch")
    )
    version = registry.get("housing", "champion")
    target = registry.open_pack(version).folder
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    assert contents(target) == contents(model_folder(chain) / "artifacts" / "pack")
    shutil.rmtree(target)
    (target.parent / "half").mkdir()
    assert registry.open_pack(version).folder == target
