"""The encoder: encodes and compresses pictures, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from vflow_server.engine.ops import Encode
from vflow_server.watchdog.pulse import PulsedExecutor
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage, EncodedImage
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.side_stream import SideStream

T = TypeVar("T")

_NICENESS = 5
"""The encoder's thread has a third of the weight of the engine's, so that answers go on beside a large picture. It
holds the interpreter's lock for moments only, so the others hardly wait for a thread that stands back."""


class EncoderThread:
    """Runs the vision encoder.

    The encoder has a thread of its own: a picture takes as long as a dozen steps of decoding, and no stream of tokens
    should wait for it. On a CUDA device it has a stream of its own, too, so that pictures are encoded beside the steps.

    Args:
        runtime: the model.

    Attributes:
        pulse: the pulse of the thread; beats once for each piece of work.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stream = SideStream.on(runtime.model.device)
        self._thread = PulsedExecutor("vflow-encoder", niceness=_NICENESS)
        self.pulse = self._thread.pulse

    @property
    def has_stream(self) -> bool:
        """Whether pictures are encoded on a stream of their own, beside the steps and not between them."""
        return self._stream is not None

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
            if self._stream is None:
                return work()
            with self._stream:
                result = work()
                for each in result if isinstance(result, list) else [result]:
                    if isinstance(each, EncodedImage | CompressedImage):
                        self._stream.hand_over(each)
            return result

        return self._thread.submit(working)

    def close(self) -> None:
        """Finish the piece that is running, and drop the work that waits."""
        self._thread.shutdown(cancel_futures=True)
