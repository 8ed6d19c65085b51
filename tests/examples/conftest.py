"""A service with the embedded model, which answers the questions of the examples."""

from collections.abc import Iterator

import pytest

from tests.server.served import Served
from vflowopt.demo import model_path
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime.load(model_path(), kv_budget=64 << 20)


@pytest.fixture
def embedded(runtime: Runtime) -> Iterator[Served]:
    served = Served(runtime)
    yield served
    served.stop()
