"""Decode steps of many conversations about one picture: their time, its bound, and how long the device idles."""

from __future__ import annotations

import statistics
from collections import abc

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import DevicePeak, seconds
from benchmarks.workload import Config, decoder_weights
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.batch import next_chunk
from vflowopt.runtime.cache import reserve
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler
from vflowopt.runtime.sequence import Sequence


def fill(runtime: Runtime, strategy: Strategy, image: CompressedImage, text: int) -> Sequence:
    """A sequence with a picture and ``text`` tokens in pages of its own, which nothing was computed for.

    The time of a step does not depend on the values, and a fork would read the pages of its origin, which stay in the
    device's own caches.

    Raises:
        PoolExhausted: too few pages are free; none is taken.
    """
    sequence = runtime.start(strategy)
    sequence.log.extend([image, *[0] * text])
    chunk = next_chunk(sequence, None)
    reserve([sequence.cache], [chunk.counts])
    chunk.commit()
    return sequence


class DecodeSteps:
    """Steps that add a token to each of some sequences, as the service runs them: sampled, and waited for.

    Args:
        runtime: the model.
        sequences: all different; each grows by a token with each step.
    """

    def __init__(self, runtime: Runtime, sequences: abc.Sequence[Sequence]) -> None:
        self._runtime = runtime
        self._sequences = sequences
        self._samplers = [Sampler() for _ in sequences]

    def __call__(self) -> None:
        """Run a step."""
        for sequence in self._sequences:
            sequence.log.append(0)
        self._runtime.step(self._sequences, [None] * len(self._sequences), self._samplers)

    def median_ms(self, steps: int) -> float:
        """Median milliseconds of ``steps`` steps, after two that are not counted."""
        for _ in range(2):
            self()  # makes and captures what is made once
        return 1e3 * statistics.median(seconds(self, self._runtime.model.device) for _ in range(steps))

    def bound_ms(self, peak: DevicePeak, config: Config) -> float:
        """The least milliseconds of a step: all weights are read once, and each sequence's keys and values."""
        weights, itemsize = decoder_weights(config), self._runtime.model.dtype.itemsize
        read = itemsize * weights + sum(map(kv_bytes_read, self._sequences))
        return peak.bound_ms(2 * weights * len(self._sequences), read)

    def idle_share(self, steps: int) -> float | None:
        """The share of the time of ``steps`` steps in which the device ran nothing; None without a CUDA device.

        Profiling takes the host some time, too; so it is rather too high than too low.
        """
        if self._runtime.model.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                self()
            self._runtime.synchronize()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profiled.events()
            if event.device_type == DeviceType.CUDA
        )
        return idle_share(spans)


def kv_bytes_read(sequence: Sequence) -> int:
    """Bytes of the keys and values that a decode step of a sequence reads."""
    return sum(stage.length * len(stage.layers) for stage in sequence.cache.stages) * sequence.cache.pool.token_bytes


def idle_share(spans: abc.Sequence[tuple[float, float]]) -> float | None:
    """The share of the time from the first beginning to the last end that lies in none of the ``spans``.

    Args:
        spans: beginnings and ends, ordered by beginning; they may overlap.

    Returns:
        From 0 to 1; None without spans.
    """
    if not spans:
        return None
    begun = until = spans[0][0]
    busy = 0.0
    for start, end in spans:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    return 1 - busy / (until - begun) if until > begun else None
