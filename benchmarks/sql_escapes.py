"""Ways around the check of a fleet's SQL: whether anything that is accepted holds more for Spark than for the check.

The judge shares no code with the check: it walks the plan's nodes in the JVM and compares them with
the words of the rendered text.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import sqlglot
from py4j.java_gateway import is_instance_of
from pyspark.sql import SparkSession
from sqlglot.tokens import TokenType

from benchmarks.runs import Runs
from pipeline.errors import SpecError
from pipeline.features.functions import CHANGING, REACHING
from pipeline.features.sql import parse_derived, render
from pipeline.spark.sql_plans import check_select, derived_column
from pipeline.spec import parse_spec
from pipeline.testing.sql_escapes import ESCAPES, Kind, generate
from resources.spark_session import SparkSessionResource

N_GENERATED = 6_000
_CATALYST = "org.apache.spark.sql.catalyst"
# Nodes that no accepted statement may hold, whatever its tree says.
_HOSTILE = {
    "ScriptTransformation",
    "Sample",
    "RelationTimeTravel",
    "UnresolvedHint",
    "UnresolvedTableValuedFunction",
    "PlanWithUnresolvedIdentifier",
    "ExpressionWithUnresolvedIdentifier",
    "CompoundBody",
    "NamedParameter",
    "PosParameter",
    "CurrentDate",
    "CurrentTimestamp",
    "CurrentUser",
}
_FLEET: dict[str, Any] = {
    "name": "escapes",
    "sources": [{"name": "sales", "uri": "sales.csv"}],
    "features": {"columns": ["price"]},
    "grains": [[], ["region"]],
    "entity": ["region", "city"],
    "time": "day",
    "target": {"column": "target"},
    "splits": {"report": "1 month", "tune": "1 month"},
}


@dataclass
class PlanContents:
    """How often a plan of Spark's names each relation and function, its columns, and the classes of its nodes."""

    relations: Counter[str] = field(default_factory=Counter)
    functions: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    nodes: Counter[str] = field(default_factory=Counter)


def sql_escapes(runs: Runs) -> Mapping[str, float]:
    """Accepted although Spark's plan has more than the checked tree: of generated statements, and of those made by hand."""
    spark = SparkSessionResource(master="local[2]", scratch=str(runs.new_folder())).session
    try:
        generated = [
            (kind, generate(seed, kind))
            for seed in range(N_GENERATED // 2)
            for kind in ("select", "derived")
        ]
        made_by_hand = [(escape.kind, escape.text) for escape in ESCAPES]
        tallies = {
            "generated": tally(spark, generated),
            "hand-made": tally(spark, made_by_hand),
        }
    finally:
        spark.stop()
    values = {"": float(sum(counts["escaped"] for counts in tallies.values()))}
    for name, counts in tallies.items():
        for verdict in ("accepted", "refused"):
            values[f"{name}-{verdict}"] = float(counts[verdict])
    return values


def tally(spark: SparkSession, texts: list[tuple[Kind, str]]) -> "Counter[str]":
    """How many were accepted and refused, and how many of the accepted escaped."""
    counts: Counter[str] = Counter()
    for kind, text in texts:
        try:
            rendered = accept(spark, kind, text)
        except SpecError:
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        more = list(beyond_text(spark, kind, rendered, rendered)) + list(
            beyond_text(spark, kind, text, rendered)
        )
        if more:
            counts["escaped"] += 1
            print(f"  escaped: {text!r}, rendered {rendered!r}: {', '.join(more)}", flush=True)
    return counts


def accept(spark: SparkSession, kind: Kind, text: str) -> str:
    """The text that would run.

    Raises:
        SpecError: if the check refuses it.
    """
    if kind == "select":
        return render(check_select(spark, text, ["sales"], file="features.sql"))
    spec = parse_spec(
        _FLEET | {"features": {"columns": ["price"], "derived": {"x": text}}}, file="defs.yaml"
    )
    tree = parse_derived(spec)["x"]
    derived_column(spark, text, tree, where="features.derived.x")
    return render(tree)


def beyond_text(spark: SparkSession, kind: Kind, text: str, rendered: str) -> Iterator[str]:
    """What Spark's plan of a text holds beyond the words of the rendered one, and what none may hold, in words."""
    parser = spark._jsparkSession.sessionState().sqlParser()  # type: ignore[attr-defined]  # noqa: SLF001
    contents = PlanContents()
    plan = parser.parsePlan(text) if kind == "select" else parser.parseExpression(text)
    _collect(spark.sparkContext._gateway, plan, contents)  # noqa: SLF001
    tokens = sqlglot.tokenize(rendered, dialect="spark")
    words = Counter(token.text.lower() for token in tokens)
    calls = Counter(
        token.text.lower()
        for token, following in pairwise(tokens)
        if following.token_type == TokenType.L_PAREN
    )
    yield from (node for node in contents.nodes if node in _HOSTILE)
    yield from (f"relation {name}" for name in contents.relations - words)
    yield from (f"function {name}" for name in contents.functions - calls)
    yield from (f"column {name}" for name in contents.columns if name not in words)
    yield from (f"function {name}" for name in contents.functions if name in REACHING | CHANGING)
    yield from (
        f"relation {name}"
        for name in contents.relations
        if name == "secret" and "secret" not in _ctes(rendered)
    )
    selects = words["select"] + words["values"] + words["from"]
    if contents.nodes["Project"] + contents.nodes["Aggregate"] > selects:
        yield f"{contents.nodes['Project']} projections"
    if kind == "derived" and "target" in contents.columns:
        yield "the target"


def _ctes(rendered: str) -> set[str]:
    return {
        cte.alias.lower()
        for cte in sqlglot.parse_one(rendered, dialect="spark").find_all(sqlglot.exp.CTE)
    }


def _collect(gateway: Any, node: Any, contents: PlanContents) -> None:
    kind = node.getClass().getSimpleName().rstrip("$")
    contents.nodes[kind] += 1
    if kind == "UnresolvedRelation":
        contents.relations[node.multipartIdentifier().mkString(".").lower()] += 1
    elif kind == "UnresolvedFunction":
        contents.functions[node.nameParts().mkString(".").lower()] += 1
    elif kind == "UnresolvedGenerator":
        contents.functions[node.name().funcName().lower()] += 1
    elif kind in ("UnresolvedAttribute", "UnresolvedNamedLambdaVariable"):
        contents.columns.update(part.lower() for part in _listed(node.nameParts()))
    below = _listed(node.children())
    if is_instance_of(gateway, node, f"{_CATALYST}.plans.QueryPlan"):
        below += _listed(node.expressions())
    if is_instance_of(gateway, node, f"{_CATALYST}.expressions.PlanExpression"):
        below.append(node.plan())
    if kind == "UnresolvedWith":
        below += _listed(node.innerChildren())
    for part in below:
        _collect(gateway, part, contents)


def _listed(sequence: Any) -> list[Any]:
    return [sequence.apply(place) for place in range(sequence.size())]
