"""Reads a ChatRequest, and checks its parts, its options and its request_id; the fingerprints of requests."""

from __future__ import annotations

import hashlib
import json

from vflow_client.v1 import conversations_pb2
from vflow_server.images.pixel_bound import PixelBound
from vflow_server.images.store import PictureStore
from vflow_server.images.video_reader import VideoReader
from vflow_server.rpc.errors import InvalidRequest
from vflow_server.rpc.intake import reading_request
from vflow_server.sessions.turn import TurnRequest
from vflowopt.media.video import Video, Visual
from vflowopt.runtime.sampling import SamplingOptions

MOST_PARTS = 64
MOST_TEXT = 100_000
"""Characters of one text part at most; the model's context holds far less."""
MOST_NEW_TOKENS, DEFAULT_NEW_TOKENS = 4096, 256
MOST_STOPS, LONGEST_STOP = 8, 64
LONGEST_REQUEST_ID = 64


async def read_turn(
    request: conversations_pb2.ChatRequest, pictures: PictureStore, videos: VideoReader, tenant: str
) -> TurnRequest:
    """The turn that ``request`` of ``tenant`` asks for, with its pictures and videos decoded.

    Raises:
        ServiceError: a field is not valid, a picture cannot be decoded, or the model does not support videos.
        SamplingError: a sampling option is out of range.
    """
    check_request_id(request.request_id)
    with reading_request():
        texts = _texts(request)
    max_new_tokens, min_new_tokens = _lengths(request.options)
    sampling, stop = _options(request.options)
    videos.check({f"parts[{i}].video": part.video for i, part in enumerate(request.parts) if part.HasField("video")})
    pixels = PixelBound(pictures.limits, "scale them down, or show some of them ahead by AddImage or AddVideo")
    parts: list[str | Visual] = []
    for index, part in enumerate(request.parts):
        match part.WhichOneof("content"):
            case "image":
                field = f"parts[{index}].image"
                picture = await pictures.acquire(part.image, field, tenant)
                pixels.count(picture, field)
                parts.append(picture)
            case "video":
                parts.append(await videos.read(part.video, f"parts[{index}].video", tenant, pixels))
            case _:
                parts.append(texts[index])
    return TurnRequest(tuple(parts), max_new_tokens, sampling, stop, min_new_tokens)


def fingerprint(turn: TurnRequest) -> str:
    """Digest of a turn's content; equal for requests with the same parts and options."""
    texts = [part for part in turn.parts if isinstance(part, str)]
    # Of long texts a digest each, not the text: as JSON, millions of characters would hold up the event loop. The form
    # of shorter ones never changes, because a request may be sent again after an upgrade.
    spelt = sum(map(len, texts)) <= MOST_TEXT
    parts = [
        ["text", part if spelt else hashlib.sha256(part.encode()).hexdigest()]
        if isinstance(part, str)
        else _described(part)
        for part in turn.parts
    ]
    sampling = turn.sampling
    lengths = [turn.min_new_tokens, turn.max_new_tokens]
    content = [parts, lengths, sampling.temperature, sampling.top_p, sampling.seed, turn.stop]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fingerprint_of(visual: Visual) -> str:
    """Digest of a picture or a video that is added ahead of its question."""
    return hashlib.sha256(json.dumps(_described(visual)).encode()).hexdigest()


def _described(visual: Visual) -> list[object]:
    return ["video" if isinstance(visual, Video) else "image", *visual.identity]


def check_request_id(request_id: str) -> None:
    """Check the form of a request_id.

    Raises:
        ServiceError: OPTION_OUT_OF_RANGE.
    """
    if len(request_id) > LONGEST_REQUEST_ID or not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "request_id",
            f"request_id must be at most {LONGEST_REQUEST_ID} printable ASCII characters; a random UUID does well",
            metadata={"max": LONGEST_REQUEST_ID},
        )


def _texts(request: conversations_pb2.ChatRequest) -> dict[int, str]:
    """The texts of a turn whose parts are checked, by the index of their part. Each is read once: it may be long."""
    texts: dict[int, str] = {}
    if not 1 <= len(request.parts) <= MOST_PARTS:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE" if request.parts else "EMPTY_TURN",
            "parts",
            f"a turn has 1 to {MOST_PARTS} parts, this one has {len(request.parts)}",
            metadata={"value": len(request.parts), "min": 1, "max": MOST_PARTS},
        )
    for index, part in enumerate(request.parts):
        kind = part.WhichOneof("content")
        text = texts[index] = part.text if kind == "text" else ""
        if kind is None or (kind == "text" and (not text or text.isspace())):
            what = "no text, image or video" if kind is None else "no text but white space"
            raise InvalidRequest(
                "EMPTY_TURN",
                f"parts[{index}]",
                f"part {index} has {what}; say something or leave it out",
                metadata={"part": index},
            )
        if len(text) > MOST_TEXT:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                f"parts[{index}].text",
                f"part {index} has {len(text)} characters; send at most {MOST_TEXT}",
                metadata={"value": len(text), "max": MOST_TEXT},
            )
    if not any(texts.values()):
        raise InvalidRequest(
            "EMPTY_TURN",
            "parts",
            "a turn needs a text; to show a picture or a video ahead of its question use AddImage or AddVideo",
        )
    return texts


def _lengths(options: conversations_pb2.ChatOptions) -> tuple[int, int]:
    """The most and the fewest tokens of the answer."""
    max_new_tokens = options.max_new_tokens if options.HasField("max_new_tokens") else DEFAULT_NEW_TOKENS
    if not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "options.max_new_tokens",
            f"max_new_tokens is {max_new_tokens}; give 1 to {MOST_NEW_TOKENS}",
            metadata={"value": max_new_tokens, "min": 1, "max": MOST_NEW_TOKENS},
        )
    min_new_tokens = options.min_new_tokens
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "options.min_new_tokens",
            f"min_new_tokens is {min_new_tokens}; give 0 to max_new_tokens, which is {max_new_tokens}",
            metadata={"value": min_new_tokens, "min": 0, "max": max_new_tokens},
        )
    return max_new_tokens, min_new_tokens


def _options(options: conversations_pb2.ChatOptions) -> tuple[SamplingOptions, tuple[str, ...]]:
    if len(options.stop) > MOST_STOPS or not all(1 <= len(stop) <= LONGEST_STOP for stop in options.stop):
        raise InvalidRequest(
            "OPTION_OUT_OF_RANGE",
            "options.stop",
            f"give at most {MOST_STOPS} stop texts of 1 to {LONGEST_STOP} characters each",
            metadata={"max": MOST_STOPS},
        )
    sampling = SamplingOptions(
        temperature=options.temperature if options.HasField("temperature") else 0.0,
        top_p=options.top_p if options.HasField("top_p") else 1.0,
        seed=options.seed if options.HasField("seed") else None,
    )
    return sampling, tuple(options.stop)
