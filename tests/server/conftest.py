"""A small model, and services on it. After each test no KV page may be held."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.drawing import png
from tests.server.persistence import QUESTIONS, answer_of, begun
from tests.server.restartable_server import Parent
from tests.server.served import Served
from tests.vflowopt.tiny_models import SHAPES, save
from vflow_client import Client
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(SHAPES[0], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def runtime(model_folder: Path) -> Runtime:
    """A model without stop tokens: only the request's own limits end an answer."""
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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def serve_data(serve: Serve, data: Path) -> Serve:
    """Services on the same data folder, one after the other; starting one stops the one before it."""
    before: list[Served] = []

    def start(runtime: Runtime | None = None, **settings: str) -> Served:
        if before:
            before[-1].stop()
        which = {} if runtime is None else {"runtime": runtime}
        before.append(serve(**which, data=str(data), **settings))
        return before[-1]

    return start


@pytest.fixture(scope="module")
def expected(runtime: Runtime, picture: bytes) -> list[str]:
    """The answers of an undisturbed session."""
    served = Served(runtime)
    with begun(served.client, picture) as session:
        answers = [answer_of(session, text) for text in QUESTIONS]
    served.stop()
    return answers
