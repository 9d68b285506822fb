"""Figures of the training engine: against the usual recipe, a process pool and a pooled model, on the same rows in the same run."""

import heapq
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import yaml

from assets.champion import champion_asset
from assets.meta_model import meta_model_asset
from assets.models import models_asset
from benchmarks.counting_proxy import tracking_server
from benchmarks.engine import SLOTS, Engine, Training, report_answers, report_rmse, rmse
from benchmarks.generated import GeneratedFleet, late_rows, tuning_gain, write_features
from benchmarks.judging import FLIGHTS, HOUSING, FleetFacts, judge
from benchmarks.rivals import (
    Problem,
    fleet_categories,
    overall_rmse,
    pooled_model,
    process_pool,
    usual_recipe,
)
from benchmarks.runs import PROJECT, NotMeasured, Runs
from pipeline.spec import FleetSpec, parse_spec
from pipeline.training.trainer import train_group
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import MlflowRegistry
from resources.spark_session import SparkSessionResource

# The month of December is the report split of a run that pretends it is January.
AFTER_DECEMBER = "2014-01-02"
# The product's own defaults, whatever a generated fleet says.
DEFAULT_TUNING = {"max_trials": 12, "patience": 6}
THOUSAND = GeneratedFleet(1000)
TINY_SIZES = (100, 1000, 10_000)
TRACKED_SIZES = (10, 100, 1000)
LATE_ROWS = 5
NOISE_FLEETS, NOISE_GROUPS = 5, 30
QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}
GAIN_GROUPS = 16
# LightGBM's defaults with early stopping: a trial over all rows takes minutes.
POOLED_TRIALS = 0


def _spec_of(fleet: str) -> FleetSpec:
    """The spec of an example fleet."""
    written = yaml.safe_load(
        (PROJECT / "pipeline" / "defs" / fleet / "defs.yaml").read_text(encoding="utf-8")
    )
    return parse_spec(written["attributes"], file=f"{fleet}/defs.yaml")


def _recipe(
    engine: Engine, features: Any, problem: Problem, folder: Path
) -> tuple[float, pd.DataFrame]:
    """Wall seconds of the usual recipe, warmed up like ours, and its groups."""
    warm = GeneratedFleet(4, rows_per_group=150, seed=98)
    uri = f"sqlite:///{folder}/recipe.db"
    location = engine.write("recipe-warm-up", warm)
    usual_recipe(
        engine.spark.session,
        engine.tables.read_spark(engine.spark.session, location),
        warm.problem(),
        tracking_uri=uri,
        n_trials=2,
    )
    started = time.monotonic()
    groups = usual_recipe(engine.spark.session, features, problem, tracking_uri=uri)
    seconds = time.monotonic() - started
    print(
        f"  usual recipe: {seconds:.1f} s for {len(groups):,} groups, RMSE "
        f"{overall_rmse(groups):.5g}",
        flush=True,
    )
    return seconds, groups


def against_recipe_flights(runs: Runs) -> Mapping[str, float]:
    """Flights by route: the usual recipe's wall time over ours with all grains, and both errors on the same rows."""
    spec, as_of = _spec_of("flights"), pd.Timestamp(AFTER_DECEMBER)
    features = str(runs.fleet("flights", AFTER_DECEMBER).tables / "features")
    with Engine(runs.new_folder()) as engine:
        engine.warm_up()
        ours = engine.train("flights", features, spec, "run", as_of=as_of)
        cutoffs = ours.run.cutoffs
        rows = engine.tables.read_spark(engine.spark.session, features).where(
            f"known_at <= timestamp'{as_of}' AND NOT is_future"
        )
        keys = rows.select("origin", "dest", "carrier").toPandas()
        problem = Problem(
            keys=("origin", "dest"),
            features=spec.feature_columns,
            target="arr_delay",
            tune_start=cutoffs.tune_start,
            report_start=cutoffs.report_start,
            offset="dep_delay",
            categories=fleet_categories(keys, spec.features.categoricals),
        )
        seconds, groups = _recipe(engine, rows, problem, engine.folder)
    answered = groups[groups["n_report"] > 0]
    names = {
        json.dumps(list(pair), separators=(",", ":"))
        for pair in zip(answered["origin"], answered["dest"], strict=True)
    }
    found = report_answers(ours, len(spec.grains))
    same = found[found["finest"].isin(names)]
    if len(same) != answered["n_report"].sum():
        print(
            f"  {len(same):,} report rows of ours, {answered['n_report'].sum():,} of the recipe's"
        )
    our_rmse, their_rmse = rmse(same["actual"] - same["answer"]), overall_rmse(groups)
    report_rmse(ours, len(spec.grains))
    return {
        "": seconds / ours.seconds,
        "recipe-seconds": seconds,
        "our-seconds": ours.seconds,
        "our-error": our_rmse,
        "recipe-error": their_rmse,
        "error-ratio": our_rmse / their_rmse,
    }


def _thousand(runs: Runs) -> dict[str, Training]:
    """All that we run on the thousand generated groups, once: both forms, and an increment."""
    return runs.once("thousand", lambda: _run_thousand(runs))


def _run_thousand(runs: Runs) -> dict[str, Training]:
    with Engine(runs.new_folder()) as engine:
        engine.warm_up()
        location = engine.write("thousand", THOUSAND)
        blend, none = (
            THOUSAND.spec(pooling=pooling, tuning=DEFAULT_TUNING) for pooling in ("blend", "none")
        )
        return {
            "grains": engine.train("thousand", location, blend, "first"),
            "independent": engine.train("independent", location, none, "first"),
            "second": engine.train("thousand", _with_late_rows(engine), blend, "second"),
        }


def _late_groups() -> list[str]:
    return list(THOUSAND.groups[:: len(THOUSAND.groups) // 10][:10])


def _with_late_rows(engine: Engine) -> str:
    """The thousand groups again, ten of them with a few more rows in the middle of their past."""
    rows = THOUSAND.rows()
    late = late_rows(rows[rows["group"].isin(_late_groups())], LATE_ROWS)
    location = engine.folder / "tables" / "thousand-late" / "features"
    write_features(THOUSAND, location, late=late)
    return str(location)


def second_run_noise(
    runs: Runs, fleets: int = NOISE_FLEETS, n_groups: int = NOISE_GROUPS
) -> Mapping[str, float]:
    """What groups that have nothing to learn weigh when they are refreshed, and what that costs the fleet beside its pooled model."""
    weights: dict[str, list[float]] = {"first": [], "second": []}
    ratios = []
    with Engine(runs.new_folder()) as engine:
        for seed in range(fleets):
            fleet, name = GeneratedFleet(n_groups, signal="noise", seed=seed), f"noise-{seed}"
            location = engine.write(name, fleet)
            spec = fleet.spec(tuning={"retune_after": "1 month"})
            first = engine.train(name, location, spec, f"{name}-first")
            write_features(fleet, location, late=late_rows(fleet.rows()))
            second = engine.train(name, location, spec, f"{name}-second")
            statuses = set(second.ledger["status"])
            if statuses != {"refreshed"}:
                raise NotMeasured(
                    f"{name}: the second run was to refresh every group, and they are "
                    f"{sorted(statuses)}"
                )
            for run, training in (("first", first), ("second", second)):
                finest = training.ledger[training.ledger["grain"] == 1]
                weights[run] += finest["weight"].tolist()
            pooled = second.ledger.loc[second.ledger["grain"] == 0, "pooled_rmse"].iloc[0]
            ratios.append(report_rmse(second, grains=2) / pooled)
    return {
        "": float(np.mean(weights["second"])),
        "first-run": float(np.mean(weights["first"])),
        "fleet-over-pooled": float(np.mean(ratios)),
        "worst-fleet-over-pooled": max(ratios),
    }


def against_recipe_thousand(runs: Runs) -> Mapping[str, float]:
    """A thousand generated groups in which tuning pays: the recipe's wall time over ours, with the pooled model and without."""
    gain = tuning_gain(THOUSAND, GAIN_GROUPS)
    print(
        f"  tuned parameters beat default ones by {100 * gain:.1f} % (on {GAIN_GROUPS} groups)",
        flush=True,
    )
    found = _thousand(runs)
    with Engine(runs.new_folder()) as engine:
        engine.warm_up()
        rows = engine.tables.read_spark(engine.spark.session, engine.write("thousand", THOUSAND))
        recipe_seconds, recipe = _recipe(engine, rows, THOUSAND.problem(), engine.folder)
    started = time.monotonic()
    pooled = overall_rmse(
        pooled_model(THOUSAND.rows(), THOUSAND.problem(), n_trials=POOLED_TRIALS, n_jobs=SLOTS)
    )
    pooled_seconds = time.monotonic() - started
    print(
        f"  one pooled model: {pooled_seconds:.1f} s ({POOLED_TRIALS} trials), RMSE {pooled:.5g}",
        flush=True,
    )
    theirs = overall_rmse(recipe)
    measured = {
        "gain": 1 + gain,
        "recipe-seconds": recipe_seconds,
        "recipe-error": theirs,
        "pooled-seconds": pooled_seconds,
        "pooled-error": pooled,
    }
    for form in ("grains", "independent"):
        training = found[form]
        error = report_rmse(training, 2)
        measured |= {form: recipe_seconds / training.seconds, f"{form}-seconds": training.seconds}
        measured |= {f"{form}-error": error, f"{form}-error-ratio": error / theirs}
    return measured


def busy_fraction(runs: Runs) -> Mapping[str, float]:
    """Share of the slots' time that is spent inside train_group, and inside LightGBM."""
    training = _thousand(runs)["grains"]
    slots, whole = SLOTS * training.training_seconds, SLOTS * training.seconds
    return {
        "train-group": training.own_seconds.sum() / slots,
        "lightgbm": training.ledger["lightgbm_seconds"].sum() / slots,
        "train-group-of-whole-run": training.own_seconds.sum() / whole,
    }


def against_pool(runs: Runs) -> Mapping[str, float]:
    """Our throughput over that of a joblib process pool with the same function and groups."""
    training = _thousand(runs)["independent"]
    settings = training.run.settings
    rows = THOUSAND.rows()
    frames = [frame.reset_index(drop=True) for _, frame in rows.groupby("group")]
    pool = process_pool(frames, _PoolTrain(settings), SLOTS)
    print(
        f"  process pool: {pool.wall_seconds:.1f} s, {sum(pool.seconds):.1f} s inside train_group",
        flush=True,
    )
    return {
        "": pool.wall_seconds / training.training_seconds,
        "pool-seconds": pool.wall_seconds,
        "our-seconds": training.training_seconds,
        "our-whole-run-seconds": training.seconds,
    }


class _PoolTrain:
    """`train_group` with a run's settings, as a process pool calls it."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def __call__(self, frame: pd.DataFrame) -> str:
        return train_group(frame, 1, self.settings).status


def makespan_skew(runs: Runs) -> Mapping[str, float]:
    """Zipf sizes: wall time of the waves over what no plan can beat."""
    fleet = GeneratedFleet(500, skew=1.1)
    with Engine(runs.new_folder()) as engine:
        engine.warm_up()
        training = engine.train(
            "zipf", engine.write("zipf", fleet), fleet.spec(tuning=DEFAULT_TUNING), "run"
        )
    longest, total = training.own_seconds.max(), training.own_seconds.sum()
    slots = [0.0] * SLOTS
    for load in training.ledger.groupby("task")["seconds"].sum().sort_index():
        heapq.heapreplace(slots, slots[0] + float(load))
    bound = max(longest, total / SLOTS)
    return {
        "": training.training_seconds / bound,
        "plan": max(slots) / bound,
        "seconds": training.training_seconds,
        "longest-group": longest,
        "total-over-slots": total / SLOTS,
    }


def _tiny(runs: Runs) -> dict[int, dict[str, float]]:
    return runs.once("tiny", lambda: _run_tiny(runs))


def _run_tiny(runs: Runs) -> dict[int, dict[str, float]]:
    """Train tiny fleets in a process that does nothing else; seconds and memory of each."""
    folder = runs.new_folder()
    for size in TINY_SIZES:
        write_features(
            GeneratedFleet(size, rows_per_group=70, signal="tiny"),
            folder / "tables" / f"tiny{size}" / "features",
        )
    *told, last = _child("tiny", folder, *TINY_SIZES)
    print("\n".join(told), flush=True)
    return {int(size): measured for size, measured in json.loads(last).items()}


def overhead_growth(runs: Runs) -> Mapping[str, float]:
    """Wall seconds that one more tiny group costs, from 1,000 to 10,000 groups and from 100 to 1,000."""
    seconds = {size: measured["seconds"] for size, measured in _tiny(runs).items()}
    small, middle, large = TINY_SIZES
    late, early = (
        (seconds[large] - seconds[middle]) / (large - middle),
        (seconds[middle] - seconds[small]) / (middle - small),
    )
    return {"": 1000 * late, "ratio": late / early, "early": 1000 * early} | {
        f"seconds-{size}": value for size, value in seconds.items()
    }


def driver_memory(runs: Runs) -> Mapping[str, float]:
    """Peak resident memory of the driver at 10,000 groups: its Python process and its JVM, which here is the executor, too."""
    found = _tiny(runs)[TINY_SIZES[-1]]
    return {"": found["python"] + found["jvm"], "python": found["python"], "jvm": found["jvm"]}


def tracking_requests(runs: Runs) -> Mapping[str, float]:
    """Requests that a training run, in a process of its own, sends to a real MLflow server, from `models` to `champion`."""
    counts: dict[int, int] = {}
    with tracking_server(runs.new_folder()) as server:
        for size in TRACKED_SIZES:
            server.counter.reset()
            _child("tracked", runs.new_folder(), str(size), server.uri)
            counts[size] = server.counter.total
            print(f"  {size:,} groups: {dict(server.counter.by_prefix())}", flush=True)
    return {"spread": max(counts.values()) - min(counts.values())} | {
        f"groups-{size}": count for size, count in counts.items()
    }


def _train_tracked(folder: Path, size: int, uri: str) -> None:
    fleet = GeneratedFleet(size, rows_per_group=70, signal="tiny")
    with Engine(folder) as engine:
        spec = fleet.spec(name=f"tracked{size}")
        engine.write(spec.name, fleet)
        _materialise(engine, spec, uri)


def _child(*arguments: object) -> list[str]:
    """Do one of the commands below in a process of its own; the lines that it prints."""
    command = [sys.executable, "-m", "benchmarks.training", *map(str, arguments)]
    return subprocess.run(
        command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()


def _materialise(engine: Engine, spec: FleetSpec, uri: str) -> None:
    links = [models_asset(spec), meta_model_asset(spec), champion_asset(spec)]
    resources = {
        "tables": engine.tables,
        "spark": SparkSessionResource(master="local", scratch=engine.spark.scratch),
        "registry": MlflowRegistry(tracking_uri=uri, scratch=engine.spark.scratch),
        "launch": LaunchSettings(),
    }
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize(links, resources=resources, instance=instance, run_config=QUIET)


def incremental(runs: Runs) -> Mapping[str, float]:
    """Late rows in 1 % of a thousand groups, cutoffs fixed: seconds of training over the first run's."""
    found = _thousand(runs)
    first, second = (
        found[name].ledger.set_index(["grain", "group_id"]) for name in ("grains", "second")
    )
    late = {json.dumps([group]) for group in _late_groups()}
    unchanged = [key for key in first.index if key[0] == 1 and key[1] not in late]
    same = (first.loc[unchanged, "booster_id"] == second.loc[unchanged, "booster_id"]) & first.loc[
        unchanged, "booster_id"
    ].notna()

    def seconds(ledger: pd.DataFrame, *, finest: bool) -> float:
        chosen = ledger[ledger.index.get_level_values("grain") == 1] if finest else ledger
        return float(chosen["seconds"].sum())

    return {
        "finest": seconds(second, finest=True) / seconds(first, finest=True),
        "whole": seconds(second, finest=False) / seconds(first, finest=False),
        "wall": found["second"].seconds / found["grains"].seconds,
        "unchanged-identical": float(same.sum()) / len(unchanged),
        "trained-again": float(second["status"].isin(["trained", "refreshed"]).sum()),
    }


def blend_gain(runs: Runs) -> Mapping[str, float]:
    """Held-out error of the blend over that of plain per-group models and of the pooled model alone, where there is a model per group."""
    measured: dict[str, float] = {}
    cases: tuple[tuple[str, FleetFacts, str | None], ...] = (
        ("housing", HOUSING, None),
        ("flights", FLIGHTS, AFTER_DECEMBER),
    )
    for name, facts, as_of in cases:
        judged = judge(runs.fleet(name, as_of), facts)
        own = judged[judged["per group"].notna()]
        error = {way: rmse(own["actual"] - own[way]) for way in ("fleet", "per group")}
        error["pooled"], error["all"] = (
            rmse(judged["actual"] - judged["pooled"]),
            rmse(judged["actual"] - judged["fleet"]),
        )
        measured[f"{name}-over-per-group"] = error["fleet"] / error["per group"]
        measured[f"{name}-over-pooled"] = error["all"] / error["pooled"]
    return measured


def _train_tiny(folder: Path, sizes: list[int]) -> None:
    measured: dict[int, dict[str, float]] = {}
    with Engine(folder) as engine:
        engine.warm_up()
        for size in sizes:
            fleet = GeneratedFleet(size, rows_per_group=70, signal="tiny")
            features = str(folder / "tables" / f"tiny{size}" / "features")
            training = engine.train(f"tiny{size}", features, fleet.spec(), "run")
            measured[size] = {
                "seconds": training.seconds,
                "python": _peak_gb(os.getpid()),
                "jvm": sum(map(_peak_gb, _jvms())),
            }
    print(json.dumps(measured))


def _jvms() -> list[int]:
    """Java processes that this process started."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, name in rows if "java" in name and int(parent) == os.getpid()]


def _peak_gb(pid: int) -> float:
    """Peak resident memory of a process, GB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else float("nan")


if __name__ == "__main__":
    if sys.argv[1] == "tiny":
        _train_tiny(Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
    else:
        _train_tracked(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
