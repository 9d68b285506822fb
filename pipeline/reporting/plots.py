"""Plots as PNG bytes: for Dagster's metadata and MLflow's artifacts."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.reporting.summary import (
    TITLES,
    fleet_errors,
    shown_measures,
    status_counts,
    with_measures,
)
from pipeline.spec import BINARY, MULTICLASS, FleetSpec

MOST_CLASSES = 20
BLUE, LIGHT_BLUE, GREY, ORANGE = "#2f6690", "#9dbcd4", "#b8b8b8", "#d97b29"
_STATUS_COLOURS = {
    "trained": BLUE,
    "refreshed": BLUE,
    "reused": LIGHT_BLUE,
    "failed": ORANGE,
    "crashed": ORANGE,
}
_MOVES = {False: "stays", True: "moved"}
_MOVE_COLOURS = {False: GREY, True: BLUE}


def training_plot(ledger: pd.DataFrame, spec: FleetSpec) -> bytes:
    """Three panels: groups by status, error against rows, and the fleet beside its rivals."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_status, by_rows, rivals = figure.subplots(1, 3)
    _draw_statuses(by_status, ledger)
    _draw_error_by_rows(by_rows, ledger)
    _draw_rivals(rivals, ledger, spec)
    figure.suptitle(f"{spec.name}: {len(ledger):,} groups")
    return _png(figure)


def decision_plot(decisions: pd.DataFrame, spec: FleetSpec) -> bytes:
    """Two panels: groups by reason, and the tested groups' losses under champion and challenger.

    The rows of `tables.DECISIONS` that a rollback writes have no losses.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_reason, losses = figure.subplots(1, 2)
    _draw_reasons(by_reason, decisions)
    if "p_value" in decisions:
        _draw_losses(losses, decisions[decisions["p_value"].notna()])
    losses.set_xlabel("loss of the champion's twin on report rows")
    losses.set_ylabel("loss of the challenger's")
    figure.suptitle(f"{spec.name}: {len(decisions):,} decisions")
    return _png(figure)


def _draw_reasons(axes: "mpl.axes.Axes", decisions: pd.DataFrame) -> None:
    counts = decisions.groupby(["moved", "reason"]).size().sort_values()
    titles = [f"{_MOVES[moved]}: {reason}" for moved, reason in counts.index]
    colours = counts.index.get_level_values("moved").map(_MOVE_COLOURS)
    bars = axes.barh(titles, counts.to_numpy(), color=list(colours))
    axes.bar_label(bars, padding=3)
    axes.margins(x=0.15)
    axes.set_xlabel("groups")


def _draw_losses(axes: "mpl.axes.Axes", tested: pd.DataFrame) -> None:
    for moved, title in _MOVES.items():
        part = tested[tested["moved"] == moved]
        axes.scatter(
            part["loss_champion"].to_numpy(dtype=float),
            part["loss_challenger"].to_numpy(dtype=float),
            s=14,
            color=_MOVE_COLOURS[moved],
            label=title,
        )
    if len(tested):
        lowest = tested[["loss_champion", "loss_challenger"]].to_numpy(dtype=float).min()
        axes.axline((lowest, lowest), slope=1, color=ORANGE, linewidth=1)
        axes.legend()


def _draw_statuses(axes: "mpl.axes.Axes", ledger: pd.DataFrame) -> None:
    counts = status_counts(ledger)
    reasons = " (" + counts["reason"] + ")"
    titles = counts["grain"] + " " + counts["status"] + reasons.where(counts["reason"] != "", "")
    colours = counts["status"].map(_STATUS_COLOURS).fillna(GREY)
    bars = axes.barh(list(titles), counts["groups"], color=list(colours))
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("groups")


def _draw_error_by_rows(axes: "mpl.axes.Axes", ledger: pd.DataFrame) -> None:
    measured, (name, _) = with_measures(ledger)
    finest = measured[
        (measured["grain"] == measured["grain"].max())
        & measured[name].notna()
        & (measured[name] > 0)
    ]
    weights = finest["weight"].fillna(0.0).to_numpy(dtype=float)
    points = axes.scatter(
        finest["n_target"].to_numpy(dtype=float),
        finest[name].to_numpy(dtype=float),
        c=weights,
        cmap="viridis",
        vmin=0,
        vmax=1,
        s=18,
    )
    if len(finest):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.figure.colorbar(points, ax=axes, label="weight of the own model")
    axes.set_xlabel("rows with a target, per finest group")
    axes.set_ylabel(f"{TITLES[name]} on report rows")


def _draw_rivals(axes: "mpl.axes.Axes", ledger: pd.DataFrame, spec: FleetSpec) -> None:
    errors = fleet_errors(ledger, spec)
    name = next(iter(shown_measures(errors[0])))
    values = {}
    for error in errors:
        value = shown_measures(error)[name]
        if value is not None:
            values[error.name] = value
    colours = [BLUE] + [GREY] * (len(values) - 1)
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, padding=3, fmt="%.4g")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    label = f"{TITLES[name]} on report rows"
    if not spec.is_class_task:
        label += ", target units"
    axes.set_xlabel(label)


def plan_plot(ledger: pd.DataFrame) -> bytes:
    """Predicted against real seconds, one point per trained group."""
    trained = ledger[ledger["seconds"].gt(0) & ledger["planned_seconds"].gt(0)]
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(trained["planned_seconds"], trained["seconds"], s=14, color=BLUE)
    if len(trained):
        ends = [
            min(trained["planned_seconds"].min(), trained["seconds"].min()),
            max(trained["planned_seconds"].max(), trained["seconds"].max()),
        ]
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("planned seconds per group")
    axes.set_ylabel("real seconds")
    return _png(figure)


def prediction_plot(
    predictions: Sequence[float] | Sequence[str], answered_by: Mapping[str, int], spec: FleetSpec
) -> bytes:
    """Distribution of the answers, and who gave them.

    Args:
        predictions: answers, or a sample of them: in the target's units, probabilities of the
            positive class, or classes.
        answered_by: rows per grain that answered.
        spec: the fleet, whose task decides how the answers are drawn.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, who = figure.subplots(1, 2)
    if spec.task == MULTICLASS:
        counts = pd.Series(list(predictions), dtype=object).value_counts().head(MOST_CLASSES)
        values.bar(list(map(str, counts.index)), counts.to_numpy(), color=BLUE)
        values.tick_params(axis="x", rotation=45)
    else:
        numbers = np.array(predictions, dtype=float)
        values.hist(numbers[np.isfinite(numbers)], bins=40, color=BLUE)
    answer = spec.target.column
    if spec.task == BINARY:
        answer = f"probability of {answer}"
    values.set_xlabel(f"predicted {answer}")
    values.set_ylabel("rows")
    who.bar_label(who.barh(list(answered_by), list(answered_by.values()), color=BLUE), padding=3)
    who.margins(x=0.15)
    who.set_xlabel("rows answered by")
    return _png(figure)


def importance_plot(top: pd.DataFrame, spec: FleetSpec) -> bytes:
    """Features by their mean share of the gain, and by the number of groups they lead.

    Their rows are those of `summary.top_features`.
    """
    figure = Figure(figsize=(10, 1.4 + 0.28 * len(top)), layout="constrained")
    shares, firsts = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(top))
    shares.barh(
        places - 0.2,
        top["mean_share_percent"].to_numpy(dtype=float),
        height=0.4,
        color=BLUE,
        label="own models, mean",
    )
    shares.barh(
        places + 0.2,
        top["pooled_share_percent"].to_numpy(dtype=float),
        height=0.4,
        color=GREY,
        label="pooled model",
    )
    shares.set_yticks(places, list(top["feature"]))
    shares.set_xlabel("share of the gain, %")
    shares.legend(loc="lower right")
    firsts.bar_label(
        firsts.barh(places, top["first_in"].to_numpy(dtype=float), color=BLUE), padding=3
    )
    firsts.margins(x=0.15)
    firsts.set_xlabel("groups in which it comes first")
    shares.invert_yaxis()
    figure.suptitle(f"{spec.name}: what the models split by")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=90)
    return sink.getvalue()
