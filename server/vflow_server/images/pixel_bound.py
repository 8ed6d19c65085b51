"""How many pixels one request may bring."""

from __future__ import annotations

from vflow_server.rpc.errors import InvalidRequest
from vflowopt.media.picture import Picture, PictureLimits

MOST_OF_LARGEST = 4
"""Pixels of all that a request brings, as a multiple of what one picture may have: all are decoded at a time."""


class PixelBound:
    """Counts the pixels of what one request brings.

    Args:
        limits: of one picture.
        advice: what to do about too many, for the caller.

    Attributes:
        most: how many there may be.
    """

    def __init__(self, limits: PictureLimits, advice: str) -> None:
        self.most = MOST_OF_LARGEST * limits.max_pixels
        self._advice = advice
        self._counted = 0

    def count(self, picture: Picture, field: str) -> None:
        """Count those of ``picture``, which came at ``field`` of the request.

        Raises:
            InvalidRequest: PICTURE_TOO_MANY_PIXELS.
        """
        self._counted += picture.width * picture.height
        if self._counted > self.most:
            raise InvalidRequest(
                "PICTURE_TOO_MANY_PIXELS",
                field,
                f"with this one the pictures of the request have {self._counted} pixels together, more than "
                f"{self.most}; {self._advice}",
                metadata={"width": picture.width, "height": picture.height, "max_pixels": self.most},
            )
