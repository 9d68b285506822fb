"""Recognising what has not changed: digests of the inputs of raw and feature tables.

A digest is kept in the commit that it describes. If the newest commit has the digest that a new one
would have, the table is left as it is. Where inputs are in doubt there is no digest, and the table
is made again.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pipeline.spec import FleetSpec, SourceSpec

# Keys of a commit's metadata.
DIGEST, RESULTS = "many_models.digest", "many_models.results"
_LIBRARIES = ("pyspark", "pyarrow", "pandas", "numpy", "sqlglot", "deltalake")
# Fields of a spec that change no row of a feature table; all others may.
_NOT_IN_FEATURES = {
    "automation",
    "sources",
    "splits",
    "tuning",
    "pooling",
    "own",
    "pack",
    "owners",
    "description",
}


@cache
def code_digest() -> str:
    """Hash of this library's code and of the versions of the libraries that compute rows.

    Another release may read or compute differently.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {installed_version(library)}\n".encode())
    return digest.hexdigest()


def raw_digest(source: SourceSpec, state: str | None) -> str | None:
    """Digest of a source's raw table; None where the state of its files is in doubt.

    Args:
        source: what was read.
        state: of its files, as from `pipeline.reading.sources.source_state`.
    """
    if state is None:
        return None
    return _digest(source.model_dump(mode="json"), state, code_digest())


def features_digest(
    spec: FleetSpec, sql: str, raw: Mapping[str, str], settings: Mapping[str, str]
) -> str:
    """Digest of the inputs of a fleet's feature table.

    The same inputs give the same rows, because SQL may not call anything that changes by itself.

    Args:
        spec: the fleet.
        sql: text of its SQL file.
        raw: the raw tables' identities, by source.
        settings: of Spark, where they are the user's own.
    """
    return _digest(
        spec.model_dump(mode="json", exclude=_NOT_IN_FEATURES),
        sql,
        dict(raw),
        dict(settings),
        code_digest(),
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str).encode()
    ).hexdigest()
