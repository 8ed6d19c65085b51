"""Dockerfile and docker-compose.yml, read as text: they agree with each other and with the service's options."""

import json
import re
from typing import Any

import yaml

from tests.repository.source import ROOT
from vflow_server.settings import ENVIRONMENT_PREFIX, options

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["vflow"]


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


def test_the_service_does_not_run_as_root() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER vflow$", last_stage, re.M)
    assert last_stage.index("USER vflow") < last_stage.index("ENTRYPOINT")


def test_only_the_first_stage_installs() -> None:
    assert len(instructions("FROM")) == 2
    assert "pip install" not in DOCKERFILE.rpartition("\nFROM ")[2]


def test_its_settings_are_options_of_the_service_with_valid_values() -> None:
    settings = {name: value for name, value in environment().items() if name.startswith(ENVIRONMENT_PREFIX)}
    assert settings[f"{ENVIRONMENT_PREFIX}HOST"] == "0.0.0.0"
    for name, value in settings.items():
        options()[name.removeprefix(ENVIRONMENT_PREFIX).lower()].parse(value)


def test_image_and_compose_check_health_alike() -> None:
    checked = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])
    assert SERVICE["healthcheck"]["test"] == ["CMD", *checked] == ["CMD", "vflow", "health"]


def test_the_port_is_the_exposed_one_and_stays_on_this_machine() -> None:
    host, outside, inside = SERVICE["ports"][0].split(":")
    assert host == "127.0.0.1"
    assert inside == outside == instructions("EXPOSE")[0] == environment()[f"{ENVIRONMENT_PREFIX}PORT"]


def test_data_is_on_a_volume() -> None:
    assert SERVICE["volumes"] == ["data:/data"]
    assert instructions("VOLUME") == ["/data"] and environment()[f"{ENVIRONMENT_PREFIX}DATA_DIR"] == "/data"


def test_compose_waits_longer_than_the_service() -> None:
    grace = float(SERVICE["stop_grace_period"].removesuffix("s"))
    assert grace > options()["grace"].parse(options()["grace"].shown)


def test_the_build_context_holds_what_the_build_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {
        "client",
        "proto",
        "server",
        "vflowopt",
        "constraints.txt",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    }
    assert all((ROOT / name).exists() for name in kept)
