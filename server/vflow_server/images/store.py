"""Pictures as they come in: bytes are decoded off the event loop; a digest stands for a picture still held."""

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
"""Pictures that may wait to be decoded. One that takes long to decode keeps others waiting, but not without end."""

_LARGEST_IN_USE = 8
"""Pixels decoded for all requests under way, as a multiple of what one picture may have; one request brings half of
that at most."""

_DIGEST = re.compile("[0-9a-f]{64}")
_DETAILS: dict[int, Detail] = {
    images_pb2.Image.DETAIL_UNSPECIFIED: "high",
    images_pb2.Image.HIGH: "high",
    images_pb2.Image.LOW: "low",
}


class PictureStore:
    """Takes in pictures and holds the latest of them for their tenants. Belongs to the event loop's thread.

    Args:
        limits: what a picture may measure (also an attribute).
        held_bytes: bytes of decoded pictures to hold.
        threads: pictures decoded at the same time.
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
        # What is held here, what live samples hold, and what requests do.
        self._most_decoded = 2 * held_bytes + _LARGEST_IN_USE * 3 * limits.max_pixels

    @property
    def bytes_held(self) -> int:
        """Bytes of the decoded pictures that are held."""
        return self._held.bytes_held

    @property
    def bytes_decoded(self) -> int:
        """Bytes of all decoded pictures that anything still has: requests under way, samples, and what is held."""
        return self._decoded.total

    async def acquire(self, image: images_pb2.Image, field: str, tenant: str) -> Picture:
        """The picture that ``image``, at ``field`` of a request of ``tenant``, brings or stands for.

        Raises:
            ServiceError: what :meth:`read` raises, or its detail is none.
        """
        detail = _detail(image.detail, field)
        picture = await self.read(image, field, tenant)
        self._held.put((tenant, picture.digest), picture)
        return picture.in_detail(detail)

    async def read(self, image: images_pb2.Image, field: str, tenant: str) -> Picture:
        """The same in high detail, whatever ``image`` says of it. It is not held if it was not.

        Raises:
            ServiceError: too many wait to be decoded or are decoded already, it is not a picture within the limits, or
                its digest is malformed or of none that is held.
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
        """Hold ``pictures`` that ``tenant`` has sent, unless there is not even room for them without all others."""
        if sum(picture.pixels.nbytes for picture in pictures) <= self._held_bytes:
            for picture in pictures:
                self._held.put((tenant, picture.digest), picture)

    def held(self, tenant: str, digest: str) -> Picture | None:
        """The picture of ``digest`` that ``tenant`` has sent, if it is still held."""
        return self._held.get((tenant, digest))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _decode(self, data: bytes) -> Picture:
        """Decode in one of the threads, where all that was decoded before is counted already."""
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
    """Bytes of the pixels of all pictures that anybody still has, whichever request, cache or thread that is."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, picture: Picture) -> None:
        """Count ``picture``, until nobody has its pixels any more."""
        nbytes = picture.pixels.nbytes
        self._change(nbytes)
        weakref.finalize(picture.pixels, self._change, -nbytes).atexit = False

    def _change(self, nbytes: int) -> None:
        with self._lock:
            self.total += nbytes
