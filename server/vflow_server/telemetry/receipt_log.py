"""The receipt log: counts and traces pictures and turns by their receipts, and holds the latest receipts.

Receipts hold numbers and names only, never texts or pixels. Belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from vflow_client.v1 import conversations_pb2, images_pb2
from vflow_server.telemetry.metrics import Metrics
from vflow_server.telemetry.tracing import Phase, Tracing

MOST_ENTRIES = 50
"""Receipts of each kind that are held."""


@dataclass(frozen=True)
class PictureEntry:
    """A picture that was added.

    Attributes:
        time: Unix time in seconds when it was added.
        tenant: the tenant.
        receipt: its receipt.
    """

    time: float
    tenant: str
    receipt: images_pb2.ImageReceipt


@dataclass(frozen=True)
class TurnEntry:
    """A turn that was answered.

    Attributes:
        time: Unix time in seconds when it ended.
        tenant: the tenant.
        session: resource name of the session.
        usage: numbers of its tokens.
        receipt: its receipt.
    """

    time: float
    tenant: str
    session: str
    usage: conversations_pb2.Usage
    receipt: conversations_pb2.TurnReceipt


class ReceiptLog:
    """The receipts of one service.

    Args:
        metrics: counts them.
        tracing: makes spans of the durations in them; a receipt must be logged within its call.

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
        """Log the receipt of a picture that was added before its question, or compressed for a caller."""
        self._metrics.picture(receipt)
        self._tracing.phases(list(_picture_phases(receipt)))
        self.pictures.appendleft(PictureEntry(time.time(), tenant, receipt))

    def turn(self, tenant: str, session: str, finished: conversations_pb2.Finished) -> None:
        """Log the receipts of a finished turn and its pictures."""
        receipt, now = finished.receipt, time.time()
        self._metrics.turn(finished)
        phases = [("queue", receipt.queue_ms / 1000)]
        for picture in finished.images:
            phases += _picture_phases(picture)
            self.pictures.appendleft(PictureEntry(now, tenant, picture))
        self._tracing.phases([*phases, ("prefill", receipt.prefill_ms / 1000), ("decode", receipt.decode_ms / 1000)])
        self.turns.appendleft(TurnEntry(now, tenant, session, finished.usage, receipt))


def _picture_phases(receipt: images_pb2.ImageReceipt) -> Iterator[Phase]:
    if not receipt.cache_hit:
        for name in ("encode", "score", "prune"):
            yield name, getattr(receipt, f"{name}_ms") / 1000
    if receipt.prefill_ms:
        yield "prefill", receipt.prefill_ms / 1000
