"""Callers who do not read their answers do not affect others."""

import grpc

from tests.server.conftest import Serve
from tests.server.waiting import until
from vflow_client.v1.conversations_pb2 import ChatOptions, ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub

NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
"""Has the client take from the network only what is read."""


def test_who_reads_nothing_holds_up_nobody(serve: Serve) -> None:
    served = serve(max_running="2", max_waiting="4", tenant_turns="10")
    options = ChatOptions(max_new_tokens=400, min_new_tokens=400)
    sessions = [served.client.session() for _ in range(4)]
    with grpc.insecure_channel(served.address, NARROW) as channel:
        stub = ConversationsStub(channel)
        unread = [
            stub.Chat(ChatRequest(session=each.name, parts=[Part(text="Go on")], options=options)) for each in sessions
        ]
        for answer in unread:
            next(answer)
        for _ in range(3):  # though those who do not read are more than may run
            with served.client.session() as session:
                answer = session.ask("And I?", max_new_tokens=20, min_new_tokens=20)
                answer.read()
                assert answer.usage.completion_tokens == 20
        assert served.service.quotas.under_way("default") == len(unread)  # none has been sent to its end
        for answer in unread:
            answer.cancel()
    until(lambda: not served.service.quotas.under_way("default"))
