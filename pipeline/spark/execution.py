"""How our Spark jobs run: tasks as planned, in Python workers that keep their imports."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession


@contextmanager
def without_adaptive_execution(spark: SparkSession) -> Iterator[None]:
    """Switch adaptive execution off, which would merge the tasks that the plan has laid out."""
    before = spark.conf.get("spark.sql.adaptive.enabled")
    spark.conf.set("spark.sql.adaptive.enabled", "false")
    try:
        yield
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", str(before))


def keep_imports() -> None:
    """Let Python's garbage collector pass over all that a worker holds by now: its imports.

    Spark collects garbage after every task, which takes a tenth of a second with what training
    imports.
    """
    if not gc.get_freeze_count():
        gc.freeze()
