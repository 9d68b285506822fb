"""What a fleet's SQL may be, and the text of it that Spark runs.

One SELECT over the declared sources, and row-wise expressions, of the allowed syntax and functions.
The text that runs is written from the tree that was checked, never the author's: parsers disagree
about comments, quotes and escapes.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import OptimizeError, ParseError, SqlglotError
from sqlglot.optimizer.qualify import qualify

from pipeline.errors import SpecError
from pipeline.features.dialect import PlainSpark
from pipeline.features.functions import (
    AGGREGATES,
    BARE,
    GENERATORS,
    ORDERED,
    UNORDERED_AGGREGATES,
    WINDOWS,
    allowed_functions,
    refuse_harmful,
)
from pipeline.spec import FleetSpec

MAX_SUGGESTIONS = 5

# All syntax that a checked statement may hold. Calls have a class of their own only where they have
# a grammar of their own.
_SYNTAX: frozenset[type[Any]] = frozenset(
    (
        # clauses of a SELECT
        exp.Select,
        exp.From,
        exp.Where,
        exp.Group,
        exp.Having,
        exp.Qualify,
        exp.Order,
        exp.Ordered,
        exp.Limit,
        exp.Offset,
        # statements and what they read
        exp.With,
        exp.CTE,
        exp.Subquery,
        exp.Union,
        exp.Except,
        exp.Intersect,
        exp.Values,
        exp.Table,
        exp.TableAlias,
        exp.Join,
        # lateral views, pivots, grouping sets
        exp.Lateral,
        exp.Pivot,
        exp.PivotAlias,
        exp.Rollup,
        exp.Cube,
        exp.GroupingSets,
        exp.Distinct,
        exp.Exists,
        # names and what stands around them
        exp.Alias,
        exp.Aliases,
        exp.Column,
        exp.Identifier,
        exp.Star,
        exp.Dot,
        exp.Bracket,
        exp.Paren,
        exp.Tuple,
        exp.Lambda,
        # literals
        exp.Literal,
        exp.RawString,
        exp.Boolean,
        exp.Null,
        exp.Concat,
        exp.Interval,
        exp.IntervalSpan,
        exp.Var,
        # predicates
        exp.And,
        exp.Or,
        exp.Not,
        exp.Is,
        exp.In,
        exp.Between,
        exp.Like,
        exp.ILike,
        exp.RegexpLike,
        exp.Escape,
        exp.Any,
        exp.All,
        # comparisons
        exp.EQ,
        exp.NEQ,
        exp.GT,
        exp.GTE,
        exp.LT,
        exp.LTE,
        exp.NullSafeEQ,
        exp.NullSafeNEQ,
        exp.Collate,
        # arithmetic and concatenation
        exp.Add,
        exp.Sub,
        exp.Mul,
        exp.Div,
        exp.IntDiv,
        exp.Mod,
        exp.Neg,
        exp.DPipe,
        # bits
        exp.BitwiseAnd,
        exp.BitwiseOr,
        exp.BitwiseXor,
        exp.BitwiseNot,
        exp.BitwiseLeftShift,
        exp.BitwiseRightShift,
        # conditions and types
        exp.Case,
        exp.If,
        exp.Cast,
        exp.TryCast,
        exp.DataType,
        exp.DataTypeParam,
        exp.ColumnDef,
        # calls with a grammar of their own
        exp.Anonymous,
        exp.Array,
        exp.Transform,
        exp.Extract,
        exp.Trim,
        exp.Overlay,
        # windows
        exp.Window,
        exp.WindowSpec,
        exp.Filter,
        exp.WithinGroup,
        exp.IgnoreNulls,
        exp.RespectNulls,
    )
)
# Names under which Spark knows the calls that have a grammar of their own.
_CALLS: dict[type[Any], str] = {
    exp.Array: "array",
    exp.Transform: "transform",
    exp.Extract: "extract",
    exp.Trim: "trim",
    exp.Overlay: "overlay",
    exp.If: "if",
    exp.Any: "any",
    exp.Between: "between",
}
# Texts that Spark takes for today or the moment of the query in `DATE '...'` and `TIMESTAMP '...'`.
_MOMENTS = ("now", "today", "tomorrow", "yesterday")


@dataclass(frozen=True)
class Contents:
    """What a checked tree reads and calls, lower case.

    Args:
        relations: names of tables and common table expressions.
        functions: names of called functions.
        columns: every name that could be a column: of columns, their qualifiers, fields and lambda
            variables.
    """

    relations: frozenset[str]
    functions: frozenset[str]
    columns: frozenset[str]


def contents_of(tree: exp.Expr) -> Contents:
    """What a checked tree reads and calls."""
    columns = {identifier.name.lower() for identifier in tree.find_all(exp.Identifier)}
    for group in tree.find_all(exp.Group):
        if group.args.get("all"):
            columns.add("all")  # Spark reads GROUP BY ALL as a column of that name
    return Contents(
        relations=frozenset(table.name.lower() for table in tree.find_all(exp.Table)),
        functions=_called_names(tree),
        columns=frozenset(columns),
    )


def render(tree: exp.Expr) -> str:
    """The text of a checked tree, without comments; the only text that Spark may run."""
    return tree.sql(PlainSpark, comments=False, normalize_functions=False)


def parse_select(
    text: str, sources: Sequence[str], *, file: str, functions: Sequence[str] = ()
) -> exp.Query:
    """Parse the SQL of a fleet.

    Args:
        text: the statement.
        sources: names of the declared raw tables.
        file: where it was read, for messages.
        functions: names that it may call besides the allowed ones.

    Returns:
        The statement as it is read from its own rendered text.

    Raises:
        SpecError: unless it is one SELECT over the sources and its own common table expressions, of
            allowed syntax and functions.
    """
    query = _parse_query(text, file)
    _check_query(query, sources, file, functions)
    again = _parse_query(render(query), file)
    if render(again) != render(query):
        raise SpecError(f"{file} can be read in two ways; it was read as: {render(query)[:400]}")
    _check_query(again, sources, file, functions)
    return again


def _parse_query(text: str, file: str) -> exp.Query:
    try:
        parsed = sqlglot.parse(text, dialect=PlainSpark)
    except (SqlglotError, RecursionError) as error:
        raise SpecError(f"{file} is not SQL that Spark understands: {_explained(error)}") from error
    # Nothing before a semicolon is parsed as None.
    statements = [statement for statement in parsed if statement is not None]
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        kinds = ", ".join(type(statement).__name__.upper() for statement in statements) or "nothing"
        raise SpecError(f"{file} holds {kinds}; expected exactly one SELECT")
    return statements[0]


def _explained(error: Exception) -> str:
    """What a parser complains about, and where.

    Without the terminal codes that it underlines the place with.
    """
    if not isinstance(error, ParseError) or not error.errors:
        return str(error)
    fault = error.errors[0]
    around = " ".join(f"{fault['start_context']}{fault['highlight']}{fault['end_context']}".split())
    return (
        f"{fault['description']} at line {fault['line']}, column {fault['col']}, "
        f"at {fault['highlight']!r} in: {around}"
    )


def _check_query(
    query: exp.Query, sources: Sequence[str], file: str, functions: Sequence[str]
) -> None:
    declared = set(map(str.lower, sources))
    for table in query.find_all(exp.Table):
        is_name = isinstance(table.this, exp.Identifier) and not table.db
        if not is_name or table.name.lower() not in declared.union(_visible_ctes(table)):
            raise SpecError(
                f"{file} reads {table.sql('spark')!r}; allowed are the declared sources: "
                f"{', '.join(sources)}"
            )
    for script in query.find_all(exp.QueryTransform):
        raise SpecError(
            f"{file} runs a script ({script.sql('spark')[:80]}); TRANSFORM ... USING is not allowed"
        )
    for hint in query.find_all(exp.Hint):
        raise SpecError(
            f"{file} holds the hint {hint.sql(PlainSpark).strip()}; hints are not allowed: leave "
            "it out"
        )
    _check_functions(query, file, allowed_functions(functions))
    _check_syntax(query, file)


def _visible_ctes(table: exp.Table) -> Iterator[str]:
    """Common table expressions visible to Spark from a table's place.

    Those before the one it stands in, and those of outer statements.
    """
    inner: exp.Expr = table
    node = table.parent
    while node is not None:
        clause = node if isinstance(node, exp.With) else node.args.get("with_")
        if clause is not None and clause is not inner:
            for cte in clause.expressions:
                if cte is inner:
                    break
                yield cte.alias_or_name.lower()
        inner = node
        node = node.parent


def check_expression(text: str, *, where: str, functions: Sequence[str] = ()) -> exp.Expr:
    """Parse one row-wise SQL expression.

    Args:
        text: the expression.
        where: its field, for messages.
        functions: names that it may call besides the allowed ones.

    Returns:
        The expression as it is read from its own rendered text.

    Raises:
        SpecError: if it is not one expression of allowed syntax and functions, or holds a subquery,
            a star, an aggregate, a window or a function that makes rows.
    """
    if not text.strip():
        raise SpecError(f"{where}: the expression is empty; expected one such as 'a / b'")
    expression = _parse_expression(text, where, functions)
    again = _parse_expression(render(expression), where, functions)
    if render(again) != render(expression):
        raise SpecError(
            f"{where}: {text!r} can be read in two ways; it was read as: {render(expression)}"
        )
    return again


def _parse_expression(text: str, where: str, functions: Sequence[str]) -> exp.Expr:
    try:
        parsed = sqlglot.parse_one(f"SELECT {text}", dialect=PlainSpark)
    except (SqlglotError, RecursionError) as error:
        raise SpecError(
            f"{where}: {text!r} is not an SQL expression: {_explained(error)}"
        ) from error
    # A WHERE, LIMIT or DISTINCT would be a clause beside the one expression.
    clauses = {name for name, value in parsed.args.items() if value}
    if (
        not isinstance(parsed, exp.Select)
        or len(parsed.selects) != 1
        or clauses != {"expressions"}
        or len(list(parsed.find_all(exp.Query))) > 1
    ):
        raise SpecError(
            f"{where}: {text!r} is not a single row-wise expression; subqueries, tables and "
            "clauses are not allowed"
        )
    expression: exp.Expr = parsed.selects[0]
    if isinstance(expression, (exp.Alias, exp.Aliases)):
        raise SpecError(
            f"{where}: {text!r} is not a single row-wise expression; leave out the name it is given"
        )
    called = _called_names(expression)
    if parsed.find(exp.Window) or called & (AGGREGATES | UNORDERED_AGGREGATES | WINDOWS | ORDERED):
        raise SpecError(
            f"{where}: {text!r} looks at other rows; declare a lag or a rolling window instead, "
            "which respect what was known"
        )
    if parsed.find(exp.Star):
        raise SpecError(
            f"{where}: {text!r} reads all columns (*), the target among them; name the columns"
        )
    if called & GENERATORS:
        raise SpecError(f"{where}: {text!r} makes several rows of one; make them in features.sql")
    _check_functions(parsed, where, allowed_functions(functions))
    _check_syntax(parsed, where)
    return expression


def _calls(tree: exp.Expr) -> Iterator[tuple[exp.Expr, str]]:
    """Every call of a function with its name, lower case."""
    for node in tree.walk():
        if isinstance(node, exp.Anonymous):
            yield node, node.name.lower()
        elif type(node) in _CALLS:
            yield node, _CALLS[type(node)]


def _called_names(tree: exp.Expr) -> frozenset[str]:
    return frozenset(name for _, name in _calls(tree))


def _check_functions(tree: exp.Expr, where: str, allowed: frozenset[str]) -> None:
    for node in tree.walk():
        if isinstance(node, exp.Func) and type(node) not in _SYNTAX:
            refuse_harmful(node.sql_name().lower(), where)
    for call, name in _calls(tree):
        refuse_harmful(name, where)
        if name not in allowed:
            hint = ""
            near = difflib.get_close_matches(name, sorted(allowed), n=MAX_SUGGESTIONS)
            if near:
                hint = f"close to it: {', '.join(near)}. "
            raise SpecError(
                f"{where} calls {name!r}, which is not one of the {len(allowed)} allowed "
                f"functions; {hint}"
                "If it computes from its arguments alone, allow it in defs.yaml: sql: "
                f"{{functions: [{name}]}}"
            )
        if name == "unix_timestamp" and not call.expressions:
            refuse_harmful("now", where)
        if name in ORDERED and not _is_ordered(call):
            raise SpecError(
                f"{where} calls {name} without an order, so it takes any row; "
                f"write {name}(...) OVER (... ORDER BY ...), or max_by and min_by in a GROUP BY"
            )


def _is_ordered(call: exp.Expr) -> bool:
    """Whether a call stands in a window with an ORDER BY."""
    window = call.find_ancestor(exp.Window, exp.Select)
    return isinstance(window, exp.Window) and bool(window.args.get("order"))


def _check_syntax(tree: exp.Expr, where: str) -> None:
    if "${" in render(tree):
        raise SpecError(
            f"{where} holds '${{', where Spark puts in settings and the environment; write it as "
            f"concat('$', '{{...')"
        )
    for node in tree.walk():
        if type(node) not in _SYNTAX:
            raise SpecError(
                f"{where} holds {node.sql(PlainSpark, comments=False)[:80]!r} "
                f"({type(node).__name__}), which is not allowed; "
                "write it with joins, common table expressions, windows and the allowed functions"
            )
        if isinstance(node, exp.Select) and node.args.get("windows"):
            raise SpecError(
                f"{where} names a window; WINDOW is not allowed: write it where it is used, as "
                "OVER (...)"
            )
        if isinstance(node, exp.With) and node.recursive:
            raise SpecError(f"{where} is recursive; WITH RECURSIVE is not allowed")
        if isinstance(node, exp.Column):
            _check_column(node, where)
        if (
            isinstance(node, exp.Cast)
            and node.this.is_string
            and node.this.name.strip().lower().startswith(_MOMENTS)
        ):
            raise SpecError(
                f"{where} holds {node.sql(PlainSpark)}, which gives another answer each time; "
                "write the date"
            )
        if isinstance(node, exp.Dot) and isinstance(node.expression, exp.Func):
            raise SpecError(
                f"{where} calls {node.sql(PlainSpark)[:80]}; functions are called without a "
                "catalog or schema"
            )


def _check_column(column: exp.Column, where: str) -> None:
    if not column.table and column.name.lower() in BARE:
        raise SpecError(
            f"{where} names {column.name!r}, which Spark may take for a function; write it with "
            f"its table, e.g. t.{column.name}"
        )
    if any(part.name.lower() == "_metadata" for part in column.parts):
        raise SpecError(
            f"{where} names _metadata, under which Spark knows a row's file; use columns of "
            "the sources"
        )


def parse_derived(spec: FleetSpec) -> dict[str, exp.Expr]:
    """The derived columns by name, each reading only what is known when the prediction is made.

    Raises:
        SpecError: naming the field, the column, and the columns that are known.
    """
    # The target and what the SQL gives beside it are known only when the row comes true: derived
    # columns may not see them.
    features = {
        *spec.features.columns,
        *spec.key_columns,
        *spec.history_columns,
        *spec.features.calendar,
        *spec.features.categoricals,
    }
    readable = set(map(str.lower, features - {spec.target.column}))
    hidden = set(map(str.lower, (*spec.sql_columns, "time", "known_at"))) - readable
    derived = {}
    for name, text in spec.features.derived.items():
        where = f"features.derived.{name}"
        derived[name] = check_expression(text, where=where, functions=spec.sql.functions)
        for column in derived[name].find_all(exp.Column):
            if column.name.lower() not in readable:
                raise SpecError(
                    f"{where}: {column.name!r} is not a feature known when the prediction is made; "
                    f"known: {', '.join(sorted(readable))}"
                )
        # Variables of lambdas as well: a parser may take one for the column of that name.
        for identifier in derived[name].find_all(exp.Identifier):
            if identifier.name.lower() in hidden:
                raise SpecError(
                    f"{where}: {identifier.name!r} is the name of a column that is not known when "
                    "the prediction is made; choose another"
                )
        readable.add(name.lower())
    return derived


def check_features(
    spec: FleetSpec, text: str, *, file: str, schemas: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Check the SQL and every declared feature against each other.

    Args:
        spec: the fleet.
        text: content of the SQL file.
        file: its name, for messages.
        schemas: column types by source, where they are known; they reveal columns that no source
            has.

    Raises:
        SpecError: naming the file, the column, and the available columns.
    """
    query = parse_select(
        text, [source.name for source in spec.sources], file=file, functions=spec.sql.functions
    )
    given = _output_columns(query, schemas, file)
    if given is not None:
        for name, field in spec.sql_columns.items():
            if name.lower() not in given:
                raise SpecError(
                    f"{field}: {file} gives no column {name!r}; it gives: "
                    f"{', '.join(sorted(given))}"
                )
    parse_derived(spec)


def _output_columns(
    query: exp.Query, schemas: Mapping[str, Mapping[str, str]] | None, file: str
) -> set[str] | None:
    """Names of the columns the SQL gives, lower case.

    None where they depend on a source's columns, not known yet.
    """
    if schemas is None:
        if query.is_star or any(select.is_star for select in query.selects):
            return None
        return set(map(str.lower, query.named_selects))
    try:
        qualified: Any = qualify(
            query.copy(),
            schema={name: dict(columns) for name, columns in schemas.items()},
            dialect=PlainSpark,
        )
    except OptimizeError as error:
        given = "; ".join(f"{name} has {', '.join(columns)}" for name, columns in schemas.items())
        raise SpecError(f"{file}: {error} What the sources give: {given}") from error
    return set(map(str.lower, qualified.named_selects))
