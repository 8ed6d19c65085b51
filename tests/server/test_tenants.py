"""Tenants over a real channel: no tenant sees or shares what another one has."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, Image, PictureNotHeld, Session, SessionNotFound, TenantInvalid
from vflow_client.v1.conversations_pb2 import ChatRequest, ListSessionsRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.strategies_pb2 import ListStrategiesRequest
from vflow_client.v1.strategies_pb2_grpc import StrategiesStub


@pytest.fixture
def red(served: Served) -> Iterator[Client]:
    with served.connect(tenant="red") as client:
        yield client


@pytest.fixture
def blue(served: Served) -> Iterator[Client]:
    with served.connect(tenant="blue") as client:
        yield client


def pool_bytes(served: Served) -> int:
    return served.on_engine(lambda: served.service.runtime.pool.bytes_used)


def test_two_tenants_with_the_same_picture_share_nothing(served: Served, red: Client, blue: Client) -> None:
    picture = png(112, 112, seed=21)
    with red.session() as first, blue.session() as second, red.session() as third:
        digest = first.add_image(picture).digest
        alone = pool_bytes(served)
        with pytest.raises(PictureNotHeld):
            second.add_image(Image(digest=digest))
        assert not blue.compress(picture).receipt.cache_hit
        apart = second.add_image(picture)
        # Blue reuses what it computed itself; it has none of red's pages.
        assert apart.cache_hit and pool_bytes(served) == 2 * alone
        receipt = third.add_image(Image(digest=digest))
        assert receipt.cache_hit and pool_bytes(served) == 2 * alone
        answers = {session.ask("What is it?", max_new_tokens=6).read() for session in (first, second, third)}
        assert len(answers) == 1


def test_a_picture_in_a_turn_is_encoded_anew_for_each_tenant(red: Client, blue: Client) -> None:
    picture = png(64, 80, seed=22)

    def hit(client: Client) -> bool:
        with client.session() as session:
            answer = session.ask("Which?", images=[picture], max_new_tokens=1)
            answer.read()
            return answer.images[0].cache_hit

    assert [hit(client) for client in (red, blue, red, blue)] == [False, False, True, True]


USES: dict[str, Callable[[Session], Any]] = {
    "read": lambda session: session.state(),
    "shown a picture": lambda session: session.add_image(png(60, 60)),
    "forked": lambda session: session.fork().delete(),
    "asked": lambda session: session.ask("Hello?", max_new_tokens=1).read(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_session_of_another_is_not_found(red: Client, blue: Client, use: Callable[[Session], Any]) -> None:
    with red.session() as session:
        with pytest.raises(SessionNotFound):
            use(blue.attach(session.name))
        use(session)


def test_nobody_deletes_or_lists_the_sessions_of_another(served: Served, red: Client, blue: Client) -> None:
    with red.session() as mine, blue.session() as other, served.client.session() as nobodys:
        blue.attach(mine.name).delete()  # no error: it takes it for gone
        clients = {"red": red, "blue": blue, "default": served.client}
        listed = {tenant: [state.name for state in client.sessions()] for tenant, client in clients.items()}
        assert listed == {"red": [mine.name], "blue": [other.name], "default": [nobodys.name]}


def test_no_name_and_the_default_name_are_the_same(served: Served) -> None:
    with served.connect(tenant="default") as client, served.client.session() as session:
        assert client.attach(session.name).state().name == session.name


def test_every_turn_is_of_its_tenant(red: Client) -> None:
    with red.session() as session:
        assert [session.ask("Well?", max_new_tokens=2).read() for _ in range(2)]
        assert session.state().turn_count == 2


@pytest.mark.parametrize("names", [["Red"], [""], ["a" * 64], ["a b"], ["red", "red"]])
def test_what_is_no_tenant(served: Served, names: list[str]) -> None:
    metadata = tuple(("vflow-tenant", name) for name in names)
    with grpc.insecure_channel(served.address) as channel:
        stub = ConversationsStub(channel)
        chat = ChatRequest(session="sessions/s", parts=[Part(text="a")])
        calls: list[Callable[[], Any]] = [
            lambda: stub.ListSessions(ListSessionsRequest(), metadata=metadata),
            lambda: list(stub.Chat(chat, metadata=metadata)),
            lambda: StrategiesStub(channel).ListStrategies(ListStrategiesRequest(), metadata=metadata),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            status = rpc_status.from_call(refused.value)
            assert status is not None and refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            info = error_details_pb2.ErrorInfo()
            assert any(detail.Unpack(info) for detail in status.details if detail.Is(info.DESCRIPTOR))
            assert (info.reason, info.metadata["tenant"]) == ("TENANT_INVALID", names[0])


def test_the_client_says_it_by_an_exception(served: Served) -> None:
    with served.connect(tenant="No such name") as client, pytest.raises(TenantInvalid, match="63 lower-case letters"):
        client.session()


def test_one_that_asks_without_end_keeps_nobody_from_an_answer(serve: Serve) -> None:
    served = serve(max_running="2", max_waiting="4")
    with served.connect(tenant="red") as red, served.connect(tenant="blue") as blue, blue.session() as quiet:
        sessions = [red.session() for _ in range(7)]
        answers = [session.ask("Go on", max_new_tokens=4000) for session in sessions[:2]]
        for answer in answers:
            next(answer)
        answers += [session.ask("Me too", max_new_tokens=4000) for session in sessions[2:6]]
        until(lambda: all(served.live(session, "red").busy for session in sessions[:6]))
        with pytest.raises(CapacityExhausted) as refused:
            sessions[6].ask("Me too", max_new_tokens=1).read()
        assert refused.value.metadata["resource"] == "queue" and refused.value.retry_after
        assert quiet.ask("May I?", max_new_tokens=2).read()
        assert not any(answer.finished for answer in answers)
        for answer in answers:
            answer.close()
        for session in sessions:
            session.delete()
