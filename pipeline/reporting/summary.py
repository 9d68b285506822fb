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
        groups_won: finest groups where the fleet's MAPE is lower on the same rows; null for the
            fleet itself.
        n_groups: finest groups compared.
    """

    name: str
    rmse: float | None
    mape: float | None
    n_rows: int
    groups_won: int | None
    n_groups: int


@dataclass(frozen=True)
class ClassError:
    """Errors of one way to answer with classes, on report rows.

    Args:
        name: as in `Error`, or `constant` (each class's share of the fit rows).
        log_loss: mean over all rows it answered.
        accuracy: share of those whose likeliest class was the right one.
        n_rows: report rows it answered.
        groups_won: finest groups where the fleet's log loss is lower on the same rows; null for the
            fleet itself.
        n_groups: finest groups compared.
    """

    name: str
    log_loss: float | None
    accuracy: float | None
    n_rows: int
    groups_won: int | None
    n_groups: int


TITLES = {"rmse": "RMSE", "mape": "MAPE %", "log_loss": "log loss", "accuracy": "accuracy"}


def shown_measures(error: Error | ClassError) -> dict[str, float | None]:
    """The two measures that people compare ways by.

    The first one is lower where the answers are better.
    """
    if isinstance(error, ClassError):
        return {"log_loss": error.log_loss, "accuracy": error.accuracy}
    return {"rmse": error.rmse, "mape": error.mape}


def with_measures(ledger: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, str]]:
    """The ledger with the fleet's two measures as columns, and their names."""
    fleet = (
        [_json(text).get("fleet", {}) for text in ledger["metrics"]] if "metrics" in ledger else []
    )
    if not any("log_loss" in found for found in fleet):
        return ledger, ("rmse", "mape")
    columns = {
        name: pd.array([found.get(name) for found in fleet], dtype="Float64").to_numpy(
            float, na_value=np.nan
        )
        for name in ("log_loss", "accuracy")
    }
    return ledger.assign(**columns), ("log_loss", "accuracy")


def fleet_errors(ledger: pd.DataFrame, spec: FleetSpec) -> Sequence[Error | ClassError]:
    """The fleet beside the pooled model and every baseline.

    Args:
        ledger: one run's rows.
        spec: the fleet.
    """
    pooled = ledger[ledger["grain"] == 0].iloc[0]
    finest = ledger[
        (ledger["grain"] == len(spec.grains) - 1) & (ledger["report_rows"].fillna(0) > 0)
    ]
    n_rows = 0 if pd.isna(pooled["report_rows"]) else int(pooled["report_rows"])
    return (
        _class_errors(pooled, finest, n_rows, spec)
        if spec.is_class_task
        else _number_errors(pooled, finest, n_rows, spec)
    )


def _number_errors(
    pooled: "pd.Series[Any]", finest: pd.DataFrame, n_rows: int, spec: FleetSpec
) -> list[Error]:
    won = int((finest["mape"] < finest["pooled_mape"]).sum())
    errors = [
        Error("fleet", _value(pooled["rmse"]), _mean(finest["mape"]), n_rows, None, len(finest)),
        Error(
            "pooled model",
            _value(pooled["pooled_rmse"]),
            _mean(finest["pooled_mape"]),
            n_rows,
            won,
            len(finest),
        ),
    ]
    overall = _json(pooled["baselines"])
    per_group = [_json(text) for text in finest["baselines"]]
    for name in spec.all_baselines:
        pairs = [
            (group[name]["fleet_mape"], group[name]["mape"])
            for group in per_group
            if name in group and group[name]["mape"] is not None
        ]
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


def _class_errors(
    pooled: "pd.Series[Any]", finest: pd.DataFrame, n_rows: int, spec: FleetSpec
) -> list[ClassError]:
    metrics, baselines = _json(pooled["metrics"]), _json(pooled["baselines"])
    groups = [
        (_json(of_ways), _json(of_baselines))
        for of_ways, of_baselines in zip(finest["metrics"], finest["baselines"], strict=True)
    ]
    errors = []
    for name, way in {
        "fleet": "fleet",
        "pooled model": "pooled",
        "constant": "constant",
        **{title: title for title in spec.baselines},
    }.items():
        found = metrics.get(way, {})
        # A baseline may answer fewer rows: the fleet is then judged on those.
        pairs = [
            (
                of_baselines[way]["fleet_log_loss"]
                if way in of_baselines
                else of_ways["fleet"]["log_loss"],
                of_ways[way]["log_loss"],
            )
            for of_ways, of_baselines in groups
            if of_ways.get(way, {}).get("log_loss") is not None
        ]
        answered = (baselines.get(way, {}).get("n") or 0) if way in spec.baselines else n_rows
        won = None if way == "fleet" else sum(ours < theirs for ours, theirs in pairs)
        errors.append(
            ClassError(
                name, found.get("log_loss"), found.get("accuracy"), answered, won, len(pairs)
            )
        )
    return errors


def _json(text: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text) if isinstance(text, str) else {}
    return found


def _mean(values: "pd.Series[Any]") -> float | None:
    return _value(values.mean()) if len(values) else None


def _value(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def status_counts(ledger: pd.DataFrame) -> pd.DataFrame:
    """Groups by grain, status and reason: columns grain, status, reason, groups."""
    counted = ledger.assign(reason=ledger["reason"].fillna("")).groupby(
        ["grain_name", "status", "reason"], sort=True
    )
    return counted.size().rename("groups").reset_index().rename(columns={"grain_name": "grain"})


def worst_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Finest groups with the largest RMSE (for classes log loss) on report rows.

    Failed groups first.
    """
    measured, names = with_measures(ledger)
    finest = measured[measured["grain"] == measured["grain"].max()]
    ordered = finest.assign(_failed=finest["status"].eq("failed")).sort_values(
        ["_failed", names[0], "group_id"], ascending=[False, False, True]
    )
    worst: pd.DataFrame = ordered.head(n)[
        ["group_id", "status", "reason", "n_rows", "weight", *names]
    ]
    return worst


def worthwhile_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Groups whose own model reduces their parent's error on report rows most, and what each costs.

    The pooled group is left out.
    """
    below = ledger[
        (ledger["grain"] > 0)
        & ledger["report_parent"].notna()
        & ledger["report_blend"].notna()
        & ledger["booster_id"].notna()
    ]
    gain = (1 - below["report_blend"] / below["report_parent"]) * 100
    saved = below["n_report"].fillna(0) * (below["report_parent"] ** 2 - below["report_blend"] ** 2)
    ordered = below.assign(error_saved_percent=gain, _saved=saved).sort_values(
        ["_saved", "group_id"], ascending=[False, True]
    )
    found: pd.DataFrame = ordered.head(n)[
        ["grain_name", "group_id", "weight", "error_saved_percent", "n_rows", "seconds"]
    ]
    return found


def slowest_groups(ledger: pd.DataFrame, n: int = WORST) -> pd.DataFrame:
    """Groups that took longest to train."""
    trained = ledger[ledger["seconds"].notna()].sort_values(
        ["seconds", "group_id"], ascending=[False, True]
    )
    return trained.head(n)[["group_id", "status", "n_rows", "n_trials", "n_rounds", "seconds"]]


def top_features(importance: pd.DataFrame, n: int = 20) -> pd.DataFrame:
    """The fleet's features by their mean share of the gain.

    Over the groups of the finest grain that has models.

    Args:
        importance: one run's rows of `tables.IMPORTANCE`: grain, feature, gain_share, rank.
        n: features wanted.

    Returns:
        Columns feature, mean_share_percent, first_in (groups in which no feature gains more),
        groups (that have a model), and pooled_share_percent (null without a pooled model). Of equal
        shares the pooled model's decide, then the name.
    """
    finest = importance[importance["grain"] == importance["grain"].max()]
    by_feature = finest.groupby("feature", observed=True)
    pooled = (
        importance[importance["grain"] == 0]
        .astype({"feature": object})
        .set_index("feature")["gain_share"]
    )
    found = pd.DataFrame(
        {
            "mean_share_percent": 100 * by_feature["gain_share"].mean(),
            "first_in": (finest["rank"] == 1)
            .groupby(finest["feature"], observed=True)
            .sum()
            .astype("int64"),
            "groups": by_feature.size(),
        }
    )
    found = found.rename_axis("feature").reset_index().astype({"feature": object})
    found["pooled_share_percent"] = 100 * found["feature"].map(pooled)
    shares = ["mean_share_percent", "pooled_share_percent"]
    top: pd.DataFrame = found.sort_values(
        [*shares, "feature"], ascending=[False, False, True], ignore_index=True
    ).head(n)
    return top


def summarise(
    ledger: pd.DataFrame,
    spec: FleetSpec,
    facts: Mapping[str, str],
    beside: Mapping[str, pd.DataFrame] | None = None,
) -> str:
    """What a person sees at the end of a run, as plain text.

    Args:
        ledger: one run's rows.
        spec: the fleet.
        facts: further lines: title and text.
        beside: ledgers of other runs whose errors stand beside, by title.
    """
    names = list(shown_measures(fleet_errors(ledger, spec)[0]))
    titles = [TITLES[name] for name in names]
    others = [errors_table(rows, spec, title) for title, rows in (beside or {}).items()]
    parts = [
        f"fleet {spec.name}: {len(ledger):,} groups",
        text_table(
            ["grain", "status", "reason", "groups"],
            status_counts(ledger).astype(str).to_numpy().tolist(),
        ),
        errors_table(ledger, spec, "on report rows"),
        *others,
        text_table(
            ["worst groups", "status", "rows", "weight", *titles],
            _rows(worst_groups(ledger), ["group_id", "status", "n_rows", "weight", *names]),
        ),
        text_table(
            ["slowest groups", "rows", "trials", "rounds", "seconds"],
            _rows(
                slowest_groups(ledger), ["group_id", "n_rows", "n_trials", "n_rounds", "seconds"]
            ),
        ),
        "\n".join(f"{title:<12} {text}" for title, text in facts.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def errors_table(ledger: pd.DataFrame, spec: FleetSpec, title: str) -> str:
    """The errors of a run and its rivals on report rows, as text.

    Args:
        ledger: the run's rows.
        spec: the fleet.
        title: heads the first column.
    """
    errors = fleet_errors(ledger, spec)
    measures = [TITLES[name] for name in shown_measures(errors[0])]
    lines = []
    for error in errors:
        won = "" if error.groups_won is None else f"{error.groups_won} of {error.n_groups} groups"
        shown = [_measure(value, spec) for value in shown_measures(error).values()]
        lines.append([error.name, *shown, f"{error.n_rows:,}", won])
    return text_table([title, *measures, "rows", "fleet better in"], lines)


def _rows(frame: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    return [
        [_number(value) if isinstance(value, float) else str(value) for value in row]
        for row in frame.reindex(columns=list(columns)).to_numpy(dtype=object)
    ]


def _measure(value: float | None, spec: FleetSpec) -> str:
    """Log losses and accuracies differ in the third digit."""
    return (
        f"{value:.4f}"
        if spec.is_class_task and value is not None and np.isfinite(value)
        else _number(value)
    )


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
    widths = [
        max(len(str(line[column])) for line in [header, *rows]) for column in range(len(header))
    ]
    right = [all(_is_number(str(row[column])) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            str(cell).rjust(width) if to_right else str(cell).ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [header, *rows]
    )


def markdown_table(frame: pd.DataFrame) -> str:
    """A data frame as Markdown; cells cannot break out of the table or become markup."""
    head = (
        "| "
        + " | ".join(_cell(name) for name in frame.columns)
        + " |\n|"
        + " --- |" * len(frame.columns)
    )
    body = (
        "| " + " | ".join(_cell(value) for value in row) + " |"
        for row in frame.to_numpy(dtype=object)
    )
    return "\n".join([head, *body])


_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "|`[]*~\\"} | {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
}
# Within a word an underscore is not markup, and too_few_rows stays readable.
_EMPHASIS = re.compile(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    text = _number(value) if isinstance(value, float) else str(value)
    return _EMPHASIS.sub("&#95;", " ".join(text.splitlines()).translate(_ENTITIES))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").isdigit() or text in ("", "-")
