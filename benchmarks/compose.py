"""The services of docker-compose.yml, started natively from what the file says, in a network of their own; and a fleet that is built through them.

No container engine is needed, and none is tried: what is read from the file is each service's
command, environment, volumes, order and health check. Host names stand in a hosts file, volumes are
folders. Postgres' image is stood in for by the Postgres of this machine. `python -m
benchmarks.compose --launch` is what asks the webserver, inside that network.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks.runs import PROJECT, NotMeasured

FILE = PROJECT / "docker-compose.yml"
SECRETS = {"DAGSTER_DB_PASSWORD": "one-secret", "MLFLOW_DB_PASSWORD": "another-secret"}
POSTGRES = "postgres:"
HEALTHY_SECONDS = 120.0
RUN_SECONDS = 400.0
FLEET, N_GROUPS = "housing", 3
_VARIABLE = re.compile(r"\$\{(\w+)(?::\?([^}]*))?\}")


class Unavailable(Exception):
    """This machine cannot start the services; says what is missing."""


@dataclass(frozen=True)
class Service:
    """One service of the file.

    Args:
        name: also its host name.
        command: its words; none for Postgres, whose image has its own.
        environment: its variables.
        volumes: folder in the container, by the volume's name.
        needs: services that must be healthy before it starts.
        health: words of its health check.
        image: that it runs.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    volumes: Mapping[str, str]
    needs: Sequence[str]
    health: Sequence[str]
    image: str


def read_services(secrets: Mapping[str, str]) -> list[Service]:
    """The services of the file, each after those that it needs.

    Raises:
        KeyError: naming a variable that must be set and is not among the secrets.
    """
    text = FILE.read_text(encoding="utf-8")
    described = yaml.safe_load(_VARIABLE.sub(lambda found: _value(found, secrets), text))[
        "services"
    ]
    services = {name: _service(name, one) for name, one in described.items()}
    ordered: list[Service] = []
    while len(ordered) < len(services):
        started = {service.name for service in ordered}
        ready = [
            one
            for one in services.values()
            if one.name not in started and started.issuperset(one.needs)
        ]
        if not ready:
            raise NotMeasured(
                f"{FILE.name}: services wait for each other: "
                f"{', '.join(sorted(set(services) - started))}"
            )
        ordered += ready
    return ordered


def _value(found: re.Match[str], secrets: Mapping[str, str]) -> str:
    name, message = found[1], found[2]
    if not secrets.get(name):
        raise KeyError(f"{name} {message or 'is not set'}")
    return secrets[name]


def _service(name: str, described: Mapping[str, Any]) -> Service:
    volumes = dict(volume.split(":")[:2] for volume in described.get("volumes", ()))
    return Service(
        name=name,
        command=[str(word) for word in described.get("command", ())],
        environment={key: str(value) for key, value in described.get("environment", {}).items()},
        volumes=volumes,
        needs=list(described.get("depends_on", ())),
        health=[str(word) for word in described["healthcheck"]["test"][1:]],
        image=described["image"],
    )


class NativeServices:
    """All services, running as processes of this machine; a context that ends them."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self.services = read_services(SECRETS)

    def __enter__(self) -> Self:
        missing = [
            tool
            for tool in ("unshare", "nsenter", "ip", "setpriv", "initdb", "postgres")
            if _tool(tool) is None
        ]
        if missing or os.geteuid():
            raise Unavailable(f"needs root, and {', '.join(missing) or 'nothing else'}")
        with ExitStack() as held:
            # Not below a folder that only root may enter: Postgres runs as a user of its own.
            self.folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="compose-")))
            self.folder.chmod(0o755)
            (self.folder / "home").mkdir()
            shutil.copy(PROJECT / "dagster.cluster.yaml", self.folder / "home" / "dagster.yaml")
            self._inside = held.enter_context(
                _network(self.folder, [service.name for service in self.services])
            )
            for service in self.services:
                held.enter_context(self._running(service))
                self._wait_for(service)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], seconds: float
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command inside the network."""
        return subprocess.run(
            [*self._inside, *words],
            env=self._environment(environment),
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def log_of(self, name: str) -> str:
        """The last lines that a service wrote."""
        return "\n".join(
            (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-20:]
        )

    def _environment(self, own: Mapping[str, str]) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MANY_MODELS", "MLFLOW", "DAGSTER", "SPARK", "PG"))
        }
        tools = [
            str(PROJECT / ".venv" / "bin"),
            *({str(Path(found).parent)} if (found := _tool("initdb")) else ()),
            inherited["PATH"],
        ]
        image = {
            "DAGSTER_HOME": str(self.folder / "home"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": ":".join(tools),
        }
        return {
            **inherited,
            **image,
            **{name: self._here(value, {}) for name, value in own.items()},
        }

    def _here(self, text: str, volumes: Mapping[str, str]) -> str:
        """A word of the file with the container's folders replaced."""
        folders = {
            "/app": str(PROJECT),
            "/dagster/logs": str(self.folder / "logs"),
            "/data": str(self.folder / "data"),
        }
        folders |= {target: str(self.folder / name) for name, target in volumes.items()}
        for target, folder in sorted(folders.items(), key=lambda one: -len(one[0])):
            text = re.sub(rf"(?<![\w/]){re.escape(target)}(?=/|$)", folder, text)
        return text

    @contextmanager
    def _running(self, service: Service) -> Iterator[None]:
        for name in service.volumes:
            (self.folder / name).mkdir(exist_ok=True)
        words = (
            self._postgres(service)
            if service.image.startswith(POSTGRES)
            else [self._here(word, service.volumes) for word in service.command]
        )
        with (self.folder / f"{service.name}.log").open("w") as log:
            process = subprocess.Popen(
                [*self._inside, *words],
                env=self._environment(service.environment),
                cwd=PROJECT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _postgres(self, service: Service) -> list[str]:
        """What the image does: a cluster with one user, who has a password, and one database."""
        (volume,) = service.volumes
        data, told = self.folder / volume, service.environment
        shutil.chown(data, "postgres")
        as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        secret = self.folder / f"{volume}.secret"
        secret.write_text(told["POSTGRES_PASSWORD"])
        shutil.chown(secret, "postgres")
        environment = self._environment({})
        initdb = [
            "initdb",
            "--pgdata",
            str(data),
            "--username",
            told["POSTGRES_USER"],
            "--pwfile",
            str(secret),
            "--auth",
            "scram-sha-256",
        ]
        subprocess.run([*as_postgres, *initdb], env=environment, check=True, capture_output=True)
        making = f"CREATE DATABASE {told['POSTGRES_DB']};".encode()
        single = ["postgres", "--single", "-D", str(data), "postgres"]
        subprocess.run(
            [*as_postgres, *single], env=environment, input=making, check=True, capture_output=True
        )
        return [
            *as_postgres,
            "postgres",
            "-D",
            str(data),
            "-p",
            told.get("PGPORT", "5432"),
            "-k",
            str(data),
            "-c",
            "listen_addresses=*",
        ]

    def _wait_for(self, service: Service) -> None:
        give_up = time.monotonic() + HEALTHY_SECONDS
        while time.monotonic() < give_up:
            if self.run(service.health, service.environment, HEALTHY_SECONDS).returncode == 0:
                return
            time.sleep(0.5)
        raise NotMeasured(
            f"{service.name} is not healthy after {HEALTHY_SECONDS:g} s: "
            f"{self.log_of(service.name)}"
        )


def _tool(name: str) -> str | None:
    """A command of this machine; Postgres' own may be in Debian's folder for them."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (found for place in (*map(str, places), None) if (found := shutil.which(name, path=place))),
        None,
    )


@contextmanager
def _network(folder: Path, hosts: Sequence[str]) -> Iterator[list[str]]:
    """A network with nothing but its own loopback interface, in which each service has its name.

    The words that run a command in it.
    """
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(hosts)}\n")
    inside = (
        f"ip link set lo up && mount --bind {folder}/hosts /etc/hosts && echo ready && "
        "exec sleep infinity"
    )
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", inside],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None  # noqa: S101 - a pipe
        if holder.stdout.readline().strip() != "ready":
            raise Unavailable(
                f"a network of its own cannot be made here: {holder.communicate()[1].strip()}"
            )
        yield ["nsenter", f"--target={holder.pid}", "--net", "--mount", "--"]
    finally:
        holder.kill()
        holder.communicate()


def materialised_through(services: NativeServices) -> str:
    """Launch a trial of an example through the webserver, and wait for it.

    The status that it ends with.
    """
    done = services.run(
        [sys.executable, "-m", "benchmarks.compose", "--launch"], {}, RUN_SECONDS + 60
    )
    if done.returncode:
        told = "\n".join(f"{name}: {services.log_of(name)}" for name in ("code", "daemon"))
        raise NotMeasured(f"{done.stdout[-2000:]}{done.stderr[-2000:]}\n{told}")
    return done.stdout.strip().splitlines()[-1]


def launch() -> int:
    """Ask the webserver for a run and wait for its end; prints the status."""
    from dagster_graphql import DagsterGraphQLClient

    client = DagsterGraphQLClient("127.0.0.1", port_number=3000)
    config = {"resources": {"launch": {"config": {"limit_groups": N_GROUPS}}}}
    run_id = client.submit_job_execution(f"{FLEET}_retrain", run_config=config)
    give_up = time.monotonic() + RUN_SECONDS
    status = client.get_run_status(run_id)
    while status.value not in ("SUCCESS", "FAILURE", "CANCELED") and time.monotonic() < give_up:
        time.sleep(1)
        status = client.get_run_status(run_id)
    print(status.value)
    return int(status.value != "SUCCESS")


def compose() -> Mapping[str, float]:
    """The figure: services of the file that were started natively and are healthy, and fleets that were materialised through them."""
    with NativeServices() as running:
        status = materialised_through(running)
        return {
            "services": len(running.services),
            "of": len(read_services(SECRETS)),
            "materialised": float(status == "SUCCESS"),
        }


if __name__ == "__main__":
    if sys.argv[1:] == ["--launch"]:
        sys.exit(launch())
    print(compose())
