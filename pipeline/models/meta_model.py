"""Everything that decides an answer, in one file that needs only numpy, pandas, pyarrow and lightgbm.

MLflow registers this file as the model's code ("models from code"), so it imports nothing of this repository: wherever the
registered version is loaded, this text travels with it. Training and batch scoring import the same functions from here, so
that a group's id, its design matrix and its blended answer have one implementation.

A pack is a folder:

- ``spec.json``: format, fleet, fleet version, grains, features, categories, target, task, classes, constants;
- ``chains.parquet``: one row per group: grain (index), group_id, booster_id or null, weight, interval (link units) or null;
- ``boosters.parquet``: one row per booster and one row group per row: booster_id, sha256 and size of the text, zstd text.
"""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

PACK_FORMAT = 1
CONSTANT = "constant"
INDEPENDENT, CORRECTION = "independent", "correction"
REGRESSION, MULTICLASS = "regression", "multiclass"
MAX_BOOSTER_BYTES = 1 << 30
_CHAIN_COLUMNS = ("grain", "group_id", "booster_id", "weight", "interval")
CACHE_BYTES = 256 << 20

Floats = npt.NDArray[np.float64]

_ESCAPES = {code: f"\\u{code:04X}" for code in range(32)} | {
    ord("\b"): "\\b",
    ord("\f"): "\\f",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
    ord('"'): '\\"',
    ord("\\"): "\\\\",
}


class PackError(Exception):
    """A pack is damaged, of another format, or not the one that was promised; names the file and what differs."""


class InputError(ValueError):
    """A batch to score lacks required columns; lists what is missing and what is there."""


def answer_columns(task: str) -> dict[str, str]:
    """Columns of an answer and their types: double, string, or array<double>."""
    columns = {"prediction": "string" if task == MULTICLASS else "double", "lower": "double", "upper": "double"}
    if task != REGRESSION:
        columns["probabilities"] = "array<double>"
    return {**columns, "answered_by": "string", "booster_id": "string", "fleet_version": "string"}


def key_text(value: object) -> str | None:
    """One key value as text: integers without a point, booleans in lower case, null as None.

    A float that is a whole number reads as that integer, because pandas and MLflow turn nullable integers into floats.
    """
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        number = float(value)
        if np.isnan(number):
            return None
        return str(int(number)) if number.is_integer() else repr(number)
    if isinstance(value, pd.Timestamp | np.datetime64):
        return str(pd.Timestamp(value).date())
    return str(value)


def group_id(values: Sequence[object]) -> str:
    """The id of a group: a JSON array of strings or null, no spaces, non-ASCII kept, e.g. ``["EWR","IAH"]``; ``[]`` is the pooled group.

    Equal, to the letter, to what Spark's ``to_json(array(...))`` gives for the same keys.
    """
    texts = (key_text(value) for value in values)
    return "[" + ",".join("null" if text is None else f'"{text.translate(_ESCAPES)}"' for text in texts) + "]"


def group_ids(frame: pd.DataFrame, keys: Sequence[str]) -> npt.NDArray[np.object_]:
    """The group id of every row."""
    if not keys:
        return np.full(len(frame), group_id(()), dtype=object)
    codes, first = _combinations([frame[key] for key in keys])
    columns = [frame[key].to_numpy() for key in keys]
    ids = np.array([group_id([column[row] for column in columns]) for row in first], dtype=object)
    found: npt.NDArray[np.object_] = ids[codes] if len(ids) else np.empty(0, dtype=object)
    return found


def _combinations(columns: Sequence[pd.Series]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A number per row for its combination of values, and the first row of each number."""
    codes = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, distinct = pd.factorize(column, use_na_sentinel=True)
        codes, _ = pd.factorize(codes * (len(distinct) + 1) + values + 1)
    _, first = np.unique(codes, return_index=True)
    return codes.astype(np.int64), first.astype(np.int64)


def design_matrix(frame: pd.DataFrame, spec: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """What LightGBM sees: one row per row, one float32 column per feature in the spec's order.

    Categories become their number in the fleet's list; unseen ones, rare ones and null become NaN, as do infinities. Single
    precision keeps the last digits of a float, which differ from machine to machine, out of the trees.
    """
    matrix = np.empty((len(frame), len(spec["features"])), dtype=np.float32)
    for position, name in enumerate(spec["features"]):
        categories = spec["categories"].get(name)
        if name not in frame.columns:
            matrix[:, position] = np.nan
        elif categories is None:
            with np.errstate(over="ignore"):
                matrix[:, position] = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            matrix[:, position] = _category_numbers(frame[name], categories)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix


def _category_numbers(values: pd.Series, categories: Sequence[str]) -> Floats:
    numbers = {text: float(number) for number, text in enumerate(categories)}
    codes, distinct = pd.factorize(values)
    lookup = np.array([numbers.get(key_text(value) or "", np.nan) for value in distinct] + [np.nan], dtype=np.float64)
    found: Floats = lookup[codes]
    return found


_LINKS: dict[str, tuple[Any, Any]] = {"none": (np.asarray, np.asarray), "log": (np.log, np.exp), "log1p": (np.log1p, np.expm1)}


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


def offset_and_scale(frame: pd.DataFrame, target: Mapping[str, Any]) -> tuple[Floats, Floats]:
    """Per row the offset and scale in link space; NaN where a declared one is missing, infinite or (scale) not positive."""
    n_rows = len(frame)
    offset = _numbers(frame, target["offset"]) if target["offset"] else np.zeros(n_rows)
    scale = _numbers(frame, target["scale"]) if target["scale"] else np.ones(n_rows)
    offset = np.where(np.isfinite(offset), offset, np.nan)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, np.nan)
    return offset, scale


def _numbers(frame: pd.DataFrame, name: str) -> Floats:
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    numbers: Floats = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers


def decode_booster(row: Mapping[str, Any], where: str) -> str:
    """Native LightGBM text from its stored row, checked by size and digest before LightGBM may see it.

    A damaged text would end the process instead of raising.

    Raises:
        PackError: naming the booster and what differs.
    """
    name, size = row["booster_id"], row.get("n_bytes")
    if not isinstance(size, int) or not 0 < size <= MAX_BOOSTER_BYTES:
        raise PackError(f"{where}: booster {name} claims {size} bytes, expected 1 to {MAX_BOOSTER_BYTES}")
    try:
        text: bytes = pa.Codec("zstd").decompress(row["text"], decompressed_size=size).to_pybytes()
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise PackError(f"{where}: booster {name} cannot be decompressed ({error}); restore the file or train again") from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != row.get("sha256"):
        raise PackError(f"{where}: booster {name} is damaged: its digest is {digest}, expected {row.get('sha256')}; restore the file or train again")
    return text.decode()


class FleetModel:
    """Answers for every group of one fleet version, from a pack.

    Boosters are read alone, at first use, into a cache bounded in bytes of text. One instance may be used by several threads.

    Args:
        folder: the pack.
        cache_bytes: bound of the booster cache.

    Raises:
        PackError: if a file of the pack is missing, unreadable or of another format.
    """

    def __init__(self, folder: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = Path(folder)
        try:
            self.spec: dict[str, Any] = json.loads((self.folder / "spec.json").read_text(encoding="utf-8"))
            chains = pq.read_table(self.folder / "chains.parquet", columns=list(_CHAIN_COLUMNS), page_checksum_verification=True)
            self._boosters = pq.ParquetFile(self.folder / "boosters.parquet", page_checksum_verification=True)
            names = self._boosters.read(columns=["booster_id"]).column("booster_id").to_pylist()
            columns = [chains.column(name).to_pylist() for name in _CHAIN_COLUMNS]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise PackError(f"{self.folder}: not a readable pack ({error})") from error
        form = self.spec.get("format") if isinstance(self.spec, dict) else None
        if form != PACK_FORMAT:
            raise PackError(f"{self.folder}/spec.json: format {form!r}, expected {PACK_FORMAT}")
        self._row_groups = {name: number for number, name in enumerate(names)}
        self._chains = {(grain, group): link_ for grain, group, *link_ in zip(*columns, strict=True)}
        self._cache: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._cached_bytes = 0
        self._cache_limit = cache_bytes
        self._lock = threading.Lock()

    @property
    def task(self) -> str:
        """Regression, binary or multiclass; a pack that does not say is of the time when there was only the first."""
        return str(self.spec.get("task", REGRESSION))

    @property
    def fleet_version(self) -> str:
        """The training run that this pack comes from."""
        return str(self.spec["fleet_version"])

    def groups(self) -> list[tuple[int, str]]:
        """Grain index and id of every group that has an answer chain."""
        return list(self._chains)

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Answer every row.

        Args:
            frame: one row per question, with the spec's required columns in any order; a batch may mix groups and unseen ones.

        Returns:
            One row per row and in its order: prediction, lower, upper (target units), answered_by (grain, or "constant"),
            booster_id (null for the constant), fleet_version. For binary the prediction is the probability of the last class; for
            multiclass it is the likeliest class (of equal ones the first). Both have a column more: probabilities, a list in the
            order of the spec's classes; lower and upper are null.

        Raises:
            InputError: if a required column is missing.
            PackError: if a booster that is needed is damaged.
        """
        missing = [name for name in self.spec["required"] if name not in frame.columns]
        if missing:
            raise InputError(
                f"missing columns: {', '.join(missing)}; the batch has: {', '.join(map(str, frame.columns))}; "
                f"fleet {self.spec['fleet']!r} needs: {', '.join(self.spec['required'])}"
            )
        target = self.spec["target"]
        offset, scale = offset_and_scale(frame, target)
        anchored = np.isfinite(offset) & np.isfinite(scale)
        answer = self._first_answer(len(frame))
        # What the nearest ancestor's own model says, to which a correction adds.
        base = answer.copy()
        corrects = self.spec.get("own") == CORRECTION
        interval = np.full(len(frame), np.nan)
        answered_by = np.full(len(frame), CONSTANT, dtype=object)
        booster_id = np.full(len(frame), None, dtype=object)
        matrix = design_matrix(frame, self.spec)
        for grain, keys in enumerate(self.spec["grains"]):
            codes, ids = pd.factorize(group_ids(frame, keys))
            order = np.argsort(codes, kind="stable")
            bounds = np.searchsorted(codes[order], np.arange(len(ids) + 1))
            for number, group in enumerate(ids):
                chain = self._chains.get((grain, group))
                if chain is None:
                    continue
                name, weight, width = chain
                rows = order[bounds[number] : bounds[number + 1]]
                if width is not None:
                    interval[rows] = width
                rows = rows[anchored[rows]]
                if name is None or not len(rows) or (weight == 0.0 and not corrects):
                    continue
                own = self._booster(name).predict(matrix[rows], num_threads=1)
                if corrects:
                    own = own + base[rows] if grain else own
                    base[rows] = own
                answer[rows] = weight * own + (1.0 - weight) * answer[rows]
                if weight == 0.0:
                    continue
                answered_by[rows] = grain_name(keys)
                booster_id[rows] = name
        values = self._numbers_of(answer, anchored, offset, scale, interval) if self.task == REGRESSION else self._classes_of(answer)
        answered = {**values, "answered_by": answered_by, "booster_id": booster_id, "fleet_version": self.fleet_version}
        return pd.DataFrame({name: answered[name] for name in answer_columns(self.task)}, index=frame.index)

    def _first_answer(self, n_rows: int) -> Floats:
        """The constant of every row; for multiclass one probability per class."""
        if self.task == MULTICLASS:
            return np.tile(np.asarray(self.spec["prior"], dtype=np.float64), (n_rows, 1))
        return np.full(n_rows, float(self.spec["constant"]))

    def _numbers_of(self, answer: Floats, anchored: npt.NDArray[np.bool_], offset: Floats, scale: Floats, interval: Floats) -> dict[str, Any]:
        linked = np.where(anchored, offset + scale * answer, self.spec["constant_without_offset"])
        width = np.where(anchored, scale * interval, np.nan)
        transform = self.spec["target"]["transform"]
        return {
            "prediction": inverse_link(linked, transform),
            "lower": inverse_link(linked - width, transform),
            "upper": inverse_link(linked + width, transform),
        }

    def _classes_of(self, answer: Floats) -> dict[str, Any]:
        probabilities = answer if self.task == MULTICLASS else np.column_stack([1.0 - answer, answer])
        likeliest = np.array(self.spec["classes"], dtype=object)[probabilities.argmax(axis=1)]
        return {
            "prediction": likeliest if self.task == MULTICLASS else answer,
            "lower": np.nan,
            "upper": np.nan,
            "probabilities": list(probabilities),
        }

    def _booster(self, name: str) -> Any:
        with self._lock:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name][0]
            booster, size = self._load(name)
            self._cache[name] = booster, size
            self._cached_bytes += size
            while self._cached_bytes > self._cache_limit and len(self._cache) > 1:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached_bytes -= dropped
            return booster

    def _load(self, name: str) -> tuple[Any, int]:
        import lightgbm

        where = f"{self.folder}/boosters.parquet"
        if name not in self._row_groups:
            raise PackError(f"{where}: booster {name} is named by a chain but is not there; restore the file or train again")
        try:
            row = self._boosters.read_row_group(self._row_groups[name]).to_pylist()[0]
        except (OSError, pa.ArrowException) as error:
            raise PackError(f"{where}: booster {name} cannot be read ({error}); restore the file or train again") from error
        text = decode_booster(row, where)
        return lightgbm.Booster(model_str=text), len(text)


def grain_name(keys: Sequence[str]) -> str:
    """A grain as people write it: ``[origin, dest]``."""
    return f"[{', '.join(keys)}]"


def booster_digest(text: str) -> str:
    """The id of a booster: SHA-256 of its text without the ``parameters:`` section, which holds settings such as the thread count."""
    return hashlib.sha256(re.sub(r"\nparameters:\n.*?\nend of parameters\n", "\n", text, flags=re.DOTALL).encode()).hexdigest()


def _register() -> None:
    """Hand the model to MLflow, which runs this file to load a registered version."""
    import mlflow

    class MetaModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined,misc]
        """The registered model: opens the pack that travels with it."""

        def load_context(self, context: Any) -> None:
            self.model = FleetModel(context.artifacts["pack"])

        def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
            return self.model.predict(model_input)

    mlflow.models.set_model(MetaModel())


# As a module of the library the file registers nothing; MLflow runs it under a name of its own.
if __name__ != "pipeline.models.meta_model":
    _register()
