import http.client
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks.counting_proxy import CountingProxy, tracking_server


class Echo(BaseHTTPRequestHandler):
    """Answers with the method, the path and what it was sent."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/nothing":
            self.send_response(204)
            self.end_headers()
            return
        content = f"{self.command} {self.path} ".encode() + sent
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Asked", self.headers.get("X-Ask", ""))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815


@pytest.fixture
def proxy() -> Iterator[CountingProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.block_on_close = False
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with CountingProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
        yield proxy
    server.shutdown()
    server.server_close()
    thread.join()


def connection(proxy: CountingProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(proxy.uri.removeprefix("http://"))


def get(proxy: CountingProxy, path: str) -> bytes:
    """What a client that is used once is answered."""
    client = connection(proxy)
    client.request("GET", path)
    content = client.getresponse().read()
    client.close()
    return content


def test_requests_are_handed_on_and_answered(proxy: CountingProxy) -> None:
    client = connection(proxy)
    asked = [
        ("GET", "/a/b?c=d", None, 200, b"GET /a/b?c=d "),
        ("POST", "/a/b", b"body", 200, b"POST /a/b body"),
        ("PUT", "/big", b"x" * 3_000_000, 200, b"PUT /big " + b"x" * 3_000_000),
        ("HEAD", "/a", None, 200, b""),
        ("GET", "/nothing", None, 204, b""),
        ("GET", "/missing", None, 404, b"GET /missing "),
    ]
    for method, path, body, status, content in asked:
        client.request(method, path, body=body, headers={"X-Ask": "yes"})
        answer = client.getresponse()
        assert (answer.status, answer.read()) == (status, content)
        if status != 204:
            assert answer.getheader("X-Asked") == "yes"
    assert proxy.counter.total == len(asked)
    client.close()


def test_a_body_in_chunks_arrives_whole(proxy: CountingProxy) -> None:
    client = connection(proxy)
    client.request(
        "POST",
        "/a",
        body=iter([b"one ", b"two"]),
        encode_chunked=True,
        headers={"Transfer-Encoding": "chunked"},
    )
    assert client.getresponse().read() == b"POST /a one two"
    client.close()


def test_requests_are_counted_by_method_and_prefix(proxy: CountingProxy) -> None:
    for path in (
        "/api/2.0/mlflow/runs/create",
        "/api/2.0/mlflow/runs/get?run_id=1",
        "/api/2.0/mlflow/experiments/get",
    ):
        get(proxy, path)
    assert proxy.counter.by_prefix() == {
        "GET /api/2.0/mlflow/runs": 2,
        "GET /api/2.0/mlflow/experiments": 1,
    }
    assert proxy.counter.by_prefix(1) == {"GET /api": 3}
    proxy.counter.reset()
    assert proxy.counter.total == 0


def test_no_request_of_many_clients_is_lost(proxy: CountingProxy) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: get(proxy, f"/n/{number}"), range(200))) == [
            f"GET /n/{number} ".encode() for number in range(200)
        ]
    assert proxy.counter.by_prefix(1) == {"GET /n": 200}


def test_a_server_that_is_gone_is_a_502_and_counted() -> None:
    with CountingProxy("http://127.0.0.1:9") as proxy:
        client = connection(proxy)
        client.request("GET", "/a")
        assert client.getresponse().status == 502
        client.close()
        assert proxy.counter.total == 1


def test_an_address_that_is_no_http_server_is_refused() -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        CountingProxy("sqlite:///mlflow.db")


@pytest.mark.integration
def test_a_tracking_server_counts_and_is_gone_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    with tracking_server(folder) as server:
        client = MlflowClient(tracking_uri=server.uri)
        run = client.create_run(client.create_experiment("counted"))
        (tmp_path / "note.txt").write_text("noted")
        client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"), "g00000")
        assert server.counter.by_prefix()["PUT /api/2.0/mlflow-artifacts/artifacts"] == 1
        counted = server.counter.total
        MlflowClient(tracking_uri=server.direct_uri).get_run(run.info.run_id)
        assert server.counter.total == counted
        assert list(folder.glob("artifacts/**/note.txt"))
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection(server.direct_uri.removeprefix("http://")).connect()
