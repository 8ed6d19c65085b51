"""Work in idle time: pieces of bounded size that come between those of conversations, and give way to them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from typing import TypeVar

import torch

from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Idle, Wait
from vflow_server.kv.manager import Evictable, KVCacheManager
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.search.pause import Aside, Pause, Shortage

T = TypeVar("T")

Propose = Callable[[Callable[[], object]], Future[object]]
"""Has work that needs nothing of the engine's done somewhere else."""


def idle_work(
    kv: KVCacheManager,
    encoder: EncoderThread,
    pieces: Generator[T | Pause, None, None],
    sequences: Evictable,
    receive: Callable[[T], None],
    *,
    propose: Propose | None = None,
) -> Steps[None]:
    """Go through ``pieces``, each in idle time; they are closed at the end, whatever it is.

    Args:
        kv: makes room for it, and takes it back.
        encoder: encodes its pictures.
        pieces: work that pauses after each of them as :mod:`vflowopt.search.pause` says.
        sequences: what it holds pages with between two pieces; others may take them away.
        receive: called with each value that is no pause.
        propose: where proposals are made; None: pieces make none.

    Raises:
        CapacityExhausted: a piece needs more KV pages than there are.
        Exception: whatever a piece raised.
    """
    with kv.lending(sequences), closing(pieces):
        while True:
            yield Idle()
            try:
                value = next(pieces)
            except StopIteration:
                return
            except PoolExhausted as shortage:
                raise kv.too_large(shortage.needed) from shortage
            match value:
                case None:
                    pass
                case Shortage():
                    while not kv.make_room(value.pages):
                        yield Idle()
                case Aside(kind="encode"):
                    # On a processor answers keep a thread to themselves.
                    encoding = encoder.submit(value.work, threads=max(torch.get_num_threads() - 1, 1))
                    yield Wait(encoding)
                    value.finish(encoding.result())
                case Aside():
                    assert propose is not None
                    proposing = propose(value.work)
                    yield Wait(proposing)
                    value.finish(proposing.result())
                case _:
                    receive(value)
