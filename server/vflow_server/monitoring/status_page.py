"""The status page: shows in a browser what the service is doing, as plain HTML.

Belongs to the event loop's thread, except for drawing.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from importlib.metadata import version
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from vflow_client.v1 import images_pb2
from vflow_server.access.caller import Caller, bind_caller, current_caller
from vflow_server.monitoring.overlay import overlay
from vflow_server.monitoring.service_parts import ServiceParts
from vflow_server.rpc.errors import ServiceError
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Detail, Picture

MOST_ROWS = 25
"""Rows of a table at most; the latest ones are shown."""

_NOTHING_FOREIGN = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}

_ASK = {"WWW-Authenticate": 'Basic realm="VFlow", charset="UTF-8"'}

Page = Callable[[Request], Awaitable[Response]]


class StatusPage:
    """The status page of one service.

    If tokens are configured, only administrators have access, each to the data of its own tenant.

    Args:
        parts: the parts of the service.
    """

    def __init__(self, parts: ServiceParts) -> None:
        self._parts = parts
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
    def routes(self) -> Sequence[Route]:
        """The pages, by path."""
        pages = {"/": self._show, "/picture": self._show_picture, "/overlay.png": self._draw}
        return [Route(path, self._guarded(page)) for path, page in pages.items()]

    def _guarded(self, page: Page) -> Page:
        """``page`` for administrators only, and only if the request names this machine by address or as localhost.

        Otherwise a foreign web site could point its own host name at this machine and read the page in a browser here
        (DNS rebinding).
        """

        async def answered(request: Request) -> Response:
            if not _names_this_machine(request.headers.get("host", "")):
                raise HTTPException(HTTPStatus.FORBIDDEN, "Ask by address, or as localhost.")
            if not self._parts.access.open:
                caller = self._administrator(request.headers.get("authorization", ""))
                if caller is None:
                    raise HTTPException(HTTPStatus.UNAUTHORIZED, "The password is an administrator's token.", _ASK)
                bind_caller(caller)
            return await page(request)

        return answered

    def _administrator(self, authorization: str) -> Caller | None:
        """The administrator whose token is the password of ``authorization``; None if it is not such a token."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            brought = base64.b64decode(encoded, validate=True).decode()
            caller = self._parts.access.bearer(brought.partition(":")[2])
        except (ValueError, ServiceError):
            return None
        return caller if scheme.lower() == "basic" and caller.admin else None

    def _visible(self, tenant: str) -> bool:
        """Whether the caller may see the data of ``tenant``."""
        return self._parts.access.open or current_caller().tenant == tenant

    async def _show(self, request: Request) -> Response:
        parts = self._parts
        visible = [session for session in parts.sessions if self._visible(session.tenant)]
        sessions = sorted(visible, key=lambda session: session.used, reverse=True)
        page = self._status.render(
            parts=parts,
            version=version("vflowopt"),
            now=time.time(),
            started=self._started,
            sessions=sessions[:MOST_ROWS],
            session_count=len(sessions),
            strategies=list(parts.strategies),
            low_detail=images_pb2.Image.LOW,
            fidelity=dict(parts.fidelity_monitor.totals),
            retune=parts.retunes.running and parts.retunes.running.metadata,
            turns=[turn for turn in parts.receipt_log.turns if self._visible(turn.tenant)][:MOST_ROWS],
            pictures=[each for each in parts.receipt_log.pictures if self._visible(each.tenant)][:MOST_ROWS],
        )
        return HTMLResponse(page, headers=_NOTHING_FOREIGN)

    async def _show_picture(self, request: Request) -> Response:
        _, image = await self._compressed(request)
        names, asked = ("tenant", "digest", "strategy", "detail"), request.query_params
        page = self._picture.render(
            query={name: asked[name] for name in names if name in asked},
            shapes=image.layout.shapes(),
            stages=[len(kept) for kept in image.kept],
            tokens=image.tokens,
            recycled=len(image.recycled),
        )
        return HTMLResponse(page, headers=_NOTHING_FOREIGN)

    async def _draw(self, request: Request) -> Response:
        picture, image = await self._compressed(request)
        grid = request.query_params.get("grid", "0")
        if not grid.isdecimal():
            raise _gone()
        drawn = await asyncio.to_thread(overlay, picture, image, int(grid))
        return Response(drawn, media_type="image/png", headers=_NOTHING_FOREIGN)

    async def _compressed(self, request: Request) -> tuple[Picture, CompressedImage]:
        """The picture that a request names, and its compressed form.

        Raises:
            HTTPException: one of them is no longer held, or the caller may not see it.
        """
        asked, parts = request.query_params, self._parts
        tenant = asked.get("tenant", "")
        picture = parts.pictures.held(tenant, asked.get("digest", ""))
        if picture is None or not self._visible(tenant):
            raise _gone()
        try:
            strategy = parts.strategies.get(asked.get("strategy", "")).strategy
            detail: Detail = "low" if asked.get("detail") == "low" else "high"
            key = (picture.in_detail(detail).identity, strategy, tenant)
            image = await parts.engine.call(lambda: parts.images.get(key), tenant).result()
        except ServiceError as error:
            raise _gone() from error
        if image is None:
            raise _gone()
        return picture, image


def _gone() -> HTTPException:
    return HTTPException(HTTPStatus.NOT_FOUND, "This picture is not held here (any more).")


def _names_this_machine(host: str) -> bool:
    """Whether ``host``, with or without a port, is an address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ipaddress.ip_address(name)
    except ValueError:
        return host.partition(":")[0] == "localhost"
    return True


def _size(count: float) -> str:
    """A number of bytes for people, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit == "MiB" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _ago(seconds: float) -> str:
    """A duration for people, such as ``5 min``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
