"""The log: no caller waits for it and none fails because of it, and every line of it has its form."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.server.restartable_server import Parent, RestartableServer, free_port
from tests.server.waiting import until
from vflow_server.telemetry.log_sink import LogSink

DROPPED = "vflow_log_lines_dropped_total"

LITTLE_ROOM = "import vflow_server.telemetry.log_sink; vflow_server.telemetry.log_sink.MOST_BYTES = 2048"


def serve(parent: Parent, log: Path, model_folder: Path, data: Path) -> RestartableServer:
    return RestartableServer(
        parent,
        log,
        LITTLE_ROOM,
        model=model_folder,
        kv_budget="32MiB",
        data=data,
        idle_timeout="1s",
        metrics_port=free_port(),
        log_level="debug",
    )


def check_that_it_serves(server: RestartableServer, picture: bytes) -> None:
    """Turns, the journal and the expiry of sessions work, though every one of them logs."""
    with server.client() as client:
        for _ in range(15):
            session = client.session()
            session.ask("What?", images=[picture], max_new_tokens=2).read()
        assert session.state().turn_count == 1
    until(lambda: server.gauges()['vflow_sessions{state="resident"}'] == 0)
    assert server.gauges()["vflow_engine_up"] == 1
    assert server.gauges()[DROPPED] > 0


def stop(server: RestartableServer) -> None:
    server.signal(signal.SIGTERM)
    assert server.ended() == 0


def test_the_disk_of_the_log_is_full(parent: Parent, model_folder: Path, data: Path, picture: bytes) -> None:
    server = serve(parent, Path("/dev/full"), model_folder, data)
    check_that_it_serves(server, picture)
    stop(server)


def test_the_reader_of_the_log_dies_and_another_comes(
    parent: Parent, model_folder: Path, data: Path, picture: bytes, tmp_path: Path
) -> None:
    os.mkfifo(log := tmp_path / "fifo")
    reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    server = serve(parent, log, model_folder, data)
    os.close(reading)
    check_that_it_serves(server, picture)
    reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    stop(server)
    lines = [json.loads(line) for line in os.read(reading, 1 << 20).splitlines()]
    os.close(reading)
    (told,) = [line for line in lines if "were lost" in line["event"]]
    assert told["lines"] > 0
    assert lines[-1]["event"] == "stopped"


def test_the_reader_of_the_log_stops_reading(
    parent: Parent, model_folder: Path, data: Path, picture: bytes, tmp_path: Path
) -> None:
    os.mkfifo(log := tmp_path / "fifo")
    reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 4096)
    server = serve(parent, log, model_folder, data)
    check_that_it_serves(server, picture)
    stop(server)  # within its grace, though nobody reads
    lines = os.read(reading, 1 << 20).splitlines()
    os.close(reading)
    assert json.loads(lines[0])["event"] == "starting"


class Receiver:
    """A pipe to log into.

    Args:
        room: bytes that it takes before it is read; a page at least.
    """

    def __init__(self, room: int = 4096) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, room)

    def lines(self) -> list[str]:
        """What has arrived."""
        return os.read(self.reading, 1 << 20).decode().splitlines()


def lost(lines: int) -> str:
    return f"{lines} lost"


def test_a_line_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a disk is full: a line that was begun is finished once there is room, and others are not cut."""
    written, room = bytearray(), [5]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = data[: room[0]]
        written.extend(taken)
        room[0] -= len(taken)
        return len(taken)

    monkeypatch.setattr(os, "write", write)
    sink = LogSink(-1, lost)
    for line in ("one", "two", "three"):
        sink.put(line)
    assert sink.flush(5) and written == b"one\nt" and sink.dropped == 1
    room[0] = 1000
    sink.put("four")
    assert sink.flush(5)
    assert written == b"one\ntwo\n1 lost\nfour\n"


def test_lines_beyond_the_bound_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.telemetry.log_sink.MOST_BYTES", 10_000)
    receiver = Receiver()
    sink = LogSink(receiver.writing, lost)
    for _ in range(100):
        sink.put("x" * 999)
    assert 80 < sink.dropped < 95
    assert not sink.flush(0.05), "nobody reads"
    reading = threading.Thread(target=lambda: [receiver.lines() for _ in range(4)], daemon=True)
    reading.start()
    assert sink.flush(5)


def test_a_logger_that_is_entered_again_does_not_lock_up() -> None:
    """As by a finalizer that logs while its thread is putting a line."""
    receiver = Receiver()
    sink = LogSink(receiver.writing, lost)

    def put() -> None:
        with sink._lock:
            sink.put("within")

    putting = threading.Thread(target=put, daemon=True)
    putting.start()
    putting.join(5)
    assert not putting.is_alive()
    assert sink.flush(5) and receiver.lines() == ["within"]


EVERYTHING = """
import logging, os, sys, threading, time, warnings
import structlog
from vflow_server.telemetry.logging import configure, flush
configure(sys.argv[1], "info")
log = structlog.get_logger()
log.info("ours", number=1)
logging.getLogger("library").warning("of %s", "a library")
warnings.warn("a warning")
print("printed", file=sys.stderr)
os.write(2, b"native\\n")
os.system("echo of a child >&2")
def fail():
    raise ValueError("in a thread")
failing = threading.Thread(target=fail)
failing.start()
failing.join()
class Finalized:
    def __del__(self):
        raise ValueError("in a finalizer")
Finalized()
class Unshowable:
    def __repr__(self):
        raise ValueError
log.info("cannot be shown", value=Unshowable())
log.info("surrogate \\udc80")
logging.getLogger("library").error("does not %d fit", "x")
for _ in range(300):
    print("noise", file=sys.stderr)
time.sleep(0.3)
flush(2)
raise RuntimeError("at the end")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_all_that_the_process_writes_has_the_form_of_the_log(log_format: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EVERYTHING, log_format], stdin=subprocess.DEVNULL, capture_output=True, timeout=30
    )
    assert ended.returncode == 1 and ended.stdout == b""
    text = ended.stderr.decode()
    for told in (
        "ours",
        "of a library",
        "UserWarning: a warning",
        "printed",
        "native",
        "of a child",
        "ValueError: in a thread",
        "ValueError: in a finalizer",
        "cannot be shown",
        "surrogate",
        "a library logged what cannot be shown",
        "RuntimeError: at the end",
    ):
        assert told in text
    assert text.count("noise") < 200
    if log_format == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
        assert any(line["event"].endswith("were lost") and line["lines"] > 90 for line in lines)


def test_a_closed_standard_input_does_not_matter(parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    """Its number is the lowest, so the next file or socket would get it."""
    server = RestartableServer(
        parent,
        tmp_path / "log",
        "import os; os.close(0)",
        model=model_folder,
        kv_budget="32MiB",
        metrics_port=free_port(),
    )
    with server.client() as client:
        client.session().ask("Hello", max_new_tokens=2).read()
    for _ in range(3):
        assert server.gauges()["vflow_engine_up"] == 1
    stop(server)


STREAMLESS = """
import os, sys
from vflow_server.cli import main
sys.modules["vflow_server.app"] = None
main(["serve", "--port", "0"])
os._exit(7 if all(os.path.samestat(os.fstat(number), os.stat(os.devnull)) for number in (0, 1)) else 1)
"""


def test_nothing_takes_the_number_of_a_closed_stream() -> None:
    ended = subprocess.run([sys.executable, "-c", STREAMLESS], preexec_fn=lambda: os.closerange(0, 3), timeout=60)
    assert ended.returncode == 7


@pytest.mark.parametrize("wrong", [["--port", "none"], ["--prot", "1"], ["--port"], ["--data", "/proc/vflow"]])
def test_a_refusal_has_the_form_of_the_log(wrong: list[str]) -> None:
    command = [sys.executable, "-m", "vflow_server", "serve", "--log-format", "json", *wrong]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert json.loads(line)["level"] == "error"
