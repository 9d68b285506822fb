"""How the training of one group begins: what is known of it from earlier runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Start:
    """What a group's training begins with; pinned by the run, part of the group's fingerprint.

    Args:
        trials: parameters to try first, best guess first; the defaults for the group's size follow.
        refit: parameters to fit with, without any trial; None tunes.
        n_rounds: boosting rounds of a refit.
        max_trials: trials at most, where that is fewer than the fleet's budget per group allows (first pass of `budget_seconds`).
        judge: whether the group is only to tell which rows are judged, and is not trained.
    """

    trials: tuple[Mapping[str, Any], ...] = ()
    refit: Mapping[str, Any] | None = None
    n_rounds: int = 0
    max_trials: int | None = None
    judge: bool = False

    def to_json(self) -> str:
        """The ledger's `started_from`; equal starts give equal text."""
        if self.refit is not None:
            return json.dumps({"n_rounds": self.n_rounds, "refit": self.refit}, sort_keys=True)
        parts = {"trials": list(self.trials), "max_trials": self.max_trials, "judge": self.judge}
        return json.dumps({name: value for name, value in parts.items() if value}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Start":
        """The inverse of `to_json`."""
        found = json.loads(text)
        return cls(tuple(found.get("trials", ())), found.get("refit"), found.get("n_rounds", 0), found.get("max_trials"), found.get("judge", False))
