"""A web backend for chats about pictures: it streams answers to browsers as Server-Sent Events.

vflow serve
VFLOW_ADDRESS=localhost:50051 uvicorn --app-dir examples chat_backend:app

    POST   /chats               the bytes of a picture               {"chat": ..., "kept_tokens": [...]}
    POST   /chats/{chat}/turns  {"question": "Which shape is green?"}  a stream of events:
                                delta {"text"}, then finished {"finish_reason", "usage"} or failed {"reason", "message"}
    DELETE /chats/{chat}
    GET    /usage               tokens of all finished turns of the user

The proxy that authenticates users in front of this names the caller in the header X-User. A browser that goes away
cancels its turn, and the chat is as it was before. While the service restarts, calls are tried again. A turn and a
picture carry request ids, so neither is repeated.
"""

import json
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vflow_client import InvalidRequest, VFlowError, aio

MAX_NEW_TOKENS = 256


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Connect to the service for as long as the backend runs."""
    app.state.chats = {}  # the session of each (user, chat)
    app.state.usage = defaultdict(Counter)  # tokens of each user
    async with aio.connect(os.environ.get("VFLOW_ADDRESS", "localhost:50051")) as client:
        app.state.client = client
        yield


async def create_chat(request: Request) -> Response:
    """Open a chat about a picture, which is compressed now, before anything is asked."""
    picture = await request.body()
    session = await request.app.state.client.session()
    try:
        receipt = await session.add_image(picture)
    except BaseException:
        await session.delete(timeout=2)
        raise
    chat = str(uuid.uuid4())
    request.app.state.chats[user_of(request), chat] = session
    return JSONResponse({"chat": chat, "kept_tokens": list(receipt.kept_tokens)}, status_code=201)


async def ask(request: Request) -> Response:
    """Ask a question, and stream the answer."""
    session = session_of(request)
    try:
        question = str((await request.json())["question"])
    except (ValueError, TypeError, KeyError):
        raise HTTPException(400, 'send {"question": ...}') from None
    usage = request.app.state.usage[user_of(request)]
    return StreamingResponse(answer(session, question, usage), media_type="text/event-stream")


async def answer(session: aio.AsyncSession, question: str, usage: Counter[str]) -> AsyncIterator[str]:
    """The events of an answer. Closed early, because the browser went away, it cancels the turn."""
    try:
        async with await session.ask(question, max_new_tokens=MAX_NEW_TOKENS) as pieces:
            async for piece in pieces:
                yield event("delta", text=piece)
            spent = {field.name: value for field, value in pieces.usage.ListFields()}
            usage.update(spent)
            yield event("finished", finish_reason=pieces.finish_reason, usage=spent)
    except VFlowError as error:
        yield event("failed", reason=error.reason, message=error.message)


async def delete_chat(request: Request) -> Response:
    """Forget a chat; the service frees its cache at once."""
    await session_of(request).delete()
    del request.app.state.chats[user_of(request), request.path_params["chat"]]
    return Response(status_code=204)


async def show_usage(request: Request) -> Response:
    """What the user's finished turns took."""
    return JSONResponse(request.app.state.usage[user_of(request)])


def user_of(request: Request) -> str:
    """Who calls."""
    if not (user := request.headers.get("x-user")):
        raise HTTPException(401)
    return user


def session_of(request: Request) -> aio.AsyncSession:
    """The session of a chat, which only its own user can see."""
    session: aio.AsyncSession | None = request.app.state.chats.get((user_of(request), request.path_params["chat"]))
    if session is None:
        raise HTTPException(404)
    return session


def event(name: str, **data: object) -> str:
    """A Server-Sent Event. JSON has no line ends of its own, so the data is one line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def refused(request: Request, error: Exception) -> Response:
    """What the service refuses is the caller's business: a damaged picture, too many chats."""
    assert isinstance(error, VFlowError)
    status = 400 if isinstance(error, InvalidRequest) else 503
    return JSONResponse({"reason": error.reason, "message": error.message}, status_code=status)


app = Starlette(
    routes=[
        Route("/chats", create_chat, methods=["POST"]),
        Route("/chats/{chat}/turns", ask, methods=["POST"]),
        Route("/chats/{chat}", delete_chat, methods=["DELETE"]),
        Route("/usage", show_usage),
    ],
    exception_handlers={VFlowError: refused},
    lifespan=lifespan,
)
