"""The registered model: how fast it opens and answers, how much it holds, and what becomes of damaged packs."""

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.counting_proxy import free_port
from benchmarks.generated import SPLITS, GeneratedFleet
from benchmarks.runs import PROJECT, NotMeasured, Runs
from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import FleetModel, Generation, filesystem_of, group_id
from pipeline.models.pack import PackedRun, PackStore, build_model_spec, write_pack
from pipeline.models.registry import RunRecord
from pipeline.spec import FleetSpec, parse_spec
from pipeline.testing.object_store import BUCKET, object_store
from resources.mlflow_registry import MlflowRegistry, interface_of

SIZES = (10, 1_000, 10_000)
REMOTE_SIZE = 1_000
ROUNDS = 100
GROUPS_PER_REGION = 100
CACHE_BYTES = 256 << 20
# Models that are really trained; where more are needed, each further one differs from one of them
# in a leaf.
TRAINED = 200
_TRAINED_ON = GeneratedFleet(TRAINED)


def packed_spec() -> FleetSpec:
    """The fleet of generated packs: groups in regions."""
    return parse_spec(
        {
            "name": "packed",
            "sources": [{"name": "rows", "uri": "rows.csv"}],
            "features": {"columns": list(_TRAINED_ON.features)},
            "grains": [[], ["region"], ["region", "group"]],
            "entity": ["region", "group"],
            "time": "time",
            "period": "1 day",
            "target": {"column": "y"},
            "splits": dict(SPLITS),
        },
        file="packed.yaml",
    )


def generated_pack(folder: Path, n_groups: int, store: PackStore | None = None) -> Path:
    """A pack of three grains, all of them blended, with a model of its own for every group: 100 rounds on 500 rows.

    Args:
        folder: of the pack.
        n_groups: groups of the finest grain.
        store: where its boosters are kept; None is the folder.
    """
    generation = Generation(
        build_model_spec(packed_spec(), {}), "run", constant=0.0, constant_without_offset=0.0
    )
    regions = sorted({region_of(number) for number in range(n_groups)})
    keys = [
        (0, ()),
        *((1, (region,)) for region in regions),
        *((2, (region_of(number), f"g{number:05d}")) for number in range(n_groups)),
    ]
    encoded = [encode_booster(text) for text in booster_texts(len(keys))]
    ledger = pd.DataFrame(
        {
            "grain": [grain for grain, _ in keys],
            "group_id": [group_id(values) for _, values in keys],
            "booster_id": [booster.booster_id for booster in encoded],
            "weight": 0.5,
            "intervals": '{"0.8": 1.0, "0.95": 2.0}',
        }
    )
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: map(vars, encoded), store=store)
    return folder


def region_of(number: int) -> str:
    """The region of a group."""
    return f"r{number // GROUPS_PER_REGION:04d}"


def booster_texts(n_models: int) -> list[str]:
    """Texts of so many different models."""
    trained = [_trained(number) for number in range(min(TRAINED, n_models))]
    texts = []
    for number in range(n_models):
        booster = trained[number % TRAINED]
        if number >= TRAINED:
            booster.set_leaf_output(0, 0, number * 1e-9)
        texts.append(booster.model_to_string())
    return texts


def _trained(number: int) -> lgb.Booster:
    rows = _TRAINED_ON.rows(number, number + 1)
    data = lgb.Dataset(
        rows[list(_TRAINED_ON.features)].to_numpy(np.float32),
        rows["y"].to_numpy(),
        params={"verbosity": -1},
    )
    return lgb.train(
        {"verbosity": -1, "num_threads": 1, "learning_rate": 0.05, "num_leaves": 15},
        data,
        num_boost_round=ROUNDS,
    )


def questions(numbers: np.ndarray[Any, Any]) -> pd.DataFrame:
    """One row per number of a group, features at random."""
    random = np.random.default_rng(1)
    features = pd.DataFrame(
        random.normal(size=(len(numbers), _TRAINED_ON.n_features)),
        columns=list(_TRAINED_ON.features),
    )
    return features.assign(
        region=[region_of(number) for number in numbers],
        group=[f"g{number:05d}" for number in numbers],
    )


def pack_of(runs: Runs, n_groups: int) -> Path:
    """A generated pack, made once per invocation."""
    return runs.once(
        f"pack-{n_groups}", lambda: generated_pack(runs.new_folder() / "pack", n_groups)
    )


def _child(*arguments: object) -> Any:
    command = [sys.executable, "-m", "benchmarks.serving", *map(str, arguments)]
    return json.loads(
        subprocess.run(
            command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def open_cold(runs: Runs) -> Mapping[str, float]:
    """Seconds to open a pack and answer one row, in a process that has imported what it needs and nothing else."""

    def opened(pack: Path, n_groups: int, options: Mapping[str, str]) -> float:
        return statistics.median(
            _child("open", pack, n_groups, json.dumps(options)) for _ in range(5)
        )

    seconds = {n_groups: opened(pack_of(runs, n_groups), n_groups, {}) for n_groups in SIZES}
    with object_store() as options:
        root = f"s3://{BUCKET}/packs"
        shared = generated_pack(
            runs.new_folder() / "pack", REMOTE_SIZE, PackStore(root, *filesystem_of(root, options))
        )
        remote = opened(shared, REMOTE_SIZE, options)
    named = {f"groups-{n_groups}": value for n_groups, value in seconds.items()}
    return named | {
        "ratio": seconds[SIZES[-1]] / seconds[SIZES[0]],
        f"remote-{REMOTE_SIZE}": remote,
    }


def _open(folder: str, n_groups: str, options: str) -> float:
    question = questions(np.array([int(n_groups) // 2]))
    started = time.perf_counter()
    FleetModel(folder, options=json.loads(options)).predict(question)
    return time.perf_counter() - started


def cache_memory(runs: Runs) -> Mapping[str, float]:
    """Peak resident memory of a process that has answered for each of 10,000 groups, twice."""
    return _child("memory", pack_of(runs, SIZES[-1]), SIZES[-1])


def _memory(folder: str, n_groups: str) -> Mapping[str, float]:
    model = FleetModel(folder, cache_bytes=CACHE_BYTES)
    for _ in range(2):
        for part in np.array_split(np.arange(int(n_groups)), 20):
            model.predict(questions(part))
    return {"": _peak_bytes() / 1e6, "cached-text": model.cached_bytes / 1e6}


def _peak_bytes() -> int:
    """Of this program: getrusage would count what its parent had when it started it."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def pack_bytes(runs: Runs) -> Mapping[str, float]:
    """Bytes of the whole pack over those of the native texts in it."""
    pack = pack_of(runs, TRAINED)
    native = pc.sum(pq.read_table(pack / "chains.parquet", columns=["n_bytes"])["n_bytes"]).as_py()
    stored = sum(path.stat().st_size for path in pack.iterdir())
    return {
        "": stored / native,
        "native-per-group": native / TRAINED,
        "stored-per-group": stored / TRAINED,
    }


def row_warm(runs: Runs) -> Mapping[str, float]:
    """Milliseconds for one row of three blended grains through the registered model, loaded and warm."""
    return _child("warm", pack_of(runs, SIZES[1]), SIZES[1], runs.new_folder())


def _warm(folder: str, n_groups: str, scratch: str) -> Mapping[str, float]:
    import mlflow

    uri, model_uri = registered(Path(folder), Path(scratch))
    mlflow.set_tracking_uri(uri)
    model, direct = mlflow.pyfunc.load_model(model_uri), FleetModel(folder)
    question = questions(np.array([int(n_groups) // 2]))
    return {
        "": _milliseconds(lambda: model.predict(question)),
        "without-mlflow": _milliseconds(lambda: direct.predict(question)),
    }


def _milliseconds(call: Callable[[], Any], n: int = 500) -> float:
    """Median of one call, after as many to warm up."""
    found = []
    for _ in range(2 * n):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return 1000 * statistics.median(found[n:])


def registered(pack: Path, scratch: Path) -> tuple[str, str]:
    """Tracking URI and model URI of a pack, registered as a fleet's is."""
    registry = MlflowRegistry(
        tracking_uri=f"sqlite:///{scratch}/mlflow.db",
        artifact_root=f"{scratch}/artifacts",
        scratch=str(scratch),
    )
    model = FleetModel(pack)
    dtypes = {
        name: "string" if name in model.model_spec.finest else "double" for name in model.required
    }
    version = registry.register(
        model.fleet,
        model.fleet_version,
        pack=pack,
        interface=interface_of(model, dtypes),
        record=RunRecord(),
    )
    return registry.tracking_uri, f"models:/{version.name}/{version.number}"


EMPTY_MODEL = """
import mlflow
import pandas as pd


class Nothing(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: pd.DataFrame, params=None):
        return [0.0] * len(model_input)


mlflow.models.set_model(Nothing())
"""


def rest_latency(runs: Runs) -> Mapping[str, float]:
    """One row over HTTP, warm, from `mlflow models serve`.

    Beside the same server with a model that does nothing.
    """
    import mlflow

    scratch = runs.new_folder()
    scratch.mkdir(parents=True, exist_ok=True)
    uri, ours = registered(pack_of(runs, SIZES[1]), scratch)
    (scratch / "nothing.py").write_text(EMPTY_MODEL)
    mlflow.set_tracking_uri(uri)
    mlflow.pyfunc.save_model(
        scratch / "nothing", python_model=str(scratch / "nothing.py"), pip_requirements=["mlflow"]
    )
    body = json.dumps(
        {"dataframe_split": questions(np.array([SIZES[1] // 2])).to_dict("split", index=False)}
    )
    found: dict[str, float] = {}
    for name, model_uri in (("", ours), ("floor-", str(scratch / "nothing"))):
        with served(uri, model_uri, scratch / f"{name}log.txt") as address:
            found |= {f"{name}{part}": value for part, value in _load(address, body).items()}
    return found


def _load(address: str, body: str, n: int = 400, connections: int = 8) -> Mapping[str, float]:
    """Median and 99th percentile of one connection in milliseconds, and requests per second of several."""
    warm = _requests(address, body, n)
    seconds = sorted(_requests(address, body, n))
    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        answered = sum(
            len(part)
            for part in pool.map(lambda _: _requests(address, body, n // 2), range(connections))
        )
    rate = answered / (time.perf_counter() - started)
    print(
        f"  {address}: {len(warm)} requests to warm up, {len(seconds)} one by one, {answered} over "
        f"{connections} connections",
        flush=True,
    )
    return {
        "median": 1000 * statistics.median(seconds),
        "p99": 1000 * seconds[int(0.99 * len(seconds))],
        "requests-per-second": rate,
    }


def _requests(address: str, body: str, n: int) -> list[float]:
    """Seconds of each request, over one connection that is kept."""
    connection = http.client.HTTPConnection(address, timeout=60)
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise NotMeasured(f"{address} answered {answer.status}: {content[:500]!r}")
        seconds.append(time.perf_counter() - started)
    connection.close()
    return seconds


@contextmanager
def served(uri: str, model_uri: str, log: Path) -> Iterator[str]:
    """`mlflow models serve` of a model, with one worker, while the block lasts."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model_uri,
        "--env-manager",
        "local",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-w",
        "1",
    ]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_REGISTRY_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # mlflow starts uvicorn by name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with log.open("w") as told:
        server = subprocess.Popen(
            command, env=environment, stdout=told, stderr=told, start_new_session=True
        )
        try:
            _wait_for(server, address, log)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)


def _wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        with (
            suppress(OSError),
            closing(http.client.HTTPConnection(address, timeout=5)) as connection,
        ):
            connection.request("GET", "/ping")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        time.sleep(0.1)
    raise NotMeasured(
        f"the server at {address} does not answer; its log ends: {log.read_text()[-2000:]}"
    )


if __name__ == "__main__":
    print(json.dumps({"open": _open, "memory": _memory, "warm": _warm}[sys.argv[1]](*sys.argv[2:])))
