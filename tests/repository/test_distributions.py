"""Both distributions as PyPI would get them: built, inspected, and installed away from the repository."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.repository.image import copy_context
from tests.repository.source import ROOT
from vflowopt.demo import picture_path

FOLDERS = {
    "vflowopt": {"vflowopt": ROOT / "vflowopt", "vflow_server": ROOT / "server" / "vflow_server"},
    "vflowopt_client": {"vflow_client": ROOT / "client" / "vflow_client"},
}
"""The import packages of each distribution, and where they lie."""

CONVERSATION = """
import json, sys
import vflow_client, vflow_server, vflowopt

address, picture, question = sys.argv[1:]
with vflow_client.connect(address, timeout=60) as client, client.session() as session:
    session.add_image(picture)
    answer = session.ask(question).read()
print(json.dumps({"answer": answer, "files": [each.__file__ for each in (vflow_client, vflow_server, vflowopt)]}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; the paths of this process are not handed on to it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "VFLOW_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both source distributions, and the wheels that were built from them."""
    folder = tmp_path_factory.mktemp("distributions")
    copy_context(folder / "source")
    for project in (folder / "source" / "client", folder / "source"):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", project, cwd=folder)
    return folder / "dist"


def wheel(distributions: Path, name: str) -> Path:
    (path,) = distributions.glob(f"{name}-*.whl")
    return path


def files(distributions: Path, name: str) -> set[str]:
    with zipfile.ZipFile(wheel(distributions, name)) as archive:
        return set(archive.namelist())


def metadata(distributions: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel(distributions, name)) as archive:
        (path,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(path).decode())


def test_twine_has_nothing_to_say_against_them(distributions: Path) -> None:
    built = sorted(distributions.iterdir())
    assert [path.name.partition("-")[0] for path in built] == ["vflowopt", "vflowopt", *["vflowopt_client"] * 2]
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=distributions)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_holds_its_packages_and_nothing_else(distributions: Path, name: str) -> None:
    expected = {
        str(Path(package, path.relative_to(folder)))
        for package, folder in FOLDERS[name].items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {f"{package}/py.typed" for package in FOLDERS[name]} < expected
    held = files(distributions, name)
    assert {path for path in held if ".dist-info/" not in path} == expected
    assert any(path.endswith(".dist-info/licenses/LICENSE") for path in held)


def test_the_client_brings_the_stubs_inside_its_own_package(distributions: Path) -> None:
    contract = [path.stem for path in (ROOT / "proto" / "vflow" / "v1").glob("*.proto")]
    stubs = {f"vflow_client/v1/{name}{end}" for name in contract for end in ("_pb2.py", "_pb2.pyi")}
    stubs |= {f"vflow_client/v1/{name}_pb2_grpc.py" for name in ("conversations", "compression", "strategies")}
    assert contract and stubs < files(distributions, "vflowopt_client")


def test_what_is_not_installed_is_not_in_the_source_distributions(distributions: Path) -> None:
    top: dict[str, set[str]] = {}
    for path in distributions.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
        assert all(member.isfile() or member.isdir() for member in members), "a link would lead out of the archive"
        names = {member.name.split("/")[1] for member in members if "/" in member.name}
        top[path.name.partition("-")[0]] = {each for each in names if not each.endswith(".egg-info")}
    common = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert top == {
        "vflowopt": common | {"vflowopt", "server"},
        "vflowopt_client": common | {"vflow_client", "setup.py"},
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_the_index_is_told_what_it_shows(distributions: Path, name: str) -> None:
    fields = metadata(distributions, name)
    assert fields["Name"] == name.replace("_", "-") and fields["Summary"] and fields["Keywords"]
    assert fields["License-Expression"] == "Apache-2.0" and fields["License-File"] == "LICENSE"
    assert fields["Author"] == "The VFlow authors" and fields.get_all("Project-URL")
    assert fields["Description-Content-Type"] == "text/markdown" and str(fields.get_payload()).startswith("# ")


def hold_a_conversation(python: Path, cwd: Path) -> None:
    """Serves the embedded model with the packages that `python` finds, and asks about a bundled picture."""
    (asked,) = (
        each
        for each in json.loads((picture_path() / "questions.json").read_text())["cat.png"]
        if each["kind"] == "shape"
    )
    settings = ("--port", "0", "--threads", "1", "--kv-budget", "64MiB")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VFLOW_")}
    with subprocess.Popen(
        [python, "-I", python.with_name("vflow"), "serve", *settings],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as service:
        try:
            assert service.stdout is not None and service.stderr is not None
            ready = re.search(r"127\.0\.0\.1:\d+", service.stdout.readline())
            assert ready, service.stderr.read()
            picture = picture_path() / "cat.png"
            result = json.loads(run(python, "-I", "-c", CONVERSATION, ready[0], picture, asked["question"], cwd=cwd))
        finally:
            service.terminate()
            service.communicate(timeout=60)
    assert result["answer"] == asked["answer"]
    assert service.returncode == 0
    for path in result["files"]:
        assert Path(path).is_relative_to(python.parents[1]), "taken from elsewhere"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """The Python of an environment that holds nothing yet."""
    venv.create(tmp_path / "environment", symlinks=True)
    yield tmp_path / "environment" / "bin" / "python"


def pip(python: Path, *arguments: str | Path, cwd: Path) -> None:
    """Has the pip of the tests install in the environment of `python`."""
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
    run(*command, *arguments, cwd=cwd)


def test_the_wheels_serve_a_conversation(distributions: Path, environment: Path, tmp_path: Path) -> None:
    pip(environment, "--no-deps", "--no-index", *distributions.glob("*.whl"), cwd=tmp_path)
    packages = Path(
        run(environment, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # What others made is taken from the environment of the tests. Editable installs are not: Python follows the .pth
    # files of its own environment only.
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    hold_a_conversation(environment, tmp_path)


@pytest.mark.long
def test_the_wheels_serve_a_conversation_with_what_pip_finds(
    distributions: Path, environment: Path, tmp_path: Path
) -> None:
    """Needs an index that has the requirements, torch first as the Makefile says."""
    constrained = ("--constraint", ROOT / "constraints.txt")
    pip(environment, *constrained, "torch", cwd=tmp_path)
    pip(environment, *constrained, *distributions.glob("*.whl"), cwd=tmp_path)
    hold_a_conversation(environment, tmp_path)
