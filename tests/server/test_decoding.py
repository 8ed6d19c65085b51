"""Pictures are decoded in processes that the service can do without, however hostile the files are."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.server import hostile_pictures as hostile
from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.hostile_pictures import hostile_files
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, PictureRejected, VFlowError
from vflow_client.v1 import compression_pb2, compression_pb2_grpc, images_pb2
from vflow_server.images import decoders, decoding_worker
from vflow_server.images.decoding_worker import Worker
from vflow_server.rpc.errors import ServiceError

LARGE = hostile.png_of_nothing(2100)
"""A picture of more pixels than the fast lane takes."""


def workers(of: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that decode for a process, this one if none is given."""
    return [
        child
        for child in (of or psutil.Process()).children()
        if child.status() != psutil.STATUS_ZOMBIE and "vflow_server.images.decoding_process" in child.cmdline()
    ]


def outcome(client: Client, picture: bytes) -> str:
    """What comes of compressing a picture: its reason if it is refused, else nothing."""
    try:
        client.compress(picture, detail="low")  # less to encode: that is not what is tested
    except VFlowError as error:
        return error.reason or repr(error)
    return ""


def counted(served: Served, outcome: str) -> float:
    """How many files had this outcome."""
    return served.service.metrics.registry.get_sample_value("vflow_picture_decodings_total", {"outcome": outcome}) or 0


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


class Stopped:
    """Workers that stand still, as with a file that takes for ever, so that no test depends on a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, which: Callable[[bytes], bool]) -> None:
        self.pids: list[int] = []
        load = Worker.load

        def standing(worker: Worker, data: bytes) -> str:
            digest = load(worker, data)
            if which(data) and worker.pid is not None:
                os.kill(worker.pid, signal.SIGSTOP)
                self.pids.append(worker.pid)
            return digest

        monkeypatch.setattr(Worker, "load", standing)


@contextmanager
def in_thread(function: Callable[[], str]) -> Iterator[Future[str]]:
    """Run ``function`` beside the block."""
    future: Future[str] = Future()
    thread = threading.Thread(target=lambda: future.set_result(function()))
    thread.start()
    yield future
    thread.join()


REFUSALS = {"PICTURE_TOO_COMPLEX", "PICTURE_TRUNCATED", "CAPACITY_EXHAUSTED"}


def attack(served: Served, files: Iterable[bytes], pool: ThreadPoolExecutor, tenants: int) -> list[str]:
    """What comes of hostile files that tenants send at the same time, while their neighbour is served after each."""
    with ExitStack() as stack:
        attackers = [
            stack.enter_context(served.connect(tenant=f"hostile{number}", timeout=120)) for number in range(tenants)
        ]
        neighbour = stack.enter_context(served.connect(tenant="neighbour"))
        session = stack.enter_context(neighbour.session())
        sent: list[Future[str]] = []
        for seed, data in enumerate(files):
            sent += [pool.submit(outcome, attacker, data) for attacker in attackers]
            assert neighbour.compress(png(60, 60, seed)).receipt.digest
            assert session.ask("Go on", max_new_tokens=2).read()
        return [each.result() for each in sent]


def test_a_neighbour_is_served_while_hostile_files_are_decoded(serve: Serve, calls: ThreadPoolExecutor) -> None:
    served = serve(picture_seconds="2s")
    outcomes = attack(served, [make() for make in hostile_files(4.2).values()], calls, tenants=1)
    assert set(outcomes) <= {"", *REFUSALS}
    assert counted(served, "crashed") == counted(served, "failed") == 0


@pytest.mark.long
@pytest.mark.parametrize("tenants", [1, 8])
def test_nor_do_they_keep_it_waiting_at_their_largest(serve: Serve, calls: ThreadPoolExecutor, tenants: int) -> None:
    served = serve()
    outcomes = attack(served, (make() for make in hostile_files(49).values()), calls, tenants)
    assert set(outcomes) <= {"", *REFUSALS, "CONTEXT_EXCEEDED"}
    assert counted(served, "crashed") == counted(served, "failed") == 0


def test_small_pictures_pass_large_ones_that_take_for_ever(
    serve: Serve, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another tenant, of many others, and of the same one."""
    served = serve()
    assert outcome(served.client, LARGE) == ""
    (_, slow) = workers()
    slow.suspend()
    tenants = [served.connect(tenant=f"t{number}") for number in range(8)]
    attacks = [calls.submit(outcome, tenant, LARGE) for tenant in tenants]
    for seed, client in enumerate([served.client, *tenants]):
        assert client.compress(png(60, 60, seed)).receipt.digest
    assert not any(attack.done() for attack in attacks)
    slow.resume()
    assert [attack.result() for attack in attacks] == [""] * 8
    for tenant in tenants:
        tenant.close()


def test_a_worker_is_ended_when_its_time_is_up(serve: Serve) -> None:
    served = serve(picture_seconds="1ms", picture_workers="2")
    data = hostile.jpeg_of_scans(7000, 90)
    with pytest.raises(PictureRejected, match="processor time") as refused:
        served.client.compress(data)
    assert refused.value.reason == "PICTURE_TOO_COMPLEX"
    assert refused.value.metadata == {"field": "image", "resource": "seconds", "max": "0.25098"}
    assert counted(served, "out_of_time") == 1
    assert served.client.compress(LARGE).receipt.digest, "its successor decodes what is large"
    assert served.client.compress(png(60, 60)).receipt.digest


def test_a_file_cannot_have_more_memory_than_a_picture_of_its_size(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "BYTES_PER_PIXEL", 1)
    monkeypatch.setattr(decoders, "BASE_MEMORY", 8 << 20)
    served = serve()
    with pytest.raises(PictureRejected, match="bytes of memory") as refused:
        served.client.compress(LARGE)
    assert refused.value.reason == "PICTURE_TOO_COMPLEX" and refused.value.metadata["resource"] == "memory"
    assert counted(served, "out_of_memory") == 1
    assert served.client.compress(png(60, 60)).receipt.digest


DEATHS = {
    "a fault of its decoder": (signal.SIGSEGV, "PICTURE_TRUNCATED"),
    "a lack of memory": (signal.SIGKILL, "CAPACITY_EXHAUSTED"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_of_a_file_is_replaced(serve: Serve, monkeypatch: pytest.MonkeyPatch, death: str) -> None:
    number, reason = DEATHS[death]
    served = serve()
    stopped = Stopped(monkeypatch, lambda data: data == png(60, 60, 1))
    with in_thread(lambda: outcome(served.client, png(60, 60, 1))) as attack:
        until(lambda: bool(stopped.pids))
        os.kill(stopped.pids[0], number)
        os.kill(stopped.pids[0], signal.SIGCONT)
        assert attack.result(20) == reason
    assert counted(served, "crashed") == 1
    assert served.client.compress(png(60, 60)).receipt.digest
    assert stopped.pids[0] not in [worker.pid for worker in workers()]


def test_a_worker_that_dies_while_it_is_idle_costs_nobody_a_picture(serve: Serve) -> None:
    served = serve()
    assert outcome(served.client, png(60, 60)) == ""
    (worker,) = workers()
    worker.kill()
    worker.wait(10)
    assert outcome(served.client, png(60, 60, 1)) == ""
    assert counted(served, "crashed") == 0


def test_a_file_whose_sender_is_gone_is_dropped(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(picture_workers="2")
    stopped = Stopped(monkeypatch, lambda data: data == png(60, 60, 1))
    with grpc.insecure_channel(served.address) as channel:
        request = compression_pb2.CompressImageRequest(image=images_pb2.Image(data=png(60, 60, 1)))
        call = compression_pb2_grpc.CompressionStub(channel).CompressImage.future(request)
        until(lambda: bool(stopped.pids))
        call.cancel()
    until(lambda: counted(served, "cancelled") == 1)
    until(lambda: stopped.pids[0] not in psutil.pids())
    assert served.client.compress(png(60, 60)).receipt.digest


def test_stopping_waits_for_no_worker(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(grace="10ms")
    stopped = Stopped(monkeypatch, lambda data: data == png(60, 60, 1))
    with in_thread(lambda: outcome(served.connect(), png(60, 60, 1))) as attack:
        until(lambda: bool(stopped.pids))
        served.stop()
        assert attack.result(20) != ""
    assert not workers()


def test_no_worker_outlives_a_service_that_is_killed(parent: Parent, tmp_path: Path) -> None:
    server = RestartableServer(parent, tmp_path / "log", metrics_port=0)
    with server.client() as client:
        assert client.compress(LARGE).receipt.digest
    until(lambda: len(workers(server.process)) == 2)
    alive = workers(server.process)
    alive[0].suspend()  # as one that is busy with a file
    server.kill()
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in alive))


def test_a_worker_dies_with_the_thread_that_started_it() -> None:
    """The system sees to it, also where a decoder would not notice that the other end of its socket is closed."""
    worker = Worker()
    thread = threading.Thread(target=worker.start)
    thread.start()
    thread.join()
    assert worker.pid is not None
    process = psutil.Process(worker.pid)
    until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    worker.kill()
    worker.release()


def test_what_is_decoded_leaves_nothing_open(serve: Serve) -> None:
    served = serve()
    files = Path("/proc/self/fd")

    async def send(count: int) -> None:
        for seed in range(count):
            data = png(9, 9, seed) if seed % 10 else b"no picture"
            with suppress(ServiceError):
                await served.service.pictures.read(images_pb2.Image(data=data), "image", "tenant")

    served.run(send(20))
    before = len(list(files.iterdir()))
    served.run(send(200))
    assert len(list(files.iterdir())) <= before + 2
    (worker,) = workers()
    assert worker.num_fds() < 10


def test_a_worker_knows_little(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFLOW_TOKENS_OF_A_TEST", "secret")
    served = serve()
    assert outcome(served.client, png(60, 60)) == ""
    (worker,) = workers()
    assert "VFLOW_TOKENS_OF_A_TEST" not in worker.environ()
    mapped = {Path(each.path).name for each in worker.memory_maps()}
    assert not [name for name in mapped if "torch" in name or "grpc" in name or "cygrpc" in name]
    assert worker.memory_info().rss < 80 << 20
    assert worker.nice() > psutil.Process().nice() or worker.nice() == 19


def test_a_picture_has_the_values_that_it_was_sent_with(serve: Serve) -> None:
    """The large ones go another way."""
    served = serve()
    for height, width in ((1, 1), (60, 90), (2100, 2000)):
        values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        data = hostile.encoded(Image.fromarray(values), "PNG", compress_level=1)
        sent = images_pb2.Image(data=data)
        picture = served.run(served.service.pictures.read(sent, "image", "tenant"))
        assert np.array_equal(picture.pixels, values) and not picture.pixels.flags.writeable


def test_a_large_webp_is_large_and_not_damaged(serve: Serve) -> None:
    served = serve()
    assert outcome(served.client, hostile.webp_of_nothing(2200)) == ""
    assert outcome(served.client, hostile.webp_of_nothing(7100)) == "PICTURE_TOO_MANY_PIXELS"


def test_the_queue_is_shared(serve: Serve, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant may fill it; another that comes takes the place of that tenant's latest file."""
    monkeypatch.setattr(decoders, "MOST_WAITING", 3)
    served = serve(picture_workers="2")
    stopped = Stopped(monkeypatch, lambda data: data == png(60, 60, 0))
    queue = served.service.pictures._decoders._fast.queue
    with served.connect(tenant="other") as client:
        attacks = [calls.submit(outcome, served.client, png(60, 60, 0))]
        until(lambda: bool(stopped.pids))
        attacks += [calls.submit(outcome, served.client, png(60, 60, seed)) for seed in (1, 2, 3)]
        until(lambda: len(queue) == 3)
        assert outcome(served.client, png(60, 60, 4)) == "CAPACITY_EXHAUSTED"
        other = calls.submit(outcome, client, png(60, 60, 5))
        until(lambda: any(attack.done() for attack in attacks))
        assert len(queue) == 3 and not other.done()
        monkeypatch.undo()
        os.kill(stopped.pids[0], signal.SIGCONT)
        assert other.result() == ""
        assert sorted(attack.result() for attack in attacks) == ["", "", "", "CAPACITY_EXHAUSTED"]


def test_a_service_without_workers_says_so_and_recovers(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()

    def fails(*arguments: object, **options: object) -> None:
        raise BlockingIOError("no more processes")

    with monkeypatch.context() as patched:
        patched.setattr(decoding_worker.subprocess, "Popen", fails)
        with pytest.raises(CapacityExhausted) as refused:
            served.client.compress(png(60, 60))
        assert refused.value.metadata["resource"] == "picture_decoding" and refused.value.retry_after
    assert counted(served, "failed") == 1
    assert served.client.compress(png(60, 60)).receipt.digest
