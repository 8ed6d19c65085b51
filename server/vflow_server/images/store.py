"""The picture store: decodes pictures off the event loop, and holds the latest ones so that a digest can name them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import weakref
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from vflow_client.v1 import images_pb2
from vflow_server.kv.lru import ByteBoundedLRU
from vflow_server.rpc.errors import CapacityExhausted, InvalidRequest, NotFound
from vflowopt.media.picture import Detail, Picture, PictureError, PictureLimits

MOST_WAITING = 64
"""Pictures that may wait to be decoded, so that a slow one delays a bounded number of others."""

_LARGEST_IN_USE = 8
"""Pixels decoded for all running requests at most, as a multiple of the bound on one picture. One request can have half
of that."""

_DIGEST = re.compile("[0-9a-f]{64}")
_DETAILS: dict[int, Detail] = {
    images_pb2.Image.DETAIL_UNSPECIFIED: "high",
    images_pb2.Image.HIGH: "high",
    images_pb2.Image.LOW: "low",
}


class PictureStore:
    """Decodes pictures and holds the latest ones for their tenants. Belongs to the event loop's thread.

    Args:
        limits: the limits of one picture (also an attribute).
        held_bytes: bytes of decoded pictures to hold.
        threads: number of pictures that are decoded at the same time.
    """

    def __init__(self, limits: PictureLimits, *, held_bytes: int, threads: int = 2) -> None:
        self.limits = limits
        self._held_bytes = held_bytes
        self._held: ByteBoundedLRU[tuple[str, str], Picture] = ByteBoundedLRU(
            held_bytes, lambda picture: picture.pixels.nbytes
        )
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="vflow-picture")
        self._waiting = 0
        self._decoded = _BytesAlive()
        # The pictures held here, those that live samples hold, and those of running requests.
        self._most_decoded = 2 * held_bytes + _LARGEST_IN_USE * 3 * limits.max_pixels

    @property
    def bytes_held(self) -> int:
        """Bytes of the decoded pictures that are held."""
        return self._held.bytes_held

    @property
    def bytes_decoded(self) -> int:
        """Bytes of all decoded pictures in memory: of running requests, of live samples, and those held here."""
        return self._decoded.total

    async def acquire(self, image: images_pb2.Image, field: str, tenant: str) -> Picture:
        """The picture that ``image`` contains, or names by its digest, in the detail that it asks for; it is held.

        Args:
            image: the message.
            field: its path in the request.
            tenant: the tenant that sent it.

        Raises:
            ServiceError: OPTION_OUT_OF_RANGE if the detail is unknown, or an error of :meth:`read`.
        """
        detail = _detail(image.detail, field)
        picture = await self.read(image, field, tenant)
        self._held.put((tenant, picture.digest), picture)
        return picture.in_detail(detail)

    async def read(self, image: images_pb2.Image, field: str, tenant: str) -> Picture:
        """The picture as in :meth:`acquire`, but always in high detail, and without holding it.

        Raises:
            ServiceError: too many pictures wait to be decoded or are in memory; the bytes are not a picture within the
                limits; or the digest is malformed or names no picture that is held.
        """
        if image.WhichOneof("source") == "digest":
            return self._by_digest(image.digest, field, tenant)
        if self._waiting >= MOST_WAITING:
            raise CapacityExhausted("picture_decoding", f"{MOST_WAITING} pictures wait to be decoded; retry later")
        loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            if len(image.data) <= self.limits.max_bytes:
                digest = await loop.run_in_executor(self._threads, _sha256, image.data)
                if (held := self._held.get((tenant, digest))) is not None:
                    return held
            return await loop.run_in_executor(self._threads, self._decode, image.data)
        except PictureError as error:
            raise InvalidRequest(error.reason, field, str(error), metadata=error.metadata) from error
        finally:
            self._waiting -= 1

    def hold(self, tenant: str, pictures: Collection[Picture]) -> None:
        """Hold ``pictures``, which ``tenant`` has sent; none of them if together they exceed the bound."""
        if sum(picture.pixels.nbytes for picture in pictures) <= self._held_bytes:
            for picture in pictures:
                self._held.put((tenant, picture.digest), picture)

    def held(self, tenant: str, digest: str) -> Picture | None:
        """The picture with ``digest`` that ``tenant`` has sent; None if it is no longer held."""
        return self._held.get((tenant, digest))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _decode(self, data: bytes) -> Picture:
        """Decode in one of the threads. Checks the bound here, where all pictures decoded before are counted."""
        if (decoded := self.bytes_decoded) >= self._most_decoded:
            raise CapacityExhausted(
                "picture_decoding",
                f"the pictures of the requests under way take {decoded} bytes; retry when some have ended",
                metadata={"bytes": decoded, "max_bytes": self._most_decoded},
            )
        picture = Picture.decode(data, self.limits)
        self._decoded.add(picture)
        return picture

    def _by_digest(self, digest: str, field: str, tenant: str) -> Picture:
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(
                "DIGEST_INVALID",
                f"{field}.digest",
                f"{digest[:80]!r} is not a digest; give the SHA-256 of the picture's bytes as 64 lower-case "
                "hexadecimal digits",
                metadata={"digest": digest[:80]},
            )
        if (held := self.held(tenant, digest)) is None:
            raise NotFound(
                "PICTURE_NOT_HELD",
                f"the picture {digest} is not held here (any more); send its bytes",
                metadata={"digest": digest},
            )
        return held


def _detail(detail: int, field: str) -> Detail:
    if detail not in _DETAILS:
        known = ", ".join(images_pb2.Image.Detail.keys())
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            f"{field}.detail",
            f"there is no detail {detail}; give one of {known}",
            metadata={"value": detail},
        )
    return _DETAILS[detail]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _BytesAlive:
    """Bytes of the pixels of all decoded pictures that are still referenced anywhere. For any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, picture: Picture) -> None:
        """Count ``picture`` until its pixels are garbage-collected."""
        nbytes = picture.pixels.nbytes
        self._change(nbytes)
        weakref.finalize(picture.pixels, self._change, -nbytes).atexit = False

    def _change(self, nbytes: int) -> None:
        with self._lock:
            self.total += nbytes
