"""A run manifest is a row of a table and back, and its JSON is what earlier releases wrote."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.models.pack import build_model_spec
from pipeline.models.start import Start
from pipeline.runs.manifest import RunManifest
from pipeline.runs.request import Request
from pipeline.tables import RUNS, records
from pipeline.testing.data import small_spec
from pipeline.testing.run_parts import CUTOFFS, make_manifest
from pipeline.training.blend import Constants

OF_CLASSES: dict[str, Any] = {
    "constants": Constants(0.0, 0.0, (0.25, 0.75)),
    "model_spec": build_model_spec(
        small_spec(
            task="multiclass", target={"column": "label", "classes": ["ål", "øl"]}, baselines=None
        ),
        {},
        ["ål", "øl"],
        [0.25, 0.75],
    ),
}
UNFINISHED: dict[str, Any] = {"finished_at": None, "waves": (), "unknown_groups": ()}


def read_back(manifest: RunManifest) -> RunManifest:
    """The manifest after its row went through a table and pandas."""
    table = pa.Table.from_pylist([manifest.to_row()], schema=RUNS.schema)
    (row,) = records(table.to_pandas())
    return RunManifest.from_row(row)


# A row and back


@pytest.mark.parametrize("target", [{}, OF_CLASSES], ids=["regression", "multiclass"])
@pytest.mark.parametrize("end", [{}, UNFINISHED], ids=["finished", "unfinished"])
@pytest.mark.parametrize("before", [None, "run-0"])
def test_a_manifest_comes_back_from_its_row(
    target: dict[str, Any], end: dict[str, Any], before: str | None
) -> None:
    fields = {"previous_run_id": before, "unknown_groups": ('["å"]',), **target, **end}
    manifest = make_manifest(**fields)
    assert RunManifest.from_row(manifest.to_row()) == manifest
    assert read_back(manifest) == manifest


def test_a_row_has_just_the_columns_of_the_table() -> None:
    assert list(make_manifest().to_row()) == RUNS.schema.names


def test_the_lists_of_an_unfinished_run_are_null() -> None:
    row = make_manifest(**{**UNFINISHED, "waves": ("left over",)}).to_row()
    assert (row["finished_at"], row["waves"], row["unknown_groups"]) == (None, None, None)


def test_the_constants_of_a_fleet_of_classes_are_null() -> None:
    row = make_manifest(**OF_CLASSES).to_row()
    assert (row["constant"], row["constant_without_offset"]) == (None, None)


@pytest.mark.parametrize("null", [None, np.nan, pd.NaT])
def test_whatever_stands_for_null_is_read_as_null(null: Any) -> None:
    nullable = ("finished_at", "previous_run_id", "request", "versions", "waves", "unknown_groups")
    row = {**make_manifest(**OF_CLASSES).to_row(), **dict.fromkeys(nullable, null)}
    manifest = RunManifest.from_row({**row, "constant": null, "constant_without_offset": null})
    assert manifest.finished_at is None
    assert manifest.previous_run_id is None
    assert manifest.request == "{}"
    assert manifest.versions == {}
    assert (manifest.waves, manifest.unknown_groups) == ((), ())
    assert manifest.constants == Constants(0.0, 0.0, (0.25, 0.75))
    assert (manifest.limit_groups, manifest.is_refit) == (None, False)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_dates_are_utc_without_a_zone(zone: str) -> None:
    row = make_manifest().to_row()
    for name in ("as_of", "tune_start", "report_start"):
        row[name] = row[name].tz_localize("UTC").tz_convert(zone)
    assert RunManifest.from_row(row).cutoffs == CUTOFFS


# Its JSON


def test_the_json_of_a_row_is_what_earlier_releases_wrote() -> None:
    row = make_manifest(
        model_spec=build_model_spec(small_spec(), {"kind": ["ål"]}),
        versions={"python": "3.11", "numpy": "å"},
        waves=("run-1-a-0", "run-1-a-1"),
        unknown_groups=('["å"]',),
    ).to_row()
    assert '"categories": {"kind": ["ål"]}' in row["model_spec"]
    assert row["versions"] == '{"python": "3.11", "numpy": "\\u00e5"}'
    assert row["waves"] == '["run-1-a-0", "run-1-a-1"]'
    assert row["unknown_groups"] == '["[\\"å\\"]"]'


def test_a_finished_run_without_waves_says_so() -> None:
    row = make_manifest(waves=(), unknown_groups=()).to_row()
    assert (row["waves"], row["unknown_groups"]) == ("[]", "[]")


def test_the_json_of_a_model_spec_keeps_its_order() -> None:
    spec = small_spec()
    text = make_manifest(model_spec=build_model_spec(spec, {"kind": ["large", "small"]})).to_row()
    assert text["model_spec"] == (
        '{"fleet": "small", "grains": [[], ["region"], ["region", "city"]], '
        '"features": ["price", "promotion", "day_of_week", "kind"], '
        '"categories": {"kind": ["large", "small"]}, '
        '"required": ["region", "city", "price", "promotion", "day_of_week", "kind"], '
        '"optional": [], "task": "regression", "own": "independent", "is_count": false, '
        '"classes": [], "prior": [], "target": {"column": "sales", "transform": "none", '
        '"offset": null, "scale": null}, "interval": 0.8, "intervals": [0.8, 0.95]}'
    )


def test_the_text_of_a_request_is_sorted_and_leaves_out_the_run_and_its_as_of() -> None:
    request = Request("run-1", CUTOFFS.as_of, 5, "listed", ('["b"]', '["å"]', '["a"]'))
    assert request.text == (
        '{"limit_groups": 5, "listed": ["[\\"a\\"]", "[\\"b\\"]", "[\\"\\u00e5\\"]"], '
        '"retrain": "listed"}'
    )
    assert request.text == replace(request, run_id="run-2", as_of=None).text
    assert request.text == replace(request, listed=('["å"]', '["a"]', '["b"]')).text


def test_the_text_of_a_refit_has_a_digest_of_its_recipes() -> None:
    recipes = {(2, "[]"): Start(refit={"a": 1}, n_rounds=3), (0, "[]"): Start(judge=True)}
    request = Request("run-1", recipes=recipes)
    assert request.text == (
        '{"limit_groups": null, "listed": [], "recipes": '
        '"18fea058fe21ba9569926fe9c8c81c3c6b9541aa2f573c303039d611abb49fc3", "retrain": "changed"}'
    )
    turned = dict(reversed(recipes.items()))
    assert replace(request, recipes=turned).text == request.text
    other = {**recipes, (0, "[]"): Start()}
    assert replace(request, recipes=other).text != request.text


# What a run says of itself


@pytest.mark.parametrize("limit", [None, 3])
def test_the_limit_of_groups_is_that_of_the_launch(limit: int | None) -> None:
    request = Request("run-1", limit_groups=limit)
    assert make_manifest(request=request.text).limit_groups == limit


def test_only_a_run_with_recipes_is_a_refit() -> None:
    challenger = make_manifest(request=Request("run-1", limit_groups=4).text)
    refit = Request.of_refit("run-2", challenger, {(0, "[]"): Start(judge=True)})
    assert (refit.as_of, refit.limit_groups) == (CUTOFFS.as_of, 4)
    assert make_manifest(request=refit.text).is_refit
    assert not challenger.is_refit


def test_runs_of_another_as_of_or_feature_version_are_on_other_rows() -> None:
    run = make_manifest()
    later = replace(CUTOFFS, as_of=CUTOFFS.as_of + pd.Timedelta(days=1))
    assert not run.is_on_other_rows(make_manifest("run-2", spec_digest="another"))
    assert run.is_on_other_rows(make_manifest("run-2", cutoffs=later))
    assert run.is_on_other_rows(make_manifest("run-2", features_version=4))
    assert run.is_on_other_rows(None)


def test_a_generation_is_the_model_spec_with_its_version_and_constants() -> None:
    run = make_manifest()
    assert run.generation.to_dict() == {
        **run.model_spec.to_dict(),
        "fleet_version": "run-1",
        "constant": 97.5,
        "constant_without_offset": 96.25,
    }
    of_classes = make_manifest(**OF_CLASSES).generation
    assert (of_classes.constant, of_classes.model_spec.prior) == (None, (0.25, 0.75))


def test_a_run_that_comes_to_its_end_pins_what_it_left() -> None:
    before = pd.Timestamp.now(tz="UTC")
    running = make_manifest(**UNFINISHED)
    done = running.finished(n_groups=8, waves=("w",), unknown_groups=("[]",))
    assert done.finished_at is not None
    assert before <= done.finished_at <= pd.Timestamp.now(tz="UTC")
    assert (done.n_groups, done.waves, done.unknown_groups) == (8, ("w",), ("[]",))
    assert replace(done, finished_at=None, n_groups=7, waves=(), unknown_groups=()) == running
