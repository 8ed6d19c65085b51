"""The picture store: has pictures decoded, and holds the latest ones so that a digest can name them."""

from __future__ import annotations

import re
from collections.abc import Collection

from vflow_client.v1 import images_pb2
from vflow_server.images.decoded_memory import DecodedMemory
from vflow_server.images.decoders import Decoders, default_workers
from vflow_server.kv.lru import ByteBoundedLRU
from vflow_server.rpc.errors import InvalidRequest, NotFound
from vflow_server.telemetry.metrics import Metrics
from vflowopt.media.picture import Detail, Picture, PictureError, PictureLimits

LARGEST_IN_USE = 4
"""Pixels decoded for all running requests at most, as a multiple of the bound on one picture. One request may have as
many."""

_DIGEST = re.compile("[0-9a-f]{64}")
_DETAILS: dict[int, Detail] = {
    images_pb2.Image.DETAIL_UNSPECIFIED: "high",
    images_pb2.Image.HIGH: "high",
    images_pb2.Image.LOW: "low",
}


class PictureStore:
    """Has pictures decoded, and holds the latest ones for their tenants. Belongs to the event loop's thread.

    Args:
        limits: the limits of one picture (also an attribute).
        held_bytes: bytes of decoded pictures to hold.
        metrics: counts how decoding ended.
        workers: number of processes that decode, at least 2; None: as many as fit the processors.
        seconds: processor time that decoding the largest picture may take.
    """

    def __init__(
        self,
        limits: PictureLimits,
        *,
        held_bytes: int,
        metrics: Metrics,
        workers: int | None = None,
        seconds: float = 10.0,
    ) -> None:
        self.limits = limits
        self._held_bytes = held_bytes
        self._held: ByteBoundedLRU[tuple[str, str], Picture] = ByteBoundedLRU(
            held_bytes, lambda picture: picture.pixels.nbytes
        )
        # The pictures held here, those that live samples hold, and those of running requests.
        most_decoded = 2 * held_bytes + LARGEST_IN_USE * 3 * limits.max_pixels
        self._decoded = DecodedMemory(most_decoded, self._bytes_held_of)
        self._decoders = Decoders(
            limits,
            workers=workers or default_workers(),
            seconds=seconds,
            memory=self._decoded,
            held=self.held,
            metrics=metrics,
        )

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
        try:
            data = image.data  # once: each access copies the file
            self.limits.check_file(data)
            return await self._decoders.decode(data, tenant)
        except PictureError as error:
            raise InvalidRequest(error.reason, field, str(error), metadata=error.metadata) from error

    def hold(self, tenant: str, pictures: Collection[Picture]) -> None:
        """Hold ``pictures``, which ``tenant`` has sent; none of them if together they exceed the bound."""
        if sum(picture.pixels.nbytes for picture in pictures) <= self._held_bytes:
            for picture in pictures:
                self._held.put((tenant, picture.digest), picture)

    def held(self, tenant: str, digest: str) -> Picture | None:
        """The picture with ``digest`` that ``tenant`` has sent; None if it is no longer held."""
        return self._held.get((tenant, digest))

    async def start(self) -> None:
        """Get ready to decode; without this the first picture takes a little longer."""
        await self._decoders.start()

    async def close(self) -> None:
        """Stop decoding at once."""
        await self._decoders.close()

    def _bytes_held_of(self, tenant: str) -> int:
        return sum(picture.pixels.nbytes for (owner, _), picture in self._held.items() if owner == tenant)

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
