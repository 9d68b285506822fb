"""The short table after a run, from the ledger."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.spec import FleetSpec

WORST = 5
WITHOUT_DECIMALS = 10_000


@dataclass(frozen=True)
class Error:
    """Errors of one way to answer, on report rows.

    Args:
        name: `fleet`, `pooled model`, or a baseline's name.
        rmse: over all rows it answered, target units.
        mape: mean over finest groups of their MAPE, percent.
        n_rows: report rows it answered.
        groups_won: finest groups where the fleet's MAPE is lower on the same rows; null for the fleet itself.
        n_groups: finest groups compared.
    """

    name: str
    rmse: float | None
    mape: float | None
    n_rows: int
    groups_won: int | None
    n_groups: int


def fleet_errors(ledger: pd.DataFrame, spec: FleetSpec) -> list[Error]:
    """The fleet beside the pooled model and every baseline.

    Args:
        ledger: one run's rows.
        spec: the fleet.
    """
    pooled = ledger[ledger["grain"] == 0].iloc[0]
    finest = ledger[(ledger["grain"] == len(spec.grains) - 1) & (ledger["report_rows"].fillna(0) > 0)]
    n_rows = 0 if pd.isna(pooled["report_rows"]) else int(pooled["report_rows"])
    won = int((finest["mape"] < finest["pooled_mape"]).sum())
    errors = [
        Error("fleet", _value(pooled["rmse"]), _mean(finest["mape"]), n_rows, None, len(finest)),
        Error("pooled model", _value(pooled["pooled_rmse"]), _mean(finest["pooled_mape"]), n_rows, won, len(finest)),
    ]
    overall = _baselines(pooled)
    per_group = [_baselines(row) for _, row in finest.iterrows()]
    for name in spec.baselines:
        pairs = [(group[name]["fleet_mape"], group[name]["mape"]) for group in per_group if name in group and group[name]["mape"] is not None]
        errors.append(
            Error(
                name,
                overall.get(name, {}).get("rmse"),
                _mean(pd.Series([theirs for _, theirs in pairs], dtype=float)),
                overall.get(name, {}).get("n") or 0,
                sum(ours < theirs for ours, theirs in pairs),
                len(pairs),
            )
        )
    return errors


def _baselines(row: "pd.Series[Any]") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["baselines"]) if isinstance(row["baselines"], str) else {}
    return found


def _mean(values: "pd.Series[Any]") -> float | None:
    return _value(values.mean()) if len(values) else None


def _value(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def status_counts(ledger: pd.DataFrame) -> pd.DataFrame:
    """Groups by grain, status and reason: columns grain, status, reason, groups."""
    counted = ledger.assign(reason=ledger["reason"].fillna("")).groupby(["grain_name", "status", "reason"], sort=True)
    return counted.size().rename("groups").reset_index().rename(columns={"grain_name": "grain"})


def worst_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Finest groups with the largest RMSE on report rows; failed groups first."""
    finest = ledger[ledger["grain"] == ledger["grain"].max()]
    ordered = finest.assign(_failed=finest["status"].eq("failed")).sort_values(["_failed", "rmse", "group_id"], ascending=[False, False, True])
    worst: pd.DataFrame = ordered.head(n)[["group_id", "status", "reason", "n_rows", "weight", "rmse", "mape"]]
    return worst


def worthwhile_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Groups below the pooled one whose own model takes most off their parent's squared error on report rows, and what each costs."""
    below = ledger[(ledger["grain"] > 0) & ledger["report_parent"].notna() & ledger["report_blend"].notna() & ledger["booster_id"].notna()]
    gain = (1 - below["report_blend"] / below["report_parent"]) * 100
    saved = below["n_report"].fillna(0) * (below["report_parent"] ** 2 - below["report_blend"] ** 2)
    ordered = below.assign(error_saved_percent=gain, _saved=saved).sort_values(["_saved", "group_id"], ascending=[False, True])
    found: pd.DataFrame = ordered.head(n)[["grain_name", "group_id", "weight", "error_saved_percent", "n_rows", "seconds"]]
    return found


def slowest_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Groups that took longest to train."""
    trained = ledger[ledger["seconds"].notna()].sort_values(["seconds", "group_id"], ascending=[False, True])
    return trained.head(n)[["group_id", "status", "n_rows", "n_trials", "n_rounds", "seconds"]]


def summarise(ledger: pd.DataFrame, spec: FleetSpec, facts: Mapping[str, str]) -> str:
    """What a person sees at the end of a run, as plain text.

    Args:
        ledger: one run's rows.
        spec: the fleet.
        facts: further lines: title and text.
    """
    errors = fleet_errors(ledger, spec)
    unit = "RMSE"
    header = ["on report rows", unit, "MAPE %", "rows", "fleet better in"]
    lines = [
        [e.name, _number(e.rmse), _number(e.mape), f"{e.n_rows:,}", "" if e.groups_won is None else f"{e.groups_won} of {e.n_groups} groups"]
        for e in errors
    ]
    parts = [
        f"fleet {spec.name}: {len(ledger):,} groups",
        text_table(["grain", "status", "reason", "groups"], status_counts(ledger).astype(str).to_numpy().tolist()),
        text_table(header, lines),
        text_table(
            ["worst groups", "status", "rows", "weight", unit, "MAPE %"],
            _rows(worst_groups(ledger), ["group_id", "status", "n_rows", "weight", "rmse", "mape"]),
        ),
        text_table(
            ["slowest groups", "rows", "trials", "rounds", "seconds"],
            _rows(slowest_groups(ledger), ["group_id", "n_rows", "n_trials", "n_rounds", "seconds"]),
        ),
        "\n".join(f"{title:<12} {text}" for title, text in facts.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _rows(frame: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    return [[_number(value) if isinstance(value, float) else str(value) for value in row] for row in frame[list(columns)].to_numpy(dtype=object)]


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= WITHOUT_DECIMALS else f"{value:.2f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: the first to the left, numbers to the right."""
    if not rows:
        return ""
    widths = [max(len(str(line[column])) for line in [header, *rows]) for column in range(len(header))]
    right = [all(_is_number(str(row[column])) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            str(cell).rjust(width) if to_right else str(cell).ljust(width) for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [header, *rows]
    )


def markdown_table(frame: pd.DataFrame) -> str:
    """A data frame as Markdown; cells cannot break out of the table or become markup."""
    head = "| " + " | ".join(_cell(name) for name in frame.columns) + " |\n|" + " --- |" * len(frame.columns)
    body = ("| " + " | ".join(_cell(value) for value in row) + " |" for row in frame.to_numpy(dtype=object))
    return "\n".join([head, *body])


_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "|`[]*~\\"} | {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
# Within a word an underscore is no markup, and too_few_rows stays readable.
_EMPHASIS = re.compile(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    text = _number(value) if isinstance(value, float) else str(value)
    return _EMPHASIS.sub("&#95;", " ".join(text.splitlines()).translate(_ENTITIES))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").isdigit() or text in ("", "-")
