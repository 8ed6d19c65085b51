"""The Dockerfile, read as text, and whether settings given beside it are ones of the service."""

import re
from collections.abc import Mapping

from tests.repository.source import ROOT
from vflow_server.settings import ENVIRONMENT_PREFIX, options

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """What each instruction `name` says, in order."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def environment() -> dict[str, str]:
    """The variables that the image sets."""
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


def user_id() -> int:
    """The number of the user that the service runs as in the image."""
    made = re.search(r"useradd --uid (\d+) .*\bvflow\b", DOCKERFILE)
    assert made
    return int(made[1])


def check_settings(variables: Mapping[str, str]) -> None:
    """Fails for a variable of the service that it does not know, or whose value it would refuse."""
    for name, value in variables.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            options()[name.removeprefix(ENVIRONMENT_PREFIX).lower()].parse(value)
