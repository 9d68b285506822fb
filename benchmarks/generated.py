"""Generated fleets: as many groups as wanted, of equal or skewed sizes, with a signal that rewards tuning or a trivial one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from deltalake import write_deltalake

from benchmarks.rivals import Problem, plain_default, tuned_per_group
from pipeline.spec import FleetSpec, parse_spec
from pipeline.tables import TIMESTAMP
from pipeline.testing.data import with_changes
from pipeline.training.splits import resolve_cutoffs

Floats = npt.NDArray[np.float64]
Signal = Literal["tuned", "tiny", "noise"]

START = pd.Timestamp("2023-01-01")
# With 30 days to tune and 30 to report, 70 / 15 / 15 % of every group's rows.
DAYS = 200
SPLITS: Mapping[str, str] = {"report": "30 days", "tune": "30 days"}
SPAN_SECONDS = DAYS * 86_400
TUNINGS: Mapping[str, Mapping[str, Any]] = {
    "tuned": {"max_trials": 20, "patience": 20},
    "noise": {},
    "tiny": {"max_trials": 1, "patience": 1, "max_rounds": 20, "fit_rows": 20, "tune_rows": 5},
}
NOISE = 0.3
_FLEET_STREAM, _GROUP_STREAM = 0, 1


@dataclass(frozen=True)
class GeneratedFleet:
    """A fleet of one grain of groups, g00000 the largest, made from its arguments alone.

    A target is a group's level, plus effects of the features that level off (tanh), plus noise.
    Half of an effect's size is the fleet's and half the group's own. Many equally weak smooth
    effects are what LightGBM's default steps and leaves are too coarse for. A tiny fleet has one
    straight effect. A target of noise has neither effects nor levels.

    Args:
        n_groups: groups.
        rows_per_group: rows of the mean group; all groups together have exactly n_groups times as
            many.
        skew: Zipf's exponent s: what groups have above the minimum falls with their rank as rank **
            -s; 0 is equal sizes.
        signal: `tuned`, where chosen parameters predict better than default ones, or `tiny`, for
            what training costs besides learning, best with 70 rows per group; `noise`, from which
            there is nothing to learn.
        n_features: features x0, x1, ...
        seed: of all that is random; a group's rows depend on it, the group's number and the group's
            size only.
        minimum_rows: rows of the smallest group, or rows_per_group where that is less.

    Raises:
        ValueError: if there would be no group, no feature or no row, the skew is negative, or one
            group would have more rows than its time has seconds.
    """

    n_groups: int
    rows_per_group: int = 500
    skew: float = 0.0
    signal: Signal = "tuned"
    n_features: int = 10
    seed: int = 0
    minimum_rows: int = 150

    def __post_init__(self) -> None:
        if (
            min(self.n_groups, self.rows_per_group, self.n_features, self.minimum_rows) < 1
            or self.skew < 0
        ):
            raise ValueError(
                f"{self} is not a fleet: expected at least one group, "
                "row and feature, and a skew of "
                "0 or more"
            )
        if self.signal not in TUNINGS:
            raise ValueError(f"signal is {self.signal!r}; expected one of {', '.join(TUNINGS)}")
        if int(self.sizes().max()) > SPAN_SECONDS:
            raise ValueError(
                f"{self} has a group of {self.sizes().max()} rows; expected at most "
                f"{SPAN_SECONDS}, one a second"
            )

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(f"x{number}" for number in range(self.n_features))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, largest first."""
        return tuple(f"g{number:05d}" for number in range(self.n_groups))

    @property
    def n_rows(self) -> int:
        """Rows of all groups."""
        return self.n_groups * self.rows_per_group

    def sizes(self) -> npt.NDArray[np.int64]:
        """Rows per group, falling; their sum is `n_rows`."""
        minimum = min(self.minimum_rows, self.rows_per_group)
        shares = np.arange(1, self.n_groups + 1, dtype=np.float64) ** -self.skew
        above = (self.n_rows - self.n_groups * minimum) * np.cumsum(shares) / shares.sum()
        return np.sort(minimum + np.diff(np.round(above), prepend=0.0).astype(np.int64))[::-1]

    def rows(self, first: int = 0, last: int | None = None) -> pd.DataFrame:
        """Rows of the feature table, group by group and by time.

        Args:
            first: number of the first group wanted.
            last: number of the group after the last one wanted; None is all.

        Returns:
            One row per group and time: group (text), time and known_at (equal; UTC without a zone,
            microseconds), is_future (false), row_key (JSON array of group and time), x0, x1, ..., y
            (float64, no unit). A group's times are evenly spaced over 200 days and end with their
            last second.
        """
        sizes = self.sizes()[first:last]
        names = np.repeat(np.array(self.groups[first:last], dtype=object), sizes)
        seconds = np.concatenate(
            [np.arange(1, size + 1) * SPAN_SECONDS // size - 1 for size in sizes]
        )
        times = START.to_datetime64().astype("datetime64[us]") + seconds.astype("timedelta64[s]")
        values = np.concatenate(
            [self._values(first + place, int(size)) for place, size in enumerate(sizes)]
        )
        texts = pd.Series(np.datetime_as_string(times, unit="s")).str.replace("T", " ", regex=False)
        return pd.DataFrame(
            {
                "group": names,
                "time": times,
                "known_at": times,
                "is_future": False,
                "row_key": '["' + pd.Series(names) + '","' + texts + '"]',
                **{name: values[:, place] for place, name in enumerate(self.features)},
                "y": values[:, -1],
            }
        )

    def _values(self, number: int, size: int) -> Floats:
        """A group's features and, last, its target."""
        rng = np.random.default_rng([self.seed, _GROUP_STREAM, number])
        level, own = rng.uniform(5, 15), rng.normal(size=self.n_features)
        features = rng.normal(size=(size, self.n_features))
        noise = NOISE * rng.normal(size=size)
        if self.signal == "noise":
            return np.column_stack([features, noise])
        if self.signal == "tiny":
            return np.column_stack([features, level + features[:, 0] + noise])
        shared = np.random.default_rng([self.seed, _FLEET_STREAM]).normal(size=self.n_features)
        sizes = (1 + 0.35 * shared + 0.35 * own) / np.sqrt(self.n_features)
        return np.column_stack([features, level + np.tanh(features) @ sizes + noise])

    def attributes(self, **changes: Any) -> dict[str, Any]:
        """The attributes of the fleet's defs.yaml.

        Mappings are changed field by field, a field changed to None is left out.
        """
        attributes: dict[str, Any] = {
            "name": f"generated_{self.signal}",
            "sources": [{"name": "rows", "uri": "rows.parquet"}],
            "features": {"columns": list(self.features)},
            "grains": [[], ["group"]],
            "entity": ["group"],
            "time": "time",
            "target": {"column": "y"},
            "splits": dict(SPLITS),
            "tuning": dict(TUNINGS[self.signal]),
        }
        return with_changes(attributes, changes)

    def spec(self, **changes: Any) -> FleetSpec:
        """The fleet's spec, with changes as in `attributes`."""
        return parse_spec(self.attributes(**changes), file="generated")

    def problem(self) -> Problem:
        """The same for a rival: the cutoffs are those that a run over all rows would resolve."""
        spec = self.spec()
        newest = START + pd.Timedelta(seconds=SPAN_SECONDS - 1)
        cutoffs = resolve_cutoffs(spec.splits, newest, newest)
        return Problem(
            keys=("group",),
            features=self.features,
            target="y",
            tune_start=cutoffs.tune_start,
            report_start=cutoffs.report_start,
            fit_rows=spec.tuning.fit_rows,
            tune_rows=spec.tuning.tune_rows,
        )


def tuning_gain(fleet: GeneratedFleet, n_groups: int) -> float:
    """By how much LightGBM's default parameters do worse than tuned ones on report rows, as a share of the tuned error.

    Both stop early on the tune rows and are then fitted on fit and tune rows; tuned are 20 trials
    of `rivals.tune_and_fit`.

    Args:
        fleet: the fleet.
        n_groups: its first groups are measured, in this process: a second or two each for groups of
            500 rows.

    Returns:
        Mean RMSE of the groups with default parameters over that with tuned ones, less 1.
    """
    rows, problem = fleet.rows(0, n_groups), fleet.problem()
    return _mean_rmse(plain_default(rows, problem)) / _mean_rmse(tuned_per_group(rows, problem)) - 1


def _mean_rmse(groups: pd.DataFrame) -> float:
    return float(((groups["squared_error"] / groups["n_report"]) ** 0.5).mean())


def write_features(
    fleet: GeneratedFleet,
    location: str | Path,
    *,
    n_files: int = 8,
    late: pd.DataFrame | None = None,
) -> None:
    """Write the fleet's feature table as a Delta table; what was there is replaced.

    Args:
        fleet: the fleet.
        location: folder or address of the table.
        n_files: Parquet files at most, each with whole groups and about as many rows as the others;
            one commit each.
        late: further rows, in a file of their own.
    """
    for number, frame in enumerate([*_frames(fleet, n_files), *([] if late is None else [late])]):
        write_deltalake(
            location,
            _table(frame),
            mode="append" if number else "overwrite",
            schema_mode=None if number else "overwrite",
        )


def late_rows(rows: pd.DataFrame, n_rows: int = 1) -> pd.DataFrame:
    """So many further rows of each group, in the middle of its past: what makes a group be trained again."""
    late = rows.groupby("group").head(n_rows).copy()
    late["time"] += pd.Timedelta(milliseconds=500)
    late["row_key"] += "-late"
    return late


def _frames(fleet: GeneratedFleet, n_files: int) -> Iterator[pd.DataFrame]:
    file_of_group = (np.cumsum(fleet.sizes()) - 1) * n_files // fleet.n_rows
    for number in np.unique(file_of_group):
        first, last = np.searchsorted(file_of_group, [number, number + 1])
        yield fleet.rows(int(first), int(last))


def _table(frame: pd.DataFrame) -> pa.Table:
    types = {
        "group": pa.string(),
        "time": TIMESTAMP,
        "known_at": TIMESTAMP,
        "is_future": pa.bool_(),
        "row_key": pa.string(),
    }
    schema = pa.schema([pa.field(name, types.get(name, pa.float64())) for name in map(str, frame)])
    zoned = frame.assign(
        **{name: frame[name].dt.tz_localize("UTC") for name in ("time", "known_at")}
    )
    return pa.Table.from_pandas(zoned, schema=schema, preserve_index=False)
