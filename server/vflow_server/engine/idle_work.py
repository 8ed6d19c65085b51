"""Work in idle time: pieces of bounded size, which run when no conversation needs the model."""

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
"""Runs work that does not need the engine somewhere else, such as in another process."""


def idle_work(
    kv: KVCacheManager,
    encoder: EncoderThread,
    pieces: Generator[T | Pause, None, None],
    sequences: Evictable,
    receive: Callable[[T], None],
    *,
    propose: Propose | None = None,
) -> Steps[None]:
    """Run ``pieces``, each in idle time, and close them at the end.

    Args:
        kv: frees KV pages for the work, and may evict its sequences between two pieces.
        encoder: encodes its pictures.
        pieces: work that pauses between its pieces, as :mod:`vflowopt.search.pause` describes.
        sequences: returns the sequences that hold pages between two pieces.
        receive: called with each value that is not a pause.
        propose: runs the pieces of kind "propose"; None if there are none.

    Raises:
        CapacityExhausted: a piece needs more KV pages than the pool has.
        Exception: the exception that a piece raised.
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
                    # On a CPU one thread is left to the answers.
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
