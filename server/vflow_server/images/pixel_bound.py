"""The bound on the pixels of one request."""

from __future__ import annotations

from vflow_server.rpc.errors import InvalidRequest
from vflowopt.media.picture import Picture, PictureLimits

MOST_OF_LARGEST = 4
"""Pixels of all pictures of a request at most, as a multiple of the bound on one picture: all are in memory at once."""


class PixelBound:
    """Counts the pixels of the pictures of one request.

    Args:
        limits: the limits of one picture.
        advice: what the caller can do about too many pixels, for the error message.

    Attributes:
        most: number of pixels that the request may have.
    """

    def __init__(self, limits: PictureLimits, advice: str) -> None:
        self.most = MOST_OF_LARGEST * limits.max_pixels
        self._advice = advice
        self._counted = 0

    def count(self, picture: Picture, field: str) -> None:
        """Count the pixels of ``picture``, which is at ``field`` of the request.

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
