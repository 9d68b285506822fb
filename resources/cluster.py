"""What a Spark cluster needs: our code on the workers, and executors that have registered."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyspark import SparkContext

import pipeline
from pipeline.errors import StoreError
from pipeline.spark.archives import write_archive

CODE = "many-models.zip"
# Executors of one cluster register within moments of each other.
STEADY_SECONDS = 3.0
LONGEST_SECONDS = 120.0
POLL_SECONDS = 0.25
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Executors:
    """Executors that have registered with a session.

    Args:
        n: how many.
        n_cores: their cores, summed.
    """

    n: int
    n_cores: int


def ship_code(context: SparkContext) -> None:
    """Let the workers import `pipeline`, which is all that tasks use.

    It takes precedence over a worker's own copy of the package.
    """
    folder = Path(pipeline.__file__).parent
    # Kept as long as the session, because executors that register later fetch it, too.
    archive = Path(str(context._temp_dir)) / CODE  # noqa: SLF001 - PySpark's own folder of this session
    write_archive(archive, folder.parent, sorted(folder.rglob("*.py")))
    context.addPyFile(str(archive))


def registered_executors(context: SparkContext) -> Executors:
    """The executors that a session has now.

    Raises:
        StoreError: if the session has ended because its master did not answer.
    """
    spark = context._jsc.sc()  # noqa: SLF001 - PySpark has no list of executors
    if spark.isStopped():
        raise StoreError(
            f"{context.master} did not answer, or refused the application; check that the master "
            "runs and that this machine reaches it"
        )
    summaries = spark.statusStore().executorList(True)  # noqa: FBT003 - Java has no names of arguments
    n = n_cores = 0
    for number in range(summaries.size()):
        summary = summaries.apply(number)
        if summary.id() != "driver":
            n += 1
            n_cores += summary.totalCores()
    return Executors(n, n_cores)


def wait_for_executors(
    count: Callable[[], Executors],
    master: str,
    conf: Mapping[str, str],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    report: Callable[[str], object] = sys.stderr.write,
) -> Executors:
    """Wait until a session has its executors.

    They are complete when there are as many as `spark.executor.instances` or, without that setting,
    as many cores as `spark.cores.max`. As a cluster may have fewer cores than that, it is also
    enough that their number has not changed for some seconds.

    Args:
        count: counts the executors that are registered now.
        master: for messages.
        conf: the session's settings.
        clock: seconds.
        pause: waits that many seconds.
        report: takes a line of progress.

    Raises:
        StoreError: if none has registered after two minutes, or fewer than
            `spark.executor.instances`.
    """
    n_wanted = int(conf.get("spark.executor.instances") or 0)
    max_cores = int(conf.get("spark.cores.max") or 0)
    expected = "at least 1"
    if n_wanted:
        expected = f"{n_wanted} (spark.executor.instances)"
    began = changed = last_line = clock()
    seen = count()
    while True:
        now = clock()
        if n_wanted:
            is_complete = seen.n >= n_wanted
        else:
            is_steady = now - changed >= STEADY_SECONDS
            is_complete = is_steady or 0 < max_cores <= seen.n_cores
        if seen.n and is_complete:
            return seen
        if now - began >= LONGEST_SECONDS:
            raise StoreError(
                f"{master}: {seen.n} executors registered within {LONGEST_SECONDS:.0f} s, expected "
                f"{expected}; check that its workers "
                "run, have free cores and as much free memory as spark.executor.memory, and reach "
                "this machine (spark.driver.host); "
                "with dynamic allocation, set spark.dynamicAllocation.minExecutors"
            )
        if now - last_line >= SECONDS_BETWEEN_LINES:
            report(f"waiting for executors of {master}: {seen.n} registered, expected {expected}\n")
            last_line = now
        pause(POLL_SECONDS)
        registered = count()
        if registered != seen:
            seen = registered
            changed = clock()
