import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pyspark.sql import SparkSession

from resources.spark_session import SparkSessionResource

pytestmark = pytest.mark.spark

# In a process of its own: stopping a session here would stop the one that all tests share.
A_RUN_THAT_FAILS = """
import sys
import dagster as dg
from pyspark import SparkContext
from pyspark.sql import SparkSession
from resources.spark_session import SparkSessionResource

seen = []

@dg.op(out={})
def work(spark: SparkSessionResource):
    seen.append(spark.session.sparkContext)
    seen.append(spark.session.range(3).count())
    assert spark.session is spark.session
    raise KeyError("as ordered")

@dg.job(resource_defs={"spark": SparkSessionResource(master="local[2]", memory="1g", scratch=sys.argv[1])})
def job():
    work()

result = job.execute_in_process(raise_on_error=False)
assert not result.success
assert seen[1] == 3
assert SparkContext._active_spark_context is None
assert seen[0]._jsc is None
print("stopped")
"""


def says_stopped(script: str, folder: Path) -> None:
    command = [sys.executable, "-c", script, str(folder)]
    told = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=folder
    )
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.splitlines()[-1] == "stopped"


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_that_fails_stops_its_session(tmp_path: Path) -> None:
    says_stopped(A_RUN_THAT_FAILS, tmp_path)


TWO_THAT_START_TOGETHER = """
import sys
from contextlib import ExitStack
from pyspark import SparkContext
from resources.spark_session import SparkSessionResource

with ExitStack() as held:
    both = [SparkSessionResource(master="local[1]", scratch=sys.argv[1]) for _ in range(2)]
    for one in both:
        held.enter_context(one.yield_for_execution(None))
    assert both[0].session.sparkContext is both[1].session.sparkContext
    assert sorted(one._is_ours for one in both) == [False, True]
assert SparkContext._active_spark_context is None
print("stopped")
"""


@pytest.mark.integration
@pytest.mark.slow
def test_of_two_that_start_together_one_opens_and_stops_the_session(tmp_path: Path) -> None:
    says_stopped(TWO_THAT_START_TOGETHER, tmp_path)


def test_a_session_that_is_open_is_used_and_left_open(spark: SparkSession, tmp_path: Path) -> None:
    resource = SparkSessionResource(
        master="local[1]", scratch=str(tmp_path), conf={"spark.sql.shuffle.partitions": "9"}
    )
    before = spark.conf.get("spark.sql.shuffle.partitions")
    with resource.yield_for_execution(dg.build_init_resource_context()) as held:
        assert held.session.sparkContext is spark.sparkContext
    assert spark.range(3).count() == 3
    assert spark.conf.get("spark.sql.shuffle.partitions") == before


def test_settings_that_results_depend_on(spark: SparkSession) -> None:
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert spark.conf.get("spark.sql.runSQLOnFiles") == "false"
    assert spark.conf.get("spark.task.cpus") == "1"
    assert spark.conf.get("spark.ui.enabled") == "false"
    assert spark.sparkContext.pythonExec == sys.executable


def test_files_cannot_be_read_from_sql(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with pytest.raises(Exception, match=r"TABLE_OR_VIEW_NOT_FOUND|UNSUPPORTED|not supported"):
        spark.sql(f"SELECT * FROM text.`{tmp_path}/secret.txt`").collect()


def test_further_settings_win_over_ours() -> None:
    resource = SparkSessionResource(
        master="local[3]",
        task_cpus=3,
        scratch="scratch",
        conf={"spark.sql.shuffle.partitions": "9", "spark.x": "y"},
    )
    settings = resource._settings()
    assert settings["spark.task.cpus"] == "3"
    assert settings["spark.sql.shuffle.partitions"] == "9"
    assert settings["spark.x"] == "y"


def test_only_executors_of_a_cluster_have_memory_and_an_environment_of_their_own() -> None:
    cluster = SparkSessionResource(
        master="spark://host:7077", executor_memory="2g", scratch="scratch"
    )
    settings = cluster._settings()
    assert settings["spark.executor.memory"] == "2g"
    assert settings["spark.executorEnv.MALLOC_ARENA_MAX"] == "2"
    assert "UseSerialGC" not in settings["spark.driver.extraJavaOptions"]
    alone = cluster.model_copy(update={"master": "local[2,4]"})._settings()
    assert "UseSerialGC" in alone["spark.driver.extraJavaOptions"]
    assert not any(name.startswith("spark.executor") for name in alone)
    assert (
        "spark.executor.memory"
        not in cluster.model_copy(update={"executor_memory": None})._settings()
    )


@pytest.mark.parametrize(
    ("master", "settings", "expected"),
    [
        ("spark://host:7077", {}, sys.executable),
        ("spark://host:7077", {"worker_python": "/opt/python"}, "/opt/python"),
        (
            "yarn",
            {"worker_python": "/opt/python", "conf": {"spark.pyspark.python": "/conf/python"}},
            "/conf/python",
        ),
        (
            "local[2,4]",
            {"worker_python": "/opt/python", "conf": {"spark.pyspark.python": "/conf/python"}},
            sys.executable,
        ),
    ],
)
def test_the_workers_python_is_the_users_on_a_cluster(
    master: str, settings: dict[str, Any], expected: str
) -> None:
    assert SparkSessionResource(master=master, scratch="scratch", **settings)._python() == expected


def test_slots_are_tasks_at_once(spark_resource: SparkSessionResource) -> None:
    assert spark_resource.slots == 2
    assert spark_resource.model_copy(update={"task_cpus": 2}).slots == 1


def test_a_session_that_cannot_start_says_so_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> str:
        raise OSError("no java today")

    monkeypatch.setattr("resources.spark_session.find_java", broken)
    monkeypatch.setattr("pyspark.SparkContext._active_spark_context", None)
    resource = SparkSessionResource(master="local[1]", scratch=str(tmp_path))
    for _ in range(2):
        with pytest.raises(OSError, match="no java today"):
            _ = resource.session


def test_every_setting_says_what_it_does() -> None:
    assert [
        name for name, field in SparkSessionResource.model_fields.items() if not field.description
    ] == []
