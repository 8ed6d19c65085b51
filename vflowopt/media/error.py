"""What is wrong with a picture, in a word for programs and a sentence for people."""

from __future__ import annotations


class PictureError(ValueError):
    """Bytes or pixels that are no usable picture.

    ``reason`` is one of PICTURE_EMPTY, PICTURE_NOT_AN_IMAGE, PICTURE_TRUNCATED (cut off or damaged),
    PICTURE_UNSUPPORTED (a valid file of a kind that is not read), PICTURE_TOO_LARGE (bytes), PICTURE_TOO_COMPLEX (more
    scans, segments, chunks or strips than a picture needs), PICTURE_TOO_MANY_PIXELS, PICTURE_TOO_SMALL (a side of 0)
    and PICTURE_TOO_NARROW; ``metadata`` holds the numbers and names in the message.
    """

    def __init__(self, reason: str, message: str, **metadata: object) -> None:
        """Set the reason, a word for programs, and the message, a sentence for people."""
        super().__init__(message)
        self.reason = reason
        self.metadata = {name: str(value) for name, value in metadata.items()}


def damaged(form: str, detail: str) -> PictureError:
    """PICTURE_TRUNCATED: a file of the format ``form`` that does not hold a whole picture."""
    return PictureError(
        "PICTURE_TRUNCATED",
        f"the {form} picture is cut off or damaged ({detail}); send a whole, valid file",
        format=form,
    )


def unsupported(form: str, mode: str, advice: str = "send the picture as an 8-bit RGB or grey PNG") -> PictureError:
    """PICTURE_UNSUPPORTED: a valid file of the format ``form`` whose kind of pixels, ``mode``, is not read."""
    return PictureError(
        "PICTURE_UNSUPPORTED",
        f"{form} pictures of this kind ({mode}) are not read; {advice}",
        **{
            "format": form,
            "mode": mode,
        },
    )
