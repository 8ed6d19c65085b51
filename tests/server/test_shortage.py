"""Descriptors run out: the service goes on, and recovers once there are some again."""

import signal
import socket
from contextlib import ExitStack
from pathlib import Path

from tests.server.restartable_server import Parent, RestartableServer, free_port
from vflow_client import RetryPolicy, VFlowError

FEW = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
"""


def test_descriptors_run_out(parent: Parent, model_folder: Path, tmp_path: Path, picture: bytes) -> None:
    port = free_port()
    server = RestartableServer(
        parent,
        tmp_path / "log",
        FEW,
        model=model_folder,
        kv_budget="32MiB",
        data=tmp_path / "data",
        metrics_port=port,
        idle_timeout="2s",
    )
    host, _, number = server.address.rpartition(":")
    with server.client() as client:
        before = client.session()
        before.ask("What?", images=[picture], max_new_tokens=4).read()
        with ExitStack() as held:
            for each in (int(number), port):
                for _ in range(60):
                    try:
                        held.enter_context(socket.create_connection((host, each), timeout=0.2))
                    except OSError:
                        break
            for _ in range(3):  # what needs no descriptor works, and the rest is refused
                try:
                    client.session().ask("What?", images=[picture], max_new_tokens=4).read()
                except VFlowError as error:
                    assert error.reason in ("STORAGE_FAILED", "CAPACITY_EXHAUSTED"), error
        with server.client(RetryPolicy(attempts=8)) as other, other.session() as session:
            session.ask("What?", images=[picture], max_new_tokens=4).read()
        assert server.gauges()["vflow_engine_up"] == 1
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
    events = [line["event"] for line in server.logged()]
    assert len(events) < 300, "a shortage does not fill the log"
    assert "a part that the service needs has failed" not in events
