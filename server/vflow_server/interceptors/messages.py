"""Reads the request of every call and writes its answer, within bounds: how many, how long, how slow.

gRPC would read a request before any of the service's code runs. Here every method is one with a stream of requests for
gRPC. So a call is counted first, and its request is read when the intake has a place for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import DecodeError, Message

from vflow_server.access.caller import current_caller
from vflow_server.rpc.answer_writer import AnswerWriter
from vflow_server.rpc.errors import CapacityExhausted, ServiceError
from vflow_server.rpc.handlers import Behaviour, Context, is_open
from vflow_server.rpc.intake import Bounds, Intake, bind_request, reading_request
from vflow_server.rpc.message_scan import MOST_FIELDS, has_too_many_fields
from vflow_server.rpc.open_calls import OpenCalls

MOST_CALLS_EACH, MOST_CALLS = 512, 2048
"""Open calls of one tenant, and of all tenants."""

MOST_OPEN_BYTES = 4096
"""Bytes of a request that needs no token."""

OPEN_PLACES = 2
"""Places of the longest message for requests that need no token. gRPC knows one longest message for all methods."""

MOST_OPEN_EACH = 32
"""Open calls without a token of one connection."""

MOST_STREAMS_EACH, MOST_STREAMS = 8, 256
"""Health watches and reflection streams of one connection, and of all."""

LAST_WORD = 5.0
"""Seconds that an answer may wait for a caller without a token that does not read."""

TOO_MANY_FIELDS = 8 << 20
"""Bytes that a request with too many fields counts for against the pace of its sender: counting takes time."""

Work = Callable[[str], AbstractAsyncContextManager[object]]
"""Enters the quota of a tenant, by name, for as long as a call lasts."""


class Messages:
    """The innermost layer: what is within gets a parsed request. Shared by the listeners of a service.

    Args:
        memory: bytes of messages on the way and in use, in all.
        most_bytes: bytes of one message at most.
        work: the quotas that methods need (``/package.Service/Method``), entered before their requests are read.
    """

    def __init__(self, memory: int, most_bytes: int, work: Mapping[str, Work]) -> None:
        strangers = OPEN_PLACES * most_bytes
        self._work = work
        self.intake = Intake(Bounds(memory - strangers, most_bytes))
        self.open_intake = Intake(
            Bounds(strangers, most_bytes, waiting=256, waiting_each=MOST_OPEN_EACH, prompt=0.1, longest=5.0)
        )
        self.calls = OpenCalls(MOST_CALLS_EACH, MOST_CALLS, _too_many_calls)
        self.open_calls = OpenCalls(MOST_OPEN_EACH, MOST_CALLS, _too_many_open_calls)
        self.open_streams = OpenCalls(MOST_STREAMS_EACH, MOST_STREAMS, _too_many_open_calls)

    def around(self, method: str, handler: Any) -> Any:
        """The handler with its requests read and its answers written here."""
        return grpc.stream_stream_rpc_method_handler(
            self._of_stranger(handler) if is_open(method) else self._of_tenant(handler, method),
            response_serializer=handler.response_serializer,
        )

    @property
    def on_the_way(self) -> int:
        """Number of requests that are being received."""
        return self.intake.readings + self.open_intake.readings

    @property
    def waiting(self) -> int:
        """Number of calls whose request waits to be received."""
        return self.intake.waiting + self.open_intake.waiting

    @property
    def bytes_held(self) -> int:
        """Bytes of requests and answers in use; short ones are not counted."""
        return self.intake.bytes_held

    def stop(self, refusal: ServiceError) -> None:
        """Refuse requests that have not been read."""
        self.intake.stop(refusal)

    def _of_tenant(self, handler: Any, method: str) -> Behaviour:
        behaviour: Behaviour = handler.unary_stream or handler.unary_unary
        parse, kind = handler.request_deserializer, _request_type(method)
        quota = self._work.get(method, _no_quota)

        async def call(_: Any, context: Context) -> None:
            tenant = current_caller().tenant
            with ExitStack() as counted:
                counted.enter_context(self.calls.count(tenant))
                async with quota(tenant):
                    message = await self.intake.receive(tenant, lambda: _read(context))
                    with self.intake.holding(tenant, len(message)) as release:
                        bind_request(release, partial(self.intake.charge_time, tenant))
                        with reading_request():
                            self._check_fields(tenant, message, kind)
                            request = _parse(message, parse)
                        answering = behaviour(request, context)
                        del message, request  # the behaviour lets go of them early
                        answer = await answering
                    if not handler.response_streaming:
                        counted.enter_context(self.intake.holding(tenant, answer.ByteSize()))
                        with AnswerWriter(context) as writer:
                            await writer.write_all(answer, counted)

        return call

    def _check_fields(self, tenant: str, message: bytes, kind: Descriptor) -> None:
        if has_too_many_fields(message, kind):
            self.intake.charge(tenant, TOO_MANY_FIELDS)
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_INVALID",
                f"the request has more than {MOST_FIELDS} fields; send fewer parts, frames, samples or numbers",
            )

    def _of_stranger(self, handler: Any) -> Behaviour:
        if handler.request_streaming:
            return self._of_stranger_streaming(handler)
        behaviour: Behaviour = handler.unary_stream or handler.unary_unary

        bound = self.open_streams if handler.response_streaming else self.open_calls

        async def call(_: Any, context: Context) -> None:
            with ExitStack() as counted:
                counted.enter_context(bound.count(context.peer()))
                request = _parse(await self._receive_open(context), handler.request_deserializer)
                answer = await behaviour(request, context)
                if not handler.response_streaming:
                    with AnswerWriter(context, LAST_WORD) as writer:
                        await writer.write_all(answer, counted)

        return call

    def _of_stranger_streaming(self, handler: Any) -> Behaviour:
        async def requests(context: Context) -> AsyncIterator[Message]:
            with suppress(_NoRequest):
                while True:
                    yield _parse(await self._receive_open(context), handler.request_deserializer)

        async def call(_: Any, context: Context) -> None:
            with self.open_streams.count(context.peer()), AnswerWriter(context, LAST_WORD) as writer:
                async for answer in handler.stream_stream(requests(context), context):
                    await writer.write(answer)

        return call

    async def _receive_open(self, context: Context) -> bytes:
        """The next request of a call without a token.

        Raises:
            ServiceError: it is too long, or an error of :meth:`Intake.receive`.
            _NoRequest: the caller has sent all.
        """
        message = await self.open_intake.receive(context.peer(), lambda: _read(context))
        if len(message) > MOST_OPEN_BYTES:
            raise ServiceError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_INVALID",
                f"the request has {len(message)} bytes; a method that needs no token takes at most {MOST_OPEN_BYTES}",
            )
        return message


class _NoRequest(ServiceError):
    """The caller has sent all of its requests, or has ended the call."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_INVALID", "the call has no request; send one")


async def _read(context: Context) -> bytes:
    message: Any = await context.read()
    if message is grpc.aio.EOF:
        raise _NoRequest
    return bytes(message)


def _parse(message: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(message)
    except DecodeError as error:
        raise ServiceError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "MESSAGE_INVALID",
            f"the request is not the message that this method takes ({error}); send what the contract says",
        ) from None


def _request_type(method: str) -> Descriptor:
    service, _, name = method.removeprefix("/").partition("/")
    return Default().FindServiceByName(service).methods_by_name[name].input_type


def _no_quota(tenant: str) -> AbstractAsyncContextManager[object]:
    return nullcontext()


def _too_many_calls(own: bool) -> ServiceError:
    if own:
        return CapacityExhausted(
            "tenant_calls",
            f"the tenant has {MOST_CALLS_EACH} calls open, as many as it may; let one end",
            metadata={"quota": MOST_CALLS_EACH},
        )
    return CapacityExhausted(
        "calls", f"{MOST_CALLS} calls are open, as many as there may be; retry when some have ended"
    )


def _too_many_open_calls(own: bool) -> ServiceError:
    of = "this connection has" if own else "there are"
    return CapacityExhausted(
        "calls", f"{of} too many calls of this kind open without a token; end some, or retry later"
    )
