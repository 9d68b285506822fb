"""FleetSpec: everything a user says about a fleet, validated when built.

Dagster's documentation of the component shows the descriptions below: keep them true, with a unit
and an example.
"""

import datetime as dt
import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self
from zoneinfo import available_timezones

import numpy as np
import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.errors import SpecError
from pipeline.periods import Period, on_last_day, parse_moment, to_wall_clock
from pipeline.spec_mistakes import InconsistentSpec, LineOf, describe, explain

Statistic = Literal["mean", "sum", "count", "std", "min", "max", "last"]
CalendarPart = Literal[
    "year", "quarter", "month", "week", "day_of_year", "day", "day_of_week", "hour", "minute"
]
ColumnType = Literal["string", "long", "double", "boolean", "date", "timestamp"]
Task = Literal["regression", "binary", "multiclass"]
Objective = Literal["l2", "l1", "huber", "quantile", "poisson", "tweedie"]

REGRESSION, BINARY, MULTICLASS = "regression", "binary", "multiclass"
QUANTILE, HUBER, POISSON, TWEEDIE = "quantile", "huber", "poisson", "tweedie"
# Objectives with a logarithm of their own, whose boosters predict the mean.
COUNTED = (POISSON, TWEEDIE)
# LightGBM sets these objectives' leaves after the trees are grown, and so cannot keep them
# monotone.
NEVER_MONOTONE = ("l1", QUANTILE)
DEFAULT_ALPHA = {QUANTILE: 0.5, HUBER: 0.9}
MAX_CLASSES = 100
SEASONAL_NAIVE = "seasonal naive"
# Ways to answer that are measured in every fleet.
CONTENDERS = ("fleet", "pooled", "constant")

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
# Columns that feature tables and training add to a row.
RESERVED = ("time", "known_at", "row_key", "is_future", "grain", "group_id", "task", "split")


def _checked_identifier(name: str) -> str:
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a usable name: expected a letter, then letters, digits or _ (100 at "
            "most)"
        )
    return name


def _checked_period(text: str) -> str:
    Period.parse(text)
    return text


def _checked_length(text: str) -> str:
    if Period.parse(text).count == 0:
        raise ValueError(f"{text!r} is empty; expected at least one unit")
    return text


def _checked_zone(name: str) -> str:
    names = available_timezones()
    if name not in names:
        hint = "expected a name such as Europe/Berlin"
        near = difflib.get_close_matches(name, sorted(names), n=3)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        raise ValueError(f"{name!r} is not a time zone; {hint}")
    return name


def _checked_moment(text: str) -> str:
    parse_moment(text)
    return text


def _written_date(value: Any) -> Any:
    """The text of a date, which YAML makes of 2013-12-24 without quotes."""
    if isinstance(value, dt.date):
        return value.isoformat()
    return value


Identifier = Annotated[str, AfterValidator(_checked_identifier)]
PeriodText = Annotated[str, AfterValidator(_checked_period)]
LengthText = Annotated[str, AfterValidator(_checked_length)]
Zone = Annotated[str, AfterValidator(_checked_zone)]
MomentText = Annotated[str, BeforeValidator(_written_date), AfterValidator(_checked_moment)]
Level = Annotated[float, Field(gt=0, lt=1)]


class Part(BaseModel):
    """A frozen part of a spec; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# CSV texts that mean null: in sources unless they say otherwise, and in rows to be scored.
NULL_TEXTS = ("", "NA", "NaN", "null", "NULL")


class SourceSpec(Part):
    """One raw table and where it comes from."""

    name: Identifier = Field(
        description="Name of the raw table in features.sql and of its asset, e.g. `flights`."
    )
    uri: str = Field(
        min_length=1,
        description="A path, a glob, an object-store URL, or a file of an installed package: "
        "`data/sales-*.csv`, `s3://bucket/sales/`, `package://plotnine/data/txhousing.csv`. Its "
        "ending gives the format: .csv, .tsv, .json, .jsonl or .ndjson (each also as .gz or .zip), "
        ".parquet or .pq.",
    )
    format: Literal["csv", "parquet", "delta", "jsonl"] | None = Field(
        default=None,
        description="csv, parquet, delta or jsonl (one JSON object per line); needed where the "
        "ending of `uri` does not give it. Files whose names end in .gz or .zip are decompressed.",
    )
    types: Mapping[str, ColumnType] = Field(
        default_factory=dict,
        description="Types of columns that would be guessed wrongly, e.g. `{zip_code: string}`.",
    )
    null_values: Sequence[str] = Field(default=NULL_TEXTS, description="CSV texts that mean null.")


class LagSpec(Part):
    """A column's value whole periods ago, for the same entity."""

    column: Identifier = Field(
        description="Column of features.sql whose past value is a feature, e.g. `median`."
    )
    periods: Sequence[Annotated[int, Field(ge=1)]] = Field(
        min_length=1,
        description="How many periods back, e.g. `[1, 12]`; each at least the horizon. Makes "
        "`median_lag_1`, `median_lag_12`.",
    )

    def name(self, periods: int) -> str:
        """The feature's column name."""
        return f"{self.column}_lag_{periods}"


class RollingSpec(Part):
    """Statistics of a column over a trailing window of what was known when the row is predicted.

    That is by the row's time less the horizon.
    """

    column: Identifier = Field(description="Column of features.sql to summarise, e.g. `arr_delay`.")
    window: LengthText = Field(
        description="Length of the window, e.g. `12 months` or `6 hours`; its start is excluded, "
        "its end included, but never the row's own time."
    )
    statistics: Sequence[Statistic] = Field(
        default=("mean",), min_length=1, description="Any of mean, sum, count, std, min, max, last."
    )
    over: Sequence[Identifier] | None = Field(
        default=None,
        description="Columns whose value the summarised rows share, e.g. `[dest]`; `[]` is all "
        "rows; by default the finest grain. Makes `arr_delay_mean_6_hours`, or "
        "`arr_delay_mean_6_hours_by_dest` (`_by_all` for []) where `over` is given.",
    )

    @property
    def period(self) -> Period:
        """The window's length, of days in UTC."""
        return Period.parse(self.window)

    def name(self, statistic: str) -> str:
        """The feature's column name."""
        name = f"{self.column}_{statistic}_{self.period.name}"
        if self.over is None:
            return name
        return f"{name}_by_{'_'.join(self.over) or 'all'}"


class FeaturesSpec(Part):
    """What a model sees of a row."""

    sql: str = Field(
        default="features.sql",
        description="File beside defs.yaml with one SELECT (Spark SQL) over the sources, one row "
        "per entity and time.",
    )
    columns: Sequence[Identifier] = Field(
        default=(),
        description="Columns of features.sql that are features as they are. List only what is "
        "known when the prediction is made.",
    )
    lags: Sequence[LagSpec] = Field(
        default=(),
        description="Values from whole periods ago. Months, quarters and years match regardless "
        "of the day: 28 February finds 31 January. Of several rows in that month, the one on the "
        "same day counts, or else the last one known by then.",
    )
    rolling: Sequence[RollingSpec] = Field(
        default=(), description="Statistics of trailing windows, as of what was known."
    )
    derived: Mapping[Identifier, str] = Field(
        default_factory=dict,
        description="Row-wise Spark SQL expressions over features and calendar parts, in order, "
        "e.g. `trend: ln(median_lag_1 / median_lag_12)`.",
    )
    calendar: Sequence[CalendarPart] = Field(
        default=(), description="Parts of the row's time: year, month, day_of_week, hour ..."
    )
    categoricals: Sequence[Identifier] = Field(
        default=(),
        description="Keys or columns that are categories, not quantities, e.g. `[carrier]`; "
        "unseen values count as missing.",
    )
    monotone: Mapping[Identifier, Literal[-1, 0, 1]] = Field(
        default_factory=dict,
        description="Features that the answer only rises (1) or only falls (-1) with, e.g. "
        "`{price: -1}`; 0 sets no constraint.",
    )
    max_categories: int = Field(
        default=250,
        ge=2,
        le=5000,
        description="Most frequent values kept per categorical; rarer ones count as missing.",
    )
    exclude: Sequence[Identifier] = Field(
        default=(),
        description="Lags, windows or derived columns that only serve to compute others; models "
        "do not see them.",
    )


class SqlSpec(Part):
    """What the fleet's SQL may call."""

    functions: Sequence[Identifier] = Field(
        default=(),
        description="Functions that features.sql and derived columns may call besides the allowed "
        "ones, e.g. `[collect_set]`. Add only functions that compute from their arguments alone; "
        "those known to run code, to read files, settings or the session, or to return something "
        "else each time are always refused.",
    )


class TargetSpec(Part):
    """What is predicted, and on which scale the models learn it."""

    column: Identifier = Field(
        description="Column of features.sql to predict, e.g. `median`: a number; for classes text, "
        "a boolean or a whole number."
    )
    classes: Sequence[str] | None = Field(
        default=None,
        description="Classes as text, e.g. `[no, yes]`; the last of two is the positive one. By "
        "default those of the fit rows, sorted. A row of another class counts as invalid.",
    )
    transform: Literal["none", "log", "log1p"] = Field(
        default="none", description="Link: the models learn transform(target)."
    )
    offset: Identifier | None = Field(
        default=None,
        description="Feature column subtracted from the transformed target before learning, in "
        "the link's units, so that groups are comparable.",
    )
    scale: Identifier | None = Field(
        default=None,
        description="Positive feature column that the rest is divided by before learning.",
    )
    weight: Identifier | None = Field(
        default=None,
        description="Column of row weights; a null or negative weight counts as 0, and rows of "
        "weight 0 are ignored.",
    )


class SplitsSpec(Part):
    """How much of the newest past is kept from fitting; cutoffs move by whole units."""

    report: LengthText = Field(
        description="Newest part, touched once, to report: e.g. `12 months`."
    )
    tune: LengthText = Field(
        description="The part before it, which stops boosting and chooses parameters; weights are "
        "chosen on it and on up to two stretches before it."
    )


# LightGBM parameters that a search may cover; the others are fixed by what the trainer promises.
SEARCHABLE = (
    "bagging_fraction",
    "cat_l2",
    "cat_smooth",
    "extra_trees",
    "feature_fraction",
    "feature_fraction_bynode",
    "lambda_l1",
    "lambda_l2",
    "learning_rate",
    "linear_lambda",
    "max_cat_threshold",
    "max_depth",
    "min_data_in_leaf",
    "min_gain_to_split",
    "min_sum_hessian_in_leaf",
    "num_leaves",
    "path_smooth",
)
WHOLE_PARAMETERS = (
    "extra_trees",
    "max_cat_threshold",
    "max_depth",
    "min_data_in_leaf",
    "num_leaves",
)


# Settings that say when, where and how long to train, not what comes out.
BUDGETS = ("budget_seconds", "checkpoint_seconds", "kill_after_seconds", "max_rows", "retune_after")


class SearchRange(Part):
    """Where a LightGBM parameter is looked for; equal ends fix it."""

    low: float = Field(description="Smallest value, e.g. `0.01`.")
    high: float = Field(description="Largest value, e.g. `0.3`.")
    log: bool = Field(
        default=False,
        description="Whether to search evenly in the logarithm; low must then be above 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, value: Any) -> Any:
        """A number alone fixes the parameter."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"low": value, "high": value}
        return value

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"{self.low:g} to {self.high:g} is not a range to search; expected low <= high, "
                "and low above 0 with log"
            )
        return self


class Bounds(NamedTuple):
    """Values that LightGBM takes for a parameter; `is_open` leaves out the low end."""

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False

    def check(self, name: str, searched: SearchRange) -> None:
        """Refuse a range that exceeds the bounds.

        Raises:
            ValueError: naming the parameter, the end that is outside, and what is allowed.
        """
        for end in (searched.low, searched.high):
            if not self.low <= end <= self.high or (self.is_open and end == self.low):
                raise ValueError(f"{name} cannot be {end:g}; expected {self}")

    def __str__(self) -> str:
        text = f"{self.low:g} or more"
        if self.is_open:
            text = f"more than {self.low:g}"
        if not math.isinf(self.high):
            text += f", and at most {self.high:g}"
        return text


# Source: LightGBM 4.7, Parameters. A parameter that is not listed takes any value.
_SEARCH_BOUNDS: Mapping[str, Bounds] = {
    "bagging_fraction": Bounds(0, 1, is_open=True),
    "cat_l2": Bounds(0),
    "cat_smooth": Bounds(0),
    "extra_trees": Bounds(0, 1),
    "feature_fraction": Bounds(0, 1, is_open=True),
    "feature_fraction_bynode": Bounds(0, 1, is_open=True),
    "lambda_l1": Bounds(0),
    "lambda_l2": Bounds(0),
    "learning_rate": Bounds(0, is_open=True),
    "linear_lambda": Bounds(0),
    "max_cat_threshold": Bounds(1),
    "min_data_in_leaf": Bounds(0),
    "min_gain_to_split": Bounds(0),
    "min_sum_hessian_in_leaf": Bounds(0),
    "num_leaves": Bounds(2, 131_072),
    "path_smooth": Bounds(0),
}


def _checked_search(search: Mapping[str, SearchRange]) -> Mapping[str, SearchRange]:
    for name, searched in search.items():
        if name not in SEARCHABLE:
            hint = ""
            near = difflib.get_close_matches(name, SEARCHABLE, n=1)
            if near:
                hint = f"did you mean {near[0]!r}? "
            raise ValueError(
                f"{name!r} cannot be searched; {hint}Available: {', '.join(SEARCHABLE)}"
            )
        _SEARCH_BOUNDS.get(name, Bounds()).check(name, searched)
        if name in WHOLE_PARAMETERS and (searched.low % 1 or searched.high % 1):
            raise ValueError(
                f"{name} is searched from {searched.low:g} to {searched.high:g}; expected whole "
                "numbers"
            )
    return search


class TuningSpec(Part):
    """How much is spent on choosing parameters, and from how many rows on a group is trained."""

    objective: Objective | None = Field(
        default=None,
        description="LightGBM's regression objective, in link space; by default l2. poisson and "
        "tweedie have a logarithm of their own, need targets of 0 or more, and answer the mean. "
        "Classes have the objective of their task.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="quantile: which quantile, by default 0.5; huber: the error, in link space, "
        "from which it counts linearly instead of squared, by default 0.9.",
    )
    variance_power: float | None = Field(
        default=None,
        gt=1,
        lt=2,
        description="tweedie: the variance is the mean to this power; by default `1.5`.",
    )
    max_trials: int = Field(
        default=12, ge=1, description="Most trials per group; 1 uses the default parameters."
    )
    patience: int = Field(
        default=6,
        ge=1,
        description="A group's study stops after this many trials without a gain beyond noise.",
    )
    timeout_seconds: float | None = Field(
        default=None,
        gt=0,
        description="A group's study stops after this long; makes results depend on the machine.",
    )
    budget_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Seconds of training (all slots together) for the whole fleet: first every "
        "group gets a model on few trials, then what is left goes to the groups with the largest "
        "rows x error; makes results depend on the machine.",
    )
    checkpoint_seconds: float = Field(
        default=60,
        gt=0,
        description="About how long a wave of groups trains before it is committed; a killed run "
        "repeats two waves at most.",
    )
    kill_after_seconds: float = Field(
        default=3600,
        gt=0,
        description="A group that takes longer than this is considered hung: it is stopped and "
        "marked `failed`.",
    )
    retune_after: PeriodText = Field(
        default="1 month",
        description="A changed group that was tuned more recently than this is refitted with its "
        "last parameters, without trials; `0 days` tunes every changed group.",
    )
    search: Annotated[Mapping[str, SearchRange], AfterValidator(_checked_search)] = Field(
        default_factory=dict,
        description="Search space where it differs from the default for the group's rows: a "
        "number fixes a parameter, `{low: 0.01, high: 0.3, log: true}` searches it.",
    )
    max_rounds: int = Field(default=1000, ge=1, description="Most boosting rounds per model.")
    max_rows: int = Field(
        default=2_000_000,
        ge=1000,
        description="A coarse group with more rows learns from a sample of about this many; small "
        "finest groups are kept whole.",
    )
    fit_rows: int = Field(
        default=100,
        ge=2,
        description="A group with fewer fit rows is not trained; its parent answers.",
    )
    tune_rows: int = Field(
        default=20,
        ge=2,
        description="A group with fewer tune rows is not trained; its parent answers.",
    )
    seed: int = Field(default=1, ge=0, description="Seed of studies and boosters.")

    @property
    def expected_trials(self) -> int:
        """Trials per group that costs are estimated with."""
        return min(self.max_trials, self.patience + 1)


class ScoringSpec(Part):
    """Which rows are answered."""

    score: Literal["future", "new"] = Field(
        default="new",
        description="`future`: the next horizon periods of every entity, made up; `new`: rows of "
        "the data with a time after the as-of.",
    )
    interval: Level = Field(
        default=0.8, description="Share of answers that should lie between lower and upper."
    )
    intervals: Sequence[Level] = Field(
        default=(0.8, 0.95),
        description="Shares that a registered version keeps intervals for, beside `interval`; a "
        "request names one of them.",
    )

    @property
    def levels(self) -> tuple[float, ...]:
        """All shares that intervals are kept for, rising."""
        return tuple(sorted({*self.intervals, self.interval}))


class AutomationSpec(Part):
    """What Dagster does by itself, once its schedules and sensors are switched on in the UI."""

    score: str | None = Field(
        default=None,
        description="When to read the sources and answer rows with the champion, as a cron text, "
        "e.g. `0 6 * * *` for 6:00 each day.",
    )
    retrain: str | None = Field(
        default=None,
        description="When to run the whole chain, as a cron text, e.g. `0 3 * * 1` for 3:00 each "
        "Monday.",
    )
    timezone: Zone | None = Field(
        default=None,
        description="Time zone of the cron texts, e.g. `Europe/Berlin`; by default the fleet's, "
        "else UTC.",
    )
    on_new_files: bool = Field(
        default=False,
        description="Whether to watch the sources for new or changed files, read them, and update "
        "features and predictions.",
    )
    resume: bool = Field(
        default=True,
        description="Whether a run that was launched this way is launched once more if its "
        "process dies, which resumes its training. A run that failed by itself is not: a mistake "
        "in the fleet's description, bad data or a failed check would fail again.",
    )


class FleetSpec(Part):
    """One prediction problem over many groups."""

    name: Annotated[str, AfterValidator(_checked_identifier)] = Field(
        description="Fleet, asset group and registered model, e.g. `housing`."
    )
    description: str = Field(default="", description="One sentence for people.")
    owners: Sequence[str] = Field(
        default=(), description="E-mail addresses or `team:name`, shown in Dagster."
    )
    sources: Sequence[SourceSpec] = Field(min_length=1, description="Raw tables.")
    features: FeaturesSpec = Field(description="SQL and declared features.")
    sql: SqlSpec = Field(default_factory=SqlSpec, description="What the fleet's SQL may call.")
    grains: Sequence[Sequence[Identifier]] = Field(
        min_length=1,
        description="Key columns of each level, coarse to fine, e.g. `[[], [origin], [origin, "
        "dest]]`; the first is always [].",
    )
    entity: Sequence[Identifier] = Field(
        min_length=1, description="Columns that, with the time, identify one row, e.g. `[city]`."
    )
    time: Identifier = Field(
        description="Column of features.sql (date or timestamp): when the target is realised."
    )
    known_at: Identifier | None = Field(
        default=None,
        description="Column of features.sql: when the target becomes known; by default the time.",
    )
    period: LengthText | None = Field(
        default=None,
        description="Step of the series, e.g. `1 month`; needed for lags and for `score: future`.",
    )
    horizon: PeriodText | None = Field(
        default=None,
        description="How long before its time a row is predicted, e.g. `1 month`; by default at "
        "its time.",
    )
    timezone: Zone | None = Field(
        default=None,
        description="Time zone whose days count, e.g. `Europe/Berlin`; by default UTC's. Lags, "
        "windows, the horizon, future rows and splits of days and longer, and calendar parts "
        "follow its clocks. Dates, and times without a zone (TIMESTAMP_NTZ), are its local times; "
        "times in tables stay UTC.",
    )
    target: TargetSpec = Field(description="What is predicted.")
    task: Task = Field(
        default="regression",
        description="Kind of prediction problem: `regression` (a number), `binary` or "
        "`multiclass` (a class's probability).",
    )
    splits: SplitsSpec = Field(description="What is kept from fitting.")
    tuning: TuningSpec = Field(default_factory=TuningSpec, description="Budget per group.")
    pack: Literal["self-contained", "shared"] = Field(
        default="self-contained",
        description="Where a registered version's boosters are: in the version itself, or "
        "`shared`: in files beside the fleet's tables, to which each version adds its new ones; "
        "for fleets of a gigabyte and more.",
    )
    pooling: Literal["blend", "select", "none"] = Field(
        default="blend",
        description="`blend`: weigh own and parent's answers; `select`: the better of the two; "
        "`none`: only the finest grain is trained, alone.",
    )
    own: Literal["independent", "correction", "auto"] = Field(
        default="independent",
        description="`independent`: a group's trees learn the target; `correction`: they learn "
        "what the parent's model leaves unexplained (on predictions it made without those rows); "
        "`auto`: a correction where that is clearly better on the tune rows of some groups.",
    )
    baselines: Mapping[str, Identifier] = Field(
        default_factory=dict,
        description="Columns to beat, by name, e.g. `{last value: median_lag_1}`: in the target's "
        "units; for binary the probability of the positive class; for multiclass a class. A "
        "series with a period also gets `seasonal naive`, the target one season ago.",
    )
    scoring: ScoringSpec = Field(default_factory=ScoringSpec, description="What is answered.")
    automation: AutomationSpec = Field(
        default_factory=AutomationSpec, description="Schedules and sensors."
    )
    as_of: MomentText | None = Field(
        default=None,
        description="Date or time the fleet pretends it is, unless a launch says otherwise; by "
        "default that of the newest known row.",
    )

    @property
    def finest(self) -> tuple[str, ...]:
        """Key columns of the finest grain."""
        return tuple(self.grains[-1])

    @property
    def horizon_period(self) -> Period:
        """The horizon; 0 days where none is given."""
        return self.in_zone(self.horizon or "0 days")

    def in_zone(self, text: str) -> Period:
        """A length of time, its days those of the fleet's time zone."""
        return Period.parse(text, self.timezone)

    @property
    def step(self) -> Period:
        """The period of the series.

        Raises:
            SpecError: if there is none.
        """
        return self.in_zone(self.period or "")

    @property
    def has_calendar_period(self) -> bool:
        """Whether the series go by months, quarters or years."""
        return self.period is not None and Period.parse(self.period).is_calendar

    def horizon_end(self, newest: pd.Timestamp) -> pd.Timestamp:
        """The last moment that is answered from the newest row.

        Where months count, the last day of a month leads to the last day of another.
        """
        local = np.array([newest.to_datetime64()])
        if self.timezone is not None:
            local = to_wall_clock(local, self.timezone)
        is_last_day = self.has_calendar_period and bool(on_last_day(local)[0])
        return self.horizon_period.add(newest, last_day=is_last_day)

    @property
    def over(self) -> dict[str, tuple[str, ...]]:
        """Per rolling feature the columns whose value the summarised rows share."""
        columns: dict[str, tuple[str, ...]] = {}
        for window in self.features.rolling:
            shared = self.finest
            if window.over is not None:
                shared = tuple(window.over)
            for statistic in window.statistics:
                columns[window.name(statistic)] = shared
        return columns

    @property
    def is_class_task(self) -> bool:
        """Whether a class is predicted and not a number."""
        return self.task != REGRESSION

    @property
    def objective(self) -> str:
        """LightGBM's objective."""
        if self.is_class_task:
            return self.task
        return self.tuning.objective or "l2"

    @property
    def alpha(self) -> float | None:
        """The objective's alpha; None where it has none."""
        if self.objective not in DEFAULT_ALPHA:
            return None
        return self.tuning.alpha or DEFAULT_ALPHA[self.objective]

    @property
    def learnt_quantile(self) -> float | None:
        """The quantile of the target that has the least loss; None where the mean has, or nearly."""
        return {QUANTILE: self.alpha, "l1": 0.5}.get(self.objective)

    @property
    def variance_power(self) -> float | None:
        """Power of tweedie's variance, 1 for poisson; None where the objective has none."""
        powers = {TWEEDIE: self.tuning.variance_power or 1.5, POISSON: 1.0}
        return powers.get(self.objective)

    @property
    def seasonal_lag(self) -> int | None:
        """Periods back of the automatic baseline `seasonal naive`; None where there is none.

        It is the season of the period's unit (12 months, 4 quarters, 52 weeks, 7 days, 24 hours),
        or its smallest multiple that is known at the horizon.
        """
        if self.period is None or self.is_class_task or SEASONAL_NAIVE in self.baselines:
            return None
        period = Period.parse(self.period)
        season, rest = divmod(_SEASONS.get(period.unit, 0), period.count)
        if rest or season <= 1:
            return None
        start = np.array([_ANCHOR])
        deadline = Period.parse(self.horizon or "0 days").before(start)[0]
        lag = season
        while period.times(lag).before(start)[0] > deadline:
            lag += season
        if self._target_lag(lag) in {*self.sql_columns, *self.features.derived}:
            return None
        return lag

    def _target_lag(self, periods: int) -> str:
        """The column of the target so many periods ago."""
        return LagSpec(column=self.target.column, periods=(periods,)).name(periods)

    @property
    def all_lags(self) -> tuple[LagSpec, ...]:
        """The declared lags, and the one that only the baseline `seasonal naive` needs."""
        lag = self.seasonal_lag
        if lag is None or self._target_lag(lag) in self.history_columns:
            return tuple(self.features.lags)
        return (*self.features.lags, LagSpec(column=self.target.column, periods=(lag,)))

    @property
    def all_baselines(self) -> dict[str, str]:
        """Column by name of the declared baselines and of `seasonal naive`."""
        baselines = dict(self.baselines)
        lag = self.seasonal_lag
        if lag is not None:
            baselines[SEASONAL_NAIVE] = self._target_lag(lag)
        return baselines

    @property
    def history_columns(self) -> tuple[str, ...]:
        """Names of the declared lags and rolling features."""
        names: list[str] = []
        for lag in self.features.lags:
            names.extend(map(lag.name, lag.periods))
        for window in self.features.rolling:
            names.extend(map(window.name, window.statistics))
        return tuple(names)

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """The columns that models see, in order; categoricals included."""
        features = self.features
        named = [
            *features.columns,
            *self.history_columns,
            *features.derived,
            *features.calendar,
            *features.categoricals,
        ]
        return tuple(name for name in dict.fromkeys(named) if name not in features.exclude)

    @property
    def key_columns(self) -> tuple[str, ...]:
        """Columns of grains and entity, each once."""
        return tuple(dict.fromkeys([*self.finest, *self.entity]))

    @property
    def sql_columns(self) -> dict[str, str]:
        """Columns that features.sql must give, each with the field that asks for it."""
        features, target = self.features, self.target
        computed = {*self.history_columns, *self.features.derived, *self.features.calendar}
        names_of_field: list[tuple[str, Iterable[str | None]]] = [
            ("grains", self.finest),
            ("entity", self.entity),
            ("time", [self.time]),
            ("known_at", [self.known_at]),
            ("target.column", [target.column]),
            ("features.columns", features.columns),
            ("features.lags", [lag.column for lag in features.lags]),
            ("features.rolling", [window.column for window in features.rolling]),
        ]
        for window in features.rolling:
            names_of_field.append(("features.rolling.over", window.over or ()))
        names_of_field += [
            ("features.categoricals", features.categoricals),
            ("target.offset", [target.offset]),
            ("target.scale", [target.scale]),
            ("target.weight", [target.weight]),
        ]
        for title, column in self.baselines.items():
            names_of_field.append((f"baselines.{title}", [column]))
        columns: dict[str, str] = {}
        for field, names in names_of_field:
            for name in names:
                if name is not None and name not in computed:
                    columns.setdefault(name, field)
        return columns

    @property
    def _summarised(self) -> set[str]:
        """Columns of features.sql that lags and windows look back on, or share."""
        columns = {lag.column for lag in self.features.lags}
        for window in self.features.rolling:
            columns |= {window.column, *(window.over or ())}
        return columns

    @property
    def training_digest(self) -> str:
        """Hash of everything that changes the result of training."""
        left_out: dict[str, Any] = dict.fromkeys(_NOT_TRAINED_ON, True)
        left_out["tuning"] = set(BUDGETS)
        parts = self.model_dump(mode="json", exclude=left_out)
        if self.timezone is None:  # as before there were any
            del parts["timezone"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise InconsistentSpec(problems)
        return self

    def _problems(self) -> Iterator[str]:
        yield from self._grain_problems()
        yield from self._history_problems()
        yield from self._task_problems()
        yield from self._own_problems()
        yield from self._monotone_problems()
        yield from self._source_problems()
        yield from self._name_problems()
        yield from self._outcome_problems()
        if not self.feature_columns:
            yield (
                "features: no feature is declared; add columns, lags, rolling, derived, calendar "
                "or categoricals"
            )
        if self.scoring.score == "future":
            yield from self._future_problems()

    def _source_problems(self) -> Iterator[str]:
        names = [source.name for source in self.sources]
        for name in _doubled(names):
            yield f"sources: {name!r} is listed twice; give each source its own name"
        for name in names:
            if name in CHAIN:
                yield f"sources: {name!r} is the name of a link of the asset chain; choose another"

    def _name_problems(self) -> Iterator[str]:
        """Names that are reserved, defined twice, or not defined at all."""
        computed = [*self.history_columns, *self.features.derived, *self.features.calendar]
        renamed = {self.time, self.known_at}
        names = {*self.sql_columns} - renamed | {*computed, *self.key_columns}
        for name in sorted(names):
            if name.lower() in RESERVED:
                yield (
                    f"column {name!r} is reserved ({', '.join(RESERVED)}); rename it in "
                    "features.sql"
                )
        for name in _doubled(computed):
            yield f"features: {name!r} is defined twice"
        given = {
            *self.key_columns,
            self.time,
            self.known_at or self.time,
            self.target.column,
            *self.features.columns,
            *self._summarised,
        }
        lowered = {name.lower() for name in given}  # Spark column names are case-insensitive
        for name in computed:
            if name.lower() in lowered:
                yield f"features: {name!r} is both made and a column of features.sql; rename one"
        declared = {*computed, *self.features.columns}
        for name in self.features.exclude:
            if name not in declared:
                yield (
                    f"features.exclude: {name!r} is not a declared feature; "
                    f"declared: {', '.join(computed)}"
                )

    def _outcome_problems(self) -> Iterator[str]:
        """Columns that reveal the answer, in fields whose columns are known before it."""
        outcome = {self.target.column, self.known_at} - {None}
        answer = "the answer itself (target or known_at)"
        for name in (*self.features.columns, *self.features.categoricals):
            if name in outcome:
                yield f"features: {name!r} is {answer} and cannot be a feature"
        for field in ("offset", "scale"):
            column = getattr(self.target, field)
            if column in outcome:
                yield f"target.{field}: {column!r} is {answer}; name a column known before"
        for title, name in self.baselines.items():
            if name in outcome:
                yield f"baselines.{title}: {name!r} is {answer}"
            if title in CONTENDERS:
                yield (
                    f"baselines: {title!r} is a way to answer that is always reported; "
                    "choose another name"
                )
        if self.target.column in self.key_columns:
            yield (
                f"target.column: {self.target.column!r} is a key (grains or entity) and cannot be "
                "predicted"
            )

    def _future_problems(self) -> Iterator[str]:
        """What `score: future` needs, and features that its made-up rows do not have."""
        if self.period is None:
            yield "period: needed for score: future, e.g. '1 month'"
        if self.horizon is None:
            yield (
                "horizon: needed for score: future: how many periods ahead are answered, "
                "e.g. '1 month'"
            )
        for name in (*self.features.columns, *self.features.categoricals):
            if name not in self.key_columns:
                yield (
                    f"features: {name!r} has no value in rows that score: future makes up; use a "
                    "lag, a window or a calendar part"
                )

    def _grain_problems(self) -> Iterator[str]:
        if self.grains[0]:
            yield (
                f"grains: the first is {list(self.grains[0])}, expected [] (the pooled "
                "model over all rows)"
            )
        for coarse, fine in zip(self.grains, self.grains[1:], strict=False):
            if list(fine[: len(coarse)]) != list(coarse) or len(fine) <= len(coarse):
                yield (
                    f"grains: {list(fine)} does not extend {list(coarse)}; "
                    "each grain is the one before it plus further keys"
                )
        for name in _doubled(self.finest):
            yield f"grains: key {name!r} is listed twice in {list(self.finest)}"

    def _own_problems(self) -> Iterator[str]:
        if self.own == "independent":
            return
        if self.is_class_task or self.objective in COUNTED:
            yield (
                f"own: {self.own!r} does not go with {self.objective}: trees correct a number, "
                "on the scale that they learn it; use independent"
            )
        if self.pooling == "none":
            yield (
                f"own: {self.own!r} corrects a parent's model, and pooling is none: use pooling: "
                "blend, or own: independent"
            )
        if self.tuning.budget_seconds is not None:
            yield (
                f"own: {self.own!r} trains grain by grain, which a budget of seconds cannot cut: "
                "leave out tuning.budget_seconds"
            )
        if len(self.grains) == 1:
            yield (
                f"own: {self.own!r} corrects a parent's model, and there is only the grain []; "
                "add a grain, or use independent"
            )

    def _task_problems(self) -> Iterator[str]:
        target, tuning, objective = self.target, self.tuning, self.objective
        if self.is_class_task and tuning.objective is not None:
            yield (
                f"tuning.objective: {tuning.objective!r} is for task: regression; "
                f"task {self.task!r} has an objective of its own: leave it out"
            )
        has_own_link = None
        if self.is_class_task:
            has_own_link = f"task {self.task!r}"
        elif objective in COUNTED:
            has_own_link = f"tuning.objective {objective!r}"
        if has_own_link and target.transform != "none":
            yield (
                f"target.transform: {target.transform!r} does not go with {has_own_link}, "
                "which has a link of its own: leave it out"
            )
        if has_own_link and target.offset is not None:
            yield (
                f"target.offset: {target.offset!r} does not go with {has_own_link}, "
                "which has a link of its own: leave it out"
            )
        if self.is_class_task and target.scale is not None:
            yield f"target.scale: {target.scale!r} does not go with {has_own_link}: leave it out"
        if tuning.alpha is not None and objective not in DEFAULT_ALPHA:
            yield (
                f"tuning.alpha: {tuning.alpha:g} is for tuning.objective quantile or huber; "
                f"the objective is {objective!r}: leave it out"
            )
        if objective == QUANTILE and (self.alpha or 0) >= 1:
            yield (
                f"tuning.alpha: {self.alpha:g} is not a quantile; expected a number "
                "between 0 and 1, e.g. 0.9"
            )
        if tuning.variance_power is not None and objective != TWEEDIE:
            yield (
                f"tuning.variance_power: {tuning.variance_power:g} is for tuning.objective "
                f"tweedie; the objective is {objective!r}: leave it out"
            )
        yield from self._class_problems()

    def _class_problems(self) -> Iterator[str]:
        classes = self.target.classes
        if self.is_class_task:
            for field in ("lags", "rolling"):
                parts = getattr(self.features, field)
                if self.target.column in [part.column for part in parts]:
                    yield (
                        f"features.{field}: {self.target.column!r} is a class and not a number; "
                        "make a number of it under another name in features.sql, e.g. `CAST(late = "
                        "'yes' AS int) AS was_late`"
                    )
        if classes is None:
            return
        if not self.is_class_task:
            yield (
                f"target.classes: {list(classes)} are for task: binary or multiclass; "
                f"the task is {self.task!r}: leave them out, or set the task"
            )
        for name in _doubled(classes):
            yield f"target.classes: {name!r} is listed twice"
        most, expected = MAX_CLASSES, f"2 to {MAX_CLASSES}"
        if self.task == BINARY:
            most, expected = 2, "exactly 2"
        if self.is_class_task and not 2 <= len(classes) <= most:  # noqa: PLR2004
            yield (
                f"target.classes: there are {len(classes)}, expected {expected} for "
                f"task {self.task!r}"
            )

    def _monotone_problems(self) -> Iterator[str]:
        monotone = self.features.monotone
        for name in monotone:
            if name in self.features.categoricals:
                yield (
                    f"features.monotone: {name!r} is a categorical, which has no order; "
                    "take it out of one of them"
                )
            elif name not in self.feature_columns:
                yield (
                    f"features.monotone: {name!r} is not a model feature; features: "
                    f"{', '.join(self.feature_columns)}"
                )
        if any(monotone.values()):
            if self.task == MULTICLASS:
                yield (
                    "features.monotone: task 'multiclass' has no one answer to rise or fall; "
                    "use task binary, or leave it out"
                )
            if self.objective in NEVER_MONOTONE:
                yield (
                    f"features.monotone: LightGBM cannot keep tuning.objective {self.objective!r} "
                    "monotone; use l2 or huber, or leave it out"
                )

    def _history_problems(self) -> Iterator[str]:
        if not self.features.lags:
            return
        if self.period is None:
            yield "period: needed for features.lags, e.g. '1 month'"
            return
        period, horizon = Period.parse(self.period), Period.parse(self.horizon or "0 days")
        start = np.array([_ANCHOR])
        deadline = horizon.before(start)[0]
        for lag in self.features.lags:
            for periods in lag.periods:
                if period.times(periods).before(start)[0] > deadline:
                    yield (
                        f"features.lags: {lag.column} {periods} x {self.period} back is not known "
                        f"{self.horizon} ahead (horizon): "
                        "it would leak the future; use a larger lag or a shorter horizon"
                    )


# Units of a period that make a season.
_SEASONS = {"month": 12, "quarter": 4, "week": 52, "day": 7, "hour": 24}
# Fields of a spec that change nothing that training gives.
_NOT_TRAINED_ON = (
    "automation",
    "baselines",
    "description",
    "owners",
    "pack",
    "scoring",
    "sources",
    "sql",
)
# Any first of a month: the moment from which a lag and the horizon are compared.
_ANCHOR = np.datetime64("2001-03-01", "us")
CHAIN = (
    "features",
    "models",
    "importance",
    "meta_model",
    "champion",
    "predictions",
    "monitoring",
    "report",
    "backtest",
)


def _doubled(names: Sequence[str]) -> list[str]:
    return sorted(name for name, n in Counter(names).items() if n > 1)


def parse_spec(attributes: Any, *, file: str, line_of: LineOf | None = None) -> FleetSpec:
    """Build a spec from the attributes of a defs.yaml.

    Args:
        attributes: what stands under `attributes:`.
        file: where it was read, for messages.
        line_of: gives the line of a field, for messages.

    Raises:
        SpecError: naming the file, line, field and value, and what is allowed; all mistakes at
            once.
    """
    try:
        return FleetSpec.model_validate(attributes)
    except ValidationError as error:
        message = describe(file, explain(error, FleetSpec), line_of)
    raise SpecError(message)
