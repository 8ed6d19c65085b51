"""A cache of compressed pictures, so that a tenant's picture is not encoded twice with the same strategy.

Belongs to the engine's thread.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from vflow_server.kv.logged_images import image_bytes
from vflow_server.kv.lru import ByteBoundedLRU
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Identity

Key = tuple[Identity, Strategy, str]
"""The picture's identity, the strategy, and the tenant."""


class ImageCache:
    """Compressed pictures by identity, strategy and tenant.

    Args:
        max_bytes: bytes of the least recently used cache. Pictures that a session's log holds are found as well, and do
            not count.
        device: the device that the decoder reads them from.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self._device = device
        self._latest: ByteBoundedLRU[Key, CompressedImage] = ByteBoundedLRU(max_bytes, image_bytes)
        self._in_use: WeakValueDictionary[Key, CompressedImage] = WeakValueDictionary()

    @property
    def bytes_held(self) -> int:
        """Bytes of the pictures in the least recently used cache."""
        return self._latest.bytes_held

    def get(self, key: Key) -> CompressedImage | None:
        """The compressed picture; None if it is not cached and no session holds it."""
        image = self._latest.get(key)
        return self._in_use.get(key) if image is None else image

    def put(self, key: Key, image: CompressedImage) -> None:
        """Cache a picture that was just compressed."""
        self._in_use[key] = image
        self._latest.put(key, image)

    def intern(self, image: CompressedImage, strategy: Strategy, tenant: str) -> CompressedImage:
        """The shared copy of ``image``, which was read from the archive: one that a session holds, or else this one."""
        key = (image.identity, strategy, tenant)
        if (known := self._in_use.get(key)) is not None:
            return known
        if image.embeddings.device != self._device:
            image = replace(image, embeddings=image.embeddings.to(self._device))
        self._in_use[key] = image
        return image
