"""How `vflow serve` starts: settings that cannot be used end it, and the log begins, before torch is imported."""

import fcntl
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.server.certificates import Authority
from vflow_server.exit_code import NOT_NOW, USAGE
from vflow_server.preflight import check
from vflow_server.settings import Settings
from vflow_server.store.folder_lock import KV_LOCK, SESSIONS_LOCK


@dataclass
class Place:
    """Where a test puts what a setting names; what is held stays so to the end of the test."""

    folder: Path
    held: ExitStack

    def file(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def missing(self) -> str:
        return str(self.folder / "missing")

    def model(self, config: str) -> str:
        self.file("config.json", config)
        return str(self.folder)

    def locked(self, lock: str) -> str:
        """A folder that this process uses."""
        fcntl.flock(self.held.enter_context((self.folder / lock).open("w")), fcntl.LOCK_EX)
        return str(self.folder)

    def taken_port(self) -> str:
        listening = self.held.enter_context(socket.create_server(("127.0.0.1", 0)))
        return str(listening.getsockname()[1])

    def one_port(self) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = str(listening.getsockname()[1])
        return ["--port", port, "--admin-port", port]

    def tls(self, certificate: str, key: str) -> list[str]:
        return ["--tls-cert", certificate, "--tls-key", key]

    def foreign_key(self) -> list[str]:
        authority = Authority(self.folder)
        return self.tls(str(authority.issue("one").certificate), str(authority.issue("other").key))

    def no_client_ca(self) -> list[str]:
        pair = Authority(self.folder).issue("one")
        return [*self.tls(str(pair.certificate), str(pair.key)), "--tls-client-ca", self.file("ca", "no PEM")]


REFUSED: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "an unknown option": (lambda place: ["--prot", "1"], "unrecognized arguments: --prot"),
    "a malformed value": (lambda place: ["--kv-budget", "lots"], "--kv-budget is 'lots': expected"),
    "a port out of range": (lambda place: ["--port", "99999"], "--port is '99999': expected"),
    "a device of no kind": (lambda place: ["--device", "gpu"], "--device is 'gpu': expected cpu, cuda or cuda:N"),
    "an unknown type": (lambda place: ["--dtype", "float8"], "--dtype is 'float8': expected one of float32"),
    "an unknown type of the KV cache": (lambda place: ["--kv-dtype", "fp4"], "expected one of auto, float32"),
    "an unknown quantization": (lambda place: ["--quantization", "2bit"], "expected one of 8bit, 4bit"),
    "a settings file that is missing": (lambda place: ["--config", place.missing()], "cannot be read"),
    "an unknown setting": (lambda place: ["--config", place.file("a.toml", "prot = 1")], "did you mean 'port'"),
    "a tokens file that is missing": (lambda place: ["--tokens", place.missing()], "missing cannot be read"),
    "a tokens file that is a folder": (lambda place: ["--tokens", str(place.folder)], "cannot be read: Is a dir"),
    "a tokens file without tokens": (lambda place: ["--tokens", place.file("none", "")], "no token is listed"),
    "a model folder that is missing": (lambda place: ["--model", place.missing()], "there is no folder"),
    "a model folder without a model": (lambda place: ["--model", str(place.folder)], "no config.json"),
    "a torn configuration": (lambda place: ["--model", place.model("{")], "no model configuration can be read"),
    "a name that is no model's": (lambda place: ["--model", "a model"], "neither a folder nor a hub id"),
    "a hub that is not reached": (lambda place: ["--model", "owner/model"], "the hub cannot be reached (OfflineMode"),
    "a device that is not there": (lambda place: ["--device", "cuda"], "--device is cuda, but this"),
    "a package that is missing": (
        lambda place: ["--quantization", "4bit"],
        "needs bitsandbytes, which is not installed",
    ),
    "an unknown family": (lambda place: ["--model", place.model('{"model_type": "gpt2"}')], "the family 'gpt2'"),
    "a certificate that is missing": (lambda place: place.tls(place.missing(), place.missing()), "cannot be read"),
    "a certificate that is none": (lambda place: place.tls(*[place.file("pem", "none")] * 2), "are not a certificate"),
    "a key of another certificate": (Place.foreign_key, "are not a certificate and its unencrypted private key"),
    "client roots that are none": (Place.no_client_ca, "holds no certificates in PEM"),
    "a taken port": (lambda place: ["--port", place.taken_port()], "is the port taken? choose another with --port"),
    "a taken admin port": (lambda place: ["--admin-port", place.taken_port()], "choose another with --admin-port"),
    "a taken metrics port": (lambda place: ["--metrics-port", place.taken_port()], "another with --metrics-port"),
    "one port for two": (
        lambda place: ["--port", "50051", "--admin-port", "50051"],
        "--port and --admin-port are both",
    ),
    "an address of another machine": (
        lambda place: ["--host", "192.0.2.1", "--insecure"],
        "cannot listen on 192.0.2.1",
    ),
    "a data folder that is a file": (lambda place: ["--data", place.file("file", "")], "cannot be used (File exists)"),
    "a data folder that cannot be made": (lambda place: ["--data", "/proc/vflow"], "/proc/vflow cannot be used"),
    "a data folder in use": (lambda place: ["--data", place.locked(SESSIONS_LOCK)], "give each its own --data"),
    "a spill folder in use": (lambda place: ["--spill-dir", place.locked(KV_LOCK)], "give each its own --spill-dir"),
}

MAY_PASS = re.compile(
    "is the port taken|choose another with|another with --metrics|hub cannot|cannot listen on|give each its own"
)
"""What is refused now may be accepted later: whoever runs the service should try again."""

REFUSING = """
import contextlib, io, json, sys
import structlog
from vflow_server.cli import main
from vflow_server.telemetry import logging
sys.modules["bitsandbytes"] = None
logging.configure = lambda *settings: structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
sys.modules["vflow_server.app"] = None  # what is not refused ends the process
for line in sys.stdin:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            code = main(["serve", "--port", "0", *json.loads(line)])
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, told.getvalue(), "torch" in sys.modules]), flush=True)
"""
"""Runs `vflow serve` with the flags of each line, and tells its exit code, what it said, and whether torch is there."""


@pytest.fixture(scope="module")
def refusing() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", REFUSING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(("flags", "complaint"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_be_used_are_refused_before_torch_is_imported(
    flags: Callable[[Place], list[str]], complaint: str, refusing: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    assert refusing.stdin is not None and refusing.stdout is not None
    with ExitStack() as held:
        given = flags(Place(tmp_path, held))
        refusing.stdin.write(json.dumps(given) + "\n")
        refusing.stdin.flush()
        code, told, torch = json.loads(refusing.stdout.readline())
    assert (code, torch) == (NOT_NOW if MAY_PASS.search(complaint) else USAGE, False)
    assert complaint in told and "Traceback" not in told


def test_a_folder_that_was_checked_is_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        check(Settings(port=0, data=tmp_path))


BEGINNING = """
import sys
from vflow_server.cli import main
sys.modules["vflow_server.app"] = None  # its import fails
assert main(["serve", "--port", "0", "--log-format", "json", "--model", sys.argv[1]]) == 70
sys.exit("torch" in sys.modules)
"""


def test_the_log_begins_before_torch_is_imported(model_folder: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", BEGINNING, str(model_folder)], capture_output=True, text=True)
    assert ended.returncode == 0, "torch is imported"
    first, last = [json.loads(line) for line in ended.stderr.splitlines()]
    assert first["event"] == "starting"
    assert first["version"] == version("vflowopt")
    assert (first["model"], first["device"]) == (str(model_folder), "cpu")
    assert last["event"] == "the service failed" and "vflow_server.app" in last["exception"]


LOADED = """
import sys
import vflow_server.app
from vflowopt.demo import model_path
from vflowopt.models.loading import load_model
load_model(model_path())
print(*sys.modules)
"""


def test_nothing_is_imported_for_what_the_embedded_model_does_not_need() -> None:
    modules = subprocess.run(
        [sys.executable, "-c", LOADED], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert "vflowopt.models.llava_onevision" in modules
    families = {"internvl", "llava", "llava_next", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    spared = {*(f"vflowopt.models.{family}" for family in families), "optuna", "opentelemetry", "uvicorn", "starlette"}
    assert not spared & set(modules)
