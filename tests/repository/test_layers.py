"""Imports point down only: server -> library, stubs; client -> stubs; library -> torch; in server/, room by room."""

import ast
import sys

import pytest

from tests.repository.source import ROOT, imports, python_files

STANDARD = set(sys.stdlib_module_names)

ROOMS = (
    "servicers",
    "monitoring",
    "sessions",
    "tuning",
    "strategies",
    "engine",
    "caches",
    "store",
    "access",
    "telemetry",
    "rpc",
)
"""The rooms of the service from top to bottom. Above them all are the files of server/ itself, the wiring."""


def foreign(folder: str) -> dict[str, set[str]]:
    """For each top-level module outside the standard library, the files of `folder` that import it."""
    found: dict[str, set[str]] = {}
    for path in python_files(folder):
        for name in imports(path):
            if (top := name.partition(".")[0]) not in STANDARD:
                found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def test_the_library_knows_no_service() -> None:
    found = foreign("vflowopt")
    assert {"torch", "vflowopt"} <= set(found), "the scan finds what is certainly there"
    for name in ("vflow", "vflow_server", "vflow_client", "grpc", "google", "structlog", "uvloop"):
        assert name not in found, f"{found.get(name)} must not import {name}"
    for path in python_files("vflowopt"):
        assert "asyncio" not in set(imports(path)), f"{path} must not import asyncio"


def test_the_client_needs_grpc_and_protobuf_only() -> None:
    found = foreign("client")
    build_only = found.pop("setuptools") | found.pop("grpc_tools")
    assert build_only == {"client/setup.py"}
    # Pillow is imported only once a caller hands over one of its images.
    assert found.pop("PIL") == {"client/image_source.py"}
    assert set(found) == {"google", "grpc", "vflow", "vflow_client"}


def test_the_service_uses_the_client_for_the_command_line_only() -> None:
    assert foreign("server")["vflow_client"] == {"server/cli.py"}


def test_every_room_of_the_service_has_its_place() -> None:
    assert set(ROOMS) == {path.parent.name for path in (ROOT / "server").glob("*/__init__.py")}
    assert {path.parent.relative_to(ROOT / "server").as_posix() for path in python_files("server")} == {".", *ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_service_imports_from_rooms_below_only(room: str) -> None:
    allowed = ROOMS[ROOMS.index(room) :]
    for path in python_files(f"server/{room}"):
        for name in imports(path):
            package, _, inside = name.partition(".")
            if package == "vflow_server":
                assert inside.partition(".")[0] in allowed, f"{path.relative_to(ROOT)} must not import {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_runs_nothing_when_it_is_entered(room: str) -> None:
    """Importing one file of a room imports no other, so that the order of files within a room is nobody's concern."""
    (docstring,) = ast.parse((ROOT / "server" / room / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("folder", ["client", "server", "vflowopt"])
def test_no_layer_imports_tests_or_benchmarks(folder: str) -> None:
    assert not {"tests", "benchmarks"} & set(foreign(folder))


@pytest.mark.parametrize("folder", ["client", "server", "vflowopt"])
def test_no_module_is_called_utils(folder: str) -> None:
    assert not [path for path in python_files(folder) if path.stem in {"utils", "util", "helpers", "misc", "common"}]
