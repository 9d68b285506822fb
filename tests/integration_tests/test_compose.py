"""docker-compose.yml: what it promises, and its services started natively, as the file says, with a fleet built through all of them."""

from typing import Any

import pytest
import yaml

from benchmarks.compose import (
    FILE,
    SECRETS,
    NativeServices,
    Unavailable,
    materialised_through,
    read_services,
)

DESCRIBED: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]
OURS = {name for name, service in DESCRIBED.items() if "build" in service}


def test_each_service_is_limited_restarted_and_looked_after() -> None:
    for name, service in DESCRIBED.items():
        assert service["restart"] == "unless-stopped", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert service["healthcheck"]["test"][0] == "CMD", name
        image, _, tag = service["image"].partition(":")
        assert tag[:1].isdigit(), f"{image} is not pinned"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), (
            f"{name} is published beyond this machine"
        )
    for name in OURS:
        assert DESCRIBED[name]["cap_drop"] == ["ALL"], name
    assert "\nUSER app\n" in (FILE.parent / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_missing_secret_is_named_and_none_has_a_default(name: str) -> None:
    with pytest.raises(KeyError, match=f"{name} is not set; copy .env.example to .env"):
        read_services({**SECRETS, name: ""})
    assert f"\n{name}=\n" in (FILE.parent / ".env.example").read_text(encoding="utf-8")
    assert SECRETS[name] not in FILE.read_text(encoding="utf-8")


def test_volumes_are_named_and_hold_all_that_must_survive() -> None:
    volumes = {volume for service in read_services(SECRETS) for volume in service.volumes}
    declared = yaml.safe_load(FILE.read_text(encoding="utf-8"))["volumes"]
    assert volumes == set(declared) == {"dagster-db", "mlflow-db", "artifacts", "data", "logs"}


@pytest.mark.integration
@pytest.mark.slow
def test_a_fleet_is_built_through_all_services_of_the_file() -> None:
    try:
        with NativeServices() as running:
            assert {service.name for service in running.services} == set(DESCRIBED)
            assert materialised_through(running) == "SUCCESS"
    except Unavailable as missing:
        pytest.skip(f"services were not started: {missing}")
