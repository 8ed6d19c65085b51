"""Work in pieces of bounded size, between which its driver may do other work, or give the work up."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")

Pieces = Generator[None, None, T]
"""Yields after each piece but the last, and returns the result. Closing it gives the work up."""


def whole(pieces: Pieces[T]) -> T:
    """Do all pieces, one after the other; returns the result. Raises what a piece raises."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def timed(pieces: Pieces[T], milliseconds: Callable[[float], float]) -> Pieces[tuple[T, float]]:
    """The same pieces, with the time that they took, without what came between them.

    Args:
        pieces: the work.
        milliseconds: from a ``time.perf_counter()`` to the milliseconds since.

    Returns:
        The result of ``pieces``, and their milliseconds.
    """
    total = 0.0
    with closing(pieces):
        while True:
            begun = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as end:
                return end.value, total + milliseconds(begun)
            total += milliseconds(begun)
            yield
