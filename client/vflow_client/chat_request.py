"""The request of a turn: shared by the synchronous and the asyncio client, without input or output of its own."""

import random
import uuid
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

from vflow_client.image_source import Detail, ImageSource, ImageSources, is_one_image, to_image
from vflow_client.picture_path import names_picture
from vflow_client.v1.conversations_pb2 import ChatOptions, ChatRequest, Part
from vflow_client.video_source import Video, to_video

PartSource: TypeAlias = "ImageSource | Video"
"""A part of a turn: a `str` is text, a `Video` a video, anything else a picture."""


def new_request_id() -> str:
    """An identifier for a request that may be sent again."""
    return str(uuid.uuid4())


def chat_request(
    session: str,
    parts: Sequence[PartSource],
    *,
    images: ImageSources = (),
    detail: Detail = "auto",
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> ChatRequest:
    """The request for one turn, under a fresh random request_id, so that it can be sent again safely.

    Args:
        session: `sessions/{session}`.
        parts: the turn in order; a `str` is text, a `Video` a video, anything else a picture.
        images: a picture, or several, before all parts; here a `str` is a path.
        detail: how closely the model looks at the turn's pictures.
        max_new_tokens, min_new_tokens, temperature, top_p, seed, stop: see `ChatOptions`; None leaves the service's
            default.

    Raises:
        OSError: a picture's path that cannot be read.
        TypeError: a part that is neither text nor a picture nor a video.
        ValueError: a number outside the range of its field, an unknown detail, or a web address for a picture.

    Warns:
        UserWarning: a text is nothing but the name of a picture's file.
    """
    sources: Any = [images] if is_one_image(images) else images
    pictures = [Part(image=to_image(image, detail)) for image in sources]
    message = [*pictures, *(_part(part, detail) for part in parts)]
    options = ChatOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_p=top_p,
        # A sampled answer that is cut off can only be continued if it is sampled again in the same way.
        seed=random.getrandbits(63) if seed is None and temperature else seed,
        stop=[stop] if isinstance(stop, str) else list(stop),
    )
    return ChatRequest(session=session, parts=message, options=options, request_id=new_request_id())


def _part(source: PartSource, detail: Detail) -> Part:
    match source:
        case str():
            if names_picture(source):
                warnings.warn(
                    f"{source!r} is sent as text, although there is a picture of that name; to send the picture, pass "
                    f"pathlib.Path({source!r}) or images={source!r}",
                    stacklevel=5,  # whoever called ask()
                )
            return Part(text=source)
        case Video():
            return Part(video=to_video(source))
    return Part(image=to_image(source, detail))
