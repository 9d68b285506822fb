from pathlib import Path

import pytest

from pipeline.crash_points import VARIABLE as CRASH_AT
from pipeline.errors import SpecError
from resources import profiles
from resources.profiles import (
    AS_OF,
    DATA,
    DRY_RUN,
    GROUPS,
    LIMIT_GROUPS,
    PROFILE,
    RETRAIN,
    SPARK_MASTER,
    TRACKING_URI,
    WORKER_PYTHON,
    current_profile,
    fallback_profile,
    java_home,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    read = (
        AS_OF,
        CRASH_AT,
        DATA,
        DRY_RUN,
        GROUPS,
        LIMIT_GROUPS,
        PROFILE,
        RETRAIN,
        SPARK_MASTER,
        TRACKING_URI,
        WORKER_PYTHON,
        "JAVA_HOME",
    )
    for name in read:
        monkeypatch.delenv(name, raising=False)


def test_without_any_variable_everything_is_local(tmp_path: Path) -> None:
    profile = current_profile(tmp_path)
    assert (profile.data_root, profile.tables_root) == (
        str(tmp_path / ".data"),
        str(tmp_path / ".data" / "tables"),
    )
    assert profile.worker_python is None
    assert profile.tracking_uri is None
    assert profile.spark_master.startswith("local[")
    assert profile.spark_master.endswith(
        ",4]"
    )  # a failed task is tried again; plain local[n] would end the job
    assert (profile.as_of, profile.limit_groups, profile.dry_run) == (None, None, False)
    assert (profile.retrain, profile.groups, profile.crash_at) == ("changed", (), "")


def test_the_data_root_counts_from_the_project_unless_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA, "mine/here")
    assert current_profile(tmp_path).data_root == str(tmp_path / "mine" / "here")
    monkeypatch.setenv(DATA, str(tmp_path / "a b"))
    assert current_profile(Path("/elsewhere")).data_root == str(tmp_path / "a b")


def test_a_cluster_has_a_master_and_keeps_the_workers_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROFILE, "cluster")
    monkeypatch.setenv(SPARK_MASTER, "spark://host:7077")
    assert current_profile(tmp_path).worker_python is None
    monkeypatch.setenv(WORKER_PYTHON, "/opt/python/bin/python")
    monkeypatch.setenv(DATA, "/shared/fleets")
    profile = current_profile(tmp_path)
    assert (profile.spark_master, profile.worker_python) == (
        "spark://host:7077",
        "/opt/python/bin/python",
    )
    assert (profile.data_root, profile.tables_root) == ("/shared/fleets", "/shared/fleets/tables")


def test_the_tables_of_a_cluster_may_be_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROFILE, "cluster")
    monkeypatch.setenv(SPARK_MASTER, "spark://host:7077")
    monkeypatch.setenv(DATA, "s3://bucket/fleets/")
    profile = current_profile(tmp_path)
    assert (profile.data_root, profile.tables_root) == (
        str(tmp_path / ".data"),
        "s3://bucket/fleets/tables",
    )


def test_a_cluster_without_a_master_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROFILE, "cluster")
    with pytest.raises(
        SpecError,
        match=(
            f"{SPARK_MASTER} is not set; expected Spark's master URL, "
            f"e.g. {SPARK_MASTER}=spark://host:7077"
        ),
    ):
        current_profile(tmp_path)


def test_on_one_machine_settings_of_clusters_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = current_profile(tmp_path)
    monkeypatch.setenv(SPARK_MASTER, "spark://host:7077")
    monkeypatch.setenv(WORKER_PYTHON, "/opt/python/bin/python")
    assert current_profile(tmp_path) == alone


def test_a_launch_may_be_set_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AS_OF, "2013-12-24")
    monkeypatch.setenv(LIMIT_GROUPS, "12")
    monkeypatch.setenv(DRY_RUN, "1")
    monkeypatch.setenv(RETRAIN, "stale")
    monkeypatch.setenv(CRASH_AT, "run_committed:KILL")
    monkeypatch.setenv(TRACKING_URI, "http://127.0.0.1:5000")
    profile = current_profile(tmp_path)
    assert (profile.as_of, profile.limit_groups, profile.dry_run) == ("2013-12-24", 12, True)
    assert (profile.retrain, profile.crash_at, profile.tracking_uri) == (
        "stale",
        "run_committed:KILL",
        "http://127.0.0.1:5000",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ('["EWR","IAH"]', ('["EWR","IAH"]',)),
        ('["EWR", "IAH"]  ["JFK",null]\n[]', ('["EWR","IAH"]', '["JFK",null]', "[]")),
        ('["a b"],["../x"]', ('["a b"]', '["../x"]')),
        ("[1]", ('["1"]',)),
    ],
)
def test_groups_are_listed_as_json_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv(GROUPS, text)
    assert current_profile(tmp_path).groups == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("0", False),
        ("no", False),
        ("FALSE", False),
        ("1", True),
        ("Yes", True),
        ("true", True),
    ],
)
def test_switches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, expected: bool
) -> None:
    monkeypatch.setenv(DRY_RUN, text)
    assert current_profile(tmp_path).dry_run is expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (PROFILE, "prod", "expected one of: local, cluster"),
        (RETRAIN, "everything", "expected one of: changed, stale, listed, all"),
        (DRY_RUN, "maybe", "expected 1 or 0"),
        (AS_OF, "last week", "expected one such as 2013-12-24"),
        (LIMIT_GROUPS, "many", "whole number of at least 1"),
        (LIMIT_GROUPS, "0", "whole number of at least 1"),
        (LIMIT_GROUPS, "-3", "whole number of at least 1"),
        (LIMIT_GROUPS, "1.5", "whole number of at least 1"),
        (LIMIT_GROUPS, "²", "whole number of at least 1"),
    ],
)
def test_a_bad_value_is_refused_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SpecError) as told:
        current_profile(tmp_path)
    assert str(told.value).startswith(f"{name} is {text!r}")
    assert expected in str(told.value)


def test_a_code_location_keeps_its_places_beside_a_bad_launch_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA, "mine")
    monkeypatch.setenv(LIMIT_GROUPS, "many")
    found = fallback_profile(tmp_path)
    assert (found.data_root, found.limit_groups) == (str(tmp_path / "mine"), None)
    monkeypatch.setenv(DATA, "a?b")
    assert fallback_profile(tmp_path).data_root == str(tmp_path / ".data")


@pytest.mark.parametrize("text", ["EWR", '["EWR"', '"EWR"', '{"a": 1}', '["EWR"] x'])
def test_what_is_no_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(GROUPS, text)
    with pytest.raises(
        SpecError, match=f"{GROUPS}: .* is not a group; expected JSON arrays of keys"
    ):
        current_profile(tmp_path)


def test_an_empty_java_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "")
    assert java_home() is None
    monkeypatch.setenv("JAVA_HOME", "/opt/java")
    assert java_home() == "/opt/java"


def test_nobody_else_reads_the_environment() -> None:
    root = Path(profiles.__file__).parent.parent
    allowed = {"resources/profiles.py", "resources/process_environment.py"}
    readers = {
        str(path.relative_to(root))
        for package in ("pipeline", "assets", "resources")
        for path in (root / package).rglob("*.py")
        if any(
            word in path.read_text(encoding="utf-8")
            for word in ("os.environ", "os.getenv", "environb")
        )
    }
    assert readers == allowed
