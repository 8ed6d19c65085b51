"""The status page: what the service is doing, for a person with a browser. Plain HTML, made on the server.

Belongs to the event loop's thread, but for drawing.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import time
from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import version
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from vflow_client.v1 import images_pb2
from vflow_server.access.access import Access
from vflow_server.access.caller import Caller, bind_caller, current_caller
from vflow_server.engine.engine import Engine
from vflow_server.images.store import PictureStore
from vflow_server.kv.image_cache import ImageCache
from vflow_server.kv.manager import KVCacheManager
from vflow_server.monitoring.overlay import overlay
from vflow_server.monitoring.side_port import Answer, Page, Request, refusal
from vflow_server.rpc.errors import ServiceError
from vflow_server.sessions.sessions import SessionStore
from vflow_server.strategies.strategies import StrategyStore
from vflow_server.telemetry.receipt_log import ReceiptLog
from vflow_server.tuning.fidelity_monitor import FidelityMonitor
from vflow_server.tuning.retune import Retunes
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Detail
from vflowopt.runtime.model_runner import Runtime

MOST_ROWS = 25
"""Rows of a table; the latest ones are shown."""

_NOTHING_FOREIGN = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}

_ASK = {"WWW-Authenticate": 'Basic realm="VFlow", charset="UTF-8"'}


class StatusPage:
    """Shows one service.

    Args:
        engine: what runs and waits.
        runtime: the model and its KV pool.
        kv: caches outside the pool.
        images: compressed pictures.
        sessions: that live.
        strategies: that exist.
        pictures: that are held.
        fidelity_monitor: what it has seen.
        retunes: the one that is under way.
        receipt_log: the latest receipts.
        access: who may look: where there are tokens, whoever brings an administrator's as the password, and only at
            what is of that token's tenant.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        runtime: Runtime,
        kv: KVCacheManager,
        images: ImageCache,
        sessions: SessionStore,
        strategies: StrategyStore,
        pictures: PictureStore,
        fidelity_monitor: FidelityMonitor,
        retunes: Retunes,
        receipt_log: ReceiptLog,
        access: Access,
    ) -> None:
        self._engine = engine
        self._runtime = runtime
        self._kv = kv
        self._images = images
        self._sessions = sessions
        self._strategies = strategies
        self._pictures = pictures
        self._fidelity_monitor = fidelity_monitor
        self._retunes = retunes
        self._receipt_log = receipt_log
        self._access = access
        self._started = time.time()
        environment = Environment(
            loader=PackageLoader("vflow_server.monitoring"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        environment.filters |= {"size": _size, "ago": _ago}
        self._status = environment.get_template("status.html")
        self._picture = environment.get_template("picture.html")

    @property
    def pages(self) -> Mapping[str, Page]:
        """The pages, by path."""
        pages = {"/": self._show, "/picture": self._show_picture, "/overlay.png": self._draw}
        return {path: self._guarded(page) for path, page in pages.items()}

    def _guarded(self, page: Page) -> Page:
        """Answer administrators only, and only those who name this machine by its address, or as localhost.

        A page of somebody else's, in a browser on this machine, could otherwise have its own name lead here and read
        along.
        """

        async def answered(request: Request) -> Answer:
            if not _names_this_machine(request.headers.get("host", "")):
                return refusal(HTTPStatus.FORBIDDEN, told="Ask by address, or as localhost.")
            if not self._access.open:
                caller = self._administrator(request.headers.get("authorization", ""))
                if caller is None:
                    return refusal(HTTPStatus.UNAUTHORIZED, _ASK, "The password is an administrator's token.")
                bind_caller(caller)
            return await page(request)

        return answered

    def _administrator(self, authorization: str) -> Caller | None:
        """The administrator whose token is the password; None where there is none, or it is not one's."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            brought = base64.b64decode(encoded, validate=True).decode()
            caller = self._access.bearer(brought.partition(":")[2])
        except (ValueError, ServiceError):
            return None
        return caller if scheme.lower() == "basic" and caller.admin else None

    def _visible(self, tenant: str) -> bool:
        """Whether whoever asks may see what is of ``tenant``."""
        return self._access.open or current_caller().tenant == tenant

    async def _show(self, request: Request) -> Answer:
        runtime, operation = self._runtime, self._retunes.running
        visible = [session for session in self._sessions if self._visible(session.tenant)]
        sessions = sorted(visible, key=lambda session: session.used, reverse=True)
        return _page(
            self._status.render(
                version=version("vflowopt"),
                runtime=runtime,
                engine=self._engine,
                now=time.time(),
                started=self._started,
                pool=runtime.pool,
                offloaded=self._kv.offloaded,
                sessions=sessions[:MOST_ROWS],
                session_count=len(sessions),
                strategies=list(self._strategies),
                active=self._strategies.active,
                layers=runtime.layers,
                low_detail=images_pb2.Image.LOW,
                watched=dict(self._fidelity_monitor.totals),
                retune=operation and operation.metadata,
                turns=[turn for turn in self._receipt_log.turns if self._visible(turn.tenant)][:MOST_ROWS],
                pictures=[each for each in self._receipt_log.pictures if self._visible(each.tenant)][:MOST_ROWS],
            )
        )

    async def _show_picture(self, request: Request) -> Answer:
        if (image := await self._compressed(request)) is None:
            return _gone()
        return _page(
            self._picture.render(
                query={
                    name: request.query[name]
                    for name in ("tenant", "digest", "strategy", "detail")
                    if name in request.query
                },
                shapes=image.layout.shapes(),
                stages=[len(kept) for kept in image.kept],
                tokens=image.tokens,
                recycled=len(image.recycled),
            )
        )

    async def _draw(self, request: Request) -> Answer:
        image = await self._compressed(request)
        picture = self._pictures.held(request.query.get("tenant", ""), request.query.get("digest", ""))
        grid = request.query.get("grid", "0")
        if image is None or picture is None or not grid.isdecimal():
            return _gone()
        return Answer(
            await asyncio.to_thread(overlay, picture, image, int(grid)), "image/png", headers=_NOTHING_FOREIGN
        )

    async def _compressed(self, request: Request) -> CompressedImage | None:
        """The compressed picture that a request names, if it and the picture itself are still at hand."""
        tenant = request.query.get("tenant", "")
        picture = self._pictures.held(tenant, request.query.get("digest", ""))
        if picture is None or not self._visible(tenant):
            return None
        try:
            strategy = self._strategies.get(request.query.get("strategy", "")).strategy
            detail: Detail = "low" if request.query.get("detail") == "low" else "high"
            key = (picture.in_detail(detail).identity, strategy, tenant)
            return await self._engine.call(lambda: self._images.get(key), tenant).result()
        except ServiceError:
            return None


def _names_this_machine(host: str) -> bool:
    """Whether ``host``, with or without a port, is an address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ipaddress.ip_address(name)
    except ValueError:
        return host.partition(":")[0] == "localhost"
    return True


def _page(html: str) -> Answer:
    return Answer(html.encode(), "text/html; charset=utf-8", headers=_NOTHING_FOREIGN)


def _gone() -> Answer:
    return refusal(HTTPStatus.NOT_FOUND, told="This picture is not held here (any more).")


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit == "MiB" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _ago(seconds: float) -> str:
    """A time that has passed, as a person reads it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
