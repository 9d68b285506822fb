"""What features.sql may be: one SELECT over the declared sources, checked on the parsed statement before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import OptimizeError, SqlglotError
from sqlglot.optimizer.qualify import qualify

from pipeline.errors import SpecError
from pipeline.spec import FleetSpec

# Spark functions that run Java or read files and the environment instead of computing from columns, or that answer differently each time.
FORBIDDEN = frozenset({"reflect", "java_method", "try_reflect", "input_file_name", "read_files", "current_user"})
CHANGING = frozenset({"rand", "randn", "random", "uuid", "shuffle", "current_timestamp", "current_date", "current_time", "localtimestamp", "now"})


def parse_select(text: str, sources: Sequence[str], *, file: str) -> exp.Query:
    """Parse the SQL of a fleet.

    Args:
        text: the statement.
        sources: names of the declared raw tables.
        file: where it was read, for messages.

    Raises:
        SpecError: unless it is one SELECT over the sources and its own common table expressions.
    """
    try:
        statements = [statement for statement in sqlglot.parse(text, dialect="spark") if statement is not None]
    except SqlglotError as error:
        raise SpecError(f"{file} is not SQL that Spark understands: {error}") from error
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        kinds = ", ".join(type(statement).__name__.upper() for statement in statements) or "nothing"
        raise SpecError(f"{file} holds {kinds}; expected exactly one SELECT")
    query = statements[0]
    own = {cte.alias_or_name.lower() for cte in query.find_all(exp.CTE)}
    known = {name.lower() for name in sources}
    for table in query.find_all(exp.Table):
        if table.db or not isinstance(table.this, exp.Identifier) or table.name.lower() not in known | own:
            raise SpecError(f"{file} reads {table.sql('spark')!r}; allowed are the declared sources: {', '.join(sources)}")
    for function in query.find_all(exp.QueryTransform):
        raise SpecError(f"{file} runs a script ({function.sql('spark')[:80]}); TRANSFORM ... USING is not allowed")
    _refuse_functions(query, file)
    return query


def check_expression(text: str, *, where: str) -> exp.Expression:
    """Parse one row-wise SQL expression.

    Raises:
        SpecError: if it is not one expression, or holds a subquery, a star, an aggregate, a window or a forbidden function.
    """
    if not text.strip():
        raise SpecError(f"{where}: the expression is empty; expected one such as 'a / b'")
    try:
        parsed = sqlglot.parse_one(f"SELECT {text} AS x", dialect="spark")
    except SqlglotError as error:
        raise SpecError(f"{where}: {text!r} is not an SQL expression: {error}") from error
    # A WHERE, LIMIT or DISTINCT would be a clause beside the one expression.
    clauses = {name for name, value in parsed.args.items() if value}
    if not isinstance(parsed, exp.Select) or len(parsed.selects) != 1 or clauses != {"expressions"} or len(list(parsed.find_all(exp.Query))) > 1:
        raise SpecError(f"{where}: {text!r} is not a single row-wise expression; subqueries, tables and clauses are not allowed")
    if parsed.find(exp.AggFunc, exp.Window):
        raise SpecError(f"{where}: {text!r} looks at other rows; declare a lag or a rolling window instead, which respect what was known")
    if parsed.find(exp.Star):
        raise SpecError(f"{where}: {text!r} reads all columns (*), the target among them; name the columns")
    _refuse_functions(parsed, where)
    return parsed


def _refuse_functions(tree: Any, where: str) -> None:
    for function in tree.find_all(exp.Func):
        name = (function.name if isinstance(function, exp.Anonymous) else function.sql_name()).lower()
        if name in FORBIDDEN:
            raise SpecError(f"{where} calls {name}, which reaches outside the data; remove it")
        if name in CHANGING:
            raise SpecError(f"{where} calls {name}, which gives another answer each time; use columns of the data, and the launch's as_of for today")


def check_features(spec: FleetSpec, text: str, *, file: str, schemas: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Check the SQL and every declared feature against each other.

    Args:
        spec: the fleet.
        text: content of the SQL file.
        file: its name, for messages.
        schemas: column types by source where they are known; with them, columns that no source has are found too.

    Raises:
        SpecError: naming the file, the column, and the columns there are.
    """
    query = parse_select(text, [source.name for source in spec.sources], file=file)
    given = _output_columns(query, schemas, file)
    if given is not None:
        for name, field in spec.sql_columns.items():
            if name.lower() not in given:
                raise SpecError(f"{field}: {file} gives no column {name!r}; it gives: {', '.join(sorted(given))}")
    # The target and what the SQL gives beside it are known only when the row comes true: derived columns may not see them.
    visible = [*spec.features.columns, *spec.key_columns, *spec.history_columns, *spec.features.calendar, *spec.features.categoricals]
    seen = {name.lower() for name in visible if name != spec.target.column}
    for name, text_ in spec.features.derived.items():
        parsed = check_expression(text_, where=f"features.derived.{name}")
        for column in parsed.find_all(exp.Column):
            if column.name.lower() not in seen:
                raise SpecError(
                    f"features.derived.{name}: {column.name!r} is not a feature known when the prediction is made; known: {', '.join(sorted(seen))}"
                )
        seen.add(name.lower())


def _output_columns(query: exp.Query, schemas: Mapping[str, Mapping[str, str]] | None, file: str) -> set[str] | None:
    """Names of the columns the SQL gives, lower case; None where they depend on a source's columns, not known yet."""
    if schemas is None:
        return None if query.is_star or any(select.is_star for select in query.selects) else {name.lower() for name in query.named_selects}
    try:
        qualified: Any = qualify(query.copy(), schema={name: dict(columns) for name, columns in schemas.items()}, dialect="spark")
    except OptimizeError as error:
        there = "; ".join(f"{name} has {', '.join(columns)}" for name, columns in schemas.items())
        raise SpecError(f"{file}: {error} What the sources give: {there}") from error
    return {name.lower() for name in qualified.named_selects}
