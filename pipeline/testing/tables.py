"""Rows of tests in tables."""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from pipeline.storage import Mode, Tables


def write_arrow(
    tables: Tables,
    parts: Iterable[pa.Table],
    schema: pa.Schema,
    location: str,
    *,
    mode: Mode,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write rows, each part as one file, and make one commit; returns the version."""
    files = []
    for part in parts:
        file = tables.write_file(part, schema, location)
        if file is not None:
            files.append(file)
    return tables.commit(location, files, schema, mode=mode, metadata=metadata)
