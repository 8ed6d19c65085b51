"""A showing: a picture or a video that comes ahead of its question, as work for the engine.

One step encodes it, the next ones prefill it. It is committed as a whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vflow_client.v1 import images_pb2
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Encode
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_state import SessionState
from vflow_server.sessions.reading import read
from vflow_server.sessions.receipts import image_receipt
from vflow_server.sessions.recording import recall, write_down
from vflow_server.sessions.turn import check_context
from vflow_server.store.session_record import Entry
from vflowopt.media.video import Visual


class Showing:
    """The work of adding one picture or video to a dialogue. Emits nothing; its result is the receipt.

    Args:
        bench: the engine's things.
        state: who is shown it; nothing else may be under way in it.
        session_name: the session's resource name.
        strategy_name: resource name of the dialogue's strategy.
        visual: the picture or video.
    """

    def __init__(
        self, bench: Workbench, state: SessionState, session_name: str, strategy_name: str, visual: Visual
    ) -> None:
        self._bench = bench
        self._dialogue = state
        self._session_name = session_name
        self._strategy_name = strategy_name
        self._visual = visual

    def __call__(self, emit: Callable[[object], None]) -> Steps[images_pb2.ImageReceipt]:
        """The steps of the showing."""
        runtime = self._bench.runtime
        with self._bench.kv.using(self._dialogue):
            yield from recall(self._bench, self._dialogue)
            sequence = self._dialogue.sequence(runtime)
            checkpoint = sequence.checkpoint()
            try:
                image, hit = yield Encode(self._visual, self._dialogue.strategy, self._dialogue.tenant)
                items = self._dialogue.picture(runtime.chat, image)
                check_context(sequence, items, 0, runtime.context)
                self._bench.kv.check_room(sequence, items)
                reading = yield from read(self._bench, self._dialogue, items, want_logits=False)
                self._bench.wait_for_device()
                prefill_ms = (time.perf_counter() - reading.begun) * 1000 if reading.begun else 0.0
                yield from write_down(self._dialogue, Entry(tuple(items), images=1, answered=False))
            except BaseException:  # GeneratorExit is how a cancelled showing ends
                sequence.rollback(checkpoint)
                raise
            self._dialogue.commit_picture(image, len(items))
        return image_receipt(
            self._visual,
            image,
            runtime,
            self._dialogue.strategy,
            self._strategy_name,
            cache_hit=hit,
            name=f"{self._session_name}/images/{self._dialogue.images}",
            prefill_ms=prefill_ms,
        )
