"""Stand-ins with the methods of the real adapters: in memory, failing on demand, or counting.

They import neither Dagster nor Spark; an asset takes them wherever it asks for `tables` or
`registry`.
"""

import datetime as dt
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ModelNotFound, StoreError
from pipeline.models.meta_model import FleetModel, group_ids
from pipeline.models.registry import ModelInterface, RunRecord
from pipeline.models.start import Start
from pipeline.storage import AppTransaction, Snapshot, WrittenFile
from pipeline.training.outcome import Outcome
from pipeline.training.trainer import NO_START, TrainingSettings, train_group


@dataclass
class MemoryTables:
    """Delta tables without a disk: Arrow tables per location and version.

    Args:
        root: first part of every location; nothing is written there.
        storage_options: as the real store's, unused.
    """

    root: str = "memory"
    storage_options: dict[str, str] = field(default_factory=dict)
    _written: dict[str, pa.Table] = field(default_factory=dict)
    _versions: dict[str, list[tuple[pa.Schema, dict[str, str]]]] = field(default_factory=dict)
    _commits: dict[str, tuple[dt.datetime, dict[str, str]]] = field(default_factory=dict)
    _transactions: set[tuple[str, str, int]] = field(default_factory=set)

    def location(self, namespace: str, *parts: str) -> str:
        """Root of one table."""
        return "/".join([self.root, namespace, *parts])

    def write_file(self, table: pa.Table, schema: pa.Schema, location: str) -> WrittenFile | None:
        """Keep rows without committing them; None for no rows."""
        if table.num_rows == 0:
            return None
        kept = table.select(schema.names).cast(schema)
        file = WrittenFile(f"part-{len(self._written)}.parquet", kept.nbytes, kept.num_rows)
        self._written[f"{location}/{file.path}"] = kept
        return file

    def write_spark(
        self,
        frame: Any,
        location: str,
        *,
        mode: str = "overwrite",
        partition: Mapping[str, str] | None = None,
        before_commit: Callable[[Any], Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Collect a Spark data frame and make one commit; returns the version."""
        table = frame.toArrow()
        if before_commit is not None:
            before_commit(frame)
        files = []
        file = self.write_file(table, table.schema, location)
        if file is not None:
            files.append(file)
        return self.commit(
            location, files, table.schema, mode=mode, partition=partition, metadata=metadata
        )

    def commit(
        self,
        location: str,
        files: Sequence[Any],
        schema: pa.Schema,
        *,
        mode: str,
        partition: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        app: AppTransaction | None = None,
    ) -> int:
        """Make one commit of written files; returns the version.

        Raises:
            StoreError: if a file was not written, or has another size, or a later transaction
                fences the commit off.
        """
        for file in files:
            written = self._written.get(f"{location}/{file.path}")
            if written is None or written.nbytes != file.size:
                raise StoreError(
                    f"{location}/{file.path} is missing or was not written whole; "
                    "nothing was committed: run again"
                )
        versions = self._versions.setdefault(location, [])
        if app is not None and self._has_seen(app, location):
            return len(versions) - 1
        committed: dict[str, str] = {}
        if versions:
            committed |= versions[-1][1]
        value = "/".join(f"{name}={text}" for name, text in (partition or {}).items())
        if mode == "overwrite":
            for path, value_before in list(committed.items()):
                if not value or value_before == value:
                    del committed[path]
        for file in files:
            committed[file.path] = value
        versions.append((schema, committed))
        self._commits[location] = (dt.datetime.now(dt.UTC), dict(metadata or {}))
        if app is not None:
            self._transactions.add((location, app.app_id, app.number))
        return len(versions) - 1

    def _has_seen(self, app: AppTransaction, location: str) -> bool:
        """Whether a table holds a commit of that number, or a later one, already."""
        seen = self.transaction(location, app.app_id)
        if seen is None or seen < app.number:
            return False
        if app.is_fenced and seen > app.number:
            raise StoreError(
                f"{location}: another run has taken the fleet over and committed since"
            )
        return True

    def create(self, location: str, schema: pa.Schema, *, partition_by: Sequence[str] = ()) -> None:  # noqa: ARG002 - the real store's signature
        """Make a table without rows, unless there is one."""
        self._versions.setdefault(location, [(schema, {})])

    def transaction(self, location: str, app_id: str) -> int | None:
        """The last number that an application committed; None for none."""
        numbers = []
        for of_location, of_application, number in self._transactions:
            if (of_location, of_application) == (location, app_id):
                numbers.append(number)
        return max(numbers, default=None)

    def snapshot(self, location: str) -> Snapshot | None:
        """The newest version; None where there is no table, or it has no commit yet."""
        if location not in self._commits:
            return None
        schema, files = self._files(location, None)
        committed_at, metadata = self._commits[location]
        version = self.version(location)
        return Snapshot(
            identity=f"{location}/{version}",
            version=version,
            committed_at=committed_at,
            metadata=metadata,
            schema=schema,
            n_files=len(files),
            n_rows=sum(self._written[f"{location}/{path}"].num_rows for path in files),
        )

    def layout(self, location: str) -> tuple[pa.Schema, list[str]]:
        """A table's columns; in memory there are no partitions."""
        return self._files(location, None)[0], []

    def exists(self, location: str) -> bool:
        """Whether there is a table."""
        return location in self._versions

    def version(self, location: str) -> int:
        """Newest version of a table."""
        self._files(location, None)
        return len(self._versions[location]) - 1

    def read_arrow(
        self,
        location: str,
        *,
        where: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The rows of a table that have the values of `where`, as Arrow."""
        table = self._read(location, None)
        for name, value in (where or {}).items():
            if isinstance(value, str):
                table = _with_values(table, name, [value])
            else:
                table = _with_values(table, name, value)
        return table.select(list(columns or table.column_names))

    def read_pandas(
        self,
        location: str,
        *,
        where: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The rows of a table that have the values of `where`, as pandas."""
        rows: pd.DataFrame = self.read_arrow(location, where=where, columns=columns).to_pandas()
        return rows

    def read_spark(
        self,
        spark: Any,
        location: str,
        version: int | None = None,
        *,
        partitions: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """A table, or its named partitions, as a Spark data frame."""
        table = self._read(location, version)
        for name, values in (partitions or {}).items():
            table = _with_values(table, name, values)
        return spark.createDataFrame(table)

    def _read(self, location: str, version: int | None) -> pa.Table:
        schema, files = self._files(location, version)
        parts = [_completed(self._written[f"{location}/{path}"], schema) for path in files]
        return pa.concat_tables([schema.empty_table(), *parts])

    def _files(self, location: str, version: int | None) -> tuple[pa.Schema, dict[str, str]]:
        if location not in self._versions:
            raise StoreError(
                f"there is no Delta table at {location}; materialise the asset that writes it first"
            )
        versions = self._versions[location]
        if version is None:
            return versions[-1]
        return versions[version]


def _with_values(table: pa.Table, name: str, values: Iterable[str]) -> pa.Table:
    """The rows whose column has one of these values."""
    return table.filter(pc.is_in(table[name], value_set=pa.array(list(values), pa.string())))


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of a schema; those that they lack are null."""
    for column in schema:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    return table.select(schema.names).cast(schema)


@dataclass
class FreeLease:
    """A lease that nobody else wants; each one made has a higher fence.

    Args:
        refuse: called before each commit; raises where the lease is to be lost.
    """

    refuse: Callable[[], None] = lambda: None
    fence: int = field(default_factory=itertools.count(1).__next__)

    def check(self) -> None:
        """Do what the test asked for."""
        self.refuse()


@dataclass
class FailingTables(MemoryTables):
    """Tables in memory whose named operations fail as a full disk would.

    Args:
        broken: names of the methods that raise `StoreError`, e.g. ``{"commit"}``.
    """

    broken: frozenset[str] = frozenset({"commit"})

    def __getattribute__(self, name: str) -> Any:
        attribute = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(attribute) or name not in self.broken:
            return attribute

        def fail(*_: Any, **__: Any) -> None:
            raise StoreError(
                f"{self.root}: no space left on device ({name}); make room, then run again"
            )

        return fail


@dataclass(frozen=True)
class MemoryVersion:
    """A version of `MemoryRegistry`: registered model, number, training run."""

    name: str
    number: str
    fleet_version: str


@dataclass
class MemoryRegistry:
    """A model registry that keeps packs in a folder, and aliases in memory.

    Args:
        folder: where packs are kept.
        versions: all versions by registered model.
        aliases: number by registered model and alias.
    """

    folder: Path
    versions: dict[str, list[MemoryVersion]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)

    def register(
        self,
        name: str,
        fleet_version: str,
        *,
        pack: Path,
        interface: ModelInterface,  # noqa: ARG002 - the real registry's signature
        record: RunRecord,  # noqa: ARG002
        alias: str | None = "challenger",
    ) -> MemoryVersion:
        """Keep the pack, and give the version an alias."""
        versions = self.versions.setdefault(name, [])
        version = MemoryVersion(name, str(len(versions) + 1), fleet_version)
        shutil.copytree(pack, self._pack(version), dirs_exist_ok=True)
        versions.append(version)
        if alias is not None:
            self.aliases[name, alias] = version.number
        return version

    def find(self, name: str, alias: str) -> MemoryVersion | None:
        """The version under an alias, or of that number; None if there is none."""
        number = self.aliases.get((name, alias))
        if alias.isdecimal():
            number = alias
        for version in self.versions.get(name, []):
            if version.number == number:
                return version
        return None

    def get(self, name: str, alias: str) -> MemoryVersion:
        """The version under an alias, or of that number.

        Raises:
            ModelNotFound: if there is none.
        """
        version = self.find(name, alias)
        if version is not None:
            return version
        name_of_version = alias
        if alias.isdecimal():
            name_of_version = f"version {alias}"
        raise ModelNotFound(
            f"registered model {name!r} has no {name_of_version}; materialise {name}/models, "
            "meta_model and champion first"
        )

    def promote(self, version: MemoryVersion) -> None:
        """Let a version serve."""
        self.aliases[version.name, "champion"] = version.number

    def open_pack(
        self, version: MemoryVersion, options: Mapping[str, str] | None = None
    ) -> FleetModel:
        """A version's model."""
        return FleetModel(self._pack(version), options=options)

    def _pack(self, version: MemoryVersion) -> Path:
        return self.folder / f"{version.name}-{version.number}-{version.fleet_version}"


@dataclass(frozen=True)
class FailingTrainer:
    """Trains as `train_group` does, but does harm for the named groups.

    Args:
        harm: what happens in a group, by group id: `raise` (ZeroDivisionError), `hang`, `memory`
            (takes all there is), `KILL`, `SEGV` or another signal (the process gets it), `exit`
            (the process ends as a native library would end it).
    """

    harm: Mapping[str, str]

    def __call__(
        self, frame: pd.DataFrame, grain: int, settings: TrainingSettings, start: Start = NO_START
    ) -> Outcome:
        """Train one group, or do harm."""
        keys = settings.model_spec.grains[grain]
        group = str(group_ids(frame.head(1), keys)[0])
        harm = self.harm.get(group)
        if harm == "raise":
            raise ZeroDivisionError("division by zero, as ordered")
        if harm == "hang":
            time.sleep(1e6)
        if harm == "memory":
            hoard = []
            while True:
                hoard.append(np.ones(1 << 24))
        if harm == "exit":
            os._exit(1)
        if harm is not None:
            os.kill(os.getpid(), getattr(signal, f"SIG{harm}"))
            time.sleep(60)
        return train_group(frame, grain, settings, start)
