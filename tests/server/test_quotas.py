"""Quotas over a real channel: the limits of one tenant, even with free capacity, and their effect on others."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.holding import engine_held
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Session, VFlowError
from vflow_client.v1.conversations_pb2 import AddImageRequest, ChatOptions, ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_client.v1.images_pb2 import Image
from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.encoding_queue import TOKENS_PER_PIECE
from vflow_server.engine.ops import Encode
from vflow_server.engine.token_meter import Allowance, TokenMeter
from vflow_server.interceptors import guard
from vflow_server.rpc import answer_writer
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.picture import Picture, PictureError


@contextmanager
def exceeded(resource: str, quota: int, *, retry: bool) -> Iterator[None]:
    with pytest.raises(CapacityExhausted) as refused:
        yield
    assert refused.value.metadata == {"resource": resource, "quota": str(quota)}
    assert (refused.value.retry_after is not None) == retry


def ask(session: Session, tokens: int = 2) -> str:
    return session.ask("What is it?", max_new_tokens=tokens).read()


def test_sessions(serve: Serve) -> None:
    served = serve(tenant_sessions="2")
    first, second = served.client.session(), served.client.session()
    for another in (served.client.session, first.fork):
        with exceeded("tenant_sessions", 2, retry=False):
            another()
    with served.connect(tenant="other") as other, other.session():
        pass
    second.delete()
    assert ask(first.fork())


def test_pictures(serve: Serve) -> None:
    served = serve(tenant_pictures="3")
    client = served.client
    first, second = client.session(), client.session()
    shown = AddImageRequest(session=first.name, image=Image(data=png(60, 60, seed=1)), request_id="shown")
    parts = [Part(text="Both?"), *(Part(image=Image(data=png(60, 60, seed=seed))) for seed in (2, 3))]
    once = ChatRequest(session=second.name, parts=parts, options=ChatOptions(max_new_tokens=1), request_id="once")
    with grpc.insecure_channel(served.address) as channel:
        receipt = ConversationsStub(channel).AddImage(shown).receipt
        *_, last = ConversationsStub(channel).Chat(once)
        for one_more in (
            lambda: first.add_image(png(60, 60, seed=4)),
            lambda: second.ask("And?", images=[png(60, 60, seed=4)], max_new_tokens=1).read(),
            lambda: first.fork(),
        ):
            with exceeded("tenant_pictures", 3, retry=False):
                one_more()
        *_, again = ConversationsStub(channel).Chat(once)
        assert again.finished.receipt.replayed and again.finished.text == last.finished.text
        assert ConversationsStub(channel).AddImage(shown).receipt == receipt
    assert ask(first) and client.compress(png(60, 60, seed=4)).receipt.digest  # neither adds one to a session
    first.delete()
    second.add_image(png(60, 60, seed=4))


def test_turns_at_the_same_time(serve: Serve) -> None:
    served = serve(tenant_turns="1")
    running, waiting = served.client.session(), served.client.session()
    answer = running.ask("Go on", max_new_tokens=4000)
    next(answer)
    for another in (
        lambda: ask(waiting),
        lambda: waiting.add_image(png(60, 60)),
        lambda: served.client.compress(png(60, 60)),
    ):
        with exceeded("tenant_turns", 1, retry=True):
            another()
    with served.connect(tenant="other") as other, other.session() as session:
        assert ask(session)
    answer.close()
    until(lambda: not served.live(running).busy)
    assert ask(waiting)


def test_tokens_of_a_minute(serve: Serve) -> None:
    served = serve(tenant_tokens="100")
    session = served.client.session()
    assert ask(session, tokens=120)
    with pytest.raises(CapacityExhausted) as refused:
        ask(session)
    assert refused.value.metadata["resource"] == "tenant_tokens"
    # Of at least 20 tokens too many, and those of the question, five come back in three seconds.
    assert refused.value.retry_after is not None and 0 < refused.value.retry_after < 60
    with served.connect(tenant="other") as other, other.session() as unhindered:
        assert ask(unhindered)


def test_tokens_of_a_turn_that_was_cancelled_count(serve: Serve) -> None:
    served = serve(tenant_tokens="30")
    session = served.client.session()
    answer = session.ask("Go on", max_new_tokens=4000)
    for _ in range(40):
        next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    with exceeded("tenant_tokens", 30, retry=True):
        ask(session)


def test_tokens_of_a_question_count_though_its_answer_is_never_read(serve: Serve) -> None:
    """The tokens of the prompt are run before the first one of the answer."""
    served = serve(tenant_tokens="200")
    session = served.client.session()
    session.ask("word " * 150, max_new_tokens=1, timeout=20).close()
    answer = session.ask("word " * 150, max_new_tokens=4000, min_new_tokens=4000)
    next(answer)
    answer.close()
    until(lambda: not served.live(session).busy)
    with exceeded("tenant_tokens", 200, retry=True):
        ask(session)
    assert session.state().turn_count == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The tokens that were taken from each tenant's allowance, of which none comes back."""
    counted: Counter[str] = Counter()
    monkeypatch.setattr(TokenMeter, "add", lambda meter, tenant, tokens: counted.update({tenant: tokens}))
    return counted


def test_tokens_of_pictures_count_when_they_are_encoded(serve: Serve, counted: Counter[str]) -> None:
    served = serve(tenant_tokens="1000000")

    def cost(call: Callable[[], object]) -> int:
        before = counted["default"]
        call()
        return counted["default"] - before

    session, other = served.client.session("preset-10"), served.client.session("preset-10")
    receipt = served.client.compress(png(90, 90), strategy="preset-10").receipt
    assert counted["default"] == receipt.visual_tokens
    assert cost(lambda: served.client.compress(png(90, 90), strategy="preset-10")) == 0, "nothing was encoded"
    assert receipt.kept_tokens[0] <= cost(lambda: session.add_image(png(90, 90))) < receipt.visual_tokens
    assert cost(lambda: other.add_image(png(91, 90))) > receipt.visual_tokens


def test_tokens_of_a_picture_that_is_given_up_count(
    serve: Serve, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves while pictures are encoded pays for what was done until then."""
    served = serve(tenant_tokens="1000000")
    begin, reached, enough = EncoderThread.begin, threading.Event(), threading.Event()

    def held(encoder: EncoderThread, ops: Sequence[Encode]) -> Pieces[list[CompressedImage]]:
        pieces = begin(encoder, ops)
        yield next(pieces)
        reached.set()
        enough.wait(20)
        yield
        return (yield from pieces)

    monkeypatch.setattr(EncoderThread, "begin", held)
    session = served.client.session()
    with grpc.insecure_channel(served.address) as channel:
        request = AddImageRequest(session=session.name, image=Image(data=png(60, 60)))
        showing = ConversationsStub(channel).AddImage.future(request, timeout=20)
        assert reached.wait(20)
        showing.cancel()
        until(lambda: not served.live(session).busy)
        enough.set()
        until(lambda: counted["default"] > 0)


def test_small_pictures_do_not_make_large_ones_cheap_that_are_given_up(
    serve: Serve, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(tenant_tokens="1000000")
    small = served.client.compress(png(28, 28)).receipt.visual_tokens
    before, begin = counted["default"], EncoderThread.begin
    reached, enough = threading.Event(), threading.Event()

    def held(encoder: EncoderThread, ops: Sequence[Encode]) -> Pieces[list[CompressedImage]]:
        reached.set()
        enough.wait(20)
        yield
        return (yield from begin(encoder, ops))

    monkeypatch.setattr(EncoderThread, "begin", held)
    with grpc.insecure_channel(served.address) as channel:
        session = served.client.session()
        request = AddImageRequest(session=session.name, image=Image(data=png(300, 300)))
        showing = ConversationsStub(channel).AddImage.future(request, timeout=20)
        assert reached.wait(20)
        showing.cancel()
        until(lambda: not served.live(session).busy)
        enough.set()
        until(lambda: counted["default"] > before)
    assert small < TOKENS_PER_PIECE <= counted["default"] - before


def test_whoever_is_encoded_beside_a_faulty_picture_does_not_pay_for_it(
    serve: Serve, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(tenant_tokens="1000000")
    begin, together = EncoderThread.begin, threading.Event()

    def faulty(encoder: EncoderThread, ops: Sequence[Encode]) -> Pieces[list[CompressedImage]]:
        if any(op.tenant == "faulty" for op in ops):
            if len(ops) > 1:
                together.set()
            raise PictureError("PICTURE_UNSUPPORTED", "it is faulty")
        return (yield from begin(encoder, ops))

    monkeypatch.setattr(EncoderThread, "begin", faulty)
    with served.connect(tenant="faulty") as other, ThreadPoolExecutor(2) as threads:
        with engine_held(served):
            good = threads.submit(served.client.compress, png(90, 90))
            bad = threads.submit(other.compress, png(91, 90))
            until(lambda: served.service.engine.waiting == 2)
        receipt = good.result(20).receipt
        assert isinstance(bad.exception(20), VFlowError) and together.is_set()
    assert counted["default"] == receipt.visual_tokens and counted["faulty"]


def test_forks_and_sessions_at_once_do_not_exceed_the_quotas(serve_data: Serve) -> None:
    """What is being made counts before it is there."""
    served = serve_data(tenant_pictures="10", tenant_sessions="7")
    origins = [served.client.session() for _ in range(3)]
    for session in origins:
        for seed in range(2):
            session.add_image(png(60, 60, seed=seed))
    assert served.service.archive is not None
    enough = threading.Event()
    held = served.service.archive.submit(lambda connection: enough.wait(20))
    with ThreadPoolExecutor(6) as threads:
        forks = [threads.submit(session.fork) for session in origins]
        until(lambda: any(fork.done() for fork in forks))
        new = [threads.submit(served.client.session) for _ in range(3)]
        until(lambda: any(each.done() for each in new))
        enough.set()
        refusals = [each.exception(20) for each in (*forks, *new)]
    held.result(20)
    refused = [error.metadata["resource"] for error in refusals if isinstance(error, CapacityExhausted)]
    assert refused == ["tenant_pictures", "tenant_sessions"]
    states = list(served.client.sessions())
    assert (len(states), sum(state.image_count for state in states)) == (7, 10)
    with exceeded("tenant_sessions", 7, retry=False):
        served.client.session()
    served.client.attach(states[-1].name).delete()  # one of those without pictures
    with exceeded("tenant_pictures", 10, retry=False):
        origins[0].fork()


def test_tokens_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    allowance = Allowance(120)
    allowance.spend(150)
    assert (allowance.left, allowance.seconds_until_one()) == (-30, 15.5)
    now = 15.5
    assert allowance.left == 1
    now = 1000.0
    assert allowance.left == 120


def test_tokens_come_back_to_a_tenant_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken when they are run, not when the tenant comes again."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = TokenMeter(100)
    meter.add("red", 130)
    meter.add("blue", 99)
    assert (meter.seconds_until_one("red"), meter.seconds_until_one("blue")) == (pytest.approx(18.6), 0)
    now = 60.0
    assert meter.seconds_until_one("red") == meter.seconds_until_one("nobody") == 0
    for number in range(200):
        meter.add(f"t{number}", 1)
    now = 240.0
    for number in range(200):
        meter.add(f"u{number}", 1)
    assert len(meter) < 400, "those whose allowance is full again are forgotten"


def test_tokens_are_counted_while_tenants_come_and_go() -> None:
    meter = TokenMeter(1_000_000)

    def run(number: int) -> None:
        for turn in range(500):
            meter.add(f"t{turn % 7}", 1)
            meter.seconds_until_one(f"t{(turn + number) % 7}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert len(meter) <= 7
    unbounded = TokenMeter()
    unbounded.add("red", 1)
    assert len(unbounded) == 0 and unbounded.seconds_until_one("red") == 0


def test_a_picture_that_is_being_given_up_counts_until_it_is(serve: Serve) -> None:
    """The caller is gone, and the engine may be about to finish the picture all the same."""
    served = serve(tenant_pictures="1")
    first, second = served.client.session(), served.client.session()
    reached, enough = threading.Event(), threading.Event()

    async def hold() -> None:
        served.service.engine.call(lambda: reached.set() or enough.wait(20), "default")

    with grpc.insecure_channel(served.address) as channel:
        served.run(hold())
        assert reached.wait(20)
        request = AddImageRequest(session=first.name, image=Image(data=png(60, 60)))
        showing = ConversationsStub(channel).AddImage.future(request, timeout=20)
        until(lambda: served.live(first).busy)
        showing.cancel()
        until(lambda: not served.service.quotas.under_way("default"))
        with exceeded("tenant_pictures", 1, retry=False):
            second.add_image(png(60, 60))
        enough.set()
        until(lambda: not served.live(first).busy)
        second.add_image(png(60, 60))


def test_caches_of_idle_sessions_make_room(serve: Serve) -> None:
    undisturbed = serve()
    with undisturbed.client.session() as session:
        session.add_image(png(112, 112, seed=0))
        alone = session.state().kv_bytes
        text = ask(session)
    undisturbed.stop()
    served = serve(tenant_kv=str(2 * alone))
    sessions = [served.client.session() for _ in range(5)]
    for number, session in enumerate(sessions):
        session.add_image(png(112, 112, seed=number))
    assert [each.state().resident for each in sessions] == [False, False, True, True, True]  # the quota, and the latest
    assert ask(sessions[0]) == text  # the offloaded cache was restored


def test_caches_of_turns_under_way_do_not(serve: Serve) -> None:
    served = serve(tenant_kv="1KiB")
    with served.connect() as client:
        running, waiting = client.session(), client.session()
        answer = running.ask("Go on", max_new_tokens=4000)
        next(answer)
        with exceeded("tenant_kv", 1024, retry=True):
            ask(waiting)
        answer.close()
        until(lambda: not served.live(running).busy)
        assert ask(waiting)


def test_a_tenant_that_is_gone_leaves_nothing_behind(serve: Serve) -> None:
    served = serve(tenant_turns="1", tenant_tokens="1000000")
    for number in range(5):
        with served.connect(tenant=f"t{number}") as client, client.session() as session:
            assert ask(session)
    assert not any(served.service.quotas.under_way(f"t{number}") for number in range(5))


def test_decoded_pictures_of_requests_under_way_are_bounded(serve: Serve) -> None:
    served = serve(max_picture_pixels="2500", picture_memory="1")
    store = served.service.pictures
    in_use = [served.run(store.read(Image(data=png(50, 50, seed)), "image", "tenant")) for seed in range(4)]
    with pytest.raises(CapacityExhausted, match="take the 30002 bytes") as refused:
        served.client.compress(png(50, 50))
    assert refused.value.metadata["resource"] == "picture_decoding" and refused.value.retry_after
    overview = in_use[0].in_detail("low")  # another picture of the same pixels
    in_use.clear()
    assert served.client.compress(png(50, 50)).receipt.digest
    assert store.bytes_decoded >= overview.pixels.nbytes
    del overview
    until(lambda: store.bytes_decoded == 0)


def test_requests_that_come_together_are_bounded_together(serve: Serve) -> None:
    served = serve(max_picture_pixels="2500", picture_memory="1")
    store = served.service.pictures

    async def all_at_once() -> list[object]:
        reads = [store.read(Image(data=png(50, 50, seed)), "image", "tenant") for seed in range(20)]
        return list(await asyncio.gather(*reads, return_exceptions=True))

    outcomes = served.run(all_at_once())
    taken = [each for each in outcomes if isinstance(each, Picture)]
    assert len(taken) == 4
    assert all(getattr(each, "reason", "") == "CAPACITY_EXHAUSTED" for each in outcomes if each not in taken)


def test_metadata_is_bounded(served: Served) -> None:
    call = "/grpc.health.v1.Health/Check"
    with grpc.insecure_channel(served.address) as channel:
        assert channel.unary_unary(call)(b"", metadata=[("x-note", "a" * 12_000)])
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(call)(b"", metadata=[("x-note", "a" * 20_000)])
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_connection_of_some_age_is_replaced_and_drops_nothing(serve: Serve) -> None:
    served = serve(connection_age="100ms")
    with served.connect() as client, client.session() as session:
        begun = time.monotonic()
        answer = session.ask("Go on", max_new_tokens=150)
        answer.read()
        assert answer.usage.completion_tokens == 150
        while time.monotonic() - begun < 1.0:
            assert session.state().turn_count == 1


def test_an_answer_that_nobody_reads_is_ended(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_writer, "SLOWEST_READER", 0.3)
    monkeypatch.setattr(guard, "_LAST_WORD", 0.3)
    served = serve(tenant_turns="1")
    session, other = served.client.session(), served.client.session()
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
    with grpc.insecure_channel(served.address, small_window) as channel:
        options = ChatOptions(max_new_tokens=300)
        answer = ConversationsStub(channel).Chat(
            ChatRequest(session=session.name, parts=[Part(text="Go on")], options=options)
        )
        next(answer)
        until(lambda: not served.service.quotas.under_way("default"))  # though the caller is still there
        assert ask(other)
        with pytest.raises(grpc.RpcError) as ended:
            list(answer)
        assert ended.value.code() == grpc.StatusCode.ABORTED
    assert ask(session)
