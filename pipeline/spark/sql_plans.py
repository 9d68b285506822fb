"""The second check of a fleet's SQL: what Spark's own parser and analyzer make of it.

Only text that was rendered from a checked tree runs. Spark parses it first, and the plan may hold
nothing beyond the tree. Spark also parses the author's text, which never runs: if its plan differs
from that of the rendered text, the check has read another statement than its author wrote.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf
from sqlglot import exp

from pipeline.errors import SpecError
from pipeline.features.functions import BARE, allowed_functions, words
from pipeline.features.sql import contents_of, parse_select, render

# Nodes of a plan before analysis that compute from the declared sources alone.
_PLANS = words(
    """
    Aggregate Distinct Except Filter Generate GlobalLimit Intersect Join LateralJoin LocalLimit
    LocalRelation Offset OneRowRelation Pivot Project Sort SubqueryAlias Union UnresolvedHaving
    UnresolvedInlineTable UnresolvedQualify UnresolvedRelation UnresolvedSubqueryColumnAliases
    UnresolvedWith Unpivot
    """
)
_EXPRESSIONS = words(
    """
    Add AggregateExpression Alias And AnyValue Ascending AttributeReference BaseGroupingSets
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CaseWhen Cast Coalesce Collate Concat
    CreateNamedStruct Cube CurrentRow Descending Divide EqualNullSafe EqualTo Exists First
    GreaterThan GreaterThanOrEqual GroupingSets ILike In InSubquery IntegralDivide IsNotNull
    IsNotUnknown IsNull IsUnknown LambdaFunction Last LessThan LessThanOrEqual Like LikeAll
    LikeAny ListQuery Literal Lower Multiply MultiAlias Not NotLikeAll NotLikeAny Or Overlay
    RLike Remainder Rollup ScalarSubquery ShiftLeft ShiftRight SortOrder SpecifiedWindowFrame
    StringLocate StringTrim StringTrimLeft StringTrimRight Substring Subtract TimestampAdd TimestampDiff
    UnaryMinus UnaryPositive UnboundedFollowing UnboundedPreceding UnresolvedAlias
    UnresolvedAttribute UnresolvedCollation UnresolvedExtractValue UnresolvedFunction
    UnresolvedGenerator UnresolvedNamedLambdaVariable UnresolvedOrdinal UnresolvedStar
    UnresolvedStarExceptOrReplace UnspecifiedFrame WindowExpression WindowSpecDefinition
    """
)
# Leaves of an analyzed plan that are not tables, and the aggregates that depend on the order of
# rows, which Spark calls random.
_LEAVES = words("CTERelationRef LocalRelation OneRowRelation")
_ORDER_DEPENDENT = words(
    """
    AnyValue CollectList CollectSet CollectUnion First Last ListAgg NthValue
    """
)
_NUMBERS = ("byte", "short", "integer", "long", "float", "double", "decimal")
_JOINS = "org.apache.spark.sql.catalyst.plans"
# Fields of a node that say who it is, not what it does.
_IDENTITIES = frozenset({"exprId", "resultId", "evalContext", "num-children", "class"})


@dataclass(frozen=True)
class SparkReading:
    """What Spark's parser makes of a text.

    Args:
        nodes: class names of everything in the plan, subqueries included.
        relations: names of relations, lower case; a qualified one with its dots.
        functions: names of functions, lower case; a qualified one with its dots.
        columns: names and their qualifiers, one tuple per mention, lower case.
        shape: the whole plan without identities, to compare.
    """

    nodes: frozenset[str]
    relations: frozenset[str]
    functions: frozenset[str]
    columns: frozenset[tuple[str, ...]]
    shape: Any


def read_statement(spark: SparkSession, text: str) -> SparkReading:
    """Parse a statement with Spark's parser; nothing runs."""
    return _read(_parser(spark).parsePlan(text))


def read_expression(spark: SparkSession, text: str) -> SparkReading:
    """Parse an expression with Spark's parser; nothing runs."""
    return _read(_parser(spark).parseExpression(text))


def check_select(
    spark: SparkSession,
    text: str,
    sources: Sequence[str],
    *,
    file: str,
    functions: Sequence[str] = (),
) -> exp.Query:
    """Check a fleet's SQL with both parsers; nothing runs.

    Args:
        spark: the session.
        text: content of the SQL file.
        sources: names of the raw tables.
        file: its name, for messages.
        functions: names that it may call besides the allowed ones.

    Returns:
        The checked statement, to be rendered and run.

    Raises:
        SpecError: if the check or Spark refuses the text, or if they do not read the same in it.
    """
    query = parse_select(text, sources, file=file, functions=functions)
    try:
        _check_readings(lambda one: read_statement(spark, one), text, query, file, functions)
    except PySparkException as error:
        raise SpecError(f"{file}: {error.getMessage() or error}") from error
    return query


def select_rows(
    spark: SparkSession,
    text: str,
    raw: Mapping[str, DataFrame],
    *,
    file: str,
    functions: Sequence[str] = (),
) -> DataFrame:
    """The rows that a fleet's SQL gives over its raw tables, by source name.

    What runs is rendered from the checked statement.

    Raises:
        SpecError: as `check_select`, and if Spark resolves anything in it to what is not a source,
            or to chance.
    """
    query = check_select(spark, text, list(raw), file=file, functions=functions)
    for name, frame in raw.items():
        frame.createOrReplaceTempView(name)
    try:
        rows = spark.sql(render(query))
        check_analyzed(rows, list(raw), file)
    except PySparkException as error:
        raise SpecError(f"{file}: {error.getMessage() or error}") from error
    finally:
        for name in raw:
            spark.catalog.dropTempView(name)
    return rows


def derived_column(
    spark: SparkSession, text: str, tree: exp.Expr, *, where: str, functions: Sequence[str] = ()
) -> Column:
    """A derived column, checked on both sides.

    Args:
        spark: the session.
        text: the expression as its author wrote it.
        tree: the same, checked.
        where: its field, for messages.
        functions: names that it may call besides the allowed ones.

    Raises:
        SpecError: if Spark does not understand the text, or reads more in it than the check.
    """
    try:
        _check_readings(lambda one: read_expression(spark, one), text, tree, where, functions)
        return sf.expr(render(tree))
    except PySparkException as error:
        raise SpecError(f"{where}: {text!r}: {error.getMessage() or error}") from error


def excess(reading: SparkReading, tree: exp.Expr, functions: Sequence[str] = ()) -> Iterator[str]:
    """What Spark reads in a text beyond the checked tree, in words."""
    contents = contents_of(tree)
    allowed = _EXPRESSIONS
    if isinstance(tree, exp.Query):
        allowed = allowed | _PLANS
    for node in sorted(reading.nodes - allowed):
        yield f"a node {node}"
    for name in sorted(reading.relations - contents.relations):
        yield f"the relation {name}"
    for name in sorted(reading.functions - (contents.functions & allowed_functions(functions))):
        yield f"the function {name}"
    for parts in sorted(reading.columns):
        if not contents.columns.issuperset(parts):
            yield f"the column {'.'.join(parts)}"
        if len(parts) == 1 and parts[0] in BARE:
            yield f"the column {parts[0]}, which may be a function"


def _check_readings(
    read: Callable[[str], SparkReading],
    text: str,
    tree: exp.Expr,
    where: str,
    functions: Sequence[str],
) -> None:
    rendered = render(tree)
    reading = read(rendered)
    for surplus in excess(reading, tree, functions):
        raise SpecError(
            f"{where}: Spark reads {surplus} in it, which the check did not; it was checked as: "
            f"{rendered[:400]}"
        )
    if read(text).shape != reading.shape:
        raise SpecError(
            f"{where}: Spark reads it differently from the check, so it is not run; write it more "
            "plainly (comments, quotes and backslashes first). It was checked as: "
            f"{rendered[:400]}"
        )


def check_analyzed(rows: DataFrame, sources: Sequence[str], where: str) -> None:
    """Check that every relation is a source's view and every expression is repeatable."""
    declared = {name.lower() for name in sources}
    for kind, name in _analyzed_leaves(_queries(rows).analyzed()):
        if kind == "View":
            if name.lower() not in declared:
                raise SpecError(
                    f"{where} reads the view {name!r}; allowed are the declared sources: "
                    f"{', '.join(sources)}"
                )
        elif kind not in _LEAVES:
            raise SpecError(
                f"{where} reads {name[:80]}; allowed are the declared sources: {', '.join(sources)}"
            )
    for name in _random_expressions(_queries(rows).analyzed()):
        raise SpecError(
            f"{where} computes {name[:80]}, which gives another answer each time; use columns of "
            "the data"
        )


def _parser(spark: SparkSession) -> Any:
    # Nothing public parses without running.
    return spark._jsparkSession.sessionState().sqlParser()  # noqa: SLF001


def _queries(rows: DataFrame) -> Any:
    return rows._jdf.queryExecution()  # noqa: SLF001 - nothing public gives the plan's nodes


def _read(plan: Any) -> SparkReading:
    document = json.loads(plan.toJSON())
    nodes = set()
    relations = set()
    functions = set()
    columns = set()
    for name, node in _nodes(document):
        nodes.add(name)
        if name == "UnresolvedRelation" or "TableValuedFunction" in name:
            relations.add(".".join(_names(node)))
        elif name in ("UnresolvedFunction", "UnresolvedGenerator"):
            functions.add(".".join(_names(node)))
        elif name in ("UnresolvedAttribute", "UnresolvedNamedLambdaVariable"):
            columns.add(_names(node))
    return SparkReading(
        nodes=frozenset(nodes),
        relations=frozenset(relations),
        functions=frozenset(functions),
        columns=frozenset(columns),
        shape=_shape(document),
    )


def _nodes(document: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a plan's JSON with the last part of its class name."""
    if isinstance(document, list):
        for part in document:
            yield from _nodes(part)
    elif isinstance(document, dict):
        if "class" in document:
            yield _class_name(document["class"]), document
        for part in document.values():
            yield from _nodes(part)


def _class_name(qualified: str) -> str:
    return qualified.rsplit(".", 1)[-1].rstrip("$")


def _names(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts of a node's name, lower case; Spark writes most of them as `[a, b]`."""
    name = node.get("nameParts") or node.get("multipartIdentifier") or node.get("name") or ""
    if isinstance(name, Mapping):  # a generator's
        parts = filter(None, map(name.get, ("catalog", "database", "funcName")))
        return tuple(str(part).lower() for part in parts)
    text = str(name).removeprefix("[").removesuffix("]")
    return tuple(text.lower().split(", "))


def _shape(document: Any) -> Any:
    """A plan's JSON in a form that is equal where the meaning is."""
    if isinstance(document, dict):
        return {key: _shape(value) for key, value in document.items() if key not in _IDENTITIES}
    if isinstance(document, list):
        if document and all(map(_is_node, document)):
            return _tree_shape(iter(document))
        return list(map(_shape, document))
    return document


def _is_node(part: Any) -> bool:
    return isinstance(part, dict) and "num-children" in part


def _tree_shape(nodes: Iterator[dict[str, Any]]) -> Any:
    """One tree of a list in which each node is followed by its children."""
    node = next(nodes)
    children = [_tree_shape(nodes) for _ in range(node["num-children"])]
    return _same_form(_class_name(node["class"]), _shape(node), children)


def _same_form(
    name: str, fields: dict[str, Any], children: list[Any]
) -> tuple[str, dict[str, Any], list[Any]]:
    """A node in one of the forms in which its text can be written."""
    first: tuple[str, dict[str, Any], list[Any]] = ("", {}, [])
    if children:
        first = children[0]
    first_name, first_fields, grandchildren = first
    if name == "UnresolvedFunction":
        fields["nameParts"] = str(fields["nameParts"]).lower()
        # The field of EXTRACT is a word of the grammar, in any case.
        if fields["nameParts"] == "[extract]" and first_name == "Literal":
            first_fields["value"] = str(first_fields["value"]).upper()
    elif name == "Literal" and _is_number(fields):
        fields["value"] = Decimal(fields["value"])
    # Numbers with a type, such as `1L` and `1.5D`, are rendered as casts.
    elif name == "Cast" and first_name == "Literal" and _is_number(first_fields):
        return "Literal", {"value": first_fields["value"], "dataType": fields["dataType"]}, []
    # `x IS NOT NULL` is rendered as `NOT x IS NULL`, and a plus sign is left out.
    elif name == "Not" and first_name == "IsNull":
        return "IsNotNull", first_fields, grandchildren
    elif name == "UnaryPositive":
        return first
    # A comma between tables is a join without a condition.
    elif (
        name == "Join"
        and "condition" not in fields
        and fields["joinType"] == {"object": f"{_JOINS}.Cross$"}
    ):
        fields["joinType"] = {"object": f"{_JOINS}.Inner$"}
    return name, fields, children


def _is_number(literal: Mapping[str, Any]) -> bool:
    return "value" in literal and str(literal["dataType"]).startswith(_NUMBERS)


def _analyzed_leaves(plan: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of what an analyzed plan reads; views are not looked into."""
    kind = plan.nodeName()
    if kind == "View":
        yield kind, plan.desc().identifier().table()
        return
    children = _listed(plan.children())
    if not children:
        yield kind, plan.simpleStringWithNodeId()
    for part in (*children, *_listed(plan.subqueries())):
        yield from _analyzed_leaves(part)


def _random_expressions(plan: Any) -> Iterator[str]:
    """Expressions of an analyzed plan whose answer changes; views are not looked into."""
    if plan.nodeName() == "View":
        return
    for expression in _listed(plan.expressions()):
        if not expression.deterministic():
            yield from _random_parts(expression)
    for part in (*_listed(plan.children()), *_listed(plan.subqueries())):
        yield from _random_expressions(part)


def _random_parts(expression: Any) -> Iterator[str]:
    """The innermost parts of an expression that make its answer change."""
    random = [child for child in _listed(expression.children()) if not child.deterministic()]
    if not random and expression.getClass().getSimpleName() not in _ORDER_DEPENDENT:
        yield expression.toString()
    for child in random:
        yield from _random_parts(child)


def _listed(sequence: Any) -> list[Any]:
    return [sequence.apply(place) for place in range(sequence.size())]
