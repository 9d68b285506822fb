"""Features, models, meta model, champion and predictions of a shop fleet, each on its own where it can be."""

import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StoreError
from pipeline.models.meta_model import FleetModel, PackError
from pipeline.tables import BOOSTERS, LEDGER, RUNS
from pipeline.testing.tables import write_arrow
from resources.delta_tables import DeltaTables
from resources.launch_settings import LaunchSettings

pytestmark = pytest.mark.spark

Metadata = Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]]
Checks = Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]
Failure = Callable[[dg.ExecuteInProcessResult], str]
AS_OF = "2023-10-15"
PICTURE = "![plot](data:image/png;base64,iVBOR"


@pytest.fixture
def second_run(fleet: Any) -> pd.DataFrame:
    """A run beside the first, as a later training would leave it: its ledger and its challenger."""
    ledger = fleet.table("ledger")
    return ledger[
        ledger["run_id"] == fleet.resources["registry"].get("shop", "champion").fleet_version
    ].assign(run_id="second")


def as_challenger(fleet: Any, ledger: pd.DataFrame) -> None:
    """Let a run with that ledger be the challenger, with the pack of the first version."""
    tables, registry = fleet.resources["tables"], fleet.resources["registry"]
    run_id = str(ledger["run_id"].iloc[0])
    location = tables.location("shop", "ledger")
    if run_id not in set(fleet.table("ledger")["run_id"]):
        file = tables.write_file(
            pa.Table.from_pandas(ledger, schema=LEDGER.schema, preserve_index=False),
            LEDGER.schema,
            location,
        )
        tables.commit(location, [file], LEDGER.schema, mode="append", partition={"run_id": run_id})
        run = (
            fleet.table("runs")
            .dropna(subset="finished_at")
            .sort_values("started_at")
            .head(1)
            .assign(run_id=run_id, finished_at=pd.NaT)
        )
        at = tables.location("shop", "runs")
        file = tables.write_file(
            pa.Table.from_pandas(run, schema=RUNS.schema, preserve_index=False), RUNS.schema, at
        )
        tables.commit(at, [file], RUNS.schema, mode="append", partition={"run_id": run_id})
    first = registry.get("shop", "champion")
    version = type(first)("shop", "2", run_id)
    pack = registry.folder / f"shop-2-{run_id}"
    if not pack.exists():
        shutil.copytree(registry.open_pack(first).folder, pack)
    registry.versions["shop"].append(version)
    registry.aliases["shop", "challenger"] = "2"


def test_the_whole_chain_is_materialised(
    first_run: dg.ExecuteInProcessResult, checks: Checks, metadata: Metadata
) -> None:
    assert first_run.success
    assert list(metadata(first_run)) == [
        "sales",
        "features",
        "models",
        "importance",
        "meta_model",
        "champion",
        "predictions",
    ]
    assert {name: found.passed for name, found in checks(first_run).items()} == dict.fromkeys(
        [
            "has_rows",
            "has_targets",
            "no_feature_is_all_null",
            "lags_find_their_rows",
            "days_begin_at_midnight",
            "no_column_looks_like_the_future",
            "every_group_has_an_outcome",
            "boosters_match_the_ledger",
            "every_judged_group_is_measured",
            "no_group_failed",
            "every_model_has_importance",
            "registered_model_answers",
            "registered_versions_are_whole",
            "challenger_passed_its_gates",
            "every_row_is_answered",
        ],
        True,
    )


def test_each_link_says_what_it_wrote(
    first_run: dg.ExecuteInProcessResult, metadata: Metadata
) -> None:
    told = metadata(first_run)
    counts = {
        link: told[link]["dagster/row_count"]
        for link in ("sales", "features", "models", "predictions")
    }
    assert counts == {"sales": 288, "features": 288, "models": 9, "predictions": 12}
    assert (told["features"]["fleet/n_targets"], told["features"]["fleet/features"]) == (288, 8)
    assert "| &#91;region, store&#93; | trained |  | 6 |" in told["models"]["fleet/status"]
    assert "last value" in told["models"]["fleet/errors"]
    assert told["models"]["fleet/as_of"] == "2023-10-15 00:00:00"
    assert (told["meta_model"]["fleet/groups"], told["meta_model"]["fleet/registered_model"]) == (
        9,
        "shop",
    )
    assert "every group has an answer chain" in told["champion"]["fleet/gates"]
    assert (told["champion"]["fleet/before"], told["champion"]["fleet/champion"]) == ("none", "1")
    assert "rows" in told["predictions"]["fleet/answered_by"]
    for link, names in {
        "models": ["plot", "planned_against_real"],
        "meta_model": ["plot"],
        "predictions": ["plot"],
    }.items():
        assert all(told[link][f"fleet/{name}"].startswith(PICTURE) for name in names)
    for link in ("features", "models", "predictions"):
        assert told[link]["fleet/row"]
        assert told[link]["dagster/uri"].endswith({"models": "/ledger"}.get(link, f"/{link}"))


def test_predictions_are_those_of_the_rows_after_the_as_of(
    fleet: Any, first_run: dg.ExecuteInProcessResult
) -> None:
    found = fleet.table("predictions")
    assert set(found["time"].dt.strftime("%Y-%m-%d")) == {"2023-11-01", "2023-12-01"}
    assert set(found["as_of"]) == {"2023-10-15T00:00:00"}
    assert found["row_key"].is_unique
    assert set(found["fleet_version"]) == {first_run.run_id}


def test_a_dry_run_trains_nothing_and_skips_what_follows(
    fleet: Any, metadata: Metadata, checks: Checks
) -> None:
    before = fleet.table("runs")
    result = fleet.launch(
        "models",
        "importance",
        "meta_model",
        "champion",
        "predictions",
        launch=LaunchSettings(as_of=AS_OF, dry_run=True),
    )
    assert result.success
    assert metadata(result) == {}
    assert checks(result) == {}
    assert fleet.resources["registry"].versions["shop"][-1].number == "1"
    pd.testing.assert_frame_equal(fleet.table("runs"), before)


def test_an_error_of_ours_is_the_steps_own_words(fleet: Any, failure: Failure) -> None:
    result = fleet.launch("models", launch=LaunchSettings(as_of="1999-01-01"))
    assert not result.success
    assert failure(result).startswith(
        "as of 1999-01-01 00:00:00 no row is known yet; known_at runs from 2020-01-01"
    )
    (event,) = (event for event in result.all_events if event.is_step_failure)
    assert event.step_failure_data.user_failure_data.metadata["fleet/error"].value == "DataError"


def test_a_feature_table_that_breaks_its_contract_is_not_committed(
    fleet: Any, failure: Failure
) -> None:
    tables = fleet.resources["tables"]
    version = tables.version(tables.location("shop", "features"))
    doubled = (
        "SELECT 'north' AS region, 'n0' AS store, CAST(sold_on AS DATE) AS sold_on, "
        "amount, size FROM sales"
    )
    result = fleet.launch("features", sql=doubled)
    assert not result.success
    assert re.match(
        r"48 entity keys occur more than once, e\.g\. \[\"north\",\"n0\",\"2020-01-01",
        failure(result),
    )
    assert tables.version(tables.location("shop", "features")) == version


def test_a_column_that_no_source_has_is_named(fleet: Any, failure: Failure) -> None:
    result = fleet.launch(
        "features", sql="SELECT region, store, sold_on, turnover AS amount, size FROM sales"
    )
    assert not result.success
    assert "turnover" in failure(result)
    assert "sales has" in failure(result)


def test_a_feature_without_any_value_is_a_warning_and_no_target_an_end(
    fleet: Any, checks: Checks, metadata: Metadata
) -> None:
    tables = fleet.resources["tables"]
    location = tables.location("shop", "features")
    before = tables.read_arrow(location)
    try:
        empty = (
            "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, "
            "CAST(NULL AS DOUBLE) AS amount, CAST(NULL AS INT) AS size FROM sales"
        )
        result = fleet.launch("features", "models", sql=empty)
        found = checks(result)
        assert (
            found["no_feature_is_all_null"].passed,
            found["no_feature_is_all_null"].severity,
        ) == (False, dg.AssetCheckSeverity.WARN)
        assert "size" in found["no_feature_is_all_null"].metadata["all_null"].value
        assert (found["has_targets"].passed, found["has_targets"].severity) == (
            False,
            dg.AssetCheckSeverity.ERROR,
        )
        assert "models" not in metadata(result)
    finally:
        write_arrow(tables, [before], before.schema, location, mode="overwrite")


def test_a_column_that_is_the_target_is_a_warning_that_names_it(fleet: Any, checks: Checks) -> None:
    tables = fleet.resources["tables"]
    location = tables.location("shop", "features")
    before = tables.read_arrow(location)
    try:
        result = fleet.launch(
            "features",
            sql=(
                "SELECT region, store, CAST(sold_on AS DATE) AS sold_on, amount, "
                "amount AS size FROM sales"
            ),
        )
        found = checks(result)["no_column_looks_like_the_future"]
        assert result.success
        assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert str(found.description).startswith(
            "size: equal to the target in 100.0% of the rows in which the target "
            "changes (a column that"
        )
        assert checks(result)["lags_find_their_rows"].passed
    finally:
        write_arrow(tables, [before], before.schema, location, mode="overwrite")


def test_a_challenger_that_fails_a_gate_leaves_the_champion_and_predictions_go_on(
    fleet: Any,
    second_run: pd.DataFrame,
    checks: Checks,
    metadata: Metadata,
    first_run: dg.ExecuteInProcessResult,
) -> None:
    worse = second_run.assign(run_id="worse")
    worse.loc[worse["grain"] > 0, "status"] = "failed"
    as_challenger(fleet, worse)
    result = fleet.launch("champion", "predictions")
    registry = fleet.resources["registry"]
    assert registry.get("shop", "champion").number == "1"
    assert registry.get("shop", "challenger").number == "2"
    check = checks(result)["challenger_passed_its_gates"]
    assert (check.passed, check.severity, check.blocking) == (
        False,
        dg.AssetCheckSeverity.ERROR,
        False,
    )
    assert check.description is not None
    assert "few groups failed (8 of 9, expected at most 10 %)" in check.description
    command = (
        """dg launch --assets shop/champion --config-json '{"resources": {"launch": {"config": {"""
    )
    assert (
        f"""{command}"as_of": "2023-10-15", "decision": "promote", "why": "..."}}}}}}}}'"""
        in check.description
    )
    assert (
        metadata(result)["champion"]["fleet/champion"],
        metadata(result)["champion"]["fleet/challenger"],
    ) == ("1", "2")
    assert metadata(result)["predictions"]["fleet/fleet_version"] == first_run.run_id
    assert checks(result)["every_row_is_answered"].passed
    # A person may let it serve anyway; that is worth a look, and no error.
    result = fleet.launch("champion", launch=LaunchSettings(as_of=AS_OF, decision="promote"))
    check = checks(result)["challenger_passed_its_gates"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert registry.get("shop", "champion").number == "2"


def test_a_first_version_serves_whatever_its_gates_say(
    fleet: Any, second_run: pd.DataFrame, checks: Checks
) -> None:
    as_challenger(fleet, second_run.assign(run_id="poor", status="failed"))
    del fleet.resources["registry"].aliases["shop", "champion"]
    result = fleet.launch("champion", "predictions")
    assert result.success
    assert fleet.resources["registry"].get("shop", "champion").number == "2"
    found = checks(result)
    gates = found["challenger_passed_its_gates"]
    assert (gates.passed, gates.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "did not pass every gate: few groups failed" in gates.description
    assert found["every_row_is_answered"].passed


@pytest.mark.parametrize("decision", ["judge", "promote"])
def test_a_version_that_cannot_answer_serves_in_no_case(
    fleet: Any,
    second_run: pd.DataFrame,
    checks: Checks,
    monkeypatch: pytest.MonkeyPatch,
    decision: str,
) -> None:
    as_challenger(fleet, second_run.assign(run_id="lacking"))
    registry = fleet.resources["registry"]
    whole = type(registry).open_pack

    def open_pack(self: Any, version: Any, options: Any = None) -> FleetModel:
        if version.number == "2":
            raise PackError("index.json: damaged")
        return whole(self, version, options)

    monkeypatch.setattr(type(registry), "open_pack", open_pack)
    result = fleet.launch(
        "champion", "predictions", launch=LaunchSettings(as_of=AS_OF, decision=decision)
    )
    check = checks(result)["challenger_passed_its_gates"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "the version can be opened (index.json: damaged" in check.description
    assert check.description.endswith("Materialise models and meta_model again")
    assert registry.get("shop", "champion").number == "1"
    assert checks(result)["every_row_is_answered"].passed


def test_a_launch_on_unchanged_data_registers_no_new_version(
    fleet: Any, metadata: Metadata, checks: Checks
) -> None:
    registry = fleet.resources["registry"]
    result = fleet.launch("models", "meta_model", "champion", "predictions")
    assert result.success
    assert [version.number for version in registry.versions["shop"]] == ["1"]
    assert (registry.get("shop", "challenger").number, registry.get("shop", "champion").number) == (
        "1",
        "1",
    )
    told = metadata(result)
    assert (told["meta_model"]["fleet/version"], told["champion"]["fleet/groups_moved"]) == ("1", 0)
    assert all(check.passed for check in checks(result).values())


def test_a_challenger_that_passes_its_gates_becomes_champion(
    fleet: Any, second_run: pd.DataFrame, metadata: Metadata, checks: Checks
) -> None:
    as_challenger(fleet, second_run)
    result = fleet.launch("champion")
    assert result.success
    assert fleet.resources["registry"].get("shop", "champion").fleet_version == "second"
    assert (
        metadata(result)["champion"]["fleet/before"],
        metadata(result)["champion"]["fleet/champion"],
    ) == ("1", "2")
    assert checks(result)["challenger_passed_its_gates"].description == "all gates passed"


def test_a_champion_that_cannot_be_opened_is_replaced(
    fleet: Any, second_run: pd.DataFrame, metadata: Metadata
) -> None:
    as_challenger(fleet, second_run)
    registry = fleet.resources["registry"]
    registry.versions["shop"].append(
        type(registry.get("shop", "1"))("shop", "7", "of another release")
    )
    registry.aliases["shop", "champion"] = "7"
    result = fleet.launch("champion")
    assert result.success
    told = metadata(result)["champion"]
    assert (told["fleet/before"], told["fleet/champion"]) == ("7", "2")
    decisions = fleet.table("decisions")
    decided = decisions[decisions["champion_before"] == "7"]
    assert decided["moved"].all()
    assert len(decided) == told["fleet/groups_moved"] == 9
    assert set(decided["kind"]) == {"new_group"}


def test_without_a_champion_predictions_say_what_to_do(fleet: Any, failure: Failure) -> None:
    fleet.resources["registry"].aliases.clear()
    result = fleet.launch("predictions")
    assert not result.success
    assert failure(result) == (
        "registered model 'shop' has no champion; materialise shop/models, "
        "meta_model and champion first"
    )


@pytest.mark.parametrize(
    ("change", "answers", "without", "doubled"),
    [("lost", 11, 0, 0), ("twice", 24, 0, 12), ("empty", 12, 12, 0)],
)
def test_answers_that_are_lost_doubled_or_empty_fail_the_check(
    fleet: Any,
    monkeypatch: pytest.MonkeyPatch,
    checks: Checks,
    change: str,
    answers: int,
    without: int,
    doubled: int,
) -> None:
    import assets.predictions as module

    right = module.score_rows

    def wrong(*args: Any) -> Any:
        found = right(*args)
        if change == "lost":
            return found.limit(11)
        return (
            found.unionByName(found)
            if change == "twice"
            else found.withColumn("prediction", found["prediction"] * float("nan"))
        )

    monkeypatch.setattr(module, "score_rows", wrong)
    check = checks(fleet.launch("predictions", launch=LaunchSettings(as_of="2023-10-20")))[
        "every_row_is_answered"
    ]
    assert (check.passed, check.severity, check.blocking) == (
        False,
        dg.AssetCheckSeverity.ERROR,
        True,
    )
    found = {name: value.value for name, value in check.metadata.items()}
    assert (
        found["rows_to_score"],
        found["answers"],
        found["without_prediction"],
        found["doubled"],
    ) == (12, answers, without, doubled)


def test_scoring_again_replaces_only_its_own_as_of(fleet: Any) -> None:
    fleet.launch("predictions", launch=LaunchSettings(as_of="2023-11-15"))
    fleet.launch("predictions")
    fleet.launch("predictions")
    counts = fleet.table("predictions")["as_of"].value_counts()
    assert (counts["2023-10-15T00:00:00"], counts["2023-11-15T00:00:00"]) == (12, 6)


@pytest.fixture
def broken_namespace(fleet: Any) -> Callable[..., dg.ExecuteInProcessResult]:
    """Check a training run whose tables were tampered with, under the name of a trial."""

    def check(
        ledger: pd.DataFrame, boosters: pa.Table, n_groups: int | None = None
    ) -> dg.ExecuteInProcessResult:
        tables = fleet.resources["tables"]
        runs = fleet.table("runs").dropna(subset="finished_at").sort_values("started_at").head(1)
        runs["n_groups"] = n_groups if n_groups is not None else runs["n_groups"]
        for contract, rows in {
            RUNS: pa.Table.from_pandas(runs, schema=RUNS.schema, preserve_index=False),
            BOOSTERS: boosters,
        }.items():
            write_arrow(
                tables,
                [rows],
                contract.schema,
                tables.location("shop-trial", contract.name),
                mode="overwrite",
            )
        rows = pa.Table.from_pandas(ledger, schema=LEDGER.schema, preserve_index=False)
        write_arrow(
            tables, [rows], LEDGER.schema, tables.location("shop-trial", "ledger"), mode="overwrite"
        )
        checks = fleet.links["models"][1]
        model = dg.AssetSpec(["shop", "models"])
        job = dg.Definitions(
            assets=[model],
            asset_checks=[checks],
            resources={**fleet.resources, "launch": LaunchSettings(limit_groups=1)},
        ).resolve_implicit_global_asset_job_def()
        return job.execute_in_process(raise_on_error=False)

    return check


def one_run(fleet: Any) -> tuple[pd.DataFrame, pa.Table]:
    ledger, tables = fleet.table("ledger"), fleet.resources["tables"]
    run_id = (
        fleet.table("runs").dropna(subset="finished_at").sort_values("started_at")["run_id"].iloc[0]
    )
    return ledger[ledger["run_id"] == run_id], tables.read_arrow(
        tables.location("shop", "boosters"), where={"run_id": run_id}
    )


@pytest.mark.parametrize(
    "damage",
    [
        "none",
        "lost row",
        "doubled row",
        "unknown status",
        "lost booster",
        "damaged booster",
        "failed group",
    ],
)
def test_checks_of_models_find_what_is_wrong(
    fleet: Any,
    broken_namespace: Callable[..., dg.ExecuteInProcessResult],
    checks: Checks,
    damage: str,
) -> None:
    ledger, boosters = one_run(fleet)
    wrong = "every_group_has_an_outcome"
    if damage == "lost row":
        ledger = ledger.iloc[1:]
    elif damage == "doubled row":
        ledger = pd.concat([ledger.iloc[1:], ledger.iloc[[1]]])
    elif damage == "unknown status":
        ledger = ledger.assign(status="lost")
    elif damage == "failed group":
        ledger, wrong = ledger.assign(status="failed", error_class="KeyError"), "no_group_failed"
    elif damage == "lost booster":
        boosters, wrong = boosters.slice(1), "boosters_match_the_ledger"
    elif damage == "damaged booster":
        text = [bytes([*row[:40], row[40] ^ 1, *row[41:]]) for row in boosters["text"].to_pylist()]
        boosters, wrong = (
            boosters.set_column(boosters.column_names.index("text"), "text", pa.array(text)),
            "boosters_match_the_ledger",
        )
    found = checks(broken_namespace(ledger, boosters))
    assert sorted(found) == [
        "boosters_match_the_ledger",
        "every_group_has_an_outcome",
        "every_judged_group_is_measured",
        "no_group_failed",
    ]
    assert [name for name, check in found.items() if not check.passed] == (
        [] if damage == "none" else [wrong]
    )
    warns = dg.AssetCheckSeverity.WARN if damage == "failed group" else dg.AssetCheckSeverity.ERROR
    assert found[wrong].severity == warns
    assert found[wrong].blocking is (damage != "failed group")


def test_meta_model_without_a_training_run_says_what_to_do(
    fleet: Any, failure: Failure, tmp_path: Any
) -> None:
    elsewhere = DeltaTables(root=str(tmp_path))
    assert "has no finished training run; materialise shop/models first" in failure(
        fleet.launch("meta_model", tables=elsewhere)
    )


def test_a_registered_model_that_answers_otherwise_fails_its_check(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, checks: Checks
) -> None:
    class Other(FleetModel):
        def predict(self, frame: pd.DataFrame, **options: Any) -> pd.DataFrame:
            found = super().predict(frame, **options)
            return found.assign(prediction=found["prediction"] + 1)

    del fleet.resources["registry"].aliases["shop", "challenger"]
    # What the registry opens, not what was packed.
    monkeypatch.setattr("pipeline.testing.doubles.FleetModel", Other)
    check = checks(fleet.launch("meta_model"))["registered_model_answers"]
    assert (check.passed, check.blocking) == (False, True)


def test_a_registry_that_fails_is_told_in_its_own_words(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError(
            "registry: no space left; the training is kept: materialise meta_model again"
        )

    del fleet.resources["registry"].aliases["shop", "challenger"]
    monkeypatch.setattr(fleet.resources["registry"], "register", refuse)
    assert (
        failure(fleet.launch("meta_model"))
        == "registry: no space left; the training is kept: materialise meta_model again"
    )
