"""What work on the engine has at hand: the runtime, compressed pictures, and who holds KV pages.

Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar
from weakref import WeakValueDictionary

import torch

from vflow_server.engine.ops import Encode
from vflow_server.kv.logged_images import LoggedImages, picture_bytes
from vflow_server.kv.lru import ByteBoundedLRU
from vflow_server.kv.manager import KVCacheManager
from vflow_server.kv.offload import OffloadStore
from vflow_server.kv.prefix_cache import PrefixCache
from vflow_server.telemetry.metrics import Metrics
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Identity
from vflowopt.runtime.model_runner import Runtime

T = TypeVar("T")

_Key = tuple[Identity, Strategy, str]
"""The picture's identity, strategy and tenant."""


class Workbench:
    """The engine's thread's own things.

    Args:
        runtime: the model; handed over for good.
        compressed_bytes: bytes of compressed pictures that logs may hold, and as much again to remember, so that a
            tenant's picture is not encoded twice under the same strategy.
        offloaded: holds KV caches outside the pool for idle sessions.
        prefixes: beginnings to keep for sessions that begin the same way.
        metrics: counts what the work comes to (also an attribute); None: nobody looks.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        compressed_bytes: int,
        offloaded: OffloadStore,
        prefixes: int = 64,
        metrics: Metrics | None = None,
    ) -> None:
        self.runtime = runtime
        self.metrics = metrics or Metrics()
        self.prefixes = PrefixCache(prefixes)
        self.offloaded = offloaded
        self.kv = KVCacheManager(runtime, self.prefixes, offloaded, LoggedImages(compressed_bytes), self.metrics)
        self._compressed: ByteBoundedLRU[_Key, CompressedImage] = ByteBoundedLRU(compressed_bytes, picture_bytes)
        # Those that the log of some session holds are at hand as long as it does.
        self._in_use: WeakValueDictionary[_Key, CompressedImage] = WeakValueDictionary()
        self._encoder = ThreadPoolExecutor(1, "encoder")

    def close(self, keep_until: float | None = None) -> None:
        """Give back all pages, once the engine has ended.

        Args:
            keep_until: by the monotonic clock, until when to put KV caches into files for the next process; None: for
                none.
        """
        self._encoder.shutdown(cancel_futures=True)
        kept = {} if keep_until is None else self.kv.keep(keep_until)
        self.prefixes.clear()
        self.kv.release_all()
        self.offloaded.close(kept)

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the compressed pictures that are remembered."""
        return self._compressed.bytes_held

    def wait_for_device(self) -> None:
        """Return when the model has done all that was asked of it; a CUDA device only queues work."""
        if (device := self.runtime.model.device).type == "cuda":
            torch.cuda.synchronize(device)

    def held(self, asked: Encode) -> CompressedImage | None:
        """The compressed picture, if it is at hand for that tenant."""
        key = (asked.visual.identity, asked.strategy, asked.tenant)
        image = self._compressed.get(key)
        return self._in_use.get(key) if image is None else image

    def compress(self, asked: Sequence[Encode], *, threads: int) -> Future[list[CompressedImage]]:
        """Encode pictures in one batch and compress them, on a thread of their own where that helps.

        On a processor it does: a picture takes as long as a dozen steps of decoding, and nobody's stream should wait
        for it. A CUDA device does one thing at a time anyway, and what another thread starts there would disturb the
        capture of graphs.

        Args:
            asked: all under one strategy.
            threads: how many of the processor's threads to use.

        Returns:
            What becomes of it: the pictures, or a PictureError where the model cannot take the shape of one of them.
        """

        def compressed() -> list[CompressedImage]:
            return self.runtime.compress([each.visual for each in asked], asked[0].strategy)

        return self.on_encoder(compressed, threads=threads)

    def on_encoder(self, work: Callable[[], T], *, threads: int) -> Future[T]:
        """Have ``work`` with the vision encoder done, on its thread where :meth:`compress` would use that."""

        def working() -> T:
            torch.set_num_threads(threads)
            return work()

        if self.runtime.model.device.type == "cpu":
            return self._encoder.submit(working)
        future: Future[T] = Future()
        try:
            future.set_result(working())
        except Exception as failure:
            future.set_exception(failure)
        return future

    def adopt(self, image: CompressedImage, strategy: Strategy, tenant: str) -> CompressedImage:
        """The picture to put in the place of ``image``, which was stored: the same one, if it is at hand already."""
        key = (image.identity, strategy, tenant)
        if (at_hand := self._in_use.get(key)) is not None:
            return at_hand
        if image.embeddings.device != self.runtime.model.device:
            image = replace(image, embeddings=image.embeddings.to(self.runtime.model.device))
        self._in_use[key] = image
        return image

    def keep(self, asked: Sequence[Encode], images: Sequence[CompressedImage]) -> None:
        """Have compressed pictures at hand for their tenants from now on."""
        for each, image in zip(asked, images, strict=True):
            key = (each.visual.identity, each.strategy, each.tenant)
            self._in_use[key] = image
            self._compressed.put(key, image)
