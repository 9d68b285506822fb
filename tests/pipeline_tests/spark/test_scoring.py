"""Batch scoring: rows are gathered, and nothing else about them changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf

from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import FleetModel, Generation, InputError, group_id
from pipeline.models.pack import PackedRun, build_model_spec, write_pack
from pipeline.scoring.row_source import check_columns
from pipeline.spark.answers import asked_rows, gather_batches
from pipeline.spark.scoring import score_rows
from pipeline.spec import parse_spec

pytestmark = pytest.mark.spark

BIG = 2**60 + 1
AS_OF = pd.Timestamp("2024-01-01")
SPEC = parse_spec(
    {
        "name": "numbered",
        "sources": [{"name": "rows", "uri": "rows.csv"}],
        "features": {"columns": ["x"], "categoricals": ["kind"]},
        "grains": [[], ["store"]],
        "entity": ["store"],
        "time": "time",
        "period": "1 day",
        "target": {"column": "y"},
        "splits": {"report": "1 day", "tune": "1 day"},
    },
    file="numbered/defs.yaml",
)


def batches(*sizes: int) -> list[pa.RecordBatch]:
    starts = np.cumsum([0, *sizes])
    return [
        pa.RecordBatch.from_pydict({"n": np.arange(start, start + size)})
        for start, size in zip(starts, sizes, strict=False)
    ]


@pytest.mark.parametrize(
    ("sizes", "limits", "expected"),
    [
        ([4, 4, 4], {"n_rows": 5}, [8, 4]),
        ([4, 4, 4], {"n_rows": 4}, [4, 4, 4]),
        ([4, 4, 4], {"n_rows": 100}, [12]),
        ([4, 4, 4], {"n_rows": 100, "n_bytes": 33}, [8, 4]),
        ([9], {"n_rows": 2}, [9]),
        ([], {"n_rows": 2}, []),
    ],
)
def test_batches_are_put_together_in_order_and_none_is_divided(
    sizes: list[int], limits: dict[str, int], expected: list[int]
) -> None:
    found = list(gather_batches(iter(batches(*sizes)), **limits))
    assert [part.num_rows for part in found] == expected
    assert [number for part in found for number in part["n"].to_pylist()] == list(range(sum(sizes)))


def test_batches_are_asked_for_only_as_far_as_they_are_needed() -> None:
    asked: list[int] = []

    def watched() -> Any:
        for number, batch in enumerate(batches(4, 4, 4)):
            asked.append(number)
            yield batch

    next(gather_batches(watched(), n_rows=8))
    assert asked == [0, 1]


def test_a_null_beside_it_does_not_change_a_whole_number(pack: Path) -> None:
    rows = pa.table(
        {
            "store": pa.array([BIG, None], pa.int64()),
            "x": pa.array([1, None], pa.int64()),
            "time": pa.array(
                [pd.Timestamp("2024-01-02", tz="UTC")] * 2, pa.timestamp("us", tz="UTC")
            ),
        }
    )
    frame = asked_rows(rows.append_column("kind", rows["store"]), FleetModel(pack))
    assert frame["store"].tolist() == [str(BIG), None]
    assert frame["x"].dtype == np.float64


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lightgbm as lgb

    random = np.random.default_rng(0)
    matrix = np.column_stack([random.normal(size=300), random.integers(0, 2, 300)]).astype(
        np.float32
    )
    boosters = [
        encode_booster(
            lgb.train(
                {"verbosity": -1, "num_threads": 1},
                lgb.Dataset(matrix, slope * matrix[:, 0] + matrix[:, 1]),
                5,
            ).model_to_string()
        )
        for slope in (1, 2, 3)
    ]
    ledger = pd.DataFrame(
        {
            "grain": [0, 1, 1],
            "group_id": ["[]", group_id([BIG]), group_id([None])],
            "booster_id": [booster.booster_id for booster in boosters],
            "weight": [1.0, 0.5, 0.5],
            "intervals": ['{"0.8": 1.0, "0.95": 2.0}', '{"0.8": 2.0, "0.95": 3.0}', None],
        }
    )
    generation = Generation(
        build_model_spec(SPEC, {"kind": [str(BIG), "7"]}),
        "run",
        constant=0.0,
        constant_without_offset=0.0,
    )
    folder = tmp_path_factory.mktemp("numbered") / "numbered"
    write_pack(folder, [PackedRun(generation, ledger)], lambda _: map(vars, boosters))
    return folder


def test_every_batch_size_gives_the_packs_own_answers(spark: SparkSession, pack: Path) -> None:
    n_rows = 90
    store, kind = ([value, None, 3] * (n_rows // 3) for value in (BIG, BIG))
    table = pa.table(
        {
            "row_key": [f"{number:03d}" for number in range(n_rows)],
            "time": pa.array(
                [pd.Timestamp("2024-01-02", tz="UTC")] * n_rows, pa.timestamp("us", tz="UTC")
            ),
            "store": pa.array(store, pa.int64()),
            "kind": pa.array(kind, pa.int64()),
            "x": pa.array(
                [None if number % 10 == 0 else number / 10 for number in range(n_rows)],
                pa.float64(),
            ),
        }
    )
    alone = FleetModel(pack).predict(asked_rows(table, FleetModel(pack)))
    assert alone["answered_by"].value_counts().to_dict() == {"[store]": 60, "[]": 30}
    before = spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch")
    try:
        for size in (7, 10_000):
            spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", size)
            answers = score_rows(
                spark,
                spark.createDataFrame(table).repartition(2, "row_key"),
                SPEC,
                FleetModel(pack),
                AS_OF,
                {},
            )
            found = answers.toPandas().sort_values("row_key", ignore_index=True)
            pd.testing.assert_frame_equal(found[list(alone.columns)], alone, check_exact=True)
            assert found["store"].isna().sum() == 30
            assert set(found["time"]) == {pd.Timestamp("2024-01-02")}
    finally:
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(before))


def test_scoring_needs_no_exchange(spark: SparkSession, pack: Path) -> None:
    rows = spark.createDataFrame(
        [], "row_key string, time timestamp, store long, kind long, x double"
    )
    answers = score_rows(spark, rows, SPEC, FleetModel(pack), AS_OF, {})
    assert "Exchange" not in answers._jdf.queryExecution().toString()  # noqa: SLF001 - nothing public gives the plan
    assert answers.count() == 0


def test_a_column_that_is_listed_twice_is_refused_before_a_row_is_read(
    spark: SparkSession, pack: Path
) -> None:
    rows = spark.createDataFrame(
        [], "row_key string, time timestamp, store long, kind long, x double"
    )
    doubled = rows.select("*", sf.lit(1.0).alias("x"))
    with pytest.raises(
        InputError,
        match="the batch: columns listed more than once: x; rename or remove all but one of each",
    ):
        score_rows(spark, doubled, SPEC, FleetModel(pack), AS_OF, {})
    names = ["store", "x", "kind", "kind"]
    with pytest.raises(InputError, match=r"rows\.parquet: columns listed more than once: kind;"):
        check_columns(
            pa.schema([(name, pa.float64()) for name in names]), "rows.parquet", FleetModel(pack)
        )


def test_a_worker_opens_a_pack_once_for_all_of_its_tasks(spark: SparkSession, pack: Path) -> None:
    rows = spark.createDataFrame(
        [(str(n), None, n, n, 0.5) for n in range(8)],
        "row_key string, time timestamp, store long, kind long, x double",
    )
    for _ in range(2):
        score_rows(spark, rows, SPEC, FleetModel(pack), AS_OF, {}).collect()
    fleet = FleetModel(pack).fleet

    def look(batches: Any) -> Any:
        from pipeline.spark import answers

        for batch in batches:
            opened = answers.packs_of_worker.get(fleet)
            yield pa.RecordBatch.from_pydict(
                {"cached": [-1 if opened is None else opened[1].cached_bytes] * batch.num_rows}
            )

    # Of the workers that answered, each still has the boosters that it was asked for.
    found = {
        row["cached"] for row in spark.range(0, 2, 1, 2).mapInArrow(look, "cached long").collect()
    }
    assert max(found) > 0
