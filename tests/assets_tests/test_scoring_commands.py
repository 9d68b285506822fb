"""`many-models score` and `many-models stream` on real Spark, Delta and MLflow: a version that was registered, and rows of every kind."""

import json
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from assets.command_line import main
from assets.scoring_commands import Scorer
from pipeline.errors import DataError, ModelNotFound, SpecError, StoreError
from pipeline.models.meta_model import FleetModel, InputError
from pipeline.reading.formats import FORMATS
from pipeline.testing.packs import ASKED, asked_pack, asked_rows, register_asked
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ANSWERS = ["prediction", "lower", "upper", "answered_by", "booster_id", "fleet_version"]
AWKWARD = "in [x] *&% ü"


@dataclass
class Fleet:
    """Two registered versions, the first of them champion, and what scores with them."""

    scorer: Scorer
    registry: MlflowRegistry
    versions: list[Any]
    models: dict[str, FleetModel]
    folder: Path
    said: list[str] = field(default_factory=list)

    def stream(
        self,
        source: Path | str,
        target: str = "live",
        *,
        stopping: threading.Event | None = None,
        **more: Any,
    ) -> pd.DataFrame:
        self.scorer.stream(
            ASKED,
            str(source),
            str(self.folder / target),
            stopping=stopping or threading.Event(),
            report=self.said.append,
            **more,
        )
        return self.table(target)

    def score(self, source: Path | str, target: str = "scored", **more: Any) -> pd.DataFrame:
        self.said.append(self.scorer.score(ASKED, str(source), str(self.folder / target), **more))
        return self.table(target)

    def table(self, name: str) -> pd.DataFrame:
        return DeltaTable(self.folder / name).to_pandas()

    def expected(self, rows: pd.DataFrame, number: int = 0) -> pd.DataFrame:
        """What the pack alone says, by row_id."""
        return (
            self.models[self.versions[number].fleet_version]
            .predict(rows)
            .set_axis(rows["row_id"].to_numpy())
        )

    @property
    def batches(self) -> list[str]:
        return [line for line in self.said if line.startswith("batch ")]


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[MlflowRegistry, list[Any], dict[str, FleetModel]]:
    root = tmp_path_factory.mktemp("registered")
    registry = MlflowRegistry(
        tracking_uri=f"sqlite:///{root}/mlflow/mlflow.db",
        artifact_root=f"{root}/artifacts",
        scratch=f"{root}/scratch",
    )
    packs = {
        name: asked_pack(root / name / "pack", name, seed)
        for seed, name in enumerate(("run-1", "run-2"))
    }
    versions = [
        register_asked(registry, pack, name, champion=False) for name, pack in packs.items()
    ]
    return registry, versions, {name: FleetModel(pack) for name, pack in packs.items()}


@pytest.fixture
def fleet(registered: Any, spark_resource: SparkSessionResource, tmp_path: Path) -> Fleet:
    registry, versions, models = registered
    registry.promote(versions[0])
    folder = tmp_path / "a folder"
    folder.mkdir()
    return Fleet(
        Scorer(
            DeltaTables(root=str(tmp_path / "tables")),
            registry,
            spark_resource,
            tmp_path / "streams",
        ),
        registry,
        versions,
        models,
        folder,
    )


def same_answers(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Bit for bit, row by row."""
    assert sorted(found["row_id"]) == sorted(expected.index)
    ordered = found.set_index("row_id").loc[expected.index]
    for name in ("prediction", "lower", "upper"):
        assert (
            ordered[name].to_numpy(float).tobytes() == expected[name].to_numpy(float).tobytes()
        ), name
    for name in ("answered_by", "booster_id", "fleet_version"):
        assert (
            ordered[name].where(ordered[name].notna(), None).tolist() == expected[name].tolist()
        ), name


def put(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write a file as is right for a stream: under a hidden name, then renamed."""
    folder.mkdir(exist_ok=True)
    hidden = folder / f".{name}"
    endings = [ending.lower() for ending in hidden.suffixes]
    compression = {".gz": "gzip", ".zip": {"method": "zip", "archive_name": "rows"}}.get(
        endings[-1]
    )
    if ".csv" in endings or ".tsv" in endings:
        separator = "\t" if ".tsv" in endings else ","
        rows.to_csv(hidden, index=False, sep=separator, compression=compression)
    elif ".parquet" in endings or ".pq" in endings:
        rows.to_parquet(hidden, index=False)
    else:
        rows.to_json(
            hidden, orient="records", lines=True, double_precision=15, compression=compression
        )
    hidden.rename(folder / name)


# Batch


def test_a_delta_table_is_answered_with_its_columns_kept(fleet: Fleet) -> None:
    rows = asked_rows(3000).assign(
        big=1 << 60, when=pd.Timestamp("2024-01-01", tz="UTC"), numbers=[[1, 2]] * 3000
    )
    rows.loc[0, "big"] = None
    rows["big"] = rows["big"].astype("Int64")
    write_deltalake(fleet.folder / "rows", rows.iloc[:1000])
    write_deltalake(fleet.folder / "rows", rows.iloc[1000:], mode="append")
    found = fleet.score(fleet.folder / "rows")
    assert list(found.columns) == [*rows.columns, *ANSWERS, "scored_at", "scored_period"]
    same_answers(found, fleet.expected(rows))
    kept = found.set_index("row_id").sort_index()
    assert kept["big"].isna().sum() == 1
    table = DeltaTable(fleet.folder / "scored").to_pyarrow_table()
    assert set(table["big"].to_pylist()) == {None, 1 << 60}
    assert kept["note"].tolist() == rows["note"].tolist()
    assert set(found["scored_period"]) == {"all"}
    assert fleet.said[0].startswith(
        f"3,000 rows of {fleet.folder}/rows (version 1) answered by asked version 1 "
        "(champion) (run run-1) in "
    )


def test_csv_files_with_shuffled_columns_and_parquet_of_other_widths_give_the_same_answers(
    fleet: Fleet,
) -> None:
    rows = asked_rows(900)
    folder = fleet.folder / AWKWARD
    for number, part in enumerate(np.array_split(np.arange(900), 3)):
        put(
            folder,
            f"{number}.csv",
            rows.iloc[part][list(np.random.default_rng(number).permutation(rows.columns))],
        )
    found = fleet.score(folder, "from csv")
    same_answers(found.astype({"row_id": "int64"}), fleet.expected(rows))
    narrow = fleet.folder / "narrow"
    put(
        narrow,
        "a.parquet",
        rows.iloc[:450].astype({"size": "Int8", "store": "Int16", "kind": "category"})[
            rows.columns[::-1]
        ],
    )
    put(narrow, "b.parquet", rows.iloc[450:].astype({"size": "float32", "store": "Int32"}))
    same_answers(fleet.score(f"{narrow}/*.parquet", "from parquet"), fleet.expected(rows))


def test_scoring_again_replaces_its_period_and_leaves_the_others(fleet: Fleet) -> None:
    rows = asked_rows(100)
    put(fleet.folder / "in", "a.parquet", rows)
    for period, version in (
        ("one", "champion"),
        ("two", "champion"),
        ("one", "champion"),
        ("two", "2"),
    ):
        found = fleet.score(fleet.folder / "in", period=period, version=version)
    assert found["scored_period"].value_counts().to_dict() == {"one": 100, "two": 100}
    same_answers(found[found["scored_period"] == "one"], fleet.expected(rows))
    same_answers(found[found["scored_period"] == "two"], fleet.expected(rows, 1))
    assert DeltaTable(fleet.folder / "scored").version() == 4  # made, then one commit each


def test_an_empty_source_empties_its_period(fleet: Fleet) -> None:
    rows = asked_rows(5)
    write_deltalake(fleet.folder / "rows", rows)
    fleet.score(fleet.folder / "rows")
    DeltaTable(fleet.folder / "rows").delete()
    assert fleet.score(fleet.folder / "rows").empty


class NoSpark(SparkSessionResource):
    """Whoever asks for Spark has begun to work."""

    @property
    def session(self) -> Any:
        raise AssertionError("Spark was asked for")

    def yield_for_execution(self, context: Any) -> Any:
        raise AssertionError("Spark was started")


@pytest.fixture
def idle(fleet: Fleet) -> Fleet:
    """The fleet without Spark."""
    fleet.scorer = Scorer(
        fleet.scorer.tables,
        fleet.registry,
        NoSpark(master="local", scratch=""),
        fleet.scorer.streams,
    )
    return fleet


def test_missing_columns_are_listed_before_spark_starts(idle: Fleet) -> None:
    put(idle.folder / "in", "a.csv", asked_rows(3).drop(columns=["price", "base"]))
    for way in (idle.score, idle.stream):
        with pytest.raises(
            InputError,
            match=(
                r"missing columns: price, base; it has: row_id, .*fleet 'asked' needs: "
                r"region, store, price"
            ),
        ):
            way(idle.folder / "in", "out")
    assert not (idle.folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.assign(Prediction=1.0),
            "has columns that the answers bring: Prediction",
        ),
        (lambda rows: rows.assign(scored_at="x"), "scored_at"),
        (lambda rows: rows.assign(price="1.5"), r"not numbers: price \((large_)?string\)"),
    ],
)
def test_columns_that_clash_or_are_text_are_told_before_spark_starts(
    idle: Fleet, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    put(idle.folder / "in", "a.parquet", change(asked_rows(3)))
    for way in (idle.score, idle.stream):
        with pytest.raises(DataError, match=message):
            way(idle.folder / "in", "out")


def test_tables_that_are_not_for_answers_stay_as_they_are(idle: Fleet) -> None:
    rows = asked_rows(3)
    put(idle.folder / "in", "a.parquet", rows)
    write_deltalake(idle.folder / "other", rows)
    with pytest.raises(DataError, match="partitioned by nothing, expected scored_period"):
        idle.score(idle.folder / "in", "other")
    with pytest.raises(DataError, match="no column answered_by"):
        idle.stream(idle.folder / "in", "other")
    for target in ("in", "in/below", "."):
        with pytest.raises(DataError, match="overlap"):
            idle.score(idle.folder / "in", target)
    assert DeltaTable(idle.folder / "other").version() == 0


def test_versions_and_sources_that_do_not_exist_are_named(idle: Fleet) -> None:
    put(idle.folder / "in", "a.parquet", asked_rows(3))
    with pytest.raises(ModelNotFound, match="registered model 'asked' has no version 77"):
        idle.score(idle.folder / "in", version="77")
    with pytest.raises(DataError, match=r"no rows are at .*/gone"):
        idle.score(idle.folder / "gone")
    with pytest.raises(
        DataError, match=r"a\.parquet is one file, which `many-models score` answers"
    ):
        idle.stream(idle.folder / "in" / "a.parquet")


def test_tables_in_an_object_store_are_answered_in_batch_and_as_a_stream(
    fleet: Fleet, object_store: dict[str, str]
) -> None:
    address, rows = f"s3://fleets/{fleet.folder.parent.name}", asked_rows(60)
    fleet.scorer = Scorer(
        DeltaTables(root=address, storage_options=object_store),
        fleet.registry,
        fleet.scorer.spark,
        fleet.scorer.streams,
    )
    write_deltalake(
        f"{address}/rows", rows.iloc[:40], storage_options=object_store, partition_by=["region"]
    )
    said, stopping = fleet.said.append, threading.Event()
    fleet.scorer.stream(ASKED, f"{address}/rows", f"{address}/live", stopping=stopping, report=said)
    write_deltalake(f"{address}/rows", rows.iloc[40:], mode="append", storage_options=object_store)
    fleet.scorer.stream(ASKED, f"{address}/rows", f"{address}/live", stopping=stopping, report=said)
    fleet.scorer.score(ASKED, f"{address}/rows", f"{address}/scored")
    for target in ("live", "scored"):
        same_answers(
            DeltaTable(f"{address}/{target}", storage_options=object_store).to_pandas(),
            fleet.expected(rows),
        )
    with pytest.raises(
        DataError,
        match=r"no Delta table is at s3://.*; files are read from local or mounted folders only",
    ):
        fleet.scorer.score(ASKED, f"{address}/gone", f"{address}/scored")


# Streams


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_files_of_a_folder_are_answered_once_each(fleet: Fleet, ending: str) -> None:
    rows, folder = asked_rows(600), fleet.folder / AWKWARD
    put(folder, f"a.{ending}", rows.iloc[:200])
    found = fleet.stream(folder)
    assert len(found) == 200
    assert list(found.columns)[-7:] == [*ANSWERS, "scored_at"]
    # The order of columns is each file's own, and other files are none of ours.
    put(folder, f"b.{ending}", rows.iloc[200:500][rows.columns[::-1]])
    put(folder, f"c.{ending}", rows.iloc[500:])
    (folder / "notes.txt").write_text("not rows")
    fleet.stream(folder, max_files=1)
    found = fleet.stream(folder)
    same_answers(found.astype({"row_id": "int64"}), fleet.expected(rows))
    assert len(fleet.batches) == 3
    assert fleet.batches[0].startswith("batch 0: 200 rows in ")
    assert fleet.batches[0].endswith("answered by version 1 (run run-1)")


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_files_of_every_ending_are_answered_in_batch_and_as_a_stream(
    fleet: Fleet, kind: str
) -> None:
    endings = [ending for ending, file_format in FORMATS.items() if file_format.kind == kind]
    rows, folder = asked_rows(20 * (len(endings) + 1)), fleet.folder / AWKWARD
    for number, ending in enumerate([endings[0], *endings]):
        if number == 1:  # the first file pins the stream's columns, the others come later
            fleet.stream(folder)
        name = f"{number}{ending.upper() if number % 2 else ending}"
        put(folder, name, rows.iloc[20 * number : 20 * (number + 1)])
    same_answers(fleet.stream(folder).astype({"row_id": "int64"}), fleet.expected(rows))
    same_answers(fleet.score(folder).astype({"row_id": "int64"}), fleet.expected(rows))


def test_an_archive_that_is_damaged_or_holds_several_files_is_set_aside(fleet: Fleet) -> None:
    rows, folder = asked_rows(30), fleet.folder / "in"
    for number, name in enumerate(("a.tsv.gz", "b.tsv.zip", "c.tsv.zip")):
        put(folder, name, rows.iloc[10 * number : 10 * (number + 1)])
    whole = (folder / "b.tsv.zip").read_bytes()
    (folder / "b.tsv.zip").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "c.tsv.zip", "a") as archive:
        archive.writestr("more", "x")
    assert len(fleet.stream(folder)) == 10
    set_aside = "\n".join(fleet.said)
    assert f"{folder}/b.tsv.zip cannot be read as csv" in set_aside
    assert f"{folder}/c.tsv.zip cannot be read as csv (the archive holds 2 files" in set_aside
    (folder / "b.tsv.zip").write_bytes(whole)
    found = fleet.stream(folder).astype({"row_id": "int64"})
    same_answers(found, fleet.expected(rows.iloc[:20]))


def test_a_folder_may_be_emptied_between_starts_but_not_be_gone(fleet: Fleet) -> None:
    put(fleet.folder / "in", "a.parquet", asked_rows(10))
    fleet.stream(fleet.folder / "in")
    (fleet.folder / "in" / "a.parquet").unlink()
    assert len(fleet.stream(fleet.folder / "in")) == 10
    (fleet.folder / "in").rmdir()
    with pytest.raises(DataError, match=r"in is gone: there is no folder"):
        fleet.stream(fleet.folder / "in")


def test_an_old_file_that_comes_late_is_answered(fleet: Fleet) -> None:
    import os

    rows = asked_rows(20)
    put(fleet.folder / "in", "a.parquet", rows.iloc[:10])
    fleet.stream(fleet.folder / "in")
    put(fleet.folder / "in", "b.PARQUET.parquet", rows.iloc[10:])
    os.utime(fleet.folder / "in" / "b.PARQUET.parquet", (0, 0))
    (fleet.folder / "in" / "b.PARQUET.parquet").rename(fleet.folder / "in" / "b.PARQUET")
    same_answers(fleet.stream(fleet.folder / "in"), fleet.expected(rows))


def test_versions_of_a_delta_table_are_answered_once_each(fleet: Fleet) -> None:
    rows, source = asked_rows(400), fleet.folder / "rows of a table"
    write_deltalake(source, rows.iloc[:100], partition_by=["region"])
    write_deltalake(source, rows.iloc[100:150], mode="append")
    assert len(fleet.stream(source)) == 150
    write_deltalake(source, rows.iloc[150:300], mode="append")
    DeltaTable(source).optimize.compact()
    DeltaTable(source).create_checkpoint()
    write_deltalake(source, rows.iloc[300:], mode="append")
    found = fleet.stream(source, max_files=1)
    same_answers(found, fleet.expected(rows))
    assert [line.split(" rows")[0] for line in fleet.batches] == [
        "batch 0: 150",
        "batch 1: 150",
        "batch 2: 100",
    ]
    assert fleet.stream(source).equals(found)
    assert DeltaTable(fleet.folder / "live").version() == 3  # made, then one commit per micro batch


def test_a_version_that_removes_rows_ends_the_stream_or_is_passed_over(fleet: Fleet) -> None:
    rows, source = asked_rows(60), fleet.folder / "rows"
    write_deltalake(source, rows.iloc[:20])
    fleet.stream(source)
    DeltaTable(source).delete("row_id = 3")
    write_deltalake(source, rows.iloc[20:40], mode="append")
    with pytest.raises(
        DataError, match=r"rows: version 1 \(DELETE\) removes or rewrites rows .* --skip-changes"
    ):
        fleet.stream(source)
    same_answers(fleet.stream(source, skip_changes=True), fleet.expected(rows.iloc[:40]))


def test_the_champion_may_change_between_micro_batches(fleet: Fleet) -> None:
    rows, folder = asked_rows(100), fleet.folder / "in"
    put(folder, "a.parquet", rows.iloc[:50])
    fleet.stream(folder)
    fleet.registry.promote(fleet.versions[1])
    put(folder, "b.parquet", rows.iloc[50:])
    found = fleet.stream(folder)
    same_answers(found[found["row_id"] < 50], fleet.expected(rows.iloc[:50]))
    same_answers(found[found["row_id"] >= 50], fleet.expected(rows.iloc[50:], 1))


def test_a_running_stream_takes_new_rows_and_the_new_champion_until_it_is_stopped(
    fleet: Fleet,
) -> None:
    rows, folder, stopping = asked_rows(100), fleet.folder / "in", threading.Event()
    put(folder, "a.parquet", rows.iloc[:50])

    def after(line: str) -> None:
        fleet.said.append(line)
        if line.startswith("batch 0"):
            fleet.registry.promote(fleet.versions[1])
            put(folder, "b.parquet", rows.iloc[50:])
        if line.startswith("batch 1"):
            stopping.set()

    fleet.scorer.stream(
        ASKED, str(folder), str(fleet.folder / "live"), every=0.2, stopping=stopping, report=after
    )
    found = fleet.table("live")
    same_answers(found[found["row_id"] >= 50], fleet.expected(rows.iloc[50:], 1))
    assert len(found) == 100
    assert fleet.said[-1] == "stopped; the same command goes on"


def test_two_streams_into_one_table_are_told_apart(fleet: Fleet) -> None:
    rows = asked_rows(40)
    for name, part in (("a", rows.iloc[:20]), ("b", rows.iloc[20:])):
        put(fleet.folder / name, "x.parquet", part)
        found = fleet.stream(fleet.folder / name)
    same_answers(found, fleet.expected(rows))


def test_a_checkpoint_belongs_to_one_stream_and_its_table(fleet: Fleet) -> None:
    import shutil

    checkpoint = str(fleet.folder / "check [x] point")
    for name in ("a", "b"):
        put(fleet.folder / name, "x.parquet", asked_rows(20))
    fleet.stream(fleet.folder / "a", checkpoint=checkpoint)
    with pytest.raises(
        SpecError,
        match=r"checkpoint of another stream: --from was .*/a and is .*/b; give each stream",
    ):
        fleet.stream(fleet.folder / "b", checkpoint=checkpoint)
    shutil.rmtree(fleet.folder / "live")
    with pytest.raises(
        StoreError, match=r"the checkpoint .* says 0: the table was removed or restored"
    ):
        fleet.stream(fleet.folder / "a", checkpoint=checkpoint)
    assert len(fleet.stream(fleet.folder / "a", checkpoint=f"{checkpoint} 2")) == 20
    (Path(checkpoint) / "stream.json").write_text("{")
    with pytest.raises(StoreError, match="not what a stream pinned"):
        fleet.stream(fleet.folder / "a", checkpoint=checkpoint)


def test_a_file_that_breaks_a_stream_is_named_and_once_repaired_the_stream_goes_on(
    fleet: Fleet,
) -> None:
    rows, folder = asked_rows(30), fleet.folder / "in"
    put(folder, "a.csv", rows.iloc[:10])
    fleet.stream(folder)
    put(folder, "b.csv", rows.iloc[10:20].drop(columns="price"))
    with pytest.raises(DataError, match=r"b\.csv: missing columns: price; it has: row_id"):
        fleet.stream(folder)
    put(folder, "b.csv", rows.iloc[10:20])
    put(folder, "c.csv", rows.iloc[20:])
    same_answers(fleet.stream(folder).astype({"row_id": "int64"}), fleet.expected(rows))


def test_a_half_written_file_is_set_aside_and_answered_once_it_is_complete(fleet: Fleet) -> None:
    rows, folder = asked_rows(40), fleet.folder / "in"
    put(folder, "a.parquet", rows.iloc[:10])
    put(folder, "b.parquet", rows.iloc[10:20])
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    lines = fleet.said
    assert len(fleet.stream(folder)) == 10
    told = "\n".join(lines)
    assert (
        f"set aside, and answered once it is complete: {folder}/b.parquet cannot be read as parquet"
        in told
    )
    assert f"all other rows have been answered; 1 file set aside: {folder}/b.parquet" in lines[-1]

    put(folder, "c.parquet", rows.iloc[20:30])  # the others go on, and nothing is told twice
    lines.clear()
    assert len(fleet.stream(folder)) == 20
    assert [line for line in lines if "cannot be read as" in line] == []

    (folder / "b.parquet").write_bytes(whole[:-10])  # still being written
    lines.clear()
    fleet.stream(folder)
    assert any(line.startswith(f"still set aside: {folder}/b.parquet") for line in lines)

    (folder / "b.parquet").write_bytes(whole)
    lines.clear()
    same_answers(fleet.stream(folder), fleet.expected(rows.iloc[:30]))
    assert lines[-1] == "all available rows have been answered"
    put(folder, "d.parquet", rows.iloc[30:])
    same_answers(fleet.stream(folder), fleet.expected(rows))


def test_a_value_in_the_middle_of_a_file_that_cannot_be_read_sets_the_whole_file_aside(
    fleet: Fleet,
) -> None:
    rows, folder = asked_rows(30), fleet.folder / "in"
    put(folder, "a.csv", rows.iloc[:10])
    put(
        folder,
        "b.csv",
        rows.iloc[10:].astype({"price": object}).assign(price=[*[1.5] * 19, "dear"]),
    )
    lines = fleet.said
    assert len(fleet.stream(folder)) == 10
    assert any("b.csv cannot be read as csv" in line and "dear" in line for line in lines)


def test_a_pack_is_opened_once_per_worker_and_given_up_for_the_next(
    fleet: Fleet, spark_resource: SparkSessionResource
) -> None:
    from pipeline.spark.answers import opened_pack, packs_of_worker

    spark = spark_resource.session
    models = [fleet.registry.open_pack(version) for version in fleet.versions]

    def held(model: FleetModel) -> set[tuple[int, int, int]]:
        """Per task the worker, the pack it has in memory, and how many packs."""
        import os

        name = model.folder.name

        def look(batches: Any) -> Any:
            for batch in batches:
                opened = opened_pack("looked at", name, {})
                from pipeline.spark import answers

                n = sum(fleet == "looked at" for fleet in answers.packs_of_worker)
                yield pa.RecordBatch.from_pylist(
                    [{"pid": os.getpid(), "pack": id(opened), "n": n}] * min(1, batch.num_rows)
                )

        found = spark.range(0, 8, 1, 8).mapInArrow(look, "pid long, pack long, n long").collect()
        return {(row["pid"], row["pack"], row["n"]) for row in found}

    for model in models:
        spark.sparkContext.addFile(str(model.folder), recursive=True)
    first = held(models[0]) | held(models[0])
    workers = {pid for pid, _, _ in first}
    assert len(first) == len(
        workers
    )  # eight tasks, twice, in fewer workers: each of them opened it once
    assert len(workers) < 8
    second = held(models[1])
    assert {n for _, _, n in first | second} == {1}
    assert "looked at" not in packs_of_worker


# The terminal


def test_the_command_answers_and_says_what_is_wrong(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANY_MODELS_DATA", str(fleet.folder / "data"))
    monkeypatch.setattr(Scorer, "of", classmethod(lambda cls, profile: fleet.scorer))
    put(fleet.folder / "in", "a.csv", asked_rows(12))
    words = [ASKED, "--from", str(fleet.folder / "in"), "--to"]
    assert (
        main(["score", *words, str(fleet.folder / "scored"), "--period", "p", "--version", "2"])
        == 0
    )
    assert "12 rows of" in capsys.readouterr().out
    assert main(["stream", *words, str(fleet.folder / "live")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1].split(" in ")[0] for line in told[1:]] == [
        "batch 0: 12 rows",
        "all available rows have been answered",
    ]
    assert main(["stream", "nobody", *words[1:], str(fleet.folder / "live")]) == 2
    assert "registered model 'nobody' has no champion" in capsys.readouterr().err
    put(fleet.folder / "bad", "a.csv", asked_rows(3)[["store"]])
    assert (
        main(["score", ASKED, "--from", str(fleet.folder / "bad"), "--to", str(fleet.folder / "x")])
        == 1
    )
    assert "missing columns: region, price" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stream", "f", "--from", "a", "--to", "b", "--every", "0"],
            "'0' is not a number of seconds; expected more than 0",
        ),
        (
            ["stream", "f", "--from", "a", "--to", "b", "--max-files", "0"],
            "'0' is not a number of files; expected 1 or more",
        ),
        (
            ["score", "f", "--from", "a", "--to", "b", "--version", "best"],
            "'best' is not a version; expected champion, challenger or a number",
        ),
        (["score", "f", "--from", "a"], "--to"),
    ],
)
def test_words_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_a_stream_pins_its_columns(fleet: Fleet) -> None:
    put(fleet.folder / "in", "a.csv", asked_rows(3))
    fleet.stream(fleet.folder / "in", checkpoint=str(fleet.folder / "cp"))
    pinned = json.loads((fleet.folder / "cp" / "stream.json").read_text())
    assert [
        column["type"]
        for column in pinned["columns"]["fields"]
        if column["name"] in ("price", "store")
    ] == ["string", "double"]
    assert (pinned["fleet"], pinned["kind"], pinned["whole"], pinned["numbers"]) == (
        ASKED,
        "csv",
        ["store"],
        ["base", "price", "size"],
    )
