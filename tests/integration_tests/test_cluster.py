"""On a cluster whose workers lack our code a fleet leaves what it leaves on one machine."""

from pathlib import Path

import pytest

from benchmarks.cluster import cluster_differences

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow]


def test_a_fleet_on_a_cluster_equals_the_local_run(tmp_path: Path) -> None:
    found = cluster_differences(tmp_path)
    assert (found.boosters, found.weights, found.answers) == (0, 0, 0)
    # Every group has a ledger row, and every row was answered by the chain's scoring, from files and from the stream.
    assert found.groups > 20
    assert found.rows > 2 * 2_754
