"""What a launch asks of a training run."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from pipeline.models.meta_model import GroupKey
from pipeline.models.start import Start
from pipeline.runs.manifest import RunManifest
from pipeline.tables import RECIPES

Retrain = Literal["changed", "stale", "listed", "all"]


@dataclass(frozen=True)
class Request:
    """What a launch asks for.

    Args:
        run_id: of the run, unless it resumes another.
        as_of: the date that the run pretends it is; None means that of the newest row with a
            target.
        limit_groups: number of finest groups to try the fleet on; None means all.
        retrain: which groups are trained again, see `Policy`.
        listed: group ids, for `retrain: listed`.
        recipes: earlier recipes by group; if there are any, they are refitted and nothing else is
            trained.
    """

    run_id: str
    as_of: pd.Timestamp | None = None
    limit_groups: int | None = None
    retrain: Retrain = "changed"
    listed: Collection[str] = ()
    recipes: Mapping[GroupKey, Start] = field(default_factory=dict)

    @classmethod
    def of_refit(
        cls, run_id: str, challenger: RunManifest, recipes: Mapping[GroupKey, Start]
    ) -> "Request":
        """The request of a run that fits earlier recipes on the rows of another run.

        Args:
            run_id: of the run, unless it resumes another.
            challenger: the other run.
            recipes: how each group starts.
        """
        return cls(run_id, challenger.cutoffs.as_of, challenger.limit_groups, recipes=recipes)

    @property
    def text(self) -> str:
        """What must be equal for a run to be resumed, as JSON.

        The as-of is not part of it: the run's digest of its data covers it.
        """
        parts: dict[str, Any] = {
            "limit_groups": self.limit_groups,
            "listed": sorted(self.listed),
            "retrain": self.retrain,
        }
        if self.recipes:
            starts = [[*key, start.to_json()] for key, start in sorted(self.recipes.items())]
            parts[RECIPES] = hashlib.sha256(json.dumps(starts).encode()).hexdigest()
        return json.dumps(parts, sort_keys=True)
