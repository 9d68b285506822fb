"""What a launch of `champion` does with the registry: judge a challenger, or roll back."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from assets.combined_version import register_combined
from assets.meta_model import pack_run
from assets.progress import no_progress, progress_lines
from assets.refits import refit
from pipeline.crash_points import crash_point
from pipeline.errors import ModelNotFound, SpecError, StoreError
from pipeline.models.meta_model import FleetModel, GroupKey, PackError
from pipeline.models.promotion import (
    CAN_OPEN,
    GATES,
    NEW_RECIPE,
    ComparedRun,
    Gate,
    Judgement,
    answers_differ,
    earlier_recipes,
    found_elsewhere,
    hold_back,
    judge_challenger,
    may_serve,
    number_before,
    override_decisions,
    rolled_back,
    stays,
    with_refits,
)
from pipeline.runs.decisions import Decisions
from pipeline.runs.fleet_tables import FleetTables
from pipeline.runs.manifest import RunManifest
from pipeline.runs.plan import refuse_unknown
from pipeline.spark.comparison import Comparison, judge
from pipeline.spec import FleetSpec
from pipeline.tables import DECISIONS
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version
from resources.spark_session import SparkSessionResource


@dataclass(frozen=True)
class Outcome:
    """What a launch decided.

    Args:
        decisions: one row per group, columns of `tables.DECISIONS` that differ from group to group.
        gates: of the challenger; none for a rollback.
        before: the version that served; None for none.
        after: the version that serves; None for none.
        challenger: the version that was judged; None for a rollback.
    """

    decisions: pd.DataFrame
    gates: Sequence[Gate]
    before: Version | None
    after: Version | None
    challenger: Version | None

    @property
    def moves_alias(self) -> bool:
        """Whether another version serves from now on."""
        return version_number(self.before) != version_number(self.after)

    @property
    def moved(self) -> "pd.Series[Any]":
        """Per decision whether another fleet version answers since."""
        return answers_differ(self.decisions) & self.moves_alias

    @property
    def failed_gates(self) -> list[Gate]:
        """The gates that the challenger did not pass."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def is_refused(self) -> bool:
        """Whether gates kept the challenger from serving."""
        return bool((self.decisions["reason"] == GATES).any())


def version_number(version: Version | None) -> str:
    """A version as people and metadata name it."""
    return _number(version) or "none"


def _number(version: Version | None) -> str | None:
    if version is None:
        return None
    return version.number


def _serving(model: FleetModel | None) -> dict[GroupKey, str]:
    """The fleet version that answers each group in a model; without a model, none does."""
    if model is None:
        return {}
    return model.serving()


@dataclass(frozen=True)
class Deciding:
    """One launch of `champion`.

    Args:
        spec: the fleet.
        tables: of the fleet.
        registry: where its versions and aliases are.
        spark: where twins and refits are fitted.
        launch: settings of the launch.
        launch_id: the Dagster run.
        log: for people.
    """

    spec: FleetSpec
    tables: FleetTables
    registry: MlflowRegistry
    spark: SparkSessionResource
    launch: LaunchSettings
    launch_id: str
    log: dg.DagsterLogManager

    def run(self) -> Outcome:
        """Decide, record the decision, and move the alias."""
        self._finish_killed_launch()
        if self.launch.decision == "rollback":
            outcome = self._roll_back()
        else:
            outcome = self._judge()
        self._carry_out(outcome)
        return outcome

    @property
    def _decisions(self) -> Decisions:
        return Decisions(self.tables)

    @property
    def _namespace(self) -> str:
        return self.tables.namespace

    def _judge(self) -> Outcome:
        """Judge the challenger, group by group, and say which version serves from now on."""
        challenger = self.registry.get(self._namespace, CHALLENGER)
        before = self.registry.find(self._namespace, CHAMPION)
        if self.launch.decision == "keep" and before is None:
            raise SpecError(
                "decision is keep, and no version is champion yet; expected judge or promote"
            )
        serving_model = self._serving_model(before)
        try:
            model = self._open(challenger)
        except PackError as error:
            gate = Gate(
                CAN_OPEN, passed=False, found=str(error), expected="a pack that can be opened"
            )
            decisions = stays(_serving(serving_model))
            return Outcome(decisions, [gate], before, before, challenger)
        ledger = self.tables.ledger(challenger.fleet_version)
        refuse_unknown(self.launch.decision_groups, ledger["group_id"].tolist())
        comparison = self._comparison(challenger, ledger, serving_model)
        judgement = self._judgement(comparison)
        gates = [*judge_challenger(ledger, model.groups()), *judgement.gates]
        if not may_serve(gates, is_first=serving_model is None, decision=self.launch.decision):
            decisions = _decision_columns(hold_back(judgement))
            return Outcome(decisions, gates, before, before, challenger)
        after: Version | None = challenger
        if not judgement.is_whole:
            judgement, after = self._combine(comparison, judgement, model, serving_model, before)
        return Outcome(_decision_columns(judgement.decisions), gates, before, after, challenger)

    def _comparison(
        self, challenger: Version, ledger: pd.DataFrame, serving_model: FleetModel | None
    ) -> Comparison:
        """The challenger, and who answers now."""
        run = self._run_of(challenger)
        champions: dict[str, ComparedRun] = {}
        serving = _serving(serving_model)
        if serving_model is not None:
            serving_versions = set(serving.values())
            for generation in serving_model.generations:
                version = generation.fleet_version
                if version in serving_versions:
                    ledger_rows = self.tables.ledger(version)
                    champions[version] = ComparedRun.of_ledger(generation, ledger_rows)
        return Comparison(
            run=run,
            challenger=ComparedRun.of_ledger(run.generation, ledger),
            champions=champions,
            serving=serving,
            rolled_back=self._decisions.rolled_back_from(challenger.fleet_version),
        )

    def _run_of(self, challenger: Version) -> RunManifest:
        run = self.tables.run(challenger.fleet_version)
        if run is None:
            location = self.tables.tables.location(self._namespace)
            raise StoreError(
                f"the tables at {location} do not know run {challenger.fleet_version} of version "
                f"{challenger.number}: registry and data root do not belong together; "
                "materialise models again"
            )
        if run.spec_digest != self.spec.training_digest:
            raise SpecError(
                f"fleet {self.spec.name!r} is described otherwise than when version "
                f"{challenger.number} (run {challenger.fleet_version}) was trained; materialise "
                "models and meta_model first, or roll back"
            )
        return run

    def _judgement(self, comparison: Comparison) -> Judgement:
        """What the tests, or a person, say of each group of the challenger."""
        if comparison.serving:
            kinds = list(comparison.kinds.values())
            message = f"comparing {len(kinds):,} groups with what answers them now"
            n_new = kinds.count(NEW_RECIPE)
            if n_new:
                message += f"; beside {n_new:,} new recipes the earlier ones are fitted"
            self.log.info(message)
        features = self.tables.features(self.spark.session, comparison.run.features_version)
        context = self.spark.training_context(no_progress)
        judged = judge(context, self.tables, features, self.spec, comparison)
        return override_decisions(
            judged,
            self.launch.decision,
            self.launch.decision_groups,
            comparison.challenger.fleet_version,
        )

    def _combine(
        self,
        comparison: Comparison,
        judgement: Judgement,
        challenger: FleetModel,
        serving: FleetModel | None,
        before: Version | None,
    ) -> tuple[Judgement, Version | None]:
        """Register a version that combines promoted groups with those that stay.

        Those that stay are fitted on newer rows. Returns the decisions, and the version that
        serves.
        """
        after = before
        with self._refitted_recipes(comparison, judgement) as (decided, refitted):
            if decided.changes_answers:
                models = [challenger, *refitted]
                if serving is not None:
                    models.append(serving)
                n_runs = len(set(decided.serving.values()))
                self.log.info(f"registering a version that combines {n_runs:,} training runs")
                after = self._register(
                    decided.serving, models, _decision_columns(decided.decisions)
                )
        return decided, after

    @contextmanager
    def _refitted_recipes(
        self, comparison: Comparison, judgement: Judgement
    ) -> Iterator[tuple[Judgement, list[FleetModel]]]:
        """Fit the recipes that the challenger did not beat on its rows.

        Yields the decisions that follow, and the models, whose packs last as long as the block.
        """
        models: list[FleetModel] = []
        refits = {}
        staying = earlier_recipes(judgement.decisions, comparison.champions, comparison.challenger)
        with tempfile.TemporaryDirectory() as folder:
            for number, recipes in enumerate(staying):
                if not comparison.run.is_on_other_rows(self.tables.run(recipes.fleet_version)):
                    continue
                self.log.info(
                    f"fitting {len(recipes.starts):,} earlier recipes on newer rows: what is new "
                    f"is not better in {len(recipes.groups):,} groups"
                )
                try:
                    run, ledger = refit(
                        self.spark.training_context(progress_lines(self.log)),
                        self.tables,
                        self.spec,
                        comparison.run,
                        recipes,
                        run_id=f"{self.launch_id}-{number}",
                    )
                    model = pack_run(
                        Path(folder) / str(number),
                        self.tables,
                        self.registry,
                        self.spec,
                        run,
                        ledger,
                    )
                except StoreError as error:
                    # For example, another training of the fleet runs: the next launch decides the
                    # same, and fits them.
                    self.log.warning(f"these groups keep their models on older rows: {error}")
                    continue
                models.append(model)
                refits[model.fleet_version] = recipes.groups
            yield with_refits(judgement, refits), models

    def _roll_back(self) -> Outcome:
        """Let what served before serve again, for the whole fleet or for some groups.

        Nothing is trained.
        """
        before = self.registry.get(self._namespace, CHAMPION)
        number = self.launch.rollback_to or self._number_before(before)
        target = self.registry.get(self._namespace, number)
        current = self._open(before)
        earlier = self._open(target)
        listed = self.launch.decision_groups
        groups = {key.group_id for key in [*current.groups(), *earlier.groups()]}
        refuse_unknown(listed, sorted(groups))
        decisions = rolled_back(current.serving(), earlier.serving(), listed)
        after = target
        if listed:
            serving = current.serving()
            versions = map(str, decisions["to_version"])
            serving |= dict(zip(GroupKey.of_rows(decisions), versions, strict=True))
            after = self._register(serving, [current, earlier], decisions)
        return Outcome(decisions, [], before, after, None)

    def _number_before(self, champion: Version) -> str:
        """The registered version that served before the champion."""
        number = number_before(self._decisions.alias_moves(), champion.number)
        if number is None:
            raise ModelNotFound(
                f"no version served before version {champion.number}, according to "
                f"{self._decisions.location}; name one in rollback_to"
            )
        return number

    def _finish_killed_launch(self) -> None:
        """Bring the alias and the table of decisions together again.

        A launch that was killed after it had recorded its decision is carried out now, under its
        own who and why. An alias that is elsewhere than the last decision left it was moved by
        hand, or by a launch of an earlier release that was killed: it gets rows that say so.
        """
        current = self.registry.find(self._namespace, CHAMPION)
        number = _number(current)
        last = self._last_alias_move()
        recorded = None
        if not pd.isna(last["champion_after"]):
            recorded = self.registry.find(self._namespace, str(last["champion_after"]))
        was_killed = pd.isna(last["moved"])
        is_as_recorded = number in (last["champion_before"], last["champion_after"])
        if recorded is not None and was_killed and is_as_recorded:
            self.registry.promote(recorded)
            rows = self._decisions.rows_of(str(last["decision_id"]))
            self._decisions.write(rows.assign(moved=answers_differ(rows)))
        elif current is not None and number != last["champion_after"]:
            self._record_found(recorded, current)

    def _last_alias_move(self) -> "pd.Series[Any]":
        """The last launch that decided; one that moved nothing if there was none."""
        moves = self._decisions.alias_moves()
        if moves.empty:
            return pd.Series({"champion_before": None, "champion_after": None, "moved": True})
        return moves.iloc[-1]

    def _record_found(self, recorded: Version | None, current: Version) -> None:
        """Record that another version serves than the table of decisions says."""
        before = _serving(self._serving_model(recorded))
        after = _serving(self._serving_model(current))
        rows = found_elsewhere(before, after).assign(
            decision_id=f"{self.launch_id}-found",
            decided_at=pd.Timestamp.now(tz="UTC"),
            champion_before=_number(recorded),
            champion_after=current.number,
        )
        self._decisions.write(rows)

    def _carry_out(self, outcome: Outcome) -> None:
        """Record the decision, move the alias, and mark the decision as carried out.

        Who and why are written before the alias moves, so that a kill loses neither: the next
        launch finishes what it finds unmarked.
        """
        rows = outcome.decisions.assign(
            decision_id=self.launch_id,
            decided_at=pd.Timestamp.now(tz="UTC"),
            decided_by=self.launch.decided_by,
            decision=self.launch.decision,
            why=self.launch.why,
            champion_before=_number(outcome.before),
            champion_after=_number(outcome.after),
            challenger=_number(outcome.challenger),
        )
        if outcome.after is not None and outcome.moves_alias:
            self._decisions.write(rows.assign(moved=None))
            crash_point("decision_recorded")
            self.registry.promote(outcome.after)
            crash_point("alias_moved")
        self._decisions.write(rows.assign(moved=outcome.moved))

    def _open(self, version: Version) -> FleetModel:
        return self.registry.open_pack(version, self.tables.tables.storage_options)

    def _serving_model(self, champion: Version | None) -> FleetModel | None:
        """The champion's model.

        None where there is none, or its pack cannot be opened: it answers nobody, and is not
        compared.
        """
        if champion is None:
            return None
        try:
            return self._open(champion)
        except PackError as error:
            self.log.warning(f"version {champion.number} serves, and cannot be opened: {error}")
            return None

    def _register(
        self,
        serving: Mapping[GroupKey, str],
        models: Sequence[FleetModel],
        decisions: pd.DataFrame,
    ) -> Version:
        return register_combined(
            self.tables, self.registry, self.spark, self.spec, serving, models, decisions
        )


def _decision_columns(decisions: pd.DataFrame) -> pd.DataFrame:
    """What the table of decisions keeps of them."""
    return decisions.filter(items=DECISIONS.schema.names)
