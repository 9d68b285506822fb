"""What a group's model is made from, in one hash: equal fingerprints give equal boosters."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from typing import Any

from pipeline.models.meta_model import ModelSpec
from pipeline.spec import BUDGETS, TuningSpec
from pipeline.training.splits import Cutoffs

# Goes up whenever the training code gives other boosters from the same rows.
TRAINING_VERSION = 1
_LIBRARIES = ("lightgbm", "numpy", "optuna")
# Parts of a model spec that change no booster, or are told by the rows themselves.
_NOT_LEARNT_FROM = ("categories", "fleet", "interval", "intervals", "optional", "prior", "required")


def shared_digest(
    model_spec: ModelSpec,
    goal: Mapping[str, Any],
    tuning: TuningSpec,
    cutoffs: Cutoffs,
    weight: str | None,
) -> str:
    """Hash of what all groups of a run have in common.

    Model spec, objective, budget and search space, dates, code and libraries.

    The lists of categories are left out: a group's rows are hashed with the numbers that its own
    values have in them. So is what changes no booster: which columns a batch may lack, and the
    levels of intervals.
    """
    parts = {
        "model": {
            name: part
            for name, part in model_spec.to_dict().items()
            if name not in _NOT_LEARNT_FROM
        },
        "goal": goal,
        "categoricals": sorted(model_spec.categories),
        "weight": weight,
        "tuning": tuning.model_dump(mode="json", exclude=set(BUDGETS)),
        "cutoffs": [str(cutoffs.tune_start), str(cutoffs.report_start)],
        "training": TRAINING_VERSION,
        "libraries": {library: installed_version(library) for library in _LIBRARIES},
    }
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def fingerprint(rows_hash: str, shared: str, started_from: str) -> str:
    """One group's fingerprint.

    Args:
        rows_hash: of its training rows, whatever their order.
        shared: as from `shared_digest`.
        started_from: as from `Start.to_json`.
    """
    return hashlib.sha256(f"{rows_hash}\n{shared}\n{started_from}".encode()).hexdigest()[:32]
