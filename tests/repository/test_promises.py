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


@pytest.mark.parametrize("document", ["SECURITY.md", "README.md", "docs/how-to/restarts.md"])
def test_the_tests_that_are_named_are_there(document: str) -> None:
    named = set(re.findall(r"[\w/]*\btest_\w+\.py(?:::\w+)?", (ROOT / document).read_text()))
    assert named
    there = {str(path.relative_to(ROOT)): path for path in ROOT.glob("tests/**/test_*.py")}
    for name in named:
        file, _, function = name.partition("::")
        paths = [path for path in there if path == file or path.endswith(f"/{file}")]
        assert paths, name
        assert not function or any(f"def {function}(" in there[path].read_text() for path in paths), name


@pytest.mark.parametrize(
    ("document", "heading"),
    [("SECURITY.md", "## What VFlow promises"), ("docs/how-to/restarts.md", "## Where this is")],
)
def test_each_promise_names_its_test(document: str, heading: str) -> None:
    section = (ROOT / document).read_text().partition(heading)[2].partition("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert not [row for row in rows if not re.search(r"test_\w+\.py", row.rsplit("|", 2)[1])]
