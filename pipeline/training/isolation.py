"""A process of its own for training: a crash in one group cannot take the worker down.

A native crash, an exhausted memory or a hang cannot be caught in the process they happen in. The
worker therefore forks once and hands one group after another to its child. When the child dies, the
worker knows which group it held; it forks again.
"""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.training.outcome import NATIVE_CRASH, TIMEOUT, Outcome

Work = Callable[[bytes], bytes]
ATTEMPTS = 2


class GroupProcess:
    """Runs a function on one message after another in a forked child.

    Args:
        work: message in, message out; it must not raise.
        limit_seconds: a message that takes longer ends the child.
        memory_bytes: address space the child may take beyond what it has at its start; None is
            unlimited.
    """

    def __init__(
        self, work: Work, *, limit_seconds: float, memory_bytes: int | None = None
    ) -> None:
        self._work = work
        self._limit_seconds = limit_seconds
        self._memory_bytes = memory_bytes
        self._child: tuple[int, Connection, int] | None = None

    def run(self, message: bytes) -> bytes | Outcome:
        """The function's answer, or what became of the group.

        `crashed` if the child died of it twice, `failed` if it hung.
        """
        ending = ""
        for _ in range(ATTEMPTS):
            _, pipe, _ = self._child or self._fork()
            try:
                pipe.send_bytes(message)
                if not pipe.poll(self._limit_seconds):
                    self.close()
                    return self._hung()
                return pipe.recv_bytes()
            except (EOFError, OSError):
                ending = self.close()
        error = {
            "error_class": ending,
            "error_message": f"the process that trained it died {ATTEMPTS} times ({ending})",
        }
        return Outcome("crashed", NATIVE_CRASH, error)

    def _hung(self) -> Outcome:
        """The outcome of a group that took too long."""
        seconds = self._limit_seconds
        error = {
            "error_class": "TimeoutError",
            "error_message": f"not finished after {seconds:g} s (tuning.kill_after_seconds)",
            "seconds": seconds,
        }
        return Outcome("failed", TIMEOUT, error)

    def close(self) -> str:
        """End the child; how it ended."""
        if self._child is None:
            return ""
        pid, pipe, lifeline = self._child
        self._child = None
        pipe.close()
        os.close(lifeline)
        os.kill(pid, signal.SIGKILL)  # still there, if only as a zombie: nobody else waits for it
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit status {os.WEXITSTATUS(status)}"

    def _fork(self) -> tuple[int, Connection, int]:
        ours, theirs = mp.Pipe()
        end, lifeline = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                os.close(lifeline)
                # Not the handlers of the process that it was forked from; Ctrl-C is for the parent,
                # whose end is the child's.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                threading.Thread(target=_die_with_parent, args=(end,), daemon=True).start()
                if self._memory_bytes is not None:
                    _limit_memory(self._memory_bytes)
                while True:
                    theirs.send_bytes(self._work(theirs.recv_bytes()))
            finally:
                os._exit(1)
        theirs.close()
        os.close(end)
        self._child = pid, ours, lifeline
        return self._child


def _die_with_parent(end: int) -> None:
    """Wait for the other end of the pipe to close, which happens even when the parent is killed."""
    os.read(end, 1)
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    import resource

    try:
        n_pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    except OSError:  # only Linux has this file, and this limit
        return
    taken = n_pages * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, hard))
