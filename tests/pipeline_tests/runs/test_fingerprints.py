from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

import pipeline.runs.fingerprints as module
from pipeline.models.meta_model import ModelSpec
from pipeline.models.pack import build_model_spec
from pipeline.runs.fingerprints import fingerprint, shared_digest
from pipeline.spec import FleetSpec
from pipeline.testing.data import small_spec
from pipeline.training.splits import Cutoffs
from pipeline.training.trainer import TrainingSettings

CUTOFFS = Cutoffs(*(pd.Timestamp(day) for day in ("2024-10-26", "2024-07-26", "2024-09-26")))
CATEGORIES = {"kind": ["large", "small"]}


def digest(
    cutoffs: Cutoffs = CUTOFFS, categories: dict[str, list[str]] = CATEGORIES, **changes: Any
) -> str:
    spec = small_spec(**changes)
    return digest_of(spec, build_model_spec(spec, categories), cutoffs)


def digest_of(spec: FleetSpec, model_spec: ModelSpec, cutoffs: Cutoffs = CUTOFFS) -> str:
    return shared_digest(
        TrainingSettings.of_fleet(spec, model_spec, run_id="run-1", cutoffs=cutoffs)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"columns": ["price"]}},
        {"features": {"columns": ["promotion", "price"]}},
        {"features": {"categoricals": []}},
        {"grains": [[], ["region"], ["region", "city"], ["region", "city", "kind"]]},
        {"target": {"column": "sales", "transform": "log"}},
        {"target": {"column": "sales", "offset": "usual_sales"}},
        {"target": {"column": "sales", "scale": "usual_sales"}},
        {"target": {"column": "sales", "weight": "usual_sales"}},
        {"tuning": {"objective": "l1"}},
        {"tuning": {"max_trials": 3}},
        {"tuning": {"patience": 1}},
        {"tuning": {"timeout_seconds": 5.0}},
        {"tuning": {"search": {"num_leaves": 3}}},
        {"tuning": {"max_rounds": 41}},
        {"tuning": {"fit_rows": 51}},
        {"tuning": {"tune_rows": 11}},
        {"tuning": {"seed": 2}},
    ],
)
def test_whatever_changes_a_booster_changes_the_digest(changes: dict[str, Any]) -> None:
    categories = {} if changes.get("features", {}).get("categoricals") == [] else CATEGORIES
    assert digest(categories=categories, **changes) != digest()


@pytest.mark.parametrize("field", ["tune_start", "report_start"])
def test_dates_that_cut_the_rows_change_the_digest(field: str) -> None:
    moved = {name: getattr(CUTOFFS, name) for name in ("as_of", "tune_start", "report_start")}
    moved[field] += pd.Timedelta(days=1)
    assert digest(Cutoffs(**moved)) != digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": {"budget_seconds": 100.0}},
        {"tuning": {"checkpoint_seconds": 5.0}},
        {"tuning": {"kill_after_seconds": 5.0}},
        {"tuning": {"max_rows": 5000}},
        {"tuning": {"retune_after": "2 months"}},
        {"name": "other"},
    ],
)
def test_when_and_how_long_to_train_does_not_change_it(changes: dict[str, Any]) -> None:
    assert digest(**changes) == digest()


def test_the_as_of_and_new_categories_leave_groups_alone_that_do_not_have_them() -> None:
    later = Cutoffs(CUTOFFS.as_of + pd.Timedelta(days=1), CUTOFFS.tune_start, CUTOFFS.report_start)
    assert digest(later) == digest()
    assert digest(categories={"kind": ["large", "small", "new"]}) == digest()


def test_columns_that_a_batch_may_lack_and_levels_of_intervals_change_no_booster() -> None:
    spec = small_spec(scoring={"interval": 0.9, "intervals": [0.5]})
    model_spec = build_model_spec(spec, CATEGORIES, nullable=["price", "kind"])
    assert model_spec.optional == ("price", "kind")
    assert digest_of(spec, model_spec) == digest()
    old = replace(model_spec, optional=(), interval=None, intervals=())
    assert digest_of(spec, old) == digest()


def test_other_code_and_other_libraries_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    with monkeypatch.context() as changed:
        changed.setattr(module, "TRAINING_VERSION", module.TRAINING_VERSION + 1)
        assert digest() != before
    for library in ("lightgbm", "numpy", "optuna"):
        with monkeypatch.context() as changed:
            changed.setattr(
                module,
                "installed_version",
                lambda name, library=library: "0" if name == library else module.__name__,
            )
            one = digest()
            changed.setattr(module, "installed_version", lambda _: module.__name__)
            assert digest() != one


def test_a_fingerprint_is_of_rows_settings_and_start() -> None:
    found = {
        fingerprint(*parts)
        for parts in [("r", "s", "{}"), ("q", "s", "{}"), ("r", "t", "{}"), ("r", "s", "[]")]
    }
    assert len(found) == 4
    assert fingerprint("r", "s", "{}") in found
