"""Ways around the check of a fleet's SQL: sixty made by hand, and generated statements.

The statements read the source `sales` (region, city, day, price, target). A test that runs one must
find nothing in Spark's plan that the checked tree does not contain.
"""

import random
from typing import Literal, NamedTuple

Kind = Literal["select", "derived"]


class Escape(NamedTuple):
    """A hand-made way around the check.

    Args:
        name: what it tries, unique.
        kind: a whole statement, or a derived column.
        text: the SQL.
    """

    name: str
    kind: Kind
    text: str


_SCRIPT = "SELECT TRANSFORM(city) USING 'sh -c id' AS x FROM sales"
_SELECTS = {
    "script after a continued comment": "SELECT city FROM sales -- \\\nUNION ALL <script>",
    "clause hidden by a continued comment": "SELECT city FROM sales -- \\\nWHERE price > 1",
    "comment continued twice": "SELECT city FROM sales -- \\\n-- \\\nUNION ALL <script>",
    "comment that a carriage return ends": "SELECT city FROM sales -- x\rUNION ALL <script>",
    "comment that a line separator might end": "SELECT city FROM sales -- x\u2028UNION ALL <script>",
    "comment that a form feed might end": "SELECT city FROM sales -- x\fUNION ALL <script>",
    "nested comments": "SELECT city FROM sales /* /* */ UNION ALL <script> -- */",
    "comment opened in a comment": "SELECT city FROM sales /* -- */ UNION ALL <script>",
    "hint in the place of a comment": "SELECT /*+ BROADCAST(sales) */ city FROM sales",
    "hint that holds a comment": "SELECT /*+ COALESCE(1) /* */ */ city FROM sales",
    "script": "<script>",
    "script, MAP": "FROM sales MAP city USING 'sh -c id'",
    "script, REDUCE": "FROM sales REDUCE city USING 'sh -c id'",
    "script in a subquery": "SELECT city FROM sales WHERE city IN (<script>)",
    "script in a common table expression": "WITH a AS (<script>) SELECT * FROM a",
    "string ended by an escaped quote": "SELECT 'a\\' AS x FROM sales UNION ALL <script> -- ' FROM sales",
    "string ended by two quotes": "SELECT 'a''' AS x FROM sales UNION ALL <script> -- ' FROM sales",
    "raw string that ends in a backslash": "SELECT r'a\\' AS x FROM sales UNION ALL <script> -- ' FROM sales",
    "quotes within other quotes": "SELECT \"a'\" AS x FROM sales UNION ALL <script> -- ' FROM sales",
    "backtick within backticks": "SELECT city AS `a``, b` FROM sales UNION ALL <script> -- `",
    "alias of a view that is SQL": "SELECT city FROM sales LATERAL VIEW explode(array(1)) `t AS x UNION ALL <script> --` AS y",
    "settings in a text": "SELECT '${spark.app.name}' AS x FROM sales",
    "environment in a text": "SELECT '${env:PATH}' AS x FROM sales",
    "setting in the place of SQL": "SELECT ${spark.sql.shuffle.partitions} AS x FROM sales",
    "two statements": "SELECT city FROM sales; DROP VIEW sales",
    "two statements, hidden": "SELECT city FROM sales -- \\\n; DROP VIEW sales",
    "script block": "BEGIN SELECT city FROM sales; END",
    "statement made of a text": "EXECUTE IMMEDIATE 'SELECT 1'",
    "table of another name": "SELECT * FROM secret",
    "table through a common table expression out of reach": "SELECT * FROM (WITH secret AS (SELECT 1) SELECT * FROM secret) JOIN secret",
    "table before the common table expression of its name": "WITH a AS (SELECT * FROM secret), secret AS (SELECT 1 AS x) SELECT * FROM a",
    "table named by a text": "SELECT * FROM identifier('secret')",
    "file": "SELECT * FROM text.`/etc/passwd`",
    "table with a catalog": "SELECT * FROM spark_catalog.default.secret",
    "function in the place of a table": "SELECT * FROM range(3)",
    "words of the language": "SELECT * FROM sql_keywords()",
    "logs of workers": "SELECT * FROM python_worker_logs()",
    "function called by a text": "SELECT identifier('rand')() AS x FROM sales",
    "function with a catalog": "SELECT system.builtin.rand() AS x FROM sales",
    "function in backticks": "SELECT `java_method`('java.lang.System', 'getenv') AS x FROM sales",
    "function of another name that Spark renames": "SELECT random() AS x FROM sales",
    "random filter": "SELECT * FROM sales TABLESAMPLE (50 PERCENT)",
    "random filter by buckets": "SELECT * FROM sales TABLESAMPLE (BUCKET 1 OUT OF 2)",
    "earlier version": "SELECT * FROM sales VERSION AS OF 1",
    "parameter": "SELECT :x AS x FROM sales",
    "parameter without a name": "SELECT ? AS x FROM sales",
    "today as a text": "SELECT date'today' AS x FROM sales",
    "now as a text": "SELECT timestamp ' NOW ' AS x FROM sales",
    "user without parentheses": "SELECT current_user AS x FROM sales",
    "user as a column": "SELECT `session_user` AS x FROM sales",
    "file of a row": "SELECT _metadata.file_path AS x FROM sales",
    "pipe": "FROM sales |> SELECT city |> UNION ALL (<script>)",
    "recursion": "WITH RECURSIVE a(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM a) SELECT * FROM a",
}
_DERIVED = {
    "target after a continued comment": "price -- \\\n+ target",
    "target that a continued comment hides": "price -- \\\n+ 1",
    "target as a lambda's variable": "aggregate(array(price), 0D, (target, x) -> target + x)",
    "subquery": "(SELECT max(target) FROM sales)",
    "target in backticks": "`target` + price",
    "target as a field": "named_struct('target', target).target",
    "all columns": "to_json(struct(*))",
}
ESCAPES = (
    *(Escape(name, "select", text.replace("<script>", _SCRIPT)) for name, text in _SELECTS.items()),
    *(Escape(name, "derived", text) for name, text in _DERIVED.items()),
)

_GAPS = (
    " ", "  ", "\n", "\t", "\r\n", "\f", "\u00a0", "\u2003", "\u2028", "-- note\n", "--\\\n", "-- \\\n", "-- it's\n", "-- \\\\\n",
    "-- x\r", "/* note */", "/**/", "/* /* */ */", "/* /* */", "/* -- */", "/* ' */", "/*+ BROADCAST(sales) */", "/*+ COALESCE(1) */",
    "--*/\n", "/*/", "/*! 1 */", "# note\n", "// note\n",
)  # fmt: skip
_NAMES = (
    "city",
    "region",
    "price",
    "`city`",
    "`pri``ce`",
    "sales.price",
    "s.price",
    "`a b`",
    "tärget",
    "target",
    "\uff23ITY",
    "user",
    "_metadata",
)
_TEXTS = (
    "'a'", '"a"', "''", '""', "'a''b'", "'a\\'b'", "'a\\\\'", "'a\\\\\\'b'", '"a""b"', '"a\\"b"', "'a' 'b'", "'a'\"b\"", "r'a\\'", 'R"a\\"',
    "'-- \\\n'", "'/*'", "'*/'", "'\\u0027 || rand() || \\u0027'", "'\\047'", "'${env:HOME}'", "'a\nb'", "'a\\\nb'", "'ü\u2028'", "X'27'",
    "'%\\_'", "'\\x27'", "N'a'", "'\\", "'a\\u005c'",
)  # fmt: skip
_NUMBERS = (
    "0",
    "1L",
    "1.5D",
    "1e3",
    ".5",
    "0x1F",
    "1BD",
    "-1",
    "- -1",
    "--1\n",
    "2147483648",
    "1Y",
)
_CALLS = (
    "upper({})", "coalesce({}, {})", "concat({}, {})", "if({} = {}, 1, 2)", "cast({} as string)", "{}::string", "ln({})", "date_add({}, 1)",
    "timestampadd(DAY, 1, {})", "extract(YEAR FROM {})", "trim(BOTH {} FROM {})", "array({}, {})[0]", "transform(array({}), x -> x)",
    "interval 3 day", "date'2024-01-31'", "date'today'", "rand()", "uuid()", "reflect({}, {})", "`rand`()", "current_date", "user",
    "spark_partition_id()", "identifier({})({})", "aggregate(array(1), 0, (a, target) -> a + target)", "max({}) OVER (PARTITION BY city)",
    "first({})", "count(*)", "(SELECT max(price) FROM sales)", "(SELECT x FROM secret)", "exists(array(1), x -> x > 0)", "CASE WHEN {} THEN {} END",
)  # fmt: skip
_OPERATORS = (
    "+",
    "-",
    "*",
    "/",
    "%",
    "DIV",
    "||",
    "=",
    "<>",
    "<=>",
    "AND",
    "OR",
    "LIKE",
    "RLIKE",
    "IS NOT DISTINCT FROM",
    "IN",
    "<<",
    "&",
    "^",
)
_STATEMENTS = (
    "SELECT {} AS x FROM sales",
    "SELECT {} AS x, {} AS `y` FROM sales AS s WHERE {} = {}",
    "WITH a AS (SELECT {} AS x FROM sales AS s) SELECT x FROM a",
    "SELECT city FROM sales AS s JOIN (SELECT {} AS x FROM sales) AS t ON s.city = t.x",
    "SELECT {} AS x FROM sales UNION ALL SELECT {} AS x FROM sales",
    "SELECT x FROM sales LATERAL VIEW explode(array({})) `t`  AS x",
    "SELECT city, sum(price) AS x FROM sales GROUP BY city HAVING {} ORDER BY city LIMIT 3",
    "SELECT city FROM sales AS s WHERE EXISTS (SELECT 1 FROM sales AS t WHERE {} = t.city)",
    "SELECT {} AS x FROM secret",
    "SELECT TRANSFORM({}) USING 'cat' AS x FROM sales",
    "SELECT {} AS x FROM sales TABLESAMPLE (1 ROWS)",
    "SELECT {} AS x FROM sales; SELECT 1",
)
_PAYLOADS = (
    "UNION ALL SELECT TRANSFORM(city) USING 'cat' FROM sales", ", rand()", "+ target", "FROM secret --", "; DROP VIEW sales", "WHERE uuid() > ''",
    ", (SELECT x FROM secret)",
)  # fmt: skip


def generate(seed: int, kind: Kind) -> str:
    """A statement or expression of pieces that parsers may read differently.

    Most are wrong, some are hostile.
    """
    dice = random.Random(seed)  # noqa: S311 - to be repeatable
    if kind == "derived":
        text = _expression(dice, 2)
    else:
        text = dice.choice(_STATEMENTS[: dice.choice((4, 8, len(_STATEMENTS)))])
        while "{}" in text:
            text = text.replace("{}", _expression(dice, 2), 1)
    words = text.split(" ")
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        place = dice.randrange(len(words) + 1)
        gap = dice.choice(_GAPS)
        if dice.random() < 0.3:  # noqa: PLR2004
            gap += dice.choice(_PAYLOADS)
        words.insert(place, gap)
    return " ".join(words)


def _expression(dice: random.Random, depth: int) -> str:
    form = dice.random()
    if depth == 0 or form < 0.3:  # noqa: PLR2004
        simple = dice.choice(
            (("city", "price", "1", "'a'"), ("city", "price"), _NAMES, _TEXTS, _NUMBERS)
        )
        return dice.choice(simple)
    if form < 0.7:  # noqa: PLR2004
        text = dice.choice(_CALLS[: dice.choice((14, 14, len(_CALLS)))])
        while "{}" in text:
            text = text.replace("{}", _expression(dice, depth - 1), 1)
        return text
    return (
        f"{_expression(dice, depth - 1)} {dice.choice(_OPERATORS)} ({_expression(dice, depth - 1)})"
    )
