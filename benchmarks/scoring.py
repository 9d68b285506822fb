"""Batch scoring of a thousand groups: our Spark path against the usual recipe, MLflow's spark_udf, and plain LightGBM in memory.

All sides answer the same rows, clustered by group, from Spark's memory (plain LightGBM: from its
own), with two cores, warm; what they answer goes nowhere (Spark's noop sink). Ours and plain
LightGBM blend three grains; the recipe has the finest models alone.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.engine import SLOTS, Engine
from benchmarks.rivals import (
    LoggedModels,
    PlainGroup,
    hold_plain,
    load_everywhere,
    log_group_models,
    notebook_settings,
    predict_plain,
    usual_scoring,
)
from benchmarks.runs import NotMeasured, Runs
from benchmarks.serving import pack_of, packed_spec, questions, region_of, registered
from pipeline.models.meta_model import (
    FleetModel,
    GroupKey,
    answer_columns,
    decode_booster,
    group_id,
)
from pipeline.spark.scoring import score_rows
from pipeline.tables import TIMESTAMP

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

N_GROUPS, ROWS_PER_GROUP = 1_000, 300
# The recipe pays per group, LightGBM per row. The flights example scores a month: 27,020 rows of
# 224 routes; housing a year: 546 rows of 46 towns.
RECIPE_ROWS_PER_GROUP = (120, 30, 300)
MEMORY = "2g"
AS_OF = pd.Timestamp("2023-01-01")
# So many runs warm up, and of so many the median counts.
WARM, TIMED = 2, 3
SPEC = packed_spec()


@dataclass(frozen=True)
class Case:
    """What is scored.

    Args:
        pack: of three grains.
        rows: folder of as many Parquet files as there are slots, each with whole groups.
        n_groups: groups of the finest grain.
        n_rows: rows of all groups.
    """

    pack: Path
    rows: Path
    n_groups: int
    n_rows: int

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Keys of every group of the finest grain, in the order of the rows."""
        return [(region_of(number), f"g{number:05d}") for number in range(self.n_groups)]

    def frame(self) -> pd.DataFrame:
        """The rows in pandas."""
        return pd.concat(
            [pd.read_parquet(file) for file in sorted(self.rows.iterdir())], ignore_index=True
        )

    def read(self, spark: "SparkSession") -> "DataFrame":
        """The rows in Spark's memory, a partition per file."""
        rows = spark.read.parquet(str(self.rows)).cache()
        if (n_rows := rows.count()) != self.n_rows:
            raise NotMeasured(f"{n_rows:,} rows were read, {self.n_rows:,} written")
        return rows


def write_case(folder: Path, pack: Path, n_groups: int, rows_per_group: int) -> Case:
    """Write the rows of a pack's groups, group by group."""
    (folder / "rows").mkdir(parents=True)
    frame = questions(np.repeat(np.arange(n_groups), rows_per_group))
    frame["row_key"] = [f'["{group}",{number}]' for number, group in enumerate(frame["group"])]
    frame["time"] = pd.Timestamp("2023-01-02", tz="UTC")
    types = {"region": pa.string(), "group": pa.string(), "row_key": pa.string(), "time": TIMESTAMP}
    table = pa.Table.from_pandas(
        frame,
        schema=pa.schema([(name, types.get(name, pa.float64())) for name in frame]),
        preserve_index=False,
    )
    half = n_groups // 2 * rows_per_group
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / "rows" / f"{number}.parquet")
    return Case(pack, folder / "rows", n_groups, len(frame))


def _case(runs: Runs, rows_per_group: int = ROWS_PER_GROUP) -> Case:
    return runs.once(
        f"scoring-{rows_per_group}",
        lambda: write_case(runs.new_folder(), pack_of(runs, N_GROUPS), N_GROUPS, rows_per_group),
    )


def our_answers(rows: "DataFrame", pack: Path) -> "DataFrame":
    """What a fleet's predictions are made with."""
    return score_rows(rows.sparkSession, rows, SPEC, FleetModel(pack), AS_OF, {})


def _write_nowhere(frame: "DataFrame") -> None:
    frame.write.format("noop").mode("overwrite").save()


def rates(
    sides: Mapping[str, Callable[[], object]], n_rows: int, *, warm: int = WARM, timed: int = TIMED
) -> dict[str, float]:
    """Rows per second of each side: the median of some runs, after others to warm up. The sides take turns: they share the machine's moods."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm + timed):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    for name, found in seconds.items():
        print(
            f"  {name}: {', '.join(f'{one:.2f}' for one in found)} s; {warm} to warm up", flush=True
        )
    return {name: n_rows / statistics.median(found[warm:]) for name, found in seconds.items()}


def _ours(rows: "DataFrame", pack: Path) -> Callable[[], object]:
    return lambda: _write_nowhere(our_answers(rows, pack))


def boosters_of(pack: Path) -> dict[GroupKey, tuple[str, float, str]]:
    """Every group's booster: its id, its weight and its text."""
    chains = pq.read_table(pack / "chains.parquet").to_pylist()
    stored = dict(zip(*pq.read_table(pack / "boosters.parquet").to_pydict().values(), strict=True))
    return {
        GroupKey.of(row): (
            row["booster_id"],
            row["weight"],
            decode_booster({**row, "text": stored[row["booster_id"]]}, str(pack)),
        )
        for row in chains
    }


def log_recipe(case: Case, folder: Path) -> LoggedModels:
    """The finest grain's boosters as the usual notebook leaves them."""
    found = boosters_of(case.pack)
    uri = f"sqlite:///{folder}/recipe.db"
    models = (
        (values, lgb.Booster(model_str=found[GroupKey(2, group_id(values))][2]))
        for values in case.groups
    )
    started = time.perf_counter()
    logged = LoggedModels(uri, log_group_models(models, tracking_uri=uri))
    print(
        f"  {case.n_groups:,} models logged to MLflow in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return logged


def score_vs_recipe(runs: Runs) -> Mapping[str, float]:
    """Rows per second of ours over the usual recipe's, whose workers load each group's model from MLflow; and where they keep them."""
    case, *others = (_case(runs, rows_per_group) for rows_per_group in RECIPE_ROWS_PER_GROUP)
    folder = runs.new_folder()
    logged = log_recipe(case, folder)
    unopened = folder / "unopened"
    shutil.copytree(case.pack, unopened)
    with Engine(folder, memory=MEMORY) as engine:
        spark = engine.spark.session
        rows = case.read(spark)
        # Workers run and have their imports, and none has opened this pack.
        rows.mapInPandas(_look, rows.schema).count()
        cold = rates(
            {"ours, no model loaded yet": _ours(rows, unopened)}, case.n_rows, warm=0, timed=1
        )
        with notebook_settings(spark):
            _write_nowhere(_recipe(rows.where(f"region = '{region_of(0)}'"), logged))
            found = cold | _against_recipe(case, rows, logged)
            by_rows = {
                f"rows-{other.n_rows // other.n_groups}": _ratio(
                    _against_recipe(other, other.read(spark), logged)
                )
                for other in others
            }
            load_everywhere(spark, case.groups, logged, SLOTS)
            kept = rates(
                {"recipe, models kept": lambda: _write_nowhere(_recipe(rows, logged, keeps=True))},
                case.n_rows,
            )["recipe, models kept"]
    return {
        "": _ratio(found),
        **by_rows,
        "cached": found["ours"] / kept,
        "cold": found["ours, no model loaded yet"] / found["usual recipe"],
        "our-rows-per-second": found["ours"],
        "recipe-rows-per-second": found["usual recipe"],
        "cached-rows-per-second": kept,
    }


def _against_recipe(case: Case, rows: "DataFrame", logged: LoggedModels) -> dict[str, float]:
    print(f"  {case.n_rows // case.n_groups} rows per group:", flush=True)
    recipe = rates(
        {"usual recipe": lambda: _write_nowhere(_recipe(rows, logged))},
        case.n_rows,
        warm=0,
        timed=1,
    )
    return recipe | rates({"ours": _ours(rows, case.pack)}, case.n_rows)


def _ratio(found: Mapping[str, float]) -> float:
    return found["ours"] / found["usual recipe"]


def _look(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    yield from batches


def _recipe(rows: "DataFrame", logged: LoggedModels, *, keeps: bool = False) -> "DataFrame":
    return usual_scoring(rows, SPEC.finest, SPEC.feature_columns, logged, keeps=keeps)


def udf_answers(rows: "DataFrame", tracking_uri: str, model_uri: str) -> "DataFrame":
    """What `mlflow.pyfunc.spark_udf` gives of a registered version."""
    import mlflow
    from pyspark.sql import functions as sf

    mlflow.set_tracking_uri(tracking_uri)
    schema = ", ".join(f"{name} {kind}" for name, kind in answer_columns(SPEC.task).items())
    answer = mlflow.pyfunc.spark_udf(
        rows.sparkSession, model_uri, result_type=schema, env_manager="local"
    )
    inputs = sf.struct(*SPEC.finest, *SPEC.feature_columns)
    return rows.select("row_key", "time", *SPEC.finest, answer(inputs).alias("_answer")).select(
        "row_key", "time", *SPEC.finest, "_answer.*"
    )


def score_vs_spark_udf(runs: Runs) -> Mapping[str, float]:
    """Rows per second of ours over those of `mlflow.pyfunc.spark_udf` with our own registered model."""
    case, folder = _case(runs), runs.new_folder()
    uri, model_uri = registered(case.pack, folder)
    with Engine(folder, memory=MEMORY) as engine:
        rows = case.read(engine.spark.session)
        udf = udf_answers(rows, uri, model_uri)
        found = rates(
            {"ours": _ours(rows, case.pack), "spark_udf": lambda: _write_nowhere(udf)},
            case.n_rows,
            warm=2,
            timed=3,
        )
    ours, theirs = found["ours"], found["spark_udf"]
    return {"": ours / theirs, "our-rows-per-second": ours, "udf-rows-per-second": theirs}


def plain_groups(case: Case) -> list[PlainGroup]:
    """Every group's rows and the names of its models, as plain LightGBM code would hold them."""
    found, frame = boosters_of(case.pack), case.frame()
    matrix = frame[list(SPEC.feature_columns)].to_numpy(np.float32)
    per_group = case.n_rows // case.n_groups
    groups = []
    for number, values in enumerate(case.groups):
        chain = [
            found[GroupKey(grain, group_id(values[:grain]))] for grain in range(len(SPEC.grains))
        ]
        rows = matrix[number * per_group : (number + 1) * per_group]
        groups.append(
            PlainGroup(
                rows, tuple(name for name, _, _ in chain), tuple(weight for _, weight, _ in chain)
            )
        )
    return groups


@contextmanager
def plain_processes(case: Case) -> Iterator[Callable[[], np.ndarray[Any, Any]]]:
    """Plain LightGBM in two processes, each with half of the groups, their rows and their models in memory: answers all rows, in their order."""
    groups, texts = (
        plain_groups(case),
        {name: text for name, _, text in boosters_of(case.pack).values()},
    )
    half = len(groups) // SLOTS
    with ExitStack() as held:
        processes = [
            held.enter_context(
                ProcessPoolExecutor(
                    1, get_context("spawn"), initializer=hold_plain, initargs=(part, texts)
                )
            )
            for part in (groups[:half], groups[half:])
        ]

        def answer() -> np.ndarray[Any, Any]:
            asked = [process.submit(predict_plain, 0.0) for process in processes]
            return np.concatenate([group for one in asked for group in one.result()])

        yield answer


def score_vs_raw(runs: Runs) -> Mapping[str, float]:
    """Rows per second of ours over plain LightGBM's, and the same of rows in no order."""
    case, folder = _case(runs), runs.new_folder()
    with plain_processes(case) as plain, Engine(folder, memory=MEMORY) as engine:
        rows = case.read(engine.spark.session)
        check_equal(
            our_answers(rows, case.pack).select("row_key", "prediction").toPandas(), case, plain()
        )
        mixed = rows.repartition(SLOTS, "row_key").cache()
        mixed.count()
        sides = {
            "ours": _ours(rows, case.pack),
            "ours, rows in no order": _ours(mixed, case.pack),
            "plain LightGBM": plain,
        }
        found = rates(sides, case.n_rows)
    ours, shuffled, raw = found.values()
    return {
        "": ours / raw,
        "shuffled": shuffled / raw,
        "our-rows-per-second": ours,
        "shuffled-rows-per-second": shuffled,
        "raw-rows-per-second": raw,
    }


def check_equal(found: pd.DataFrame, case: Case, answers: np.ndarray[Any, Any]) -> None:
    """Ours and plain LightGBM's answers must be the same.

    Raises:
        NotMeasured: if they are not.
    """
    ours = found.set_index("row_key")["prediction"].reindex(case.frame()["row_key"]).to_numpy()
    if not np.allclose(ours, answers, rtol=1e-12, atol=0):
        raise NotMeasured(
            f"{(~np.isclose(ours, answers, rtol=1e-12, atol=0)).sum():,} of {len(answers):,} "
            "answers differ from plain LightGBM's"
        )
