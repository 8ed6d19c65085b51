"""A small model, and services on it. After each test no KV page may be held."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.drawing import png
from tests.server.mortal import Parent
from tests.server.served import Served
from tests.vflowopt.tiny_models import SHAPES, save
from vflow_client import Client
from vflowopt.runtime import Runtime


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(SHAPES[0], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def runtime(model_folder: Path) -> Runtime:
    """A model that answers as long as it is let: nothing ends an answer but the request's own limits."""
    runtime = Runtime.load(model_folder, kv_budget=32 << 20)
    runtime.chat.stop_ids = frozenset()
    return runtime


Serve = Callable[..., Served]


@pytest.fixture
def serve(runtime: Runtime) -> Iterator[Serve]:
    """Starts a service with the given settings; takes another runtime as ``runtime``."""
    started: list[Served] = []

    def start(runtime: Runtime = runtime, **settings: str) -> Served:
        started.append(Served(runtime, **settings))
        return started[-1]

    yield start
    for served in started:
        try:
            if served.service.engine.alive:
                for session in list(served.service.sessions):
                    served.run(served.service.sessions.delete(session))
                assert served.kv_bytes() == 0
        finally:
            served.stop()


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()


@pytest.fixture
def client(served: Served) -> Client:
    return served.client


@pytest.fixture(scope="session")
def parent() -> Iterator[Parent]:
    parent = Parent()
    yield parent
    parent.close()


@pytest.fixture(scope="session")
def picture() -> bytes:
    return png(90, 120)
