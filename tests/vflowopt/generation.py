"""A sequence run directly on the runtime, as the service's engine runs it."""

from collections import abc

import numpy as np
import torch
from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Detail, Picture
from vflowopt.media.video import Video
from vflowopt.runtime.generate import decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler, sample
from vflowopt.runtime.sequence import Sequence


class Chat:
    """One sequence; records the logits of every generated token."""

    def __init__(self, runtime: Runtime, strategy: Strategy, detail: Detail = "high") -> None:
        self.runtime = runtime
        self.strategy = strategy
        self.detail: Detail = detail
        self.sequence: Sequence = runtime.start(strategy)
        self.turns = 0
        self.logits: list[Tensor] = []
        self._ahead: list[object] = []

    def look(self, shown: np.ndarray | Video) -> None:
        """Add a picture or a video ahead of its question."""
        self._ahead.append(self._compressed(shown))
        items = self.runtime.chat.turn(self.turns, self._ahead, generate=False)
        self.runtime.extend(self.sequence, items[self._read :], want_logits=False)
        self._read = len(items)

    _read = 0

    def ask(self, parts: abc.Sequence[str | np.ndarray | Video], new_tokens: int) -> list[int]:
        """One turn, greedy; returns the answer's tokens without the end token."""
        ready = [part if isinstance(part, str) else self._compressed(part) for part in parts]
        items = self.runtime.chat.turn(self.turns, [*self._ahead, *ready])[self._read :]
        before, begin = self.sequence.checkpoint(), len(self.sequence.log) + len(items)
        self.sequence.log.extend(items)
        try:
            # What `generate` does, but recording the logits.
            for forward in decode(self.sequence, self.runtime.chat, Sampler(), max_new_tokens=new_tokens):
                (logits,) = self.runtime.advance([self.sequence])
                assert logits is not None
                self.logits.append(logits)
                (forward.token,) = sample(logits[None], [Sampler()])
        except BaseException:
            self.sequence.rollback(before)
            raise
        self.turns, self._ahead, self._read = self.turns + 1, [], 0
        return [item for item in self.sequence.log[begin:] if isinstance(item, int)]

    def _compressed(self, shown: np.ndarray | Video) -> CompressedImage:
        visual = shown if isinstance(shown, Video) else Picture.from_pixels(shown).in_detail(self.detail)
        (image,) = self.runtime.compress([visual], self.strategy)
        return image


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A picture of smooth colours with a textured spot: uint8 [height, width, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(1, 2, 0) * 255
    pixels = smooth.round().to(torch.uint8).numpy()
    spot = pixels[height // 3 : height // 2, width // 3 : width // 2]
    spot[:] = torch.randint(0, 256, spot.shape, generator=generator, dtype=torch.uint8).numpy()
    return pixels


def video(height: int, width: int, seconds: abc.Sequence[float], seed: int) -> Video:
    """A video whose frames are all different pictures."""
    frames = [Picture.from_pixels(picture(height, width, seed * 100 + index)) for index in range(len(seconds))]
    return Video.of(frames, seconds)
