"""The received part of an answer: what `Answer` and `AsyncAnswer` share, without input or output."""

from collections.abc import Sequence

import grpc

from vflow_client.errors import Cancelled, ServerFault
from vflow_client.v1.conversations_pb2 import ChatResponse, Finished, TurnReceipt, Usage
from vflow_client.v1.images_pb2 import ImageReceipt


class Transcript:
    """The text of an answer so far and, once it is finished, its usage and receipts."""

    def __init__(self) -> None:
        """Starts with no text."""
        self._pieces: list[str] = []
        self._finished: Finished | None = None
        self._closed = False

    @property
    def text(self) -> str:
        """The text read so far; the whole answer once it is finished."""
        return "".join(self._pieces)

    @property
    def finished(self) -> bool:
        """Whether the answer has been read to its end."""
        return self._finished is not None

    @property
    def finish_reason(self) -> str:
        """`"STOP"`, `"LENGTH"` or `"STOP_STRING"`. Raises RuntimeError before the answer has been read to its end."""
        return Finished.FinishReason.Name(self._end().finish_reason)

    @property
    def usage(self) -> Usage:
        """Token counts of the turn. Raises RuntimeError before the answer has been read to its end."""
        return self._end().usage

    @property
    def receipt(self) -> TurnReceipt:
        """What the turn cost. Raises RuntimeError before the answer has been read to its end."""
        return self._end().receipt

    @property
    def images(self) -> Sequence[ImageReceipt]:
        """The receipts of the turn's own pictures. Raises RuntimeError before the answer has been read to its end."""
        return self._end().images

    def _append(self, event: ChatResponse) -> str:
        """Appends the text of an event and returns it; the final event has none."""
        if event.HasField("finished"):
            self._finished = event.finished
            return ""
        self._pieces.append(event.delta.text)
        return event.delta.text

    def _end(self) -> Finished:
        if self._finished is None:
            raise RuntimeError("the answer is not finished: iterate over it, or call read(), first")
        return self._finished

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Cancelled("the answer was closed before its end", code=grpc.StatusCode.CANCELLED)

    def _incomplete(self) -> ServerFault:
        return ServerFault("the stream ended without a final event", code=grpc.StatusCode.INTERNAL)
