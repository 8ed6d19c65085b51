"""The received part of an answer: what `Answer` and `AsyncAnswer` share, without input or output."""

from collections.abc import Sequence

import grpc

from vflow_client.errors import AnswerChanged, Cancelled, ServerFault
from vflow_client.v1.conversations_pb2 import ChatResponse, Finished, TurnReceipt, Usage
from vflow_client.v1.images_pb2 import ImageReceipt


class Transcript:
    """The text of an answer so far and, once it is finished, its usage and receipts."""

    def __init__(self) -> None:
        """Starts with no text."""
        self._pieces: list[str] = []
        self._owed = ""  # text that was read before, and that a repeated call has yet to bring again
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
        """Appends the new text of an event and returns it; the final event has none, nor has what was read before.

        Raises:
            AnswerChanged: the event belongs to a repeated call, and its text is not the one that was read before.
        """
        if event.HasField("finished"):
            if self._owed:
                raise self._changed()
            self._finished = event.finished
            return ""
        text = event.delta.text
        known = min(len(text), len(self._owed))
        if text[:known] != self._owed[:known]:
            raise self._changed()
        self._owed, new = self._owed[known:], text[known:]
        if new:
            self._pieces.append(new)
        return new

    def _repeat(self) -> None:
        """Another call begins the answer anew."""
        self._owed = self.text

    def _end(self) -> Finished:
        if self._finished is None:
            raise RuntimeError("the answer is not finished: iterate over it, or call read(), first")
        return self._finished

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Cancelled("the answer was closed before its end", code=grpc.StatusCode.CANCELLED)

    def _changed(self) -> AnswerChanged:
        return AnswerChanged(
            "the connection broke in the middle of the answer, and the service, asked again, answered in other words; "
            "Session.state().turn_count shows whether the new answer counts",
            code=grpc.StatusCode.ABORTED,
        )

    def _incomplete(self) -> ServerFault:
        return ServerFault("the stream ended without a final event", code=grpc.StatusCode.INTERNAL)
