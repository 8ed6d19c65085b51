"""What takes long, and who is held up by it: nobody. The order is forced here; nothing depends on a time."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Serve
from tests.server.drawing import encoded as file_of
from tests.server.drawing import noise, png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Client, ContextExceeded, Session, VFlowError
from vflow_client.v1.conversations_pb2 import TurnReceipt
from vflow_client.v1.images_pb2 import ImageReceipt
from vflow_server.engine import encoding_queue
from vflow_server.engine.encoding_queue import Asking, EncodingQueue
from vflow_server.servicers.chat_request import MOST_PARTS, MOST_TEXT
from vflowopt.media import video
from vflowopt.media.video import Visual
from vflowopt.runtime.model_runner import Runtime

PATIENCE = 20.0
"""Seconds after which a test fails that would hang."""


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def encoding(serve: Serve) -> Served:
    """A service of its own."""
    return serve()


def show_clip(session: Session) -> ImageReceipt:
    return session.add_video([file_of(noise(56, 56, number)) for number in range(3)], fps=2)


def in_the_end() -> threading.Event:
    """An event that is set at last, so that a test that has failed ends."""
    event = threading.Event()
    timer = threading.Timer(1.5 * PATIENCE, event.set)
    timer.daemon = True
    timer.start()
    return event


def is_video(visual: Visual) -> bool:
    return isinstance(visual, video.Video)


class Held:
    """Lets no video be encoded to its end before it is released; each of its pieces ends at once.

    Args:
        runtime: encodes it.
        monkeypatch: exchanges that.
        holds: whether something is held, if it is not videos that are.
    """

    def __init__(
        self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, holds: Callable[[Visual], bool] = is_video
    ) -> None:
        self.begun, self.given_up, self.released = threading.Event(), threading.Event(), in_the_end()
        compressing = runtime.compressing

        def held(visuals: Sequence[Visual], *rest: Any) -> Generator[None, None, Any]:
            if holds(visuals[0]):
                try:
                    while not self.released.is_set():
                        self.begun.set()
                        yield
                except GeneratorExit:
                    self.given_up.set()
                    raise
            return (yield from compressing(visuals, *rest))

        monkeypatch.setattr(runtime, "compressing", held)


def tenant(served: Served, name: str) -> Client:
    return served.connect(tenant=name)


def test_pictures_and_answers_come_between_the_pieces_of_a_video(
    encoding: Served, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(encoding.service.runtime, monkeypatch)
    with encoding.client.session() as busy, tenant(encoding, "quiet") as quiet, quiet.session() as session:
        shown = threads.submit(show_clip, busy)
        assert held.begun.wait(PATIENCE)
        assert session.add_image(png(60, 60)).visual_tokens
        assert session.ask("What is it?", max_new_tokens=8).read()
        with encoding.client.session() as beside:  # nor does another session of the same tenant wait
            assert beside.add_image(png(60, 60, seed=7)).visual_tokens
        assert not shown.done(), "the video was encoded: the test proves nothing"
        held.released.set()
        assert shown.result(PATIENCE).frames == 3


def test_small_pictures_come_between_the_pieces_of_a_large_one(
    encoding: Served, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_queue, "LARGE_PIXELS", 100 * 100)
    held = Held(encoding.service.runtime, monkeypatch, lambda visual: visual.width >= 100)
    with encoding.client.session() as busy, tenant(encoding, "quiet") as quiet, quiet.session() as session:
        shown = threads.submit(busy.add_image, png(120, 100))
        assert held.begun.wait(PATIENCE)
        assert session.add_image(png(60, 60)).visual_tokens
        assert not shown.done(), "the large picture was encoded: the test proves nothing"
        held.released.set()
        assert shown.result(PATIENCE).visual_tokens


def test_a_video_that_nobody_waits_for_is_given_up(
    encoding: Served, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(encoding.service.runtime, monkeypatch)
    with encoding.client.session() as busy:
        shown = threads.submit(show_clip, busy)
        assert held.begun.wait(PATIENCE)
        encoding.run(encoding.service.sessions.delete(encoding.live(busy)))
        with pytest.raises(VFlowError):
            shown.result(PATIENCE)
        assert held.given_up.wait(PATIENCE)


def test_two_callers_of_one_video_wait_for_the_same_pieces(
    encoding: Served, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to ask goes away; the other gets what was encoded so far."""
    held = Held(encoding.service.runtime, monkeypatch)
    advance, asking = EncodingQueue.advance, [0]

    def noted(self: EncodingQueue, waiting: Sequence[Asking], *rest: Any, **options: Any) -> bool:
        asking.append(len(waiting))
        return advance(self, waiting, *rest, **options)

    monkeypatch.setattr(EncodingQueue, "advance", noted)
    with encoding.client.session() as first, encoding.client.session() as second:
        one = threads.submit(show_clip, first)
        assert held.begun.wait(PATIENCE)
        other = threads.submit(show_clip, second)
        until(lambda: asking[-1] == 2)
        encoding.run(encoding.service.sessions.delete(encoding.live(first)))
        with pytest.raises(VFlowError):
            one.result(PATIENCE)
        held.released.set()
        assert other.result(PATIENCE).frames == 3 and not held.given_up.is_set()


def test_a_stop_does_not_wait_for_a_video(
    runtime: Runtime, serve: Serve, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(grace="0.1s")
    held = Held(runtime, monkeypatch)
    session = served.client.session()
    shown = threads.submit(show_clip, session)
    assert held.begun.wait(PATIENCE)
    threads.submit(served.stop).result(PATIENCE)
    with pytest.raises(VFlowError):
        shown.result(PATIENCE)


class Tokenizing:
    """Lets no long text be tokenized before it is released, and counts what is."""

    def __init__(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released, self.characters = threading.Event(), in_the_end(), 0
        plain = runtime.chat.text

        def text(text: str) -> list[int]:
            if len(text) > 1000:
                self.begun.set()
                assert self.released.wait(2 * PATIENCE)
                self.characters += len(text)
            return plain(text)

        monkeypatch.setattr(runtime.chat, "text", text)


ENDLESS = ["".join(chr(0x1F600 + number) for number in range(50)) * (MOST_TEXT // 50)] * MOST_PARTS
"""As much as one turn may send."""


def test_answers_and_pictures_do_not_wait_for_a_text(
    served: Served, runtime: Runtime, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizing = Tokenizing(runtime, monkeypatch)
    quiet = tenant(served, "quiet")
    with served.client.session() as busy, quiet.session() as session:
        streaming = session.ask("Go on", max_new_tokens=400)
        read = iter(streaming)
        next(read)
        asked = threads.submit(lambda: busy.ask(*ENDLESS).read())
        assert tokenizing.begun.wait(PATIENCE)
        assert "".join(read)  # to the end
        assert quiet.compress(png(60, 60)).receipt.digest
        assert not asked.done()
        tokenizing.released.set()
        with pytest.raises(ContextExceeded) as refused:
            asked.result(PATIENCE)
        assert int(refused.value.metadata["new_tokens"]) > runtime.context
    assert tokenizing.characters < 4 * runtime.context + (1 << 16), "the rest need not be tokenized"
    quiet.close()


def test_a_picture_beside_a_text_that_is_too_long_is_not_encoded(
    served: Served, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Visual] = []
    compressing = runtime.compressing
    monkeypatch.setattr(
        runtime, "compressing", lambda visuals, *rest: encoded.extend(visuals) or compressing(visuals, *rest)
    )
    with served.client.session() as session:
        for text in ("word " * runtime.context, " " * (MOST_TEXT - 1) + "."):
            with pytest.raises(ContextExceeded):
                session.ask(text, images=[png(60, 60)]).read()
    assert not encoded


def test_a_stop_does_not_wait_for_a_text(
    serve: Serve, runtime: Runtime, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(grace="0.1s")
    tokenizing = Tokenizing(runtime, monkeypatch)
    session = served.client.session()
    asked = threads.submit(lambda: session.ask(*ENDLESS).read())
    assert tokenizing.begun.wait(PATIENCE)
    threads.submit(served.stop).result(PATIENCE)
    tokenizing.released.set()
    with pytest.raises(VFlowError):
        asked.result(PATIENCE)


def test_a_cache_that_cannot_be_restored_is_rebuilt(
    serve: Serve, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("device-side assert triggered")

    served = serve()
    with served.client.session() as session:
        first = session.ask("What is it?", max_new_tokens=8).read()
        served.on_engine(served.service.kv.release_idle)
        assert not session.state().resident
        with monkeypatch.context() as patch:
            patch.setattr("vflow_server.kv.manager.restore", fail)
            again = session.ask("And this?", max_new_tokens=8)
            text = again.read()
            assert again.receipt.restored_from == TurnReceipt.LOG
    with served.client.session() as undisturbed:
        assert [undisturbed.ask(text, max_new_tokens=8).read() for text in ("What is it?", "And this?")] == [
            first,
            text,
        ]


def test_a_fault_while_restoring_fails_that_turn_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with served.client.session() as session, served.client.session() as other:
        session.ask("What is it?", max_new_tokens=8).read()
        restore, log = served.service.kv.restore, served.live(session).state.sequence

        def fail(sequence: object) -> object:
            if sequence is log:
                raise RuntimeError("device-side assert triggered")
            return restore(sequence)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(served.service.kv, "restore", fail)
            with pytest.raises(VFlowError, match="INTERNAL"):
                session.ask("And this?", max_new_tokens=8).read()
            assert other.ask("What is it?", max_new_tokens=8).read()
        assert served.service.engine.alive
        assert session.ask("And this?", max_new_tokens=8).read()
