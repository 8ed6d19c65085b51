"""The Triton kernels become machine code that the devices can take; this needs Triton's compiler, and no device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository.source import ROOT

SHARED = 99 << 10
"""Bytes of shared memory that a program can have on the smallest devices of compute capability 8 (8.6 and 8.9)."""


def rows(cache: Path, *arguments: str) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-m", "tests.vflowopt.compile_kernels", *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return [json.loads(line) for line in made.stdout.splitlines()]


def check(found: list[dict[str, object]]) -> None:
    for row in found:
        assert isinstance(row["shared"], int) and row["shared"] <= SHARED, row
        assert row["code"]
        # Half precision goes through the matrix units; float32 must not, because they would round it.
        if row["kernel"] == "attention_kernel":
            assert row["matrix_units"] == (row["dtype"] != "torch.float32"), row


def test_kernels_compile_for_common_models(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert len(found) == 3 * 5
    check(found)


@pytest.mark.long
def test_kernels_compile_for_many_models(tmp_path: Path) -> None:
    found = rows(tmp_path, "many")
    assert len(found) == 30 * 2 * 5
    check(found)
