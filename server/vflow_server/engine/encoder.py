"""The encoder: where pictures are encoded and compressed, beside the engine's thread where that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from vflow_server.engine.ops import Encode
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.model_runner import Runtime

T = TypeVar("T")


class EncoderThread:
    """Does the vision encoder's work.

    On a processor it has a thread of its own: a picture takes as long as a dozen steps of decoding, and nobody's stream
    should wait for it. A CUDA device does one thing at a time anyway, and what another thread starts there would
    disturb the capture of graphs: there the work is done by whoever submits it.

    Args:
        runtime: the model.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, "encoder")

    def compress(self, ops: Sequence[Encode], *, threads: int) -> Future[list[CompressedImage]]:
        """Encode pictures in one batch and compress them.

        Args:
            ops: all under one strategy.
            threads: how many of the processor's threads to use.

        Returns:
            The pictures; the future raises PictureError where the model cannot take the shape of one of them.
        """
        visuals, strategy = [op.visual for op in ops], ops[0].strategy
        return self.submit(lambda: self._runtime.compress(visuals, strategy), threads=threads)

    def submit(self, work: Callable[[], T], *, threads: int) -> Future[T]:
        """Do other work with the vision encoder, in the same place."""

        def working() -> T:
            torch.set_num_threads(threads)
            return work()

        if self._runtime.model.device.type == "cpu":
            return self._thread.submit(working)
        future: Future[T] = Future()
        try:
            future.set_result(working())
        except Exception as failure:
            future.set_exception(failure)
        return future

    def close(self) -> None:
        """Do nothing more; what is being done is finished."""
        self._thread.shutdown(cancel_futures=True)
