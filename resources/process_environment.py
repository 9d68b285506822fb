"""Settings that child processes (JVM, Python workers) can only take from the environment."""

import os


def set_for_children(**settings: str) -> None:
    """Put settings into this process's environment, which its children inherit."""
    os.environ.update(settings)
