"""Writing the pack of one version; `meta_model.FleetModel` reads it."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq

from pipeline.errors import ModelNotFound, StoreError
from pipeline.models.meta_model import (
    CHAINS,
    INDEPENDENT,
    PACK_FORMAT,
    FleetModel,
    Floats,
    Generation,
    GroupKey,
    ModelSpec,
    ModelTarget,
    index_digest,
    read_footer,
)
from pipeline.spec import COUNTED, FleetSpec
from pipeline.tables import BY_CONSTANT, records

CHAINS_PER_ROW_GROUP = 4096
ROW_GROUP_BYTES = 16 << 20
_BOOSTERS = pa.schema(
    [
        pa.field("booster_id", pa.string(), nullable=False),
        pa.field("text", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True)
class PackedRun:
    """What one training run gives to a version.

    Args:
        generation: what it answers by, besides its boosters.
        ledger: rows of the run's ledger: grain, group_id, booster_id, weight, intervals (JSON),
            answered_by. A row whose optional column `serves` is false stands only for the finer
            groups below it.
    """

    generation: Generation
    ledger: pd.DataFrame


def answers_alike(one: PackedRun, other: PackedRun) -> bool:
    """Whether two training runs give every row the same answer: one version can stand for both.

    Args:
        one: a run.
        other: another, whatever its name.
    """
    if one.generation.model_spec != other.generation.model_spec:
        return False
    if one.generation.answered_by_constant != other.generation.answered_by_constant:
        return False
    # Sums over rows in another order differ in their last digits.
    if not np.allclose(_constants_of(one), _constants_of(other), rtol=1e-9, equal_nan=True):
        return False
    left = one.ledger.sort_values(["grain", "group_id"])
    right = other.ledger.sort_values(["grain", "group_id"])
    names = ["grain", "group_id", "booster_id", "intervals", "answered_by"]
    if records(left.reindex(columns=names)) != records(right.reindex(columns=names)):
        return False
    left_weights = left["weight"].to_numpy(dtype=float)
    right_weights = right["weight"].to_numpy(dtype=float)
    return bool(np.allclose(left_weights, right_weights, atol=1e-8))


def _constants_of(run: PackedRun) -> Floats:
    generation = run.generation
    return np.array([generation.constant, generation.constant_without_offset], dtype=np.float64)


def build_model_spec(
    spec: FleetSpec,
    categories: Mapping[str, Sequence[str]],
    classes: Sequence[str] = (),
    prior: Sequence[float] = (),
    own: str = INDEPENDENT,
    nullable: Collection[str] = (),
) -> ModelSpec:
    """The part of a fleet's spec that training, packing and scoring share.

    Args:
        spec: the fleet.
        categories: values per categorical feature, in order.
        classes: of the target, in order; empty for regression.
        prior: each class's share of the fit rows; empty for regression.
        own: `independent`, or `correction` where a group's trees add to its parent's prediction.
        nullable: features in which training saw a null: a batch may lack them, unless they are
            keys, offset or scale.
    """
    target = spec.target
    always = [*spec.finest, *filter(None, (target.offset, target.scale))]
    may_lack = set(nullable).difference(always)
    read = dict.fromkeys([*spec.finest, *spec.feature_columns, *always])
    interval: float | None = None
    intervals: tuple[float, ...] = ()
    if not spec.is_class_task:
        interval = spec.scoring.interval
        intervals = tuple(spec.scoring.levels)
    return ModelSpec(
        fleet=spec.name,
        grains=tuple(map(tuple, spec.grains)),
        features=tuple(spec.feature_columns),
        categories={name: tuple(values) for name, values in categories.items()},
        required=tuple(name for name in read if name not in may_lack),
        optional=tuple(name for name in spec.feature_columns if name in may_lack),
        task=spec.task,
        own=own,
        is_count=spec.objective in COUNTED,
        classes=tuple(classes),
        prior=tuple(prior),
        target=ModelTarget(target.column, target.transform, target.offset, target.scale),
        interval=interval,
        intervals=intervals,
    )


@dataclass(frozen=True)
class PackStore:
    """Where shared packs keep their boosters: files that are written once and never changed.

    It is no Delta table, so that nothing that tidies tables up (vacuum, optimize, deleting old
    runs) can take a registered version's boosters.

    Args:
        root: its address.
        filesystem: that holds it.
        path: its path there.
    """

    root: str
    filesystem: pf.FileSystem
    path: str

    def add(self, file: Path) -> dict[str, Any]:
        """Keep a local file under a name made from its content; its entry in an index."""
        entry = {
            **read_footer(file),
            "path": f"boosters-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.parquet",
        }
        self.filesystem.create_dir(self.path, recursive=True)
        # Another file of this name is the same one, whole or half written.
        pf.copy_files(
            str(file),
            f"{self.path}/{entry['path']}",
            source_filesystem=pf.LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )
        return entry


def write_pack(
    folder: Path,
    runs: Sequence[PackedRun],
    boosters: Callable[[Sequence[str]], Iterable[Mapping[str, Any]]],
    *,
    store: PackStore | None = None,
    before: Sequence[FleetModel] = (),
) -> str:
    """Write a pack.

    Args:
        folder: empty or absent.
        runs: the version's own training run first.
        boosters: rows of the booster store by id; rows that were not asked for are ignored.
        store: where a shared pack keeps its boosters; None puts them into the folder.
        before: versions whose boosters need not be stored again, where they are in the same store.

    Returns:
        The digest of its index, which identifies the version.

    Raises:
        StoreError: if a booster that a ledger names is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chains = _list_chains(runs)
    booster_ids = list(dict.fromkeys(chains["booster_id"].dropna()))
    files: list[dict[str, Any]] = []
    places: dict[str, dict[str, Any]] = {}
    root = None
    if store is not None:
        root = store.root
        files, places = _find_stored(before, root, booster_ids)
    new = [name for name in booster_ids if name not in places]
    if new or store is None:
        path = folder / "boosters.parquet"
        rows = _read_boosters(boosters, new)
        offsets = write_boosters(path, rows)
        for row in rows:
            name = row["booster_id"]
            place = (len(files), *offsets[name])
            places[name] = _describe_place(place, row["n_bytes"], row["sha256"])
        if store is None:
            files.append({"path": path.name, **read_footer(path)})
        else:
            files.append(store.add(path))
            path.unlink()
    return _write_tables(folder, runs, chains, places, root=root, files=files)


def _read_boosters(
    boosters: Callable[[Sequence[str]], Iterable[Mapping[str, Any]]], names: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The named rows of a booster store, in the order of the names.

    Without names the store is not read.

    Raises:
        StoreError: if one is missing.
    """
    if not names:
        return []
    named = set(names)
    rows = {}
    for row in boosters(names):
        if row["booster_id"] in named:
            rows[row["booster_id"]] = row
    missing = named.difference(rows)
    if missing:
        raise StoreError(
            f"booster store lacks {len(missing)} boosters that the ledger names, e.g. "
            f"{min(missing)}; train again"
        )
    return [rows[name] for name in names]


def _describe_place(place: tuple[int, int, int], n_bytes: int, sha256: str) -> dict[str, Any]:
    """Where a booster is stored, and what its text is checked by: columns of its chain."""
    file, offset, stored_bytes = place
    return {
        "file": file,
        "offset": offset,
        "stored_bytes": stored_bytes,
        "n_bytes": n_bytes,
        "sha256": sha256,
    }


def _find_stored(
    before: Sequence[FleetModel], root: str, booster_ids: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Files of a store, and where in them earlier versions have boosters that are needed again."""
    needed = set(booster_ids)
    numbers: dict[str, int] = {}
    files: list[dict[str, Any]] = []
    places: dict[str, dict[str, Any]] = {}
    for model in before:
        if model.root != root:
            continue
        for chain in model.chains():
            name = chain.booster_id
            if name is None or name not in needed or name in places:
                continue
            number, offset, stored_bytes = chain.place
            path = model.files[number]["path"]
            if path not in numbers:
                numbers[path] = len(files)
                files.append(dict(model.files[number]))
            place = (numbers[path], offset, stored_bytes)
            places[name] = _describe_place(place, chain.n_bytes, chain.sha256)
    return files, places


def combine_versions(
    serving: Mapping[GroupKey, str], models: Sequence[FleetModel]
) -> list[PackedRun]:
    """The runs of a version in which each group is answered by the run that is named for it.

    Args:
        serving: fleet version by group.
        models: packs that together have the chains of these groups, and of their ancestors; where
            several have the same chain, the first one's is taken.

    Returns:
        One run per fleet version, in the order in which the packs have them.

    Raises:
        ModelNotFound: if no pack has a group's chain of the version that is named for it.
    """
    generations: dict[str, Generation] = {}
    tables: dict[str, list[pd.DataFrame]] = {}
    for model in models:
        rows = model.chain_rows()
        for number, generation in enumerate(model.generations):
            version = generation.fleet_version
            generations.setdefault(version, generation)
            tables.setdefault(version, []).append(rows[rows["generation"] == number])
    groups_of: dict[str, set[GroupKey]] = {}
    for key, version in serving.items():
        groups_of.setdefault(version, set()).add(key)
    runs: list[PackedRun] = []
    for version, generation in generations.items():
        if version in groups_of:
            rows = pd.concat(tables[version]).drop_duplicates(["grain", "group_id"])
            runs.append(_take_chains(generation, rows, groups_of[version]))
    missing = set(groups_of).difference(generations)
    if missing:
        raise ModelNotFound(
            f"no pack holds version {min(missing)}; available: {', '.join(generations)}"
        )
    return runs


def _take_chains(generation: Generation, rows: pd.DataFrame, served: set[GroupKey]) -> PackedRun:
    """The part of a run that serves some groups: their chains, and those of their ancestors.

    Args:
        generation: of the run.
        rows: its chains, one row per group.
        served: the groups.

    Raises:
        ModelNotFound: if one of them has no chain.
    """
    keys = GroupKey.of_rows(rows)
    missing = served.difference(keys)
    if missing:
        raise ModelNotFound(
            f"no pack has the chain that version {generation.fleet_version} has for group "
            f"{min(missing).group_id}; {len(missing)} groups lack theirs"
        )
    needed: set[GroupKey] = set()
    for key in served:
        needed.update(key.list_ancestry(generation.model_spec.grains))
    rows = rows.assign(serves=[key in served for key in keys])
    rows = rows[[key in needed for key in keys]]
    return PackedRun(generation, rows.drop(columns="generation"))


def write_boosters(path: Path, boosters: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Write boosters to a Parquet file in which each text is one run of bytes.

    Texts are compressed already: their column is neither compressed nor encoded, so that a reader
    needs the offset alone.

    Args:
        path: of the file.
        boosters: booster_id and text.

    Returns:
        Offset and size of each text in the file.
    """
    places: dict[str, tuple[int, int]] = {}
    settings = {
        "compression": {"booster_id": "zstd", "text": "none"},
        "use_dictionary": False,
        "write_page_checksum": True,
    }
    with (
        pa.OSFile(str(path), "wb") as sink,
        pq.ParquetWriter(sink, _BOOSTERS, **settings) as writer,
    ):
        for part in _split_row_groups(boosters):
            start = sink.tell()
            # Only the columns of the schema are taken.
            writer.write_table(pa.Table.from_pylist(part, schema=_BOOSTERS))
            sink.flush()
            with path.open("rb") as written:
                written.seek(start)
                content = written.read()
            at = 0
            for row in part:
                at = content.index(row["text"], at)
                places[row["booster_id"]] = start + at, len(row["text"])
                at += len(row["text"])
    return places


def _split_row_groups(boosters: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    n_bytes = 0
    for row in boosters:
        part.append(row)
        n_bytes += len(row["text"])
        if n_bytes >= ROW_GROUP_BYTES:
            yield part
            part = []
            n_bytes = 0
    if part:
        yield part


def _list_chains(runs: Sequence[PackedRun]) -> pd.DataFrame:
    """One row per generation and group, sorted as in the pack, without where the boosters are."""
    parts = []
    for number, run in enumerate(runs):
        ledger = run.ledger
        levels = run.generation.model_spec.intervals
        halves = [_read_half_widths(written, levels) for written in ledger["intervals"]]
        parts.append(
            ledger[["grain", "group_id", "booster_id"]].assign(
                weight=ledger["weight"].fillna(0.0),
                generation=number,
                serves=ledger.get("serves", True),
                intervals=pd.Series(halves, index=ledger.index, dtype=object),
            )
        )
    return pd.concat(parts).sort_values(["grain", "group_id", "generation"], ignore_index=True)


def _read_half_widths(written: object, levels: Sequence[float]) -> list[float | None] | None:
    """One half width per level, from a ledger's JSON, or as a chain has them.

    None for a group that has none of its own.
    """
    if isinstance(written, list | np.ndarray):  # from a pack's chain
        return list(map(_number_or_none, written))
    if not isinstance(written, str):
        return None
    half_widths = {float(level): half for level, half in json.loads(written).items()}
    return list(map(half_widths.get, levels))


def _number_or_none(value: float | None) -> float | None:
    if value is None or np.isnan(value):
        return None
    return float(value)


def _write_tables(
    folder: Path,
    runs: Sequence[PackedRun],
    chains: pd.DataFrame,
    places: Mapping[str, Mapping[str, Any]],
    *,
    root: str | None,
    files: Sequence[dict[str, Any]],
) -> str:
    """Write chains, spec and index; the index's digest."""
    first_keys = _write_chains(folder / "chains.parquet", chains, places)
    own = runs[0].generation
    spec = json.dumps(
        {"generations": [_describe_generation(run).to_dict() for run in runs]},
        ensure_ascii=False,
        indent=1,
    ).encode()
    (folder / "spec.json").write_bytes(spec)
    index = {
        "format": PACK_FORMAT,
        "fleet": own.model_spec.fleet,
        "fleet_version": own.fleet_version,
        "n_chains": len(chains),
        "n_boosters": len(places),
        "spec.json": {"n_bytes": len(spec), "sha256": hashlib.sha256(spec).hexdigest()},
        "chains.parquet": {
            **read_footer(folder / "chains.parquet"),
            "first": list(map(list, first_keys)),
        },
        "boosters": {"root": root, "files": list(files)},
    }
    digest = index_digest(index)
    (folder / "index.json").write_text(
        json.dumps({"sha256": digest, "index": index}, ensure_ascii=False), encoding="utf-8"
    )
    return digest


def _write_chains(
    path: Path, chains: pd.DataFrame, places: Mapping[str, Mapping[str, Any]]
) -> list[GroupKey]:
    """Write the chains, each with the place of its booster; the first group of each row group."""
    rows = records(chains)
    for row in rows:
        row.update(places.get(row["booster_id"], {}))
    table = pa.Table.from_pylist(rows, schema=CHAINS)
    keys = GroupKey.of_rows(chains)
    first_keys = []
    with pq.ParquetWriter(path, CHAINS, compression="zstd", write_page_checksum=True) as writer:
        for start, end in _find_row_groups(keys):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
            first_keys.append(keys[start])
    return first_keys


def _describe_generation(run: PackedRun) -> Generation:
    """A run's entry in spec.json.

    A run that comes from a pack already says which groups the constant answers.
    """
    if "answered_by" not in run.ledger:
        return run.generation
    rows = run.ledger[run.ledger["answered_by"] == BY_CONSTANT].sort_values(["grain", "group_id"])
    return replace(run.generation, answered_by_constant=tuple(GroupKey.of_rows(rows)))


def _find_row_groups(keys: Sequence[GroupKey]) -> list[tuple[int, int]]:
    """Where row groups start and end: about as many rows in each, all rows of a group in one."""
    starts = list(range(0, len(keys), CHAINS_PER_ROW_GROUP))
    for number in range(1, len(starts)):
        while starts[number] < len(keys) and keys[starts[number]] == keys[starts[number] - 1]:
            starts[number] += 1
    bounds = pairwise([*starts, len(keys)])
    return [(start, end) for start, end in bounds if end > start]
