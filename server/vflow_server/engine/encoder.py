"""The encoder: encodes and compresses pictures, on a thread of its own where that helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from vflow_server.engine.ops import Encode
from vflow_server.watchdog.pulse import PulsedExecutor
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.model_runner import Runtime

T = TypeVar("T")

_NICENESS = 5
"""The encoder's thread has a third of the weight of the engine's, so that answers go on beside a large picture. It
holds the interpreter's lock for moments only, so the others hardly wait for a thread that stands back."""


class EncoderThread:
    """Runs the vision encoder.

    On a CPU the encoder has a thread of its own: a picture takes as long as a dozen steps of decoding, and no stream
    should wait for it. A CUDA device does one thing at a time anyway, and work from another thread would disturb the
    capture of graphs. There the encoder runs on the thread that submits the work, piece by piece.

    Args:
        runtime: the model.

    Attributes:
        inline: whether the encoder runs on the thread that submits the work.
        pulse: the pulse of the thread; beats once for each piece of work.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.inline = runtime.model.device.type != "cpu"
        self._thread = PulsedExecutor("vflow-encoder", niceness=_NICENESS)
        self.pulse = self._thread.pulse

    def begin(self, ops: Sequence[Encode]) -> Pieces[list[CompressedImage]]:
        """Begin to encode pictures in one batch, or a video, and to compress them. Nothing is run yet.

        Args:
            ops: the pictures, all with the same strategy.

        Returns:
            The pieces for :meth:`advance`; their result is in the order of ``ops``. They raise PictureError if the
            model cannot take the shape of a picture.
        """
        return (yield from self._runtime.compressing([op.visual for op in ops], ops[0].strategy))

    def advance(self, pieces: Pieces[T], *, threads: int) -> Future[T | None]:
        """Run the next piece.

        Args:
            pieces: from :meth:`begin`.
            threads: number of CPU threads to use.

        Returns:
            A future of the result of all pieces; of None if that was not the last one.
        """

        def piece() -> T | None:
            try:
                next(pieces)
            except StopIteration as end:
                result: T = end.value
                return result
            return None

        return self.submit(piece, threads=threads)

    def submit(self, work: Callable[[], T], *, threads: int) -> Future[T]:
        """Run other work that uses the vision encoder, on the same thread; ``threads`` as for :meth:`advance`.

        The work must be a piece of bounded size.
        """

        def working() -> T:
            torch.set_num_threads(threads)
            return work()

        if not self.inline:
            return self._thread.submit(working)
        future: Future[T] = Future()
        try:
            future.set_result(working())
        except Exception as failure:
            future.set_exception(failure)
        return future

    def close(self) -> None:
        """Finish the piece that is running, and drop the work that waits."""
        self._thread.shutdown(cancel_futures=True)
