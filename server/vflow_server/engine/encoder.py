"""The encoder: encodes and compresses pictures, on a thread of its own where that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from vflow_server.engine.ops import Encode
from vflow_server.watchdog.pulse import PulsedExecutor
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.model_runner import Runtime

T = TypeVar("T")


class EncoderThread:
    """Runs the vision encoder.

    On a CPU the encoder has a thread of its own: a picture takes as long as a dozen steps of decoding, and no stream
    should wait for it. A CUDA device does one thing at a time anyway, and work from another thread would disturb the
    capture of graphs. There the encoder runs on the thread that submits the work.

    Args:
        runtime: the model.

    Attributes:
        pulse: the pulse of the thread; beats once for each piece of work.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = PulsedExecutor("vflow-encoder")
        self.pulse = self._thread.pulse

    def compress(self, ops: Sequence[Encode], *, threads: int) -> Future[list[CompressedImage]]:
        """Encode pictures in one batch and compress them.

        Args:
            ops: the pictures, all with the same strategy.
            threads: number of CPU threads to use.

        Returns:
            A future of the compressed pictures, in the order of ``ops``. It raises PictureError if the model cannot
            take the shape of one of them.
        """
        visuals, strategy = [op.visual for op in ops], ops[0].strategy
        return self.submit(lambda: self._runtime.compress(visuals, strategy), threads=threads)

    def submit(self, work: Callable[[], T], *, threads: int) -> Future[T]:
        """Run other work that uses the vision encoder, on the same thread; ``threads`` as for :meth:`compress`."""

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
        """Finish the work that is running, and drop the work that waits."""
        self._thread.shutdown(cancel_futures=True)
