"""Spark's SQL as sqlglot reads and writes it, narrowed so that what is written means what was read.

sqlglot translates between dialects: it gives functions a class of its own and writes them under the name that fits the target.
Here a call keeps its name and its arguments, so that the function that was checked is the function that runs.
"""

from typing import Any

from sqlglot import exp
from sqlglot.dialects.spark import Spark

_UNITS = frozenset("YEAR QUARTER MONTH WEEK DAY DAYOFYEAR HOUR MINUTE SECOND MILLISECOND MICROSECOND".split())


def _call(name: str) -> Any:
    def build(args: list[Any]) -> exp.Anonymous:
        return exp.Anonymous(this=name, expressions=args)

    return build


def _call_with_unit(name: str) -> Any:
    """A function of a unit, an amount and a time, where the unit is a word and not a column."""

    def build(args: list[Any]) -> exp.Anonymous:
        first = args[0] if args else None
        if len(args) == 3 and isinstance(first, exp.Column) and first.name.upper() in _UNITS:  # noqa: PLR2004
            args = [exp.var(first.name), *args[1:]]
        return exp.Anonymous(this=name, expressions=args)

    return build


class PlainSpark(Spark):
    """Spark SQL whose calls are kept as they were written."""

    class Tokenizer(Spark.Tokenizer):
        """Two quotes within a string are one, as in Spark since 4.0."""

        STRING_ESCAPES = ["\\", "'", '"']

    class Parser(Spark.Parser):
        """Functions have no classes of their own, but for those with a grammar of their own."""

        FUNCTIONS = {
            # sqlglot takes `array(1, 2)[0]` for an array type unless it knows the function.
            "ARRAY": lambda args: exp.Array(expressions=args),
            **{
                name.upper(): _call_with_unit(name)
                for name in ("timestampadd", "timestampdiff", "dateadd", "date_add", "datediff", "date_diff")
            },
        }
        FUNCTION_PARSERS = {
            name: Spark.Parser.FUNCTION_PARSERS[name]
            for name in ("CAST", "TRY_CAST", "EXTRACT", "TRIM", "OVERLAY")
        }

    class Generator(Spark.Generator):
        """Writes what was read: no functions for operators, no casts for literals, no subqueries for clauses."""

        TRANSFORMS = {
            **{
                node: write
                for node, write in Spark.Generator.TRANSFORMS.items()
                if node not in (exp.Array, exp.From, exp.Pivot, exp.Select, exp.Table, exp.WithinGroup)
            },
            exp.BitwiseLeftShift: lambda self, node: self.binary(node, "<<"),
            exp.BitwiseRightShift: lambda self, node: self.binary(node, ">>"),
            # Literals side by side; the function of this name is an ordinary call.
            exp.Concat: lambda self, node: " ".join(self.sql(part) for part in node.expressions),
            exp.Trim: lambda self, node: _trim(self, node),
        }

        def cast_sql(self, expression: exp.Cast, safe_prefix: str | None = None) -> str:
            """A cast, or a literal such as `DATE '2024-01-31'`."""
            if type(expression) is exp.Cast and expression.this.is_string:
                return f"{self.sql(expression, 'to')} {self.sql(expression, 'this')}"
            return super().cast_sql(expression, safe_prefix)

        def lateral_sql(self, expression: exp.Lateral) -> str:
            """A LATERAL VIEW, its alias quoted where it was quoted."""
            alias = expression.args["alias"]
            outer = " OUTER" if expression.args.get("outer") else ""
            table = self.sql(alias, "this")
            columns = self.expressions(alias, key="columns", flat=True)
            return (
                f" LATERAL VIEW{outer} {self.sql(expression, 'this')} {table}"
                f"{f' AS {columns}' if columns else ''}"
            )


def _trim(generator: Any, node: exp.Trim) -> str:
    what = " ".join(filter(None, [node.args.get("position"), generator.sql(node, "expression")]))
    return f"TRIM({f'{what} FROM ' if what else ''}{generator.sql(node, 'this')})"
