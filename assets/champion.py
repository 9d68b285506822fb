"""`<fleet>/champion`: the version that serves; each group moves to the challenger only if the paired tests, or a person, say so."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa

from assets.combined_version import register_combined
from assets.link import link_key, link_settings, png, prefixed, readable_failures
from assets.newest_run import features_of, ledger_of
from assets.progress import no_progress, progress_lines
from assets.refits import is_older, refit
from pipeline.crash_points import crash_point
from pipeline.errors import ModelNotFound, SpecError, StoreError
from pipeline.models.meta_model import FleetModel, Generation, GroupKey, PackError
from pipeline.models.promotion import (
    CAN_ANSWER,
    CAN_OPEN,
    GATES,
    NEW_RECIPE,
    REFITTED,
    Gate,
    Judgement,
    Side,
    earlier_recipes,
    held_back,
    judge_challenger,
    overridden,
    rolled_back,
    stays,
    taken_back,
    with_refits,
)
from pipeline.reporting.plots import decision_plot
from pipeline.reporting.summary import markdown_table
from pipeline.runs.plan import refuse_unknown
from pipeline.spark.comparison import Contest, judge
from pipeline.spark.fleet_training import Cluster, read_runs
from pipeline.spec import FleetSpec
from pipeline.tables import DECISIONS
from resources.delta_tables import DeltaTables, contract_metadata
from resources.launch_settings import LaunchSettings
from resources.mlflow_registry import CHALLENGER, CHAMPION, MlflowRegistry, Version
from resources.spark_session import SparkSessionResource

SHOWN = 20
UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Parts:
    """What deciding takes."""

    spec: FleetSpec
    namespace: str
    tables: DeltaTables
    registry: MlflowRegistry
    spark: SparkSessionResource
    launch: LaunchSettings
    launch_id: str
    log: dg.DagsterLogManager


@dataclass(frozen=True)
class _Outcome:
    """What a launch did.

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
    def moved(self) -> "pd.Series[Any]":
        """Per decision whether another fleet version answers since."""
        return _differs(self.decisions) & (_number(self.before) != _number(self.after))


def champion_asset(spec: FleetSpec) -> dg.AssetsDefinition:
    """The serving version of a fleet."""

    @dg.asset(
        **link_settings(
            spec,
            "champion",
            description="The version under the alias `champion`: each group is answered by the newest chain that is not worse than the one before. "
            "A challenger that fails a gate leaves it where it is. Launch it alone with `decision` to override or to roll back.",
            kinds={"mlflow", "spark"},
            deps=["meta_model"],
        ),
        check_specs=[
            dg.AssetCheckSpec(
                "challenger_passed_its_gates", asset=link_key(spec, "champion"), description="The newest version is fit to serve, group by group."
            )
        ],
    )
    def champion(
        context: dg.AssetExecutionContext, tables: DeltaTables, registry: MlflowRegistry, spark: SparkSessionResource, launch: LaunchSettings
    ) -> dg.MaterializeResult:
        with readable_failures():
            scope = launch.scope(spec, tables, registry)
            if scope.note:
                context.log.info(scope.note)
            parts = _Parts(spec, scope.namespace, tables, registry, spark, launch, context.run.run_id, context.log)
            _finish_what_was_killed(parts)
            done = _roll_back(parts) if launch.decision == "rollback" else _decide(parts)
            _carry_out(parts, done)
            told = _text(done, parts)
        failed = _failed(done)
        context.log.warning(told) if failed else context.log.info(told)
        shown = done.decisions.assign(moved=done.moved)
        return dg.MaterializeResult(
            metadata={
                **contract_metadata(DECISIONS, _decisions_at(parts)),
                **prefixed(
                    {
                        "champion": _number(done.after),
                        "before": _number(done.before),
                        "challenger": _number(done.challenger),
                        "fleet_version": done.after.fleet_version if done.after else "none",
                        "decision": launch.decision,
                        "groups_moved": int(done.moved.sum()),
                    }
                ),
                "fleet/gates": dg.MetadataValue.md(markdown_table(pd.DataFrame([vars(gate) for gate in done.gates]))),
                "fleet/reasons": dg.MetadataValue.md(markdown_table(_reasons(shown))),
                "fleet/tested_groups": dg.MetadataValue.md(markdown_table(_tested(shown))),
                "fleet/plot": png(decision_plot(shown, spec)),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="challenger_passed_its_gates",
                    passed=not failed,
                    # A version that serves although a gate failed is worth a look, and stops nobody.
                    severity=dg.AssetCheckSeverity.ERROR if _is_refused(done) else dg.AssetCheckSeverity.WARN,
                    description=told if failed else "all gates passed",
                )
            ],
        )

    return champion


def _decide(parts: _Parts) -> _Outcome:
    """Judge the challenger, group by group, and say which version serves from now on.

    Where nothing serves yet, the challenger does, whatever its gates say: its answers are better than none. A person may promote what the
    gates would not. Only a version that cannot answer serves in no case.
    """
    registry, launch, options = parts.registry, parts.launch, parts.tables.storage_options
    challenger, before = registry.get(parts.namespace, CHALLENGER), registry.find(parts.namespace, CHAMPION)
    if launch.decision == "keep" and before is None:
        raise SpecError("decision is keep, and no version is champion yet; expected judge or promote")
    serving_model = None if before is None else _serving_model(registry, before, options)
    serving = {} if serving_model is None else serving_model.serving()
    try:
        model = registry.open_pack(challenger, options)
    except PackError as error:
        gate = Gate(CAN_OPEN, passed=False, found=str(error), expected="a pack that can be opened")
        return _Outcome(stays(serving), [gate], before, before, challenger)
    ledger = ledger_of(parts.tables, parts.namespace, challenger.fleet_version)
    refuse_unknown(launch.decision_groups, ledger["group_id"].tolist())
    gates = judge_challenger(ledger, model.groups())
    can_answer = all(gate.passed for gate in gates if gate.name == CAN_ANSWER)
    contest = _contest(parts, challenger, ledger, serving_model)
    judgement = _judged(parts, contest)
    gates = [*gates, *judgement.gates]
    is_first = serving_model is None
    goes = can_answer and (is_first or launch.decision == "promote" or all(gate.passed for gate in gates))
    if not goes:
        return _Outcome(_columns(held_back(judgement)), gates, before, before, challenger)
    if judgement.is_whole:
        return _Outcome(_columns(judgement.decisions), gates, before, challenger, challenger)
    after = before
    with _earlier_recipes_refitted(parts, contest, judgement) as (judgement, refitted):
        if judgement.changes_answers:
            models = [model, *refitted, *([] if serving_model is None else [serving_model])]
            parts.log.info(f"registering a version that combines {len(set(judgement.serving.values())):,} training runs")
            after = register_combined(
                parts.tables, registry, parts.spark, parts.spec, parts.namespace, judgement.serving, models, _columns(judgement.decisions)
            )
    return _Outcome(_columns(judgement.decisions), gates, before, after, challenger)


def _contest(parts: _Parts, challenger: Version, ledger: pd.DataFrame, serving_model: FleetModel | None) -> Contest:
    """The challenger, and who answers now."""
    run = _run_of(parts, challenger)
    serving = {} if serving_model is None else serving_model.serving()
    generations = {} if serving_model is None else {generation.fleet_version: generation for generation in serving_model.generations}
    return Contest(
        run=run.to_dict(),
        challenger=Side.of_ledger(Generation.of_run(run), ledger),
        champions={
            version: Side.of_ledger(generations[version], ledger_of(parts.tables, parts.namespace, version)) for version in set(serving.values())
        },
        serving=serving,
        rolled_back=_taken_back(parts, challenger.fleet_version),
    )


def _judged(parts: _Parts, contest: Contest) -> Judgement:
    """What the tests, or a person, say of each group of the challenger."""
    if contest.serving:
        kinds = list(contest.kinds().values())
        n_new = kinds.count(NEW_RECIPE)
        beside = f"; beside {n_new:,} new recipes the earlier ones are fitted" if n_new else ""
        parts.log.info(f"comparing {len(kinds):,} groups with what answers them now{beside}")
    features = features_of(parts.spark.session, parts.tables, parts.spec.name, pd.Series(contest.run))
    cluster = Cluster(parts.spark.session, no_progress, parts.spark.group_memory_bytes)
    judged = judge(cluster, parts.tables, parts.namespace, features, parts.spec, contest, parts.spark.slots, parts.spark.task_cpus)
    return overridden(judged, parts.launch.decision, parts.launch.decision_groups, contest.challenger.fleet_version)


@contextmanager
def _earlier_recipes_refitted(parts: _Parts, contest: Contest, judgement: Judgement) -> Iterator[tuple[Judgement, list[FleetModel]]]:
    """Fit the recipes that the challenger did not beat on its rows; the decisions then, and the models while they are needed."""
    run = pd.Series(contest.run)
    models, refits = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, recipes in enumerate(earlier_recipes(judgement.decisions, contest.champions, contest.challenger)):
            if not is_older(parts.tables, parts.namespace, recipes.fleet_version, run):
                continue
            parts.log.info(
                f"fitting {len(recipes.starts):,} earlier recipes on newer rows: what is new is not better in {len(recipes.groups):,} groups"
            )
            try:
                fitted = refit(
                    parts.tables,
                    parts.registry,
                    parts.spark,
                    parts.spec,
                    parts.namespace,
                    run,
                    recipes,
                    run_id=f"{parts.launch_id}-{number}",
                    report=progress_lines(parts.log),
                    folder=Path(folder) / str(number),
                )
            except StoreError as error:
                # Another training of the fleet, for one: the next launch decides the same, and fits them.
                parts.log.warning(f"these groups keep their models on older rows: {error}")
                continue
            models.append(fitted)
            refits[fitted.fleet_version] = recipes.groups
        yield with_refits(judgement, refits), models


def _serving_model(registry: MlflowRegistry, champion: Version, options: Mapping[str, str]) -> FleetModel | None:
    """The champion's model; None where its pack cannot be opened, as one of an earlier release: it answers nobody, and is not compared."""
    try:
        return registry.open_pack(champion, options)
    except PackError as error:
        dg.get_dagster_logger().warning(f"version {champion.number} serves, and cannot be opened: {error}")
        return None


def _roll_back(parts: _Parts) -> _Outcome:
    """Let what served before serve again, for the whole fleet or for some groups; nothing is trained."""
    registry, options = parts.registry, parts.tables.storage_options
    before = registry.get(parts.namespace, CHAMPION)
    target = registry.get(parts.namespace, parts.launch.rollback_to or _number_before(parts, before))
    current, earlier = registry.open_pack(before, options), registry.open_pack(target, options)
    listed = parts.launch.decision_groups
    refuse_unknown(listed, sorted({group for _, group in [*current.groups(), *earlier.groups()]}))
    decisions = rolled_back(current.serving(), earlier.serving(), listed)
    after = target
    if listed:
        moved = {GroupKey.of(row): str(row["to_version"]) for row in decisions.to_dict("records")}
        serving = {**current.serving(), **moved}
        after = register_combined(parts.tables, registry, parts.spark, parts.spec, parts.namespace, serving, [current, earlier], decisions)
    return _Outcome(decisions, [], before, after, None)


def _number_before(parts: _Parts, champion: Version) -> str:
    """The registered version that served before the champion."""
    decisions = _alias_moves(parts)
    moves = decisions[decisions["champion_after"] == champion.number]
    moves = moves[moves["champion_before"].notna() & (moves["champion_before"] != champion.number)]
    if moves.empty:
        raise ModelNotFound(f"no version served before version {champion.number}, according to {_decisions_at(parts)}; name one in rollback_to")
    return str(moves["champion_before"].iloc[-1])


def _alias_moves(parts: _Parts) -> pd.DataFrame:
    """One row per launch that decided, oldest first: the version that served before it and after it, and whether it was carried out."""
    columns = ["decision_id", "decided_at", "champion_before", "champion_after", "moved"]
    location = _decisions_at(parts)
    if not parts.tables.exists(location):
        return pd.DataFrame(columns=columns)
    rows: pd.DataFrame = parts.tables.read_pandas(location, columns=columns)
    return rows.drop_duplicates("decision_id").sort_values("decided_at", ignore_index=True)


def _finish_what_was_killed(parts: _Parts) -> None:
    """Bring the alias and the table of decisions together again.

    A launch that was killed after it had recorded its decision is carried out now, under its own who and why. An alias that is elsewhere
    than the last decision left it was moved by hand, or by a launch of an earlier release that was killed: it gets rows that say so.
    """
    registry, current = parts.registry, parts.registry.find(parts.namespace, CHAMPION)
    moves = _alias_moves(parts)
    last = moves.iloc[-1] if len(moves) else pd.Series({"champion_before": None, "champion_after": None, "moved": True})
    recorded = None if pd.isna(last["champion_after"]) else registry.find(parts.namespace, str(last["champion_after"]))
    serves = current.number if current else None
    where_it_may_be = (last["champion_before"], last["champion_after"])
    if recorded is not None and pd.isna(last["moved"]) and serves in where_it_may_be:
        registry.promote(recorded)
        rows = parts.tables.read_pandas(_decisions_at(parts), where={"decision_id": str(last["decision_id"])})
        _write_decision(parts, rows.assign(moved=_differs(rows)))
    elif current is not None and serves != last["champion_after"]:
        _write_decision(parts, _found_elsewhere(parts, recorded, current).assign(decision_id=f"{parts.launch_id}-found"))


def _found_elsewhere(parts: _Parts, recorded: Version | None, current: Version) -> pd.DataFrame:
    """Decisions that say that the alias was found at a version to which no recorded launch moved it."""
    options = parts.tables.storage_options
    models = [None if version is None else _serving_model(parts.registry, version, options) for version in (recorded, current)]
    before, after = ({} if model is None else model.serving() for model in models)
    # A version that cannot be opened answers nobody; the move itself is still recorded.
    keys = sorted({**before, **after}) or [GroupKey(0, "[]")]
    rows = pd.DataFrame(keys, columns=["grain", "group_id"])
    rows["from_version"] = [before.get(key) for key in keys]
    rows["to_version"] = [after.get(key) for key in keys]
    return rows.assign(
        moved=_differs(rows),
        reason=UNKNOWN,
        decision=UNKNOWN,
        decided_by=UNKNOWN,
        decided_at=pd.Timestamp.now(tz="UTC"),
        why="the alias was moved by hand, or by a launch that was killed",
        champion_before=recorded.number if recorded else None,
        champion_after=current.number,
    )


def _differs(rows: pd.DataFrame) -> "pd.Series[Any]":
    """Per row whether another fleet version answers the group."""
    return rows["from_version"].fillna("") != rows["to_version"].fillna("")


def _run_of(parts: _Parts, challenger: Version) -> "pd.Series[Any]":
    runs = read_runs(parts.tables, parts.namespace)
    found = runs[runs["run_id"] == challenger.fleet_version]
    if found.empty:
        raise StoreError(
            f"the tables at {parts.tables.location(parts.namespace)} do not know run {challenger.fleet_version} of version {challenger.number}: "
            "registry and data root do not belong together; materialise models again"
        )
    run = found.iloc[-1]
    if run["spec_digest"] != parts.spec.training_digest:
        raise SpecError(
            f"fleet {parts.spec.name!r} is described otherwise than when version {challenger.number} (run {challenger.fleet_version}) was trained; "
            "materialise models and meta_model first, or roll back"
        )
    return run


def _taken_back(parts: _Parts, challenger: str) -> Any:
    location = _decisions_at(parts)
    if not parts.tables.exists(location):
        return frozenset()
    columns = ["decision", "moved", "from_version", "grain", "group_id"]
    return taken_back(parts.tables.read_pandas(location, where={"decision": "rollback"}, columns=columns), challenger)


def _columns(decisions: pd.DataFrame) -> pd.DataFrame:
    return decisions.reindex(columns=[name for name in DECISIONS.schema.names if name in decisions])


def _carry_out(parts: _Parts, done: _Outcome) -> None:
    """Record the decision, move the alias, and mark the decision as carried out.

    Who and why are written before the alias moves, so that a kill loses neither: the next launch finishes what it finds unmarked.
    """
    launch = parts.launch
    rows = done.decisions.assign(
        decision_id=parts.launch_id,
        decided_at=pd.Timestamp.now(tz="UTC"),
        decided_by=launch.decided_by,
        decision=launch.decision,
        why=launch.why,
        champion_before=done.before.number if done.before else None,
        champion_after=done.after.number if done.after else None,
        challenger=done.challenger.number if done.challenger else None,
    )
    if done.after is not None and _number(done.after) != _number(done.before):
        _write_decision(parts, rows.assign(moved=None))
        crash_point("decision_recorded")
        parts.registry.promote(done.after)
        crash_point("alias_moved")
    _write_decision(parts, rows.assign(moved=done.moved))


def _decisions_at(parts: _Parts) -> str:
    return parts.tables.location(parts.namespace, DECISIONS.name)


def _write_decision(parts: _Parts, rows: pd.DataFrame) -> None:
    """Let the table hold these rows for their decision, in one commit, instead of what it had for it."""
    location = _decisions_at(parts)
    file = parts.tables.write_file(_arrow(rows), DECISIONS.schema, location)
    partition = {"decision_id": str(rows["decision_id"].iloc[0])}
    parts.tables.commit(location, [file] if file else [], DECISIONS.schema, mode="overwrite", partition=partition)


def _arrow(rows: pd.DataFrame) -> pa.Table:
    whole = rows.reindex(columns=DECISIONS.schema.names)
    for name in ("n_rows", "n_blocks"):
        whole[name] = pd.to_numeric(whole[name]).astype("Int64")
    for name in ("loss_champion", "loss_challenger", "p_value"):
        whole[name] = pd.to_numeric(whole[name]).astype(float)
    for field in DECISIONS.schema:
        if pa.types.is_string(field.type):
            whole[field.name] = pd.Series([None if pd.isna(text) else str(text) for text in whole[field.name]], index=whole.index, dtype=object)
    return pa.Table.from_pandas(whole, schema=DECISIONS.schema, preserve_index=False)


def _reasons(rows: pd.DataFrame) -> pd.DataFrame:
    """Groups by what became of them, and why."""
    counted = rows.groupby(["moved", "reason", "to_version"], dropna=False).size().reset_index(name="groups")
    return counted.sort_values("groups", ascending=False, ignore_index=True)


def _tested(rows: pd.DataFrame) -> pd.DataFrame:
    """The clearest of the tested groups."""
    if "p_value" not in rows:
        return pd.DataFrame()
    tested = rows[rows["p_value"].notna()].sort_values(["p_value", "group_id"]).head(SHOWN)
    return tested[["group_id", "moved", "reason", "n_rows", "loss_champion", "loss_challenger", "p_value"]]


def _number(version: Version | None) -> str:
    return version.number if version else "none"


def _failed(done: _Outcome) -> list[str]:
    """The gates that failed, each with what was found."""
    return [f"{gate.name} ({gate.found}, expected {gate.expected})" for gate in done.gates if not gate.passed]


def _is_refused(done: _Outcome) -> bool:
    """Whether gates kept the challenger from serving."""
    return bool((done.decisions["reason"] == GATES).any())


def _text(done: _Outcome, parts: _Parts) -> str:
    """What a launch did, in a line, with the command that overrides it where gates did not let the challenger serve."""
    if done.challenger is None:
        return f"rolled back: {int(done.moved.sum()):,} groups; champion is version {_number(done.after)}, before {_number(done.before)}"
    version, failed = f"version {done.challenger.number}", "; ".join(_failed(done))
    if _is_refused(done):
        cannot_answer = any(gate.name in (CAN_OPEN, CAN_ANSWER) for gate in done.gates if not gate.passed)
        override = f"To let it serve anyway: {parts.launch.command(parts.spec, decision='promote', why='...')}"
        next_step = "Materialise models and meta_model again" if cannot_answer else override
        return f"{version} stays challenger: {failed}; champion is {_number(done.after)}. {next_step}"
    judged = f"{version} passed {len(done.gates)} gates" if not failed else f"{version} did not pass every gate: {failed}"
    if done.after is not None and done.after.number == done.challenger.number:
        return f"{judged} and is champion" if not failed else f"{judged}; it is champion nevertheless"
    if not done.moved.any():
        return f"{judged}, and no group is better off with it; champion is {_number(done.after)}"
    refitted = done.decisions["reason"] == REFITTED
    stayed = int((done.decisions["from_version"] == done.decisions["to_version"]).sum())
    told = [f"it answers {int((done.moved & ~refitted).sum()):,} more groups"]
    if refitted.any():
        told.append(f"{int(refitted.sum()):,} keep their recipes, fitted on the newer rows")
    told.append(f"{stayed:,} stay as they are")
    return f"{judged}: {', '.join(told)}; champion is version {_number(done.after)}, which combines them"
