"""Imports point down only: service -> library, stubs; client -> stubs; library -> torch; and package by package."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.repository.source import ROOT, imports, python_files

STANDARD = set(sys.stdlib_module_names)

SERVICE = (
    "servicers",
    "monitoring",
    "sessions",
    "tuning",
    "strategies",
    "images",
    "engine",
    "kv",
    "store",
    "interceptors",
    "access",
    "telemetry",
    "watchdog",
    "rpc",
)
"""The packages of the service from top to bottom. Above them all are the files of vflow_server itself, the wiring."""

LIBRARY = ("demo", "search", "runtime", "models", "compression", "kernels", "media")
"""The packages of the library from top to bottom. Above them all is its front door, vflowopt/__init__.py."""

PACKAGES = [
    *(("server/vflow_server", package, SERVICE) for package in SERVICE),
    *(("vflowopt", package, LIBRARY) for package in LIBRARY),
]


def foreign(folder: str) -> dict[str, set[str]]:
    """For each top-level module outside the standard library, the files of `folder` that import it."""
    found: dict[str, set[str]] = {}
    for path in python_files(folder):
        for name in imports(path):
            if (top := name.partition(".")[0]) not in STANDARD:
                found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def module_of(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] in ("client", "server") else parts
    return ".".join(inside).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """All that a file imports, and each name imported from a package as if it was a module of that."""
    found = set(imports(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found - {module_of(path)}


def test_the_library_knows_no_service() -> None:
    found = foreign("vflowopt")
    assert {"torch", "vflowopt"} <= set(found), "the scan finds what is certainly there"
    for name in ("vflow_server", "vflow_client", "grpc", "google", "structlog", "uvloop"):
        assert name not in found, f"{found.get(name)} must not import {name}"
    for path in python_files("vflowopt"):
        assert "asyncio" not in set(imports(path)), f"{path} must not import asyncio"


DRAWING = ("objective_chart", "output", "progress", "retune", "strategies", "strategy_text")


def test_the_client_needs_grpc_and_protobuf_only() -> None:
    found = foreign("client/vflow_client")
    # Pillow is imported only once a caller hands over one of its images.
    assert found.pop("PIL") == {"client/vflow_client/pil_image.py"}
    # The extra `cli` draws what two commands print.
    commands = "client/vflow_client/commands"
    assert found.pop("rich") == {f"{commands}/{name}.py" for name in DRAWING}
    assert found.pop("plotext") == {f"{commands}/objective_chart.py"}
    assert set(found) == {"google", "grpc", "vflow_client"}


def test_the_service_uses_the_client_for_its_stubs_and_the_command_line_only() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in python_files("server")
        for name in imports(path)
        if name.startswith("vflow_client") and not name.startswith("vflow_client.v1")
    }
    assert users == {"server/vflow_server/cli.py", "server/vflow_server/health_command.py"}


@pytest.mark.parametrize(("root", "packages"), [("server/vflow_server", SERVICE), ("vflowopt", LIBRARY)])
def test_every_package_is_named(root: str, packages: tuple[str, ...]) -> None:
    assert set(packages) == {path.parent.name for path in (ROOT / root).glob("*/__init__.py")}
    assert {path.parent.relative_to(ROOT / root).as_posix() for path in python_files(root)} == {".", *packages}


@pytest.mark.parametrize(("root", "package", "order"), PACKAGES)
def test_a_package_imports_from_packages_below_only(root: str, package: str, order: tuple[str, ...]) -> None:
    allowed = order[order.index(package) :]
    for path in python_files(f"{root}/{package}"):
        for name in imports(path):
            top, _, inside = name.partition(".")
            if top == root.rpartition("/")[2]:
                assert inside.partition(".")[0] in allowed, f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("root", ["client/vflow_client", "server/vflow_server", "vflowopt"])
def test_no_modules_import_each_other_in_a_circle(root: str) -> None:
    """Neither when they are imported nor later: imports inside functions count, too."""
    modules = {module_of(path): path for path in python_files(root)}
    graph = {name: {each for each in imported_modules(path) if each in modules} for name, path in modules.items()}
    assert sum(map(len, graph.values())) > len(modules), "the scan finds what is certainly there"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", SERVICE)
def test_a_package_of_the_service_runs_nothing_when_it_is_imported(package: str) -> None:
    """Importing one file of a package imports no other, so that the order within a package is nobody's concern."""
    (docstring,) = ast.parse((ROOT / "server" / "vflow_server" / package / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("folder", ["client", "server", "vflowopt"])
def test_no_layer_imports_tests_benchmarks_or_the_training(folder: str) -> None:
    assert not {"tests", "benchmarks", "demo_model"} & set(foreign(folder))


@pytest.mark.parametrize("folder", ["client", "server", "vflowopt", "demo_model"])
def test_no_module_is_called_utils(folder: str) -> None:
    assert not [path for path in python_files(folder) if path.stem in {"utils", "util", "helpers", "misc", "common"}]
