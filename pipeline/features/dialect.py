"""Spark's SQL as sqlglot reads and writes it, narrowed so that what is written means what was read.

sqlglot translates between dialects: it gives functions a class of its own and writes them under the
name that fits the target. Here a call keeps its name and its arguments, so that the function that
was checked is the function that runs.
"""

from typing import Any, ClassVar

from sqlglot import exp
from sqlglot.dialects.spark import Spark
from sqlglot.generators.spark import SparkGenerator
from sqlglot.parsers.spark import SparkParser

_UNITS = (
    "YEAR",
    "QUARTER",
    "MONTH",
    "WEEK",
    "DAY",
    "DAYOFYEAR",
    "HOUR",
    "MINUTE",
    "SECOND",
    "MILLISECOND",
    "MICROSECOND",
)
_WITH_UNIT = ("timestampadd", "timestampdiff", "dateadd", "date_add", "datediff", "date_diff")


def _call_with_unit(name: str) -> Any:
    """A function of a unit, an amount and a time, where the unit is a word and not a column."""

    def build(args: list[Any]) -> exp.Anonymous:
        if len(args) == 3:  # noqa: PLR2004 - as the docstring says
            unit, amount, time = args
            if isinstance(unit, exp.Column) and unit.name.upper() in _UNITS:
                args = [exp.var(unit.name), amount, time]
        return exp.Anonymous(this=name, expressions=args)

    return build


def _trim(generator: Any, node: exp.Trim) -> str:
    what = " ".join(filter(None, [node.args.get("position"), generator.sql(node, "expression")]))
    if what:
        what += " FROM "
    return f"TRIM({what}{generator.sql(node, 'this')})"


class PlainSpark(Spark):
    """Spark SQL whose calls are kept as they were written."""

    class Tokenizer(Spark.Tokenizer):
        """Two quotes within a string are one, as in Spark since 4.0."""

        STRING_ESCAPES: ClassVar[list[str]] = ["\\", "'", '"']

    class Parser(SparkParser):
        """Functions have no classes of their own, but for those with a grammar of their own."""

        FUNCTIONS: ClassVar[dict[str, Any]] = {
            # sqlglot takes `array(1, 2)[0]` for an array type unless it knows the function.
            "ARRAY": lambda args: exp.Array(expressions=args),
            **{name.upper(): _call_with_unit(name) for name in _WITH_UNIT},
        }
        FUNCTION_PARSERS: ClassVar[dict[str, Any]] = {
            name: SparkParser.FUNCTION_PARSERS[name]
            for name in ("CAST", "TRY_CAST", "EXTRACT", "TRIM", "OVERLAY")
        }

    class Generator(SparkGenerator):
        """Writes SQL as it was read: operators, literals and clauses stay what they are."""

        TRANSFORMS: ClassVar[dict[Any, Any]] = {
            **{
                node: write
                for node, write in SparkGenerator.TRANSFORMS.items()
                if node
                not in (exp.Array, exp.From, exp.Pivot, exp.Select, exp.Table, exp.WithinGroup)
            },
            exp.BitwiseLeftShift: lambda self, node: self.binary(node, "<<"),
            exp.BitwiseRightShift: lambda self, node: self.binary(node, ">>"),
            # Literals side by side; the function of this name is an ordinary call.
            exp.Concat: lambda self, node: " ".join(self.sql(part) for part in node.expressions),
            exp.Trim: _trim,
        }

        def cast_sql(self, expression: exp.Cast, safe_prefix: str | None = None) -> str:
            """A cast, or a literal such as `DATE '2024-01-31'`."""
            if type(expression) is exp.Cast and expression.this.is_string:
                return f"{self.sql(expression, 'to')} {self.sql(expression, 'this')}"
            return super().cast_sql(expression, safe_prefix)

        def lateral_sql(self, expression: exp.Lateral) -> str:
            """A LATERAL VIEW, its alias quoted where it was quoted."""
            alias = expression.args["alias"]
            text = " LATERAL VIEW"
            if expression.args.get("outer"):
                text += " OUTER"
            text += f" {self.sql(expression, 'this')} {self.sql(alias, 'this')}"
            columns = self.expressions(alias, key="columns", flat=True)
            if columns:
                text += f" AS {columns}"
            return text
