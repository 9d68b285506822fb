"""Writing the pack of one version; `meta_model.FleetModel` reads it."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
            answered_by. Where a column `serves` is there and false, the row is there for its finer
            groups alone.
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
    constants = [
        np.array([run.generation.constant, run.generation.constant_without_offset], dtype=float)
        for run in (one, other)
    ]
    # Sums over rows in another order differ in their last digits.
    if not np.allclose(constants[0], constants[1], rtol=1e-9, equal_nan=True):
        return False
    names = ["grain", "group_id", "booster_id", "intervals", "answered_by"]
    ledgers = [run.ledger.sort_values(["grain", "group_id"]) for run in (one, other)]
    chains = [records(ledger.reindex(columns=names)) for ledger in ledgers]
    weights = [ledger["weight"].to_numpy(dtype=float) for ledger in ledgers]
    return chains[0] == chains[1] and bool(np.allclose(weights[0], weights[1], atol=1e-8))


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
    target, scoring = spec.target, spec.scoring
    always = [*spec.finest, *(name for name in (target.offset, target.scale) if name)]
    optional = [name for name in spec.feature_columns if name in nullable and name not in always]
    needed = dict.fromkeys([*spec.finest, *spec.feature_columns, *always])
    return ModelSpec(
        fleet=spec.name,
        grains=tuple(tuple(grain) for grain in spec.grains),
        features=tuple(spec.feature_columns),
        categories={name: tuple(values) for name, values in categories.items()},
        required=tuple(name for name in needed if name not in optional),
        optional=tuple(optional),
        task=spec.task,
        own=own,
        is_count=spec.objective in COUNTED,
        classes=tuple(classes),
        prior=tuple(prior),
        target=ModelTarget(target.column, target.transform, target.offset, target.scale),
        interval=None if spec.is_class_task else scoring.interval,
        intervals=() if spec.is_class_task else tuple(scoring.levels),
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
        listed = {
            **read_footer(file),
            "path": f"boosters-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.parquet",
        }
        self.filesystem.create_dir(self.path, recursive=True)
        # Another file of this name is the same one, whole or half written.
        pf.copy_files(
            str(file),
            f"{self.path}/{listed['path']}",
            source_filesystem=pf.LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )
        return listed


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
        boosters: rows of the booster store for ids; more than asked for do no harm, and are left
            out.
        store: where a shared pack keeps its boosters; None puts them into the folder.
        before: versions whose boosters need not be stored again, where they are in the same store.

    Returns:
        The digest of its index, by which the version is known.

    Raises:
        StoreError: if a booster that a ledger names is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chains = _list_chains(runs)
    booster_ids = list(dict.fromkeys(chains["booster_id"].dropna()))
    files, places = _find_stored(before, store, booster_ids)
    new = [name for name in booster_ids if name not in places]
    rows = _read_boosters(boosters, new)
    if new or store is None:
        path = folder / "boosters.parquet"
        offsets = write_boosters(path, [rows[name] for name in new])
        for name in new:
            row = rows[name]
            places[name] = {
                **_place(len(files), *offsets[name]),
                "n_bytes": row["n_bytes"],
                "sha256": row["sha256"],
            }
        files.append({"path": path.name, **read_footer(path)} if store is None else store.add(path))
        if store is not None:
            path.unlink()
    return _write_tables(
        folder, runs, chains, places, root=None if store is None else store.root, files=files
    )


def _read_boosters(
    boosters: Callable[[Sequence[str]], Iterable[Mapping[str, Any]]], names: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """The named rows of a booster store, by id; a store is not asked for none.

    Raises:
        StoreError: if one is missing.
    """
    if not names:
        return {}
    named = set(names)
    rows = {row["booster_id"]: row for row in boosters(names) if row["booster_id"] in named}
    missing = [name for name in names if name not in rows]
    if missing:
        raise StoreError(
            f"booster store lacks {len(missing)} boosters that the ledger names, e.g. "
            f"{min(missing)}; train again"
        )
    return rows


def _place(file: int, offset: int, stored_bytes: int) -> dict[str, Any]:
    return {"file": file, "offset": offset, "stored_bytes": stored_bytes}


def _find_stored(
    before: Sequence[FleetModel], store: PackStore | None, booster_ids: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Files of the store, and where in them earlier versions have boosters needed again."""
    needed = set(booster_ids)
    numbers: dict[str, int] = {}
    files: list[dict[str, Any]] = []
    places: dict[str, dict[str, Any]] = {}
    same_store = [model for model in before if store is not None and model.root == store.root]
    for model, chain in ((one, chain) for one in same_store for chain in one.chains()):
        name = chain.booster_id
        if name is None or name not in needed or name in places:
            continue
        number, offset, stored_bytes = chain.place
        path = model.files[number]["path"]
        if path not in numbers:
            numbers[path] = len(files)
            files.append(dict(model.files[number]))
        places[name] = {
            **_place(numbers[path], offset, stored_bytes),
            "n_bytes": chain.n_bytes,
            "sha256": chain.sha256,
        }
    return files, places


def combine_versions(
    serving: Mapping[GroupKey, str], models: Sequence[FleetModel]
) -> list[PackedRun]:
    """What a version consists of in which each group is answered by the run that is named for it.

    Args:
        serving: fleet version by group.
        models: packs that together have the chains of these groups, and of their ancestors; of two
            that have the same the first is taken.

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
            generations.setdefault(generation.fleet_version, generation)
            tables.setdefault(generation.fleet_version, []).append(
                rows[rows["generation"] == number]
            )
    groups_of: dict[str, set[GroupKey]] = {}
    for key, version in serving.items():
        groups_of.setdefault(version, set()).add(key)
    runs: list[PackedRun] = []
    for version, generation in generations.items():
        if version not in groups_of:
            continue
        served = groups_of[version]
        rows = pd.concat(tables[version]).drop_duplicates(["grain", "group_id"])
        keys = GroupKey.of_rows(rows)
        if lacking := served - set(keys):
            first = min(lacking)[1]
            raise ModelNotFound(
                f"no pack has the chain that version {version} has for group {first}; "
                f"{len(lacking)} groups lack theirs"
            )
        needed = {
            above for key in served for above in key.list_ancestry(generation.model_spec.grains)
        }
        rows = rows.assign(serves=[key in served for key in keys])
        rows = rows[[key in needed for key in keys]]
        runs.append(PackedRun(generation, rows.drop(columns="generation")))
    if lacking_versions := set(groups_of) - set(generations):
        raise ModelNotFound(
            f"no pack holds version {min(lacking_versions)}; available: {', '.join(generations)}"
        )
    return runs


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
            writer.write_table(
                pa.Table.from_pylist(
                    [{name: row[name] for name in _BOOSTERS.names} for row in part],
                    schema=_BOOSTERS,
                )
            )
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
            part, n_bytes = [], 0
    if part:
        yield part


def _list_chains(runs: Sequence[PackedRun]) -> pd.DataFrame:
    """One row per generation and group, sorted as in the pack, without where the boosters are."""
    parts = []
    for number, run in enumerate(runs):
        rows = run.ledger[["grain", "group_id", "booster_id", "weight"]].assign(generation=number)
        halves = [
            _read_half_widths(written, run.generation.model_spec.intervals)
            for written in run.ledger["intervals"]
        ]
        rows = rows.assign(serves=run.ledger.get("serves", True), weight=rows["weight"].fillna(0.0))
        parts.append(rows.assign(intervals=pd.Series(halves, index=rows.index, dtype=object)))
    return pd.concat(parts).sort_values(["grain", "group_id", "generation"], ignore_index=True)


def _read_half_widths(written: object, levels: Sequence[float]) -> list[float | None] | None:
    """One half width per level, from a ledger's JSON, or as a chain has them.

    None for a group that has none of its own.
    """
    if isinstance(written, list | np.ndarray):  # from a pack's chain
        return [None if half is None or np.isnan(half) else float(half) for half in written]
    if not isinstance(written, str):
        return None
    found = {float(level): half for level, half in json.loads(written).items()}
    return [found.get(level) for level in levels]


def _write_tables(
    folder: Path,
    runs: Sequence[PackedRun],
    chains: pd.DataFrame,
    places: Mapping[str, Mapping[str, Any]],
    *,
    root: str | None,
    files: Sequence[Mapping[str, Any]],
) -> str:
    """Write chains, spec and index; the index's digest."""
    rows = [{**row, **places.get(row["booster_id"], {})} for row in records(chains)]
    table = pa.Table.from_pylist(
        [{field.name: row.get(field.name) for field in CHAINS} for row in rows], schema=CHAINS
    )
    keys = [GroupKey.of(row) for row in rows]
    bounds = _find_row_groups(keys)
    with pq.ParquetWriter(
        folder / "chains.parquet", CHAINS, compression="zstd", write_page_checksum=True
    ) as writer:
        for start, end in bounds:
            writer.write_table(table.slice(start, end - start), row_group_size=max(1, end - start))
    own = runs[0].generation
    first_keys = [list(keys[start]) for start, _ in bounds]
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
        "n_chains": len(rows),
        "n_boosters": len(places),
        "spec.json": {"n_bytes": len(spec), "sha256": hashlib.sha256(spec).hexdigest()},
        "chains.parquet": {
            **read_footer(folder / "chains.parquet"),
            "first": first_keys,
        },
        "boosters": {"root": root, "files": [dict(file) for file in files]},
    }
    digest = index_digest(index)
    (folder / "index.json").write_text(
        json.dumps({"sha256": digest, "index": index}, ensure_ascii=False), encoding="utf-8"
    )
    return digest


def _describe_generation(run: PackedRun) -> Generation:
    """A run's entry in spec.json.

    One that comes from a pack says already which groups the constant answers.
    """
    if "answered_by" not in run.ledger:
        return run.generation
    rows = run.ledger[run.ledger["answered_by"] == BY_CONSTANT].sort_values(["grain", "group_id"])
    return replace(run.generation, answered_by_constant=tuple(GroupKey.of_rows(rows)))


def _find_row_groups(keys: Sequence[GroupKey]) -> list[tuple[int, int]]:
    """Where row groups start and end: about as many rows in each, all rows of a group in one."""
    starts = [0, *range(CHAINS_PER_ROW_GROUP, len(keys), CHAINS_PER_ROW_GROUP)] if keys else []
    for number in range(1, len(starts)):
        while starts[number] < len(keys) and keys[starts[number]] == keys[starts[number] - 1]:
            starts[number] += 1
    ends = [*starts[1:], len(keys)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]
