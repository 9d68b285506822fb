"""What a group's model is made from, in one hash: equal fingerprints give equal boosters."""

import hashlib
import json
from importlib.metadata import version as installed_version

from pipeline.spec import BUDGETS
from pipeline.training.trainer import TrainingSettings

# Goes up whenever the training code gives other boosters from the same rows.
TRAINING_VERSION = 1
_LIBRARIES = ("lightgbm", "numpy", "optuna")
# Parts of a model spec that change no booster, or that the hashes of the rows cover.
_NOT_LEARNT_FROM = ("categories", "fleet", "interval", "intervals", "optional", "prior", "required")


def shared_digest(settings: TrainingSettings) -> str:
    """Hash of what all groups of a run have in common.

    That is the model spec, objective, budget and search space, dates, code and libraries. Lists of
    categories are left out: a group's rows are hashed with the numbers that its own values have in
    them. So is what changes no booster: which columns a batch may lack, and the levels of
    intervals.
    """
    model = settings.model_spec.to_dict()
    for name in _NOT_LEARNT_FROM:
        model.pop(name, None)
    cutoffs = settings.cutoffs
    parts = {
        "model": model,
        "goal": settings.goal,
        "categoricals": sorted(settings.model_spec.categories),
        "weight": settings.weight,
        "tuning": settings.tuning.model_dump(mode="json", exclude=set(BUDGETS)),
        "cutoffs": [str(cutoffs.tune_start), str(cutoffs.report_start)],
        "training": TRAINING_VERSION,
        "libraries": {library: installed_version(library) for library in _LIBRARIES},
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(rows_hash: str, shared: str, started_from: str) -> str:
    """One group's fingerprint.

    Args:
        rows_hash: of its training rows, whatever their order.
        shared: as from `shared_digest`.
        started_from: as from `Start.to_json`.
    """
    return hashlib.sha256(f"{rows_hash}\n{shared}\n{started_from}".encode()).hexdigest()[:32]
