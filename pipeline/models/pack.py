"""Writing the pack of one version; `meta_model.FleetModel` reads it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.models.meta_model import INDEPENDENT, PACK_FORMAT
from pipeline.spec import FleetSpec
from pipeline.tables import BOOSTERS

_CHAINS = pa.schema(
    [("grain", pa.int32()), ("group_id", pa.string()), ("booster_id", pa.string()), ("weight", pa.float64()), ("interval", pa.float64())]
)
# Which run and which wave wrote a booster is no part of what it answers.
_BOOSTER_SCHEMA = pa.schema([field for field in BOOSTERS.schema if field.name not in ("run_id", "wave")])


def model_spec(
    spec: FleetSpec,
    categories: Mapping[str, Sequence[str]],
    classes: Sequence[str] = (),
    prior: Sequence[float] = (),
    own: str = INDEPENDENT,
) -> dict[str, Any]:
    """The part of a spec.json that training, packing and scoring share.

    Args:
        spec: the fleet.
        categories: values per categorical feature, in order.
        classes: of the target, in order; empty for regression.
        prior: each class's share of the fit rows; empty for regression.
        own: `independent`, or `correction` where a group's trees add to its parent's prediction.
    """
    target = spec.target
    needed = [*spec.finest, *spec.feature_columns, *(name for name in (target.offset, target.scale) if name)]
    return {
        "format": PACK_FORMAT,
        "fleet": spec.name,
        "grains": [list(grain) for grain in spec.grains],
        "features": list(spec.feature_columns),
        "categories": {name: list(values) for name, values in categories.items()},
        "required": list(dict.fromkeys(needed)),
        "task": spec.task,
        "own": own,
        "classes": list(classes),
        "prior": list(prior),
        "target": {"column": target.column, "transform": target.transform, "offset": target.offset, "scale": target.scale},
    }


def write_pack(folder: Path, spec: Mapping[str, Any], ledger: pd.DataFrame, boosters: Iterable[Mapping[str, Any]]) -> None:
    """Write a self-contained pack.

    Args:
        folder: empty or absent.
        spec: as from `model_spec`, with fleet_version, constant and constant_without_offset (None for multiclass).
        ledger: the version's ledger rows.
        boosters: rows of the booster store; more than the ledger names do no harm, and are left out.

    Raises:
        StoreError: if a booster that the ledger names is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    chains = ledger.sort_values(["grain", "group_id"])[_CHAINS.names]
    table = pa.Table.from_pandas(chains, schema=_CHAINS, preserve_index=False)
    pq.write_table(table, folder / "chains.parquet", compression="zstd", write_page_checksum=True)
    wanted = set(ledger["booster_id"].dropna())
    # One row group per booster, so that one is read without the others; the text is compressed already.
    settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(folder / "boosters.parquet", _BOOSTER_SCHEMA, **settings) as writer:
        for row in boosters:
            if row["booster_id"] in wanted:
                wanted.remove(row["booster_id"])
                writer.write_table(pa.Table.from_pylist([{name: row[name] for name in _BOOSTER_SCHEMA.names}], schema=_BOOSTER_SCHEMA))
    if wanted:
        raise StoreError(f"booster store lacks {len(wanted)} boosters that the ledger names, e.g. {min(wanted)}; train again")
