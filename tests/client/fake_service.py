"""A service with scripted responses: the servicers of the contract and of operations, without any model."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.longrunning import operations_pb2_grpc
from google.longrunning.operations_pb2 import ListOperationsResponse, Operation
from google.protobuf import any_pb2, empty_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tests.client.fake_search import FakeSearch, found_strategy
from vflow_client.v1 import compression_pb2_grpc, conversations_pb2_grpc, strategies_pb2_grpc
from vflow_client.v1.compression_pb2 import CompressImageResponse
from vflow_client.v1.conversations_pb2 import (
    AddImageResponse,
    AddVideoResponse,
    ChatResponse,
    Finished,
    ListSessionsResponse,
    Session,
    TextDelta,
    TurnReceipt,
    Usage,
)
from vflow_client.v1.images_pb2 import ImageReceipt
from vflow_client.v1.strategies_pb2 import (
    ComparedStrategy,
    CompareStrategiesResponse,
    ListStrategiesResponse,
    Strategy,
    StrategyEvent,
)


class Refusal:
    """An error for the service to answer with. Without a reason: a bare status, as from a proxy on the way."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str = "",
        *,
        domain: str = "vflow.dev",
        metadata: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        self.domain = domain
        self.metadata = metadata or {}
        self.fields = fields or {}
        self.retry_after = retry_after

    def abort(self, context: grpc.ServicerContext) -> None:
        if not self.reason:
            context.abort(self.code, "bare refusal")
        details: list[Any] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain, metadata=self.metadata)
        ]
        if self.fields:
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                for field, text in self.fields.items()
            ]
            details.append(error_details_pb2.BadRequest(field_violations=violations))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(self.retry_after * 1000))
            details.append(retry)
        packed = [any_pb2.Any() for _ in details]
        for box, detail in zip(packed, details, strict=True):
            box.Pack(detail)
        status = status_pb2.Status(code=self.code.value[0], message="refused on purpose", details=packed)
        context.abort_with_status(rpc_status.to_status(status))


class FakeService(
    conversations_pb2_grpc.ConversationsServicer,
    compression_pb2_grpc.CompressionServicer,
    strategies_pb2_grpc.StrategiesServicer,
    operations_pb2_grpc.OperationsServicer,
):
    """Answers every call; `refusals[method]` are spent first, one per call; `requests[method]`, `tenants`
    and `authorizations` are noted.

    Chat sends `pieces`, or the next of `replies`; after the first piece it waits for `go_on`, and `cancelled` is set
    when a call ends unfinished. Each number in `cuts` breaks off one call after so many pieces.
    Retune begins `search`.
    """

    def __init__(self) -> None:
        self.requests: dict[str, list[Any]] = {}
        self.tenants: list[str | None] = []
        self.authorizations: list[str | None] = []
        self.refusals: dict[str, list[Refusal]] = {}
        self.pieces = ["two ", "red ", "stars"]
        self.replies: list[list[str]] = []
        self.cuts: list[int] = []
        self.search = FakeSearch()
        self.without_end = False
        self.sample_objectives: list[list[float]] = [[], []]
        self.budgets: dict[str, float] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self.cancelled = threading.Event()

    def _note(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.setdefault(method, []).append(request)
        metadata = dict(context.invocation_metadata())
        self.tenants.append(metadata.get("vflow-tenant"))
        self.authorizations.append(metadata.get("authorization"))
        if self.refusals.get(method):
            self.refusals[method].pop(0).abort(context)

    def CreateSession(self, request: Any, context: Any) -> Session:
        self._note("CreateSession", request, context)
        return Session(name="sessions/one", strategy=request.session.strategy or "strategies/preset-10")

    def GetSession(self, request: Any, context: Any) -> Session:
        self._note("GetSession", request, context)
        return Session(name=request.name, turn_count=3)

    def ListSessions(self, request: Any, context: Any) -> ListSessionsResponse:
        self._note("ListSessions", request, context)
        number = int(request.page_token or 0)
        names = [f"sessions/{2 * number}", f"sessions/{2 * number + 1}"]
        return ListSessionsResponse(
            sessions=[Session(name=name) for name in names], next_page_token=str(number + 1) if number < 2 else ""
        )

    def ForkSession(self, request: Any, context: Any) -> Session:
        self._note("ForkSession", request, context)
        return Session(name="sessions/two")

    def DeleteSession(self, request: Any, context: Any) -> empty_pb2.Empty:
        self._note("DeleteSession", request, context)
        return empty_pb2.Empty()

    def AddImage(self, request: Any, context: Any) -> AddImageResponse:
        self._note("AddImage", request, context)
        return AddImageResponse(
            receipt=ImageReceipt(
                image=f"{request.session}/images/1",
                width=30,
                height=20,
                visual_tokens=256,
                kept_tokens=[40, 20, 10],
                recycled_tokens=4,
                kv_bytes=2048,
                kv_bytes_full=20480,
            )
        )

    def AddVideo(self, request: Any, context: Any) -> AddVideoResponse:
        self._note("AddVideo", request, context)
        return AddVideoResponse(
            receipt=ImageReceipt(
                image=f"{request.session}/images/2",
                frames=len(request.video.frames),
                kept_tokens=[9, 5, 2],
                kept_by_frame=[6, 3],
            )
        )

    def Chat(self, request: Any, context: Any) -> Iterator[ChatResponse]:
        self._note("Chat", request, context)
        ended = False

        def notice_cancel() -> None:
            if not ended:
                self.cancelled.set()
                self.go_on.set()

        context.add_callback(notice_cancel)
        pieces = self.replies.pop(0) if self.replies else self.pieces
        cut = self.cuts.pop(0) if self.cuts else None
        for number, piece in enumerate(pieces):
            if number == 1:
                self.go_on.wait(timeout=10)
            if number == cut:
                Refusal(grpc.StatusCode.UNAVAILABLE).abort(context)
            yield ChatResponse(delta=TextDelta(text=piece))
        if cut == len(pieces):
            Refusal(grpc.StatusCode.CANCELLED).abort(context)
        ended = True
        if self.without_end:
            return
        yield ChatResponse(
            finished=Finished(
                text="".join(pieces),
                finish_reason=Finished.STOP,
                usage=Usage(prompt_tokens=50, reused_tokens=40, completion_tokens=4),
                receipt=TurnReceipt(
                    strategy="strategies/preset-10", kv_bytes=4096, kv_bytes_full=40960, first_token_ms=5.0
                ),
                images=[ImageReceipt(image="sessions/one/images/2")],
            )
        )

    def CompressImage(self, request: Any, context: Any) -> CompressImageResponse:
        self._note("CompressImage", request, context)
        return CompressImageResponse(embeddings=b"safetensors" if request.include_embeddings else b"")

    def ListStrategies(self, request: Any, context: Any) -> ListStrategiesResponse:
        self._note("ListStrategies", request, context)
        if request.page_token:
            return ListStrategiesResponse(strategies=[found_strategy("operations/one")])
        return ListStrategiesResponse(strategies=[a_strategy("strategies/full")], next_page_token="more")

    def GetStrategy(self, request: Any, context: Any) -> Strategy:
        self._note("GetStrategy", request, context)
        strategy = a_strategy(request.name)
        strategy.budget = self.budgets.get(request.name, strategy.budget)
        return strategy

    def CreateStrategy(self, request: Any, context: Any) -> Strategy:
        self._note("CreateStrategy", request, context)
        return Strategy(name=f"strategies/{request.strategy_id}")

    def ActivateStrategy(self, request: Any, context: Any) -> Strategy:
        self._note("ActivateStrategy", request, context)
        return Strategy(name=request.name, active=True)

    def RollbackStrategy(self, request: Any, context: Any) -> Strategy:
        self._note("RollbackStrategy", request, context)
        return Strategy(name="strategies/preset-25", active=True)

    def Retune(self, request: Any, context: Any) -> Operation:
        self._note("Retune", request, context)
        return self.search.now()

    def CompareStrategies(self, request: Any, context: Any) -> CompareStrategiesResponse:
        self._note("CompareStrategies", request, context)
        compared = [
            ComparedStrategy(
                strategy=a_strategy(name),
                visual_tokens=131.0 + number,
                visual_tokens_full=1312,
                kv_bytes=402432,
                kv_bytes_full=4030464,
                objective=0.9 + 0.05 * number,
                agreement=0.5 + 0.25 * number,
                sample_objectives=self.sample_objectives[number],
            )
            for number, name in enumerate(request.names)
        ]
        return CompareStrategiesResponse(compared=compared, samples=2, questions=4, data_digest="ab" * 32)

    def GetOperation(self, request: Any, context: Any) -> Operation:
        self._note("GetOperation", request, context)
        return self.search.now()

    def ListOperations(self, request: Any, context: Any) -> ListOperationsResponse:
        self._note("ListOperations", request, context)
        if request.page_token:
            return ListOperationsResponse(operations=[Operation(name="operations/old", done=True)])
        return ListOperationsResponse(operations=[self.search.now()], next_page_token="more")

    def WaitOperation(self, request: Any, context: Any) -> Operation:
        self._note("WaitOperation", request, context)
        return self.search.advance()

    def CancelOperation(self, request: Any, context: Any) -> empty_pb2.Empty:
        self._note("CancelOperation", request, context)
        self.search.cancel()
        return empty_pb2.Empty()


def a_strategy(name: str) -> Strategy:
    """A built-in strategy, active, that was replaced once in between."""
    event = StrategyEvent(kind=StrategyEvent.REPLACED, reason="on trial")
    event.time.FromSeconds(0)
    return Strategy(
        name=name,
        budget=0.1,
        starts=[0, 8, 16],
        ratios=[0.125, 1.0, 0.5],
        threshold=39.0,
        grid=17.0,
        positions=Strategy.KEPT,
        reserve=Strategy.OCCUPIED,
        active=True,
        built_in=True,
        etag="e1",
        events=[event],
    )
