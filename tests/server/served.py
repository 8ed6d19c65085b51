"""A service in this process, on a thread of its own, behind a real port."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import vflow_client
from vflow_server.access.caller import DEFAULT_TENANT
from vflow_server.service import Service
from vflow_server.sessions.session import Session
from vflow_server.settings import load
from vflowopt.runtime.model_runner import Runtime

T = TypeVar("T")


class Served:
    """Runs a service until :meth:`stop`.

    Args:
        runtime: its model.
        settings: as flags, by name.
    """

    def __init__(self, runtime: Runtime, **settings: str) -> None:
        self._settings = load({"port": "0", "grace": "5s", **settings}, {})
        self._started: Future[tuple[Service, int, asyncio.AbstractEventLoop]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(runtime)), name="service")
        self._thread.start()
        self.service, port, self._loop = self._started.result(timeout=20)
        self.address = f"127.0.0.1:{port}"
        self.client = self.connect()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the service's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=20)

    def on_engine(self, function: Callable[[], T]) -> T:
        """Call a function in the engine's thread, between two steps."""

        async def call() -> T:
            return await self.service.engine.call(function, DEFAULT_TENANT).result()

        return self.run(call())

    def live(self, session: vflow_client.Session, tenant: str = DEFAULT_TENANT) -> Session:
        """The session's object in the service."""
        return self.service.sessions.get(tenant, session.name)

    def connect(self, **options: Any) -> vflow_client.Client:
        """Another client, which never retries."""
        return vflow_client.connect(
            self.address, **{"timeout": 20, "retry": vflow_client.RetryPolicy(attempts=1), **options}
        )

    def kv_bytes(self) -> int:
        """KV bytes in use, after checking that no page is lost."""
        return self.on_engine(self.service.kv.check)

    def stop(self) -> None:
        """Stop the service and wait for its thread."""
        self.client.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    async def _serve(self, runtime: Runtime) -> None:
        self._stop = asyncio.Event()
        try:
            service = Service(runtime, self._settings)
            port = await service.start()
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result((service, port, asyncio.get_running_loop()))
        await self._stop.wait()
        await service.stop()
