"""What a launch may say about a run, in one place for every asset of the chain."""

import getpass
import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import Any, Literal

import dagster as dg
import pandas as pd
from pydantic import Field

from pipeline.errors import SpecError
from pipeline.periods import parse_moment
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.request import Request
from pipeline.spec import FleetSpec
from resources.delta_tables import DeltaTables
from resources.mlflow_registry import CHAMPION, MlflowRegistry


@dataclass(frozen=True)
class Scope:
    """Where a launch keeps its tables and registered model.

    Args:
        tables: in the namespace of the fleet, of its trial, or of a backtest.
        note: for people, what a backtest does not change; None for any other launch.
    """

    tables: FleetTables
    note: str | None = None

    @property
    def namespace(self) -> str:
        """Name of the tables' folder and of the registered model."""
        return self.tables.namespace


class LaunchSettings(dg.ConfigurableResource):
    """Settings of one launch; the UI lists them in the launchpad, under resources."""

    as_of: str | None = Field(
        default=None,
        description="Date or time that the run pretends it is, e.g. 2013-12-24; by default the "
        "fleet's, else the newest row with a target. Earlier than that of the version that serves "
        "makes the launch a backtest, which keeps its tables and model apart.",
    )
    limit_groups: int | None = Field(
        default=None,
        gt=0,
        description="Try the fleet on that many finest groups. Tables and model get the suffix "
        "-trial, so nothing real is touched.",
    )
    retrain: Literal["changed", "stale", "listed", "all"] = Field(
        default="changed",
        description="`changed`: groups whose rows or settings changed; `stale`: also those tuned "
        "longer ago than tuning.retune_after; `listed`: those in `groups`, all others keep their "
        "models; `all`: every group, and sources and features that did not change are read and "
        "built again, too.",
    )
    groups: list[str] = Field(
        default_factory=list,
        description=(
            'Group ids for `retrain: listed`, e.g. `["EWR","IAH"]`; setting them means `listed`.'
        ),
    )
    dry_run: bool = Field(default=False, description="Plan, print the plan, and train nothing.")
    decision: Literal["judge", "promote", "keep", "rollback"] = Field(
        default="judge",
        description="What `champion` does. `judge`: the challenger is promoted group by group, as "
        "the paired tests say. `promote`, `keep`: overrides them for `decision_groups`, or for "
        "all. `rollback`: what served before serves again, for `decision_groups` or for all. "
        "Nothing is trained.",
    )
    decision_groups: list[str] = Field(
        default_factory=list,
        description='Group ids that `decision` applies to, e.g. `["EWR","IAH"]`; empty: all.',
    )
    rollback_to: str | None = Field(
        default=None,
        description="Registered version to roll back to, e.g. 3; by default the one that served "
        "before.",
    )
    why: str | None = Field(
        default=None, description="Kept with every decision of the launch, for people."
    )
    who: str | None = Field(
        default=None, description="Who decides; by default the user whose process it is."
    )

    def request(self, spec: FleetSpec, run_id: str) -> Request:
        """What the launch asks of a training run.

        Raises:
            SpecError: if retrain is `listed` without groups, or groups are listed with another
                choice.
        """
        if self.groups and self.retrain not in ("changed", "listed"):
            raise SpecError(
                f"groups are listed, and retrain is {self.retrain!r}; expected listed, or no groups"
            )
        if self.retrain == "listed" and not self.groups:
            raise SpecError(
                'retrain is listed, and no group is; name some in groups, e.g. ["EWR","IAH"]'
            )
        retrain = self.retrain
        if self.groups:
            retrain = "listed"
        return Request(
            run_id=run_id,
            as_of=self.moment(spec),
            limit_groups=self.limit_groups,
            retrain=retrain,
            listed=tuple(self.groups),
        )

    @property
    def decided_by(self) -> str:
        """Who launched it, for the table of decisions."""
        if self.who:
            return self.who
        try:
            return getpass.getuser()
        except (OSError, KeyError):  # a container may run as a user without a name
            return f"uid {os.getuid()}"

    def namespace(self, spec: FleetSpec) -> str:
        """The fleet's name, or its trial's; for backtests see `scope`."""
        if self.limit_groups is None:
            return spec.name
        return f"{spec.name}-trial"

    def scope(self, spec: FleetSpec, tables: DeltaTables, registry: MlflowRegistry) -> Scope:
        """Where the launch writes.

        Every asset calls this, so that one that is launched alone writes where the whole chain
        would.

        A launch whose as-of is earlier than that of the version that serves is a backtest. It gets
        a namespace for that as-of, so that no alias of the fleet moves, no run of the fleet is
        built on it, and no version that saw later rows answers in it. `promote`, `keep` and
        `rollback` are about the version that serves, unless the launch itself has an as-of.

        Args:
            spec: the fleet.
            tables: where the as-of of the version that serves is found.
            registry: knows which version that is.
        """
        own = FleetTables(tables, self.namespace(spec), spec.name)
        moment = self.moment(spec)
        is_about_champion = self.decision != "judge" and self.as_of is None
        if moment is None or is_about_champion:
            return Scope(own)
        champion = registry.find(own.namespace, CHAMPION)
        if champion is None:
            return Scope(own)
        served = own.newest_as_of([champion.fleet_version])
        if served is None or moment >= served:
            return Scope(own)
        note = (
            f"backtest as of {moment}: production serves version {champion.number} as of {served}, "
            "nothing of it changes"
        )
        # A colon cannot stand in every store's paths.
        stamp = moment.isoformat().removesuffix("T00:00:00").replace(":", "")
        return Scope(replace(own, namespace=f"{own.namespace}-backtest-{stamp}"), note)

    def command(self, spec: FleetSpec, **decision: str) -> str:
        """The command that launches `champion` alone, in this launch's scope.

        Args:
            spec: the fleet.
            decision: settings of the command's own launch.
        """
        config: dict[str, Any] = {}
        if self.as_of is not None:
            config["as_of"] = self.as_of
        if self.limit_groups is not None:
            config["limit_groups"] = self.limit_groups
        settings = json.dumps({"resources": {"launch": {"config": config | decision}}})
        return f"dg launch --assets {spec.name}/champion --config-json {shlex.quote(settings)}"

    def moment(self, spec: FleetSpec) -> pd.Timestamp | None:
        """The as-of of the run, UTC without a zone; None means the newest row.

        Raises:
            SpecError: if it is not a date or time.
        """
        text = self.as_of or spec.as_of
        if text is None:
            return None
        try:
            return parse_moment(text, spec.timezone)
        except SpecError as error:
            raise SpecError(f"as_of: {error}") from None


class RefusedSettings(LaunchSettings):
    """Settings that cannot be read from the environment.

    The code location loads, and every launch says why it cannot start.
    """

    mistake: str = Field(
        description="Which variable has which value, what is allowed, and what to do."
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002
        """Stop the launch before its first step.

        Raises:
            SpecError: always, with the mistake.
        """
        raise SpecError(self.mistake)
