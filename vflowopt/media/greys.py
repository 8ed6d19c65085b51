"""Greys of more than 8 bits, and signed ones, scaled to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.generic]


@dataclass(frozen=True)
class SampleType:
    """How a file stores a grey.

    Attributes:
        bits: bits of a sample.
        kind: "u" unsigned, "i" signed, "f" floating point.
        white_is_zero: whether the lowest value is white.
    """

    bits: int
    kind: str
    white_is_zero: bool = False

    @property
    def customary_whites(self) -> tuple[float, ...]:
        """The values that are usually white, for types of which no standard says which value is white."""
        if self.kind == "f":
            return 1.0, 255.0, 65535.0
        return (127.0,) if self.bits == 8 else (255.0, 32767.0) if self.bits == 16 else (255.0, 65535.0)

    def samples(self, stored: Numbers) -> Numbers:
        """The samples of pixels as Pillow holds them, which does not tell signed samples from others."""
        if self.bits in (8, 32) and self.kind != "f":
            return stored.view(f"{self.kind}{self.bits // 8}")
        return stored


@dataclass(frozen=True)
class Range:
    """The samples that become black and white.

    Attributes:
        low: becomes 0.
        high: becomes 255.
        reversed: whether black and white are exchanged afterwards.
    """

    low: float
    high: float
    reversed: bool = False

    @classmethod
    def of(cls, sample_type: SampleType, strips: Iterable[Numbers]) -> Range:
        """The range of a picture.

        White is known in unsigned files of up to 16 bits. In others it is not: the smallest customary range that
        includes all samples is taken, or else the picture's own range.
        """
        if sample_type.kind == "u" and sample_type.bits <= 16:
            return cls(0.0, 2.0**sample_type.bits - 1, sample_type.white_is_zero)
        extremes = [(float(finite.min()), float(finite.max())) for finite in map(_finite, strips)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        for white in sample_type.customary_whites:
            if 0.0 <= low and high <= white:
                return cls(0.0, white, sample_type.white_is_zero)
        return cls(low, high, sample_type.white_is_zero)

    def to_eight_bits(self, samples: Numbers) -> npt.NDArray[np.uint8]:
        """Scale samples of any shape to 0..255. Those that are no number, or infinite, count as 0."""
        values = _finite(samples)
        values -= self.low
        values *= 255.0
        values /= (self.high - self.low) or 1.0  # a flat picture has no range: it turns black
        greys = np.rint(values).astype(np.uint8)
        return 255 - greys if self.reversed else greys


def _finite(samples: Numbers) -> npt.NDArray[np.float64]:
    return np.nan_to_num(samples.astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
