"""The pages of the side port, as one Starlette application."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from vflow_server.monitoring.service_parts import ServiceParts
from vflow_server.monitoring.status_page import StatusPage

log = structlog.get_logger(__name__)


def pages(parts: ServiceParts, *, status_page: bool) -> Starlette:
    """The pages of one service.

    Args:
        parts: the parts of the service.
        status_page: whether to serve the status page as well as the metrics.
    """

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def nothing(request: Request) -> Response:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"There is {', '.join(sorted(route.path for route in routes))}.")

    routes = [Route("/metrics", metrics), *(StatusPage(parts).routes if status_page else ())]
    app = Starlette(
        routes=[*routes, Route("/{path:path}", nothing)],
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )
    # No route matches a target that is not a path, such as the address of another server.
    app.router.default = PlainTextResponse("400 Bad Request. Ask for a path.\n", HTTPStatus.BAD_REQUEST)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = "" if error.detail == status.phrase else error.detail
    return PlainTextResponse(f"{status.value} {status.phrase}. {detail}\n", status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    log.error("a page of the side port failed", path=request.url.path, exc_info=error)
    return PlainTextResponse("500 Internal Server Error.\n", HTTPStatus.INTERNAL_SERVER_ERROR)
