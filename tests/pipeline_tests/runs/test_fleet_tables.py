from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import StoreError
from pipeline.tables import LEDGER
from pipeline.testing.doubles import MemoryTables
from pipeline.testing.runs import own_tables


def test_a_ledger_of_an_earlier_format_is_refused_with_the_next_step() -> None:
    tables: Any = MemoryTables()
    schema = pa.schema(
        [
            pa.field("interval", pa.float64()) if field.name == "intervals" else field
            for field in LEDGER.schema
        ]
    )
    location = tables.location("shop", LEDGER.name)
    row = pa.Table.from_pylist([{"run_id": "run-1", "interval": 1.0}], schema=schema)
    tables.commit(location, [tables.write_file(row, schema, location)], schema, mode="append")
    with pytest.raises(
        StoreError,
        match="has no column intervals, expected format 3 of the table 'ledger'; move it away",
    ):
        own_tables(tables, "shop").ledger("run-1")
