"""An arena of blending rules: each is replayed on held-out predictions, and judged on later rows.

    python -m benchmarks.blending [--panels FOLDER] [NAME ...]

trains the fleets of the suite once (about five minutes on two cores), replays every rule in a
second or two, and prints the error of each beside the pooled model's. Beside that it says which
rule would be chosen leaving each fleet out in turn, so that no fleet helps to choose its own.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.held_out import LATER, HeldOut, collect
from benchmarks.panels import suite
from benchmarks.runs import Runs
from pipeline.testing.blending import blend, learn_weights_in_pandas, own_losses
from pipeline.training.blend import WEIGHTS
from pipeline.training.splits import EARLIER

Floats = npt.NDArray[np.float64]
Weights = Sequence[Mapping[str, float]]
Rule = Callable[[HeldOut], Weights]

# A rule is safe that does no worse than this much of the pooled model's error.
SAFE = 1.01
POOLED, OWN, SERVED, HINDSIGHT = "pooled", "own", "served", "hindsight"


def learnt(held_out: HeldOut) -> Weights:
    """What the product serves."""
    constant = np.full(len(held_out.rows), held_out.constant)
    return learn_weights_in_pandas(held_out.rows, held_out.spec, held_out.has_model, constant)


def learnt_on_tune_rows(held_out: HeldOut) -> Weights:
    """The same from the tune split alone: one draw of the year."""
    return learnt(replace(held_out, rows=held_out.rows[held_out.rows["split"] != EARLIER]))


def best_group(held_out: HeldOut) -> Weights:
    """`pooling: select`: one winner per group."""
    spec = held_out.spec.model_copy(update={"pooling": "select"})
    return learnt(replace(held_out, spec=spec))


def fixed(*weights: float) -> Rule:
    """The same weights in every fleet, the last one in all finer grains, too."""

    def rule(held_out: HeldOut) -> Weights:
        found = []
        for grain, groups in enumerate(held_out.has_model):
            found.append(dict.fromkeys(groups, weights[min(grain, len(weights) - 1)]))
        return found

    return rule


def equal_mean(held_out: HeldOut) -> Weights:
    """An equal mean of all grains."""
    return [
        dict.fromkeys(groups, 1 / (1 + grain)) for grain, groups in enumerate(held_out.has_model)
    ]


def best_in_hindsight(held_out: HeldOut) -> Weights:
    """One weight per grain, chosen on the very rows that it is judged on."""
    later = held_out.rows[held_out.rows["split"] == LATER]
    answer = np.full(len(later), held_out.constant)
    weights: list[Mapping[str, float]] = []
    for grain, groups in enumerate(held_out.has_model):
        of_weights = []
        own = later[f"p{grain}"].to_numpy(dtype=float)
        for weight in WEIGHTS:
            answers = np.where(np.isnan(own), answer, weight * own + (1 - weight) * answer)
            of_weights.append(own_losses(held_out.spec, later, answers).sum())
        best = dict.fromkeys(groups, WEIGHTS[int(np.argmin(of_weights))])
        weights.append(best)
        answer = _answers_of_grain(later, grain, answer, best)
    return weights


RULES: Mapping[str, Rule] = {
    POOLED: fixed(1.0, 0.0),
    OWN: fixed(1.0),
    SERVED: learnt,
    "tune rows only": learnt_on_tune_rows,
    "select": best_group,
    "equal mean": equal_mean,
    "0.25 own": fixed(1.0, 0.25),
    "0.1 own": fixed(1.0, 0.1),
    HINDSIGHT: best_in_hindsight,
}
# What a fleet could have been served with.
CANDIDATES = [name for name in RULES if name != HINDSIGHT]


def later_error(held_out: HeldOut, weights: Weights) -> float:
    """Mean own loss on later rows; for squares its root."""
    later = held_out.rows[held_out.rows["split"] == LATER]
    answer = np.full(len(later), held_out.constant)
    for grain, of_grain in enumerate(weights):
        answer = _answers_of_grain(later, grain, answer, of_grain)
    loss = own_losses(held_out.spec, later, answer).sum() / later["weight"].sum()
    if held_out.spec.objective == "l2" and not held_out.spec.is_class_task:
        return float(np.sqrt(loss))
    return float(loss)


def _answers_of_grain(
    rows: pd.DataFrame, grain: int, parent: Floats, weights: Mapping[str, float]
) -> Floats:
    groups = np.array([ids[grain] for ids in rows["group_ids"]], dtype=object)
    return blend(rows[f"p{grain}"].to_numpy(dtype=float), groups, parent, weights)


@dataclass(frozen=True)
class Replayed:
    """Errors of the suite.

    Args:
        errors: on later rows, one row per fleet and one column per rule.
        kinds: of the fleets.
    """

    errors: pd.DataFrame
    kinds: "pd.Series[str]"

    def relative_to(self, rule: str) -> pd.DataFrame:
        """Each error over that of a rule."""
        return self.errors.div(self.errors[rule], axis=0)

    def mean(self, rule: str, kind: str) -> float:
        """Geometric mean over fleets of a kind: the rule's error over the pooled model's."""
        ratios = self.relative_to(POOLED).loc[self.kinds == kind, rule]
        return float(np.exp(np.log(ratios).mean()))


def replay(fleets: Sequence[HeldOut], rules: Mapping[str, Rule] = RULES) -> Replayed:
    """Judge every rule on every fleet."""
    errors = {}
    for fleet in fleets:
        errors[fleet.name] = {name: later_error(fleet, rule(fleet)) for name, rule in rules.items()}
    kinds = pd.Series({fleet.name: fleet.kind for fleet in fleets})
    return Replayed(pd.DataFrame(errors).T, kinds)


def choose_leaving_out(replayed: Replayed) -> "pd.Series[str]":
    """For each fleet the rule that does best on all others.

    That is the one of the lowest mean among those that are never worse by more than a hundredth.
    """
    ratios = replayed.relative_to(POOLED)[CANDIDATES]
    chosen = {}
    for fleet in ratios.index:
        others = ratios.drop(index=fleet)
        is_safe = others.max() <= SAFE
        means = np.log(others).mean()
        chosen[fleet] = str(means[is_safe].idxmin())
    return pd.Series(chosen)


def _replayed(runs: Runs) -> Replayed:
    return runs.once("blending", lambda: _measure(runs.panels))


def blend_safety(runs: Runs) -> Mapping[str, float]:
    """What is served beside its own parts, on later rows of every fleet of the suite."""
    replayed = _replayed(runs)
    served = replayed.relative_to(POOLED)[SERVED]
    of_own = replayed.relative_to(OWN)[SERVED]
    return {
        "worst": float(served.max()),
        "mean.public": replayed.mean(SERVED, "public"),
        "mean.generated": replayed.mean(SERVED, "generated"),
        "own": float(of_own.max()),
        # Not a number without a folder of panels.
        "mean.panels": replayed.mean(SERVED, "folder"),
    }


def blend_truth(runs: Runs) -> Mapping[str, float]:
    """What is served beside the best fixed weight per grain in hindsight, on generated fleets."""
    replayed = _replayed(runs)
    served = replayed.relative_to(HINDSIGHT)[SERVED]
    return {"": float(served[replayed.kinds == "generated"].max())}


def _measure(folder: Path | None, names: Sequence[str] = ()) -> Replayed:
    fleets = []
    for panel in suite(folder):
        if names and panel.name not in names:
            continue
        held_out = collect(panel)
        n_models = sum(map(len, held_out.has_model))
        print(
            f"  {panel.name}: {len(held_out.rows):,} held-out rows, {n_models:,} models, "
            f"{sum(held_out.seconds):.0f} s of training",
            flush=True,
        )
        fleets.append(held_out)
    replayed = replay(fleets)
    report(replayed)
    return replayed


def report(replayed: Replayed) -> None:
    """Print errors over the pooled model's, and which rule is chosen without each fleet."""
    ratios = replayed.relative_to(POOLED)
    print(ratios.round(4).to_string())
    summary = pd.DataFrame({"worst": ratios.max(), "mean": np.exp(np.log(ratios).mean())})
    print(summary.round(4).to_string())
    if len(ratios) > 1:
        chosen = choose_leaving_out(replayed)
        print(f"chosen leaving each fleet out: {chosen.value_counts().to_dict()}")


def main() -> None:
    """Measure the suite, or the named fleets of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blending", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="fleets; by default all")
    parser.add_argument("--panels", type=Path, metavar="FOLDER", help="further panels, as files")
    arguments = parser.parse_args()
    _measure(arguments.panels, arguments.names)


if __name__ == "__main__":
    main()
