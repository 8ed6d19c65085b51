"""Examples, run as a reader would run them, but in this process: importing torch anew takes seconds."""

import importlib.util
import runpy
import sys
from types import ModuleType

import pytest

from tests.repository.source import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> None:
    """Run an example as a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def load(name: str) -> ModuleType:
    """Import an example, as a web server does that is given its folder."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
