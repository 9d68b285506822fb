"""Named crash points: places where a run can be told to die, to test recovery repeatably.

``FLEET_CRASH_AT=<point>:<signal>`` ends the process with that signal when it reaches the point,
e.g. ``boosters_committed:KILL``; ``<point>#3:TERM`` ends it the third time. `POINTS` lists those of
a training run in their order, `STREAM_POINTS` those of a stream that scores, `DECISION_POINTS`
those of a launch of `champion`, `CLEAN_POINTS` those of `many-models clean`. Nothing is armed
unless the variable is set.
"""

import os
import re
import signal
from dataclasses import dataclass

from pipeline.errors import SpecError

# A star marks those that are reached once per wave.
POINTS = {
    "lease_taken": "this run alone may train the fleet",
    "run_planned": "groups are counted, nothing is written",
    "manifest_committed": "what the run pinned is in the table of runs",
    "wave_trained": "* a wave's files are written, none is committed",
    "boosters_committed": "* the wave's boosters are in the store",
    "holdout_committed": "* the wave's held-out predictions are in their table",
    "wave_committed": "* the wave's ledger rows are committed",
    "waves_finished": "every group is trained",
    "blend_learnt": "weights are known",
    "ledger_committed": "the ledger has one complete row per group",
    "run_committed": "the run is marked as finished",
}
# All of them are reached once per micro batch.
STREAM_POINTS = {
    "stream_batch_begun": "* the rows of a micro batch are known",
    "stream_files_written": "* its answers are written, and not committed",
    "stream_committed": "* its answers are committed, and the checkpoint does not know it yet",
}
DECISION_POINTS = {
    "decision_recorded": "who, what and why is in the table of decisions, the alias has not moved",
    "alias_moved": "the version serves, the decision is not marked as carried out",
}
CLEAN_POINTS = {
    "rows_let_go": "* rows of old runs are gone from one table",
}
VARIABLE = "FLEET_CRASH_AT"
_ALL_POINTS = (*POINTS, *STREAM_POINTS, *DECISION_POINTS, *CLEAN_POINTS)
_WRITTEN = re.compile(r"(?P<point>\w+)(#(?P<turn>[1-9]\d*))?:(?P<signal>[A-Z0-9]+)")


@dataclass
class _Armed:
    point: str = ""
    turn: int = 1
    signal: int = 0
    seen: int = 0


_armed = _Armed()


def arm(text: str) -> None:
    """Choose where this process will die; an empty text disarms.

    Raises:
        SpecError: if the point or the signal is unknown.
    """
    global _armed  # noqa: PLW0603 - one process has one fate
    if not text:
        _armed = _Armed()
        return
    written = _WRITTEN.fullmatch(text)
    if written is not None and written["point"] in _ALL_POINTS:
        number = getattr(signal, f"SIG{written['signal'].removeprefix('SIG')}", None)
        if number is not None:
            _armed = _Armed(written["point"], int(written["turn"] or 1), int(number))
            return
    raise SpecError(
        f"{VARIABLE} is {text!r}; expected <point>:<signal> such as boosters_committed:KILL; "
        f"points: {', '.join(_ALL_POINTS)}"
    )


def crash_point(name: str) -> None:
    """Die here if the point is armed and this is the turn."""
    if name != _armed.point:
        return
    _armed.seen += 1
    if _armed.seen == _armed.turn:
        os.kill(os.getpid(), _armed.signal)
