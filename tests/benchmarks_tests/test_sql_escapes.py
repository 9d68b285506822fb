"""The short form of the figure `sql-escapes`, and whether its judge can say no."""

from pyspark.sql import SparkSession

from benchmarks.sql_escapes import beyond_text, tally
from pipeline.testing.sql_escapes import ESCAPES, generate


def test_no_escape_made_by_hand_is_accepted_with_more_than_was_checked(spark: SparkSession) -> None:
    counts = tally(spark, [(escape.kind, escape.text) for escape in ESCAPES])
    # Those that hide their payload from both parsers are harmless and run without it.
    assert counts == {"refused": 56, "accepted": 4}
    assert len({escape.name for escape in ESCAPES}) == len(ESCAPES) == 60


def test_no_generated_statement_is_accepted_with_more_than_was_checked(spark: SparkSession) -> None:
    counts = tally(
        spark,
        [(kind, generate(seed, kind)) for seed in range(100) for kind in ("select", "derived")],
    )
    assert counts["escaped"] == 0
    assert counts["accepted"] > 40
    assert counts["refused"] > 40


def test_the_judge_finds_what_a_plan_has_beyond_the_words_of_a_text(spark: SparkSession) -> None:
    def found(text: str, rendered: str) -> set[str]:
        return set(beyond_text(spark, "select", text, rendered))

    continued = "SELECT city FROM sales -- \\\nWHERE price > 1\nUNION ALL SELECT TRANSFORM(city) USING 'cat' FROM sales"
    assert found("SELECT city FROM sales", "SELECT city FROM sales") == set()
    assert "ScriptTransformation" in found(continued, "SELECT city FROM sales")
    assert "function rand" in found("SELECT rand() FROM sales", "SELECT city FROM sales")
    assert "relation secret" in found(
        "WITH a AS (SELECT * FROM secret) SELECT * FROM a", "WITH a AS (SELECT 1) SELECT * FROM a"
    )
    assert "relation secret" in found(
        "SELECT city FROM sales WHERE EXISTS (SELECT 1 FROM secret)", "SELECT city FROM sales"
    )
    assert "column price" in found(
        "SELECT city FROM sales WHERE price > 1", "SELECT city FROM sales"
    )
    assert "the target" in set(beyond_text(spark, "derived", "price + target", "price + target"))
