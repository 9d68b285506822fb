"""The importance table of the shop fleet: what it says, its check, and that it stops nothing."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.tables import IMPORTANCE
from resources.delta_tables import DeltaTables

pytestmark = pytest.mark.spark

Metadata = Callable[[dg.ExecuteInProcessResult], dict[str, Mapping[str, Any]]]
Checks = Callable[[dg.ExecuteInProcessResult], dict[str, dg.AssetCheckEvaluation]]


def test_every_model_that_answers_has_a_row_per_feature(
    fleet: Any, first_run: dg.ExecuteInProcessResult, metadata: Metadata
) -> None:
    found, ledger = fleet.table(IMPORTANCE.name), fleet.table("ledger")
    of_run = found[found["run_id"] == first_run.run_id]
    assert not of_run.duplicated(list(IMPORTANCE.key)).any()
    models = set(
        ledger.loc[(ledger["run_id"] == first_run.run_id) & (ledger["weight"] > 0), "group_id"]
    )
    assert models
    assert of_run.groupby("group_id")["feature"].nunique().to_dict() == dict.fromkeys(
        models, len(fleet.spec.feature_columns)
    )
    told = metadata(first_run)["importance"]
    assert (told["fleet/groups"], told["fleet/copied"]) == (len(models), 0)
    assert told["dagster/row_count"] == len(models) * len(fleet.spec.feature_columns)
    assert "before it is blended" in told["fleet/explains"]
    assert told["fleet/plot"].startswith("![plot](data:image/png;base64,iVBOR")
    first = told["fleet/top_features"].splitlines()[2]
    # Amounts of the small fleet follow the size.
    assert first.startswith("| size |")
    assert f"| {len(models)} | {len(models)} |" in first


def test_a_group_without_importance_is_a_warning_that_names_it_and_stops_nothing(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, checks: Checks
) -> None:
    import assets.importance as module
    import pipeline.spark.importance as on_spark

    def all_models(ledger: Any, _: Any) -> Any:
        return ledger[ledger["booster_id"].notna()]

    right = module.write_importance

    def wrong(spark: Any, tables: Any, features: Any, spec: Any, run: Any, ledger: Any) -> Any:
        absent = ledger["group_id"].isin(['["north"]', '["north","n1"]'])
        told = right(spark, tables, features, spec, run, ledger[~absent])
        return module.ImportanceResult(
            9, 0, {'["north"]': "PackError: damaged"} | dict(told.failed)
        )

    # As if all nine models of this fleet counted in some answer; most have no weight.
    monkeypatch.setattr(module, "models_that_answer", all_models)
    monkeypatch.setattr(on_spark, "models_that_answer", all_models)
    monkeypatch.setattr(module, "write_importance", wrong)
    result = fleet.launch("importance")
    assert result.success
    check = checks(result)["every_model_has_importance"]
    assert (check.passed, check.severity, check.blocking) == (
        False,
        dg.AssetCheckSeverity.WARN,
        False,
    )
    assert (check.metadata["models"].value, check.metadata["absent"].value) == (9, 2)
    text = check.metadata["examples"].value
    assert "PackError: damaged" in text
    assert "its booster or its rows are missing" in text
    monkeypatch.undo()
    assert checks(fleet.launch("importance"))["every_model_has_importance"].passed


def test_a_training_that_changes_nothing_keeps_every_row(
    fleet: Any, metadata: Metadata, tmp_path: Path
) -> None:
    # A further run would be the newest one for other tests.
    shutil.copytree(fleet.resources["tables"].root, tmp_path / "tables")
    result = fleet.launch("models", "importance", tables=DeltaTables(root=str(tmp_path / "tables")))
    assert result.success
    told = metadata(result)["importance"]
    assert (told["fleet/groups"], told["fleet/copied"], told["fleet/run_id"]) == (
        1,
        1,
        result.run_id,
    )
