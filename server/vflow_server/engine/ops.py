"""What work asks the engine for: a picture encoded, a sequence run, another thread's work, idle time.

Work yields an op and goes on once it is done; the result is then an attribute of the op.
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
        strategy: compresses it.
        tenant: who asks; nothing that was compressed for others is handed out.
        cache_hit: whether it was compressed before.
    """

    visual: Visual
    strategy: Strategy
    tenant: str
    cache_hit: bool = False
    _image: CompressedImage | None = field(default=None, init=False)

    @property
    def image(self) -> CompressedImage:
        """The compressed picture, once the op is done."""
        assert self._image is not None, "the op is not done"
        return self._image

    def put(self, image: CompressedImage, *, cache_hit: bool) -> None:
        """Hand in the compressed picture."""
        self._image, self.cache_hit = image, cache_hit


class Completion(Protocol):
    """A future of whatever result."""

    def done(self) -> bool:
        """Whether the result is there, or will never be."""
        ...

    def add_done_callback(self, callback: Callable[[object], object], /) -> None:
        """Call ``callback`` as soon as it is done, in any thread."""
        ...


@dataclass(eq=False)
class Wait:
    """Wait for what another thread does, such as reading a file.

    Attributes:
        future: done when that is done; whoever waits takes its result.
    """

    future: Completion
    _watched: bool = field(default=False, init=False)

    def watch(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, in any thread, when the future is done; only the first call counts."""
        if not self._watched:
            self._watched = True
            self.future.add_done_callback(lambda _: wake())


@dataclass(eq=False)
class Idle:
    """Time that nobody else needs, for one bounded piece of work."""


__all__ = ["Encode", "Forward", "Idle", "Op", "Wait"]

Op = Encode | Forward | Wait | Idle
