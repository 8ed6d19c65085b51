"""Pictures in low detail through the service: fewer tokens, and never taken for the same picture in high detail."""

import grpc
import pytest

from tests.server.conftest import Serve
from tests.server.drawing import encoded, noise, png
from tests.server.served import Served
from tests.server.waiting import until
from tests.vflowopt.generation import Chat
from vflow_client import Client, Image, InvalidRequest
from vflow_client.v1.conversations_pb2 import ChatOptions, ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime


def test_a_picture_in_low_detail_is_answered_as_the_library_does(client: Client, runtime: Runtime) -> None:
    first, second = noise(120, 200, 61), noise(90, 60, 62)
    chat = Chat(runtime, Strategy.preset(0.25, runtime.layers), "low")
    chat.look(first)
    expected = [runtime.chat.decode(chat.ask(turn, 6)) for turn in (["what?"], [second, "and?"])]
    chat.sequence.release()
    with client.session("preset-25") as session:
        receipt = session.add_image(encoded(first), detail="low")
        assert receipt.detail == Image.LOW and receipt.visual_tokens == 17  # 4 x 4, and the newline
        answers = [session.ask("what?", max_new_tokens=6).read()]
        answers.append(session.ask(encoded(second), "and?", detail="low", max_new_tokens=6).read())
    assert answers == expected


def test_the_two_details_of_a_picture_share_nothing(served: Served, client: Client) -> None:
    picture = png(120, 200, seed=63)
    with client.session("full") as high, client.session("full") as low, client.session("full") as auto:
        receipts = [high.add_image(picture), low.add_image(picture, detail="low")]
        digest = receipts[0].digest
        receipts.append(auto.add_image(Image(digest=digest)))
        assert [receipt.digest for receipt in receipts] == [digest] * 3
        assert [receipt.cache_hit for receipt in receipts] == [False, False, True]
        assert [receipt.detail for receipt in receipts] == [Image.HIGH, Image.LOW, Image.HIGH]
        assert receipts[1].visual_tokens < receipts[0].visual_tokens == receipts[2].visual_tokens
        assert low.state().kv_bytes < high.state().kv_bytes == auto.state().kv_bytes
        # Held by its digest, it is there in either detail, and a second session can use both.
        with client.session("full") as again:
            for detail, kept in ((Image.LOW, receipts[1]), (Image.HIGH, receipts[0])):
                receipt = again.add_image(Image(digest=digest, detail=detail))
                assert receipt.cache_hit and receipt.kept_tokens == kept.kept_tokens
    assert client.compress(picture, strategy="full", detail="low").receipt.cache_hit


def test_a_turn_may_mix_details(client: Client) -> None:
    picture = png(120, 200, seed=64)
    with client.session() as session:
        answer = session.ask(Image(data=picture, detail=Image.LOW), Image(data=picture), "same?", max_new_tokens=2)
        answer.read()
        low, high = answer.images
    assert (low.detail, high.detail) == (Image.LOW, Image.HIGH) and low.visual_tokens < high.visual_tokens


def test_another_detail_is_another_request(served: Served, client: Client) -> None:
    picture = png(64, 64, seed=65)
    with client.session() as session, grpc.insecure_channel(served.address) as channel:

        def ask(detail: Image.Detail) -> None:
            parts = [Part(image=Image(data=picture, detail=detail)), Part(text="what?")]
            options = ChatOptions(max_new_tokens=1)
            request = ChatRequest(session=session.name, parts=parts, options=options, request_id="the same")
            list(ConversationsStub(channel).Chat(request))

        ask(Image.HIGH)
        ask(Image.DETAIL_UNSPECIFIED)
        with pytest.raises(grpc.RpcError, match="other content"):
            ask(Image.LOW)


def test_a_detail_that_there_is_not_is_refused(client: Client) -> None:
    with (
        client.session() as session,
        pytest.raises(InvalidRequest, match="no detail 7; give one of DETAIL_"),
    ):
        session.add_image(Image(data=png(60, 60), detail=7))  # type: ignore[arg-type]


def test_the_watch_reads_a_picture_in_the_detail_that_it_was_shown_in(serve: Serve) -> None:
    served = serve(watch_share="1")
    with served.client.session("full") as session:
        session.add_image(png(120, 200, seed=66), detail="low")
        session.add_image(png(120, 200, seed=66))
        session.ask("What?", max_new_tokens=4).read()
    totals = served.service.fidelity_monitor.totals
    until(lambda: totals["strategies/full"].watched == 1)
    assert totals["strategies/full"].cosine == pytest.approx(1, abs=1e-5)
