"""Videos through the service: answered as the library does, pruned as a whole, kept like pictures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from numpy.typing import NDArray

from tests.server.conftest import Serve
from tests.server.drawing import encoded, noise
from tests.server.waiting import until
from tests.vflowopt.generation import Chat
from tests.vflowopt.models.matrix import TinyModel
from tests.vflowopt.models.tiny_llava import LLAVA
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN3_VL
from tests.vflowopt.tiny_models import SHAPES
from vflow_client import (
    CapacityExhausted,
    Client,
    Image,
    PictureNotHeld,
    RequestIdReused,
    Session,
    Video,
    VideoRejected,
    VideoUnsupported,
)
from vflow_client.errors import error_from_call
from vflow_client.v1 import conversations_pb2 as pb
from vflow_client.v1 import images_pb2
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.video_source import to_video
from vflowopt.compression.strategy import Strategy
from vflowopt.media import video
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime

TAKE_VIDEOS: tuple[TinyModel, ...] = (SHAPES[0], QWEN2_5_VL[0], QWEN3_VL[0])

SECONDS = (0.0, 0.5, 1.0, 1.5)
QUESTIONS = ("What happens?", "And then?")


@pytest.fixture(scope="module", params=TAKE_VIDEOS, ids=lambda model: model.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    model: TinyModel = request.param
    runtime = Runtime.load(model.save(tmp_path_factory.mktemp(model.name)), kv_budget=16 << 20)
    runtime.chat.stop_ids = frozenset()
    return runtime


def clip(seed: int = 0, height: int = 84, width: int = 112) -> list[NDArray]:
    return [noise(height, width, 100 * seed + number) for number in range(len(SECONDS))]


def sent(frames: Sequence[NDArray]) -> Video:
    return Video([encoded(pixels) for pixels in frames], seconds=SECONDS)


def in_library(frames: Sequence[NDArray]) -> video.Video:
    return video.Video.of([Picture.from_pixels(pixels) for pixels in frames], SECONDS)


def answer_of(session: Session, *parts: Any) -> str:
    return session.ask(*parts, max_new_tokens=6, temperature=0).read()


@pytest.mark.parametrize("strategy", ["full", "preset-25"])
def test_two_questions_about_a_video(family: Runtime, serve: Serve, strategy: str) -> None:
    frames = clip()
    by = Strategy.full() if strategy == "full" else Strategy.preset(0.25, family.layers)
    library = Chat(family, by)
    library.look(in_library(frames))
    expected = [family.chat.decode(library.ask([question], 6)) for question in QUESTIONS]
    library.sequence.release()

    with serve(runtime=family).client.session(strategy) as session:
        receipt = session.add_video([encoded(pixels) for pixels in frames], fps=2)
        assert [answer_of(session, question) for question in QUESTIONS] == expected
        assert session.state().image_count == 1
    assert (receipt.image, receipt.width, receipt.height) == (f"{session.name}/images/1", 112, 84)
    together = getattr(family.model, "step", 1)  # frames that the tower takes in as one
    assert receipt.frames == 4 and len(receipt.kept_by_frame) == 4 // together
    assert sum(receipt.kept_by_frame) == receipt.kept_tokens[0] <= receipt.visual_tokens
    assert (receipt.kept_tokens[0] < receipt.visual_tokens) == (strategy != "full")


def test_a_video_within_a_turn_is_the_one_shown_ahead(family: Runtime, serve: Serve) -> None:
    client = serve(runtime=family).client
    shown = sent(clip(1))
    with client.session("preset-25") as ahead, client.session("preset-25") as within:
        first = ahead.add_video(shown.frames, seconds=SECONDS)
        expected = [answer_of(ahead, question) for question in QUESTIONS]
        asked = within.ask(shown, QUESTIONS[0], max_new_tokens=6, temperature=0)
        assert [asked.read(), answer_of(within, QUESTIONS[1])] == expected
        (receipt,) = asked.images
        assert receipt.cache_hit and not first.cache_hit
        assert receipt.image == f"{within.name}/images/1"
        assert (receipt.digest, receipt.frames) == (first.digest, first.frames)
        assert receipt.kept_by_frame == first.kept_by_frame and receipt.kv_bytes == first.kv_bytes


def test_pictures_and_videos_in_one_turn(family: Runtime, serve: Serve) -> None:
    frames, picture = clip(2), noise(90, 60, 7)
    library = Chat(family, Strategy.preset(0.25, family.layers))
    turns = [["Compare", picture, "with", in_library(frames), "please"], ["So?"]]
    expected = [family.chat.decode(library.ask(turn, 6)) for turn in turns]
    library.sequence.release()
    with serve(runtime=family).client.session("preset-25") as session:
        asked = session.ask("Compare", encoded(picture), "with", sent(frames), "please", max_new_tokens=6)
        assert [asked.read(), answer_of(session, "So?")] == expected
        assert [receipt.frames for receipt in asked.images] == [0, 4]
        assert [receipt.image for receipt in asked.images] == [f"{session.name}/images/{n}" for n in (1, 2)]
        assert not asked.images[0].kept_by_frame
        assert session.add_image(encoded(noise(40, 40))).image == f"{session.name}/images/3"


def test_a_session_with_a_video_goes_on_after_a_restart(family: Runtime, serve_data: Serve) -> None:
    shown = sent(clip(3))

    def begun(client: Client) -> Session:
        session = client.session("preset-25")
        session.add_video(shown.frames, seconds=SECONDS)
        return session

    served = serve_data(family)
    undisturbed, session = begun(served.client), begun(served.client)
    expected = [answer_of(undisturbed, question) for question in QUESTIONS]
    session = serve_data(family).client.attach(session.name)
    assert session.state().image_count == 1
    answers = [answer_of(session, QUESTIONS[0])]
    session = serve_data(family).client.attach(session.name)
    assert [*answers, answer_of(session, QUESTIONS[1])] == expected


def test_the_frames_can_be_named_by_their_digests_afterwards(serve: Serve) -> None:
    served = serve()
    shown = sent(clip(4))
    named = [Image(digest=hashlib.sha256(frame).hexdigest()) for frame in shown.frames]
    with served.client.session() as session:
        with pytest.raises(PictureNotHeld):
            session.add_video(named, seconds=SECONDS)
        first = session.add_video(shown.frames, seconds=SECONDS)
        again = session.add_video(named, seconds=SECONDS)
        assert (again.digest, again.cache_hit) == (first.digest, True)
        later = session.add_video(named, fps=1)
        assert later.digest != first.digest and not later.cache_hit, "other times, another video"
    with served.connect(tenant="other") as stranger, stranger.session() as session, pytest.raises(PictureNotHeld):
        session.add_video(named, seconds=SECONDS)


def test_frames_that_would_push_out_all_else_are_not_held(serve: Serve) -> None:
    served = serve(picture_memory="100KiB")  # three frames of 28 KB fit
    with served.client.session() as session:
        picture = session.add_image(encoded(noise(60, 60)))
        session.add_video(sent(clip(5)).frames, seconds=SECONDS)
        assert session.add_image(Image(digest=picture.digest)).cache_hit


def test_a_video_counts_as_one_picture(serve: Serve) -> None:
    served = serve(tenant_pictures="2")
    with served.client.session() as session:
        session.add_video(sent(clip(6)).frames, seconds=SECONDS)
        session.ask(sent(clip(7)), "And this?", max_new_tokens=1).read()
        for show in (
            lambda: session.add_video(sent(clip(6)).frames, seconds=SECONDS),
            lambda: session.ask(sent(clip(6)), "This?").read(),
        ):
            with pytest.raises(CapacityExhausted) as refused:
                show()
            assert refused.value.metadata["resource"] == "tenant_pictures"


def test_the_same_request_with_other_times_is_another(serve: Serve) -> None:
    served = serve()
    frames = [encoded(pixels) for pixels in clip(8)]
    with served.client.session() as session, grpc.insecure_channel(served.address) as channel:

        def ask(shown: Video) -> pb.Finished:
            parts = [pb.Part(video=to_video(shown)), pb.Part(text="what?")]
            options = pb.ChatOptions(max_new_tokens=2)
            request = pb.ChatRequest(session=session.name, parts=parts, options=options, request_id="the same")
            *_, last = ConversationsStub(channel).Chat(request)
            return last.finished

        first, again = ask(Video(frames, fps=2)), ask(Video(frames, seconds=SECONDS))
        assert (again.text, again.receipt.replayed) == (first.text, True)
        with pytest.raises(grpc.RpcError) as refused:
            ask(Video(frames, fps=3))
        assert isinstance(error_from_call(refused.value), RequestIdReused)


def test_no_sample_is_kept_of_a_video_and_the_watch_skips_it(serve: Serve) -> None:
    served = serve(calibration_samples="4", watch_share="1")
    with served.client.session("full") as session:
        session.add_video(sent(clip(9)).frames, seconds=SECONDS)
        answer_of(session, "What?")
        answer_of(session, encoded(noise(50, 50)), "And here?")
    with served.client.session("full") as session:
        answer_of(session, sent(clip(9)), "What?")
    totals = served.service.fidelity_monitor.totals["strategies/full"]
    until(lambda: totals.skipped == 3)
    assert not totals.watched and not len(served.service.live_samples)


def test_a_model_that_takes_no_videos_says_so_before_it_decodes_anything(serve: Serve, tmp_path: Path) -> None:
    served = serve(runtime=Runtime.load(LLAVA[0].save(tmp_path), kv_budget=16 << 20))
    picture, broken = encoded(noise(40, 40)), Video([b"no picture"], fps=1)
    with served.client.session() as session:
        for show in (
            lambda: session.add_video(broken.frames, fps=1),
            lambda: session.ask(picture, broken, "What?").read(),
        ):
            with pytest.raises(VideoUnsupported, match="takes no videos") as refused:
                show()
            assert refused.value.metadata == {"family": served.service.runtime.model.family}
        assert served.service.pictures.bytes_held == 0 and session.state().image_count == 0
        session.ask(picture, "Still there?", max_new_tokens=1).read()


FRAME = images_pb2.Image(data=encoded(noise(40, 50)))
LARGE = images_pb2.Image(data=encoded(noise(150, 150)))


def video_of(*frames: tuple[images_pb2.Image, float]) -> images_pb2.Video:
    return images_pb2.Video(frames=[images_pb2.Frame(image=image, seconds=seconds) for image, seconds in frames])


NO_VIDEOS: dict[str, tuple[images_pb2.Video, str, str]] = {
    "no frames": (video_of(), "VIDEO_EMPTY", ""),
    "too many": (video_of(*[(FRAME, at) for at in range(7)]), "VIDEO_TOO_LONG", ""),
    "two sizes": (video_of((FRAME, 0), (LARGE, 1)), "VIDEO_FRAMES_UNEQUAL", ""),
    "no times": (video_of((FRAME, 0), (FRAME, 0)), "VIDEO_TIMES_INVALID", ""),
    "a time before": (video_of((FRAME, -1), (FRAME, 0)), "VIDEO_TIMES_INVALID", ""),
    "a time that is none": (video_of((FRAME, float("nan"))), "VIDEO_TIMES_INVALID", ""),
    "at the end of time": (video_of((FRAME, float("inf"))), "VIDEO_TIMES_INVALID", ""),
    "too many pixels": (video_of(*[(LARGE, at) for at in range(6)]), "PICTURE_TOO_MANY_PIXELS", ".frames[4].image"),
    "a detail": (
        video_of((FRAME, 0), (images_pb2.Image(data=FRAME.data, detail=images_pb2.Image.HIGH), 1)),
        "OPTION_OUT_OF_RANGE",
        ".frames[1].image.detail",
    ),
    "a text": (video_of((FRAME, 0), (images_pb2.Image(data=b"hello"), 1)), "PICTURE_NOT_AN_IMAGE", ".frames[1].image"),
    "a frame without a picture": (images_pb2.Video(frames=[images_pb2.Frame()]), "PICTURE_EMPTY", ".frames[0].image"),
}


def test_what_is_no_video(serve: Serve) -> None:
    served = serve(max_video_frames="6", max_picture_pixels="25000")
    with served.client.session() as session, grpc.insecure_channel(served.address) as channel:
        stub = ConversationsStub(channel)
        for what, (video, reason, place) in NO_VIDEOS.items():
            parts = [pb.Part(text="see"), pb.Part(video=video)]
            for field, call in (
                ("video", lambda v=video: stub.AddVideo(pb.AddVideoRequest(session=session.name, video=v))),
                (
                    "parts[1].video",
                    lambda p=parts: list(stub.Chat(pb.ChatRequest(session=session.name, parts=p))),
                ),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                error = error_from_call(refused.value)
                assert error.code is grpc.StatusCode.INVALID_ARGUMENT and error.reason == reason, what
                assert set(error.fields) == {field + place}, what
                assert served.service.pictures.bytes_held == 0, what
        state = session.state()
        assert (state.image_count, state.turn_count, state.kv_bytes) == (0, 0, 0)
        session.add_video([FRAME] * 6, fps=1)
        with pytest.raises(grpc.RpcError, match="the request has 8 frames, at most 6"):
            together = [pb.Part(video=video_of(*[(FRAME, at) for at in range(4)]))] * 2
            list(stub.Chat(pb.ChatRequest(session=session.name, parts=[*together, pb.Part(text="see")])))


def test_a_video_of_more_tokens_than_the_model_was_made_for(serve: Serve, tmp_path: Path) -> None:
    runtime = Runtime.load(SHAPES[0].save(tmp_path), kv_budget=16 << 20)
    runtime.model.context = 12  # frames take four tokens each
    served = serve(runtime=runtime)
    with served.client.session() as session:
        with pytest.raises(VideoRejected, match="4 frames take 17 tokens, some 4 each") as refused:
            session.add_video(sent(clip()).frames, seconds=SECONDS)
        assert refused.value.reason == "VIDEO_TOO_LONG" and set(refused.value.fields) == {"video"}
        with pytest.raises(VideoRejected) as refused:
            session.ask("see", sent(clip()), "what?").read()
        assert refused.value.reason == "VIDEO_TOO_LONG" and set(refused.value.fields) == {"parts[1].video"}
        assert session.state().image_count == 0
        session.add_video(sent(clip()).frames[:2], fps=1)


def test_a_video_that_lasts_longer_than_the_model_has_positions_for(serve: Serve, tmp_path: Path) -> None:
    served = serve(runtime=Runtime.load(QWEN2_5_VL[0].save(tmp_path), kv_budget=16 << 20))
    frames = sent(clip()).frames
    with served.client.session() as session:
        for last in (1e5, 1e30, 1e308):
            with pytest.raises(VideoRejected, match="the model has 8192 positions, 2 for each second") as refused:
                session.add_video(frames, seconds=[0.0, 1.0, 2.0, last])
            assert refused.value.reason == "VIDEO_TIMES_INVALID" and refused.value.metadata["frame"] == "3"
        session.add_video(frames, seconds=[0.0, 1.0, 2.0, 4000.0])
