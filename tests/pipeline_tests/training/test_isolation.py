import faulthandler
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pipeline.training.isolation import GroupProcess, Work
from pipeline.training.outcome import Outcome

PLENTY = 60.0


def echo(message: bytes) -> bytes:
    return b"of " + message


def spoilt(harmful: bytes, harm: Work) -> Work:
    """Does harm for one message and answers all others."""
    return lambda message: harm(message) if message == harmful else echo(message)


def killed(number: signal.Signals) -> Work:
    def work(message: bytes) -> bytes:
        faulthandler.disable()  # pytest's would tell of a crash that is meant
        os.kill(os.getpid(), number)
        time.sleep(PLENTY)
        return message

    return work


def slow(message: bytes) -> bytes:
    time.sleep(PLENTY)
    return message


def outcome_of(answer: bytes | Outcome) -> Outcome:
    assert isinstance(answer, Outcome), answer
    return answer


def test_answers_come_back_from_one_child_that_is_not_this_process() -> None:
    with closing(
        GroupProcess(lambda _: str(os.getpid()).encode(), limit_seconds=PLENTY)
    ) as process:
        first, second = process.run(b"a"), process.run(b"b")
    assert first == second != str(os.getpid()).encode()


def test_long_messages_and_answers_travel_whole() -> None:
    with closing(GroupProcess(lambda message: message * 2, limit_seconds=PLENTY)) as process:
        assert process.run(b"x" * 10**7) == b"x" * 2 * 10**7


def test_a_group_whose_process_dies_once_is_tried_again(tmp_path: Path) -> None:
    mark = tmp_path / "died"

    def dies_once(message: bytes) -> bytes:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return echo(message)

    with closing(GroupProcess(dies_once, limit_seconds=PLENTY)) as process:
        assert process.run(b"a") == b"of a"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_a_group_that_kills_its_process_twice_is_crashed(
    tmp_path: Path, number: signal.Signals
) -> None:
    tried = tmp_path / "tried"

    def dies(message: bytes) -> bytes:
        with tried.open("a") as file:
            file.write("x")
        return killed(number)(message)

    with closing(GroupProcess(dies, limit_seconds=PLENTY)) as process:
        outcome = outcome_of(process.run(b"a"))
    assert (outcome.status, outcome.reason, outcome.ledger["error_class"]) == (
        "crashed",
        "native_crash",
        number.name,
    )
    assert "died 2 times" in outcome.ledger["error_message"]
    assert outcome.booster is None
    assert tried.read_text() == "xx"


def test_a_group_that_ends_its_process_is_crashed_with_its_exit_status() -> None:
    with closing(GroupProcess(lambda _: os._exit(3), limit_seconds=PLENTY)) as process:
        outcome = outcome_of(process.run(b"a"))
    assert (outcome.status, outcome.ledger["error_class"]) == ("crashed", "exit status 3")


def test_a_group_that_hangs_is_ended_and_failed() -> None:
    with closing(GroupProcess(slow, limit_seconds=0.2)) as process:
        outcome = outcome_of(process.run(b"a"))
    assert (outcome.status, outcome.reason, outcome.ledger["error_class"]) == (
        "failed",
        "timeout",
        "TimeoutError",
    )
    assert outcome.ledger["error_message"] == "not finished after 0.2 s (tuning.kill_after_seconds)"
    assert outcome.ledger["seconds"] == 0.2


def hoard(message: bytes) -> bytes:
    try:
        hoarded = [np.ones(1 << 24) for _ in range(1000)]
    except MemoryError:
        return b"MemoryError"
    return str(len(hoarded)).encode()


def test_memory_is_limited_beyond_what_the_process_has() -> None:
    with closing(
        GroupProcess(spoilt(b"much", hoard), limit_seconds=PLENTY, memory_bytes=1 << 29)
    ) as process:
        answer = process.run(b"much")
        assert answer == b"MemoryError" or outcome_of(answer).status == "crashed"
        assert process.run(b"a") == b"of a"


def test_a_limit_leaves_room_for_what_it_allows() -> None:
    with closing(
        GroupProcess(
            lambda _: str(np.ones(1 << 24).nbytes).encode(),
            limit_seconds=PLENTY,
            memory_bytes=1 << 29,
        )
    ) as process:
        assert process.run(b"a") == str(8 << 24).encode()


@pytest.mark.parametrize(
    "harm", [killed(signal.SIGKILL), killed(signal.SIGSEGV), lambda _: os._exit(1), slow]
)
def test_groups_after_a_harmful_one_are_answered(harm: Work) -> None:
    with closing(GroupProcess(spoilt(b"bad", harm), limit_seconds=1.0)) as process:
        assert process.run(b"a") == b"of a"
        assert outcome_of(process.run(b"bad")).booster is None
        assert [process.run(message) for message in (b"b", b"c")] == [b"of b", b"of c"]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    """Whether a process ends within a while."""
    deadline = time.monotonic() + PLENTY
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_closing_ends_the_child() -> None:
    process = GroupProcess(lambda _: str(os.getpid()).encode(), limit_seconds=PLENTY)
    answer = process.run(b"a")
    assert isinstance(answer, bytes)
    process.close()
    assert not is_alive(int(answer))
    assert process.close() == ""


@pytest.fixture
def orphan_maker(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A process that holds a child which is busy, and that child."""
    pids = tmp_path / "pids"

    def busy(message: bytes) -> bytes:
        (tmp_path / "child").write_text(str(os.getpid()))
        (tmp_path / "child").rename(pids)
        return slow(message)

    parent = mp.get_context("fork").Process(
        target=lambda: GroupProcess(busy, limit_seconds=PLENTY).run(b"a")
    )
    parent.start()
    assert parent.pid is not None
    deadline = time.monotonic() + PLENTY
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield parent.pid, int(pids.read_text())
    parent.kill()
    parent.join()


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc whether a process is there"
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_busy_child_dies_with_its_parent(
    orphan_maker: tuple[int, int], number: signal.Signals
) -> None:
    parent, child = orphan_maker
    assert is_alive(child)
    os.kill(parent, number)
    assert ends(child)
