"""What work on the engine has at hand: the runtime, compressed pictures, and who holds KV pages.

Belongs to the engine's thread.
"""

from __future__ import annotations

from torch import Tensor

from vflow_server.lru import ByteBoundedLRU
from vflow_server.residency import Residency
from vflowopt.compression import CompressedImage
from vflowopt.picture import Picture
from vflowopt.runtime import Runtime
from vflowopt.strategy import Strategy


class Workbench:
    """The engine's thread's own things.

    Args:
        runtime: the model; handed over for good.
        compressed_bytes: bytes of compressed pictures to remember, so that the same picture under the same strategy is
            not encoded twice.
    """

    def __init__(self, runtime: Runtime, *, compressed_bytes: int) -> None:
        self.runtime = runtime
        self.residency = Residency(runtime)
        self._compressed: ByteBoundedLRU[tuple[str, Strategy], CompressedImage] = ByteBoundedLRU(
            compressed_bytes, _bytes
        )

    def compress(self, picture: Picture, strategy: Strategy) -> tuple[CompressedImage, bool]:
        """The compressed picture, and whether it was at hand already."""
        key = (picture.digest, strategy)
        if (held := self._compressed.get(key)) is not None:
            return held, True
        (made,) = self.runtime.compress([picture], strategy)
        self._compressed.put(key, made)
        return made, False


def _bytes(image: CompressedImage) -> int:
    layout = image.layout
    tensors: tuple[Tensor, ...] = (
        image.embeddings,
        image.positions,
        image.importance,
        image.recycled,
        *image.kept,
        layout.grid,
        layout.row,
        layout.column,
        layout.structural,
        layout.boxes,
    )
    return sum(tensor.nbytes for tensor in tensors)
