"""Damaged packs and boosters, each loaded and used in a child process: who dies, hangs, or answers otherwise without a word."""

import collections
import hashlib
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.runs import Runs
from benchmarks.serving import generated_pack, questions
from pipeline.models.boosters import encode_booster
from pipeline.models.meta_model import (
    FleetModel,
    PackError,
    decode_booster,
    index_digest,
    load_booster,
    read_index,
)

N_PACKS, N_TEXTS = 2_500, 2_500
N_GROUPS = 12
HUNG_SECONDS = 20
UNHARMED, REFUSED, OTHER_ANSWERS, RAISED, DIED, HUNG = (
    "unharmed",
    "refused",
    "other answers",
    "raised something else",
    "died",
    "hung",
)
_EXITS = {0: UNHARMED, 1: REFUSED, 2: OTHER_ANSWERS, 3: RAISED}

Damage = Callable[[random.Random, Path, Path], None]


def tampered(runs: Runs) -> Mapping[str, float]:
    """What became of damaged packs that are opened as the registered one, and of damaged texts whose digests were made to fit."""
    folder = runs.new_folder()
    pack, other = (
        generated_pack(folder / "pack", N_GROUPS),
        generated_pack(folder / "other", 2 * N_GROUPS),
    )
    expected = FleetModel(pack).predict(_QUESTION)
    packs = _tally(lambda seed: _try_pack(seed, pack, other, folder / "copy", expected), N_PACKS)
    texts = [_text_of(pack, number) for number in range(N_GROUPS)]
    answers = [
        load_booster(vars(encode_booster(text)), "text").predict(_INPUTS, num_threads=1)
        for text in texts
    ]
    resealed = _tally(lambda seed: _try_text(seed, texts, answers), N_TEXTS)
    print(f"  packs: {dict(packs)}; texts with digests that fit: {dict(resealed)}", flush=True)
    both = packs + resealed
    return {
        "died": both[DIED],
        "hung": both[HUNG],
        "raised-something-else": both[RAISED],
        "other-answers": packs[OTHER_ANSWERS],
        "refused": packs[REFUSED],
        "unharmed": packs[UNHARMED],
        "texts-refused": resealed[REFUSED],
        "texts-with-other-answers": resealed[OTHER_ANSWERS],
    }


def _tally(attempt: Callable[[int], str], n: int) -> "collections.Counter[str]":
    return collections.Counter(attempt(seed) for seed in range(n))


def _try_pack(seed: int, pack: Path, other: Path, copy: Path, expected: pd.DataFrame) -> str:
    dice = random.Random(seed)  # noqa: S311 - to be repeatable
    digest = index_digest(read_index(pack))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(pack, copy)
    _DAMAGES[seed % len(_DAMAGES)](dice, copy, other)
    return in_child(lambda: FleetModel(copy, digest=digest).predict(_QUESTION).equals(expected))


def _try_text(seed: int, texts: Sequence[str], answers: Sequence[Any]) -> str:
    dice = random.Random(seed)  # noqa: S311 - to be repeatable
    number = dice.randrange(len(texts))
    changed = _TEXT_DAMAGES[seed % len(_TEXT_DAMAGES)](dice, texts[number])

    def answers_as_before() -> bool:
        raw = changed.encode("utf-8", "surrogateescape")
        row = {
            "booster_id": "x",
            "sha256": hashlib.sha256(raw).hexdigest(),
            "n_bytes": len(raw),
            "text": pa.Codec("zstd").compress(raw, asbytes=True),
        }
        return bool(
            np.array_equal(
                load_booster(row, "text").predict(_INPUTS, num_threads=1), answers[number]
            )
        )

    return in_child(answers_as_before)


def in_child(answers_as_before: Callable[[], bool]) -> str:
    """What becomes of a process that does this."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(HUNG_SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = 0 if answers_as_before() else 2
        except PackError:
            code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return HUNG if os.WTERMSIG(status) == signal.SIGALRM else DIED
    return _EXITS[os.WEXITSTATUS(status)]


def _text_of(pack: Path, number: int) -> str:
    row = pq.read_table(pack / "chains.parquet").to_pylist()[number]
    content = (pack / "boosters.parquet").read_bytes()
    return decode_booster(
        row | {"text": content[row["offset"] : row["offset"] + row["stored_bytes"]]}, "pack"
    )


def _a_file(dice: random.Random, folder: Path) -> Path:
    return dice.choice(sorted(folder.iterdir()))


def _flip(dice: random.Random, copy: Path, _: Path) -> None:
    path = _a_file(dice, copy)
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 50])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _truncate(dice: random.Random, copy: Path, _: Path) -> None:
    path = _a_file(dice, copy)
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def _remove(dice: random.Random, copy: Path, _: Path) -> None:
    _a_file(dice, copy).unlink()


def _other_version(dice: random.Random, copy: Path, other: Path) -> None:
    """One to all files are those of another version."""
    names = sorted(path.name for path in copy.iterdir())
    for name in dice.sample(names, dice.randint(1, len(names))):
        shutil.copy(other / name, copy / name)


def _zeros(dice: random.Random, copy: Path, _: Path) -> None:
    """A run of a file is zeros, as after a crash of a file system."""
    path = _a_file(dice, copy)
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.choice([16, 512, 4096]))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


_DAMAGES: tuple[Damage, ...] = (_flip, _truncate, _remove, _other_version, _zeros)


def _text_flip(dice: random.Random, text: str) -> str:
    raw = bytearray(text.encode())
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return raw.decode("utf-8", "surrogateescape")


def _text_cut(dice: random.Random, text: str) -> str:
    return text[: dice.randrange(len(text))]


def _digit(dice: random.Random, text: str) -> str:
    place = dice.choice([match.start() for match in re.finditer(r"\d", text)])
    return text[:place] + dice.choice("0123456789") + text[place + 1 :]


def _index(dice: random.Random, text: str) -> str:
    """A child, a feature or a count is another number, and the tree's size in the header fits."""
    name = dice.choice(
        ["left_child", "right_child", "split_feature", "decision_type", "num_leaves", "num_cat"]
    )
    tree = dice.choice(list(re.finditer(rf"^{name}=(\S+)", text, re.MULTILINE)))
    value = dice.choice(
        ["-1", "0", "1", "7", "99", "-99", "2147483647", "-2147483648", "4294967296"]
    )
    (header,) = re.finditer(r"^tree_sizes=(.*)$", text, re.MULTILINE)
    sizes = header[1].split()
    number = text.count("\nTree=", 0, tree.start()) - 1
    sizes[number] = str(int(sizes[number]) + len(value) - len(tree[1]))
    changed = text[: tree.start(1)] + value + text[tree.end(1) :]
    return changed.replace(header[0], f"tree_sizes={' '.join(sizes)}", 1)


def _line(dice: random.Random, text: str) -> str:
    lines = text.split("\n")
    del lines[dice.randrange(len(lines))]
    return "\n".join(lines)


_TEXT_DAMAGES: tuple[Callable[[random.Random, str], str], ...] = (
    _text_flip,
    _text_cut,
    _digit,
    _index,
    _line,
)
_QUESTION = questions(np.arange(N_GROUPS))
_INPUTS = _QUESTION[[name for name in _QUESTION if name.startswith("x")]].to_numpy(np.float32)
