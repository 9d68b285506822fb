"""An object store on this machine: moto's server, in a process of its own."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pf

BUCKET = "fleets"


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """An S3 endpoint with an empty bucket `fleets`, while the block lasts.

    Needs the package moto[server]. It runs in a process of its own, because the store's client does
    not release the interpreter's lock.

    Yields:
        Options of the store, as deltalake takes them.

    Raises:
        TimeoutError: if the server does not answer within half a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = f"-W ignore -m moto.server -H 127.0.0.1 -p {port}"
    command = [sys.executable, *arguments.split()]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - a command of its own
    try:
        _wait_for(port)
        options = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_CONDITIONAL_PUT": "etag",
        }
        pf.S3FileSystem(
            access_key=options["AWS_ACCESS_KEY_ID"],
            secret_key=options["AWS_SECRET_ACCESS_KEY"],
            region=options["AWS_REGION"],
            scheme="http",
            endpoint_override=f"127.0.0.1:{port}",
            allow_bucket_creation=True,
        ).create_dir(BUCKET)
        yield options
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at port {port}; is moto[server] installed?")
