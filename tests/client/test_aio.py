"""The asyncio client against a fake service over a real channel, and its likeness to the synchronous one."""

import asyncio
import inspect
from pathlib import Path
from typing import Any

import grpc
import pytest

import vflow_client
import vflow_client.aio
from tests.client.conftest import QUICK
from tests.client.fake_service import FakeService, Refusal

GONE = Refusal(grpc.StatusCode.UNAVAILABLE)


def connect(address: str, tenant: str | None = None) -> vflow_client.aio.AsyncClient:
    return vflow_client.aio.connect(address, timeout=10, retry=QUICK, tenant=tenant)


def test_a_conversation(address: str, service: FakeService) -> None:
    async def converse() -> tuple[list[str], vflow_client.aio.AsyncAnswer]:
        async with connect(address, "red") as client, await client.session("full") as session:
            assert (await session.add_image(b"picture")).visual_tokens == 256
            answer = await session.ask("How many?", images=[b"another"])
            pieces = [piece async for piece in answer]
            assert (await session.state()).turn_count == 3
            assert (await session.fork()).name == "sessions/two"
            return pieces, answer

    pieces, answer = asyncio.run(converse())
    assert pieces == ["two ", "red ", "stars"] and answer.text == "two red stars"
    assert answer.usage.completion_tokens == 4 and answer.receipt.kv_bytes_full == 40960
    assert service.requests["CreateSession"][0].session.strategy == "strategies/full"
    assert service.requests["DeleteSession"][0].name == "sessions/one"
    assert service.tenants == ["red"] * 6
    assert not service.cancelled.is_set()


def test_videos(address: str, service: FakeService, tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(b"from a path")

    async def show() -> None:
        async with connect(address) as client:
            session = client.attach("sessions/x")
            assert (await session.add_video([tmp_path / "frame.png", b"two"], seconds=[0.5, 3])).frames == 2
            await (await session.ask(vflow_client.Video([b"three"], fps=1), "What happens?")).read()

    asyncio.run(show())
    sent = service.requests["AddVideo"][0].video.frames
    assert [(frame.image.data, frame.seconds) for frame in sent] == [(b"from a path", 0.5), (b"two", 3.0)]
    assert service.requests["Chat"][0].parts[0].video.frames[0].image.data == b"three"


@pytest.mark.parametrize("way", ["close", "cancel the task"])
def test_leaving_an_answer_cancels_the_call(address: str, service: FakeService, way: str) -> None:
    service.go_on.clear()

    async def leave() -> None:
        async with connect(address) as client:
            answer = await client.attach("sessions/x").ask("How many?")
            assert await anext(answer) == "two "
            if way == "close":
                answer.close()
                with pytest.raises(vflow_client.Cancelled):
                    await anext(answer)
            else:
                reading = asyncio.create_task(answer.read())
                await asyncio.sleep(0.05)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            assert await asyncio.to_thread(service.cancelled.wait, 5)

    asyncio.run(leave())


def test_closing_an_answer_that_another_task_reads(address: str, service: FakeService) -> None:
    service.go_on.clear()

    async def close() -> None:
        async with connect(address) as client:
            answer = await client.attach("sessions/x").ask("How many?")
            reading = asyncio.create_task(answer.read())
            await asyncio.sleep(0.1)
            answer.close()
            with pytest.raises(vflow_client.Cancelled):
                await reading

    asyncio.run(close())


def test_closing_an_answer_between_two_attempts_sends_no_other(address: str, service: FakeService) -> None:
    full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXHAUSTED", retry_after=0.8)
    service.refusals["Chat"] = [full]

    async def close() -> None:
        async with connect(address) as client:
            answer = await client.attach("sessions/x").ask("How many?")
            reading = asyncio.create_task(answer.read())
            while "Chat" not in service.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # until the refusal has come back
            answer.close()
            with pytest.raises(vflow_client.Cancelled):
                await reading
            await asyncio.sleep(1.0)  # beyond the time of the second attempt

    asyncio.run(close())
    assert len(service.requests["Chat"]) == 1


def test_a_turn_is_sent_again_and_goes_on_where_it_was(address: str, service: FakeService) -> None:
    async def ask() -> str:
        async with connect(address) as client:
            return await (await client.attach("sessions/x").ask("How many?")).read()

    service.refusals["Chat"] = [GONE, GONE]
    assert asyncio.run(ask()) == "two red stars"
    requests = service.requests.pop("Chat")
    assert len(requests) == 3 and len({request.request_id for request in requests}) == 1

    service.cuts = [2, 1, 3]
    assert asyncio.run(ask()) == "two red stars"
    requests = service.requests.pop("Chat")
    assert len(requests) == 4 and len({request.request_id for request in requests}) == 1

    service.cuts, service.replies = [2], [service.pieces, ["two blue stars"]]
    with pytest.raises(vflow_client.AnswerChanged):
        asyncio.run(ask())


def test_a_picture_is_added_under_one_request_id(address: str, service: FakeService) -> None:
    async def add() -> None:
        async with connect(address) as client:
            await client.attach("sessions/x").add_image(b"picture")

    service.refusals["AddImage"] = [GONE, GONE]
    asyncio.run(add())
    assert (
        len({request.request_id for request in service.requests["AddImage"]}) == 1 < len(service.requests["AddImage"])
    )


def test_errors_are_typed_and_a_missing_end_is_one(address: str, service: FakeService) -> None:
    async def fail() -> None:
        async with connect(address) as client:
            service.refusals["AddImage"] = [
                Refusal(grpc.StatusCode.INVALID_ARGUMENT, "PICTURE_TOO_LARGE", metadata={"max_bytes": "7"})
            ]
            with pytest.raises(vflow_client.PictureRejected) as caught:
                await client.attach("sessions/x").add_image(b"picture")
            assert caught.value.reason == "PICTURE_TOO_LARGE" and caught.value.metadata == {"max_bytes": "7"}
            service.without_end = True
            with pytest.raises(vflow_client.ServerFault):
                await (await client.attach("sessions/x").ask("How many?")).read()

    asyncio.run(fail())


def test_lists_strategies_and_compression(address: str, service: FakeService) -> None:
    async def look() -> None:
        async with connect(address) as client:
            await client.wait_until_reachable(timeout=5)
            assert [state.name async for state in client.sessions()] == [f"sessions/{n}" for n in range(6)]
            names = [strategy.name async for strategy in client.strategies.list()]
            assert names == ["strategies/full", "strategies/tuned-one"]
            assert (await client.strategies.get("full")).etag == "e1"
            assert (await client.strategies.create("mine", ratios=[0.5])).name == "strategies/mine"
            assert (await client.strategies.activate("mine")).active
            assert (await client.compress(b"picture", embeddings=True)).embeddings == b"safetensors"

    asyncio.run(look())


def test_nobody_at_the_address() -> None:
    async def wait() -> None:
        async with connect("127.0.0.1:1") as client:
            with pytest.raises(vflow_client.Unavailable, match="could not be reached within"):
                await client.wait_until_reachable(timeout=0.2)

    asyncio.run(wait())


@pytest.mark.parametrize(
    ("plain", "asynchronous"),
    [
        (vflow_client.Client, vflow_client.aio.AsyncClient),
        (vflow_client.Session, vflow_client.aio.AsyncSession),
        (vflow_client.Answer, vflow_client.aio.AsyncAnswer),
        (vflow_client.Retune, vflow_client.aio.AsyncRetune),
        (vflow_client.StrategyAdmin, vflow_client.aio.AsyncStrategyAdmin),
    ],
)
def test_both_faces_have_the_same_methods_and_arguments(plain: type, asynchronous: type) -> None:
    def face(cls: type) -> dict[str, Any]:
        members = inspect.getmembers(cls, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if name[0] != "_"}

    assert face(plain) == face(asynchronous)
    assert face(plain)


def test_connect_takes_the_same_arguments() -> None:
    def parameters(function: Any) -> list[Any]:
        return list(inspect.signature(function).parameters.values())

    assert parameters(vflow_client.connect) == parameters(vflow_client.aio.connect)
