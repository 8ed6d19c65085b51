"""The synchronous client against a fake service over a real channel."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import grpc
import pytest

import vflow_client
import vflow_client.aio
from tests.client.fake_service import FakeService, Refusal
from vflow_client.v1 import conversations_pb2_grpc

FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXHAUSTED", retry_after=0.05)
GONE = Refusal(grpc.StatusCode.UNAVAILABLE)
STOPPING = Refusal(grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
CUT = Refusal(grpc.StatusCode.CANCELLED)


def test_a_conversation(client: vflow_client.Client, service: FakeService, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"from a path")
    with client.session("preset-25") as session:
        receipt = session.add_image(picture)
        answer = session.ask("How many?", images=[b"in the turn"], max_new_tokens=5, temperature=0.5, stop="\n")
        assert list(answer) == ["two ", "red ", "stars"]
    assert receipt.image == "sessions/one/images/1" and list(receipt.kept_tokens) == [40, 20, 10]
    assert answer.text == "two red stars" and answer.finish_reason == "STOP"
    assert answer.usage.reused_tokens == 40 and answer.receipt.kv_bytes == 4096
    assert [image.image for image in answer.images] == ["sessions/one/images/2"]

    assert service.requests["CreateSession"][0].session.strategy == "strategies/preset-25"
    assert service.requests["AddImage"][0].image.data == b"from a path"
    chat = service.requests["Chat"][0]
    assert [part.WhichOneof("content") for part in chat.parts] == ["image", "text"]
    assert chat.options.max_new_tokens == 5 and chat.options.temperature == 0.5 and list(chat.options.stop) == ["\n"]
    assert len(chat.request_id) >= 16
    assert service.requests["DeleteSession"][0].name == "sessions/one"


def test_parts_keep_their_order_and_a_string_among_them_is_text(
    client: vflow_client.Client, service: FakeService
) -> None:
    client.attach("sessions/x").ask("Compare", b"one", "with", vflow_client.Image(digest="ab" * 32)).read()
    parts = service.requests["Chat"][0].parts
    assert [part.text or part.image.data or part.image.digest for part in parts] == [
        "Compare",
        b"one",
        "with",
        "ab" * 32,
    ]


def test_one_picture_need_not_be_a_list(client: vflow_client.Client, service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"picture")
    sources = (str(path), path, b"picture", bytearray(b"picture"), vflow_client.Image(data=b"picture"), [path], (path,))
    for images in sources:
        client.attach("sessions/x").ask("What?", images=images).read()
    for request in service.requests["Chat"]:
        assert [part.image.data or part.text for part in request.parts] == [b"picture", "What?"]


def test_a_text_that_names_a_picture_is_sent_with_a_warning(
    client: vflow_client.Client, service: FakeService, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "a.png"
    session = client.attach("sessions/x")
    session.ask(str(path), "What?").read()  # there is no such file
    assert not recwarn.list
    path.write_bytes(b"picture")
    with pytest.warns(UserWarning, match=r"is sent as text.*pass pathlib.Path\(") as warned:
        session.ask(str(path), "What?").read()
    assert warned[0].filename == __file__
    assert [request.parts[0].text for request in service.requests["Chat"]] == [str(path)] * 2


@pytest.mark.parametrize("make", [vflow_client.connect, vflow_client.aio.connect])
def test_tokens_that_cannot_be_sent(make: Callable[..., object]) -> None:
    for token, complaint in (
        ("se\ncret", "U\\+000A at position 3"),
        ("s\u00e9", "U\\+00E9"),
        ("", "empty"),
        ("\n", "empty"),
    ):
        with pytest.raises(ValueError, match=f"the token .*{complaint}") as caught:
            make("localhost:1", token=token)
        assert "cret" not in str(caught.value)
        with pytest.raises(ValueError, match=f"the tenant .*{complaint}"):
            make("localhost:1", tenant=token)


def test_the_newline_of_a_tokens_file_is_dropped(address: str, service: FakeService) -> None:
    with vflow_client.connect(address, token="secret\n", tenant=" red\r\n") as client:
        client.session()
    assert service.tenants == ["red"] and service.authorizations == ["Bearer secret"]


def test_videos(client: vflow_client.Client, service: FakeService) -> None:
    session = client.attach("sessions/x")
    receipt = session.add_video([b"one", b"two"], fps=4)
    assert receipt.frames == 2 and sum(receipt.kept_by_frame) == receipt.kept_tokens[0]
    session.ask("Before", vflow_client.Video([b"three"], seconds=[1.5]), "after", detail="low").read()
    (added,), (asked,) = service.requests["AddVideo"], service.requests["Chat"]
    assert added.session == "sessions/x"
    assert [(frame.image.data, frame.seconds) for frame in added.video.frames] == [(b"one", 0.0), (b"two", 0.25)]
    assert [part.WhichOneof("content") for part in asked.parts] == ["text", "video", "text"]
    (frame,) = asked.parts[1].video.frames
    assert (frame.image.data, frame.image.detail, frame.seconds) == (b"three", 0, 1.5)


def test_a_fork_is_a_session_of_its_own(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["ForkSession"] = [GONE]
    with client.attach("sessions/one") as session, session.fork() as twin:
        assert (session.name, twin.name) == ("sessions/one", "sessions/two")
        twin.ask("How many?").read()
    assert [request.name for request in service.requests["ForkSession"]] == ["sessions/one"] * 2
    assert service.requests["Chat"][0].session == "sessions/two"
    assert [request.name for request in service.requests["DeleteSession"]] == ["sessions/two", "sessions/one"]


def test_every_call_names_the_tenant(address: str, service: FakeService) -> None:
    for tenant in ("red", None):
        service.tenants.clear()
        with vflow_client.connect(address, timeout=10, tenant=tenant) as client, client.session() as session:
            session.add_image(b"picture")
            session.ask("How many?").read()
            session.state()
            client.compress(b"picture")
            client.strategies.get("full")
            assert len(list(client.sessions())) == 6
        assert set(service.tenants) == {tenant} and len(service.tenants) == 10


def test_every_turn_has_its_own_request_id(client: vflow_client.Client, service: FakeService) -> None:
    session = client.attach("sessions/x")
    session.ask("a").read()
    session.ask("a").read()
    first, second = service.requests["Chat"]
    assert first.request_id != second.request_id


def test_text_arrives_before_the_answer_is_finished(client: vflow_client.Client, service: FakeService) -> None:
    service.go_on.clear()
    answer = client.attach("sessions/x").ask("How many?")
    assert next(answer) == "two "
    assert answer.text == "two " and not answer.finished
    with pytest.raises(RuntimeError, match="not finished"):
        _ = answer.usage
    service.go_on.set()
    assert str(answer) == "two red stars"
    assert answer.finished


def test_closing_an_unfinished_answer_cancels_the_call(client: vflow_client.Client, service: FakeService) -> None:
    service.go_on.clear()
    with client.attach("sessions/x").ask("How many?") as answer:
        next(answer)
    assert service.cancelled.wait(timeout=5)
    with pytest.raises(vflow_client.Cancelled):
        next(answer)


def test_a_finished_answer_is_not_cancelled(client: vflow_client.Client, service: FakeService) -> None:
    with client.attach("sessions/x").ask("How many?") as answer:
        answer.read()
    assert answer.text == "two red stars"
    assert not service.cancelled.wait(timeout=0.2)


def test_a_turn_is_sent_again_under_the_same_request_id(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["Chat"] = [GONE, STOPPING]
    assert client.attach("sessions/x").ask("How many?").read() == "two red stars"
    requests = service.requests["Chat"]
    assert len(requests) == 3 and len({request.request_id for request in requests}) == 1


@pytest.mark.parametrize(
    "again", [["two ", "red ", "stars"], ["two red stars"], ["tw", "o red st", "ars"], list("two red stars")]
)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_that_is_cut_off_goes_on_where_it_was(
    client: vflow_client.Client, service: FakeService, cut: int, again: list[str]
) -> None:
    service.cuts, service.replies = [cut], [service.pieces, again]
    answer = client.attach("sessions/x").ask("How many?")
    pieces = list(answer)
    assert pieces[:cut] == ["two ", "red ", "stars"][:cut] and "".join(pieces) == answer.text == "two red stars"
    assert all(pieces) and answer.usage.completion_tokens == 4
    first, second = service.requests["Chat"]
    assert first == second and first.request_id


def test_an_answer_may_be_cut_off_more_than_once(client: vflow_client.Client, service: FakeService) -> None:
    """Every new piece renews the patience, and with it the attempts."""
    service.pieces = list("two red stars")
    service.cuts = list(range(len(service.pieces) + 1))
    assert client.attach("sessions/x").ask("How many?").read() == "two red stars"


@pytest.mark.parametrize("again", [["three"], ["two blue stars"], ["two"], ["two "], []])
def test_an_answer_that_comes_again_in_other_words_is_an_error(
    client: vflow_client.Client, service: FakeService, again: list[str]
) -> None:
    service.cuts, service.replies = [2], [service.pieces, again]
    answer = client.attach("sessions/x").ask("How many?")
    with pytest.raises(vflow_client.AnswerChanged, match="in other words"):
        answer.read()
    assert answer.text == "two red "
    with pytest.raises(vflow_client.Cancelled):
        next(answer)


def test_sampled_answers_have_a_seed_so_that_they_can_go_on(client: vflow_client.Client, service: FakeService) -> None:
    session = client.attach("sessions/x")
    for options in (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 0.7},
        {"temperature": 1, "seed": 5},
    ):
        session.ask("How many?", **options).read()
    greedy, zero, one, two, chosen = (request.options for request in service.requests["Chat"])
    assert not greedy.HasField("seed") and not zero.HasField("seed") and chosen.seed == 5
    assert one.HasField("seed") and two.HasField("seed") and one.seed != two.seed


def test_a_stream_without_an_end_is_an_error(client: vflow_client.Client, service: FakeService) -> None:
    service.without_end = True
    with pytest.raises(vflow_client.ServerFault, match="without a final event"):
        client.attach("sessions/x").ask("How many?").read()


@pytest.mark.parametrize("refusal", [FULL, STOPPING, GONE, CUT], ids=["no room", "stopping", "unreachable", "cut off"])
@pytest.mark.parametrize("method", ["AddImage", "AddVideo"])
def test_adding_a_picture_is_repeated_under_one_request_id(
    client: vflow_client.Client, service: FakeService, refusal: Refusal, method: str
) -> None:
    service.refusals[method] = [refusal, refusal]
    session = client.attach("sessions/x")
    for _ in range(2):
        session.add_image(b"picture") if method == "AddImage" else session.add_video([b"frame"], fps=1)
    first, second, third, other = (request.request_id for request in service.requests[method])
    assert first == second == third != other and other


def test_what_cannot_be_repeated_is_repeated_only_where_it_was_not_begun(
    client: vflow_client.Client, service: FakeService
) -> None:
    service.refusals["RollbackStrategy"] = [STOPPING, FULL, GONE]
    with pytest.raises(vflow_client.Unavailable):
        client.strategies.rollback()
    assert len(service.requests["RollbackStrategy"]) == 3


def test_the_delay_that_the_service_asks_for_is_kept(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["CreateSession"] = [FULL]
    started = time.monotonic()
    client.session()
    assert time.monotonic() - started >= 0.05


def test_retries_end(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["GetSession"] = [GONE] * 9
    with pytest.raises(vflow_client.Unavailable):
        client.attach("sessions/x").state()
    assert len(service.requests["GetSession"]) == 3


def test_a_busy_session_is_for_the_caller_to_handle(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["Chat"] = [Refusal(grpc.StatusCode.ABORTED, "SESSION_BUSY", metadata={"session": "sessions/x"})]
    with pytest.raises(vflow_client.SessionBusy) as caught:
        client.attach("sessions/x").ask("How many?").read()
    assert caught.value.metadata == {"session": "sessions/x"}
    assert len(service.requests["Chat"]) == 1


def test_the_timeout_ends_a_turn(client: vflow_client.Client, service: FakeService) -> None:
    service.go_on.clear()
    answer = client.attach("sessions/x").ask("How many?", timeout=0.3)
    with pytest.raises(vflow_client.DeadlineExceeded):
        answer.read()
    assert answer.text == "two "


def test_lists_run_over_all_pages(client: vflow_client.Client, service: FakeService) -> None:
    assert [state.name for state in client.sessions()] == [f"sessions/{number}" for number in range(6)]
    assert [strategy.name for strategy in client.strategies.list()] == ["strategies/full", "strategies/tuned-one"]


def test_strategies(client: vflow_client.Client, service: FakeService) -> None:
    assert client.strategies.get("full").name == "strategies/full"
    made = client.strategies.create(
        "mine", budget=0.2, ratios=[0.3, 0.9], grid=3.5, diversity=0.25, positions="renumbered"
    )
    assert made.name == "strategies/mine"
    sent = service.requests["CreateStrategy"][0].strategy
    assert sent.budget == 0.2 and list(sent.ratios) == [0.3, 0.9] and sent.grid == 3.5
    assert sent.diversity == 0.25
    assert sent.positions == vflow_client.Strategy.RENUMBERED and sent.reserve == vflow_client.Strategy.OCCUPIED
    assert client.strategies.activate("strategies/mine", etag="e1").active
    assert service.requests["ActivateStrategy"][0].etag == "e1"


def test_an_unset_grid_stays_unset(client: vflow_client.Client, service: FakeService) -> None:
    client.strategies.create("plain", ratios=[1.0])
    sent = service.requests["CreateStrategy"][0].strategy
    assert not sent.HasField("grid") and not sent.HasField("budget")


def test_an_activation_guarded_by_an_etag_is_not_repeated(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["ActivateStrategy"] = [GONE, GONE]
    with pytest.raises(vflow_client.Unavailable):
        client.strategies.activate("mine", etag="e1")
    assert len(service.requests["ActivateStrategy"]) == 1
    assert client.strategies.activate("mine").active
    assert len(service.requests["ActivateStrategy"]) == 3


def test_compress(client: vflow_client.Client, service: FakeService) -> None:
    assert client.compress(b"picture", strategy="full", embeddings=True).embeddings == b"safetensors"
    assert service.requests["CompressImage"][0].strategy == "strategies/full"
    assert client.compress(b"picture").embeddings == b""
    assert service.requests["CompressImage"][1].strategy == ""


def test_deleting_a_session_that_is_gone_is_no_error(client: vflow_client.Client, service: FakeService) -> None:
    service.refusals["DeleteSession"] = [Refusal(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")]
    client.attach("sessions/x").delete()


def test_a_failing_delete_does_not_hide_the_error_of_the_block(
    client: vflow_client.Client, service: FakeService
) -> None:
    service.refusals["DeleteSession"] = [Refusal(grpc.StatusCode.INTERNAL, "INTERNAL")] * 2
    with pytest.raises(KeyError), client.session():
        raise KeyError("the block's own")
    with pytest.raises(vflow_client.ServerFault), client.session():
        pass


def test_the_error_of_a_timeout_names_its_seconds(client: vflow_client.Client, service: FakeService) -> None:
    service.go_on.clear()
    with pytest.raises(vflow_client.DeadlineExceeded, match=r"no answer within 0.3 s; pass timeout="):
        client.attach("sessions/x").ask("How many?", timeout=0.3).read()


def test_a_client_waits_for_a_service_that_is_not_there_yet(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = grpc.server(ThreadPoolExecutor(2))
    conversations_pb2_grpc.add_ConversationsServicer_to_server(service, server)

    def start() -> None:
        assert server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()

    starting = Timer(2.0, start)
    starting.start()
    began = time.monotonic()
    try:
        with vflow_client.connect(f"127.0.0.1:{port}") as client:
            # Not repeatable, but surely not begun while nothing listens.
            client.session().add_image(b"picture")
            assert 2.0 <= time.monotonic() - began < 6.0
    finally:
        starting.join()
        server.stop(None).wait()
    (said,) = caplog.records
    assert said.name == "vflow_client" and said.levelname == "WARNING"
    assert f"waiting for the service at 127.0.0.1:{port}, trying again for up to" in said.getMessage()
    assert "Connection refused" in said.getMessage()


def test_an_error_that_ends_a_block_does_not_wait_for_the_deletion() -> None:
    with vflow_client.connect("127.0.0.1:1") as client:
        began = time.monotonic()
        with pytest.raises(KeyError), client.attach("sessions/x"):
            raise KeyError("the block's own")
    assert time.monotonic() - began < 5.0


def test_nobody_at_the_address() -> None:
    with vflow_client.connect("127.0.0.1:1", retry=vflow_client.RetryPolicy(attempts=1)) as client:
        with pytest.raises(vflow_client.Unavailable, match="could not be reached within"):
            client.wait_until_reachable(timeout=0.2)
        with pytest.raises(vflow_client.Unavailable):
            client.session()


def test_wait_until_reachable(client: vflow_client.Client) -> None:
    client.wait_until_reachable(timeout=5)


def test_messages_beyond_grpcs_default_limit_pass(client: vflow_client.Client, service: FakeService) -> None:
    """The fake server keeps the default limit, so its refusal shows that the client did send five megabytes."""
    with pytest.raises(vflow_client.ResourceExhausted, match="larger than max"):
        client.attach("sessions/x").add_image(bytes(5 * 1024 * 1024))
    assert "AddImage" not in service.requests
