"""SQL that is checked by both parsers, and run as it was checked."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import DataFrame, SparkSession

from assets.fleet import EXAMPLE, EXAMPLE_SQL
from pipeline.errors import SpecError
from pipeline.features.functions import ALLOWED
from pipeline.features.sql import check_expression, parse_derived, parse_select, render
from pipeline.spark.sql_plans import (
    check_analyzed,
    check_select,
    derived_column,
    excess,
    read_expression,
    read_statement,
    select_rows,
)
from pipeline.spec import parse_spec

FLEETS = Path(__file__).parents[3] / "pipeline" / "defs"


@pytest.fixture(scope="module")
def sales(spark: SparkSession) -> DataFrame:
    return spark.sql(
        "SELECT * FROM VALUES ('a', date'2024-01-01', 1.5D), ('b', date'2024-02-29', 2.5D), ('b', date'2024-03-01', 4D) AS t(city, day, price)"
    )


def refusal(spark: SparkSession, text: str) -> str:
    with pytest.raises(SpecError) as caught:
        check_select(spark, text, ["sales"], file="features.sql")
    return str(caught.value)


def test_a_comment_that_goes_on_for_spark_alone_stops_the_build(
    spark: SparkSession, tmp_path: Path
) -> None:
    hidden = f"SELECT city FROM sales -- \\\nWHERE price > 1 -- {tmp_path}"
    message = refusal(spark, hidden)
    assert "Spark reads it differently from the check" in message
    assert message.endswith("It was checked as: SELECT city FROM sales WHERE price > 1")


def test_a_derived_column_cannot_read_the_target_behind_a_comment(spark: SparkSession) -> None:
    text = "price /* -- */ -- \\\n + 1"
    with pytest.raises(SpecError, match=r"^features\.derived\.x: Spark reads it differently"):
        derived_column(
            spark,
            text,
            check_expression(text, where="features.derived.x"),
            where="features.derived.x",
        )


def test_what_spark_reads_beyond_the_tree_is_found(spark: SparkSession) -> None:
    tree = parse_select("SELECT upper(city) FROM sales", ["sales"], file="features.sql")

    def beyond(text: str) -> str:
        return "; ".join(excess(read_statement(spark, text), tree))

    assert beyond("SELECT upper(city) FROM sales") == ""
    assert beyond("SELECT lower(city) FROM sales") == "the function lower"
    assert beyond("SELECT city FROM secret") == "the relation secret"
    assert beyond("SELECT city FROM other.sales") == "the relation other.sales"
    assert "the relation range" in beyond("SELECT city FROM range(3)")
    assert beyond("SELECT price FROM sales") == "the column price"
    assert (
        beyond("SELECT city FROM sales WHERE city IN (SELECT city FROM secret)")
        == "the relation secret"
    )
    assert "ScriptTransformation" in beyond("SELECT TRANSFORM(city) USING 'cat' FROM sales")
    assert "Sample" in beyond("SELECT city FROM sales TABLESAMPLE (10 PERCENT)")
    assert "WithWindowDefinition" in beyond(
        "SELECT city FROM sales WINDOW w AS (PARTITION BY rand())"
    )
    user = parse_select("SELECT s.user FROM sales AS s", ["sales"], file="features.sql")
    assert list(excess(read_statement(spark, "SELECT user FROM sales"), user)) == [
        "the column user, which may be a function"
    ]
    expression = check_expression("price", where="x")
    assert "a node Project" in "; ".join(excess(read_expression(spark, "(SELECT 1)"), expression))


def test_a_function_that_the_tree_calls_but_nobody_allowed_is_found(spark: SparkSession) -> None:
    text = "SELECT collect_set(city) FROM sales"
    tree = parse_select(text, ["sales"], file="features.sql", functions=["collect_set"])
    assert list(excess(read_statement(spark, text), tree, ["collect_set"])) == []
    assert list(excess(read_statement(spark, text), tree)) == ["the function collect_set"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("SELECT rand() AS x FROM sales", "rand("),
        (
            (
                "SELECT city FROM sales WHERE price > (SELECT max(price) FROM sales "
                "WHERE price > randn())"
            ),
            "scalar-subquery",
        ),
        ("SELECT sum(price) OVER (PARTITION BY uuid()) AS x FROM sales", "uuid("),
        ("SELECT city FROM other", "the view 'other'"),
        ("SELECT id FROM range(3)", "reads Range"),
    ],
)
def test_chance_and_other_relations_are_found_in_the_analyzed_plan(
    spark: SparkSession,
    sales: DataFrame,
    text: str,
    part: str,
) -> None:
    for name in ("sales", "other"):
        sales.createOrReplaceTempView(name)
    try:
        with pytest.raises(SpecError) as caught:
            check_analyzed(spark.sql(text), ["sales"], "features.sql")
    finally:
        for name in ("sales", "other"):
            spark.catalog.dropTempView(name)
    assert part in str(caught.value)


def test_ordinary_sql_runs_as_it_was_written(spark: SparkSession, sales: DataFrame) -> None:
    text = r"""
    -- A comment, and another /* inside */
    WITH recent AS (SELECT *, lag(price) OVER (PARTITION BY city ORDER BY day) AS before FROM sales)
    SELECT
      r.city, 'it''s' AS a, "dq's" AS b, r'raw\n' AS c, 'a\tb\\' AS d, 'x' 'y' AS e, 1L AS f, 1.5D AS g, -price % 3 AS h,
      7 DIV 2 AS i, NOT price BETWEEN 1 AND 2 AS j, r.city || 'x' AS k, timestampadd(DAY, 1, day) AS l, before <=> NULL AS m,
      date'2024-01-31' + INTERVAL 1 MONTH AS n, extract(year FROM day) AS o, array(1, 2)[0] AS p, TRIM(BOTH 'a' FROM r.city) AS q,
      transform(array(1, 2), x -> x + 1) AS r, first(price) OVER (PARTITION BY r.city ORDER BY day) AS s, CAST(price AS INT)::string AS t,
      CASE r.city WHEN 'a' THEN 1 ELSE 2 END AS u, if(price > 2, 'big', NULL) AS v, 8 << 2 AS w, day > '2024-01-15' AS x
    FROM recent r, (SELECT max(day) AS newest FROM sales)
    WHERE day <= newest AND r.city IN (SELECT city FROM sales)
    ORDER BY day DESC NULLS FIRST LIMIT 10
    """
    checked = select_rows(spark, text, {"sales": sales}, file="features.sql").collect()
    sales.createOrReplaceTempView("sales")
    try:
        written = spark.sql(text).collect()
    finally:
        spark.catalog.dropTempView("sales")
    assert checked == written
    assert len(checked) == 3
    assert checked[0]["a"] == "it's"


@pytest.mark.parametrize("fleet", ["housing", "flights", "the scaffold's"])
def test_the_examples_are_read_alike_by_both_parsers(spark: SparkSession, fleet: str) -> None:
    attributes: dict[str, Any] = {"name": "example", **EXAMPLE}
    sql = EXAMPLE_SQL
    if fleet != "the scaffold's":
        attributes = yaml.safe_load((FLEETS / fleet / "defs.yaml").read_text())["attributes"]
        sql = (FLEETS / fleet / "features.sql").read_text()
    spec = parse_spec(attributes, file="defs.yaml")
    query = check_select(spark, sql, [source.name for source in spec.sources], file="features.sql")
    assert "--" not in render(query)
    for name, tree in parse_derived(spec).items():
        derived_column(spark, spec.features.derived[name], tree, where=name)


def test_every_allowed_function_is_one_of_spark(spark: SparkSession) -> None:
    known = {row[0] for row in spark.sql("SHOW SYSTEM FUNCTIONS").collect()}
    # Spark parses these itself and does not list them.
    assert ALLOWED - known == {"timestampadd", "timestampdiff", "try_cast"}


def test_an_unknown_function_is_refused_before_spark_sees_it(spark: SparkSession) -> None:
    assert "calls 'no_such'" in refusal(spark, "SELECT no_such(city) FROM sales")


PLAIN = """
    price IS NOT NULL; NOT price IS NULL; price IS NULL; +price; NOT price IS NOT NULL; (price > 1) IS NOT TRUE; price IS NOT DISTINCT FROM 1
    price BETWEEN 1 AND 2; price NOT BETWEEN 1 AND 2; position('a' IN city); city NOT LIKE 'a%'; city NOT IN ('a', 'b'); city RLIKE 'a'
    CASE WHEN price IS NOT NULL AND price <> 1 THEN 1 ELSE 0 END; coalesce(price, 0) IS NOT NULL; !(price > 1); -price; price::int
    sum(price) OVER (PARTITION BY city ORDER BY day ROWS BETWEEN 2 PRECEDING AND CURRENT ROW)
"""


def test_what_people_write_every_day_is_read_alike(spark: SparkSession) -> None:
    expressions = [part.strip() for line in PLAIN.strip().splitlines() for part in line.split(";")]
    text = (
        f"SELECT {', '.join(f'{one} AS x{number}' for number, one in enumerate(expressions))} FROM "
        "sales WHERE city IS NOT NULL"
    )
    check_select(spark, text, ["sales"], file="features.sql")
    check_select(
        spark,
        "SELECT city, sum(price) AS total FROM sales GROUP BY ALL",
        ["sales"],
        file="features.sql",
    )
