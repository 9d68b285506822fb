"""Everything that decides an answer, in one file.

It needs only numpy, pandas, pyarrow and lightgbm.

MLflow registers this file as the model's code ("models from code"), so it imports nothing of this
repository: wherever the registered version is loaded, this text travels with it. Training and batch
scoring import the same functions from here, so that a group's id, its design matrix and its blended
answer have one implementation.

A pack is a folder:

- ``index.json``: what the others must be, byte for byte or footer for footer, and its own digest;
  a version is known by that digest;
- ``spec.json``: one entry per generation, that is per training run whose boosters serve: grains,
  features, categories, target, task, classes, constants, levels of intervals;
- ``chains.parquet``: one row per generation and group, sorted by grain, group and generation:
  weight, half widths of intervals (link units, one per level), and where its booster is: file,
  offset, stored size, size and SHA-256 of the text;
- ``boosters.parquet``: one row per booster: booster_id and the text, zstd-compressed, each as one
  run of bytes that is read alone.

A group is answered by the generation that serves it, with the ancestors, categories and constants
of that generation. So a version may combine groups of several training runs, and changing one
group's generation changes no other group's answers.

The file reads in this order: ids of groups, what a run answers by, design matrix, link, boosters,
the files of a pack, chains and their blend, the model.
"""

import datetime as dt
import hashlib
import json
import re
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq

PACK_FORMAT = 3
CONSTANT = "constant"
# Who answered a row whose prediction is too large for a number.
NOT_FINITE = "none (not finite)"
INDEPENDENT, CORRECTION = "independent", "correction"
REGRESSION, MULTICLASS = "regression", "multiclass"
CACHE_BYTES = 256 << 20
TOP_FEATURES = 5
MAX_BOOSTER_BYTES = 1 << 30
# Characters of a value that a message shows.
MAX_SHOWN = 60
CHAINS = pa.schema(
    [
        pa.field("grain", pa.int32(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("serves", pa.bool_(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("intervals", pa.list_(pa.field("element", pa.float64()))),
        pa.field("booster_id", pa.string()),
        pa.field("file", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("stored_bytes", pa.int64()),
        pa.field("n_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
    ]
)
Floats = npt.NDArray[np.float64]


_AGAIN = "fetch the version again, or materialise meta_model and champion again"


class PackError(Exception):
    """A pack is damaged, of another format, or not the one that was promised.

    Names the file and what differs.
    """


class InputError(ValueError):
    """A batch cannot be answered.

    A column is missing, listed twice or of the wrong kind, or the version has no intervals of the
    level that was asked for. The message names what is wrong and what is available.
    """


_ESCAPES = {code: f"\\u{code:04X}" for code in range(32)} | {
    ord("\b"): "\\b",
    ord("\f"): "\\f",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
    ord('"'): '\\"',
    ord("\\"): "\\\\",
}


def group_id(values: Sequence[object]) -> str:
    """The id of a group: a JSON array of strings or null, e.g. ``["EWR","IAH"]``.

    There are no spaces in it, and non-ASCII characters are kept; ``[]`` is the pooled group.
    Equal, to the letter, to what Spark's ``to_json(array(...))`` gives for the same keys.
    """
    return f"[{','.join(map(_write_key, values))}]"


def _write_key(value: object) -> str:
    """One key value as JSON: a string, or null."""
    text = key_text(value)
    if text is None:
        return "null"
    return f'"{text.translate(_ESCAPES)}"'


def key_text(value: object) -> str | None:
    """One key value or category as text.

    Numbers are written by their value, booleans in lower case; null is None.
    A float or decimal that is a whole number reads as that integer, because pandas and MLflow turn
    nullable integers into floats; a moment at midnight reads as its date, because pandas has no
    dates. Moments with a zone are written in UTC.
    """
    is_missing_moment = isinstance(value, np.datetime64) and np.isnat(value)
    if is_missing_moment or value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float | np.floating):
        return _float_text(float(value))
    if isinstance(value, Decimal):
        return _decimal_text(value)
    if isinstance(value, dt.datetime | np.datetime64):
        return _moment_text(pd.Timestamp(value))
    return str(value)


def _float_text(value: float) -> str | None:
    if np.isnan(value):
        return None
    if value.is_integer():
        return str(int(value))
    return repr(value)


def _decimal_text(value: Decimal) -> str | None:
    if value.is_nan():
        return None
    text = f"{value:f}"
    if "." not in text:
        return text
    return text.rstrip("0").removesuffix(".")


def _moment_text(moment: pd.Timestamp) -> str:
    if moment.tzinfo is not None:
        moment = moment.tz_convert("UTC").tz_localize(None)
    if moment == moment.normalize():
        return str(moment.date())
    return moment.isoformat(sep=" ", timespec="microseconds").rstrip("0").removesuffix(".")


def group_ids(frame: pd.DataFrame, keys: Sequence[str]) -> npt.NDArray[np.object_]:
    """The group id of every row."""
    if not keys:
        return np.full(len(frame), group_id(()), dtype=object)
    codes, first = _number_combinations([frame[key] for key in keys])
    distinct = zip(*(frame[key].to_numpy()[first] for key in keys), strict=True)
    ids = np.array(list(map(group_id, distinct)), dtype=object)
    of_rows: npt.NDArray[np.object_] = ids[codes]
    return of_rows


def _number_combinations(
    columns: Sequence[pd.Series],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A number per row for its combination of values, and the first row of each number."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, distinct = _factorize(column)
        codes, _ = pd.factorize(codes * (len(distinct) + 1) + values + 1)
    _, first = np.unique(codes, return_index=True)
    return codes.astype(np.int64), first.astype(np.int64)


def _factorize(values: "pd.Series[Any]") -> tuple[npt.NDArray[np.int64], Any]:
    """Codes and distinct values of a key or category; null has the code -1.

    Raises:
        InputError: naming the column, if a value is a list or a mapping.
    """
    try:
        codes, distinct = pd.factorize(values, use_na_sentinel=True)
    except TypeError as error:  # not hashable
        value = next(value for value in values if isinstance(value, list | dict | set | np.ndarray))
        raise InputError(
            f"{values.name}: {_shorten(value)} is not a value of a key or category; "
            "expected text, a number, or null"
        ) from error
    return codes, distinct


class GroupKey(NamedTuple):
    """What names one group of a fleet; equal to the plain tuple of both.

    Args:
        grain: index of the grain, 0 for the coarsest.
        group_id: as from `group_id`.
    """

    grain: int
    group_id: str

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Self:
        """The group that a row with the columns grain and group_id is about."""
        return cls(int(row["grain"]), str(row["group_id"]))

    @classmethod
    def parent_of(cls, row: Mapping[Any, Any]) -> Self:
        """The parent of the group that a row is about: its parent_id, one grain up."""
        return cls(int(row["grain"]) - 1, str(row["parent_id"]))

    @classmethod
    def of_rows(cls, rows: pd.DataFrame) -> "list[Self]":
        """The group of each row of a table with the columns grain and group_id, in its order."""
        return [
            cls(int(grain), str(group))
            for grain, group in zip(rows["grain"], rows["group_id"], strict=True)
        ]

    def list_ancestry(self, grains: Sequence[Sequence[str]]) -> "list[GroupKey]":
        """The group and the groups above it, coarsest first.

        Args:
            grains: key columns of each grain.
        """
        values = json.loads(self.group_id)
        ancestry = []
        for grain in range(self.grain):
            n_keys = len(grains[grain])
            ancestry.append(GroupKey(grain, group_id(values[:n_keys])))
        return [*ancestry, self]


def grain_name(keys: Sequence[str]) -> str:
    """A grain as people write it: ``[origin, dest]``."""
    return f"[{', '.join(keys)}]"


@dataclass(frozen=True)
class ModelTarget:
    """How answers come from what boosters learn.

    An answer is the inverse of the transform, of offset plus scale times what they learn.

    Args:
        column: of the target.
        transform: `none`, `log` or `log1p`.
        offset: column that is added in link space; None without one.
        scale: column that multiplies in link space; None without one.
    """

    column: str
    transform: str
    offset: str | None
    scale: str | None

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Self:
        """From a model spec's JSON."""
        return cls(written["column"], written["transform"], written["offset"], written["scale"])

    def to_dict(self) -> dict[str, Any]:
        """As a model spec's JSON has it."""
        return {
            "column": self.column,
            "transform": self.transform,
            "offset": self.offset,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class ModelSpec:
    """What training, packing and scoring share of a fleet.

    Fingerprints, runs and packs hang on its JSON: keys, their order and their values stay as they
    are.

    Args:
        fleet: its name.
        grains: key columns of each grain, coarse to fine.
        features: columns of the design matrix, in order.
        categories: values per categorical feature, in order.
        required: columns that a batch must have.
        optional: columns that a batch may lack.
        task: `regression`, `binary` or `multiclass`.
        own: `independent`, or `correction` where a group's trees add to its parent's prediction.
        is_count: whether boosters give the exponential of their score; None where an earlier
            release did not say so.
        classes: of the target, in order; empty for regression.
        prior: each class's share of the fit rows; empty for regression.
        target: how answers come from what boosters learn.
        interval: level of the intervals where none is asked for; None for classes.
        intervals: levels that may be asked for, rising; empty for classes.
    """

    fleet: str
    grains: tuple[tuple[str, ...], ...]
    features: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    task: str
    own: str
    is_count: bool | None
    classes: tuple[str, ...]
    prior: tuple[float, ...]
    target: ModelTarget
    interval: float | None
    intervals: tuple[float, ...]

    @property
    def is_regression(self) -> bool:
        """Whether it answers with numbers in target units."""
        return self.task == REGRESSION

    @property
    def is_multiclass(self) -> bool:
        """Whether it answers with one of several classes."""
        return self.task == MULTICLASS

    @property
    def corrects(self) -> bool:
        """Whether a group's trees add to its parent's prediction."""
        return self.own == CORRECTION

    def needs(self, weight: float) -> bool:
        """Whether a model of that weight counts in some answer.

        Where models correct their parents' predictions, each is part of those of its children.
        """
        return weight != 0.0 or self.corrects

    @property
    def finest(self) -> tuple[str, ...]:
        """Key columns of the finest grain."""
        return self.grains[-1]

    @property
    def text_columns(self) -> frozenset[str]:
        """Keys and categories: what is read as text, whatever its type."""
        return frozenset(self.categories).union(*self.grains)

    @property
    def categorical_positions(self) -> list[int]:
        """Columns of the design matrix that hold categories."""
        return [position for position, name in enumerate(self.features) if name in self.categories]

    def count_levels(self, interval: float | None) -> int:
        """How many levels of intervals there are up to this one; 0 where it is not among them."""
        if interval is None or interval not in self.intervals:
            return 0
        return 1 + self.intervals.index(interval)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Self:
        """From its JSON, in which is_count may be absent.

        Raises:
            KeyError: if another key is absent.
        """
        return cls(
            fleet=written["fleet"],
            grains=tuple(map(tuple, written["grains"])),
            features=tuple(written["features"]),
            categories={name: tuple(values) for name, values in written["categories"].items()},
            required=tuple(written["required"]),
            optional=tuple(written["optional"]),
            task=written["task"],
            own=written["own"],
            is_count=written.get("is_count"),
            classes=tuple(written["classes"]),
            prior=tuple(written["prior"]),
            target=ModelTarget.from_dict(written["target"]),
            interval=written["interval"],
            intervals=tuple(written["intervals"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """What its JSON is made from."""
        written = {
            "fleet": self.fleet,
            "grains": list(map(list, self.grains)),
            "features": list(self.features),
            "categories": {name: list(values) for name, values in self.categories.items()},
            "required": list(self.required),
            "optional": list(self.optional),
            "task": self.task,
            "own": self.own,
            "is_count": self.is_count,
            "classes": list(self.classes),
            "prior": list(self.prior),
            "target": self.target.to_dict(),
            "interval": self.interval,
            "intervals": list(self.intervals),
        }
        if self.is_count is None:
            del written["is_count"]
        return written

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From the column model_spec of a run."""
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        """The column model_spec of a run."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


@dataclass(frozen=True)
class Generation:
    """What one training run answers by, besides its boosters: an entry of a pack's ``spec.json``.

    Args:
        model_spec: of the run.
        fleet_version: the run.
        constant: what answers without a model, in link space less the offset; None for multiclass.
        constant_without_offset: the same for rows without offset or scale, in link space; None for
            multiclass.
        answered_by_constant: groups that the constant answers instead of their parents; None where
            an earlier release did not say so.
    """

    model_spec: ModelSpec
    fleet_version: str
    constant: float | None
    constant_without_offset: float | None
    answered_by_constant: tuple[GroupKey, ...] | None = None

    @property
    def plain_constant(self) -> float:
        """What answers rows without offset or scale, in link space; NaN where that is unknown."""
        if self.constant_without_offset is None:
            return np.nan
        return self.constant_without_offset

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Self:
        """From its JSON, in which answered_by_constant may be absent."""
        answered_by_constant: tuple[GroupKey, ...] | None = None
        listed = written.get("answered_by_constant")
        if listed is not None:
            answered_by_constant = tuple(GroupKey(grain, group) for grain, group in listed)
        return cls(
            model_spec=ModelSpec.from_dict(written),
            fleet_version=written["fleet_version"],
            constant=written["constant"],
            constant_without_offset=written["constant_without_offset"],
            answered_by_constant=answered_by_constant,
        )

    def to_dict(self) -> dict[str, Any]:
        """What its JSON is made from."""
        written = {
            **self.model_spec.to_dict(),
            "fleet_version": self.fleet_version,
            "constant": self.constant,
            "constant_without_offset": self.constant_without_offset,
        }
        if self.answered_by_constant is not None:
            written["answered_by_constant"] = list(map(list, self.answered_by_constant))
        return written


def design_matrix(frame: pd.DataFrame, model_spec: ModelSpec) -> npt.NDArray[np.float32]:
    """What LightGBM sees: one row per row, one float32 column per feature in the spec's order.

    Categories become their number in the fleet's list; unseen ones, rare ones and null become NaN,
    as do infinities. Single precision keeps the last digits of a float, which differ from machine
    to machine, out of the trees.
    """
    matrix = np.empty((len(frame), len(model_spec.features)), dtype=np.float32)
    for position, name in enumerate(model_spec.features):
        categories = model_spec.categories.get(name)
        if name not in frame.columns:
            matrix[:, position] = np.nan
        elif categories is None:
            with np.errstate(over="ignore"):
                matrix[:, position] = read_numbers(frame[name])
        else:
            matrix[:, position] = number_values(frame[name], categories)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix


def number_values(values: "pd.Series[Any]", listed: Sequence[str]) -> Floats:
    """The place of each category or class in a list of them; NaN for null and unlisted ones."""
    places = {text: float(place) for place, text in enumerate(listed)}
    codes, distinct = _factorize(values)
    place_of_code = np.full(len(distinct) + 1, np.nan)  # the last is for null, whose code is -1
    for code, value in enumerate(distinct):
        place_of_code[code] = places.get(key_text(value) or "", np.nan)
    of_rows: Floats = place_of_code[codes]
    return of_rows


def read_numbers(column: "pd.Series[Any]") -> Floats:
    """A numeric column as a batch brings it: NaN for null.

    Booleans are 0 and 1, and text of a number is that number.

    Raises:
        InputError: naming the column and its first value that is neither a number nor null.
    """
    if column.dtype.kind in "fiub":
        typed: Floats = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return typed
    values = column.to_numpy(dtype=object)
    numbers: Floats = np.asarray(pd.to_numeric(values, errors="coerce"), dtype=np.float64)
    missing = np.flatnonzero(np.isnan(numbers))
    strange = missing[~pd.isna(values[missing])]
    if len(strange):
        first = strange[0]
        value = _shorten(values[first])
        fault = f"{column.name}: {value} is not a number (row {first + 1} of {len(values)})"
        raise InputError(f"{fault}; expected a number, text such as '12.5', or null")
    return numbers


def _shorten(value: object) -> str:
    text = repr(value)
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]}..."


def check_listed_once(
    columns: Sequence[object], read: Collection[str], where: str = "the batch"
) -> None:
    """Refuse a batch in which a column that is read is listed twice.

    It would be anybody's guess which of them is meant.

    Raises:
        InputError: naming the columns.
    """
    doubled = []
    for name, count in Counter(columns).items():
        if count > 1 and name in read:
            doubled.append(str(name))
    if doubled:
        raise InputError(
            f"{where}: columns listed more than once: {', '.join(doubled)}; "
            "rename or remove all but one of each"
        )


_LINKS: dict[str, tuple[Any, Any]] = {
    "none": (np.asarray, np.asarray),
    "log": (np.log, np.exp),
    "log1p": (np.log1p, np.expm1),
}


def link(values: Floats, transform: str) -> Floats:
    """Target units to link space; what the transform cannot take becomes NaN or an infinity."""
    with np.errstate(all="ignore"):
        linked: Floats = _LINKS[transform][0](values)
    return linked


def inverse_link(values: Floats, transform: str) -> Floats:
    """Link space back to target units."""
    with np.errstate(all="ignore"):
        answers: Floats = _LINKS[transform][1](values)
    return answers


def offset_and_scale(frame: pd.DataFrame, target: ModelTarget) -> tuple[Floats, Floats]:
    """Per row the offset and scale in link space.

    NaN where a declared one is missing, infinite or (scale) not positive.
    """
    offset = _read_declared(frame, target.offset, without=0.0)
    scale = _read_declared(frame, target.scale, without=1.0)
    offset = np.where(np.isfinite(offset), offset, np.nan)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, np.nan)
    return offset, scale


def _read_declared(frame: pd.DataFrame, name: str | None, *, without: float) -> Floats:
    """A column that a target may declare, or a number for every row where it does not."""
    if not name:
        return np.full(len(frame), without)
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return read_numbers(frame[name])


def load_booster(row: Mapping[str, Any], where: str) -> Any:
    """A LightGBM booster from its stored row, once its text has been checked.

    Size, digest and structure must be right: damaged text would end the process.

    Args:
        row: as for `decode_booster`.
        where: the file, for messages.

    Raises:
        PackError: naming the booster and what differs.
    """
    import lightgbm

    text = decode_booster(row, where)
    fault = find_structure_fault(text)
    if fault is None:
        try:
            return lightgbm.Booster(model_str=text)
        except (lightgbm.basic.LightGBMError, ValueError) as error:
            fault = str(error)
    raise PackError(
        f"{where}: booster {row['booster_id']} is not a LightGBM model that can be loaded: "
        f"{fault}; train again"
    )


def decode_booster(row: Mapping[str, Any], where: str) -> str:
    """Native LightGBM text from its stored row, checked by size and digest.

    Args:
        row: booster_id, text (compressed), n_bytes and sha256 of the text.
        where: the file, for messages.

    Raises:
        PackError: naming the booster and what differs.
    """
    name, size = row["booster_id"], row.get("n_bytes")
    if not isinstance(size, int) or not 0 < size <= MAX_BOOSTER_BYTES:
        raise PackError(
            f"{where}: booster {name} claims {size} bytes, expected 1 to {MAX_BOOSTER_BYTES}"
        )
    try:
        raw: bytes = pa.Codec("zstd").decompress(row["text"], decompressed_size=size).to_pybytes()
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise PackError(
            f"{where}: booster {name} cannot be decompressed ({error}); restore the file or train "
            "again"
        ) from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != row.get("sha256"):
        raise PackError(
            f"{where}: booster {name} is damaged: its digest is {digest}, expected "
            f"{row.get('sha256')}; restore the file or train again"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise PackError(f"{where}: booster {name} is not text ({error}); train again") from error


def booster_digest(text: str) -> str:
    """The id of a booster: SHA-256 of its text without the ``parameters:`` section.

    That section holds settings such as the thread count.
    """
    return hashlib.sha256(
        re.sub(r"\nparameters:\n.*?\nend of parameters\n", "\n", text, flags=re.DOTALL).encode()
    ).hexdigest()


_HEADER = re.compile(r"tree\nversion=v4\n(?:\w+(?:=[^\n]*)?\n)+\n", re.ASCII)
# Lines of a tree that hold one number per leaf, or per inner node; where a tree is a single leaf,
# they may be empty.
_OF_LEAVES = {"leaf_value": np.float64, "leaf_weight": np.float64, "leaf_count": np.int64}
_OF_NODES = {
    "split_feature": np.int64,
    "split_gain": np.float64,
    "threshold": np.float64,
    "decision_type": np.int64,
    "left_child": np.int64,
    "right_child": np.int64,
    "internal_value": np.float64,
    "internal_weight": np.float64,
    "internal_count": np.int64,
}
_LINES = (*list(_OF_NODES)[:6], *_OF_LEAVES, *list(_OF_NODES)[6:])
_TREE = re.compile(
    r"Tree=(?P<number>\d+)\nnum_leaves=(?P<n_leaves>\d{1,9})\nnum_cat=(?P<n_cat>\d{1,9})\n"
    + "".join(rf"{name}=(?P<{name}>[-+.\deinfa ]*)\n" for name in _LINES)
    + r"(?:cat_boundaries=(?P<cat_boundaries>[\d ]*)\ncat_threshold=(?P<cat_threshold>[\d ]*)\n)?"
    + r"is_linear=0\nshrinkage=[-+.\de]+\n\n\n",
    re.ASCII,
)
_TAIL = re.compile(
    r"end of trees\n\nfeature_importances:\n(?:[^\n]+=\d+\n)*"
    r"\nparameters:\n(?:\[\w+: [^\n]*\]\n)*\nend of parameters\n"
    r"(?:\npandas_categorical:[^\n]*\n)?"
)
_MAX_DECISION = 11  # one bit for categories, one for the default side, two for what is missing


def find_structure_fault(text: str) -> str | None:
    """What is wrong with a LightGBM text; None if nothing is.

    A text with a fault could crash the process, hang it, or make it read beyond its memory.

    Every tree must have the size that the header gives, and as many nodes and leaves as it claims;
    it must split by existing features and categories; and each of its nodes and leaves must have
    exactly one parent, which comes before it.
    """
    try:
        trees, n_features = _parse_trees(text)
        _check_trees(trees, n_features)
    # DeprecationWarning is how numpy says that a text is not a number.
    except (ValueError, OverflowError, KeyError, DeprecationWarning) as error:
        return str(error)
    return None


def _parse_trees(text: str) -> tuple[list[re.Match[str]], int]:
    """The trees of a model, and how many features it has."""
    header = _HEADER.match(text)
    if header is None:
        raise ValueError("its header is not that of a model of version v4")
    settings = dict(line.partition("=")[::2] for line in header[0].splitlines())
    n_features = int(settings["max_feature_idx"]) + 1
    for name in ("feature_names", "feature_infos"):
        _check_condition(
            len(settings[name].split(" ")) == n_features,
            f"its header describes other than {n_features} features",
        )
    sizes = list(map(int, settings["tree_sizes"].split()))
    per_iteration = int(settings["num_tree_per_iteration"])
    _check_condition(
        per_iteration > 0 and len(sizes) % per_iteration == 0,
        f"{len(sizes)} trees cannot be {per_iteration} per iteration",
    )
    trees = []
    start = header.end()
    for number, size in enumerate(sizes):
        tree = _TREE.match(text, start)
        if tree is None or tree.end() - start != size or tree["number"] != str(number):
            raise ValueError(f"tree {number} is not a tree of the size that the header says")
        trees.append(tree)
        start = tree.end()
    _check_condition(
        _TAIL.fullmatch(text, start),
        "what follows its trees is not their end, importances and parameters",
    )
    return trees, n_features


def _check_trees(trees: Sequence[re.Match[str]], n_features: int) -> None:
    """Look at all trees at once: arrays hold the numbers of one tree after those of another."""
    _check_condition(trees, "it has no tree")
    n_leaves = np.array([int(tree["n_leaves"]) for tree in trees], dtype=np.int64)
    n_cat = np.array([int(tree["n_cat"]) for tree in trees], dtype=np.int64)
    _check_condition((n_leaves >= 1).all(), "a tree has no leaf")
    n_nodes = n_leaves - 1
    is_stump = n_leaves == 1
    for name, kind in _OF_LEAVES.items():
        may_be_empty = is_stump & (name != "leaf_value")
        is_empty = may_be_empty & np.array([not tree[name] for tree in trees])
        _parse_numbers(trees, name, np.where(is_empty, 0, n_leaves), kind)
    nodes = {name: _parse_numbers(trees, name, n_nodes, kind) for name, kind in _OF_NODES.items()}
    feature, decision = nodes["split_feature"], nodes["decision_type"]
    is_known = (
        (feature >= 0) & (feature < n_features) & (decision >= 0) & (decision <= _MAX_DECISION)
    )
    _check_condition(
        is_known.all(), "a node splits by an unknown feature, or has an unknown decision type"
    )
    tree = np.repeat(np.arange(len(trees)), n_nodes)
    first_node = np.cumsum(n_nodes) - n_nodes
    first_leaf = np.cumsum(n_leaves) - n_leaves
    parent = np.tile(np.arange(len(tree)) - first_node[tree], 2)
    child = np.concatenate([nodes["left_child"], nodes["right_child"]])
    both = np.tile(tree, 2)
    is_leaf = child < 0  # leaves are counted from -1 downwards
    is_child = np.where(
        is_leaf, ~child < n_leaves[both], (child < n_nodes[both]) & (child > parent)
    )
    _check_condition(
        is_child.all(), "a node has a child that does not exist, or that comes before it"
    )
    place = np.where(is_leaf, first_leaf[both] + ~child, n_leaves.sum() + first_node[both] + child)
    _check_condition(len(np.unique(place)) == len(place), "a node or leaf has two parents")
    chosen = decision % 2 == 1
    _check_categories(trees, n_cat, tree[chosen], nodes["threshold"][chosen])


def _check_categories(
    trees: Sequence[re.Match[str]],
    n_cat: npt.NDArray[np.int64],
    tree: npt.NDArray[np.int64],
    threshold: Floats,
) -> None:
    """Check that each set of categories begins where the one before it ends.

    And that nodes decide by sets of their own tree.
    """
    has = n_cat > 0
    boundaries = _parse_numbers(trees, "cat_boundaries", np.where(has, n_cat + 1, 0))
    last = np.cumsum((n_cat + 1)[has]) - 1
    grows = np.diff(boundaries) >= 0
    grows[last[:-1]] = True  # from the last of one tree to the first of the next
    _check_condition(
        grows.all() and not boundaries[last - n_cat[has]].any(),
        "the categories of a tree are not as many as it says",
    )
    n_words = np.zeros(len(trees), dtype=np.int64)
    n_words[has] = boundaries[last]
    _parse_numbers(trees, "cat_threshold", n_words)
    _check_condition(
        (threshold == np.floor(threshold)).all()
        and (threshold >= 0).all()
        and (threshold < n_cat[tree]).all(),
        "a node decides by a set of categories that does not exist",
    )


def _parse_numbers(
    trees: Sequence[re.Match[str]], name: str, counts: npt.NDArray[np.int64], kind: type = np.int64
) -> npt.NDArray[Any]:
    """The numbers in one line of every tree, of which each must hold a given count."""
    texts = [tree[name] or "" for tree in trees]
    # One more than the spaces between them; none in an empty line.
    sizes = [text.count(" ") + bool(text) for text in texts]
    _check_condition(sizes == counts.tolist(), f"{name} of a tree has too few or too many numbers")
    numbers: npt.NDArray[Any] = np.fromstring(" ".join(filter(None, texts)), dtype=kind, sep=" ")
    _check_condition(len(numbers) == counts.sum(), f"{name} of a tree is not made of numbers")
    return numbers


def _check_condition(holds: object, fault: str) -> None:
    """Raise the fault as a ValueError, which the caller gives a place and a next step."""
    if not holds:
        raise ValueError(fault)


def read_index(folder: Path, digest: str | None = None) -> dict[str, Any]:
    """A pack's index, checked against its own digest.

    Args:
        folder: the pack.
        digest: the one it must have; None where that is not known.

    Raises:
        PackError: if it is missing, damaged, of another format, or another pack's.
    """
    path = folder / "index.json"
    try:
        written = json.loads(path.read_bytes())
        promised = written["sha256"]
        index = written["index"]
        pack_format = index["format"]
        computed = index_digest(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(
            f"{path}: not the index of a readable pack ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    _check_pack(
        pack_format == PACK_FORMAT,
        path,
        f"format {pack_format!r}, expected {PACK_FORMAT}: of another release of this package; "
        f"{_AGAIN}",
    )
    _check_pack(
        computed == promised,
        path,
        f"damaged: its digest is {computed}, expected {promised}; {_AGAIN}",
    )
    _check_pack(
        digest in (None, promised),
        path,
        f"of fleet {index.get('fleet')!r}, version {index.get('fleet_version')!r}, "
        f"not the pack that was registered; {_AGAIN}",
    )
    return dict(index)


def index_digest(index: Mapping[str, Any]) -> str:
    """SHA-256 of an index, as JSON without spaces, keys sorted."""
    return hashlib.sha256(
        json.dumps(index, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


# What every Parquet file ends with: the length of its footer and a magic word; another such word
# begins it.
_PARQUET_END = 8
_MIN_PARQUET_BYTES = 12


def read_footer(path: Path) -> dict[str, Any]:
    """What identifies a Parquet file whose pages have checksums.

    That is n_bytes, its size, and footer_sha256, the digest of its footer.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a Parquet file.
    """
    with pa.OSFile(str(path)) as file:
        return _read_open_footer(file, str(path))


def _read_open_footer(file: pa.NativeFile, name: str) -> dict[str, Any]:
    size = file.size()
    end = b""
    if size >= _MIN_PARQUET_BYTES:
        end = file.read_at(_PARQUET_END, size - _PARQUET_END)
    length = int.from_bytes(end[:4], "little")
    _check_condition(
        end[4:] == b"PAR1" and 0 < length <= size - _MIN_PARQUET_BYTES,
        f"{name}: {size} bytes that do not end as a Parquet file does",
    )
    footer = file.read_at(length + _PARQUET_END, size - _PARQUET_END - length)
    return {"n_bytes": size, "footer_sha256": hashlib.sha256(footer).hexdigest()}


def check_footer(path: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is not the one that the index names."""
    _check_same_file(read_footer(path), expected, str(path))


def _check_same_file(footer: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    differences = []
    for measure, value in footer.items():
        if value != expected[measure]:
            differences.append(f"{measure} {value}, expected {expected[measure]}")
    _check_pack(
        not differences, name, f"not the file of this pack ({'; '.join(differences)}); {_AGAIN}"
    )


def _check_pack(holds: object, path: Path | str, fault: str) -> None:
    """Raise the fault of a file of the pack as a PackError."""
    if not holds:
        raise PackError(f"{path}: {fault}")


def open_boosters(
    folder: Path, root: str | None, file: Mapping[str, Any], options: Mapping[str, str]
) -> pa.NativeFile:
    """A file of boosters in a pack, or in the store that a shared pack names, open for reading."""
    if root is None:
        return pa.OSFile(str(folder / file["path"]))
    filesystem, path = filesystem_of(root, options)
    return filesystem.open_input_file(f"{path}/{file['path']}")


def filesystem_of(root: str, options: Mapping[str, str]) -> tuple[pf.FileSystem, str]:
    """The file system of a root and the root's path in it.

    Args:
        root: an absolute path, or an object-store URL such as ``s3://bucket/prefix``.
        options: storage options as deltalake takes them; those of S3 are understood.
    """
    if "://" not in root:
        return pf.LocalFileSystem(), root
    if root.startswith(("s3://", "s3a://")):
        endpoint = options.get("AWS_ENDPOINT_URL", "")
        filesystem = pf.S3FileSystem(
            access_key=options.get("AWS_ACCESS_KEY_ID"),
            secret_key=options.get("AWS_SECRET_ACCESS_KEY"),
            session_token=options.get("AWS_SESSION_TOKEN"),
            region=options.get("AWS_REGION"),
            scheme="http" if endpoint.startswith("http://") else "https",
            endpoint_override=endpoint.split("://", 1)[-1] or None,
        )
        return filesystem, root.split("://", 1)[1]
    filesystem, path = pf.FileSystem.from_uri(root)
    return filesystem, path


@dataclass(frozen=True, slots=True)
class Chain:
    """One group of one generation, as its row in ``chains.parquet``.

    Args:
        weight: of its own booster against its parent's answer.
        intervals: half width per level of the generation, in link units over scale; None leaves a
            level, or all of them, to the parent.
        booster_id: None without a model of its own.
        place: number of the file, offset and stored size of the booster.
        n_bytes: size of its text.
        sha256: digest of its text.
    """

    weight: float
    intervals: Sequence[float | None] | None
    booster_id: str | None
    place: tuple[int, int, int]
    n_bytes: int
    sha256: str

    def put_half_widths(self, halves: Floats, rows: npt.NDArray[np.int64]) -> None:
        """Put the group's own half widths, one column per level, over those of its ancestors."""
        n_levels = halves.shape[1]
        for level, half in enumerate((self.intervals or ())[:n_levels]):
            if half is not None:
                halves[rows, level] = half


def answer_by_constant(generation: Generation, n_rows: int) -> Floats:
    """The constant of every row; for multiclass one probability per class."""
    if generation.model_spec.is_multiclass:
        return np.tile(np.asarray(generation.model_spec.prior, dtype=np.float64), (n_rows, 1))
    return np.full(n_rows, generation.constant, dtype=np.float64)


class Contributions:
    """What each feature adds to blended answers.

    A booster's contributions are SHAP values (Lundberg, Erion and Lee 2018, as LightGBM computes
    them), which add up to its raw score. Where its output is another function of that score, a
    probability or a count, they are stretched to add up to the output. Those of a blend are blended
    as the outputs are.

    Args:
        generation: that answers.
        answer: what answers before any model: per row, for multiclass per row and class.
    """

    def __init__(self, generation: Generation, answer: Floats) -> None:
        self._generation = generation
        self._model_spec = generation.model_spec
        self._n_features = len(self._model_spec.features)
        by_class = answer
        if answer.ndim == 1:
            by_class = answer[:, np.newaxis]
        # Per row and class one number per feature; the last is the answer without any feature.
        self._parts = np.zeros((*by_class.shape, self._n_features + 1))
        self._parts[:, :, -1] = by_class
        self._parent_parts = self._parts.copy()
        self._start = self._parts.copy()

    def reset_rows(self, rows: npt.NDArray[np.int64]) -> None:
        """Forget what has been blended in for rows that the constant answers."""
        self._parts[rows] = self._start[rows]

    def add(
        self,
        rows: npt.NDArray[np.int64],
        shap: Floats,
        output: Floats,
        weight: float,
        *,
        corrects: bool,
    ) -> None:
        """Blend a booster in.

        Args:
            rows: that it answers.
            shap: as from `predict(pred_contrib=True)`.
            output: of the booster alone.
            weight: of the group.
            corrects: whether it adds to what its nearest ancestor with a model says.
        """
        own = shap.reshape(len(rows), -1, self._n_features + 1).copy()
        output = output.reshape(len(rows), -1)
        start = self._output_of(own[:, :, -1])
        moved = own[:, :, :-1].sum(axis=2)
        stretch = np.divide(output - start, moved, out=np.ones_like(output), where=moved != 0)
        own[:, :, :-1] *= stretch[:, :, None]
        own[:, :, -1] = output - own[:, :, :-1].sum(axis=2)
        if corrects:
            own += self._parent_parts[rows]
        self._parent_parts[rows] = own
        self._parts[rows] = weight * own + (1.0 - weight) * self._parts[rows]

    def _output_of(self, score: Floats) -> Floats:
        """What a booster gives for a raw score."""
        if self._model_spec.is_multiclass:
            odds = np.exp(score - score.max(axis=1, keepdims=True))
            return np.asarray(odds / odds.sum(axis=1, keepdims=True))
        if not self._model_spec.is_regression:
            return np.asarray(1.0 / (1.0 + np.exp(-score)))
        if self._model_spec.is_count:
            return np.exp(score)
        return score

    def describe_rows(
        self,
        prediction: "pd.Series[Any]",
        anchored: npt.NDArray[np.bool_],
        offset: Floats,
        scale: Floats,
    ) -> list[list[dict[str, Any]]]:
        """The contributions of every row, for people."""
        model_spec = self._model_spec
        parts = self._parts[:, 0, :]
        offsets = np.zeros(len(parts))
        if model_spec.is_multiclass:
            predicted_class = list(map(model_spec.classes.index, prediction))
            parts = self._parts[np.arange(len(parts)), predicted_class]
        elif model_spec.is_regression:
            parts = np.where(
                anchored[:, None], np.where(anchored, scale, 0.0)[:, None] * parts, 0.0
            )
            parts[:, -1] = np.where(anchored, parts[:, -1], self._generation.plain_constant)
            offsets = np.where(anchored, offset, 0.0)
        described = []
        for parts_of_row, offset_of_row in zip(parts, offsets, strict=True):
            described.append(list_contributions(model_spec, parts_of_row, float(offset_of_row)))
        return described


def list_contributions(model_spec: ModelSpec, parts: Floats, offset: float) -> list[dict[str, Any]]:
    """The features that contribute most, by size, and then the rest.

    That is `(other features)`, `(offset)` where the target has one, and `(base)`.

    Args:
        model_spec: of the generation.
        parts: one number per feature, and last the base.
        offset: of the row, link space.

    Returns:
        One {feature, contribution} each; together they add up to the parts and the offset.
    """
    order = np.argsort(-np.abs(parts[:-1]), kind="stable")
    rest = order[TOP_FEATURES:]
    named: list[tuple[str, Any]] = [
        (model_spec.features[place], parts[place]) for place in order[:TOP_FEATURES]
    ]
    if len(rest):
        named.append(("(other features)", parts[rest].sum()))
    if model_spec.target.offset:
        named.append(("(offset)", offset))
    named.append(("(base)", parts[-1]))
    return [{"feature": name, "contribution": float(part)} for name, part in named]


class Blend:
    """The answers to some rows while they are made, from the constant down to the finest grain.

    Args:
        generation: that answers.
        n_rows: how many rows.
        n_levels: how many levels of intervals are needed.
        explain: whether to keep what each feature adds.
    """

    def __init__(
        self, generation: Generation, n_rows: int, *, n_levels: int, explain: bool
    ) -> None:
        self._generation = generation
        self.answer = answer_by_constant(generation, n_rows)
        # What the nearest ancestor's own model says, to which a correction adds.
        self._parent_prediction = self.answer.copy()
        self.half_widths: Floats = np.full((n_rows, n_levels), np.nan)
        self.answered_by = np.full(n_rows, CONSTANT, dtype=object)
        self.booster_id = np.full(n_rows, None, dtype=object)
        self.contributions = Contributions(generation, self.answer) if explain else None

    def reset_rows(self, rows: npt.NDArray[np.int64]) -> None:
        """Let the constant answer some rows, whatever answered them so far."""
        self.answer[rows] = answer_by_constant(self._generation, len(rows))
        self.answered_by[rows] = CONSTANT
        self.booster_id[rows] = None
        if self.contributions is not None:
            self.contributions.reset_rows(rows)

    def needs_booster(self, chain: Chain) -> bool:
        """Whether the group's own model changes its answers, or those of groups that correct it."""
        return chain.booster_id is not None and self._generation.model_spec.needs(chain.weight)

    def add_booster(
        self,
        booster: Any,
        matrix: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
        chain: Chain,
        grain: int,
    ) -> None:
        """Blend a group's own model into the answers to its rows.

        Args:
            booster: of the group.
            matrix: design matrix of these rows.
            rows: their places.
            chain: of the group.
            grain: of the group.
        """
        model_spec = self._generation.model_spec
        weight = chain.weight
        corrects_parent = model_spec.corrects and grain > 0
        own = booster.predict(matrix, num_threads=1)
        if self.contributions is not None:
            shap = booster.predict(matrix, pred_contrib=True, num_threads=1)
            self.contributions.add(rows, shap, own, weight, corrects=corrects_parent)
        if corrects_parent:
            own = own + self._parent_prediction[rows]
        if model_spec.corrects:
            self._parent_prediction[rows] = own
        self.answer[rows] = weight * own + (1.0 - weight) * self.answer[rows]
        if weight != 0.0:
            self.answered_by[rows] = grain_name(model_spec.grains[grain])
            self.booster_id[rows] = chain.booster_id


def finish_answers(
    generation: Generation,
    answer: Floats,
    anchored: npt.NDArray[np.bool_],
    offset: Floats,
    scale: Floats,
    halves: Floats,
) -> dict[str, Any]:
    """Blended answers as prediction, lower and upper, and for classes probabilities."""
    if generation.model_spec.is_regression:
        return convert_to_target_units(
            generation, answer, anchored, offset, scale, widen_half_widths(halves)
        )
    return choose_classes(generation.model_spec, answer)


def convert_to_target_units(
    generation: Generation,
    answer: Floats,
    anchored: npt.NDArray[np.bool_],
    offset: Floats,
    scale: Floats,
    half: Floats,
) -> dict[str, Any]:
    """Blended answers in link space as prediction, lower and upper in target units.

    Half widths are in link space over scale. What is too large for a double becomes NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        linked = np.where(anchored, offset + scale * answer, generation.plain_constant)
        width = np.where(anchored, scale * half, np.nan)
        bounds = {"prediction": linked, "lower": linked - width, "upper": linked + width}
    transform = generation.model_spec.target.transform
    answers = {}
    for name, bound in bounds.items():
        numbers = inverse_link(bound, transform)
        answers[name] = np.where(np.isfinite(numbers), numbers, np.nan)
    return answers


def widen_half_widths(halves: Floats) -> Floats:
    """Per row its half width at the last of the levels; NaN where it has none there.

    It is never below the half width at a lower level, which may come from another ancestor.

    Args:
        halves: one row per row and one column per level, rising; NaN where there is none.
    """
    if not halves.shape[1]:
        return np.full(len(halves), np.nan)
    return np.where(np.isnan(halves[:, -1]), np.nan, np.fmax.reduce(halves, axis=1))


def choose_classes(model_spec: ModelSpec, answer: Floats) -> dict[str, Any]:
    """Blended probabilities as prediction and probabilities."""
    if model_spec.is_multiclass:
        probabilities = answer
        classes = np.array(model_spec.classes, dtype=object)
        prediction: npt.NDArray[Any] = classes[probabilities.argmax(axis=1)]
    else:
        probabilities = np.column_stack([1.0 - answer, answer])
        prediction = answer
    return {
        "prediction": prediction,
        "lower": np.nan,
        "upper": np.nan,
        "probabilities": list(probabilities),
    }


def mark_not_finite(
    predictions: npt.NDArray[Any],
    answered_by: npt.NDArray[np.object_],
    booster_id: npt.NDArray[np.object_],
) -> None:
    """Mark rows whose prediction does not fit a double as answered by nobody, in place.

    Classes always have an answer.
    """
    if predictions.dtype.kind == "f":
        lost = ~np.isfinite(predictions)
        answered_by[lost] = NOT_FINITE
        booster_id[lost] = None


def answer_columns(task: str) -> dict[str, str]:
    """Columns of an answer and their types: double, string, or array<double>."""
    columns = {"prediction": "double", "lower": "double", "upper": "double"}
    if task == MULTICLASS:
        columns["prediction"] = "string"
    if task != REGRESSION:
        columns["probabilities"] = "array<double>"
    return {**columns, "answered_by": "string", "booster_id": "string", "fleet_version": "string"}


class FleetModel:
    """Answers for every group of one fleet version, from a pack.

    Opening reads the index and the specs. Chains are read by row group, and boosters alone, at
    first use; boosters stay in a cache that is bounded in bytes of text. One instance may be used
    by several threads.

    Args:
        folder: the pack.
        cache_bytes: bound of the booster cache.
        digest: of the index, where it is known which pack this must be.
        options: of the object store that a shared pack is in, as deltalake takes them; Arrow finds
            the others as AWS tools do.

    Raises:
        PackError: if a file of the pack is missing, unreadable, of another format, or not the one
            that the index names.
    """

    def __init__(
        self,
        folder: str | Path,
        cache_bytes: int = CACHE_BYTES,
        digest: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._options = dict(options or {})
        self.folder = Path(folder)
        index = read_index(self.folder, digest)
        try:
            self._read_specs(index["spec.json"])
            self._open_chains(index["chains.parquet"])
            self.root = index["boosters"]["root"]
            self.files = index["boosters"]["files"]
            if self.root is None:
                self.check_files()
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise PackError(f"{self.folder}: not a readable pack ({error})") from error
        self.fleet: str = index["fleet"]
        self.fleet_version: str = index["fleet_version"]
        required: dict[str, None] = {}
        optional: dict[str, None] = {}
        for generation in self.generations:
            required |= dict.fromkeys(generation.model_spec.required)
            optional |= dict.fromkeys(generation.model_spec.optional)
        self.required = list(required)
        self.optional = [name for name in optional if name not in required]
        self._serving: dict[GroupKey, int] = {}
        self._chains: dict[tuple[int, str, int], Chain] = {}
        self._read: set[int] = set()
        self._open_files: dict[int, pa.NativeFile] = {}
        self._cache: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._cached_bytes = 0
        self._cache_limit = cache_bytes
        self._lock = threading.RLock()

    def _read_specs(self, entry: Mapping[str, Any]) -> None:
        """Read what the generations answer by, from the file that an entry of the index names."""
        path = self.folder / "spec.json"
        content = path.read_bytes()
        is_same = hashlib.sha256(content).hexdigest() == entry["sha256"]
        _check_pack(is_same, path, f"not the file of this pack; {_AGAIN}")
        written = json.loads(content)
        self.generations = list(map(Generation.from_dict, written["generations"]))
        # Packs of an earlier release have no such groups.
        self._answered_by_constant = [
            frozenset(generation.answered_by_constant or ()) for generation in self.generations
        ]

    def _open_chains(self, entry: Mapping[str, Any]) -> None:
        """Open the file of chains that an entry of the index names."""
        path = self.folder / "chains.parquet"
        self._first_keys = [GroupKey(int(grain), str(group)) for grain, group in entry["first"]]
        check_footer(path, entry)
        self._chains_file = pq.ParquetFile(path, page_checksum_verification=True)
        is_table = self._chains_file.schema_arrow.equals(CHAINS)
        _check_pack(is_table, path, "not a table of chains")

    @property
    def model_spec(self) -> ModelSpec:
        """The model spec of the version's own training run."""
        return self.generations[0].model_spec

    @property
    def task(self) -> str:
        """Regression, binary or multiclass."""
        return self.model_spec.task

    @property
    def interval(self) -> float | None:
        """Level of the intervals where none is asked for; None for classes."""
        return self.model_spec.interval

    @property
    def intervals(self) -> list[float]:
        """Levels of the intervals that may be asked for, rising; none for classes."""
        return list(self.model_spec.intervals)

    @property
    def cached_bytes(self) -> int:
        """Bytes of text of the boosters that are in the cache."""
        return self._cached_bytes

    def chains(self) -> list[Chain]:
        """All chains of all generations."""
        self.groups()
        return list(self._chains.values())

    def groups(self) -> list[GroupKey]:
        """Every group that is served by a chain of its own."""
        for number in range(len(self._first_keys)):
            self._read_chains(number)
        return sorted(self._serving)

    def predict(
        self, frame: pd.DataFrame, *, explain: bool = False, interval: float | None = None
    ) -> pd.DataFrame:
        """Answer every row.

        Args:
            frame: one row per question, with the required columns in any order; a batch may mix
                groups and unseen ones. An optional column that is absent is null in every row.
            explain: also say what made each answer; takes several times as long.
            interval: share of answers that lower and upper should contain, one of the version's
                levels; by default the spec's. A row's nearest ancestor that has a half width at
                that level gives it; it is never below one that the row has at a lower level.

        Returns:
            One row per row and in its order: prediction, lower, upper (target units), answered_by
            (grain, or "constant"), booster_id (null for the constant), fleet_version. Where an
            offset or scale leads to a prediction that does not fit a double, it is NaN and
            answered_by "none (not finite)". For binary the prediction is the probability of the
            last class; for multiclass it is the likeliest class (of equal ones the first). Both
            have one more column: probabilities, a list in the order of the spec's classes; lower
            and upper are null. With `explain` a last column, contributions: a list of {feature,
            contribution}, as from `list_contributions`, whose sum is the prediction in link space;
            for classes it is the probability of the answer (for binary, of the last class).

        Raises:
            InputError: if a required column is missing, a column is listed twice or of the wrong
                kind, or the version has no intervals of that level.
            PackError: if a booster that is needed is damaged.
        """
        self._check_columns(frame)
        level = self._choose_level(interval)
        # Grains are the same in all generations.
        groups = [pd.factorize(group_ids(frame, keys)) for keys in self.model_spec.grains]
        generation = self._choose_generations(groups, len(frame))
        parts = []
        # An empty batch is answered by the first generation: it has the columns of any other.
        for number in np.unique(generation).tolist() or [0]:
            rows = np.flatnonzero(generation == number)
            batch, groups_of_batch = frame, groups
            if len(rows) < len(frame):
                batch = frame.iloc[rows]
                groups_of_batch = _select_groups(groups, rows)
            part = self._answer(batch, groups_of_batch, number, explain=explain, interval=level)
            part.index = pd.Index(rows)
            parts.append(part)
        answers = parts[0]
        if len(parts) > 1:
            answers = pd.concat(parts).sort_index()
        answers.index = frame.index
        return answers

    def _check_columns(self, frame: pd.DataFrame) -> None:
        """Refuse a batch that lacks a required column, or has one of the model's twice."""
        if not frame.columns.is_unique:
            check_listed_once(list(frame.columns), {*self.required, *self.optional})
        missing = [name for name in self.required if name not in frame.columns]
        if missing:
            needs = f"fleet {self.fleet!r} needs: {', '.join(self.required)}"
            if self.optional:
                needs += f", and may lack: {', '.join(self.optional)}"
            raise InputError(
                f"missing columns: {', '.join(missing)}; the batch has: "
                f"{', '.join(map(str, frame.columns))}; {needs}"
            )

    def _choose_level(self, interval: float | None) -> float | None:
        """The level that is asked for; by default the spec's."""
        if interval is None:
            return self.interval
        if interval not in self.intervals:
            available = "answers with classes, which have no interval"
            if self.intervals:
                available = f"has intervals of {', '.join(map(repr, self.intervals))}"
            raise InputError(
                f"interval: {interval!r}; version {self.fleet_version!r} of fleet {self.fleet!r} "
                f"{available}"
            )
        return float(interval)

    def _choose_generations(
        self, groups: Sequence[tuple[Any, Any]], n_rows: int
    ) -> npt.NDArray[np.int64]:
        """Per row the generation that serves its finest known group."""
        generation = np.zeros(n_rows, dtype=np.int64)
        if len(self.generations) == 1:
            return generation
        for grain, (codes, ids) in enumerate(groups):
            of_groups = [self._find_serving(grain, group) for group in ids]
            serving = np.array(of_groups, dtype=np.int64)[codes]
            generation = np.where(serving >= 0, serving, generation)
        return generation

    def _answer(
        self,
        frame: pd.DataFrame,
        groups: Sequence[tuple[Any, Any]],
        number: int,
        *,
        explain: bool,
        interval: float | None,
    ) -> pd.DataFrame:
        """The answers of one generation.

        Args:
            frame: the rows that it answers.
            groups: per grain each row's code and, by code, the group ids.
            number: of the generation.
            explain: whether to keep what each feature adds.
            interval: level of lower and upper.
        """
        generation = self.generations[number]
        model_spec = generation.model_spec
        offset, scale = offset_and_scale(frame, model_spec.target)
        anchored = np.isfinite(offset) & np.isfinite(scale)
        matrix = design_matrix(frame, model_spec)
        blend = Blend(
            generation, len(frame), n_levels=model_spec.count_levels(interval), explain=explain
        )
        for grain, (codes, ids) in enumerate(groups):
            for group, rows_of_group in _split_by_group(codes, ids):
                chain = self._find_chain(grain, group, number)
                if chain is None:
                    continue
                chain.put_half_widths(blend.half_widths, rows_of_group)
                if GroupKey(grain, group) in self._answered_by_constant[number]:
                    # Its own answer, and those above it, are worse than the constant.
                    blend.reset_rows(rows_of_group)
                rows = rows_of_group[anchored[rows_of_group]]
                if len(rows) and blend.needs_booster(chain):
                    blend.add_booster(self._fetch_booster(chain), matrix[rows], rows, chain, grain)
        values = finish_answers(
            generation, blend.answer, anchored, offset, scale, blend.half_widths
        )
        mark_not_finite(values["prediction"], blend.answered_by, blend.booster_id)
        answers = pd.DataFrame(
            {
                **values,
                "answered_by": blend.answered_by,
                "booster_id": blend.booster_id,
                "fleet_version": generation.fleet_version,
            }
        )
        if blend.contributions is not None:
            described = blend.contributions.describe_rows(
                answers["prediction"], anchored, offset, scale
            )
            answers["contributions"] = pd.Series(described, dtype=object)
        return answers

    def check_files(self) -> None:
        """Check that every file of boosters exists, with the right size and footer.

        Opening a pack checks only the files in its own folder; those in a store are otherwise
        opened when a booster in them is needed.

        Raises:
            PackError: naming the file.
        """
        for file in self.files:
            name = f"{self.root or self.folder}/{file['path']}"
            try:
                with open_boosters(self.folder, self.root, file, self._options) as opened:
                    footer = _read_open_footer(opened, name)
            except (OSError, ValueError) as error:
                raise PackError(
                    f"{name}: cannot be read ({error}); restore the file, or materialise "
                    "meta_model again"
                ) from error
            _check_same_file(footer, file, name)

    def _find_serving(self, grain: int, group: str) -> int:
        """Number of the generation that serves a group; -1 where none does."""
        self._read_chains_around(grain, group)
        return self._serving.get(GroupKey(grain, group), -1)

    def _find_chain(self, grain: int, group: str, generation: int) -> Chain | None:
        self._read_chains_around(grain, group)
        return self._chains.get((grain, group, generation))

    def _read_chains_around(self, grain: int, group: str) -> None:
        number = bisect_right(self._first_keys, (grain, group)) - 1
        if number >= 0 and number not in self._read:
            self._read_chains(number)

    def _read_chains(self, number: int) -> None:
        """Keep the chains of one row group."""
        with self._lock:
            if number in self._read:
                return
            try:
                columns = self._chains_file.read_row_group(number).to_pydict()
            except (OSError, IndexError, ValueError, pa.ArrowException) as error:
                raise PackError(
                    f"{self.folder}/chains.parquet: row group {number} cannot be read ({error}); "
                    "restore the file or train again"
                ) from error
            groups = list(map(GroupKey, columns["grain"], columns["group_id"]))
            chains = map(
                Chain,
                columns["weight"],
                columns["intervals"],
                columns["booster_id"],
                zip(columns["file"], columns["offset"], columns["stored_bytes"], strict=True),
                columns["n_bytes"],
                columns["sha256"],
            )
            for group, generation, serves, chain in zip(
                groups, columns["generation"], columns["serves"], chains, strict=True
            ):
                self._chains[*group, generation] = chain
                if serves:
                    self._serving[group] = generation
            self._read.add(number)

    def _fetch_booster(self, chain: Chain) -> Any:
        name = str(chain.booster_id)
        with self._lock:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name][0]
            booster = self._load_booster(chain)
            self._cache[name] = booster, chain.n_bytes
            self._cached_bytes += chain.n_bytes
            while self._cached_bytes > self._cache_limit and len(self._cache) > 1:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached_bytes -= dropped
            return booster

    def chain_rows(self) -> pd.DataFrame:
        """The rows of ``chains.parquet``, without where the boosters are."""
        rows: pd.DataFrame = pq.read_table(
            self.folder / "chains.parquet",
            columns=[
                "grain",
                "group_id",
                "generation",
                "serves",
                "weight",
                "intervals",
                "booster_id",
            ],
            page_checksum_verification=True,
        ).to_pandas()
        return rows

    def serving(self) -> dict[GroupKey, str]:
        """The fleet version that answers each group."""
        self.groups()
        return {
            key: self.generations[number].fleet_version for key, number in self._serving.items()
        }

    def stored_boosters(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Boosters as they are stored, for another pack: rows as `decode_booster` takes them.

        Names that are not in this pack are passed over.

        Raises:
            PackError: if one cannot be read.
        """
        missing = set(names)
        for chain in self.chains():
            if chain.booster_id in missing:
                missing.discard(chain.booster_id)
                yield self._read_stored(chain)

    def _load_booster(self, chain: Chain) -> Any:
        return load_booster(
            self._read_stored(chain), f"{self.folder}/{self.files[chain.place[0]]['path']}"
        )

    def _read_stored(self, chain: Chain) -> dict[str, Any]:
        number, offset, stored = chain.place
        try:
            file = self.files[number]
            if number not in self._open_files:
                self._open_files[number] = open_boosters(
                    self.folder, self.root, file, self._options
                )
            _check_condition(
                stored > 0 and 0 <= offset <= file["n_bytes"] - stored,
                f"{stored} bytes at {offset} are not within {file['path']}",
            )
            text = self._open_files[number].read_at(stored, offset)
        except (OSError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
            raise PackError(
                f"{self.folder}: booster {chain.booster_id} cannot be read ({error}); restore the "
                "pack or train again"
            ) from error
        return {
            "booster_id": chain.booster_id,
            "text": text,
            "n_bytes": chain.n_bytes,
            "sha256": chain.sha256,
        }


def _split_by_group(
    codes: npt.NDArray[np.int64], ids: Sequence[str]
) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Each group of one grain, and the places of its rows."""
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(ids) + 1))
    for place, group in enumerate(ids):
        yield group, order[bounds[place] : bounds[place + 1]]


def _select_groups(
    groups: Sequence[tuple[Any, Any]], rows: npt.NDArray[np.int64]
) -> list[tuple[Any, Any]]:
    """The groups of some rows only."""
    selected = []
    for codes, ids in groups:
        codes_of_rows, places = pd.factorize(codes[rows])
        selected.append((codes_of_rows, ids[places]))
    return selected


def replace_nan_by_none(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers in which a number that is missing is None, because NaN is not JSON."""
    for name in ("prediction", "lower", "upper"):
        column = answers[name]
        if column.dtype.kind == "f" and not np.isfinite(column.to_numpy()).all():
            finite = np.isfinite(column.to_numpy())
            numbers = column.astype(object)
            numbers[~finite] = None
            answers[name] = numbers
    for contributions in answers.get("contributions", ()):
        for part in contributions:
            if not np.isfinite(part["contribution"]):
                part["contribution"] = None
    return answers


def _register() -> None:
    """Hand the model to MLflow, which runs this file to load a registered version."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class RefusedInput(MlflowException, InputError):  # type: ignore[misc,unused-ignore]
        """An `InputError` that MLflow's scoring server answers with status 400 and this message."""

        @property
        def message(self) -> str:
            """The first text that was set: the server would put the whole batch before it."""
            return str(self.__dict__["_message"])

        @message.setter
        def message(self, text: str) -> None:
            self.__dict__.setdefault("_message", text)

    class MetaModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined,misc]
        """The registered model: opens the pack that travels with it."""

        def load_context(self, context: Any) -> None:
            settings = context.model_config or {}
            self.model = FleetModel(
                context.artifacts["pack"],
                digest=settings.get("pack_sha256"),
                options=settings.get("storage_options"),
            )

        def predict(
            self,
            context: Any,  # noqa: ARG002 - as MLflow calls it
            model_input: pd.DataFrame,
            params: dict[str, Any] | None = None,
        ) -> pd.DataFrame:
            try:
                return replace_nan_by_none(self.model.predict(model_input, **(params or {})))
            except InputError as error:
                raise RefusedInput(str(error), error_code=INVALID_PARAMETER_VALUE) from error

    mlflow.models.set_model(MetaModel())


# As a module of the library the file registers nothing; MLflow runs it under a name of its own.
if __name__ != "pipeline.models.meta_model":
    _register()
