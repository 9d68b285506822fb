"""The hash of a group's rows changes exactly where what training reads of them changes."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipeline.models.meta_model import design_matrix
from pipeline.models.pack import build_model_spec
from pipeline.spark.counting import count_groups
from pipeline.spec import parse_spec
from pipeline.training.splits import Cutoffs

pytestmark = [pytest.mark.spark, pytest.mark.slow]

SPEC = parse_spec(
    {
        "name": "edited",
        "sources": [{"name": "rows", "uri": "rows.csv"}],
        "features": {"columns": ["x", "n", "level"], "categoricals": ["kind"]},
        "grains": [[], ["group"]],
        "entity": ["group"],
        "time": "day",
        "target": {"column": "y", "offset": "level", "scale": "size", "weight": "w"},
        "splits": {"report": "1 day", "tune": "1 day"},
        "baselines": {"guess": "guess", "also a feature": "x"},
    },
    file="edited/defs.yaml",
)
CATEGORIES = {"kind": ["a", "b", "c"]}
CUTOFFS = Cutoffs(*(pd.Timestamp(day) for day in ("2024-01-06", "2024-01-04", "2024-01-05")))
N_GROUPS, N_ROWS, SLOTS = 100_000, 5, 6
NUMBERS = ["x", "n", "level", "y", "size", "w", "guess"]
EXACT = ["level", "size", "w"]  # offset, scale, weight; a baseline is not learnt from
DAY = 86_400_000_000


class Groups:
    """Many copies of one small group; the last slot of each is empty. Values and nulls are kept apart, as NaN is not null."""

    def __init__(self, n_groups: int) -> None:
        random = np.random.default_rng(0)
        one: dict[str, npt.NDArray[Any]] = {name: random.uniform(1, 9, SLOTS) for name in NUMBERS}
        one["x"][0] = one["y"][1] = one["guess"][2] = one["level"][3] = 0.0
        one["n"] = np.arange(SLOTS) * 1.0
        one["time"] = (
            pd.date_range("2024-01-01", periods=SLOTS, unit="us").to_numpy().astype("int64")
        )
        one["known_at"] = one["time"] + 3_600_000_000
        one["kind"] = np.array(["a", "b", "c", "a", "unseen", "b"], dtype=object)
        one["row_key"] = np.array([f"key {slot}" for slot in range(SLOTS)], dtype=object)
        self.n = n_groups
        self.cells = {name: np.tile(values, n_groups) for name, values in one.items()}
        self.is_null = {name: np.zeros(n_groups * SLOTS, dtype=bool) for name in one}
        self.is_null["w"][2::SLOTS] = self.is_null["kind"][3::SLOTS] = True
        self.is_there = np.tile(np.arange(SLOTS) < N_ROWS, n_groups)
        self.group = np.repeat(np.arange(n_groups), SLOTS)

    def seen_by_training(self) -> npt.NDArray[np.int64]:
        """Per group the sorted numbers of its rows' canonical forms: equal rows have equal numbers."""
        frame = pd.DataFrame(
            {
                name: pd.Series(values).mask(self.is_null[name])
                for name, values in self.cells.items()
            }
        )
        matrix = design_matrix(frame, build_model_spec(SPEC, CATEGORIES)).astype(np.float64)
        exact = frame[EXACT].to_numpy(dtype=np.float64)
        exact[~np.isfinite(exact)] = np.nan
        target = frame["y"].to_numpy(dtype=np.float64)
        numbers = np.column_stack([matrix, exact, target]) + 0.0  # no negative zeros
        numbers[np.isnan(numbers)] = np.nan  # one kind of NaN
        others = [
            self.cells["time"],
            self.cells["known_at"],
            pd.factorize(self.cells["row_key"])[0],
        ]
        rows = np.ascontiguousarray(np.column_stack([numbers.view(np.int64), *others]))
        codes = pd.factorize(np.array([row.tobytes() for row in rows], dtype=object))[0]
        weight = frame["w"].to_numpy(dtype=np.float64)
        counts = self.is_there & ~np.isnan(target) & np.isfinite(weight) & (weight > 0)
        return np.sort(np.where(counts, codes, -1).reshape(self.n, SLOTS), axis=1)

    def in_spark(self, spark: SparkSession, folder: Path, seed: int) -> DataFrame:
        """All rows in any order, over several partitions; from a file, as half a million rows do not go through the driver."""
        kept = np.flatnonzero(self.is_there)
        np.random.default_rng(seed).shuffle(kept)
        columns = {
            name: pa.array(values[kept], mask=self.is_null[name][kept], from_pandas=False)
            for name, values in self.cells.items()
        }
        for name in ("time", "known_at"):
            columns[name] = columns[name].cast(pa.timestamp("us", tz="UTC"))
        columns["n"] = pa.array(
            self.cells["n"][kept],
            mask=self.is_null["n"][kept] | ~np.isfinite(self.cells["n"][kept]),
        ).cast(pa.int64(), safe=False)
        columns["group"] = pa.array(self.group[kept]).cast(pa.string())
        file = folder / f"{uuid.uuid4().hex}.parquet"
        pq.write_table(pa.table(columns), file)
        return spark.read.parquet(str(file)).repartition(5)


def edited(groups: Groups, seed: int) -> npt.NDArray[np.object_]:  # noqa: C901 - one edit after the other
    """Give every group but the first one random edit; its name."""
    random = np.random.default_rng(seed)
    values, is_null = groups.cells, groups.is_null
    at = np.arange(groups.n) * SLOTS + random.integers(0, N_ROWS, groups.n)
    other = np.arange(groups.n) * SLOTS + random.integers(0, N_ROWS, groups.n)
    spare = np.arange(groups.n) * SLOTS + N_ROWS

    def set_to(
        name: str, value: Callable[[Any], Any] | Any, null: bool = False
    ) -> Callable[[Any], None]:
        def edit(chosen: Any) -> None:
            values[name][at[chosen]] = value(values[name][at[chosen]]) if callable(value) else value
            is_null[name][at[chosen]] = null

        return edit

    def swap(name: str) -> Callable[[Any], None]:
        def edit(chosen: Any) -> None:
            for of in (values[name], is_null[name]):
                of[at[chosen]], of[other[chosen]] = of[other[chosen]], of[at[chosen]]

        return edit

    def doubled(key: str | None) -> Callable[[Any], None]:
        def edit(chosen: Any) -> None:
            for name in values:
                values[name][spare[chosen]] = values[name][at[chosen]]
                is_null[name][spare[chosen]] = is_null[name][at[chosen]]
            if key is not None:
                values["row_key"][spare[chosen]] = key
            groups.is_there[spare[chosen]] = True

        return edit

    def added(chosen: Any) -> None:
        groups.is_there[spare[chosen]] = True

    def removed(chosen: Any) -> None:
        groups.is_there[at[chosen]] = False

    edits: dict[str, Callable[[Any], None]] = {
        "nothing": lambda _: None,
        "add": added,
        "remove": removed,
        "double": doubled(None),
        "copy": doubled("new"),
    }
    for name in NUMBERS:
        edits |= {
            f"{name} more": set_to(name, lambda old: old + 1),
            f"{name} null": set_to(name, lambda old: old, null=True),
            f"{name} swap": swap(name),
        }
    for name in set(NUMBERS) - {"n"}:
        edits |= {
            f"{name} a little": set_to(name, lambda old: old * (1 + 1e-12)),
            f"{name} some": set_to(name, lambda old: old * (1 + 1e-3)),
            f"{name} NaN": set_to(name, np.nan),
            f"{name} inf": set_to(name, np.inf),
            f"{name} huge": set_to(name, 1e300),
            f"{name} -huge": set_to(name, -1e300),
            f"{name} zero": set_to(name, 0.0),
            f"{name} -zero": set_to(name, -0.0),
        }
    for value in ("a", "b", "unseen", "strange", ""):
        edits[f"kind {value}"] = set_to("kind", value)
    edits |= {
        "kind null": set_to("kind", "a", null=True),
        "kind swap": swap("kind"),
        "key": set_to("row_key", "other"),
    }
    for name in ("time", "known_at"):
        edits |= {
            f"{name} {by}": set_to(name, lambda old, by=by: old + by) for by in (1, DAY, -DAY)
        } | {f"{name} swap": swap(name)}
    names = random.choice(list(edits), groups.n).astype(object)
    names[0] = "nothing"
    for name, edit in edits.items():
        edit(np.flatnonzero(names == name))
    return names


def test_the_hash_differs_exactly_where_training_would_see_a_difference(
    spark: SparkSession, tmp_path: Path
) -> None:
    groups = Groups(N_GROUPS)
    names = edited(groups, seed=1)
    seen = groups.seen_by_training()
    differs = (seen != seen[0]).any(axis=1)
    counts = count_groups(groups.in_spark(spark, tmp_path, 2), SPEC, CUTOFFS, CATEGORIES).counts
    finest = counts[counts["grain"] == 1]
    hashes = pd.Series(
        finest["rows_hash"].to_numpy(), index=[int(group[2:-2]) for group in finest["group_id"]]
    ).reindex(range(N_GROUPS))
    found = (hashes != hashes[0]).to_numpy()
    wrong = pd.Series(names[found != differs]).value_counts()
    assert wrong.empty, wrong.to_dict()
    # Neither is rare, and what differs has hashes of its own.
    assert 10_000 < differs.sum() < 95_000
    forms = pd.Series([row.tobytes() for row in seen])
    assert forms.nunique() == hashes.nunique()
    assert (
        pd.DataFrame({"form": forms, "hash": hashes}).drop_duplicates().shape[0] == forms.nunique()
    )


def test_the_hash_depends_neither_on_the_order_of_rows_nor_on_files(
    spark: SparkSession, tmp_path: Path
) -> None:
    groups = Groups(20)
    edited(groups, seed=3)
    one, other = (
        count_groups(
            groups.in_spark(spark, tmp_path, seed).repartition(n), SPEC, CUTOFFS, CATEGORIES
        ).counts.sort_values(["grain", "group_id"], ignore_index=True)
        for seed, n in ((1, 1), (2, 7))
    )
    assert (
        one[["group_id", "rows_hash"]].to_numpy().tolist()
        == other[["group_id", "rows_hash"]].to_numpy().tolist()
    )


def test_rows_that_move_between_groups_change_what_contains_both(
    spark: SparkSession, tmp_path: Path
) -> None:
    groups = Groups(2)
    rows = groups.in_spark(spark, tmp_path, 1)
    moved = rows.replace({"0": "1", "1": "2"}, subset=["group"])
    hashes = [
        count_groups(frame, SPEC, CUTOFFS, CATEGORIES).counts.set_index("group_id")["rows_hash"]
        for frame in (rows, moved)
    ]
    assert hashes[0]["[]"] != hashes[1]["[]"]


@pytest.mark.parametrize(
    "categories", [{"kind": ["a", "b", "c", "new"]}, {"kind": ["a", "b", "c", "strange"]}]
)
def test_categories_that_a_group_does_not_have_leave_its_hash(
    spark: SparkSession, tmp_path: Path, categories: dict[str, list[str]]
) -> None:
    rows = Groups(1).in_spark(spark, tmp_path, 1)
    one, same, other = (
        count_groups(rows, SPEC, CUTOFFS, chosen).counts["rows_hash"].tolist()
        for chosen in (CATEGORIES, categories, {"kind": ["b", "a", "c"]})
    )
    assert one == same != other
