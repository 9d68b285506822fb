import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf

from pipeline.spark.placement import (
    SALT,
    find_salts,
    hash_integers,
    place_by_salt,
    restore_moments,
    travel_types,
)
from pipeline.spark.training import without_adaptive_execution

pytestmark = pytest.mark.spark

INTEGERS = st.integers(-(2**31), 2**31 - 1)


# Many integers an example, because an example is a Spark job.
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
    database=None,
)
@given(st.lists(INTEGERS, min_size=100, max_size=2000))
def test_an_integer_is_hashed_as_spark_hashes_it(spark: SparkSession, numbers: list[int]) -> None:
    numbers = [*numbers, 0, 1, -1, 2**31 - 1, -(2**31)]
    rows = (
        spark.createDataFrame(pd.DataFrame({"n": np.array(numbers, dtype=np.int32)}))
        .select("n", sf.hash("n").alias("hash"))
        .toPandas()
    )
    np.testing.assert_array_equal(hash_integers(rows["n"].to_numpy()), rows["hash"].to_numpy())


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 7, 64, 501])
def test_rows_are_in_the_task_whose_salt_they_carry(spark: SparkSession, n_tasks: int) -> None:
    rows = pd.DataFrame({"task": np.arange(n_tasks, dtype=np.int32), SALT: find_salts(n_tasks)})
    with without_adaptive_execution(spark):
        placed = place_by_salt(spark.createDataFrame(pd.concat([rows, rows])), n_tasks)
        found = placed.select("task", sf.spark_partition_id().alias("place")).toPandas()
        assert placed.rdd.getNumPartitions() == n_tasks
    assert len(found) == 2 * n_tasks
    assert (found["place"] == found["task"]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20_000))
def test_every_task_has_one_salt_that_leads_to_it(n_tasks: int) -> None:
    salts = find_salts(n_tasks)
    assert (hash_integers(salts).astype(np.int64) % n_tasks == np.arange(n_tasks)).all()
    assert (salts == find_salts(n_tasks)).all()
    assert salts.min() >= 0


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_moments_and_names_come_out_of_spark_as_they_were(spark: SparkSession, zone: str) -> None:
    """Also where the session's clock skips or repeats an hour, and where nanoseconds end."""
    texts = [
        "2024-03-10 06:59:59.999999",
        "2024-03-10 07:00:00.000001",
        "2024-11-03 05:30:00",
        "2024-11-03 06:30:00",
        "0001-01-02",
        "9999-12-30",
    ]
    moments = np.array([*texts, "NaT"], dtype="datetime64[us]")
    micros = [None if np.isnat(moment) else int(moment.astype(np.int64)) for moment in moments]
    names = [2**53 + number if number % 2 else None for number in range(len(micros))]
    before = spark.conf.get("spark.sql.session.timeZone")
    spark.conf.set("spark.sql.session.timeZone", zone)
    try:
        rows = spark.createDataFrame(
            list(zip(micros, names, strict=True)), "micros long, name long"
        )
        rows = rows.select(
            sf.lit(1).alias(SALT), "micros", sf.timestamp_micros("micros").alias("moment"), "name"
        )
        travelling, columns = travel_types(rows, {"name", "moment"})
        assert columns == ["moment"]
        found = restore_moments(travelling.toPandas(), columns)
    finally:
        spark.conf.set("spark.sql.session.timeZone", str(before))
    assert list(found.columns) == [SALT, "micros", "moment", "name"]
    np.testing.assert_array_equal(found["moment"].to_numpy(), moments)
    assert found["name"].tolist() == [None if name is None else str(name) for name in names]
