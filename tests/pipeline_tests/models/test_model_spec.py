"""The texts of model specs: fingerprints, runs and packs depend on every byte of them."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

import pipeline.runs.fingerprints as module
from pipeline.models.meta_model import CORRECTION, Generation, ModelSpec
from pipeline.models.pack import PackedRun, build_model_spec, write_pack
from pipeline.runs.fingerprints import shared_digest
from pipeline.testing.data import small_spec
from pipeline.training.splits import Cutoffs
from pipeline.training.trainer import TrainingSettings

CUTOFFS = Cutoffs(*(pd.Timestamp(day) for day in ("2024-10-26", "2024-07-26", "2024-09-26")))
CATEGORIES = {"kind": ["große", "petit é", "🦊", '"']}
FLEETS = {
    "regression": small_spec(
        target={
            "column": "sales",
            "transform": "log1p",
            "offset": "usual_sales",
            "scale": "usual_sales",
        },
        scoring={"interval": 0.9, "intervals": [0.5, 0.99]},
        features={"columns": ["price", "promotion", "usual_sales"]},
    ),
    "binary": small_spec(task="binary", baselines=None),
    "multiclass": small_spec(task="multiclass", baselines=None),
    "count": small_spec(tuning={"objective": "poisson"}),
}
MODEL_SPECS = {
    "regression": build_model_spec(
        FLEETS["regression"], CATEGORIES, own=CORRECTION, nullable=["price", "usual_sales", "kind"]
    ),
    "binary": build_model_spec(FLEETS["binary"], CATEGORIES, ["no", "yes"]),
    "multiclass": build_model_spec(
        FLEETS["multiclass"], {}, ["low", "mid", "tôp"], [0.25, 0.5, 0.1 + 0.15]
    ),
    "count": build_model_spec(FLEETS["count"], CATEGORIES),
}
TEXTS = {
    "regression": '{"fleet": "small", "grains": [[], ["region"], ["region", "city"]], "features": ["price", "promotion", "usual_sales", "day_of_week", "kind"], "categories": {"kind": ["große", "petit é", "🦊", "\\""]}, "required": ["region", "city", "promotion", "usual_sales", "day_of_week"], "optional": ["price", "kind"], "task": "regression", "own": "correction", "is_count": false, "classes": [], "prior": [], "target": {"column": "sales", "transform": "log1p", "offset": "usual_sales", "scale": "usual_sales"}, "interval": 0.9, "intervals": [0.5, 0.9, 0.99]}',
    "binary": '{"fleet": "small", "grains": [[], ["region"], ["region", "city"]], "features": ["price", "promotion", "day_of_week", "kind"], "categories": {"kind": ["große", "petit é", "🦊", "\\""]}, "required": ["region", "city", "price", "promotion", "day_of_week", "kind"], "optional": [], "task": "binary", "own": "independent", "is_count": false, "classes": ["no", "yes"], "prior": [], "target": {"column": "sales", "transform": "none", "offset": null, "scale": null}, "interval": null, "intervals": []}',
    "multiclass": '{"fleet": "small", "grains": [[], ["region"], ["region", "city"]], "features": ["price", "promotion", "day_of_week", "kind"], "categories": {}, "required": ["region", "city", "price", "promotion", "day_of_week", "kind"], "optional": [], "task": "multiclass", "own": "independent", "is_count": false, "classes": ["low", "mid", "tôp"], "prior": [0.25, 0.5, 0.25], "target": {"column": "sales", "transform": "none", "offset": null, "scale": null}, "interval": null, "intervals": []}',
    "count": '{"fleet": "small", "grains": [[], ["region"], ["region", "city"]], "features": ["price", "promotion", "day_of_week", "kind"], "categories": {"kind": ["große", "petit é", "🦊", "\\""]}, "required": ["region", "city", "price", "promotion", "day_of_week", "kind"], "optional": [], "task": "regression", "own": "independent", "is_count": true, "classes": [], "prior": [], "target": {"column": "sales", "transform": "none", "offset": null, "scale": null}, "interval": 0.8, "intervals": [0.8, 0.95]}',
}
DIGESTS = {
    "regression": "9da002e329b949edeba22a2991f4f7a1056be5c1f0cc5a349aab5c24b33bf22e",
    "binary": "acf502fc2902961ed31a30388861e1ab84619a92fb2f5df3ba6db870ab3b01fb",
    "multiclass": "820221f8d509832a272a31ce8cb7b9f12a19edb6a997ab30f6ecd2521f2785c9",
    "count": "57edd2150d7eeab89cda59cab002f53d0822d9cdbbb0a9450e079e81061c3c41",
}
PACKED = "1ff7fe06e0be437c6d4213e136c9dd6e31e291f20dfac152ce53e0ca9cd34b89"


def digest_of(task: str) -> str:
    return shared_digest(
        TrainingSettings.of_fleet(FLEETS[task], MODEL_SPECS[task], run_id="run-1", cutoffs=CUTOFFS)
    )


def packed_text(folder: Path) -> str:
    ledger = pd.DataFrame(
        {
            "grain": [0, 1],
            "group_id": ["[]", '["ö"]'],
            "booster_id": None,
            "weight": 0.0,
            "intervals": None,
            "answered_by": [None, "constant"],
        }
    )
    own = PackedRun(Generation(MODEL_SPECS["regression"], "run-1", 0.1, None), ledger)
    other = PackedRun(
        Generation(MODEL_SPECS["count"], "run-0", 0.1, None), ledger.drop(columns="answered_by")
    )
    write_pack(folder, [own, other], lambda _: [])
    return (folder / "spec.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TEXTS)
def test_the_text_of_a_model_spec(task: str) -> None:
    assert MODEL_SPECS[task].to_json() == TEXTS[task]
    assert ModelSpec.from_json(TEXTS[task]) == MODEL_SPECS[task]


@pytest.mark.parametrize("task", DIGESTS)
def test_what_all_fingerprints_of_a_run_share(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", lambda _: "1")
    monkeypatch.setattr(module, "TRAINING_VERSION", 1)
    assert digest_of(task) == DIGESTS[task]


def test_the_text_of_a_pack(tmp_path: Path) -> None:
    assert hashlib.sha256(packed_text(tmp_path / "pack").encode()).hexdigest() == PACKED


def test_what_an_earlier_release_did_not_write_is_not_written_again() -> None:
    described = json.loads(TEXTS["regression"])
    del described["is_count"]
    model_spec = ModelSpec.from_dict(described)
    assert model_spec.is_count is None
    assert model_spec.to_json() == json.dumps(described, ensure_ascii=False)
    entry = {
        **described,
        "fleet_version": "run-1",
        "constant": 0.1,
        "constant_without_offset": None,
    }
    assert json.dumps(Generation.from_dict(entry).to_dict()) == json.dumps(entry)
