"""The commands of the repository: the Makefile's targets and the script of continuous integration."""

import os
import re
import subprocess

import pytest

from tests.repository.source import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M)


def test_the_promised_targets_are_there() -> None:
    assert {"setup", "test", "test-long", "lint", "serve", "demo", "demo-model", "demo-eval"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_planned(target: str) -> None:
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr


def test_targets_are_phony() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony and set(TARGETS) <= set(phony[1].split())


def test_the_scripts_that_targets_run_exist() -> None:
    modules = re.findall(r"python -m ((?:demo_model|benchmarks)\S+)", MAKEFILE)
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert re.search(r"^make test\b", script.read_text(), re.M)
    assert "set -euo pipefail" in script.read_text()
