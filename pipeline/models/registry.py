"""What the library needs from a model registry; the adapter and the test double provide it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd

from pipeline.models.meta_model import FleetModel


@dataclass(frozen=True)
class ModelInterface:
    """What a registered model takes and returns.

    Args:
        inputs: type (double or string) of each column that the model reads.
        optional: those of them that a batch may lack.
        outputs: type of each column of its answers (double, string or array<double>), as from
            `meta_model.answer_columns`.
        interval: level of its intervals where none is asked for; None for a model without any.
    """

    inputs: Mapping[str, str]
    optional: Sequence[str]
    outputs: Mapping[str, str]
    interval: float | None


@dataclass(frozen=True)
class RunRecord:
    """What the tracking server shows of a training run.

    Args:
        parameters: the run's.
        metrics: aggregate metrics.
        tables: table artifacts by file name (.json).
        plots: PNG artifacts by file name.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    plots: Mapping[str, bytes] = field(default_factory=dict)


class RegisteredVersion(Protocol):
    """One version of a registered model."""

    @property
    def name(self) -> str:
        """Of the registered model."""

    @property
    def number(self) -> str:
        """The registry's."""

    @property
    def fleet_version(self) -> str:
        """The training run that it comes from."""


VersionT = TypeVar("VersionT", bound=RegisteredVersion)


class Registry(Protocol[VersionT]):
    """Registered models, their versions and aliases."""

    def register(
        self,
        name: str,
        fleet_version: str,
        *,
        pack: Path,
        interface: ModelInterface,
        record: RunRecord,
        alias: str | None = "challenger",
    ) -> VersionT:
        """Log one run and register its model, by default as the challenger."""

    def find(self, name: str, alias: str) -> VersionT | None:
        """The version under an alias, or of that number; None if there is none."""

    def get(self, name: str, alias: str) -> VersionT:
        """The version under an alias, or of that number.

        Raises:
            ModelNotFound: if there is none.
        """

    def promote(self, version: VersionT) -> None:
        """Let a version serve."""

    def open_pack(self, version: VersionT, options: Mapping[str, str] | None = None) -> FleetModel:
        """A version's model."""
