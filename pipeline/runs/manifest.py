"""The run manifest: what one training run pinned at its start, and whether it finished."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd

from pipeline.models.meta_model import Generation, ModelSpec
from pipeline.tables import RECIPES
from pipeline.training.blend import Constants
from pipeline.training.splits import Cutoffs


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """One row of `tables.RUNS`, typed.

    Args:
        run_id: the training run; also the fleet version.
        started_at: when it started, or was last resumed; UTC.
        finished_at: when its last table was committed; None while it is not finished.
        previous_run_id: newest run finished before it, which it builds on.
        request: what the launch asked for, as from `Request.text`.
        data_digest: hash of the visible rows that are learnt from.
        cutoffs: its dates.
        features_version: version of the feature table that it read.
        spec_digest: hash of the part of the spec that matters to training.
        constants: what answers without a model.
        n_groups: groups of all grains.
        model_spec: what training, packing and scoring share, as from `pack.build_model_spec`.
        versions: of Python and of libraries, by name.
        waves: whose boosters and held-out rows its ledger refers to; empty until it is finished.
        unknown_groups: groups of held-out rows that the ledger does not know.
    """

    run_id: str
    started_at: pd.Timestamp
    finished_at: pd.Timestamp | None
    previous_run_id: str | None
    request: str
    data_digest: str
    cutoffs: Cutoffs
    features_version: int
    spec_digest: str
    constants: Constants
    n_groups: int
    model_spec: ModelSpec
    versions: Mapping[str, str]
    waves: tuple[str, ...] = ()
    unknown_groups: tuple[str, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> Self:
        """The inverse of `to_row`; what is null in the table may be None, NaN or NaT."""
        model_spec = ModelSpec.from_json(row["model_spec"])
        return cls(
            run_id=str(row["run_id"]),
            started_at=pd.Timestamp(row["started_at"]),
            finished_at=_moment(row["finished_at"]),
            previous_run_id=_text(row["previous_run_id"]),
            request=_text(row["request"]) or "{}",
            data_digest=str(row["data_digest"]),
            cutoffs=Cutoffs(
                as_of=_naive(row["as_of"]),
                tune_start=_naive(row["tune_start"]),
                report_start=_naive(row["report_start"]),
            ),
            features_version=int(row["features_version"]),
            spec_digest=str(row["spec_digest"]),
            constants=Constants(
                with_offset=_number(row["constant"]),
                without_offset=_number(row["constant_without_offset"]),
                prior=model_spec.prior,
            ),
            n_groups=int(row["n_groups"]),
            model_spec=model_spec,
            versions=_parsed(row["versions"], {}),
            waves=tuple(_parsed(row["waves"], ())),
            unknown_groups=tuple(_parsed(row["unknown_groups"], ())),
        )

    def to_row(self) -> dict[str, Any]:
        """The values of the columns of `tables.RUNS`.

        The lists of a run that is not finished are null.
        """
        generation = self.generation
        row: dict[str, Any] = {
            "run_id": self.run_id,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "previous_run_id": self.previous_run_id,
            "request": self.request,
            "data_digest": self.data_digest,
            "as_of": self.cutoffs.as_of,
            "tune_start": self.cutoffs.tune_start,
            "report_start": self.cutoffs.report_start,
            "features_version": self.features_version,
            "spec_digest": self.spec_digest,
            "constant": generation.constant,
            "constant_without_offset": generation.constant_without_offset,
            "n_groups": self.n_groups,
            "model_spec": self.model_spec.to_json(),
            "versions": json.dumps(self.versions),
            "waves": None,
            "unknown_groups": None,
        }
        if self.finished_at is not None:
            row["waves"] = json.dumps(self.waves)
            row["unknown_groups"] = json.dumps(self.unknown_groups, ensure_ascii=False)
        return row

    def finished(
        self, *, n_groups: int, waves: tuple[str, ...], unknown_groups: tuple[str, ...]
    ) -> Self:
        """The same run, finished now.

        Args:
            n_groups: rows of its ledger.
            waves: whose boosters and held-out rows the ledger refers to.
            unknown_groups: groups of held-out rows that the ledger does not know.
        """
        return replace(
            self,
            finished_at=pd.Timestamp.now(tz="UTC"),
            n_groups=n_groups,
            waves=waves,
            unknown_groups=unknown_groups,
        )

    @property
    def limit_groups(self) -> int | None:
        """The launch's limit of finest groups; None for all."""
        limit: int | None = json.loads(self.request).get("limit_groups")
        return limit

    @property
    def is_refit(self) -> bool:
        """Whether the run only refitted earlier recipes; the newest training is then another."""
        return RECIPES in json.loads(self.request)

    def is_on_other_rows(self, other: "RunManifest | None") -> bool:
        """Whether another run was fitted on other rows, or is no longer known."""
        if other is None:
            return True
        return (self.cutoffs.as_of, self.features_version) != (
            other.cutoffs.as_of,
            other.features_version,
        )

    @property
    def generation(self) -> Generation:
        """What the spec.json of the run's pack says of it."""
        constants = self.constants
        if constants.prior:
            return Generation(self.model_spec, self.run_id, None, None)
        return Generation(
            self.model_spec, self.run_id, constants.with_offset, constants.without_offset
        )


def _naive(moment: Any) -> pd.Timestamp:
    """A moment in UTC without a zone, as training uses it."""
    timestamp = pd.Timestamp(moment)
    if timestamp.tzinfo is None:
        return timestamp
    return timestamp.tz_convert("UTC").tz_localize(None)


def _moment(value: Any) -> pd.Timestamp | None:
    if pd.isna(value):
        return None
    return pd.Timestamp(value)


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return None


def _number(value: Any) -> float:
    if pd.isna(value):
        return 0.0
    return float(value)


def _parsed(text: Any, default: Any) -> Any:
    if isinstance(text, str):
        return json.loads(text)
    return default
