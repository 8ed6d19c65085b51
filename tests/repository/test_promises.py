"""What SECURITY.md says of the code as a whole, and of where its promises are tested."""

import ast
import re

import pytest

from tests.repository.source import ROOT, imports, python_files
from vflowopt.media.picture import FORMATS

SECURITY = (ROOT / "SECURITY.md").read_text()
SERVED = [*python_files("server"), *python_files("vflowopt")]
"""What the service runs."""

DESERIALIZERS = ("pickle", "marshal", "shelve", "dill", "joblib")
FETCHERS = ("urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib")


def test_nothing_is_unpickled_and_nothing_fetched() -> None:
    found = {name for path in SERVED for name in imports(path)}
    assert found >= {"torch", "grpc", "urllib.parse"}, "the scan finds what is certainly there"
    assert not [name for name in found if f"{name}.".startswith(tuple(f"{each}." for each in DESERIALIZERS + FETCHERS))]


def test_no_code_of_a_model_is_run() -> None:
    calls = [call for path in SERVED for call in ast.walk(ast.parse(path.read_text())) if isinstance(call, ast.Call)]
    named = {keyword.arg for call in calls for keyword in call.keywords}
    assert "dtype" in named, "the scan finds what is certainly there"
    assert "trust_remote_code" not in named
    functions = {ast.unparse(call.func) for call in calls}
    assert not {"torch.load", "eval", "exec"} & functions


def test_as_many_formats_are_read_as_promised() -> None:
    assert "reads pictures in seven formats only" in SECURITY and len(FORMATS) == 7


@pytest.mark.parametrize("document", ["SECURITY.md", "README.md"])
def test_the_tests_that_are_named_are_there(document: str) -> None:
    named = set(re.findall(r"[\w/]*\btest_\w+\.py", (ROOT / document).read_text()))
    assert named
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    missing = [name for name in named if not any(path == name or path.endswith(f"/{name}") for path in there)]
    assert not missing
