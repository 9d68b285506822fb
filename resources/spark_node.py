"""`python -m resources.spark_node master|worker ...`: Spark's standalone master or worker.

It runs on the same Java as a session would.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pyspark

from resources.java import find_java
from resources.process_environment import set_for_children

CLASSES = {
    "master": "org.apache.spark.deploy.master.Master",
    "worker": "org.apache.spark.deploy.worker.Worker",
}


def command(role: str, options: list[str]) -> list[str]:
    """The command line of a node.

    Args:
        role: master or worker.
        options: command-line options of Spark's class.
    """
    launcher = Path(pyspark.__file__).parent / "bin" / "spark-class"
    return [str(launcher), CLASSES[role], *options]


def main(arguments: list[str]) -> NoReturn:
    """Replace this process by the node, so that signals reach it; exit status 2 for bad usage."""
    if not arguments or arguments[0] not in CLASSES:
        sys.stderr.write(
            f"usage: python -m resources.spark_node {'|'.join(CLASSES)} [OPTIONS as of Spark's "
            "class]\n"
        )
        raise SystemExit(2)
    scratch = Path(tempfile.gettempdir()) / f"many-models-{os.getuid()}"
    words = command(arguments[0], arguments[1:])
    # Nobody submits applications to the master over HTTP.
    set_for_children(
        JAVA_HOME=find_java(scratch), SPARK_MASTER_OPTS="-Dspark.master.rest.enabled=false"
    )
    os.execv(words[0], words)  # noqa: S606 - our own launcher


if __name__ == "__main__":
    main(sys.argv[1:])
