"""How the training of one group begins: what is known of it from earlier runs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Winner:
    """What did best on some of a group's tune rows.

    Args:
        parameters: of the trial, less the fixed ones.
        n_rounds: its boosting rounds, at least 1.
    """

    parameters: Mapping[str, Any]
    n_rounds: int

    @classmethod
    def from_dict(cls, written: Mapping[str, Any] | None) -> "Winner | None":
        """From its JSON in a cross-selection; None where that half had no rows."""
        if written is None:
            return None
        return cls(**written)


@dataclass(frozen=True)
class CrossSelection:
    """What did best on each half of the tune rows that chose a group's parameters.

    A row is predicted by the winner of the half that it does not lie in, so that no prediction was
    selected on its own row.

    Args:
        middle: cuts the halves, as ISO text; the earlier half lies before it.
        earlier: winner of the earlier half; None where that half had no rows.
        later: winner of the later half; None where that half had no rows.
    """

    middle: str
    earlier: Winner | None
    later: Winner | None

    @property
    def predicts_before(self) -> Winner | None:
        """Who predicts rows before the middle: the later half's winner, or the only one."""
        return self.later or self.earlier

    @property
    def predicts_after(self) -> Winner | None:
        """Who predicts rows from the middle on: the earlier half's winner, or the only one."""
        return self.earlier or self.later

    def to_json(self) -> str:
        """The ledger's `cross_selection`."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CrossSelection":
        """The inverse of `to_json`."""
        parts = json.loads(text)
        return cls(
            parts["middle"],
            earlier=Winner.from_dict(parts["earlier"]),
            later=Winner.from_dict(parts["later"]),
        )


@dataclass(frozen=True)
class Start:
    """What a group's training begins with; pinned by the run, part of the group's fingerprint.

    Args:
        trials: parameters to try first, best guess first; the defaults for the group's size follow.
        refit: parameters to fit with, without any trial; None tunes.
        n_rounds: boosting rounds of a refit.
        cross: of the study that chose them, for a refit's predictions of tune rows.
        max_trials: trials at most, where that is fewer than the fleet's budget per group allows
            (first pass of `budget_seconds`).
        judge: whether the group is not trained, and only says which rows are judged.
    """

    trials: tuple[Mapping[str, Any], ...] = ()
    refit: Mapping[str, Any] | None = None
    n_rounds: int = 0
    max_trials: int | None = None
    judge: bool = False
    cross: CrossSelection | None = None

    @property
    def predicts_what_chose_it(self) -> bool:
        """Whether tune rows are predicted with parameters that these very rows chose.

        A weight learnt on such predictions is too high.
        """
        return self.refit is not None and self.cross is None

    def to_json(self) -> str:
        """The ledger's `started_from`; equal starts give equal text."""
        if self.refit is not None:
            refit: dict[str, Any] = {"n_rounds": self.n_rounds, "refit": self.refit}
            if self.cross is not None:
                refit["cross"] = self.cross.to_json()
            return json.dumps(refit, sort_keys=True)
        parts = {"trials": list(self.trials), "max_trials": self.max_trials, "judge": self.judge}
        return json.dumps({name: value for name, value in parts.items() if value}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Start":
        """The inverse of `to_json`."""
        parts = json.loads(text)
        cross = None
        if parts.get("cross") is not None:
            cross = CrossSelection.from_json(parts["cross"])
        return cls(
            trials=tuple(parts.get("trials", ())),
            refit=parts.get("refit"),
            n_rounds=parts.get("n_rounds", 0),
            max_trials=parts.get("max_trials"),
            judge=parts.get("judge", False),
            cross=cross,
        )
