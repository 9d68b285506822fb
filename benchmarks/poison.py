"""A fleet of 200 groups, nine of them poisoned: the run succeeds, the others are trained, and each of the nine is accounted for as it should be.

`python -m benchmarks.poison FOLDER` prints what became of the nine.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from benchmarks.engine import Engine
from benchmarks.generated import GeneratedFleet, write_features
from benchmarks.invariants import check_fleet
from pipeline.models.meta_model import group_id
from pipeline.runs.history import History
from pipeline.runs.request import Request
from pipeline.spark.planning import plan_run
from pipeline.spark.training_run import train_run
from pipeline.testing.doubles import FailingTrainer
from pipeline.testing.runs import own_tables, quiet_context
from resources.lease import hold_lease

Rows = pd.DataFrame

NAME = "poisoned"
GRAINS = ((), ("group",))
N_GROUPS = 200
FLEET = GeneratedFleet(N_GROUPS, rows_per_group=170, skew=0.2, minimum_rows=160, seed=23)
KILL_AFTER_SECONDS = 10.0
TUNING: Mapping[str, float] = {
    "max_trials": 2,
    "patience": 2,
    "max_rounds": 60,
    "kill_after_seconds": KILL_AFTER_SECONDS,
}
GROUP_MEMORY_BYTES = 512 << 20
FEW_ROWS = 30
TRAINED = ("trained", None)


@dataclass(frozen=True)
class Poison:
    """What is wrong with a group.

    Args:
        what: in a few words.
        group: the generated group that it is made from.
        expected: status and reason that its ledger row must have.
        rows: makes its rows what they are; by default they stay.
        harm: what training it does, as `FailingTrainer` takes it; empty for none.
        error_class: that its ledger row must name; null for none.
        key: by which it goes in the data; empty for the generated one.
    """

    what: str
    group: str
    expected: tuple[str, str | None]
    rows: Callable[[Rows], Rows] = lambda rows: rows
    harm: str = ""
    error_class: str | None = None
    key: str = ""

    @property
    def group_id(self) -> str:
        """As the ledger has it."""
        return group_id([self.key or self.group])

    def poisoned(self, rows: Rows) -> Rows:
        """Its rows, from those of the generated group."""
        changed = self.rows(rows)
        return (
            changed.assign(
                group=self.key,
                row_key=changed["row_key"].str.replace(self.group, self.key, regex=False),
            )
            if self.key
            else changed
        )


def _with_target(value: float) -> Callable[[Rows], Rows]:
    return lambda rows: rows.assign(y=value)


POISONS = (
    Poison(
        "exception", "g00010", ("failed", "error"), harm="raise", error_class="ZeroDivisionError"
    ),
    Poison(
        "too few rows",
        "g00030",
        ("inherited", "too_few_rows"),
        rows=lambda rows: rows.tail(FEW_ROWS),
    ),
    Poison("constant target", "g00050", ("inherited", "constant_target"), rows=_with_target(7.0)),
    Poison("all-null target", "g00070", ("inherited", "no_target"), rows=_with_target(np.nan)),
    Poison(
        "infinite target", "g00090", ("inherited", "infinite_target"), rows=_with_target(np.inf)
    ),
    Poison("time-out", "g00110", ("failed", "timeout"), harm="hang", error_class="TimeoutError"),
    Poison(
        "out of memory", "g00130", ("failed", "error"), harm="memory", error_class="MemoryError"
    ),
    Poison(
        "native crash", "g00150", ("crashed", "native_crash"), harm="SEGV", error_class="SIGSEGV"
    ),
    Poison("key ../x", "g00170", TRAINED, key="../x"),
)
HARMLESS = tuple(poison for poison in POISONS if poison.expected == TRAINED)


@dataclass(frozen=True)
class Poisoned:
    """What became of the poisoned fleet.

    Args:
        ledger: rows of all groups.
        poisons: one row per poison: what, group_id, expected, found, error_class, error_message,
            is_right.
        violations: of the invariants.
        seconds: wall seconds of the run.
    """

    ledger: pd.DataFrame
    poisons: pd.DataFrame
    violations: Sequence[str]
    seconds: float

    @property
    def counts(self) -> Mapping[str, float]:
        """What the figure compares."""
        finest, pooled = (
            self.ledger[self.ledger["grain"] == 1],
            self.ledger[self.ledger["grain"] == 0],
        )
        harmful = ~self.poisons["group_id"].isin([poison.group_id for poison in HARMLESS])
        return {
            "trained": float((finest["status"] == "trained").sum()),
            "right-status": float((self.poisons["is_right"] & harmful).sum()),
            "odd-key-trained": float((self.poisons["is_right"] & ~harmful).sum()),
            "pooled-trained": float((pooled["status"] == "trained").sum()),
            "groups": float(len(finest)),
            "violations": float(len(self.violations)),
            "seconds": self.seconds,
        }


def poison(folder: Path) -> Mapping[str, float]:
    """The figure: how many of 200 groups were trained, and how many of the poisoned ones have the right status and reason.

    Args:
        folder: for tables and scratch files.
    """
    found = train_poisoned(folder)
    print(found.poisons.drop(columns="group_id").to_string(index=False), flush=True)
    print("\n".join(found.violations), flush=True)
    return found.counts


def poisoned_rows(poisons: Sequence[Poison] = POISONS, fleet: GeneratedFleet = FLEET) -> Rows:
    """The rows of the fleet, with those of the poisoned groups as they are to be."""
    rows, of_group = fleet.rows(), {poison.group: poison for poison in poisons}
    parts = [
        of_group[group].poisoned(part) if group in of_group else part
        for group, part in rows.groupby("group", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


def train_poisoned(
    folder: Path, poisons: Sequence[Poison] = POISONS, fleet: GeneratedFleet = FLEET
) -> Poisoned:
    """Train the poisoned fleet once.

    Args:
        folder: for tables and scratch files.
        poisons: what is wrong, and with which groups.
        fleet: the fleet before it is poisoned.
    """
    tables = folder / "tables" / NAME
    _write(poisoned_rows(poisons, fleet), tables / "features", fleet)
    harm = FailingTrainer({poison.group_id: poison.harm for poison in poisons if poison.harm})
    started = time.monotonic()
    with Engine(folder) as engine, hold_lease(engine.tables, NAME, "run") as lease:
        spark, location = engine.spark.session, engine.tables.location(NAME, "features")
        version, history = (
            engine.tables.version(location),
            History.read(own_tables(engine.tables, NAME)),
        )
        features = engine.tables.read_spark(spark, location, version)
        run = plan_run(
            quiet_context(spark, slots=engine.slots),
            features,
            fleet.spec(tuning=TUNING),
            Request("run"),
            history,
        )
        cluster = quiet_context(spark, memory_bytes=GROUP_MEMORY_BYTES, train=harm)
        train_run(
            cluster,
            own_tables(engine.tables, NAME),
            run,
            fleet.spec(tuning=TUNING),
            features_version=version,
            lease=lease,
        )
    seconds = time.monotonic() - started
    ledger = DeltaTable(tables / "ledger").to_pandas()
    return Poisoned(
        ledger,
        _judged(ledger, poisons),
        check_fleet(tables, features=tables / "features", grains=GRAINS),
        seconds,
    )


def _write(rows: Rows, location: Path, fleet: GeneratedFleet) -> None:
    """Replace the rows of a generated feature table; its schema stays."""
    write_features(replace(fleet, n_groups=1), location, n_files=1)
    schema = pa.schema(DeltaTable(location).schema().to_arrow())
    zoned = rows.assign(**{name: rows[name].dt.tz_localize("UTC") for name in ("time", "known_at")})
    write_deltalake(
        location, pa.Table.from_pandas(zoned, schema=schema, preserve_index=False), mode="overwrite"
    )


def _judged(ledger: pd.DataFrame, poisons: Sequence[Poison]) -> pd.DataFrame:
    """Each poison beside its ledger row."""
    rows = ledger[ledger["grain"] == 1].set_index("group_id", verify_integrity=True)
    judged = []
    for one in poisons:
        row = (
            rows.loc[one.group_id]
            if one.group_id in rows.index
            else pd.Series(dtype=object).reindex(rows.columns)
        )
        status, reason, error_class, message = (
            None if pd.isna(row[name]) else str(row[name])
            for name in ("status", "reason", "error_class", "error_message")
        )
        told = {
            "expected": _text(one.expected),
            "found": _text((status, reason)),
            "error_class": error_class,
            "error_message": message,
        }
        is_right = ((status, reason), error_class) == (one.expected, one.error_class)
        judged.append({"what": one.what, "group_id": one.group_id, **told, "is_right": is_right})
    return pd.DataFrame(judged)


def _text(told: tuple[str | None, str | None]) -> str:
    return ": ".join(str(part) for part in told if part is not None) or "no ledger row"


def main(arguments: Sequence[str]) -> int:
    """Print what became of the poisoned groups.

    The exit status tells whether all is as it should be.
    """
    if len(arguments) != 1:
        print("usage: python -m benchmarks.poison FOLDER (for tables and scratch files)")
        return 2
    counts = poison(Path(arguments[0]))
    print("\n".join(f"{name} {value:g}" for name, value in counts.items()))
    harmful = len(POISONS) - len(HARMLESS)
    wanted = {
        "trained": N_GROUPS - harmful,
        "right-status": harmful,
        "odd-key-trained": len(HARMLESS),
        "pooled-trained": 1,
        "violations": 0,
    }
    return int(any(counts[name] != value for name, value in wanted.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
