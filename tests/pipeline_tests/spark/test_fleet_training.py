import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from pipeline.errors import DataError
from pipeline.models.meta_model import ModelSpec, group_id, inverse_link, link
from pipeline.models.start import Start
from pipeline.runs.history import History
from pipeline.runs.planned_run import PlannedRun
from pipeline.runs.request import Request
from pipeline.runs.wave import Wave
from pipeline.spark.counting import count_categories, count_groups
from pipeline.spark.evaluation import MIN_INTERVAL_ROWS, judged_rows
from pipeline.spark.execution import without_adaptive_execution
from pipeline.spark.placement import SALT, group_placed
from pipeline.spark.planning import plan_run
from pipeline.spark.progress import Done, Progress
from pipeline.spark.rows import limited_rows
from pipeline.spark.training import TrainingContext, placed_rows, train_wave
from pipeline.spark.training_run import train_run
from pipeline.spec import FleetSpec, parse_spec
from pipeline.tables import BOOSTERS, HOLDOUT, LEDGER, RUNS
from pipeline.testing.blending import learn_weights_in_pandas
from pipeline.testing.doubles import FailingTrainer, FreeLease
from pipeline.testing.runs import own_tables, quiet_context, train_quietly
from pipeline.training.blend import Moments, describe_groups
from pipeline.training.outcome import Outcome
from pipeline.training.splits import EARLIER, REPORT, TUNE
from pipeline.training.trainer import train_group
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark

SPEC: dict[str, Any] = {
    "name": "nasty",
    "sources": [{"name": "rows", "uri": "rows.csv"}],
    "features": {"columns": ["level", "x1", "x2"], "categoricals": ["store"], "max_categories": 12},
    "grains": [[], ["region"], ["region", "store"]],
    "entity": ["region", "store"],
    "time": "day",
    "target": {"column": "y", "transform": "log", "offset": "level", "weight": "w"},
    "splits": {"report": "30 days", "tune": "30 days"},
    "tuning": {
        "max_trials": 2,
        "patience": 1,
        "max_rounds": 15,
        "fit_rows": 40,
        "tune_rows": 10,
        "seed": 3,
    },
    "baselines": {"flat": "guess", "never": "nothing"},
}
N_DAYS = 140
PLAIN = ["../x", "a/b", "🐟", "", None, "raises", "few infinite"]
ODD = ["lonely", "no target", "constant", "infinite", "no report"]
REGIONS = ["north", None]
FAILING = group_id(["north", "raises"])


@pytest.fixture(scope="module")
def spec() -> FleetSpec:
    return parse_spec(SPEC, file="nasty/defs.yaml")


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """The feature table: fourteen shops in two regions, day by day, each spoilt in its own way."""
    random = np.random.default_rng(5)
    parts = []
    for region in REGIONS:
        for store in [*PLAIN, *(ODD if region else [])]:
            part = pd.DataFrame({"time": pd.date_range("2024-01-01", periods=N_DAYS, freq="D")})
            part["region"], part["store"] = region, store
            part["x1"], part["x2"] = random.normal(size=(2, N_DAYS))
            part["level"] = random.normal(4, 0.2, N_DAYS)
            part["y"] = np.exp(
                part["level"]
                + 0.3 * part["x1"]
                + 0.1 * random.normal(size=N_DAYS)
                + (0.2 if region else -0.2)
            )
            parts.append(_spoilt(part, store))
    rows = pd.concat(parts, ignore_index=True)
    rows["known_at"] = rows["time"] + pd.to_timedelta(random.integers(0, 5, len(rows)), unit="D")
    rows.loc[::50, "level"] = np.nan
    rows["w"] = random.choice([1.0, 2.0, np.nan, -1.0], len(rows), p=[0.6, 0.3, 0.05, 0.05])
    rows["guess"] = np.exp(rows["level"])
    rows["nothing"] = np.nan
    rows["is_future"] = False
    rows["row_key"] = [f"{number:05d}" for number in random.permutation(len(rows))]
    return rows


def _spoilt(part: pd.DataFrame, store: str | None) -> pd.DataFrame:
    if store == "lonely":
        return part.head(1)
    if store == "no report":
        return part.iloc[:-35]
    if store == "no target":
        part["y"] = np.nan
    if store == "constant":
        part["y"] = np.exp(part["level"])
    if store == "infinite":
        part.loc[part.index[-40:], "y"] = np.inf
    if store == "few infinite":
        part.loc[part.index[:1], "y"] = 0.0  # the logarithm does not take it
    return part


@pytest.fixture(scope="module")
def features(spark: SparkSession, rows: pd.DataFrame) -> DataFrame:
    zoned = rows.assign(
        time=rows["time"].dt.tz_localize("UTC"), known_at=rows["known_at"].dt.tz_localize("UTC")
    )
    return spark.createDataFrame(
        pa.Table.from_pandas(zoned, preserve_index=False).replace_schema_metadata()
    )


NO_HISTORY = History(
    RUNS.schema.empty_table().to_pandas(), lambda _: LEDGER.schema.empty_table().to_pandas()
)


def planned(features: DataFrame, spec: FleetSpec, **changes: Any) -> PlannedRun:
    return plan_run(
        quiet_context(features.sparkSession),
        features,
        spec,
        Request(**{"run_id": "run-1", **changes}),
        NO_HISTORY,
    )


@pytest.fixture(scope="module")
def run(features: DataFrame, spec: FleetSpec) -> PlannedRun:
    return planned(features, spec)


@dataclass(frozen=True)
class Finished:
    """A run that came to its end, and its tables."""

    ledger: pd.DataFrame
    tables: DeltaTables

    def stored(self, name: str) -> pa.Table:
        return self.tables.read_arrow(self.tables.location("nasty", name))


@pytest.fixture(scope="module")
def told() -> list[Done]:
    return []


@pytest.fixture(scope="module")
def finished(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    tmp_path_factory: pytest.TempPathFactory,
    told: list[Done],
) -> Finished:
    tables = DeltaTables(root=str(tmp_path_factory.mktemp("tables [x] ü")))
    cluster = TrainingContext(spark, told.append, train=FailingTrainer({FAILING: "raise"}))
    return Finished(
        train_run(
            cluster, own_tables(tables, "nasty"), run, spec, features_version=4, lease=FreeLease()
        ),
        tables,
    )


@pytest.fixture(scope="module")
def groups(
    rows: pd.DataFrame, run: PlannedRun, spec: FleetSpec
) -> dict[tuple[int, str], pd.DataFrame]:
    """Every group's visible rows in pandas."""
    seen = rows[rows["known_at"] <= run.cutoffs.as_of]
    found: dict[tuple[int, str], pd.DataFrame] = {}
    for grain, keys in enumerate(spec.grains):
        ids = np.array(
            [group_id(list(values)) for values in seen[list(keys)].itertuples(index=False)]
            if keys
            else ["[]"] * len(seen)
        )
        for name in np.unique(ids):
            found[grain, str(name)] = seen[ids == name].assign(grain=grain, group_id=name, task=0)
    return found


def counts_for_something(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Whether a row has a target and a weight above 0."""
    return rows["y"].notna() & (rows["w"] > 0)


def ledger_row(finished: Finished, grain: int, *keys: str | None) -> "pd.Series[Any]":
    ledger = finished.ledger
    found = ledger[(ledger["grain"] == grain) & (ledger["group_id"] == group_id(keys))]
    assert len(found) == 1
    return found.iloc[0]


def test_every_group_of_the_data_has_exactly_one_ledger_row(
    finished: Finished, groups: dict[tuple[int, str], pd.DataFrame]
) -> None:
    ledger = finished.ledger
    assert list(ledger.columns) == LEDGER.schema.names
    keys = list(zip(ledger["grain"], ledger["group_id"], strict=True))
    assert len(keys) == len(set(keys)) == len(groups)
    assert set(keys) == set(groups)
    assert dict(zip(keys, ledger["n_rows"], strict=True)) == {
        key: len(of) for key, of in groups.items()
    }
    assert set(ledger["run_id"]) == {"run-1"}
    assert set(ledger["status"]) == {"trained", "inherited", "failed"}
    pa.Table.from_pandas(ledger, schema=LEDGER.schema, preserve_index=False)


@pytest.mark.parametrize("store", PLAIN)
@pytest.mark.parametrize("region", REGIONS)
def test_groups_with_nasty_names_are_trained(
    finished: Finished, region: str | None, store: str | None
) -> None:
    row = ledger_row(finished, 2, region, store)
    assert row["parent_id"] == group_id([region])
    assert row["grain_name"] == "[region, store]"
    assert row["status"] == ("failed" if row["group_id"] == FAILING else "trained")


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("lonely", "too_few_rows"),
        ("no target", "no_target"),
        ("constant", "constant_target"),
        ("infinite", "infinite_target"),
    ],
)
def test_groups_that_cannot_be_trained_say_why(finished: Finished, store: str, reason: str) -> None:
    row = ledger_row(finished, 2, "north", store)
    assert (row["status"], row["reason"], row["weight"]) == ("inherited", reason, 0.0)
    assert pd.isna(row["booster_id"])
    assert pd.isna(row["tune_own"])


def test_a_group_whose_trainer_raises_is_a_row_and_not_the_end_of_the_run(
    finished: Finished,
) -> None:
    row = ledger_row(finished, 2, "north", "raises")
    assert (row["status"], row["reason"], row["error_class"], row["weight"]) == (
        "failed",
        "error",
        "ZeroDivisionError",
        0.0,
    )
    assert "division by zero, as ordered" in row["error_message"]
    assert pd.isna(row["booster_id"])
    # Its rows are judged nevertheless: its parent answers.
    assert row["report_rows"] > 20
    assert row["rmse"] > 0


def test_what_was_not_measured_is_null(finished: Finished) -> None:
    row = ledger_row(finished, 2, "north", "no report")
    assert row["status"] == "trained"
    assert row["tune_own"] > 0
    assert row[["report_own", "rmse", "mape", "mae", "report_rows", "intervals"]].isna().all()


def test_tables_hold_what_the_run_left(finished: Finished, run: PlannedRun) -> None:
    for contract in (BOOSTERS, HOLDOUT, LEDGER, RUNS):
        found = finished.stored(contract.name)
        assert found.schema == contract.schema
        keys = found.select(list(contract.key)).to_pandas()
        assert len(keys) > 0
        assert not keys.duplicated().any()
    expected = pa.Table.from_pandas(finished.ledger, schema=LEDGER.schema, preserve_index=False)
    assert (
        finished.stored("ledger")
        .sort_by([("grain", "ascending"), ("group_id", "ascending")])
        .to_pylist()
        == expected.to_pylist()
    )
    [manifest] = finished.stored("runs").to_pylist()
    assert manifest["finished_at"] >= manifest["started_at"]
    assert (manifest["run_id"], manifest["features_version"], manifest["n_groups"]) == (
        "run-1",
        4,
        len(finished.ledger),
    )
    waves = set(json.loads(manifest["waves"]))
    assert (
        waves
        == set(finished.ledger["wave"].dropna())
        == set(finished.stored("holdout")["wave"].to_pylist())
    )


def test_spark_trains_each_group_as_pandas_does(
    finished: Finished, groups: dict[tuple[int, str], pd.DataFrame], run: PlannedRun
) -> None:
    holdout = finished.stored("holdout").to_pandas()
    boosters = {row["booster_id"]: row for row in finished.stored("boosters").to_pylist()}
    same = [
        "status",
        "reason",
        "booster_id",
        "n_fit",
        "n_tune",
        "n_report",
        "n_invalid",
        "n_trials",
        "n_rounds",
        "parameters",
        "stopped_by",
        "tune_loss",
    ]
    trained = 0
    for row in finished.ledger.to_dict("records"):
        key = row["grain"], row["group_id"]
        if row["task"] == -1 or key[1] == FAILING:
            continue
        # In another order: the result is not to depend on it.
        outcome = train_group(
            groups[key].sample(frac=1, random_state=1),
            key[0],
            run.settings,
            Start.from_json(row["started_from"]),
        )
        expected = {"status": outcome.status, "reason": outcome.reason, **outcome.ledger}
        for name in same:
            assert row[name] == expected.get(name) or (
                pd.isna(row[name]) and expected.get(name) is None
            ), (key, name)
        if outcome.booster is not None:
            trained += 1
            assert boosters[outcome.booster.booster_id]["sha256"] == outcome.booster.sha256
            assert boosters[outcome.booster.booster_id]["text"] == outcome.booster.text
        theirs = holdout[
            (holdout["grain"] == key[0]) & (holdout["group_id"] == key[1])
        ].sort_values("row_key", ignore_index=True)
        ours = (outcome.holdout if outcome.holdout is not None else theirs.head(0)).sort_values(
            "row_key", ignore_index=True
        )
        assert list(theirs["row_key"]) == list(ours["row_key"])
        assert (theirs["time"].dt.tz_localize(None).to_numpy() == ours["time"].to_numpy()).all()
        assert [list(ids) for ids in theirs["group_ids"]] == [
            list(ids) for ids in ours["group_ids"]
        ]
        for name in ["actual", "offset", "scale", "weight", "prediction"]:
            np.testing.assert_array_equal(
                theirs[name].to_numpy(float), ours[name].to_numpy(float), err_msg=f"{key} {name}"
            )
    assert trained == len(boosters) == finished.ledger["booster_id"].notna().sum() == 17


def test_plan_counts_what_the_trainer_then_finds(finished: Finished, run: PlannedRun) -> None:
    merged = run.plan.groups.merge(
        finished.ledger, on=["grain", "group_id"], suffixes=("_planned", "")
    )
    sent = merged[(merged["action"] == "train") & (merged["status"] != "failed")]
    assert len(sent) == 19
    for name in ["n_fit", "n_tune", "n_report"]:
        assert (sent[name] == sent[f"{name}_planned"]).all()


def test_progress_counts_every_group(finished: Finished, told: list[Done], run: PlannedRun) -> None:
    n_groups = len(run.plan.to_train)
    assert told[-1] == Done(n_groups, 1, n_groups, None)


def judged_in_pandas(holdout: pd.DataFrame, spec: FleetSpec, run: PlannedRun) -> pd.DataFrame:
    """One row per judged row: its facts from the pooled group, and each grain's prediction."""
    wide = (
        holdout[holdout["grain"] == 0].drop(columns=["prediction"]).set_index(["row_key", "split"])
    )
    for grain in range(len(spec.grains)):
        wide[f"p{grain}"] = holdout[holdout["grain"] == grain].set_index(["row_key", "split"])[
            "prediction"
        ]
    wide = wide.reset_index().sort_values("row_key", ignore_index=True)
    residual = (link(wide["actual"].to_numpy(), spec.target.transform) - wide["offset"]) / wide[
        "scale"
    ]
    wide["residual"] = residual.where(np.isfinite(residual))
    length = run.cutoffs.report_start - run.cutoffs.tune_start
    since = (wide["time"].dt.tz_localize(None) - run.cutoffs.tune_start) / length
    halves = np.floor(since * 2)
    before = 1 + np.ceil(-since)
    wide["stretch"] = np.where(since >= 0, halves, before)
    wide.loc[wide["split"] == REPORT, "stretch"] = np.nan
    return wide


@pytest.fixture(scope="module")
def judged(finished: Finished, spec: FleetSpec, run: PlannedRun) -> pd.DataFrame:
    return judged_in_pandas(finished.stored("holdout").to_pandas(), spec, run)


def test_rows_are_judged_side_by_side(
    spark: SparkSession, finished: Finished, judged: pd.DataFrame, spec: FleetSpec, run: PlannedRun
) -> None:
    holdout = finished.tables.read_spark(spark, finished.tables.location("nasty", "holdout"))
    found = (
        judged_rows(holdout, spec, run.cutoffs).toPandas().sort_values("row_key", ignore_index=True)
    )
    assert list(found["row_key"]) == list(judged["row_key"])
    assert list(found["split"]) == list(judged["split"])
    np.testing.assert_array_equal(found["stretch"].to_numpy(float), judged["stretch"])
    assert set(found.loc[found["split"] == TUNE, "stretch"]) == {0, 1}
    for name in ["p0", "p1", "p2", "actual", "weight"]:
        np.testing.assert_array_equal(found[name].to_numpy(float), judged[name].to_numpy(float))
    np.testing.assert_allclose(
        found["residual"].to_numpy(float), judged["residual"].to_numpy(float), rtol=1e-12
    )


def test_weights_are_those_learnt_from_the_rows_themselves(
    finished: Finished, judged: pd.DataFrame, spec: FleetSpec, run: PlannedRun
) -> None:
    ledger = finished.ledger
    rows = judged[judged["residual"].notna()]
    trained = ledger[ledger["status"] == "trained"]
    has_model = [set(trained.loc[trained["grain"] == grain, "group_id"]) for grain in range(3)]
    constant = np.full(len(rows), run.constants.with_offset)
    weights_of_grains = learn_weights_in_pandas(rows, spec, has_model, constant)
    rows = rows[rows["split"] != EARLIER]
    own = rows[["p0", "p1", "p2"]].to_numpy(float)
    ids = np.array([list(found) for found in rows["group_ids"]], dtype=object)
    moments = Moments.of_rows(
        rows["split"].tolist(), ids, rows["residual"].to_numpy(), own, rows["weight"].to_numpy()
    )
    skills = describe_groups(moments, weights_of_grains, run.constants.with_offset)
    weights = []
    for row in ledger.to_dict("records"):
        skill = skills.get((row["grain"], row["group_id"]))
        if skill is None:
            assert row["weight"] == 0.0
            continue
        if row["status"] == "trained":
            weights.append((row["grain"], row["weight"]))
            assert row["weight"] == pytest.approx(skill.weight, abs=1e-9)
        for name in [
            "tune_own",
            "tune_parent",
            "report_own",
            "report_parent",
            "report_blend",
            "report_constant",
        ]:
            expected = getattr(skill, name)
            assert (expected is None and pd.isna(row[name])) or row[name] == pytest.approx(
                expected, rel=1e-9
            )
    # One weight per grain, and not the same in all of them.
    assert len(set(weights)) == len({grain for grain, _ in weights}) == len(spec.grains)
    assert len({weight for _, weight in weights}) > 1


def test_errors_are_those_of_the_answers(
    finished: Finished, judged: pd.DataFrame, run: PlannedRun, rows: pd.DataFrame
) -> None:
    ledger = finished.ledger
    weights = {(row["grain"], row["group_id"]): row["weight"] for row in ledger.to_dict("records")}
    report = judged[judged["split"] == REPORT].copy()
    answer = np.full(len(report), run.constants[0])
    for grain in range(3):
        own = report[f"p{grain}"].to_numpy(float)
        weight = np.array([weights[grain, ids[grain]] for ids in report["group_ids"]])
        answer = np.where(
            np.isnan(own), answer, weight * np.nan_to_num(own) + (1 - weight) * answer
        )
    anchored = (report["offset"].notna() & report["scale"].notna()).to_numpy()
    assert 0 < anchored.sum() < len(report)

    def in_target_units(residual: Any) -> Any:
        linked = np.where(anchored, report["offset"] + report["scale"] * residual, run.constants[1])
        return inverse_link(linked, "log")

    report["answer"], report["miss"] = in_target_units(answer), np.abs(report["residual"] - answer)
    report["pooled"] = in_target_units(report["p0"].fillna(run.constants[0]))
    report["constant"] = in_target_units(np.full(len(report), run.constants[0]))
    report["flat"] = report["row_key"].map(rows.set_index("row_key")["guess"])
    for row in ledger[ledger["report_rows"].notna()].to_dict("records"):
        of = report[[ids[row["grain"]] == row["group_id"] for ids in report["group_ids"]]]
        assert row["report_rows"] == len(of)
        assert row["rmse"] == pytest.approx(rmse(of, "answer"))
        assert row["mape"] == pytest.approx(mape(of, "answer"))
        assert row["mae"] == pytest.approx((of["actual"] - of["answer"]).abs().mean())
        assert (row["pooled_rmse"], row["pooled_mape"]) == (
            pytest.approx(rmse(of, "pooled")),
            pytest.approx(mape(of, "pooled")),
        )
        misses = of["miss"].dropna()
        if len(misses) < MIN_INTERVAL_ROWS:
            assert pd.isna(row["intervals"])
        else:
            ranks = {
                "0.8": math.ceil((len(misses) + 1) * Fraction(8, 10)),
                "0.95": math.ceil((len(misses) + 1) * Fraction(95, 100)),
            }
            sorted_misses = np.sort(misses)
            expected = {
                level: pytest.approx(sorted_misses[k - 1]) if k <= len(misses) else None
                for level, k in ranks.items()
            }
            assert json.loads(row["intervals"]) == expected
        with_flat = of[of["flat"].notna()]
        expected = [
            len(with_flat),
            rmse(with_flat, "flat"),
            mape(with_flat, "flat"),
            rmse(with_flat, "answer"),
            mape(with_flat, "answer"),
        ]
        assert list(json.loads(row["baselines"])["flat"].values()) == pytest.approx(expected)
        metrics = json.loads(row["metrics"])
        assert list(metrics) == ["fleet", "pooled", "constant", "flat", "never"]
        assert metrics["fleet"] == {name: row[name] for name in ("rmse", "mae", "mape")}
        assert metrics["constant"]["rmse"] == pytest.approx(rmse(of, "constant"))
        assert metrics["flat"]["rmse"] == pytest.approx(rmse(with_flat, "flat"))
        assert json.loads(row["baselines"])["never"] == {
            "n": 0,
            "rmse": None,
            "mape": None,
            "fleet_rmse": None,
            "fleet_mape": None,
        }
    assert ledger["report_rows"].notna().sum() == 18
    assert ledger["intervals"].notna().sum() >= 3
    assert ledger["intervals"].isna().sum() >= 3


def rmse(rows: pd.DataFrame, answer: str) -> float:
    return float(np.sqrt(((rows["actual"] - rows[answer]) ** 2).mean()))


def mape(rows: pd.DataFrame, answer: str) -> float:
    return float(((rows["actual"] - rows[answer]).abs() / rows["actual"] * 100).mean())


def test_constants_are_the_means_of_fit_rows(
    groups: dict[tuple[int, str], pd.DataFrame], run: PlannedRun
) -> None:
    everything = groups[0, "[]"]
    fit = everything[
        (everything["time"] < run.cutoffs.tune_start)
        & (everything["known_at"] < run.cutoffs.tune_start)
    ]
    fit = fit[fit["w"] > 0]
    linked = np.log(fit["y"].where((fit["y"] > 0) & np.isfinite(fit["y"])))

    def mean(values: "pd.Series[float]") -> float:
        there = values.notna()
        return float(np.average(values[there], weights=fit.loc[there, "w"]))

    assert run.constants == (
        pytest.approx(mean(linked - fit["level"])),
        pytest.approx(mean(linked)),
        (),
    )


def test_categories_are_counted_on_fit_rows_and_limited(
    run: PlannedRun, spec: FleetSpec, groups: dict[tuple[int, str], pd.DataFrame]
) -> None:
    everything = groups[0, "[]"]
    start = run.cutoffs.tune_start
    fit = everything[
        (everything["time"] < start)
        & (everything["known_at"] < start)
        & counts_for_something(everything)
    ]
    expected = fit["store"].value_counts().to_dict()
    assert count_categories(run.rows, spec, run.cutoffs) == {"store": expected}
    two = spec.model_copy(
        update={"features": spec.features.model_copy(update={"max_categories": 2})}
    )
    assert len(count_categories(run.rows, two, run.cutoffs)["store"]) == 2
    assert run.settings.model_spec.categories["store"] == tuple(sorted(expected))


def seen_by_workers(
    spark: SparkSession,
    placed: DataFrame,
    groups: pd.DataFrame,
    run: PlannedRun,
    tables: DeltaTables,
) -> list[dict[str, Any]]:
    """Train with something that only says what it was given."""

    def look(frame: pd.DataFrame, grain: int, settings: Any, start: Start) -> Outcome:
        return Outcome(
            "inherited",
            "looked",
            {
                "rows": sorted(frame["row_key"]),
                "began": start.to_json(),
                "process": os.getpid(),
                "threads": settings.threads,
            },
        )

    context = quiet_context(spark, train=look, threads=3)
    return train_wave(
        context,
        own_tables(tables, "looked"),
        placed,
        Wave("looked", groups),
        run.settings,
        Progress(spark, lambda *_: None),
    ).outcomes


@pytest.fixture
def spread(run: PlannedRun) -> pd.DataFrame:
    """The groups to train over seven tasks, each with a start of its own."""
    groups = run.plan.to_train.copy()
    groups["task"] = (np.arange(len(groups)) * 5) % 7
    groups["started_from"] = [
        Start(trials=({"num_leaves": number},)).to_json() for number in range(len(groups))
    ]
    return groups


def by_group(groups: pd.DataFrame, column: str) -> dict[tuple[int, str], Any]:
    return dict(
        zip(zip(groups["grain"], groups["group_id"], strict=True), groups[column], strict=True)
    )


def test_each_group_is_in_the_partition_of_the_task_that_the_plan_gave_it(
    spark: SparkSession, run: PlannedRun, spec: FleetSpec, spread: pd.DataFrame
) -> None:
    with without_adaptive_execution(spark):
        placed = placed_rows(spark, run.rows, spec, spread)
        found = (
            placed.select("grain", "group_id", "task", sf.spark_partition_id().alias("place"))
            .distinct()
            .toPandas()
        )
    assert len(found) == len(spread)
    assert by_group(found, "place") == by_group(found, "task") == by_group(spread, "task")
    assert placed.rdd.getNumPartitions() == 7


def test_each_group_is_trained_on_its_rows_from_its_start_in_a_process_beside_the_workers(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    groups: dict[tuple[int, str], pd.DataFrame],
    finished: Finished,
    spread: pd.DataFrame,
) -> None:
    spark.sparkContext.setJobGroup("placement", "one exchange")
    try:
        with without_adaptive_execution(spark):
            found = seen_by_workers(
                spark, placed_rows(spark, run.rows, spec, spread), spread, run, finished.tables
            )
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", "")
    seen = pd.DataFrame(found)
    assert len(seen) == len(spread)
    assert by_group(seen, "task") == by_group(spread, "task")
    # Threads are of the place that trains, whatever the run's settings say.
    assert (run.settings.threads, set(seen["threads"])) == (1, {3})
    assert by_group(seen, "began") == by_group(spread, "started_from")
    for key, rows in by_group(seen, "rows").items():
        assert rows == sorted(groups[key].loc[counts_for_something(groups[key]), "row_key"])
    # A process is kept from task to task.
    assert seen["process"].nunique() < 7
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup("placement")]
    # The rows are brought together once: a stage before the exchange, a stage after it.
    assert max(len(job.stageIds) for job in jobs if job) == 2


def exchanges(frame: DataFrame) -> list[str]:
    plan = frame._jdf.queryExecution().executedPlan().toString()  # noqa: SLF001 - nothing public gives the plan
    assert "Adaptive" not in plan
    return [
        line for line in plan.splitlines() if "Exchange" in line and "BroadcastExchange" not in line
    ]


def grouped(placed: DataFrame) -> DataFrame:
    return group_placed(placed).applyInPandas(lambda rows: rows[["task"]].head(1), "task int")


def test_rows_are_exchanged_once_by_the_salt_of_the_plans_task(
    spark: SparkSession, run: PlannedRun, spec: FleetSpec
) -> None:
    with without_adaptive_execution(spark):
        found = exchanges(grouped(placed_rows(spark, run.rows, spec, run.plan.to_train)))
    assert len(found) == 1, found
    assert f"hashpartitioning({SALT}" in found[0]


def test_only_a_fleet_that_is_sampled_exchanges_rows_to_count_them(
    spark: SparkSession, run: PlannedRun, spec: FleetSpec
) -> None:
    with without_adaptive_execution(spark):
        found = exchanges(
            grouped(placed_rows(spark, run.rows, spec, run.plan.to_train.assign(exponent=1)))
        )
    assert len(found) > 1


@pytest.mark.parametrize("task", [-1, -7])
def test_task_ids_outside_the_plan_are_refused(
    spark: SparkSession, run: PlannedRun, spec: FleetSpec, task: int
) -> None:
    groups = run.plan.to_train
    with pytest.raises(AssertionError, match="not within"):
        placed_rows(spark, run.rows, spec, groups.assign(task=[task, *groups["task"].iloc[1:]]))


@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_adaptive_execution_is_off_in_training_and_then_as_before(
    spark: SparkSession,
    run: PlannedRun,
    spec: FleetSpec,
    monkeypatch: pytest.MonkeyPatch,
    finished: Finished,
    adaptive: str,
) -> None:
    from pipeline.spark import training_run as module

    during: list[str | None] = []

    def broken(*_: Any) -> Any:
        during.append(spark.conf.get("spark.sql.adaptive.enabled"))
        raise KeyboardInterrupt

    spark.conf.set("spark.sql.adaptive.enabled", adaptive)
    monkeypatch.setattr(module, "train_wave", broken)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_quietly(
                spark, own_tables(finished.tables, "broken"), run, spec, features_version=4
            )
        assert set(during) == {"false"}
        assert spark.conf.get("spark.sql.adaptive.enabled") == adaptive
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", "true")


def test_as_of_hides_what_is_known_later(
    features: DataFrame, rows: pd.DataFrame, spec: FleetSpec
) -> None:
    moment = pd.Timestamp("2024-04-20 12:00")
    run = planned(features, spec, as_of=moment)
    expected = rows[rows["known_at"] <= moment]
    assert sorted(row[0] for row in run.rows.select("row_key").collect()) == sorted(
        expected["row_key"]
    )
    assert run.cutoffs.report_start == expected["time"].max() - pd.Timedelta(days=29)
    with pytest.raises(
        DataError,
        match=(
            r"as of 2023-12-31 00:00:00 no row is known yet; known_at runs from "
            r"2024-01-01 00:00:00 to"
        ),
    ):
        planned(features, spec, as_of=pd.Timestamp("2023-12-31"))


def finest(frame: DataFrame) -> set[tuple[str | None, str | None]]:
    return {
        (row["region"], row["store"])
        for row in frame.select("region", "store").distinct().collect()
    }


def test_a_limit_keeps_whole_groups_and_always_the_same(
    features: DataFrame, rows: pd.DataFrame, spec: FleetSpec
) -> None:
    two, three = (limited_rows(features, spec, n) for n in (2, 3))
    assert len(finest(two)) == 2
    assert finest(two) == finest(limited_rows(features.repartition(5), spec, 2)) < finest(three)
    names = finest(three)
    assert three.count() == sum(
        pair in names for pair in zip(rows["region"], rows["store"], strict=True)
    )
    assert limited_rows(features, spec, None) is features
    assert set(two.columns) == set(features.columns)
    run = planned(features, spec, limit_groups=2)
    assert len(run.plan.groups[run.plan.groups["grain"] == 2]) == 2
    assert run.plan.groups["n_rows"].max() == run.rows.count() < len(rows)


def test_counts_say_whose_child_a_group_is(
    run: PlannedRun, spec: FleetSpec, groups: dict[tuple[int, str], pd.DataFrame]
) -> None:
    counts = count_groups(run.rows, spec, run.cutoffs, run.settings.model_spec.categories).counts
    for row in counts.to_dict("records"):
        keys: Sequence[Any] = json.loads(row["group_id"])
        assert row["parent_id"] == (group_id(keys[:-1]) if keys else None)
        of = groups[row["grain"], row["group_id"]]
        assert row["n_target"] == counts_for_something(of).sum()


def test_a_fleet_without_any_model_still_judges_its_rows(
    spark: SparkSession, features: DataFrame, spec: FleetSpec, finished: Finished
) -> None:
    starved = spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"fit_rows": 10**6})})
    run = planned(features, starved)
    spoilt = run.plan.groups[(run.plan.groups["n_invalid"] > 0) & (run.plan.groups["grain"] == 2)]
    assert set(run.plan.to_train["group_id"]) == {"[]", *spoilt["group_id"]}
    ledger = train_quietly(
        spark, own_tables(finished.tables, "starved"), run, starved, features_version=4
    )
    assert set(ledger["status"]) == {"inherited"}
    assert not finished.tables.exists(finished.tables.location("starved", "boosters"))
    assert ledger["rmse"].notna().sum() == 18
    assert set(ledger["weight"]) == {0.0}


def test_manifest_pins_the_run(run: PlannedRun, spec: FleetSpec) -> None:
    started_at = pd.Timestamp("2024-06-01", tz="UTC")
    row = run.manifest(spec, started_at=started_at, features_version=4).to_row()
    written = pa.Table.from_pylist([row], schema=RUNS.schema).to_pylist()[0]
    assert written["features_version"] == 4
    assert written["n_groups"] == len(run.plan.groups)
    assert ModelSpec.from_json(written["model_spec"]) == run.settings.model_spec
    assert written["spec_digest"] == spec.training_digest
    assert json.loads(written["versions"]).keys() >= {"python", "lightgbm", "pyspark"}
    assert (written["finished_at"], written["waves"], written["previous_run_id"]) == (
        None,
        None,
        None,
    )
    assert json.loads(written["request"]) == {
        "limit_groups": None,
        "listed": [],
        "retrain": "changed",
    }
    assert written["data_digest"] == run.data_digest
    assert (
        replace(run, data_digest="other")
        .manifest(spec, started_at=started_at, features_version=4)
        .data_digest
        == "other"
    )
