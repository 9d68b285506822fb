"""What makes a table another table, and what does not."""

from typing import Any

import pytest

from pipeline.recognition import features_digest, raw_digest
from pipeline.spec import FleetSpec, SourceSpec
from pipeline.testing.data import small_spec

SQL = "SELECT * FROM sales"
RAW = {"sales": "a/1"}


def digest(
    spec: FleetSpec | None = None, sql: str = SQL, raw: Any = RAW, settings: Any = None
) -> str | None:
    return features_digest(spec or small_spec(), sql, raw, settings or {})


@pytest.mark.parametrize(
    "changed",
    [
        {"sql": "SELECT  * FROM sales"},
        {"raw": {"sales": "a/2"}},
        {"raw": {"sales": "b/1"}},
        {"settings": {"spark.sql.ansi.enabled": "false"}},
        {"spec": small_spec(horizon="2 days")},
        {"spec": small_spec(name="other")},
        {"spec": small_spec(as_of="2024-01-01")},
    ],
)
def test_what_rows_depend_on_makes_another_feature_table(changed: dict[str, Any]) -> None:
    assert digest() == digest()
    assert digest(**changed) not in (None, digest())


@pytest.mark.parametrize(
    "changed",
    [
        {"tuning": {"max_trials": 3}},
        {"pooling": "none"},
        {"owners": ["team:other"]},
        {"splits": {"report": "20 days", "tune": "20 days"}},
    ],
)
def test_what_only_training_reads_leaves_the_feature_table(changed: dict[str, Any]) -> None:
    assert digest(small_spec(**changed)) == digest()


def test_a_doubtful_source_has_no_digest() -> None:
    source = SourceSpec(name="sales", uri="sales.csv")
    assert raw_digest(source, None) is None
    assert raw_digest(source, "[1]") == raw_digest(source, "[1]")
    others = [
        source.model_copy(update={"null_values": ("-",)}),
        source.model_copy(update={"types": {"a": "string"}}),
    ]
    assert (
        len(
            {
                raw_digest(source, "[1]"),
                raw_digest(source, "[2]"),
                *(raw_digest(other, "[1]") for other in others),
            }
        )
        == 4
    )
