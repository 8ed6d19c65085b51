"""Work in spare time: pieces of bounded size that come between those of sequences, and give way to them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import torch

from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Idle, Wait
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.manager import Evictable
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.search.pause import Aside, Shortage

Elsewhere = Callable[[Callable[[], Any]], Future[Any]]
"""Has work that needs nothing of the engine's done somewhere else."""


def in_spare_time(
    bench: Workbench,
    pieces: Generator[Any, None, None],
    sequences: Evictable,
    told: Callable[[Any], None],
    *,
    propose: Elsewhere | None = None,
) -> Steps[None]:
    """Go through ``pieces``, each in spare time; they are closed at the end, whatever it is.

    Args:
        bench: the engine's things.
        pieces: work that pauses after each of them as :mod:`vflowopt.search.pause` says.
        sequences: what it holds pages with between two pieces; others may take them away.
        told: called with each value that is no pause.
        propose: where proposals are made; None: pieces make none.

    Raises:
        CapacityExhausted: a piece needs more KV pages than there are.
        Exception: whatever a piece raised.
    """
    with bench.kv.lending(sequences), closing(pieces):
        while True:
            yield Idle()
            try:
                said = next(pieces)
            except StopIteration:
                return
            except PoolExhausted as shortage:
                raise bench.kv.too_large(shortage.needed) from shortage
            match said:
                case None:
                    pass
                case Shortage():
                    while not bench.kv.make_room(said.pages):
                        yield Idle()
                case Aside(kind="encode"):
                    # On a processor answers keep a thread to themselves.
                    encoding = bench.on_encoder(said.work, threads=max(torch.get_num_threads() - 1, 1))
                    yield Wait(encoding)
                    said.finish(encoding.result())
                case Aside():
                    assert propose is not None
                    proposing = propose(said.work)
                    yield Wait(proposing)
                    said.finish(proposing.result())
                case _:
                    told(said)
