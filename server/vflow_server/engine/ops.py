"""Ops: what work asks the engine for. An op encodes a picture, runs a sequence, waits for a future or for idle time.

Work yields an op and continues once the op is done; the result is then an attribute of the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.video import Visual
from vflowopt.runtime.generate import Forward


@dataclass(eq=False)
class Encode:
    """Encode and compress a picture or a video.

    Attributes:
        visual: the picture or video.
        strategy: the strategy that compresses it.
        tenant: the tenant that asks; a picture that was compressed for another tenant is not used.
        cache_hit: whether the compressed picture was cached; set when the op is done.
    """

    visual: Visual
    strategy: Strategy
    tenant: str
    cache_hit: bool = False
    _image: CompressedImage | None = field(default=None, init=False)

    @property
    def image(self) -> CompressedImage:
        """The compressed picture; valid once the op is done."""
        assert self._image is not None, "the op is not done"
        return self._image

    def put(self, image: CompressedImage, *, cache_hit: bool) -> None:
        """Set the result."""
        self._image, self.cache_hit = image, cache_hit


class Completion(Protocol):
    """A future of any result type."""

    def done(self) -> bool:
        """Whether the future has a result, has failed or was cancelled."""
        ...

    def add_done_callback(self, callback: Callable[[object], object], /) -> None:
        """Call ``callback``, in any thread, as soon as the future is done."""
        ...


@dataclass(eq=False)
class Wait:
    """Wait for a future, such as that of a file being read.

    Attributes:
        future: the future; the work reads the result from it.
    """

    future: Completion
    _watched: bool = field(default=False, init=False)

    def watch(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, in any thread, when the future is done. Only the first call of this method counts."""
        if not self._watched:
            self._watched = True
            self.future.add_done_callback(lambda _: wake())


@dataclass(eq=False)
class Idle:
    """Wait for idle time, enough for one bounded piece of work."""


__all__ = ["Encode", "Forward", "Idle", "Op", "Wait"]

Op = Encode | Forward | Wait | Idle
