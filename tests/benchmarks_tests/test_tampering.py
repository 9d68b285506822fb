"""Damaged packs in child processes, in a short form; the full one is `make bench NAME=tampered-boosters`."""

import faulthandler
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tampering
from benchmarks.tampering import DIED, HUNG, OTHER_ANSWERS, RAISED, REFUSED, UNHARMED, in_child
from pipeline.models.meta_model import PackError


def refuse() -> bool:
    raise PackError("damaged")


def fail() -> bool:
    raise KeyError("something else")


def die() -> bool:
    faulthandler.disable()  # pytest's would tell of a death that is meant
    os.kill(os.getpid(), signal.SIGABRT)
    return True


def hang() -> bool:
    signal.raise_signal(signal.SIGALRM)
    return True


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (lambda: True, UNHARMED),
        (lambda: False, OTHER_ANSWERS),
        (refuse, REFUSED),
        (fail, RAISED),
        (die, DIED),
        (hang, HUNG),
    ],
)
def test_what_becomes_of_a_child_is_seen(work: Any, outcome: str) -> None:
    assert in_child(work) == outcome


def test_no_damaged_pack_kills_a_process_or_answers_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tampering, "N_PACKS", 40)
    monkeypatch.setattr(tampering, "N_TEXTS", 60)
    runs: Any = SimpleNamespace(new_folder=lambda: tmp_path)
    found = tampering.tampered(runs)
    assert {
        name: found[name] for name in ("died", "hung", "raised-something-else", "other-answers")
    } == {
        "died": 0,
        "hung": 0,
        "raised-something-else": 0,
        "other-answers": 0,
    }
    assert found["refused"] > 30
    assert found["texts-refused"] > 30
