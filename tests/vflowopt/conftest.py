"""Models that several tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model ``plain``."""
    return save(SHAPES[0], tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def shared_runtime(plain_folder: Path) -> Runtime:
    """A runtime of the tiny model; take it through ``runtime``, which checks that no page stays held."""
    return Runtime.load(plain_folder, kv_budget=32 << 20)


@pytest.fixture
def runtime(shared_runtime: Runtime) -> Iterator[Runtime]:
    """The shared runtime; after the test no page may still be held."""
    yield shared_runtime
    shared_runtime.pool.check_integrity([])
