"""Settings that child processes can only be given through the environment.

The JVM, and Spark's Python workers.
"""

import os


def set_for_children(**settings: str) -> None:
    """Put settings into this process's environment, which its children inherit."""
    os.environ.update(settings)
