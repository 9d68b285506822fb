"""What a fleet's tables and packs contain, without run ids, clocks and durations."""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.models.meta_model import FleetModel

# Sums and logarithms may differ in their last digits on processors with other instructions.
INSTRUCTIONS = ("avx2", "avx512f", "fma")
TOLERANCE = 1e-9
SHOWN_ANSWERS = 12

LEDGER = (
    "status",
    "reason",
    "fingerprint",
    "booster_id",
    "n_trials",
    "n_rounds",
    "weight",
    "intervals",
    "answered_by",
)
ANSWERS = ("row_key", "prediction", "lower", "upper", "probabilities", "answered_by", "booster_id")
DECISIONS = (
    "kind",
    "reason",
    "moved",
    "n_rows",
    "n_blocks",
    "loss_champion",
    "loss_challenger",
    "p_value",
)


def processor() -> str:
    """The architecture, and those of `INSTRUCTIONS` that the processor has."""
    words = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = cpuinfo.read_text().split()
        words += [name for name in INSTRUCTIONS if name in flags]
    return " ".join(words)


def golden_values(tables: Any, namespace: str, run_id: str, model: FleetModel) -> dict[str, Any]:
    """What one launch of a whole chain left.

    Args:
        tables: where the fleet's tables are.
        namespace: of the tables.
        run_id: the launch, which is also the training run.
        model: the version that serves since.
    """

    def rows(name: str, key: str, *by: str) -> pd.DataFrame:
        table = tables.read_pandas(tables.location(namespace, name))
        of_run: pd.DataFrame = table[table[key] == run_id].sort_values(list(by))
        return of_run

    (run,) = rows("runs", "run_id", "run_id").to_dict("records")
    answers = rows("predictions", "fleet_version", "row_key")
    chains = _by_group(_chains(model), ("weight", "intervals", "booster_id"))
    values = {
        "run": {
            "data_digest": run["data_digest"],
            "spec_digest": run["spec_digest"],
            "constants": [_plain(run["constant"]), _plain(run["constant_without_offset"])],
            "model_spec": _digest(run["model_spec"]),
        },
        "groups": _by_group(rows("ledger", "run_id", "grain", "group_id"), LEDGER),
        "chains": {group: _digest(json.dumps(row)) for group, row in chains.items()},
        "answers": _records(answers.head(SHOWN_ANSWERS), ANSWERS),
        "all_answers": [len(answers), _digest(json.dumps(_records(answers, ANSWERS)))],
        "decisions": _by_group(rows("decisions", "decision_id", "grain", "group_id"), DECISIONS),
    }
    # As if read from a file: lists instead of tuples, texts as keys.
    return dict(json.loads(json.dumps(values)))


def _chains(model: FleetModel) -> pd.DataFrame:
    rows = model.chain_rows()
    serving: pd.DataFrame = rows[rows["serves"]]
    return serving


def _by_group(rows: pd.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    groups = rows["grain"].astype(str) + " " + rows["group_id"]
    return dict(zip(groups, _records(rows, columns), strict=True))


def _records(rows: pd.DataFrame, columns: Sequence[str]) -> list[list[Any]]:
    values = rows.reindex(columns=list(columns)).itertuples(index=False)
    return [list(map(_plain, row)) for row in values]


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is missing is None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(values: Any, expected: Any, *, exact: bool, place: str = "") -> Iterator[str]:
    """Where two sets of golden values differ, for people.

    Args:
        values: as they are.
        expected: as they should be.
        exact: whether numbers must be equal to the last bit; else digests of numbers are not
            compared.
        place: where in the values this is.
    """
    if isinstance(expected, Mapping) and isinstance(values, Mapping):
        for name in sorted({*expected, *values}):
            if name not in expected or name not in values:
                yield f"{place}/{name}: {'new' if name in values else 'gone'}"
            elif exact or name not in ("chains", "all_answers"):
                yield from differences(
                    values[name], expected[name], exact=exact, place=f"{place}/{name}"
                )
    elif isinstance(expected, list) and isinstance(values, list) and len(expected) == len(values):
        for number, (one, other) in enumerate(zip(values, expected, strict=True)):
            yield from differences(one, other, exact=exact, place=f"{place}[{number}]")
    elif isinstance(expected, float) and isinstance(values, float) and not exact:
        if abs(values - expected) > TOLERANCE * max(abs(values), abs(expected)):
            yield f"{place}: {values!r}, expected {expected!r}"
    elif values != expected:
        yield f"{place}: {values!r}, expected {expected!r}"
