"""The training engine as the asset `models` drives it, on one session, timed: features ready, everything else included."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
from deltalake import DeltaTable

from benchmarks.generated import GeneratedFleet, write_features
from benchmarks.runs import NotMeasured
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.spark.planning import plan_run
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec
from pipeline.testing.runs import own_tables, quiet_context
from resources.delta_tables import DeltaTables
from resources.lease import hold_lease
from resources.spark_session import SparkSessionResource

SLOTS = 2


@dataclass(frozen=True)
class Training:
    """A finished training run.

    Args:
        seconds: wall seconds of all that the asset does: lease, plan, training, commits, blend,
            ledger.
        training_seconds: wall seconds from the first Spark job of the plan's waves to the last
            commit of one.
        run: as planned.
        ledger: as read back from its table.
        tables: folder of the fleet's tables.
    """

    seconds: float
    training_seconds: float
    run: PlannedRun
    ledger: pd.DataFrame
    tables: Path

    @property
    def own_seconds(self) -> pd.Series:
        """Seconds inside train_group, per group that was trained."""
        trained: pd.Series = self.ledger["seconds"].dropna()
        return trained


class Engine:
    """One Spark session and one root of tables, both gone at the end; a context.

    Args:
        folder: for tables and scratch files.
        memory: of the driver's JVM.
        slots: tasks at once.
    """

    def __init__(self, folder: Path, *, memory: str = "1g", slots: int = SLOTS) -> None:
        self.folder = folder
        self.slots = slots
        self.spark = SparkSessionResource(
            master=f"local[{slots},4]", memory=memory, scratch=str(folder / "scratch")
        )
        self.tables = DeltaTables(root=str(folder / "tables"))

    def __enter__(self) -> Self:
        self._held = ExitStack()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._held.enter_context(self.spark.yield_for_execution(None))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def warm_up(self) -> None:
        """Let the JVM and the Python workers have run every kind of job once, on another fleet."""
        fleet = GeneratedFleet(8, rows_per_group=150, seed=99)
        location = self.write("warm-up", fleet)
        self.train("warm-up", location, fleet.spec(tuning={"max_trials": 2}), "warm-up")

    def write(self, name: str, fleet: GeneratedFleet) -> str:
        """Write a generated fleet's feature table; its location."""
        location = self.folder / "tables" / name / "features"
        write_features(fleet, location)
        return str(location)

    def train(
        self, namespace: str, features: str, spec: FleetSpec, run_id: str, **request: Any
    ) -> Training:
        """Train a fleet once.

        Args:
            namespace: of its tables.
            features: location of its feature table.
            spec: the fleet.
            run_id: of the run.
            request: further parts of the request: as_of, retrain, listed.
        """
        spark = self.spark.session
        started = time.monotonic()
        with hold_lease(self.tables, namespace, run_id) as lease:
            own, ends = own_tables(self.tables, namespace), [0.0]
            context = quiet_context(
                spark, report=lambda _: ends.append(time.monotonic()), slots=self.slots
            )
            run = plan_run(
                context,
                self.tables.read_spark(spark, features),
                spec,
                Request(run_id, **request),
                History.read(own),
            )
            planned = time.monotonic()
            print(f"  {namespace}: {run.plan.describe()}", flush=True)
            ends = [planned]
            train_run(
                context, own, run, spec, features_version=self.tables.version(features), lease=lease
            )
        seconds = time.monotonic() - started
        tables = Path(self.tables.location(namespace))
        ledger = DeltaTable(tables / "ledger").to_pandas(filters=[("run_id", "=", run.run_id)])
        if len(ledger) != len(run.plan.groups):
            raise NotMeasured(
                f"{namespace}: {len(ledger)} ledger rows for {len(run.plan.groups)} groups"
            )
        # The last report comes when every wave is committed.
        training = ends[-1] - planned
        print(
            f"    {seconds:.1f} s, of them {training:.1f} s in waves; "
            f"{ledger['status'].value_counts().to_dict()}",
            flush=True,
        )
        return Training(seconds, training, run, ledger, tables)


def report_rmse(training: Training, grains: int) -> float:
    """RMSE of the fleet's answers over all report rows.

    Raises:
        NotMeasured: if it differs from the error that the ledger states for the pooled group.
    """
    found = report_answers(training, grains)
    ours, stated = (
        rmse(found["actual"] - found["answer"]),
        training.ledger.loc[training.ledger["grain"] == 0, "rmse"].iloc[0],
    )
    if not np.isclose(ours, stated, rtol=1e-6):
        raise NotMeasured(f"the ledger states an error of {stated}, the holdout gives {ours}")
    return ours


def rmse(errors: "pd.Series[Any]") -> float:
    """Root mean squared error."""
    return float(np.sqrt((errors.to_numpy(dtype=float) ** 2).mean()))


def report_answers(training: Training, grains: int) -> pd.DataFrame:
    """The fleet's answers to its report rows, put together from the holdout table and the ledger's weights.

    Returns:
        One row per report row: row_key, finest (its group of the finest grain), actual, answer,
        target units.
    """
    ledger, runs = training.ledger, DeltaTable(training.tables / "runs").to_pandas()
    constant = float(runs.loc[runs["run_id"] == training.run.run_id, "constant"].iloc[0])
    holdout = DeltaTable(training.tables / "holdout").to_pandas(filters=[("split", "=", "report")])
    named = ledger[["wave", "grain", "group_id", "weight"]].rename(columns={"weight": "_weight"})
    own = holdout.merge(named, on=["wave", "grain", "group_id"])
    rows = own.drop_duplicates("row_key").set_index("row_key")
    answer = pd.Series(constant, index=rows.index)
    for grain in range(grains):
        level = own[(own["grain"] == grain) & own["prediction"].notna()].set_index(
            "row_key", verify_integrity=True
        )
        prediction, weight = (
            level["prediction"].reindex(rows.index),
            level["_weight"].reindex(rows.index),
        )
        answer = (weight * prediction + (1 - weight) * answer).where(prediction.notna(), answer)
    linked = rows["offset"] + rows["scale"] * answer
    found = {
        "row_key": rows.index,
        "finest": rows["group_ids"].map(itemgetter(-1)).to_numpy(),
        "actual": rows["actual"].to_numpy(),
    }
    return pd.DataFrame({**found, "answer": linked.to_numpy()})
