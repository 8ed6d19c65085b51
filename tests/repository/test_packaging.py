"""What is installed: packages, versions and requirements agree with the tree and with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.repository.source import ROOT


def project(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


SERVICE = project("pyproject.toml")
CLIENT = project("client/pyproject.toml")
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def requirements() -> list[str]:
    return [
        *SERVICE["project"]["dependencies"],
        *SERVICE["project"]["optional-dependencies"]["otel"],
        *SERVICE["project"]["optional-dependencies"]["docs"],
        *SERVICE["project"]["optional-dependencies"]["dev"],
        *CLIENT["project"]["dependencies"],
        *CLIENT["project"]["optional-dependencies"]["cli"],
    ]


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@pytest.mark.parametrize("folder", ["vflowopt", "server/vflow_server", "client/vflow_client"])
def test_every_package_is_typed_and_its_folder_has_its_import_name(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists() and (ROOT / folder / "__init__.py").exists()


def test_both_distributions_have_one_version() -> None:
    version = SERVICE["project"]["version"]
    assert CLIENT["project"]["version"] == version
    assert f"vflowopt-client[cli]=={version}" in SERVICE["project"]["dependencies"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("requirement", [line for line in requirements() if not line.startswith("vflow")])
def test_the_pins_satisfy_every_requirement(requirement: str) -> None:
    match = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?(?:,<([\d.]+))?", requirement)
    assert match, f"a floor, and at most a ceiling, is all that {requirement} should need"
    name, floor, ceiling = match.groups()
    assert name in PINS, f"constraints.txt does not pin {name}"
    assert floor is None or release(PINS[name]) >= release(floor)
    assert ceiling is None or release(PINS[name]) < release(ceiling)


def test_the_runtime_floor_covers_the_pinned_generator() -> None:
    """Generated code refuses at import a grpcio older than the generator."""
    generator = next(line for line in CLIENT["build-system"]["requires"] if line.startswith("grpcio-tools=="))
    floor = next(line for line in CLIENT["project"]["dependencies"] if line.startswith("grpcio>="))
    assert generator.removeprefix("grpcio-tools==") == floor.removeprefix("grpcio>=")


def test_the_client_installs_without_the_heavy_parts() -> None:
    names = {re.split(r"[><=]", line)[0] for line in CLIENT["project"]["dependencies"]}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos"}


@pytest.mark.parametrize("file", ["weights/config.json", "weights/model.safetensors", "weights/tokenizer.json"])
def test_the_embedded_model_is_package_data(file: str) -> None:
    demo = ROOT / "vflowopt" / "demo"
    patterns = SERVICE["tool"]["setuptools"]["package-data"]["vflowopt.demo"]
    assert demo / file in {path for pattern in patterns for path in demo.glob(pattern)}


def test_the_license_is_apache() -> None:
    assert "Version 2.0, January 2004" in Path(ROOT / "LICENSE").read_text()
    assert SERVICE["project"]["license"] == CLIENT["project"]["license"] == "Apache-2.0"
