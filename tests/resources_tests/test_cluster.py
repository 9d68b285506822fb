from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pipeline.errors import StoreError
from resources.cluster import LONGEST_SECONDS, Executors, registered_executors, wait_for_executors

MASTER = "spark://host:7077"


@dataclass
class Registrations:
    """Executors that register as time goes by, which it does when somebody waits."""

    steps: dict[float, Executors]
    now: float = 0.0
    lines: list[str] = field(default_factory=list)

    def wait(self, **conf: str) -> Executors:
        return wait_for_executors(
            self._count,
            MASTER,
            conf,
            clock=lambda: self.now,
            pause=self._pause,
            report=self.lines.append,
        )

    def _count(self) -> Executors:
        return self.steps[max(moment for moment in self.steps if moment <= self.now)]

    def _pause(self, seconds: float) -> None:
        self.now += seconds


def registrations(*moments: float) -> Registrations:
    """An executor of two cores at each moment."""
    return Registrations(
        {
            0.0: Executors(0, 0),
            **{moment: Executors(n, 2 * n) for n, moment in enumerate(moments, 1)},
        }
    )


def test_slots_are_counted_once_no_more_executors_come() -> None:
    found = registrations(1, 2, 4)
    assert found.wait() == Executors(3, 6)
    assert found.now > 4
    assert found.lines == []


def test_the_executors_that_were_asked_for_are_waited_for() -> None:
    found = registrations(1, 60)
    assert found.wait(**{"spark.executor.instances": "2"}) == Executors(2, 4)
    assert found.now == 60
    assert found.lines[0] == (
        f"waiting for executors of {MASTER}: 1 registered, expected 2 (spark.executor.instances)\n"
    )


def test_nobody_waits_longer_than_for_the_most_cores() -> None:
    found = registrations(1, 2)
    assert found.wait(**{"spark.cores.max": "4"}) == Executors(2, 4)
    assert found.now == 2
    # A cluster that has fewer is used as it is.
    assert registrations(1, 2).wait(**{"spark.cores.max": "64"}) == Executors(2, 4)


@pytest.mark.parametrize(
    ("moments", "conf", "seen", "expected"),
    [
        ((), {}, 0, "at least 1"),
        ((1,), {"spark.executor.instances": "3"}, 1, "3 (spark.executor.instances)"),
    ],
)
def test_executors_that_do_not_come_end_the_wait(
    moments: tuple[float, ...], conf: dict[str, str], seen: int, expected: str
) -> None:
    found = registrations(*moments)
    with pytest.raises(StoreError) as told:
        found.wait(**conf)
    assert (
        f"{MASTER}: {seen} executors registered within 120 s, expected {expected}; check that"
        in str(told.value)
    )
    assert found.now == LONGEST_SECONDS
    assert found.lines


class Summaries(list[SimpleNamespace]):
    """A sequence as Scala has it."""

    def size(self) -> int:
        return len(self)

    def apply(self, number: int) -> SimpleNamespace:
        return self[number]


@pytest.fixture
def spark_context() -> SimpleNamespace:
    summaries = Summaries(
        SimpleNamespace(id=lambda name=name: name, totalCores=lambda n=n: n)
        for name, n in (("driver", 0), ("0", 4), ("1", 2))
    )
    store = SimpleNamespace(executorList=lambda active: summaries)
    spark = SimpleNamespace(isStopped=lambda: False, statusStore=lambda: store)
    return SimpleNamespace(master=MASTER, _jsc=SimpleNamespace(sc=lambda: spark), spark=spark)


def test_the_driver_is_no_executor(spark_context: SimpleNamespace) -> None:
    assert registered_executors(spark_context) == Executors(2, 6)


def test_a_master_that_does_not_answer_is_named(spark_context: SimpleNamespace) -> None:
    spark_context.spark.isStopped = lambda: True
    with pytest.raises(StoreError, match=f"{MASTER} did not answer"):
        registered_executors(spark_context)
