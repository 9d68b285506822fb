"""One version asked in every way there is, with the same rows: the same answers to the last bit. And streams killed and taken up again."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from deltalake import DeltaTable, write_deltalake

from assets.scoring_commands import Scorer
from benchmarks import stream_kills
from benchmarks.serving import served
from pipeline.crash_points import STREAM_POINTS
from pipeline.models.meta_model import FleetModel
from pipeline.testing.packs import ASKED, INPUTS, asked_pack, asked_rows, register_asked
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]

NUMBERS = ["prediction", "lower", "upper"]
TEXTS = ["answered_by", "booster_id", "fleet_version"]
RESULT = (
    "prediction double, lower double, upper double, answered_by string, booster_id string, "
    "fleet_version string"
)


@dataclass(frozen=True)
class Registered:
    """A champion in a data root as `many-models` looks for it."""

    root: Path
    registry: MlflowRegistry
    version: Any
    model: FleetModel


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Registered:
    root = tmp_path_factory.mktemp("data")
    mlflow = root / "mlflow"
    registry = MlflowRegistry(
        tracking_uri=f"sqlite:///{mlflow}/mlflow.db",
        artifact_root=f"{mlflow}/artifacts",
        scratch=str(root / "scratch"),
    )
    pack = asked_pack(root / "made" / "pack", "run-1")
    return Registered(root, registry, register_asked(registry, pack, "run-1"), FleetModel(pack))


def same_bits(found: pd.DataFrame, expected: pd.DataFrame, way: str) -> None:
    """Both indexed by row_id."""
    assert sorted(found.index) == sorted(expected.index), way
    ordered = found.loc[expected.index]
    for name in NUMBERS:
        assert (
            ordered[name].to_numpy(float).tobytes() == expected[name].to_numpy(float).tobytes()
        ), f"{way}: {name}"
    for name in TEXTS:
        assert (
            ordered[name].astype(object).where(ordered[name].notna(), None).tolist()
            == expected[name].tolist()
        ), f"{way}: {name}"


def test_every_way_to_ask_gives_the_same_bits(
    registered: Registered,
    spark_resource: SparkSessionResource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    rows = asked_rows(500, seed=3)
    # Halfway between two single precision floats, and one double step to either side: rounding must be the same everywhere.
    half = float(np.float32(0.3)) + float(np.spacing(np.float32(0.3))) / 2
    rows.loc[:2, "price"] = [half, np.nextafter(half, 0), np.nextafter(half, 1)]
    expected = registered.model.predict(rows).set_axis(rows["row_id"].to_numpy())
    assert expected["answered_by"].nunique() == 4
    assert expected["prediction"].notna().all()

    mlflow.set_tracking_uri(registered.registry.tracking_uri)
    uri = f"models:/{ASKED}@champion"
    asked = rows[list(INPUTS)].astype({"store": "float64", "size": "float64"})
    by_pyfunc = mlflow.pyfunc.load_model(uri).predict(asked)
    same_bits(by_pyfunc.set_axis(rows["row_id"].to_numpy()), expected, "pyfunc")

    scorer = Scorer(
        DeltaTables(root=str(tmp_path)), registered.registry, spark_resource, tmp_path / "streams"
    )
    write_deltalake(tmp_path / "rows", rows)
    (tmp_path / "in").mkdir()
    rows.to_csv(tmp_path / "in" / "a.csv", index=False)
    for way, source in (("delta", tmp_path / "rows"), ("csv", tmp_path / "in")):
        scorer.score(ASKED, str(source), str(tmp_path / f"batch {way}"))
        scorer.stream(
            ASKED,
            str(source),
            str(tmp_path / f"stream {way}"),
            stopping=threading.Event(),
            report=lambda _: None,
        )
        for target in (f"batch {way}", f"stream {way}"):
            found = DeltaTable(tmp_path / target).to_pandas().astype({"row_id": "int64"})
            same_bits(found.set_index("row_id"), expected, target)

    spark = spark_resource.session
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.registry.tracking_uri)
    answer = mlflow.pyfunc.spark_udf(spark, uri, result_type=RESULT, env_manager="local")
    table = spark.createDataFrame(asked.assign(row_id=rows["row_id"]).replace({np.nan: None}), "region string, store double, price double, size double, kind string, base double, row_id long")  # fmt: skip
    table.createOrReplaceTempView("asked_rows")
    spark.udf.register("answer", answer)
    columns = ", ".join(INPUTS)
    by_sql = spark.sql(
        f"SELECT row_id, a.* FROM (SELECT row_id, answer(struct({columns})) AS a FROM asked_rows)"
    ).toPandas()
    # MLflow's function makes text of a null.
    same_bits(by_sql.set_index("row_id").replace({"booster_id": {"None": None}}), expected, "SQL")

    body = frame_json(asked)
    with (
        served(registered.registry.tracking_uri, uri, tmp_path / "log") as address,
        closing(http.client.HTTPConnection(address, timeout=60)) as connection,
    ):
        status, content = ask(connection, body)
        one = asked.iloc[[0]].astype(object)
        bad = [
            ask(connection, frame_json(one.assign(price=[value]))) for value in ("twelve", [1.0])
        ]
        huge = ask(
            connection, frame_json(one.assign(base=[1.79e308], price=[0.5])).replace("0.5", "1e999")
        )
    assert status == http.HTTPStatus.OK, content
    for (code, told), value in zip(bad, ("'twelve'", "[1.0]"), strict=True):
        assert code == http.HTTPStatus.BAD_REQUEST
        message = (
            f"price: {value} is not a number (row 1 of 1); expected a number, "
            "text such as '12.5', or null"
        )
        # The sentence alone: neither the batch nor a stack trace.
        assert json.loads(told)["message"] == message
        assert b"Traceback" not in told
    assert huge[0] == http.HTTPStatus.OK
    (answer_to_huge,) = json.loads(huge[1], parse_constant=pytest.fail)["predictions"]
    assert answer_to_huge["upper"] is None
    by_rest = pd.DataFrame(
        json.loads(content)["predictions"], columns=list(expected.columns)
    ).set_axis(rows["row_id"].to_numpy())
    same_bits(by_rest, expected, "REST")


def ask(connection: http.client.HTTPConnection, body: str) -> tuple[int, bytes]:
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answered = connection.getresponse()
    return answered.status, answered.read()


def frame_json(rows: pd.DataFrame) -> str:
    return json.dumps({"dataframe_split": {"columns": list(rows.columns), "data": _exact(rows)}})


def _exact(rows: pd.DataFrame) -> list[list[Any]]:
    """Rows as JSON takes them: Python writes a float by the shortest text that reads back as it."""
    return [
        [value if isinstance(value, list) or pd.notna(value) else None for value in row]
        for row in rows.astype(object).to_numpy().tolist()
    ]


# Streams that are killed


def stream(root: Path, source: Path, *more: str, crash_at: str = "") -> "subprocess.Popen[str]":
    """`many-models stream` as a process of its own."""
    environment = {
        **os.environ,
        "MANY_MODELS_DATA": str(root),
        "FLEET_CRASH_AT": crash_at,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [
        sys.executable,
        "-m",
        "assets.command_line",
        "stream",
        ASKED,
        "--from",
        str(source),
        "--to",
        f"{source} answers",
        *more,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def put(source: Path, kind: str, rows: pd.DataFrame) -> None:
    if kind == "delta":
        write_deltalake(source, rows, mode="append")
        return
    source.mkdir(exist_ok=True)
    rows.to_csv(source / f"{rows['row_id'].iloc[0]}.csv", index=False)


@pytest.mark.parametrize(
    ("kind", "point"),
    [*(("delta", point) for point in STREAM_POINTS), ("folder", "stream_committed")],
)
def test_a_stream_killed_at_a_named_point_answers_every_row_once(
    registered: Registered, tmp_path: Path, kind: str, point: str
) -> None:
    source, rows = tmp_path / "rows", asked_rows(300)
    for start in (0, 100, 200):
        put(source, kind, rows.iloc[start : start + 100])
    turn = 1 if kind == "delta" else 2
    killed = stream(registered.root, source, "--max-files", "1", crash_at=f"{point}#{turn}:KILL")
    told = killed.communicate(timeout=180)
    assert killed.returncode == -signal.SIGKILL, told
    answered = DeltaTable(f"{source} answers").count()
    assert answered == {"stream_committed": 300 if kind == "delta" else 200}.get(point, 0)
    again = stream(registered.root, source)
    out, err = again.communicate(timeout=180)
    assert again.returncode == 0, err
    assert ("was committed before the restart, passed over" in out) == (point == "stream_committed")
    found = (
        DeltaTable(f"{source} answers").to_pandas().astype({"row_id": "int64"}).set_index("row_id")
    )
    same_bits(found, registered.model.predict(rows).set_axis(rows["row_id"].to_numpy()), point)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_running_stream_ends_cleanly_when_it_is_told_to(
    registered: Registered, tmp_path: Path, number: signal.Signals
) -> None:
    source = tmp_path / "rows"
    put(source, "delta", asked_rows(50))
    running = stream(registered.root, source, "--every", "0.5")
    assert running.stdout is not None
    line = next(line for line in running.stdout if "batch" in line)
    assert "50 rows in" in line
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert out.endswith("stopped; the same command goes on\n")


def test_rows_survive_random_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stream_kills, "RUNNING", {"add": 30, "champion": 10, "kill": 45, "check": 15}
    )
    found = stream_kills.stream_kills(tmp_path / "torment", n=20, seed=1)
    assert (found["lost"], found["doubled"], found["wrong"]) == (0, 0, 0)
    assert found["kills"] >= 1
    assert found["rows"] > 100
