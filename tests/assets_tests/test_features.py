"""A feature table whose inputs did not change is not built again, and its checks are still reported."""

from collections.abc import Callable
from typing import Any

import pytest

from resources.launch_settings import LaunchSettings

pytestmark = pytest.mark.spark


def test_an_unchanged_feature_table_is_not_built_again(
    fleet: Any,
    metadata: Callable[..., Any],
    checks: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = fleet.launch("sales", "features")
    before = metadata(built)["features"]
    with monkeypatch.context() as patched:
        # Nothing may ask Spark for anything.
        patched.setattr("assets.features.build_features", None)
        again = fleet.launch(
            "sales", "features", launch=LaunchSettings(limit_groups=2, dry_run=True)
        )
    assert again.success
    told = metadata(again)["features"]
    assert told["fleet/unchanged"]
    same = [
        "dagster/row_count",
        "dagster/column_schema",
        "fleet/version",
        "fleet/n_targets",
        "fleet/n_future",
    ]
    assert {name: told[name] for name in same} == {name: before[name] for name in same}
    assert {name: (check.passed, check.metadata) for name, check in checks(again).items()} == {
        name: (check.passed, check.metadata) for name, check in checks(built).items()
    }
    # Somebody may insist; another statement, or another version of a raw table, are other inputs.
    forced = metadata(fleet.launch("features", launch=LaunchSettings(retrain="all")))["features"]
    other = metadata(fleet.launch("features", sql=f"{fleet.files.sql} WHERE amount > 0"))[
        "features"
    ]
    fleet.launch("sales", launch=LaunchSettings(retrain="all"))
    later = metadata(fleet.launch("features"))["features"]
    assert [found["fleet/unchanged"] for found in (forced, other, later)] == [False, False, False]
    versions = [found["fleet/version"] for found in (told, forced, other, later)]
    assert versions == [versions[0] + step for step in range(4)]
