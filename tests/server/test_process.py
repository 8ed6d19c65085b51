"""A real `vflow serve` process: how it starts, serves and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.server.conftest import Serve
from tests.server.restartable_server import Parent, RestartableServer
from tests.server.waiting import until
from vflow_client import CapacityExhausted, Client, RetryPolicy, VFlowError, connect
from vflow_server.cli import main
from vflow_server.exit_code import FAILED

LONG_ANSWER = 11
"""A seed for long answers."""


class Process:
    """A service process, ready to serve."""

    def __init__(self, *flags: str) -> None:
        command = [
            sys.executable,
            "-m",
            "vflow_server",
            "serve",
            "--port",
            "0",
            "--threads",
            "1",
            "--log-format",
            "json",
            *flags,
        ]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        ready = self.popen.stdout.readline()
        assert ready.startswith("VFlow is ready on 127.0.0.1:"), self.popen.communicate()[1]
        self.address = ready.split()[-1]

    def stop(self, number: int = signal.SIGTERM) -> list[dict[str, object]]:
        """Send a signal and wait for the end; returns the log."""
        self.popen.send_signal(number)
        return self.ended()

    def ended(self) -> list[dict[str, object]]:
        """Wait for the end; returns the log."""
        _, log = self.popen.communicate(timeout=30)
        return [json.loads(line) for line in log.splitlines()]


@pytest.fixture
def process(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setenv("VFLOW_MAX_SESSIONS", "3")
    process = Process("--model", str(model_folder), "--kv-budget", "32MiB", "--grace", "2s")
    yield process
    if process.popen.poll() is None:
        process.popen.kill()
        process.popen.communicate()


@pytest.fixture
def client(process: Process) -> Iterator[Client]:
    with connect(process.address, timeout=20, retry=RetryPolicy(attempts=1)) as client:
        yield client


def chats(log: list[dict[str, object]]) -> list[object]:
    return [line["outcome"] for line in log if line.get("method") == "Conversations/Chat"]


def test_it_serves_and_a_stop_lets_a_running_turn_end(process: Process, client: Client) -> None:
    services = {f"vflow.v1.{name}" for name in ("Conversations", "Compression", "Strategies")}
    services.add("google.longrunning.Operations")
    with grpc.insecure_channel(process.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *services):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert services < set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert main(["health", "--address", process.address]) == 0

    session = client.session()
    answer = session.ask("Go on", max_new_tokens=60, min_new_tokens=60, temperature=1.0, seed=LONG_ANSWER)
    next(answer)
    process.popen.send_signal(signal.SIGTERM)
    answer.read()
    assert answer.usage.completion_tokens == 60
    log = process.ended()
    assert process.popen.returncode == 0
    milestones = [line["event"] for line in log if line["event"] in ("ready", "stopping", "stopped")]
    assert milestones == ["ready", "stopping", "stopped"] and chats(log) == ["OK"]
    assert main(["health", "--address", process.address]) == 1


ASKING = """
import sys
from vflow_client import connect
session = connect(sys.argv[1]).attach(sys.argv[2])
answer = session.ask("Go on", max_new_tokens=4096, min_new_tokens=4096, temperature=1.0, seed=int(sys.argv[3]))
next(answer)
print("begun", flush=True)
answer.read()
"""


def test_a_killed_client_leaks_nothing_and_a_stop_has_its_limit(process: Process, client: Client) -> None:
    with client.session() as undisturbed:
        expected = undisturbed.ask("Hello", max_new_tokens=8).read()
    session = client.session()
    command = [sys.executable, "-c", ASKING, process.address, session.name, str(LONG_ANSWER)]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None and asking.stdout.readline() == "begun\n"
    before = session.state()
    assert before.turn_count == 0
    asking.kill()
    asking.communicate()
    until(lambda: session.state().last_used_time != before.last_used_time)  # its turn has come to an end
    assert session.state().kv_bytes == 0
    assert session.ask("Hello", max_new_tokens=8).read() == expected
    assert session.state().turn_count == 1

    others = [client.session(), client.session()]
    with pytest.raises(CapacityExhausted):  # VFLOW_MAX_SESSIONS
        client.session()
    endless = others[0].ask("Go on", max_new_tokens=4096, min_new_tokens=4096, temperature=1.0, seed=LONG_ANSWER)
    next(endless)
    log = process.stop(signal.SIGINT)
    assert process.popen.returncode == 0 and log[-1]["event"] == "stopped"
    assert chats(log) == ["OK", "CANCELLED", "OK", "CANCELLED"]
    with pytest.raises(VFlowError):
        endless.read()


def unknown_family(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("some text")
    return folder / "file"


UNSERVABLE: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a folder that is not there": (lambda folder: ["--model", str(folder / "none")], "existing folder"),
    "an empty folder": (lambda folder: ["--model", str(folder)], "no config.json"),
    "an unknown family": (lambda folder: ["--model", str(unknown_family(folder))], "family 'gpt2'"),
    "an unknown type": (lambda folder: ["--dtype", "float8"], "expected one of float32, bfloat16, float16"),
    "an unknown quantization": (lambda folder: ["--quantization", "2bit"], "expected one of 8bit, 4bit"),
    "no room": (lambda folder: ["--kv-budget", "10"], "does not hold one page"),
    "a port that cannot be": (lambda folder: ["--port", "99999"], "--port is '99999'"),
    "a data folder that is a file": (lambda folder: ["--data", str(a_file(folder))], "cannot be used (File exists)"),
    "a certificate that is none": (
        lambda folder: ["--tls-cert", str(a_file(folder)), "--tls-key", str(a_file(folder))],
        "private key in PEM ([SSL]",
    ),
    "a settings file that is not there": (lambda folder: ["--config", str(folder / "none")], "cannot be read"),
}


@pytest.mark.parametrize(("flags", "complaint"), UNSERVABLE.values(), ids=UNSERVABLE)
def test_what_cannot_be_served_ends_with_one_clear_line(
    flags: Callable[[Path], list[str]],
    complaint: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In this process, because a new one takes seconds to import the model's libraries.
    monkeypatch.setattr("vflow_server.telemetry.logging.configure", lambda *settings: None)
    assert main(["serve", "--model", str(model_folder), *flags(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert complaint in output and output.startswith("vflow: ") and output.count("\n") == 1


def test_an_address_that_is_taken_is_said_to_be(serve: Serve) -> None:
    port = serve().address.rpartition(":")[2]
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        serve(port=port)


def test_the_end_of_the_terminal_stops_it_gracefully(parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    server = RestartableServer(parent, tmp_path / "log", model=model_folder, kv_budget="32MiB")
    server.signal(signal.SIGHUP)
    assert server.ended() == 0 and server.logged()[-1]["event"] == "stopped"


def test_nohup_is_heeded(parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    server = RestartableServer(parent, tmp_path / "log", before, model=model_folder, kv_budget="32MiB")
    server.process.send_signal(signal.SIGHUP)
    with server.client() as client:
        client.session()
    server.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_start(number: int, parent: Parent, tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    before = (
        "import pathlib, signal, time, vflow_server.app\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"  # a shell may have it ignored by what runs in the background
        f"def load(settings): pathlib.Path({str(loading)!r}).touch(); time.sleep(1000)\n"
        "vflow_server.app._load = load"
    )
    parent.start(tmp_path / "log", ["serve", "--port", "0", "--log-format", "json"], before)
    process = int(parent.line())
    until(loading.exists, 30)
    os.kill(process, number)
    assert parent.line() == "0\n"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_stop_that_does_not_end_is_ended(parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    before = (
        "import time, vflow_server.app, vflow_server.engine.engine\n"
        "vflow_server.app.MARGIN = 0.3\n"
        "vflow_server.engine.engine.Engine.stop = lambda engine: time.sleep(1000)"
    )
    flags = {"model": model_folder, "kv_budget": "32MiB", "grace": "200ms"}
    server = RestartableServer(parent, tmp_path / "log", before, **flags)
    server.signal(signal.SIGTERM)
    assert server.ended() == FAILED
    assert server.logged()[-1]["event"] == "the process did not stop in time and is ended"


def test_the_address_that_is_told_is_one_that_clients_take(parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6")
    server = RestartableServer(parent, tmp_path / "log", model=model_folder, kv_budget="32MiB", host="[::1]")
    assert server.address.startswith("[::1]:")
    with server.client() as client:
        client.session()
    server.kill()
