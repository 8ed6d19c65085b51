"""The service: makes engine, stores and servicers, connects them, and serves them with gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import structlog
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from vflow_client.v1 import (
    compression_pb2,
    compression_pb2_grpc,
    conversations_pb2,
    conversations_pb2_grpc,
    strategies_pb2,
    strategies_pb2_grpc,
)
from vflow_server.access.access import Access
from vflow_server.access.certificates import CertificateFiles
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Engine
from vflow_server.engine.piece_thread import PieceThread
from vflow_server.engine.scheduler import Scheduler
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.images.store import PictureStore
from vflow_server.images.video_reader import VideoReader
from vflow_server.interceptors.calls import Calls
from vflow_server.interceptors.draining import Draining
from vflow_server.interceptors.guard import Guard
from vflow_server.interceptors.messages import Messages
from vflow_server.kv.disk import DiskStore
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.logged_images import LoggedImages
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.offload import OffloadStore
from vflow_server.kv.prefix_cache import PrefixCache
from vflow_server.monitoring.gauges import Gauges
from vflow_server.monitoring.service_parts import ServiceParts
from vflow_server.rpc.errors import server_stopping
from vflow_server.rpc.listener import Listener, is_loopback
from vflow_server.servicers.admin import Strategies
from vflow_server.servicers.calibration_request import CalibrationReader
from vflow_server.servicers.compression import Compression
from vflow_server.servicers.conversations import Conversations
from vflow_server.servicers.health import Health
from vflow_server.servicers.operations_service import Operations
from vflow_server.servicers.quotas import Quota, Quotas
from vflow_server.sessions.live_samples import LiveSamples
from vflow_server.sessions.session import SessionParts
from vflow_server.sessions.sessions import SessionStore
from vflow_server.settings import Settings
from vflow_server.store.archive import Archive
from vflow_server.store.folder_lock import lock_data
from vflow_server.strategies.comparisons import Comparisons
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.telemetry import logging
from vflow_server.telemetry.metrics import Metrics
from vflow_server.telemetry.receipt_log import ReceiptLog
from vflow_server.telemetry.tracing import Tracing
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflow_server.tuning.operations import OperationStore
from vflow_server.tuning.retune import Retunes
from vflow_server.watchdog.watchdog import Watchdog
from vflowopt.media.picture import PictureLimits
from vflowopt.runtime.model_runner import Runtime

if TYPE_CHECKING:
    from vflow_server.monitoring.side_port import SidePort

_FOR_USERS = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((conversations_pb2, "Conversations"), (compression_pb2, "Compression"))
)
_FOR_ADMINISTRATORS = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((strategies_pb2, "Strategies"), (operations_pb2, "Operations"))
)
NAMES = (*_FOR_USERS, *_FOR_ADMINISTRATORS)
"""Full names of the services, as health checks ask for them."""

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_WORK = (
    "/vflow.v1.Conversations/AddImage",
    "/vflow.v1.Conversations/AddVideo",
    "/vflow.v1.Conversations/Chat",
    "/vflow.v1.Compression/CompressImage",
)
"""The methods whose calls the quotas count as work."""

MAX_PREFIXES = 64
"""Number of prefixes that are cached for sessions that begin in the same way."""

_LAST_WORDS = 0.2
"""Seconds at least between the end of a call and the end of its connection."""

log = structlog.get_logger(__name__)


class Service:
    """One service on one loaded model. Made, started and stopped on one event loop.

    Args:
        runtime: the model; nothing else may use it while the service runs.
        settings: how to serve it.
        on_failure: called once, in any thread, when the service has failed. Its event loop may stand still by then.

    Attributes:
        failed: set when a thread or a task that the service needs has ended or stands still.
        admin_port: port of the services for administrators, once they listen, if it is a separate one.
        side_port: port of the HTTP pages, once they listen.

    Raises:
        OSError: a file or a folder cannot be used.
        ValueError: the content of a file is not valid, or an option needs a package that is not installed.
        ServiceError: STORAGE_FAILED.
    """

    def __init__(self, runtime: Runtime, settings: Settings, on_failure: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self._on_failure = on_failure
        self.watchdog = Watchdog(settings.watchdog_timeout, self._failed)
        self.access = Access(settings.tokens)
        self.metrics = Metrics()
        self.tracing = _tracing_to(settings.otlp_endpoint)
        self.receipt_log = ReceiptLog(self.metrics, self.tracing)
        # Locked before anything in it is read: strategies and operations are stored there even if sessions are not.
        self._data = None if settings.data is None else lock_data(settings.data)
        try:
            check = (lambda: None) if self._data is None else self._data.check
            self.strategies = StrategyStore(
                runtime.layers, runtime.model.strategies, settings.stored("strategies.json"), check
            )
            self.operations = OperationStore(settings.stored("operations.json"), check)
            stored = None if settings.ephemeral else self._data
            self.archive = None if stored is None else Archive(stored, settings.data_bytes, self.metrics)
        except BaseException:
            if self._data is not None:
                self._data.close()
            raise
        self.runtime = runtime
        self._spill = self._spill_folder()
        self.images = ImageCache(settings.compressed_memory, runtime.model.device)
        self.kv = KVCacheManager(
            runtime,
            PrefixCache(MAX_PREFIXES),
            OffloadStore(settings.offload_memory, self._spill),
            LoggedImages(settings.compressed_memory),
            self.metrics,
        )
        self.encoder = EncoderThread(runtime)
        self.tokenizer = PieceThread("tokenizer")
        self._draining = Draining()
        meter = TokenMeter(settings.tenant_tokens)
        self.engine = Engine(
            waiting=settings.max_waiting,
            running=settings.max_running,
            schedule=Scheduler(runtime, self.kv, self.images, self.encoder, self.metrics, meter),
            on_death=self._engine_died,
        )
        self.retunes = Retunes(self.engine, runtime, self.kv, self.encoder, self.strategies, self.operations)
        self.live_samples = LiveSamples(settings.calibration_samples, settings.picture_memory)
        self.pictures = PictureStore(
            PictureLimits(max_bytes=settings.max_picture_bytes, max_pixels=settings.max_picture_pixels),
            held_bytes=settings.picture_memory,
            metrics=self.metrics,
            workers=settings.picture_workers,
            seconds=settings.picture_seconds,
        )
        self.fidelity_monitor = FidelityMonitor(
            share=settings.watch_share,
            floor=settings.watch_floor,
            window=settings.watch_window,
            judges=settings.watch_tenants,
            engine=self.engine,
            runtime=runtime,
            kv=self.kv,
            encoder=self.encoder,
            strategies=self.strategies,
            pictures=self.pictures,
        )
        self.sessions = SessionStore(
            SessionParts(
                self.engine, runtime, self.kv, self.images, self.tokenizer, self.live_samples, self.fidelity_monitor
            ),
            most=settings.max_sessions,
            idle_timeout=settings.idle_timeout,
            archive=self.archive,
        )
        quota = Quota(
            sessions=settings.tenant_sessions,
            pictures=settings.tenant_pictures,
            kv_bytes=settings.tenant_kv,
            turns=settings.tenant_turns,
            tokens_per_minute=settings.tenant_tokens,
        )
        self.quotas = Quotas(quota, self.sessions, self.engine, self.kv, meter)
        self.messages = Messages(
            settings.messages_bytes, settings.max_message_bytes, {method: self.quotas.work for method in _WORK}
        )
        self.parts = ServiceParts(
            runtime=runtime,
            engine=self.engine,
            kv=self.kv,
            images=self.images,
            pictures=self.pictures,
            sessions=self.sessions,
            strategies=self.strategies,
            fidelity_monitor=self.fidelity_monitor,
            retunes=self.retunes,
            receipt_log=self.receipt_log,
            messages=self.messages,
            metrics=self.metrics,
            access=self.access,
        )
        self.metrics.registry.register(Gauges(self.parts))
        self._watch_threads()
        self.failed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._health = Health(("", *NAMES))
        self._listeners = self._listen()
        self.admin_port: int | None = None
        self._side_port: SidePort | None = None
        self.side_port: int | None = None

    async def start(self) -> int:
        """Listen and serve; returns the port.

        Raises:
            OSError: an address cannot be listened on.
        """
        port, *further = [listener.bind() for listener in self._listeners]
        self.admin_port = next(iter(further), None)
        if self.settings.metrics_port is not None:
            self.side_port = await self._start_side_port(self.settings.metrics_host, self.settings.metrics_port)
        self.engine.start()
        self._health.set(serving=True)
        for listener in self._listeners:
            await listener.start()
        expiry = asyncio.create_task(self.sessions.expire_forever())
        monitor = asyncio.create_task(self.fidelity_monitor.watch_forever())
        self._forever = [expiry, monitor]
        self.watchdog.watch_task("expiry of sessions", expiry, self.sessions.expiry_pulse)
        self.watchdog.watch_task("fidelity monitor", monitor)
        for listener in self._listeners:
            self.watchdog.watch_task("gRPC server", asyncio.create_task(listener.ended()))
        if self._side_port is not None:
            self.watchdog.watch_task("side port", self._side_port.serving)
        self.watchdog.start()
        return port

    async def stop(self, grace: float | None = None) -> None:
        """Accept no more calls, wait ``grace`` seconds for the running ones (default: the setting), and release all."""
        self.watchdog.stop()
        self._health.set(serving=False)
        self.messages.stop(server_stopping())
        await self.retunes.close()  # before the calls that wait for it
        grace = self.settings.grace if grace is None else grace
        begun = time.monotonic()
        drained = await self._draining.drain(grace)
        for task in self._forever:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        # Calls that have just ended still have to send their status.
        left = max(grace - (time.monotonic() - begun), _LAST_WORDS)
        hung_up = asyncio.gather(*(listener.stop(left) for listener in self._listeners))
        if not drained:
            await hung_up
        # If all calls have ended, the engine stops meanwhile: a health watch may stay connected until the time is up,
        # and that time is needed to persist KV caches.
        await asyncio.to_thread(self.engine.stop)
        await self.sessions.finish()
        await asyncio.to_thread(self._release, begun + grace)
        await hung_up
        if self.archive is not None:
            await asyncio.to_thread(self.archive.close)
        if self._data is not None:
            self._data.close()
        await self.pictures.close()
        if self._side_port is not None:
            await self._side_port.stop(begun + grace - time.monotonic())
        await asyncio.to_thread(self.tracing.close)

    def _release(self, persist_until: float) -> None:
        """Persist KV caches for the next process until ``persist_until``, and release the others."""
        persists = self.archive is not None and not self.failed.is_set()
        self.tokenizer.close()
        self.encoder.close()
        self.kv.close(persist_until if persists else None)

    def _spill_folder(self) -> DiskStore | None:
        """The folder of KV caches. In the data folder they may use the space that sessions leave."""
        settings, archive = self.settings, self.archive
        if (folder := settings.spill_folder) is None:
            return None
        if archive is None or settings.spill_dir is not None:
            return DiskStore(folder, lambda: settings.spill_bytes)
        return DiskStore(folder, lambda: min(settings.spill_bytes, archive.room))

    def _listen(self) -> Sequence[Listener]:
        """Make the listener for users and, if it is separate, that for administrators. They do not serve yet."""
        settings = self.settings
        public = self._listener(settings.host, settings.port, "--port")
        self._serve_users(public.server)
        if settings.admin_port is None:
            self._serve_administrators(public.server)
            self._serve_all(public.server, NAMES)
            return [public]
        private = self._listener(settings.admin_host, settings.admin_port, "--admin-port")
        self._serve_administrators(private.server)
        self._serve_all(public.server, _FOR_USERS)
        self._serve_all(private.server, _FOR_ADMINISTRATORS)
        return [public, private]

    def _listener(self, host: str, port: int, option: str) -> Listener:
        settings = self.settings
        files = None
        if settings.tls_cert and settings.tls_key:
            files = CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        elif not self.access.open and not is_loopback(host):
            log.warning("callers' tokens are readable on the way here, unless something before it ends TLS", host=host)
        return Listener(
            host,
            port,
            option,
            credentials=files.credentials() if files else None,
            layers=[Calls(self.metrics, self.tracing), Guard(self.access), self._draining, self.messages],
            most_bytes=settings.max_message_bytes,
            most_streams=settings.max_running + settings.max_waiting,
            longest_idle=settings.connection_idle,
            longest_age=settings.connection_age,
        )

    def _serve_users(self, server: grpc.aio.Server) -> None:
        model, most_frames = self.runtime.model, self.settings.max_video_frames
        videos = VideoReader(self.pictures, model, most_frames=most_frames)
        conversations_pb2_grpc.add_ConversationsServicer_to_server(
            Conversations(self.sessions, self.strategies, self.pictures, videos, self.receipt_log, self.quotas), server
        )
        compression_pb2_grpc.add_CompressionServicer_to_server(
            Compression(
                self.engine,
                self.runtime,
                self.strategies,
                self.pictures,
                self.receipt_log,
                most_bytes=self.settings.max_message_bytes,
            ),
            server,
        )

    def _serve_administrators(self, server: grpc.aio.Server) -> None:
        strategies_pb2_grpc.add_StrategiesServicer_to_server(
            Strategies(
                self.strategies,
                self.retunes,
                Comparisons(self.engine, self.kv, self.encoder),
                CalibrationReader(self.pictures, self.live_samples),
                self.runtime,
            ),
            server,
        )
        operations_pb2_grpc.add_OperationsServicer_to_server(Operations(self.operations), server)

    def _serve_all(self, server: grpc.aio.Server, names: Sequence[str]) -> None:
        """Add the services that need no token: health and reflection of the services ``names``."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflector = reflection.aio.ReflectionServicer((*names, _HEALTH, reflection.SERVICE_NAME))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)

    async def _start_side_port(self, host: str, port: int) -> int:
        # Starlette and uvicorn are slow to import, and are not needed without a side port.
        from vflow_server.monitoring.pages import pages
        from vflow_server.monitoring.side_port import SidePort

        self._side_port = SidePort(pages(self.parts, status_page=self.settings.status_page))
        return await self._side_port.start(host, port)

    def _watch_threads(self) -> None:
        watchdog = self.watchdog
        watchdog.watch("engine", self.engine.pulse, computes=True)
        watchdog.watch("encoder", self.encoder.pulse, computes=True)
        watchdog.watch("tokenizer", self.tokenizer.pulse, computes=True)
        if self.archive is not None:
            watchdog.watch("journal", self.archive.pulse)
        if self._spill is not None:
            watchdog.watch("offloading to disk", self._spill.pulse, computes=True)
        if (log_pulse := logging.log_pulse()) is not None:
            watchdog.watch("log", log_pulse)

    def _engine_died(self) -> None:
        """Called in the engine's thread, which has logged why."""
        self.watchdog.fail("engine", "it died of an exception")
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self.failed.set)  # also while the service stops

    def _failed(self) -> None:
        """Report that the service has failed. Called in any thread."""
        self._on_failure()
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._health.set, False)
            self._loop.call_soon_threadsafe(self.failed.set)


def _tracing_to(endpoint: str | None) -> Tracing:
    """Tracing that sends spans to the OTLP receiver at ``endpoint``; None: no spans are made.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return Tracing()
    try:
        from vflow_server.telemetry.spans import Spans
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint needs OpenTelemetry ({error}); install it with pip install 'vflowopt[otel]', "
            "or leave the option out"
        ) from error
    return Spans(endpoint)
