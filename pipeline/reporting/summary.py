"""The short table after a run, from the ledger."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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


NUMBER_MEASURES = ("rmse", "mape")
CLASS_MEASURES = ("log_loss", "accuracy")
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
    if "metrics" not in ledger:
        return ledger, NUMBER_MEASURES
    measures = pd.DataFrame([_json(text).get("fleet", {}) for text in ledger["metrics"]])
    if "log_loss" not in measures:
        return ledger, NUMBER_MEASURES
    names = list(CLASS_MEASURES)
    measured = ledger.copy()
    measured[names] = measures.reindex(columns=names).astype(float).to_numpy()
    return measured, CLASS_MEASURES


def fleet_errors(ledger: pd.DataFrame, spec: FleetSpec) -> Sequence[Error | ClassError]:
    """The fleet beside the pooled model and every baseline, from one run's ledger rows."""
    pooled = ledger[ledger["grain"] == 0].iloc[0]
    is_finest = ledger["grain"] == len(spec.grains) - 1
    finest = ledger[is_finest & (ledger["report_rows"].fillna(0) > 0)]
    n_rows = 0
    if pd.notna(pooled["report_rows"]):
        n_rows = int(pooled["report_rows"])
    if spec.is_class_task:
        return _class_errors(pooled, finest, n_rows, spec)
    return _number_errors(pooled, finest, n_rows, spec)


def _number_errors(
    pooled: "pd.Series[Any]", finest: pd.DataFrame, n_rows: int, spec: FleetSpec
) -> list[Error]:
    n_groups = len(finest)
    fleet = Error(
        name="fleet",
        rmse=_value(pooled["rmse"]),
        mape=_mean(finest["mape"]),
        n_rows=n_rows,
        groups_won=None,
        n_groups=n_groups,
    )
    pooled_model = Error(
        name="pooled model",
        rmse=_value(pooled["pooled_rmse"]),
        mape=_mean(finest["pooled_mape"]),
        n_rows=n_rows,
        groups_won=int((finest["mape"] < finest["pooled_mape"]).sum()),
        n_groups=n_groups,
    )
    errors = [fleet, pooled_model]
    overall = _json(pooled["baselines"])
    by_group = list(map(_json, finest["baselines"]))
    for name in spec.all_baselines:
        errors.append(_baseline_error(name, overall.get(name, {}), by_group))
    return errors


def _baseline_error(
    name: str, overall: Mapping[str, Any], by_group: Sequence[Mapping[str, Any]]
) -> Error:
    """A baseline's errors, beside the fleet's in the groups where the baseline has a MAPE.

    Args:
        name: of the baseline.
        overall: its measures over all groups.
        by_group: measures by baseline, one mapping per finest group.
    """
    pairs = []
    for baselines in by_group:
        measures = baselines.get(name, {})
        if measures.get("mape") is not None:
            pairs.append((measures["fleet_mape"], measures["mape"]))
    compared = pd.DataFrame(pairs, columns=["fleet", "baseline"], dtype=float)
    return Error(
        name=name,
        rmse=overall.get("rmse"),
        mape=_mean(compared["baseline"]),
        n_rows=overall.get("n") or 0,
        groups_won=int((compared["fleet"] < compared["baseline"]).sum()),
        n_groups=len(compared),
    )


def _class_errors(
    pooled: "pd.Series[Any]", finest: pd.DataFrame, n_rows: int, spec: FleetSpec
) -> list[ClassError]:
    overall = _json(pooled["metrics"])
    baselines = _json(pooled["baselines"])
    metrics_by_group = list(map(_json, finest["metrics"]))
    baselines_by_group = list(map(_json, finest["baselines"]))
    ways = {"fleet": "fleet", "pooled model": "pooled", "constant": "constant"}
    ways |= dict(zip(spec.baselines, spec.baselines, strict=True))
    errors = []
    for name, way in ways.items():
        losses = _class_losses(way, metrics_by_group, baselines_by_group)
        groups_won = None
        if way != "fleet":
            groups_won = int((losses["fleet"] < losses["way"]).sum())
        n_answered = n_rows
        if way in spec.baselines:
            n_answered = baselines.get(way, {}).get("n") or 0
        measures = overall.get(way, {})
        error = ClassError(
            name=name,
            log_loss=measures.get("log_loss"),
            accuracy=measures.get("accuracy"),
            n_rows=n_answered,
            groups_won=groups_won,
            n_groups=len(losses),
        )
        errors.append(error)
    return errors


def _class_losses(
    way: str,
    metrics_by_group: Sequence[Mapping[str, Any]],
    baselines_by_group: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    """Log losses of the fleet and of another way to answer, for each group that has both.

    A baseline may answer fewer rows: the fleet is then judged on those.
    """
    pairs = []
    for metrics, baselines in zip(metrics_by_group, baselines_by_group, strict=True):
        loss = metrics.get(way, {}).get("log_loss")
        if loss is None:
            continue
        if way in baselines:
            fleet_loss = baselines[way]["fleet_log_loss"]
        else:
            fleet_loss = metrics["fleet"]["log_loss"]
        pairs.append((fleet_loss, loss))
    return pd.DataFrame(pairs, columns=["fleet", "way"], dtype=float)


def _json(text: object) -> dict[str, Any]:
    if not isinstance(text, str):
        return {}
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _mean(values: "pd.Series[Any]") -> float | None:
    if values.empty:
        return None
    return _value(values.mean())


def _value(value: Any) -> float | None:
    if value is None or not np.isfinite(value):
        return None
    return float(value)


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
    worthwhile: pd.DataFrame = ordered.head(n)[
        ["grain_name", "group_id", "weight", "error_saved_percent", "n_rows", "seconds"]
    ]
    return worthwhile


def describe_outcomes(ledger: pd.DataFrame, max_rounds: int) -> str:
    """What became of the groups, in a line; and how many models had to stop growing.

    Args:
        ledger: of a run.
        max_rounds: the fleet's `tuning.max_rounds`.
    """
    counts = ledger["status"].value_counts()
    statuses = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    text = f"{len(ledger):,} groups: {statuses}"
    n_stopped = int((ledger["n_rounds"] >= max_rounds).sum())
    if n_stopped:
        text += (
            f"; {n_stopped:,} reached tuning.max_rounds ({max_rounds:,}) and might gain from more"
        )
    return text


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
        n: features returned at most.

    Returns:
        Columns feature, mean_share_percent, first_in (groups in which no feature gains more),
        groups (that have a model), and pooled_share_percent (null without a pooled model). Of equal
        shares the pooled model's decide, then the name.
    """
    finest = importance[importance["grain"] == importance["grain"].max()]
    by_feature = finest.groupby("feature", observed=True)
    is_first = finest["rank"] == 1
    pooled = importance[importance["grain"] == 0].astype({"feature": object})
    features = pd.DataFrame(
        {
            "mean_share_percent": 100 * by_feature["gain_share"].mean(),
            "first_in": is_first.groupby(finest["feature"], observed=True).sum().astype("int64"),
            "groups": by_feature.size(),
        }
    )
    features = features.rename_axis("feature").reset_index().astype({"feature": object})
    pooled_shares = pooled.set_index("feature")["gain_share"]
    features["pooled_share_percent"] = 100 * features["feature"].map(pooled_shares)
    top: pd.DataFrame = features.sort_values(
        ["mean_share_percent", "pooled_share_percent", "feature"],
        ascending=[False, False, True],
        ignore_index=True,
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
        spec: the fleet, whose task decides which measures are listed.
        facts: further lines, text by title.
        beside: ledgers of other runs by title; their errors follow those of this run.
    """
    counts = status_counts(ledger).astype(str).to_numpy().tolist()
    parts = [
        f"fleet {spec.name}: {len(ledger):,} groups",
        text_table(["grain", "status", "reason", "groups"], counts),
        errors_table(ledger, spec, "on report rows"),
    ]
    for title, rows in (beside or {}).items():
        parts.append(errors_table(rows, spec, title))
    worst = _rows(
        worst_groups(ledger), ["group_id", "status", "n_rows", "weight", *_measures(spec)]
    )
    slowest = _rows(
        slowest_groups(ledger), ["group_id", "n_rows", "n_trials", "n_rounds", "seconds"]
    )
    parts += [
        text_table(["worst groups", "status", "rows", "weight", *_measure_titles(spec)], worst),
        text_table(["slowest groups", "rows", "trials", "rounds", "seconds"], slowest),
        "\n".join(f"{title:<12} {text}" for title, text in facts.items()),
    ]
    return "\n\n".join(filter(None, parts))


def errors_table(ledger: pd.DataFrame, spec: FleetSpec, title: str) -> str:
    """The errors of a run and its rivals on report rows, as text.

    The title heads the first column.
    """
    lines = []
    for error in fleet_errors(ledger, spec):
        won = ""
        if error.groups_won is not None:
            won = f"{error.groups_won} of {error.n_groups} groups"
        measures = [_measure(value, spec) for value in shown_measures(error).values()]
        lines.append([error.name, *measures, f"{error.n_rows:,}", won])
    return text_table([title, *_measure_titles(spec), "rows", "fleet better in"], lines)


def _measures(spec: FleetSpec) -> tuple[str, str]:
    """Names of the two measures, as in `shown_measures`."""
    if spec.is_class_task:
        return CLASS_MEASURES
    return NUMBER_MEASURES


def _measure_titles(spec: FleetSpec) -> list[str]:
    return [TITLES[name] for name in _measures(spec)]


def _rows(frame: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    rows = frame.reindex(columns=list(columns)).to_numpy(dtype=object)
    return [list(map(_text, row)) for row in rows]


def _text(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    return str(value)


def _measure(value: float | None, spec: FleetSpec) -> str:
    """Log losses and accuracies differ in the third digit."""
    if spec.is_class_task and value is not None and np.isfinite(value):
        return f"{value:.4f}"
    return _number(value)


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "-"
    is_whole = float(value).is_integer() and abs(value) >= 1
    if is_whole or abs(value) >= WITHOUT_DECIMALS:
        return f"{value:,.0f}"
    return f"{value:.2f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: text to the left, numbers to the right."""
    if not rows:
        return ""
    columns = map(_aligned, zip(header, *rows, strict=True))
    lines = map("  ".join, zip(*columns, strict=True))
    return "\n".join(map(str.rstrip, lines))


def _aligned(column: Sequence[str]) -> list[str]:
    """A title and the cells below it, all of one width."""
    texts = list(map(str, column))
    width = max(map(len, texts))
    if all(map(_is_number, texts[1:])):
        return [text.rjust(width) for text in texts]
    return [text.ljust(width) for text in texts]


def markdown_table(frame: pd.DataFrame) -> str:
    """A data frame as Markdown; cells cannot break out of the table or become markup."""
    rule = "|" + " --- |" * len(frame.columns)
    rows = map(_markdown_row, frame.to_numpy(dtype=object))
    return "\n".join([_markdown_row(frame.columns), rule, *rows])


def _markdown_row(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(_cell, values))} |"


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
    text = " ".join(_text(value).splitlines())
    return _EMPHASIS.sub("&#95;", text.translate(_ENTITIES))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").isdigit() or text in ("", "-")
