"""A retried turn is recognized by everything that was asked for: under its request_id nothing else is ever answered."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from vflow_client import Client, Session
from vflow_client.v1.conversations_pb2 import AddImageRequest, ChatOptions, ChatRequest, Finished, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Image, ImageReceipt

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 2, "temperature": 1.0, "top_p": 0.5, "seed": 3, "stop": ["zzzz"]}
OTHERS = {"max_new_tokens": 7, "min_new_tokens": 3, "temperature": 0.5, "top_p": 0.6, "seed": 4, "stop": ["yyyy"]}

PICTURE, OTHER_PICTURE = (Part(image=Image(data=png(40, 50, seed))) for seed in (1, 2))
PARTS = [Part(text="one"), PICTURE, Part(text="two")]
OTHER_PARTS = {
    "another text": [Part(text="1"), PICTURE, Part(text="two")],
    "another picture": [Part(text="one"), OTHER_PICTURE, Part(text="two")],
    "the picture twice": [Part(text="one"), PICTURE, PICTURE, Part(text="two")],
    "no picture": [Part(text="one"), Part(text="two")],
    "another order": [PICTURE, Part(text="one"), Part(text="two")],
    "texts exchanged": [Part(text="two"), PICTURE, Part(text="one")],
}


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    with client.session() as session:
        yield session


def say(served: Served, session: Session, parts: list[Part], options: ChatOptions) -> Finished:
    request = ChatRequest(session=session.name, parts=parts, options=options, request_id="the-same")
    *_, last = ConversationsStub(served.client._channel).Chat(request, timeout=20)
    return last.finished


def refused(served: Served, session: Session, parts: list[Part], options: ChatOptions) -> bool:
    """Whether that is refused as another request under the same request_id."""
    with pytest.raises(grpc.RpcError) as refusal:
        say(served, session, parts, options)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(refusal.value).details)
    return info.reason == "REQUEST_ID_REUSED" and session.state().turn_count == 1


def test_every_option_is_tried() -> None:
    assert OPTIONS.keys() == OTHERS.keys() == {field.name for field in ChatOptions.DESCRIPTOR.fields}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_same_turn_with_another_option_is_another_turn(served: Served, session: Session, option: str) -> None:
    first = say(served, session, PARTS[:1], ChatOptions(**OPTIONS))
    assert refused(served, session, PARTS[:1], ChatOptions(**{**OPTIONS, option: OTHERS[option]}))
    unset = ChatOptions(**OPTIONS)
    unset.ClearField(option)
    assert refused(served, session, PARTS[:1], unset)
    again = say(served, session, PARTS[:1], ChatOptions(**OPTIONS))
    assert again.receipt.replayed and again.text == first.text


@pytest.mark.parametrize("parts", OTHER_PARTS.values(), ids=OTHER_PARTS)
def test_the_same_turn_with_other_parts_is_another_turn(served: Served, session: Session, parts: list[Part]) -> None:
    say(served, session, PARTS, ChatOptions(**OPTIONS))
    assert refused(served, session, parts, ChatOptions(**OPTIONS))
    assert say(served, session, PARTS, ChatOptions(**OPTIONS)).receipt.replayed


def test_a_request_is_told_from_another_after_a_restart_too(serve_data: Serve) -> None:
    served = serve_data()
    session = served.client.session()
    say(served, session, PARTS, ChatOptions(**OPTIONS))
    served = serve_data()
    session = served.client.attach(session.name)
    assert refused(served, session, PARTS, ChatOptions(**{**OPTIONS, "seed": 4}))
    assert say(served, session, PARTS, ChatOptions(**OPTIONS)).receipt.replayed


def test_a_picture_is_added_once_and_told_from_others(served: Served, session: Session) -> None:
    stub = ConversationsStub(served.client._channel)
    image = Image(data=png(40, 50, 1))

    def added(image: Image, request_id: str = "the-same") -> ImageReceipt:
        request = AddImageRequest(session=session.name, image=image, request_id=request_id)
        return stub.AddImage(request, timeout=20).receipt

    first = added(image)
    assert first.image == f"{session.name}/images/1" and added(image) == first
    for other in (Image(data=png(40, 50, 2)), Image(data=image.data, detail=Image.LOW)):
        with pytest.raises(grpc.RpcError, match="belongs to an earlier request"):
            added(other)
    for wrong in ("x" * 65, "\u00fc"):
        with pytest.raises(grpc.RpcError, match="printable ASCII"):
            added(image, wrong)
    assert session.state().image_count == 1
    assert added(image, "").image != added(image, "").image  # without a request_id each is another
    with pytest.raises(grpc.RpcError, match="belongs to an earlier request"):
        say(served, session, PARTS, ChatOptions(**OPTIONS))  # under the same request_id
    assert session.state().turn_count == 0


def test_a_picture_that_is_sent_again_waits_for_the_first(served: Served, session: Session) -> None:
    stub = ConversationsStub(served.client._channel)
    request = AddImageRequest(session=session.name, image=Image(data=png(200, 200, 1)), request_id="the-same")
    calls = [stub.AddImage.future(request, timeout=20) for _ in range(4)]
    assert len({call.result().receipt.image for call in calls}) == 1
    assert session.state().image_count == 1
