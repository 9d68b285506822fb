"""How many requests a training run sends to MLflow: a proxy on this machine that counts and forwards, and a server behind it."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
START_SECONDS = 90
STOP_SECONDS = 15
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# Headers of one connection, which a proxy does not pass on (RFC 9110, 7.6.1), and the length, which
# is told anew.
_OF_A_CONNECTION = frozenset(
    {
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    }
)
_WITHOUT_BODY = frozenset({http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED})


class RequestCounter:
    """Remembers every request's method and path, without its query.

    May be used by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[tuple[str, str]] = []

    def add(self, method: str, path: str) -> None:
        """Count one request."""
        with self._lock:
            self._requests.append((method, urlsplit(path).path))

    def reset(self) -> None:
        """Forget all requests."""
        with self._lock:
            self._requests.clear()

    @property
    def total(self) -> int:
        """Requests so far."""
        with self._lock:
            return len(self._requests)

    def by_prefix(self, depth: int = 4) -> Counter[str]:
        """Requests per method and first parts of the path, e.g. `POST /api/2.0/mlflow/runs`.

        Args:
            depth: how many parts; with 4, MLflow's kinds of thing.
        """
        with self._lock:
            return Counter(
                f"{method} /{'/'.join(path.strip('/').split('/')[:depth])}"
                for method, path in self._requests
            )


class CountingProxy:
    """Forwards every request to one server and counts it.

    A context, on a free port of this machine.

    A request is counted when it arrives, whatever becomes of it; one that the server does not
    answer is answered with 502. Bodies are held in memory.

    Args:
        upstream: address of the server, e.g. http://127.0.0.1:5000.
    """

    def __init__(self, upstream: str) -> None:
        self.counter = RequestCounter()
        address = urlsplit(upstream)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(
                f"{upstream!r} is not an address to forward to; expected http://HOST:PORT"
            )
        settings = {"counter": self.counter, "host": address.hostname, "port": address.port or 80}
        handler = type(
            "Handler",
            (_Forwarding,),
            settings | {f"do_{method}": _Forwarding.forward for method in METHODS},
        )
        self._server = _Server((LOOPBACK, 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="counting-proxy",
            daemon=True,
        )

    @property
    def uri(self) -> str:
        """Where clients find it."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Connections that clients keep open must not hold up the end.
    block_on_close = False
    request_queue_size = 128


class _Forwarding(BaseHTTPRequestHandler):
    """One client's connection; it has a connection of its own to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # Headers and body leave in one piece.
    wbufsize = -1
    counter: ClassVar[RequestCounter]
    host: ClassVar[str]
    port: ClassVar[int]

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.host, self.port)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name it has in the base class
        pass

    def forward(self) -> None:
        """Count a request, hand it on, and answer as the server did."""
        self.counter.add(self.command, self.path)
        body = self._body()
        try:
            response, content = self._answered(body)
        except (OSError, http.client.HTTPException) as error:
            self._upstream.close()
            self.send_error(
                http.HTTPStatus.BAD_GATEWAY,
                explain=f"{self.host}:{self.port} does not answer: {error}",
            )
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _OF_A_CONNECTION:
                self.send_header(name, value)
        if self.command == "HEAD":
            content_length = response.getheader("Content-Length")
            if content_length is not None:
                self.send_header("Content-Length", content_length)
        elif response.status not in _WITHOUT_BODY:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes | None:
        """The request's body, also where it comes in chunks; None where there is none."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return b"".join(self._chunks())
        length = self.headers.get("Content-Length")
        return None if length is None else self.rfile.read(int(length))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _answered(self, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer; asked again, once, where it had closed the idle connection."""
        kept_open = self._upstream.sock is not None
        try:
            return self._asked(body)
        except (ConnectionError, http.client.BadStatusLine):
            self._upstream.close()
            if not kept_open:
                raise
            return self._asked(body)

    def _asked(self, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in _OF_A_CONNECTION
        }
        self._upstream.request(self.command, self.path, body=body, headers=headers)
        response = self._upstream.getresponse()
        return response, response.read()


@dataclass(frozen=True)
class TrackingServer:
    """An MLflow server that counts.

    Args:
        uri: the tracking URI for clients; every request through it is counted.
        counter: what was counted; nothing yet of the server's own start.
        direct_uri: the same server, not counted.
    """

    uri: str
    counter: RequestCounter
    direct_uri: str


@contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """A real `mlflow server` on this machine, with SQLite and its own artifact store, behind a counting proxy.

    Args:
        folder: where it keeps mlflow.db, artifacts and log.txt; made if it is not there.

    Raises:
        RuntimeError: if the server does not answer in time; says what it printed last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direct_uri = f"http://{LOOPBACK}:{free_port()}"
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        server = _started(folder, direct_uri, log.fileno())
        try:
            _wait_for(server, direct_uri, folder / "log.txt")
            with CountingProxy(direct_uri) as proxy:
                yield TrackingServer(proxy.uri, proxy.counter, direct_uri)
        finally:
            _stop(server)


def _started(folder: Path, uri: str, log: int) -> subprocess.Popen[bytes]:
    address = urlsplit(uri)
    places = [
        f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}",
        f"--artifacts-destination={folder / 'artifacts'}",
        "--serve-artifacts",
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *places,
        f"--host={LOOPBACK}",
        f"--port={address.port}",
        "--workers=1",
    ]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
    }
    # A session of its own: its workers end with it, and an interrupt of ours reaches it through
    # `_stop` only.
    return subprocess.Popen(
        command,
        cwd=folder,
        env=inherited
        | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for(server: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:  # noqa: S310 - our own server
                if answer.status == http.HTTPStatus.OK:
                    return
        except (OSError, urllib.error.URLError, http.client.HTTPException):
            time.sleep(0.1)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(
        f"the MLflow server at {uri} does not answer (exit status {server.poll()}, {START_SECONDS} "
        f"s at most):\n{last}"
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
