"""The contract of every Delta table: what one row is, its columns with types and units, its key.

The `format` of a table goes up when its columns change meaning. Columns of raw tables and features
of feature tables belong to the fleet; the columns listed here are those of every fleet.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from pipeline.errors import StoreError

TIMESTAMP = pa.timestamp("us", tz="UTC")
# Values of the ledger's answered_by: what answers a group whose own answer is significantly worse.
BY_PARENT, BY_CONSTANT = "parent", "constant"


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type and what it holds, with its unit.

    Args:
        name: of the column.
        type: in Arrow.
        description: what it holds.
        is_late: whether tables of an earlier release lack it. It reads as null there; the first
            commit that has it adds it to such a table.
    """

    name: str
    type: pa.DataType
    description: str
    is_late: bool = False


@dataclass(frozen=True)
class TableContract:
    """What a table promises.

    Args:
        name: last part of its folder.
        row: what one row is.
        key: columns that identify a row.
        columns: in order.
        partition_by: columns whose value a commit replaces as a whole.
        format: version of this contract.
    """

    name: str
    row: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    format: int = 1

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([pa.field(column.name, column.type) for column in self.columns])


RAW = TableContract(
    name="raw",
    row="one row of a source, as ingested, with all its columns",
    key=(),
    columns=(
        Column("_source", pa.string(), "address of the file the row was read from"),
        Column("_ingested_at", TIMESTAMP, "when it was read"),
    ),
)

FEATURES = TableContract(
    name="features",
    row="one entity at one time: keys, target, features",
    key=("row_key",),
    columns=(
        Column("row_key", pa.string(), "JSON array of the entity key and the time; unique"),
        Column("time", TIMESTAMP, "when the target is realised"),
        Column("known_at", TIMESTAMP, "when the target becomes known"),
        Column("is_future", pa.bool_(), "whether the row was made up to be scored (score: future)"),
    ),
)

RUNS = TableContract(
    name="runs",
    row="what one training run pinned at its start (the run manifest), and whether it came to its "
    "end",
    key=("run_id",),
    partition_by=("run_id",),
    format=2,
    columns=(
        Column("run_id", pa.string(), "the training run; also the fleet version"),
        Column("started_at", TIMESTAMP, "when it started, or was last resumed"),
        Column(
            "finished_at",
            TIMESTAMP,
            "when its last table was committed; null while it is not finished",
        ),
        Column(
            "previous_run_id",
            pa.string(),
            "newest run finished before it, which it builds on; null for none",
        ),
        Column(
            "request", pa.string(), "JSON: what the launch asked for: retrain, groups, limit_groups"
        ),
        Column("data_digest", pa.string(), "hash of the visible rows that are learnt from"),
        Column("as_of", TIMESTAMP, "everything known later was hidden from it"),
        Column("tune_start", TIMESTAMP, "fit rows lie before"),
        Column("report_start", TIMESTAMP, "report rows lie at or after"),
        Column("features_version", pa.int64(), "version of the feature table it read"),
        Column("spec_digest", pa.string(), "hash of the part of the spec that matters to training"),
        Column(
            "constant",
            pa.float64(),
            "mean (quantile: that quantile) target of fit rows in link space, less offset, over "
            "scale; null for multiclass",
        ),
        Column(
            "constant_without_offset",
            pa.float64(),
            "the same without offset and scale; null for multiclass",
        ),
        Column("n_groups", pa.int64(), "groups of all grains"),
        Column(
            "model_spec",
            pa.string(),
            "JSON: features, required and optional columns, categories, grains, target, task, "
            "classes, prior and levels of intervals, as a pack's spec.json has them",
        ),
        Column("versions", pa.string(), "JSON: Python and library versions"),
        Column(
            "waves",
            pa.string(),
            "JSON: names of the waves whose boosters and holdout rows the run's ledger refers to",
        ),
        Column(
            "unknown_groups",
            pa.string(),
            "JSON: up to 20 groups of held-out rows that the ledger does not know; [] unless a key "
            "was read in two ways",
            is_late=True,
        ),
    ),
)

# In the request of a run that only refits earlier recipes: a digest of them.
RECIPES = "recipes"


def fleet_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that trained a whole fleet, not only refitted earlier recipes.

    Args:
        runs: rows of `RUNS`, with their request.
    """
    is_refit = runs["request"].map(_asks_for_refit).astype(bool)
    return runs[~is_refit]


def _asks_for_refit(request: Any) -> bool:
    """Whether a run's request, null in tables of an earlier release, names recipes to refit."""
    return isinstance(request, str) and RECIPES in json.loads(request)


LEDGER = TableContract(
    name="ledger",
    row="what became of one group of one grain in one training run",
    key=("run_id", "grain", "group_id"),
    partition_by=("run_id",),
    format=3,
    columns=(
        Column("run_id", pa.string(), "the training run"),
        Column("grain", pa.int32(), "index of the grain; 0 is the pooled model"),
        Column("grain_name", pa.string(), "the grain as written, e.g. [origin, dest]"),
        Column("group_id", pa.string(), "JSON array of the group's key values"),
        Column("parent_id", pa.string(), "group_id one grain coarser; null for the pooled group"),
        Column(
            "status",
            pa.string(),
            "trained, refreshed (refitted without trials), reused (booster of an earlier run), "
            "inherited (parent answers), failed, crashed",
        ),
        Column(
            "reason",
            pa.string(),
            "why it has no model: too_few_rows, no_target (or no weight), constant_target, "
            "infinite_target, unknown_class, pooling_none, error, timeout, native_crash; or why "
            "it kept an old one: not_listed, vanished",
        ),
        Column(
            "error_class",
            pa.string(),
            "class of the exception of a failed group; how the process of a crashed one ended",
        ),
        Column("error_message", pa.string(), "its message"),
        Column("booster_id", pa.string(), "hash of the served booster; null without one"),
        Column("n_rows", pa.int64(), "visible rows"),
        Column(
            "n_target",
            pa.int64(),
            "visible rows with a target; those of weight 0 count nowhere, here and below",
        ),
        Column("n_fit", pa.int64(), "rows to fit on"),
        Column("n_tune", pa.int64(), "rows to tune on"),
        Column("n_report", pa.int64(), "rows to report on"),
        Column(
            "n_invalid",
            pa.int64(),
            "rows left out: target infinite, outside the transform's or objective's domain, or of "
            "no known class",
        ),
        Column("n_trials", pa.int64(), "Optuna trials begun"),
        Column("n_pruned", pa.int64(), "of those given up early"),
        Column("n_rounds", pa.int64(), "boosting rounds of the served booster"),
        Column("parameters", pa.string(), "JSON: LightGBM parameters chosen"),
        Column(
            "cross_selection",
            pa.string(),
            "JSON: parameters and rounds that did best on the earlier and on the later half of "
            "the tune rows, and the time that cuts them; a refit predicts the tune rows of one "
            "half with the winner of the other",
            is_late=True,
        ),
        Column("stopped_by", pa.string(), "what stopped the study: max_trials, patience, timeout"),
        Column("fingerprint", pa.string(), "hash of all that the booster was made from"),
        Column("started_from", pa.string(), "JSON: parameters tried first, or refitted"),
        Column("source_run_id", pa.string(), "run that trained the booster"),
        Column("wave", pa.string(), "wave that committed the booster and its holdout rows"),
        Column(
            "tuned_as_of",
            TIMESTAMP,
            "as-of of the run that chose the parameters, or whose study last did not beat them",
        ),
        Column(
            "tune_loss",
            pa.float64(),
            "best trial's loss on tune rows: the objective's metric, link space",
        ),
        Column("weight", pa.float64(), "weight of the own model in the group's answer, 0 to 1"),
        Column(
            "tune_own",
            pa.float64(),
            "RMSE of the own model on tune rows, cross-selected, link space (probabilities for "
            "classes); weighted, as the five that follow",
        ),
        Column("tune_parent", pa.float64(), "RMSE of the parent's answer on tune rows, link space"),
        Column("report_own", pa.float64(), "RMSE of the own model on report rows, link space"),
        Column(
            "report_parent", pa.float64(), "RMSE of the parent's answer on report rows, link space"
        ),
        Column(
            "report_blend", pa.float64(), "RMSE of the group's answer on report rows, link space"
        ),
        Column(
            "report_constant",
            pa.float64(),
            "RMSE of the fleet's constant on report rows, link space",
        ),
        Column("report_rows", pa.int64(), "report rows with a valid target and a weight above 0"),
        Column(
            "rmse",
            pa.float64(),
            "RMSE of the fleet's answers on report rows, target units, each row alike whatever its "
            "weight; null for classes",
        ),
        Column(
            "mae", pa.float64(), "mean absolute error on report rows, target units, each row alike"
        ),
        Column(
            "mape",
            pa.float64(),
            "mean absolute percentage error on report rows with a target other than 0, percent, "
            "each row alike",
        ),
        Column(
            "pooled_rmse",
            pa.float64(),
            "RMSE of the pooled model alone, target units, each row alike",
        ),
        Column(
            "pooled_mape", pa.float64(), "MAPE of the pooled model alone, percent, each row alike"
        ),
        Column(
            "baselines",
            pa.string(),
            "JSON: per baseline its rows (n), rmse and mape (for classes log_loss and accuracy), "
            "and the fleet's own on the same rows; each row alike",
        ),
        Column(
            "metrics",
            pa.string(),
            "JSON: errors on report rows of fleet, pooled, constant and each baseline, target "
            "units: rmse, mae, mape (percent), pinball (quantile), deviance (poisson, tweedie); "
            "for classes log_loss, brier, accuracy; each row alike",
        ),
        Column(
            "intervals",
            pa.string(),
            'JSON: half width of the prediction interval per level, e.g. {"0.8": 1.5, "0.95": '
            "2.4}, link space over scale; null leaves a level, or "
            "all of them, to the parent; each row alike",
        ),
        Column(
            "answered_by",
            pa.string(),
            "parent or constant where that answers the group, because its own answer is "
            "significantly worse on report rows; else null",
            is_late=True,
        ),
        Column(
            "seconds",
            pa.float64(),
            "seconds inside train_group; null for a group that was not trained in this run",
        ),
        Column("lightgbm_seconds", pa.float64(), "of those inside LightGBM"),
        Column("planned_seconds", pa.float64(), "seconds that the plan predicted"),
        Column("task", pa.int32(), "Spark task of the plan; -1 where none"),
    ),
)

BOOSTERS = TableContract(
    name="boosters",
    row="one booster, as one wave of a training run wrote it; a booster is the same wherever its "
    "id is",
    key=("wave", "booster_id"),
    partition_by=("wave",),
    format=2,
    columns=(
        Column("wave", pa.string(), "the wave that wrote it"),
        Column("booster_id", pa.string(), "hash of the native text without its parameters section"),
        Column("run_id", pa.string(), "the training run that wrote it"),
        Column("sha256", pa.string(), "hash of the whole text"),
        Column("n_bytes", pa.int64(), "size of the text, bytes"),
        Column("text", pa.binary(), "native LightGBM text, zstd"),
    ),
)

HOLDOUT = TableContract(
    name="holdout",
    row="one held-out prediction of one group's own model; for multiclass one per row and class",
    key=("wave", "grain", "group_id", "row_key", "class_name"),
    partition_by=("wave",),
    format=2,
    columns=(
        Column(
            "wave",
            pa.string(),
            "the wave that wrote it; rows count only for groups whose ledger row names the wave",
        ),
        Column("run_id", pa.string(), "the training run"),
        Column("grain", pa.int32(), "index of the grain"),
        Column("group_id", pa.string(), "the group that predicted"),
        Column("row_key", pa.string(), "the row that was predicted"),
        Column(
            "class_name", pa.string(), "multiclass: the class whose probability this is; else null"
        ),
        Column("time", TIMESTAMP, "the row's time"),
        Column(
            "split",
            pa.string(),
            "tune (cross-selected prediction), report (fitted on fit + tune rows), earlier (before "
            "the tune split, fitted on what lies before); with own: correction also fit and gap "
            "(out of fold)",
        ),
        Column(
            "actual",
            pa.float64(),
            "target, target units; for classes 1 where the row is of the (positive) class, else 0",
        ),
        Column("offset", pa.float64(), "offset, link space; null where the row has none"),
        Column("scale", pa.float64(), "scale; null where the row has none"),
        Column("weight", pa.float64(), "row weight"),
        Column(
            "prediction",
            pa.float64(),
            "link space, less offset, over scale; for classes a probability; null if the group has "
            "no model",
        ),
        Column("group_ids", pa.list_(pa.string()), "the row's group in each grain"),
    ),
)

IMPORTANCE = TableContract(
    name="importance",
    row="what one feature does in one group's own model; where groups correct their parents (own: "
    "correction), in the correction, not in the answer",
    key=("run_id", "grain", "group_id", "feature"),
    partition_by=("run_id",),
    columns=(
        Column("run_id", pa.string(), "the training run"),
        Column("grain", pa.int32(), "index of the grain"),
        Column("grain_name", pa.string(), "the grain as written"),
        Column("group_id", pa.string(), "JSON array of the group's key values"),
        Column("booster_id", pa.string(), "hash of the group's booster"),
        Column("feature", pa.string(), "name of the feature"),
        Column(
            "gain",
            pa.float64(),
            "what its splits take off the training loss, summed over all trees (for multiclass of "
            "all classes)",
        ),
        Column(
            "gain_share",
            pa.float64(),
            "share of that in the gain of all features, 0 to 1; null for a booster without splits",
        ),
        Column("n_splits", pa.int64(), "splits by it"),
        Column(
            "shap",
            pa.float64(),
            "mean absolute SHAP value over n_rows rows, raw score: link space, less offset, over "
            "scale; counts: logarithm; binary: log odds; multiclass: mean over the classes' "
            "scores, too. Null without rows",
        ),
        Column(
            "n_rows",
            pa.int64(),
            "rows behind shap: the group's newest visible ones when the booster was first looked "
            "at; rows that came later do not change it",
        ),
        Column(
            "rank",
            pa.int32(),
            "place by gain, from 1; of equal ones the first in the spec; null for a feature that "
            "no split uses",
        ),
    ),
)

PREDICTIONS = TableContract(
    name="predictions",
    row="one answered row",
    key=("as_of", "row_key"),
    columns=(
        Column("as_of", pa.string(), "as-of of the scoring run, ISO 8601"),
        Column("row_key", pa.string(), "the row that was answered"),
        Column("time", TIMESTAMP, "the row's time"),
        Column(
            "prediction",
            pa.float64(),
            "target units; binary: probability of the positive class; multiclass: the likeliest "
            "class, as text",
        ),
        Column("lower", pa.float64(), "lower end of the interval, target units; null for classes"),
        Column("upper", pa.float64(), "upper end of the interval, target units; null for classes"),
        Column(
            "probabilities",
            pa.list_(pa.float64()),
            "only for classes: each class's probability, in the order of the model's classes",
        ),
        Column("answered_by", pa.string(), "finest grain whose own model contributed, or constant"),
        Column("booster_id", pa.string(), "that grain's booster; null for the constant"),
        Column("fleet_version", pa.string(), "training run of the version that answered"),
        Column("scored_at", TIMESTAMP, "when"),
    ),
    partition_by=("as_of",),
)

DECISIONS = TableContract(
    name="decisions",
    row="what one launch of `champion` decided about one group, whether or not another version "
    "answers it since",
    key=("decision_id", "grain", "group_id"),
    partition_by=("decision_id",),
    columns=(
        Column("decision_id", pa.string(), "the Dagster run that decided"),
        Column("decided_at", TIMESTAMP, "when"),
        Column("decided_by", pa.string(), "who launched it"),
        Column(
            "decision",
            pa.string(),
            "what was asked for: judge, promote, keep, rollback; unknown: the alias was moved by "
            "hand, or by a launch that was killed",
        ),
        Column("why", pa.string(), "the reason that the launch gave; null for none"),
        Column(
            "champion_before", pa.string(), "registered version that served before; null for none"
        ),
        Column(
            "champion_after", pa.string(), "registered version that serves since; null for none"
        ),
        Column(
            "challenger", pa.string(), "registered version that was judged; null for a rollback"
        ),
        Column("grain", pa.int32(), "index of the grain"),
        Column("group_id", pa.string(), "the group"),
        Column(
            "from_version",
            pa.string(),
            "fleet version (training run) that answered it; null for none",
        ),
        Column("to_version", pa.string(), "fleet version that answers it since"),
        Column(
            "moved",
            pa.bool_(),
            "whether these differ and the gates let it happen; null: decided, and killed before it "
            "was carried out: the next launch does",
        ),
        Column(
            "kind",
            pa.string(),
            "what it is in the challenger: unchanged, refresh, new_recipe, new_group, "
            "not_comparable; null for a rollback",
        ),
        Column(
            "reason",
            pa.string(),
            "not_worse, worse, better, not_better (by the paired test), follows_parent (few "
            "report rows), unmeasured, unchanged, new_group, not_comparable, rolled_back (from "
            "this challenger, earlier), override, gates, unknown; earlier_recipe_refitted (the "
            "new recipe is not better; to_version is the run that fitted the old one on the newer "
            "rows); answered_by_parent, answered_by_constant (promoted, and its own answer is "
            "worse than that)",
        ),
        Column("n_rows", pa.int64(), "report rows compared; null where nothing was"),
        Column("n_blocks", pa.int64(), "stretches of the report split that they lie in"),
        Column(
            "loss_champion",
            pa.float64(),
            "mean loss of the champion's twin on them, in the fleet's own loss, on the target's "
            "scale",
        ),
        Column("loss_challenger", pa.float64(), "mean loss of the challenger's"),
        Column("p_value", pa.float64(), "of the one-sided paired test; null where none was made"),
    ),
)

LEASES = TableContract(
    name="leases",
    row="who may train the fleet now; there is one row at most",
    key=(),
    columns=(
        Column("run_id", pa.string(), "the training run"),
        Column("owner", pa.string(), "host:pid of its process"),
        Column("host", pa.string(), "name of the machine"),
        Column(
            "boot_id",
            pa.string(),
            "the machine's boot and the namespace that the pid counts in; empty where unknown",
        ),
        Column("pid", pa.int64(), "process"),
        Column(
            "process_started",
            pa.int64(),
            "when the process started, clock ticks since boot; 0 where unknown",
        ),
        Column("taken_at", TIMESTAMP, "when the run took the lease"),
        Column("heartbeat_at", TIMESTAMP, "when it was last renewed"),
        Column("expires_at", TIMESTAMP, "from then on anybody may take it"),
        Column("released", pa.bool_(), "whether the run gave it back"),
        Column(
            "fence",
            pa.int64(),
            "grows by one each time the lease is taken; a table refuses the commits of a holder "
            "once a later one has committed to it",
            is_late=True,
        ),
    ),
)

ALL = (RAW, FEATURES, LEASES, RUNS, LEDGER, BOOSTERS, HOLDOUT, IMPORTANCE, DECISIONS, PREDICTIONS)


def in_format(rows: pd.DataFrame, contract: TableContract, location: str) -> pd.DataFrame:
    """Rows of a table with all columns of its contract; late columns that it lacks are null.

    Args:
        rows: as read from the table.
        contract: what it should be.
        location: where it is, for the message.

    Raises:
        StoreError: naming the columns that no table of this format may lack, and the next step.
    """
    missing = [column for column in contract.columns if column.name not in rows.columns]
    required = sorted(column.name for column in missing if not column.is_late)
    if required:
        raise StoreError(
            f"{location} was written by an earlier version: it has no column "
            f"{', '.join(required)}, expected format {contract.format} of the table "
            f"{contract.name!r}; "
            "move it away (every group is then trained again), or use a new data root"
        )
    return rows.assign(**{column.name: None for column in missing})


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dicts by column name; what is missing is None."""
    dicts = cast("list[dict[str, Any]]", rows.to_dict("records"))
    for row in dicts:
        for name, value in row.items():
            is_nan = isinstance(value, float) and math.isnan(value)
            if is_nan or value is pd.NaT or value is pd.NA:
                row[name] = None
    return dicts
