"""The Dockerfile and .dockerignore, read as text, and whether settings given beside them are ones of the service."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.repository.source import ROOT
from vflow_server.settings import ENVIRONMENT_PREFIX, options

DOCKERFILE = (ROOT / "Dockerfile").read_text()
_IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]


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


def context_names() -> set[str]:
    """The files and folders of the repository's root that are sent to the build."""
    return {line[1:] for line in _IGNORED if line.startswith("!")}


def copy_context(target: Path) -> None:
    """Makes the folder `target` what the build sees: what .dockerignore keeps of the repository."""
    left_out = [ROOT / line for line in _IGNORED if line[0] not in "!*"]
    everywhere = [line.removeprefix("**/") for line in _IGNORED if line.startswith("**/")]

    def ignored(folder: str, names: list[str]) -> set[str]:
        paths = [Path(folder, name) for name in names]
        return {path.name for path in paths if path in left_out or any(path.match(each) for each in everywhere)}

    target.mkdir()
    for name in context_names():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
