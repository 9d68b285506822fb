import pytest

from pipeline.errors import SpecError
from pipeline.features import functions
from pipeline.features.sql import check_expression, check_features, parse_select, render
from pipeline.testing.data import small_spec

SQL = "SELECT region, city, day, sales, price, promotion, kind, usual_sales FROM sales"
SCHEMAS = {
    "sales": dict.fromkeys(("region", "city", "kind"), "string")
    | dict.fromkeys(("sales", "price", "promotion", "usual_sales"), "double")
    | {"day": "date"}
}


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_select(text, ["sales", "shops"], file="features.sql")
    return str(caught.value)


def refused_expression(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        check_expression(text, where="features.derived.x")
    assert str(caught.value).startswith("features.derived.x")
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM sales",
        "select city from SALES limit 3",
        "SELECT s.city FROM sales AS s JOIN shops USING (city)",
        "WITH recent AS (SELECT * FROM sales WHERE day > '2024-01-01') SELECT * FROM recent",
        "WITH a AS (SELECT * FROM sales), b AS (SELECT * FROM a) SELECT * FROM b",
        "SELECT city, row_number() OVER (PARTITION BY city ORDER BY day) AS n FROM sales",
        "SELECT city FROM sales UNION ALL SELECT city FROM shops",
        "SELECT city, x FROM sales LATERAL VIEW explode(array(1, 2)) AS x",
        "SELECT city FROM (SELECT * FROM sales) WHERE city IN (SELECT city FROM shops)",
        "SELECT transform(array(1), x -> x + 1) FROM sales",
        "SELECT `city` FROM `sales`;",
        "-- one row per city\nSELECT city FROM sales",
    ],
)
def test_one_select_over_the_sources_is_allowed(text: str) -> None:
    parse_select(text, ["sales", "shops"], file="features.sql")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT TRANSFORM(city) USING 'cat' AS x FROM sales",
        "SELECT * FROM (SELECT TRANSFORM(city) USING 'cat' AS x FROM sales)",
        "FROM sales MAP city USING 'cat'",
        "FROM sales REDUCE city USING 'cat'",
    ],
)
def test_scripts_are_refused(text: str) -> None:
    assert "features.sql" in refusal(text)


@pytest.mark.parametrize(
    "call",
    [
        "reflect('java.lang.System', 'exit', 1)",
        "java_method('java.lang.System', 'getenv')",
        "try_reflect('java.lang.System', 'getenv')",
        "REFLECT('java.lang.System', 'exit', 1)",
        "`reflect`('java.lang.System', 'exit', 1)",
        "system.builtin.reflect('java.lang.System', 'exit', 1)",
        "upper(concat(reflect('a', 'b'), 'x'))",
        "input_file_name()",
    ],
)
def test_functions_that_reach_outside_the_data_are_refused(call: str) -> None:
    assert "reaches outside the data" in refusal(f"SELECT {call} AS x FROM sales")
    assert "reaches outside the data" in refusal(
        f"WITH a AS (SELECT 1 AS one FROM sales WHERE {call} = 'x') SELECT * FROM a"
    )
    assert "reaches outside the data" in refused_expression(call)


@pytest.mark.parametrize(
    "table",
    [
        "csv.`/etc/passwd`",
        "text.`/etc/passwd`",
        "parquet.`s3://bucket/x`",
        "delta.`/x`",
        "`/etc/passwd`",
        "other",
        "other.sales",
        "spark_catalog.default.sales",
        "read_files('/etc/passwd')",
        "range(10)",
        "identifier('sales')",
    ],
)
def test_only_the_declared_sources_are_read(table: str) -> None:
    for text in (
        f"SELECT * FROM {table}",
        f"SELECT * FROM sales WHERE city IN (SELECT city FROM {table})",
        f"SELECT (SELECT max(a) FROM {table}) FROM sales",
    ):
        message = refusal(text)
        assert "features.sql reads" in message
        assert "sales, shops" in message


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1; SELECT 2",
        "SELECT city FROM sales; DROP TABLE sales",
        "INSERT INTO sales SELECT * FROM sales",
        "INSERT OVERWRITE DIRECTORY '/tmp/x' SELECT * FROM sales",
        "CREATE TABLE x AS SELECT * FROM sales",
        "DROP TABLE sales",
        "SET spark.sql.runSQLOnFiles=true",
        "ADD JAR '/tmp/x.jar'",
        "",
        "-- nothing",
    ],
)
def test_anything_but_one_select_is_refused(text: str) -> None:
    assert "expected exactly one SELECT" in refusal(
        text
    ) or "not SQL that Spark understands" in refusal(text)


def test_broken_sql_is_told_with_its_place() -> None:
    message = refusal("SELECT city FROM sales WHERE (")
    assert message.startswith("features.sql is not SQL that Spark understands")
    assert "at line 1, column 30" in message
    assert message.isprintable()
    message = refusal("SELECT city, mean price FROM sales x y")
    assert message.endswith("at 'y' in: SELECT city, mean price FROM sales x y")


@pytest.mark.parametrize(
    "text",
    [
        "price / 2",
        "ln(price)",
        "CASE WHEN price > 3 THEN 1 ELSE 0 END",
        "coalesce(price, promotion)",
        "pmod(price, 7)",
        "price + 1 -- in euro",
        "greatest(price, 2)",
    ],
)
def test_row_wise_expressions_are_allowed(text: str) -> None:
    check_expression(text, where="features.derived.x")


@pytest.mark.parametrize(
    "text",
    [
        "sum(price)",
        "max(price)",
        "first(price)",
        "percentile(price, 0.5)",
        "count(*)",
        "collect_list(price)",
        "avg(price) + 1",
    ],
)
def test_aggregates_are_refused_in_derived_columns(text: str) -> None:
    assert "looks at other rows" in refused_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "lag(price) OVER (ORDER BY day)",
        "row_number() OVER (PARTITION BY city ORDER BY day)",
        "sum(price) OVER ()",
        "lead(price, 1)",
    ],
)
def test_windows_are_refused_in_derived_columns(text: str) -> None:
    assert "declare a lag or a rolling window" in refused_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "(SELECT max(price) FROM sales)",
        "price IN (SELECT price FROM sales)",
        "EXISTS (SELECT 1)",
        "price FROM sales",
        "price, promotion",
        "price; promotion",
        "price WHERE price > 1 --",
        "price LIMIT 0 --",
        "DISTINCT price",
        "price AS y",
        "price) FROM (SELECT 1",
    ],
)
def test_only_one_expression_is_a_derived_column(text: str) -> None:
    assert "not a single row-wise expression" in refused_expression(
        text
    ) or "not an SQL expression" in refused_expression(text)


@pytest.mark.parametrize("text", ["*", "struct(*)", "hash(*)", "to_json(struct(*))", "sales.*"])
def test_all_columns_at_once_would_hold_the_target(text: str) -> None:
    assert "the target among them" in refused_expression(text)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_expression_is_refused(text: str) -> None:
    assert "is empty" in refused_expression(text)


def test_sql_and_declared_features_fit() -> None:
    check_features(small_spec(), SQL, file="features.sql", schemas=SCHEMAS)
    check_features(small_spec(), SQL, file="features.sql")


def test_a_column_that_the_sql_does_not_give_is_named_with_its_field_and_what_there_is() -> None:
    with pytest.raises(
        SpecError,
        match=(
            r"features\.columns: features\.sql gives no column 'promotion'; it gives: "
            r"city, day, kind, price"
        ),
    ):
        check_features(small_spec(), SQL.replace("promotion, ", ""), file="features.sql")


def test_a_star_is_checked_once_the_columns_are_known() -> None:
    spec = small_spec(features={"columns": ["colour"]})
    check_features(spec, "SELECT * FROM sales", file="features.sql")
    with pytest.raises(SpecError, match="gives no column 'colour'"):
        check_features(spec, "SELECT * FROM sales", file="features.sql", schemas=SCHEMAS)
    check_features(small_spec(), "SELECT * FROM sales", file="features.sql", schemas=SCHEMAS)


def test_a_column_that_no_source_has_is_refused_with_what_the_sources_give() -> None:
    with pytest.raises(SpecError, match="sales has region, city") as caught:
        check_features(
            small_spec(),
            SQL.replace("price", "prise AS price"),
            file="features.sql",
            schemas=SCHEMAS,
        )
    assert "prise" in str(caught.value)


def test_columns_are_found_in_any_case() -> None:
    check_features(
        small_spec(),
        SQL.upper().replace("FROM SALES", "FROM sales"),
        file="features.sql",
        schemas=SCHEMAS,
    )


@pytest.mark.parametrize(
    "text", ["sales / 2", "price - SALES", "coalesce(price, s.sales)", "usual_sales", "day"]
)
def test_a_derived_column_sees_only_what_is_known(text: str) -> None:
    spec = small_spec(features={"derived": {"x": text}})
    with pytest.raises(
        SpecError,
        match=(
            r"features\.derived\.x: '\w+' is not a feature known when the prediction is "
            r"made; known: .*price"
        ),
    ):
        check_features(spec, SQL, file="features.sql")


def test_a_derived_column_sees_those_before_it_only() -> None:
    check_features(
        small_spec(features={"derived": {"x": "price * 2", "y": "x + 1"}}), SQL, file="features.sql"
    )
    with pytest.raises(SpecError, match=r"features\.derived\.x: 'y'"):
        check_features(
            small_spec(features={"derived": {"x": "y + 1", "y": "price"}}), SQL, file="features.sql"
        )


def test_a_lag_of_the_target_is_known() -> None:
    features = {
        "lags": [{"column": "sales", "periods": [1]}],
        "rolling": [{"column": "sales", "window": "7 days"}],
        "derived": {"x": "sales_lag_1 / sales_mean_7_days"},
    }
    check_features(small_spec(features=features), SQL, file="features.sql")


@pytest.mark.parametrize(
    "call", ["rand()", "uuid()", "now()", "current_timestamp()", "current_date()"]
)
def test_a_function_that_answers_differently_each_time_is_refused(call: str) -> None:
    with pytest.raises(SpecError, match="another answer each time"):
        check_expression(call, where="features.derived.x")


@pytest.mark.parametrize(
    "call",
    [
        "uniform(1, 2)",
        "randstr(3)",
        "shuffle(array(1, 2))",
        "random()",
        "randn(1)",
        "monotonically_increasing_id()",
        "spark_partition_id()",
        "unix_timestamp()",
        "curdate()",
        "localtimestamp()",
        "date'today'",
        "timestamp ' Now'",
        "CAST('tomorrow' AS date)",
        "aes_encrypt('a', 'b')",
    ],
)
def test_chance_and_the_clock_are_refused(call: str) -> None:
    assert "another answer each time" in refusal(f"SELECT {call} AS x FROM sales")
    assert "another answer each time" in refused_expression(call)


@pytest.mark.parametrize(
    "call",
    [
        "session_user()",
        "session_user",
        "`current_user`",
        "user()",
        "current_catalog()",
        "current_timezone()",
        "version()",
        "input_file_block_start()",
        "ai_query('a')",
        "http_request('a')",
        "from_protobuf(city, 'a', '/etc/passwd')",
        "secret('a', 'b')",
        "_metadata.file_path",
    ],
)
def test_the_session_files_and_services_are_refused(call: str) -> None:
    assert any(
        part in refusal(f"SELECT {call} AS x FROM sales")
        for part in ("reaches outside", "take for a function", "row's file")
    )


def test_an_unknown_function_is_told_with_those_close_to_it_and_how_to_allow_it() -> None:
    message = refusal("SELECT uppr(city) FROM sales")
    assert "features.sql calls 'uppr', which is not one of the" in message
    assert "close to it: upper" in message
    assert message.endswith("allow it in defs.yaml: sql: {functions: [uppr]}")
    assert "calls 'uppr'" in refused_expression("uppr(city)")


def test_a_fleet_can_allow_a_function_but_none_that_does_harm() -> None:
    sql = (
        SQL.replace("promotion", "max(price) AS promotion, Collect_Set(kind) AS kinds")
        + " GROUP BY ALL"
    )
    with pytest.raises(SpecError, match="calls 'collect_set'"):
        check_features(small_spec(), sql, file="features.sql")
    check_features(small_spec(sql={"functions": ["collect_set"]}), sql, file="features.sql")
    check_features(
        small_spec(sql={"functions": ["theirs"]}, features={"derived": {"x": "theirs(price)"}}),
        SQL,
        file="features.sql",
    )
    for name in ("reflect", "Java_Method", "rand", "ai_gen"):
        with pytest.raises(SpecError, match=f"sql.functions calls {name.lower()}, which"):
            check_features(small_spec(sql={"functions": [name]}), SQL, file="features.sql")


def test_allowing_a_function_trains_nothing_again() -> None:
    assert (
        small_spec(sql={"functions": ["collect_set"]}).training_digest
        == small_spec().training_digest
    )


def test_no_function_is_both_allowed_and_harmful() -> None:
    harmful = functions.REACHING | functions.CHANGING
    assert not harmful & (functions.ALLOWED | functions.UNORDERED_AGGREGATES)
    for name in functions.ALLOWED:
        functions.refuse_harmful(name, "here")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM sales TABLESAMPLE (10 PERCENT)",
        "SELECT * FROM sales VERSION AS OF 1",
        "SELECT /*+ BROADCAST(sales) */ city FROM sales",
        "SELECT ? FROM sales",
        "SELECT :x FROM sales",
        "SELECT X'41' FROM sales",
        "SELECT city FROM sales DISTRIBUTE BY city",
        "SELECT sum(price) OVER w FROM sales WINDOW w AS (PARTITION BY city)",
        "WITH RECURSIVE a AS (SELECT 1) SELECT * FROM a",
        "SELECT '${env:HOME}' FROM sales",
        "SELECT upper('$\\u007benv:HOME}') FROM sales",
    ],
)
def test_syntax_that_is_not_allowed_is_refused(text: str) -> None:
    assert any(part in refusal(text) for part in ("not allowed", "puts in settings"))


def test_a_common_table_expression_is_read_only_where_it_is_visible() -> None:
    parse_select(
        (
            "WITH a AS (SELECT 1 AS x), b AS (SELECT * FROM a) SELECT * FROM b WHERE x "
            "IN (SELECT x FROM a)"
        ),
        ["sales"],
        file="features.sql",
    )
    for text in (
        "WITH a AS (SELECT * FROM b), b AS (SELECT 1) SELECT * FROM a",
        "SELECT * FROM (WITH b AS (SELECT 1 AS x) SELECT * FROM b) AS t JOIN b",
        "WITH b AS (SELECT * FROM b) SELECT * FROM b",
    ):
        assert "features.sql reads 'b'" in refusal(text)


def test_a_first_row_needs_an_order() -> None:
    assert "without an order" in refusal("SELECT city, first(price) FROM sales GROUP BY city")
    assert "without an order" in refusal("SELECT last(price) OVER (PARTITION BY city) FROM sales")
    parse_select(
        "SELECT first(price) IGNORE NULLS OVER (PARTITION BY city ORDER BY day) FROM sales",
        ["sales"],
        file="features.sql",
    )


@pytest.mark.parametrize("text", ["explode(array(1, 2))", "stack(2, 1, 2)"])
def test_a_derived_column_makes_no_rows(text: str) -> None:
    assert "makes several rows of one" in refused_expression(text)


def test_a_lambda_cannot_borrow_the_name_of_a_column_that_is_not_known() -> None:
    for name, refused in (("x", False), ("sales", True), ("known_at", True)):
        spec = small_spec(
            features={"derived": {"y": f"aggregate(array(price), 0D, (a, {name}) -> a + {name})"}}
        )
        if refused:
            with pytest.raises(
                SpecError, match=f"'{name}' is the name of a column that is not known"
            ):
                check_features(spec, SQL, file="features.sql")
        else:
            check_features(spec, SQL, file="features.sql")


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("SELECT city -- a /* b\nFROM sales /* c */ -- d", "SELECT city FROM sales"),
        ("SELECT Pmod(price, 7), LN(price), substr(city, 2), array(1)[0] FROM sales", None),
        (
            "SELECT 'it''s', \"a'b\", 'c\\\\' FROM sales",
            "SELECT 'it\\'s', 'a\\'b', 'c\\\\' FROM sales",
        ),
        ("SELECT x FROM sales LATERAL VIEW explode(array(1)) `t AS y --` AS x", None),
        (
            (
                "SELECT timestampadd(MINUTE, 1, day), datediff(day, day, day), day << 1, "
                "DATE '2024-01-31', 'a' 'b' FROM sales"
            ),
            None,
        ),
        (
            "SELECT city FROM sales QUALIFY row_number() OVER (PARTITION BY city ORDER BY day) = 1",
            None,
        ),
    ],
)
def test_what_runs_is_what_was_written_without_its_comments(
    text: str, rendered: str | None
) -> None:
    query = parse_select(text, ["sales"], file="features.sql")
    assert render(query).replace("ARRAY", "array") == (rendered or text)
