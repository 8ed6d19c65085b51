"""The ledger: hears what became of each picture and turn, has it counted and traced, and remembers the latest receipts.

It never hears what was said: receipts hold figures only. Belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.telemetry.metrics import Metrics
from vflow_server.telemetry.tracing import Stage, Tracing

MOST_ENTRIES = 50
"""Receipts of each kind that are remembered."""


@dataclass(frozen=True)
class PictureEntry:
    """A picture that was taken in.

    Attributes:
        time: Unix time in seconds when its work was done.
        tenant: whose it is.
        receipt: what it cost.
    """

    time: float
    tenant: str
    receipt: images_pb2.ImageReceipt


@dataclass(frozen=True)
class TurnEntry:
    """A turn that was answered.

    Attributes:
        time: Unix time in seconds when it ended.
        tenant: whose it is.
        session: resource name of the session.
        usage: its tokens.
        receipt: what it cost.
    """

    time: float
    tenant: str
    session: str
    usage: conversations_pb2.Usage
    receipt: conversations_pb2.TurnReceipt


class ReceiptLog:
    """The receipts of one service.

    Args:
        metrics: what counts them.
        tracing: what makes spans of the times in them; they must be told within their call.

    Attributes:
        pictures: the latest ones, the newest first.
        turns: the latest ones, the newest first.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self.pictures: deque[PictureEntry] = deque(maxlen=MOST_ENTRIES)
        self.turns: deque[TurnEntry] = deque(maxlen=MOST_ENTRIES)

    def picture(self, tenant: str, receipt: images_pb2.ImageReceipt) -> None:
        """A picture was shown ahead of its question, or compressed for a caller."""
        self._metrics.picture(receipt)
        self._tracing.stages(list(_picture_stages(receipt)))
        self.pictures.appendleft(PictureEntry(time.time(), tenant, receipt))

    def turn(self, tenant: str, session: str, finished: conversations_pb2.Finished) -> None:
        """A turn was answered to its end."""
        receipt, now = finished.receipt, time.time()
        self._metrics.turn(finished)
        stages = [("queue", receipt.queue_ms / 1000)]
        for picture in finished.images:
            stages += _picture_stages(picture)
            self.pictures.appendleft(PictureEntry(now, tenant, picture))
        self._tracing.stages([*stages, ("prefill", receipt.prefill_ms / 1000), ("decode", receipt.decode_ms / 1000)])
        self.turns.appendleft(TurnEntry(now, tenant, session, finished.usage, receipt))


def _picture_stages(receipt: images_pb2.ImageReceipt) -> Iterator[Stage]:
    if not receipt.cache_hit:
        for name in ("encode", "score", "prune"):
            yield name, getattr(receipt, f"{name}_ms") / 1000
    if receipt.prefill_ms:
        yield "prefill", receipt.prefill_ms / 1000
