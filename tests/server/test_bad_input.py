"""Every refusal: status code, reason, the field at fault, and a service that goes on as if nothing had happened."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image as Pillow

from tests.server.drawing import png
from tests.server.served import Served
from tests.vflowopt.picture_lines import JPEG_RED, with_frame_header
from tests.vflowopt.test_picture_refusals import OTHER_FILES
from vflow_client import ContextExceeded, Session
from vflow_client.v1 import conversations_pb2 as chat
from vflow_client.v1 import strategies_pb2 as admin
from vflow_client.v1.compression_pb2 import CompressImageRequest
from vflow_client.v1.compression_pb2_grpc import CompressionStub
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Frame, Image, Video
from vflow_client.v1.strategies_pb2_grpc import StrategiesStub

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
NAN = float("nan")


class Stubs:
    def __init__(self, channel: grpc.Channel) -> None:
        self.chat = ConversationsStub(channel)
        self.compression = CompressionStub(channel)
        self.admin = StrategiesStub(channel)


@pytest.fixture(scope="module")
def small(runtime: Any) -> Iterator[Served]:
    """One service for the whole module: it must survive all of these requests."""
    served = Served(runtime, max_picture_bytes="64KiB", max_picture_pixels="100000")
    yield served
    served.stop()


@pytest.fixture(scope="module")
def stubs(small: Served) -> Iterator[Stubs]:
    with grpc.insecure_channel(small.address) as channel:
        yield Stubs(channel)


@pytest.fixture(autouse=True)
def goes_on(small: Served) -> Iterator[None]:
    """After every test, the next conversation works and no page is lost."""
    yield
    with small.client.session() as session:
        session.ask("Still there?", max_new_tokens=1).read()
    assert small.kv_bytes() == 0


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, set[str], str]:
    """Status code, reason, fields at fault and message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        response = call()
        if hasattr(response, "__next__"):
            list(response)
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
    assert info.domain == "vflow.dev"
    return caught.value.code(), info.reason, {violation.field for violation in request.field_violations}, status.message


def encoded(image: Pillow.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


PICTURES = {
    "nothing": (Image(), "PICTURE_EMPTY"),
    "no bytes": (Image(data=b""), "PICTURE_EMPTY"),
    "a text": (Image(data=b"hello, I am no picture"), "PICTURE_NOT_AN_IMAGE"),
    "a document": (Image(data=b"%PDF-1.7 and so on"), "PICTURE_NOT_AN_IMAGE"),
    "cut off": (Image(data=png(60, 60)[:-400]), "PICTURE_TRUNCATED"),
    "a large file": (Image(data=png(160, 160)), "PICTURE_TOO_LARGE"),
    "a bomb": (Image(data=encoded(Pillow.new("1", (20_000, 20_000)))), "PICTURE_TOO_MANY_PIXELS"),
    "a line": (Image(data=encoded(Pillow.new("L", (20_000, 1)))), "PICTURE_TOO_NARROW"),
    "a kind that is not read": (Image(data=with_frame_header(JPEG_RED, 0xC1, 12)), "PICTURE_UNSUPPORTED"),
    "a sound": (Image(data=OTHER_FILES["WAV"]), "PICTURE_NOT_AN_IMAGE"),
    "a bad digest": (Image(digest="ABC"), "DIGEST_INVALID"),
    "an unknown digest": (Image(digest="0" * 64), "PICTURE_NOT_HELD"),
}


@pytest.mark.parametrize("way", ["AddImage", "AddVideo", "Chat", "CompressImage"])
@pytest.mark.parametrize(("image", "reason"), PICTURES.values(), ids=PICTURES)
def test_what_is_no_picture(small: Served, stubs: Stubs, image: Image, reason: str, way: str) -> None:
    with small.client.session() as session:
        before = session.state()
        ways: dict[str, tuple[str, Callable[[], Any]]] = {
            "AddImage": ("image", lambda: stubs.chat.AddImage(chat.AddImageRequest(session=session.name, image=image))),
            "AddVideo": (
                "video.frames[0].image",
                lambda: stubs.chat.AddVideo(
                    chat.AddVideoRequest(session=session.name, video=Video(frames=[Frame(image=image)]))
                ),
            ),
            "Chat": (
                "parts[1].image",
                lambda: stubs.chat.Chat(
                    chat.ChatRequest(session=session.name, parts=[chat.Part(text="see"), chat.Part(image=image)])
                ),
            ),
            "CompressImage": ("image", lambda: stubs.compression.CompressImage(CompressImageRequest(image=image))),
        }
        field, call = ways[way]
        code, found, fields, message = refusal(call)
        assert (code, found) == (NOT_FOUND if reason == "PICTURE_NOT_HELD" else INVALID, reason)
        assert len(message) > 20
        if code == INVALID:
            assert all(name.startswith(field) for name in fields) and fields
        after = session.state()
        assert (after.image_count, after.turn_count, after.kv_bytes) == (0, 0, before.kv_bytes)


ODD_PICTURES = {
    "one pixel": encoded(Pillow.new("RGB", (1, 1))),
    "CMYK": encoded(Pillow.new("CMYK", (40, 30)), "JPEG"),
    "palette": encoded(Pillow.new("P", (40, 30))),
    "16 bit": encoded(Pillow.new("I;16", (40, 30))),
    "alpha": encoded(Pillow.new("RGBA", (40, 30))),
    "animated": encoded(
        Pillow.new("L", (40, 30)), "GIF", save_all=True, append_images=[Pillow.new("L", (40, 30), 9)], duration=20
    ),
}


@pytest.mark.parametrize("data", ODD_PICTURES.values(), ids=ODD_PICTURES)
def test_odd_pictures_are_taken(small: Served, data: bytes) -> None:
    with small.client.session() as session:
        assert session.add_image(data).visual_tokens > 0
        session.ask("What?", max_new_tokens=1).read()


def test_a_picture_lying_on_its_side_is_turned_upright(small: Served) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    with small.client.session() as session:
        receipt = session.add_image(encoded(Pillow.new("RGB", (40, 30)), "JPEG", exif=exif))
    assert (receipt.width, receipt.height) == (30, 40)


LARGE = encoded(Pillow.new("1", (300, 300)))

TURNS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no parts": ({"parts": []}, "EMPTY_TURN", "parts"),
    "an empty part": ({"parts": [chat.Part()]}, "EMPTY_TURN", "parts[0]"),
    "white space": ({"parts": [chat.Part(text="hm"), chat.Part(text=" \n\t")]}, "EMPTY_TURN", "parts[1]"),
    "a picture alone": ({"parts": [chat.Part(image=Image(data=png(30, 30)))]}, "EMPTY_TURN", "parts"),
    "too many parts": ({"parts": [chat.Part(text="a")] * 65}, "OPTION_OUT_OF_RANGE", "parts"),
    "too long a text": ({"parts": [chat.Part(text="a" * 100_001)]}, "OPTION_OUT_OF_RANGE", "parts[0].text"),
    "too many pixels together": (
        {"parts": [chat.Part(text="a"), *[chat.Part(image=Image(data=LARGE))] * 5]},
        "PICTURE_TOO_MANY_PIXELS",
        "parts[5].image",
    ),
    "more than the context": ({"parts": [chat.Part(text="a" * 9000)]}, "CONTEXT_EXCEEDED", "parts"),
    "a request_id too long": ({"request_id": "x" * 65}, "OPTION_OUT_OF_RANGE", "request_id"),
    "a request_id not ASCII": ({"request_id": "ü"}, "OPTION_OUT_OF_RANGE", "request_id"),
    **{
        f"{field}={value}": ({"options": {field: value}}, "OPTION_OUT_OF_RANGE", f"options.{field}")
        for field, value in [
            ("max_new_tokens", 0),
            ("max_new_tokens", -1),
            ("max_new_tokens", 4097),
            ("min_new_tokens", -1),
            ("min_new_tokens", 257),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", NAN),
            ("temperature", float("inf")),
            ("top_p", 0.0),
            ("top_p", 1.1),
            ("top_p", NAN),
            ("seed", -1),
            ("stop", [""]),
            ("stop", ["x" * 65]),
            ("stop", ["x"] * 9),
        ]
    },
}


@pytest.mark.parametrize(("fields", "reason", "field"), TURNS.values(), ids=TURNS)
def test_turns_that_cannot_be(small: Served, stubs: Stubs, fields: dict[str, Any], reason: str, field: str) -> None:
    with small.client.session() as session:
        request = chat.ChatRequest(**{"session": session.name, "parts": [chat.Part(text="Well?")], **fields})
        assert refusal(lambda: stubs.chat.Chat(request))[:3] == (INVALID, reason, {field})
        assert session.state().turn_count == 0


def test_a_conversation_that_outgrows_the_context(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.service.runtime, "context", 500)
    with small.client.session() as session:
        session.ask("a" * 200, max_new_tokens=1).read()
        with pytest.raises(ContextExceeded) as refused:
            session.ask("a" * 200, max_new_tokens=100).read()
        position, new = (int(refused.value.metadata[name]) for name in ("position", "new_tokens"))
        assert position > 200 and new > 200 and refused.value.metadata["context"] == "500"
        room = 500 - position - new
        with pytest.raises(ContextExceeded):
            session.ask("a" * 200, max_new_tokens=room + 1).read()
        session.ask("a" * 200, max_new_tokens=room).read()
        with pytest.raises(ContextExceeded):
            session.add_image(png(90, 120))


NAMES: dict[str, tuple[Callable[[Stubs], Any], grpc.StatusCode, str]] = {
    "an unknown session": (
        lambda stubs: stubs.chat.GetSession(chat.GetSessionRequest(name="sessions/nobody")),
        NOT_FOUND,
        "SESSION_NOT_FOUND",
    ),
    "a turn in an unknown session": (
        lambda stubs: stubs.chat.Chat(chat.ChatRequest(session="sessions/nobody", parts=[chat.Part(text="Hm?")])),
        NOT_FOUND,
        "SESSION_NOT_FOUND",
    ),
    "deleting an unknown session": (
        lambda stubs: stubs.chat.DeleteSession(chat.DeleteSessionRequest(name="sessions/nobody")),
        NOT_FOUND,
        "SESSION_NOT_FOUND",
    ),
    "no name": (lambda stubs: stubs.chat.GetSession(chat.GetSessionRequest()), INVALID, "NAME_INVALID"),
    "another collection": (
        lambda stubs: stubs.chat.GetSession(chat.GetSessionRequest(name="strategies/full")),
        INVALID,
        "NAME_INVALID",
    ),
    "a path": (
        lambda stubs: stubs.chat.GetSession(chat.GetSessionRequest(name="sessions/../etc")),
        INVALID,
        "NAME_INVALID",
    ),
    "an unknown strategy": (
        lambda stubs: stubs.chat.CreateSession(
            chat.CreateSessionRequest(session=chat.Session(strategy="strategies/none"))
        ),
        NOT_FOUND,
        "STRATEGY_NOT_FOUND",
    ),
    "compression by an unknown strategy": (
        lambda stubs: stubs.compression.CompressImage(CompressImageRequest(strategy="strategies/none")),
        NOT_FOUND,
        "STRATEGY_NOT_FOUND",
    ),
    "a negative page": (
        lambda stubs: stubs.chat.ListSessions(chat.ListSessionsRequest(page_size=-1)),
        INVALID,
        "OPTION_OUT_OF_RANGE",
    ),
    "a page token made up": (
        lambda stubs: stubs.chat.ListSessions(chat.ListSessionsRequest(page_token="AAAAAAAAAAAA")),
        INVALID,
        "PAGE_TOKEN_INVALID",
    ),
    "a page token that is none": (
        lambda stubs: stubs.admin.ListStrategies(admin.ListStrategiesRequest(page_token="é!")),
        INVALID,
        "PAGE_TOKEN_INVALID",
    ),
}


@pytest.mark.parametrize(("call", "code", "reason"), NAMES.values(), ids=NAMES)
def test_names_and_pages(stubs: Stubs, call: Callable[[Stubs], Any], code: grpc.StatusCode, reason: str) -> None:
    assert refusal(lambda: call(stubs))[:2] == (code, reason)


STRATEGIES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "strategy.ratios"),
    "a ratio of zero": ({"ratios": [0.5, 0.0, 0.5]}, "strategy.ratios"),
    "a ratio too many": ({"ratios": [0.5] * 4}, "strategy.ratios"),
    "not a number": ({"ratios": [0.5, NAN, 0.5]}, "strategy.ratios"),
    "stages that descend": ({"starts": [0, 3, 2], "ratios": [0.5] * 3}, "strategy.starts"),
    "a stage past the last layer": ({"starts": [0, 60], "ratios": [0.5] * 2}, "strategy.starts"),
    "alpha": ({"ratios": [0.5] * 3, "alpha": 1.5}, "strategy.alpha"),
    "threshold": ({"ratios": [0.5] * 3, "threshold": -1}, "strategy.threshold"),
    "grid": ({"ratios": [0.5] * 3, "grid": 0.5}, "strategy.grid"),
    "an unreachable budget": ({"ratios": [0.1, 0.1], "budget": 0.9}, "strategy.budget"),
    "a budget that is none": ({"ratios": [0.1, 0.1], "budget": 0.0}, "strategy.budget"),
    "a budget beside ratios": ({"ratios": [0.5] * 3, "budget": 0.9}, "strategy.budget"),
    "unknown positions": ({"ratios": [0.5] * 3, "positions": 9}, "strategy.positions"),
    "unknown reserve": ({"ratios": [0.5] * 3, "reserve": 9}, "strategy.reserve"),
}


@pytest.mark.parametrize(("fields", "field"), STRATEGIES.values(), ids=STRATEGIES)
def test_strategies_that_cannot_be(stubs: Stubs, fields: dict[str, Any], field: str) -> None:
    request = admin.CreateStrategyRequest(strategy=admin.Strategy(**fields), strategy_id="mine")
    assert refusal(lambda: stubs.admin.CreateStrategy(request))[:3] == (INVALID, "STRATEGY_INVALID", {field})
    assert len(stubs.admin.ListStrategies(admin.ListStrategiesRequest()).strategies) == 4


@pytest.mark.parametrize("identifier", ["", "Upper", "-dash", "dash-", "1st", "a/b", "x" * 64])
def test_identifiers_that_cannot_be(stubs: Stubs, identifier: str) -> None:
    request = admin.CreateStrategyRequest(strategy=admin.Strategy(ratios=[0.5] * 3), strategy_id=identifier)
    assert refusal(lambda: stubs.admin.CreateStrategy(request))[:3] == (INVALID, "NAME_INVALID", {"strategy_id"})


@pytest.mark.parametrize("way", ["add_image", "ask"])
def test_a_fault_of_ours_is_internal_and_logged(
    small: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(small.service.runtime, "compressing", fail)
    with small.client.session() as session, pytest.raises(Exception, match="INTERNAL") as failed:
        ask: dict[str, Callable[[Session], Any]] = {
            "add_image": lambda session: session.add_image(png(33, 44, seed=9)),
            "ask": lambda session: session.ask("Well?", images=[png(33, 44, seed=9)]).read(),
        }
        ask[way](session)
    incident = failed.value.metadata["incident"]  # type: ignore[attr-defined]
    logged = capsys.readouterr()
    assert incident in logged.out + logged.err
