"""The Spark session: one per run, with its settings in one place."""

import locale
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_pyspark import LazyPySparkResource
from pydantic import Field, PrivateAttr
from pyspark import SparkContext
from pyspark.sql import SparkSession

from pipeline.errors import SpecError
from pipeline.spark.archives import is_local
from pipeline.spark.progress import Report
from pipeline.spark.training import TrainingContext
from resources.cluster import registered_executors, ship_code, wait_for_executors
from resources.java import find_java
from resources.process_environment import set_for_children

LOG_SETTINGS = Path(__file__).parent / "log4j2.properties"
_STARTING = threading.Lock()


class SparkSessionResource(dg.ConfigurableResource):
    """The Spark session of a run, started in the background and stopped with the run.

    A session that is already open in the process is used as it is and left open, for whoever opened
    it to close. Built on `dagster_pyspark.LazyPySparkResource`, which makes the session from its
    configuration but never stops it.
    """

    master: str = Field(description="Master URL, e.g. local[4,4], or spark://host:7077.")
    task_cpus: int = Field(
        default=1,
        ge=1,
        description="CPUs per Spark task (spark.task.cpus), and LightGBM's threads within it.",
    )
    memory: str = Field(
        default="1g",
        description="Memory of the driver's JVM, which on a laptop is Spark's only one, e.g. 4g "
        "for tens of millions of rows.",
    )
    executor_memory: str | None = Field(
        default=None,
        description="Memory of each executor's JVM on a cluster, e.g. 2g; by default Spark's. "
        "Python needs memory beside it.",
    )
    worker_python: str | None = Field(
        default=None,
        description="Python of a cluster's workers, with the packages of the driver's and the same "
        "minor version; by default the driver's path.",
    )
    group_memory: str | None = Field(
        default=None,
        description="Memory that training one group may take, e.g. 8g; one that needs more is "
        "`failed`. By default unlimited.",
    )
    conf: dict[str, str] = Field(
        default_factory=dict, description="Further Spark settings; they win over ours."
    )
    scratch: str = Field(description="Local folder for spilled data and a java wrapper.")
    _session: SparkSession | None = PrivateAttr(default=None)
    _is_ours: bool = PrivateAttr(default=True)
    _failure: BaseException | None = PrivateAttr(default=None)
    _starter: threading.Thread | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(
        self,
        context: dg.InitResourceContext | None,  # noqa: ARG002
    ) -> Iterator["SparkSessionResource"]:
        """Start the session while the run's first steps work; stop it however the run ends.

        Outside of Dagster there is no context.
        """
        self._starter = threading.Thread(target=self._start, name="spark-start", daemon=True)
        self._starter.start()
        try:
            yield self
        finally:
            self._starter.join()
            if self._session is not None and self._is_ours:
                self._session.sparkContext.cancelAllJobs()
                self._session.stop()
            self._session = None

    @property
    def session(self) -> SparkSession:
        """The session; waits until it has started."""
        if self._starter is not None:
            self._starter.join()
        if self._session is None and self._failure is None:
            self._start()
        if self._failure is not None:
            raise self._failure
        assert self._session is not None  # noqa: S101 - started or failed
        return self._session

    @property
    def slots(self) -> int:
        """Tasks that run at once."""
        context = self.session.sparkContext
        if is_local(str(context.master)):
            n_cores = context.defaultParallelism
        else:
            n_cores = registered_executors(context).n_cores
        return max(1, n_cores // self.task_cpus)

    def training_context(self, report: Report) -> TrainingContext:
        """Where a run trains: this session, with the settings of its tasks.

        Args:
            report: called now and then with the progress made.
        """
        return TrainingContext(
            spark=self.session,
            report=report,
            memory_bytes=self.group_memory_bytes,
            slots=self.slots,
            threads=self.task_cpus,
        )

    @property
    def group_memory_bytes(self) -> int | None:
        """`group_memory` as a number of bytes.

        Raises:
            SpecError: if it is not a size.
        """
        if self.group_memory is None:
            return None
        size = re.fullmatch(r"(\d+)\s*([kmgt]?)b?", self.group_memory.strip().lower())
        if size is None:
            raise SpecError(
                f"group_memory is {self.group_memory!r}; expected a size such as 512m or 8g"
            )
        return int(size[1]) * 1024 ** " kmgt".index(size[2] or " ")

    def _start(self) -> None:
        try:
            # One at a time: of two that start together, the second finds the session of the first.
            with _STARTING:
                if SparkContext._active_spark_context is not None:  # noqa: SLF001 - nothing public tells without starting one
                    self._session, self._is_ours = SparkSession.builder.getOrCreate(), False
                    return
                # Few arenas: with one per thread, buffers between the JVM and Python workers take
                # hundreds of megabytes.
                set_for_children(MALLOC_ARENA_MAX="2")
                if not _file_names_are_utf8():
                    # The JVM encodes file names as the locale says, whatever -Dsun.jnu.encoding
                    # says.
                    set_for_children(LC_ALL="C.UTF-8")
                java_home = find_java(Path(self.scratch))
                set_for_children(
                    PYSPARK_PYTHON=self.find_worker_python(),
                    PYSPARK_DRIVER_PYTHON=sys.executable,
                    JAVA_HOME=java_home,
                )
                self._session = LazyPySparkResource(
                    spark_config=self.spark_settings()
                ).spark_session
            context = self._session.sparkContext
            context.setLogLevel("ERROR")
            if not is_local(self.master):
                wait_for_executors(
                    partial(registered_executors, context),
                    self.master,
                    dict(context.getConf().getAll()),
                )
                ship_code(context)
            # PySpark logs each exception that it raises, as a line of JSON.
            logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
        except BaseException as error:  # noqa: BLE001 - raised again where the session is asked for
            self._failure = error

    def find_worker_python(self) -> str:
        """The workers' Python: on one machine always the driver's."""
        if is_local(self.master):
            return sys.executable
        return self.conf.get("spark.pyspark.python") or self.worker_python or sys.executable

    def spark_settings(self) -> dict[str, Any]:
        """The configuration that the session is started with."""
        # A laptop's JVM has a small heap and few cores, where the serial collector takes the least
        # memory, and a heap that is kept tight less still.
        collector = ""
        if is_local(self.master):
            collector = " -XX:+UseSerialGC -XX:MinHeapFreeRatio=10 -XX:MaxHeapFreeRatio=25"
        logging_options = (
            f'-Dlog4j2.configurationFile="{LOG_SETTINGS.as_uri()}" '
            f'-Dmany-models.logs="{self.scratch}/logs" -Dmany-models.pid={os.getpid()}'
        )
        java_options = f"{logging_options} -XX:+IgnoreUnrecognizedVMOptions{collector}"
        settings = {
            "spark.master": self.master,
            "spark.app.name": "many-models",
            "spark.task.cpus": str(self.task_cpus),
            "spark.driver.memory": self.memory,
            "spark.local.dir": self.scratch,
            "spark.sql.warehouse.dir": f"{self.scratch}/warehouse",
            "spark.driver.extraJavaOptions": java_options,
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.execution.arrow.pyspark.enabled": "true",
            "spark.sql.shuffle.partitions": "4",
            "spark.sql.runSQLOnFiles": "false",
            # Or `${env:HOME}` in a text would be replaced before it is parsed.
            "spark.sql.variable.substitute": "false",
            "spark.python.worker.reuse": "true",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }
        if not is_local(self.master):
            settings |= self._cluster_settings()
        return settings | self.conf

    def _cluster_settings(self) -> dict[str, str]:
        # As for local workers, which inherit them.
        settings = {
            "spark.executorEnv.MALLOC_ARENA_MAX": "2",
            "spark.executorEnv.LC_ALL": "C.UTF-8",
        }
        if self.executor_memory is not None:
            settings["spark.executor.memory"] = self.executor_memory
        return settings


def _file_names_are_utf8() -> bool:
    """Whether child processes write file names as this one does.

    Python itself takes UTF-8 where the locale is C.
    """
    return locale.getencoding().lower() == "utf-8"
