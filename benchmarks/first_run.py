"""First launches of generated fleets of every kind: each must end green, with every row answered."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import numpy.typing as npt
import pandas as pd

from assets.fleet import DescribedFleet
from assets.settings import FleetFiles
from benchmarks.engine import Engine
from benchmarks.runs import NotMeasured, Runs
from pipeline.spec import FleetSpec, parse_spec
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry

Floats = npt.NDArray[np.float64]

N_FLEETS = 40
FEWEST_GROUPS, MOST_GROUPS = 20, 400
DAYS = 150
START = pd.Timestamp("2024-01-01")
# Of the rows: how strongly a day's noise depends on the day before.
PERSISTENCE = 0.8
OFFSET = "offset"
SQL = "SELECT region, shop, day, x1, x2, known, weight, y FROM rows"
# What each kind changes in the attributes of a fleet; `target_of` makes its target.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "counts": {"tuning": {"objective": "poisson"}},
    "zeros": {"tuning": {"objective": "tweedie"}},
    "heavy tails": {},
    "log of heavy tails": {"target": {"column": "y", "transform": "log"}},
    OFFSET: {"target": {"column": "y", "offset": "known"}, "baselines": {"as planned": "known"}},
    "l1": {"tuning": {"objective": "l1"}},
    "quantile": {"tuning": {"objective": "quantile", "alpha": 0.9}},
    "huber, weighted": {
        "tuning": {"objective": "huber"},
        "target": {"column": "y", "weight": "weight"},
    },
    "two classes": {"task": "binary"},
    "classes": {"task": "multiclass"},
}


@dataclass(frozen=True)
class Launched:
    """How the first launch of a fleet ended.

    Args:
        kind: of the fleet.
        n_groups: finest groups.
        is_green: every link was materialised, and no check failed as an error.
        is_answered: there were rows to score, and each has an answer.
        seconds: wall time.
        told: what went wrong; empty for nothing.
    """

    kind: str
    n_groups: int
    is_green: bool
    is_answered: bool
    seconds: float
    told: str = ""


def first_run_answers(runs: Runs, numbers: Sequence[int] = range(N_FLEETS)) -> Mapping[str, float]:
    """Share of generated fleets whose first launch ends green with every row answered."""
    found = []
    with Engine(runs.new_folder()) as engine:
        for number in numbers:
            launched = launch(engine, number)
            found.append(launched)
            told = (
                "green, answered"
                if launched.is_green and launched.is_answered
                else f"NOT: {launched.told}"
            )
            print(
                f"  fleet {number}: {launched.kind}, {launched.n_groups} groups, "
                f"{launched.seconds:.0f} s: {told}",
                flush=True,
            )
    if not found:
        raise NotMeasured("no fleet was launched")
    answered = [launched.is_green and launched.is_answered for launched in found]
    return {
        "": float(np.mean(answered)),
        "fleets": len(found),
        "groups": sum(launched.n_groups for launched in found),
        "seconds-per-fleet": float(np.mean([launched.seconds for launched in found])),
    }


def launch(engine: Engine, number: int) -> Launched:
    """Launch a generated fleet for the first time, with a data root and a registry of its own.

    Args:
        engine: whose session it uses.
        number: of the fleet; all that is random follows from it.
    """
    folder = engine.folder / f"fleet-{number}"
    folder.mkdir()
    kind = list(KINDS)[number % len(KINDS)]
    # Every other fleet has rows that wait for their answer, the others answer days that are made
    # up.
    rows = generated_rows(kind, number, n_waiting=2 * (1 - number % 2))
    rows.to_parquet(folder / "rows.parquet", index=False)
    spec = spec_of(kind, is_future=number % 2 == 1)
    started = time.monotonic()
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    resources = _resources(engine, folder)
    result = dg.materialize(
        links_of(spec, folder), resources=resources, run_config=quiet, raise_on_error=False
    )
    seconds = time.monotonic() - started
    wrong = [
        str(event.step_failure_data.error) for event in result.all_events if event.is_step_failure
    ]
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    wrong += [
        f"{name}: {check.description or dict(check.metadata)}"
        for name, check in checks.items()
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    ]
    answers = checks.get("every_row_is_answered")
    n_rows = 0 if answers is None else int(str(answers.metadata["rows_to_score"].value))
    is_answered = answers is not None and answers.passed and n_rows > 0
    told = "; ".join(wrong)[:400] or ("" if is_answered else f"{n_rows} rows to score")
    return Launched(
        kind, rows["shop"].nunique(), result.success and not wrong, is_answered, seconds, told
    )


def links_of(spec: FleetSpec, folder: Path) -> list[Any]:
    """All assets and checks of a fleet whose sources are in a folder."""
    definitions = DescribedFleet(spec, FleetFiles(folder, SQL)).build_defs()
    return [*(definitions.assets or []), *(definitions.asset_checks or [])]


def _resources(engine: Engine, folder: Path) -> dict[str, Any]:
    registry = MlflowRegistry(
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        artifact_root=f"{folder}/artifacts",
        scratch=str(folder / "scratch"),
    )
    return {
        # The session is the engine's; a resource of the launch would stop it.
        "spark": dg.ResourceDefinition.hardcoded_resource(engine.spark),
        "tables": DeltaTables(root=str(folder / "tables")),
        "registry": registry,
        "launch": LaunchSettings(),
    }


def spec_of(kind: str, *, is_future: bool) -> FleetSpec:
    """The spec of a fleet of that kind: shops by day, scored for the two days after the last that has a target.

    Args:
        kind: as in `KINDS`.
        is_future: whether these days are made up, and not rows of the data.
    """
    attributes: dict[str, Any] = {
        "name": "generated",
        "sources": [{"name": "rows", "uri": "rows.parquet"}],
        "features": {
            "columns": [] if is_future else ["x1"],
            "lags": [{"column": "x1", "periods": [2]}, {"column": "x2", "periods": [2]}],
            "calendar": ["day_of_week"],
        },
        "grains": [[], ["region"], ["region", "shop"]],
        "entity": ["region", "shop"],
        "time": "day",
        "period": "1 day",
        "horizon": "2 days",
        "target": {"column": "y"},
        "splits": {"report": "20 days", "tune": "20 days"},
        "scoring": {"score": "future" if is_future else "new"},
    }
    changes = dict(KINDS[kind])
    if kind == OFFSET and is_future:
        # What is planned for a made-up day is what was planned two days before.
        attributes["features"]["lags"] = [
            {"column": "known", "periods": [2]},
            *attributes["features"]["lags"],
        ]
        changes = {
            "target": {"column": "y", "offset": "known_lag_2"},
            "baselines": {"as planned": "known_lag_2"},
        }
    tuning = {"max_trials": 2, "patience": 1, "max_rounds": 60, **changes.get("tuning", {})}
    return parse_spec({**attributes, **changes, "tuning": tuning}, file="generated")


def generated_rows(kind: str, seed: int, n_waiting: int) -> pd.DataFrame:
    """The rows of a fleet: shops of very different sizes and levels, some of a few days, some that never change, with noise that persists.

    Args:
        kind: of the fleet.
        seed: of all that is random.
        n_waiting: days at the end whose rows have no target yet.

    Returns:
        One row per shop and day: region, shop, day, x1, x2, known (an offset for those who want
        one), weight (0 in a tenth of the rows) and y.
    """
    random = np.random.default_rng(seed)
    n_groups = int(np.exp(random.uniform(np.log(FEWEST_GROUPS), np.log(MOST_GROUPS))))
    parts = []
    for number in range(n_groups):
        n_days = DAYS if random.random() < 0.7 else int(random.integers(1, DAYS))  # noqa: PLR2004 - three shops in ten are young
        days = pd.date_range(START + pd.Timedelta(days=DAYS - n_days), periods=n_days, freq="D")
        x1, x2 = random.normal(size=(2, n_days))
        noise = _persistent(random, n_days)
        signal = random.normal() + random.normal() * x1 + noise
        part = pd.DataFrame(
            {"region": f"r{number % 5}", "shop": f"s{number}", "day": days, "x1": x1, "x2": x2}
        )
        part["known"] = np.cumsum(random.normal(size=n_days)) + random.normal(0, 10)
        is_weightless = random.random(n_days) < 0.1  # noqa: PLR2004 - one in ten
        part["weight"] = np.where(is_weightless, 0.0, random.uniform(0.5, 2.0, n_days))
        is_constant = random.random() < 0.03  # noqa: PLR2004 - and one in thirty never changes
        part["y"] = target_of(
            kind, np.zeros(n_days) if is_constant else signal, part["known"].to_numpy(), random
        )
        parts.append(part)
    rows = pd.concat(parts, ignore_index=True)
    waits = rows["day"] > rows["day"].max() - pd.Timedelta(days=n_waiting)
    return rows.assign(y=rows["y"].mask(waits))


def _persistent(random: np.random.Generator, n_days: int) -> Floats:
    """Noise of which most stays until the next day."""
    noise = random.normal(size=n_days)
    for day in range(1, n_days):
        noise[day] += PERSISTENCE * noise[day - 1]
    return noise


def target_of(kind: str, signal: Floats, known: Floats, random: np.random.Generator) -> Any:
    """The target of a kind of fleet.

    Args:
        kind: as in `KINDS`.
        signal: about 0, in units of its noise; 0 throughout for a shop that never changes.
        known: what the target is planned to be.
        random: for what no feature tells.
    """
    n_days = len(signal)
    if kind == "counts":
        target = random.poisson(np.exp(np.clip(0.5 * signal, -4, 6))).astype(float)
    elif kind == "zeros":
        is_zero = random.random(n_days) < 0.7  # noqa: PLR2004 - seven in ten
        target = np.where(is_zero, 0.0, random.gamma(2.0, np.exp(np.clip(signal, -4, 6))))
    elif kind in ("heavy tails", "log of heavy tails"):
        target = np.exp(np.clip(2.0 * signal, -12, 12)) * (1 + random.pareto(1.5, n_days))
    elif kind == OFFSET:
        target = known + 0.2 * signal
    elif kind == "two classes":
        target = np.where(signal + random.normal(size=n_days) > 1.0, "yes", "no")
    elif kind == "classes":
        target = np.array(["low", "middle", "high"])[np.digitize(signal, [-1.0, 1.0])]
    else:
        target = signal + random.standard_t(3, n_days) * (signal != 0)
    return target
