"""The encoder's thread and, where the device has streams, its stream; a stand-in shows what runs within it."""

import threading
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import pytest

from tests.server.drawing import noise
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.encoding_queue import PICTURES, Asking, EncodingQueue
from vflow_server.engine.ops import Encode
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache
from vflowopt.compression.pipeline import CompressedImage, EncodedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.side_stream import SideStream


class Stream:
    """Notes what happens within it."""

    def __init__(self) -> None:
        self.within = False
        self.uses = 0
        self.thread: threading.Thread | None = None
        self.handed_over: list[EncodedImage | CompressedImage] = []

    def __enter__(self) -> Self:
        self.within, self.thread = True, threading.current_thread()
        self.uses += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.within = False

    def hand_over(self, image: EncodedImage | CompressedImage) -> None:
        assert self.within
        self.handed_over.append(image)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(SideStream, "on", lambda device: stream)
    return stream


def asked(*seeds: int) -> list[Encode]:
    pictures = [Picture.from_pixels(noise(56, 56, seed)) for seed in seeds]
    return [Encode(picture, Strategy.full(), "tenant") for picture in pictures]


def test_every_piece_runs_within_the_stream(runtime: Runtime, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EncoderThread(runtime)
    inside: list[bool] = []
    tiles = runtime.model.tiles  # type: ignore[attr-defined]
    monkeypatch.setattr(runtime.model, "tiles", lambda picture: (inside.append(stream.within), tiles(picture))[1])
    pieces = encoder.begin(asked(1, 2))
    images, runs = None, 0
    while images is None:
        images = encoder.advance(pieces, threads=1).result(20)
        runs += 1
        assert not stream.within, "a result is handed out before its stream has finished"
    assert inside == [True, True] and stream.uses == runs > 2
    assert stream.handed_over == images and stream.thread is encoder.pulse.thread is not threading.current_thread()
    (encoded,) = encoder.submit(lambda: runtime.model.encode([asked(1)[0].visual]), threads=1).result(20)  # type: ignore[list-item]
    assert stream.handed_over[-1] is encoded
    with pytest.raises(ZeroDivisionError):
        encoder.submit(lambda: 1 // 0, threads=1).result(20)
    assert not stream.within
    encoder.close()


def test_a_device_without_streams_has_none(runtime: Runtime) -> None:
    encoder = EncoderThread(runtime)
    assert not encoder.has_stream
    encoder.close()


@pytest.mark.parametrize("answering", [False, True])
@pytest.mark.parametrize("has_stream", [False, True])
def test_several_pictures_are_encoded_beside_answers_only_on_a_stream_of_their_own(
    runtime: Runtime, request: pytest.FixtureRequest, has_stream: bool, answering: bool
) -> None:
    if has_stream:
        request.getfixturevalue("stream")
    encoder = EncoderThread(runtime)
    begun: list[int] = []
    begin = encoder.begin

    def noted(ops: Any) -> Any:
        begun.append(len(ops))
        return begin(ops)

    encoder.begin = noted  # type: ignore[method-assign]
    queue = EncodingQueue(ImageCache(1 << 20, runtime.model.device), encoder, TokenMeter())
    asking: list[Asking] = []
    for op in asked(*range(PICTURES + 1)):
        task: Any = SimpleNamespace(tenant="tenant", op=op, done=lambda: None)
        asking.append(Asking(task, op))
    ended = threading.Event()
    queue.advance(asking, ended.set, answering=answering)
    assert ended.wait(20)
    assert begun == [PICTURES if has_stream or not answering else 1]
    encoder.close()
