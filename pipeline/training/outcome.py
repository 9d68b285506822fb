"""What became of one group: pandas in, one outcome out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from pipeline.models.boosters import EncodedBooster

Status = Literal["trained", "refreshed", "reused", "inherited", "failed", "crashed"]
# What training gives a booster; a reused group has that of an earlier run.
WITH_BOOSTER = ("trained", "refreshed", "reused")

TOO_FEW_ROWS = "too_few_rows"
NO_TARGET = "no_target"
CONSTANT_TARGET = "constant_target"
INFINITE_TARGET = "infinite_target"
NOT_POOLED = "pooling_none"
VANISHED = "vanished"
NOT_LISTED = "not_listed"
ERROR = "error"
TIMEOUT = "timeout"
NATIVE_CRASH = "native_crash"
UNKNOWN_CLASS = "unknown_class"


@dataclass(frozen=True)
class Outcome:
    """The result of `train_group`.

    Args:
        status: what became of the group.
        reason: why it was not trained; None where it was.
        ledger: further columns of the group's ledger row (see `tables.LEDGER`); what was not
            measured is absent.
        booster: the served booster; None unless trained.
        holdout: rows of `tables.HOLDOUT` without run, grain and group; None where there are none.
    """

    status: Status
    reason: str | None = None
    ledger: Mapping[str, Any] = field(default_factory=dict)
    booster: EncodedBooster | None = None
    holdout: pd.DataFrame | None = None
