"""Every command, flag and variable that is written down for an operator is one that `vflow` has."""

import re
from pathlib import Path

import pytest

from tests.repository.help import told_by
from tests.repository.source import ROOT
from vflow_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, options

COMMANDS = ("serve", "token", "chat", "strategies", "retune", "health")
COMMAND = re.compile(rf"\bvflow ((?:{'|'.join(COMMANDS)})\b[^\n`\"]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
VARIABLE = re.compile(rf"\b{ENVIRONMENT_PREFIX}[A-Z_]*[A-Z]")
WRITTEN = [
    path
    for pattern in ("*.md", "docs/**/*.md", "Dockerfile", "docker-compose.yml", "deploy/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.suffix != ".json" and "__pycache__" not in path.parts
]


def commands(text: str) -> list[tuple[tuple[str, ...], set[str]]]:
    """The commands in `text`, each with the flags that are given to it."""
    found = []
    for words in (match.split("#")[0].split() for match in COMMAND.findall(text)):
        deep = 2 if words[0] == "strategies" and len(words) > 1 and words[1].isalpha() else 1
        found.append((tuple(words[:deep]), set(FLAG.findall(" ".join(words)))))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_commands_have_the_flags_that_they_are_shown_with(path: Path) -> None:
    for command, flags in commands(path.read_text()):
        assert flags <= set(FLAG.findall(told_by(*command))), f"vflow {' '.join(command)}"


def test_flags_that_are_named_alone_exist() -> None:
    guides = [ROOT / "SECURITY.md", *(ROOT / "docs/how-to").glob("*.md")]
    named = {flag for path in guides for flag in re.findall(r"`(--[a-z][a-z-]+)", path.read_text())}
    assert len(named) > 30
    assert named <= set(FLAG.findall(" ".join(map(told_by, COMMANDS))))


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_variables_exist(path: Path) -> None:
    settings = {ENVIRONMENT_PREFIX + each.upper() for each in options()}
    of_clients = set(VARIABLE.findall(" ".join(map(told_by, COMMANDS))))
    of_compose = set(re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text()))
    assert set(VARIABLE.findall(path.read_text())) <= settings | of_clients | of_compose | {CONFIG_VARIABLE}


def test_the_scan_finds_what_is_certainly_there() -> None:
    assert (("serve",), {"--kv-budget"}) in commands((ROOT / "deploy/image-check.sh").read_text())
    assert (("strategies", "compare"), {"--none"}) in commands("`vflow strategies compare a b --none`")
    with pytest.raises(LookupError):
        told_by("strategies", "nothing")
