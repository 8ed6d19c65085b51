"""What is installed: packages, versions and requirements agree with the tree and with each other."""

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import vflowopt
from tests.repository.source import ROOT


def project(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


SERVICE = project("pyproject.toml")
CLIENT = project("client/pyproject.toml")
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}
PYTHONS = [f"3.{minor}" for minor in range(11, 15)]


def requirements() -> list[str]:
    return [
        *SERVICE["project"]["dependencies"],
        *SERVICE["project"]["optional-dependencies"]["otel"],
        *SERVICE["project"]["optional-dependencies"]["docs"],
        *SERVICE["project"]["optional-dependencies"]["dev"],
        *CLIENT["project"]["dependencies"],
        *CLIENT["project"]["optional-dependencies"]["cli"],
        *CLIENT["build-system"]["requires"],
    ]


@pytest.mark.parametrize("folder", ["vflowopt", "server/vflow_server", "client/vflow_client"])
def test_every_package_is_typed_and_its_folder_has_its_import_name(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists() and (ROOT / folder / "__init__.py").exists()


def test_both_distributions_and_the_library_have_one_version() -> None:
    version = SERVICE["project"]["version"]
    assert CLIENT["project"]["version"] == vflowopt.__version__ == version
    assert f"vflowopt-client[cli]=={version}" in SERVICE["project"]["dependencies"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("requirement", [line for line in requirements() if not line.startswith("vflow")])
def test_the_pins_satisfy_every_requirement(requirement: str) -> None:
    parsed = Requirement(requirement)
    operators = sorted(each.operator for each in parsed.specifier)
    assert operators in ([], [">="], ["<", ">="], ["=="]), f"a floor, and at most a ceiling, is all it needs: {parsed}"
    pin = PINS.get(parsed.name.lower().replace("_", "-"))
    assert pin is not None, f"constraints.txt does not pin {parsed.name}"
    assert parsed.specifier.contains(Version(pin))


def test_the_runtime_floor_covers_the_pinned_generator() -> None:
    """Generated code refuses at import a grpcio older than the generator."""
    generator = next(line for line in CLIENT["build-system"]["requires"] if line.startswith("grpcio-tools=="))
    floor = next(line for line in CLIENT["project"]["dependencies"] if line.startswith("grpcio>="))
    assert generator.removeprefix("grpcio-tools==") == floor.removeprefix("grpcio>=")


def test_the_tests_build_the_client_with_what_it_asks_for() -> None:
    generators = {line for line in CLIENT["build-system"]["requires"] if "==" in line}
    assert generators and generators <= set(SERVICE["project"]["optional-dependencies"]["dev"])


def test_the_client_installs_without_the_heavy_parts() -> None:
    names = {re.split(r"[><=]", line)[0] for line in CLIENT["project"]["dependencies"]}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos"}


def test_the_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert (ROOT / "client" / "LICENSE").read_text() == text, "a distribution takes no file from outside its folder"
    for project in (SERVICE["project"], CLIENT["project"]):
        assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]


def test_both_distributions_name_the_same_pythons() -> None:
    for project in (SERVICE["project"], CLIENT["project"]):
        prefix = "Programming Language :: Python :: 3."
        named = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith(prefix)]
        assert named == PYTHONS and project["requires-python"] == f">={PYTHONS[0]}"
        assert "Typing :: Typed" in project["classifiers"]
