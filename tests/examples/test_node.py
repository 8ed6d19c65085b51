"""The example for Node, which knows the contract from the .proto files alone, or from the service itself."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository.source import ROOT
from tests.server.drawing import png
from tests.server.served import Served
from tests.vflowopt.tiny_models import SHAPES, save
from vflow_client.v1 import compression_pb2, conversations_pb2, strategies_pb2
from vflowopt.demo import picture_path
from vflowopt.runtime.model_runner import Runtime

HERE = Path(__file__).parent
QUESTIONS = ("What is this?", "Why?")

pytestmark = [
    pytest.mark.long,  # npm asks the network, which the short tests do without
    pytest.mark.skipif(
        not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm (Debian: apt-get install npm)"
    ),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example, the tests' programs and the packages that they need. Skips without these packages."""
    folder = tmp_path_factory.mktemp("node")
    for file in (*(ROOT / "examples" / "node").glob("*.js*"), *HERE.glob("*.js")):
        shutil.copy(file, folder)
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    try:
        installed = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took too long")
    if installed.returncode:
        pytest.skip(f"npm install failed: {installed.stderr[-300:]}")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    runtime = Runtime.load(save(SHAPES[0], tmp_path_factory.mktemp("model")), kv_budget=32 << 20)
    served = Served(runtime)
    yield served
    served.stop()


def test_the_folder_holds_all_that_the_contract_imports(programs: Path, tmp_path: Path) -> None:
    """Every service, with a copy of the folder and nothing beside it."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    command = ["node", programs / "contract.js", tmp_path / "proto"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    services = json.loads(ended.stdout)
    for module in (compression_pb2, conversations_pb2, strategies_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            assert services[service.full_name] == [method.name for method in service.methods]


@pytest.mark.parametrize("contract", [str(ROOT / "proto"), "reflection"], ids=["proto", "reflection"])
def test_a_conversation(contract: str, programs: Path, served: Served, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(60, 80))
    command = ["node", programs / "conversation.js", served.address, picture, contract]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    output = json.loads(ended.stdout)
    with served.client.session("preset-25") as session:
        receipt = session.add_image(picture.read_bytes())
        expected = [session.ask(text, max_new_tokens=8, min_new_tokens=8).read() for text in QUESTIONS]
        state = session.state()
    assert [turn["finished"]["text"] for turn in output["turns"]] == expected
    assert [turn["deltas"] for turn in output["turns"]] == expected
    assert output["receipt"]["digest"] == receipt.digest
    assert output["receipt"]["kept_tokens"] == list(receipt.kept_tokens)
    assert output["turns"][1]["finished"]["receipt"]["reused_tokens"] > receipt.kept_tokens[0]
    assert (output["state"]["turn_count"], output["state"]["kv_bytes"]) == (2, state.kv_bytes)
    assert output["refused"]["code"] == "NOT_FOUND" and "SESSION_NOT_FOUND" in output["refused"]["details"]
    assert served.kv_bytes() == 0


def test_the_example_answers_about_the_picture(programs: Path, embedded: Served) -> None:
    questions = ["Which shape is green?", "Where do you see the hourglass?"]
    ended = subprocess.run(
        ["node", programs / "chat.js", embedded.address, picture_path() / "cat.png", *questions],
        env={**os.environ, "VFLOW_PROTO": str(ROOT / "proto")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "1312 visual tokens, kept per stage: 170, 162, 61",
        "Which shape is green? arrow",
        "Where do you see the hourglass? center",
    ]
    assert embedded.kv_bytes() == 0
