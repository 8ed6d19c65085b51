"""The check of a device: rehearsed where only what it needs is installed, killed midway, and with parts that fail."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks.decode_step import DecodeSteps, fill, idle_share, kv_bytes_read
from benchmarks.device import DevicePeak
from benchmarks.device_check.__main__ import run
from benchmarks.device_check.exactness import verdict
from benchmarks.device_check.part import PARTS, Part
from benchmarks.device_check.report import Report
from benchmarks.device_check.targets import verdicts
from benchmarks.geometry import random_picture
from benchmarks.random_model import random_model
from tests.repository.source import ROOT
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime

NEEDED = ("torch", "transformers", "triton", "pytest", "pillow")
"""What must be installed, with what these need themselves."""

BESIDES = {"rich", "vflow_client"}
"""Modules that are hidden besides: some distribution that is needed names the first, but nothing here runs that."""

PROJECT = {"vflowopt", "vflow_server"}
"""The modules of the project itself that are read from its folders, installed or not."""

HIDING = """\
import os, sys
from importlib.machinery import PathFinder

hidden = set(os.environ["HIDDEN"].split(","))

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

# Neither is the project itself installed: no finder and no folder of an editable installation is left.
root = os.environ["ROOT"]
sys.meta_path[:] = [
    Hiding if finder is PathFinder else finder for finder in sys.meta_path if "editable" not in str(finder).lower()
]
sys.path[:] = [folder for folder in sys.path if not folder.startswith(os.path.join(root, "")) or ".venv" in folder]
"""
"""A ``sitecustomize``: every process that is started sees only what is not hidden."""


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions, and all that they need, by their names in lower case."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        left += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a rehearsal in a process that sees only what it needs."""
    needed = closure(NEEDED)
    hidden = {
        module
        for module, distributions in packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in distributions} & needed
    }
    assert {"grpc", "structlog", "prometheus_client", "matplotlib", "scipy", "hypothesis", "uvloop"} <= hidden
    (folder / "sitecustomize.py").write_text(HIDING)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HIDDEN": ",".join(hidden - PROJECT | BESIDES),
        "ROOT": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.device_check", "--rehearse", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_the_rehearsal_runs_every_part_on_a_bare_machine(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with start(["--minutes", "4", "--json", str(report)], tmp_path) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    document = json.loads(report.read_text())
    assert document["finished"] and document["missing"] == []
    parts = {part["name"]: part for part in document["parts"]}
    assert {name: part["state"] for name, part in parts.items()} == {part.name: "done" for part in PARTS}, output

    assert [row["answers"] for row in parts["exactness"]["rows"]] == ["same"]
    tests = parts["tests"]["rows"][-1]
    assert tests["exit_code"] == 0 and tests["tests_in_all"] == tests["skipped"] + tests["passed"] > 5
    for shape in ("onevision-7b", "qwen3-vl-8b"):
        rows = parts[shape]["rows"]
        assert [row["retention"] for row in rows if row["step"] == "picture"] == ["100%", "50%", "25%", "10%"]
        steps = [row for row in rows if row["step"] == "decode"]
        assert {row["batch"] for row in steps} == {1, 2} and len(steps) == 8
        assert all(row["error"] is None and row["step_ms"] > 0 for row in steps)
        beside = parts[f"{shape}-generate"]["rows"]
        assert beside[0]["visual_tokens"] == rows[0]["visual_tokens"]
        assert all(row["error"] is None and row["step_ms"] > 0 for row in beside[1:]), beside
    assert all(row["error"] is None for row in parts["conversations"]["rows"])
    sessions = [row["sessions"] for row in parts["sessions"]["rows"]]
    assert sessions == sorted(sessions, reverse=True) and sessions[0] > 2 * sessions[-1] > 0
    assert {row["verdict"] for row in document["targets"]} <= {"met", "missed", "not measured"}
    assert len(document["targets"]) == 10 and "1040 / 584 / 329 / 272" in output


def test_a_check_that_is_killed_leaves_what_it_measured(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--parts", "device", "onevision-7b", "conversations", "--json", str(report)]
    with start(arguments, tmp_path) as process:
        while not report.exists() or read(report, "onevision-7b")["state"] == "waiting":
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    document = json.loads(report.read_text())
    assert not document["finished"]
    assert read(report, "device")["state"] == "done" and len(read(report, "device")["rows"]) == 2
    assert read(report, "conversations") == {
        "name": "conversations",
        "state": "waiting",
        "seconds": 0.0,
        "error": None,
        "rows": [],
    }


def read(report: Path, part: str) -> dict[str, Any]:
    """A part in a report's file."""
    document = json.loads(report.read_text())
    found: dict[str, Any] = next(each for each in document["parts"] if each["name"] == part)
    return found


def test_each_part_fails_alone(tmp_path: Path) -> None:
    parts = [
        Part(name, share, "tests.benchmarks.check_parts", name)
        for name, share in {"raising": 1, "dying": 1, "hanging": 0.05, "working": 1}.items()
    ]
    report = Report(tmp_path / "report.json", parts, {})
    run(parts, report, "somewhere", 30, rehearse=True)
    states = {name: part.state for name, part in report.parts.items()}
    assert states == {"raising": "failed", "dying": "failed", "hanging": "out of time", "working": "done"}
    assert str(report.parts["raising"].error).endswith("ValueError: the kernel does not compile")
    assert "exit code 7" in str(report.parts["dying"].error)
    assert [row["row"] for part in report.parts.values() for row in part.rows] == [1, 1, 1, 1]
    assert report.rows("working")[0] == {"row": 1, "device": "somewhere", "in_time": True}
    hung = report.rows("hanging")[0]["process"]
    assert isinstance(hung, int)
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    assert {row["name"]: row["rows"] for row in json.loads((tmp_path / "report.json").read_text())["parts"]} == {
        name: part.rows for name, part in report.parts.items()
    }


def test_verdicts() -> None:
    report = Report(None, PARTS, {})
    assert {row["verdict"] for row in verdicts(report)} == {"not measured"}
    report.parts["onevision-7b"].rows += [
        {"step": "picture", "retention": "100%", "prefill_ms": 100.0, "encode_ms": 50.0},
        {
            "step": "picture",
            "retention": "10%",
            "prefill_ms": 15.0,
            "encode_ms": 50.0,
            "score_ms": 2.0,
            "prune_and_recycle_ms": 1.0,
        },
        {"step": "first token", "retention": "100%", "from_picture_ms": 370.0},
        {"step": "first token", "retention": "10%", "from_picture_ms": 100.0},
        {"step": "decode", "retention": "10%", "batch": 8, "share_of_bound": 0.9, "idle_share": 0.01},
        {"step": "decode", "retention": "10%", "batch": 32, "share_of_bound": 0.7, "idle_share": 0.11},
    ]
    rows = verdicts(report)
    assert [(row["measured"], row["verdict"]) for row in rows[:5]] == [
        (0.7, "met"),
        (0.15, "met"),
        (3.7, "missed"),
        (0.06, "missed"),
        (0.11, "missed"),
    ]
    assert {row["verdict"] for row in rows[5:]} == {"not measured"}


def test_answers_are_compared_up_to_the_first_difference() -> None:
    dtype = torch.float16  # sixteen roundings of 4 are 0.0625

    def compared(*pairs: tuple[list[float], list[float]]) -> tuple[object, object]:
        ours, theirs = ([torch.tensor(pair[side]) for pair in pairs] for side in (0, 1))
        answers, expected = ([[int(row.argmax()) for row in rows]] for rows in (ours, theirs))
        row = verdict(answers, expected, ours, theirs, dtype)
        return row["answers"], row["tokens_compared"]

    same = ([0.0, 4.0], [0.0, 4.1])
    assert compared(same, same) == ("same", 2)
    assert compared(same, ([3.99, 4.0], [4.0, 3.99]), same) == ("rounding", 2)
    assert compared(same, ([3.9, 4.0], [4.0, 3.9])) == ("differs", 2)
    assert compared(([0.0, 4.0], [4.0, 3.99])) == ("differs", 1), "ours is far off, whatever they hold likely"


def test_idle_is_what_no_span_covers() -> None:
    assert idle_share([]) is None
    assert idle_share([(0, 10)]) == 0
    assert idle_share([(0, 10), (2, 5), (8, 12), (18, 20)]) == pytest.approx(0.3)


def test_filled_sequences_are_like_those_that_were_run() -> None:
    model = random_model("onevision-tiny", torch.device("cpu"), torch.float32)
    runtime = Runtime(model, kv_budget=8 << 20)
    strategy = Strategy.preset(0.1, runtime.layers)
    (image,) = runtime.compress([random_picture(168)], strategy)
    filled, ran = fill(runtime, strategy, image, 5), runtime.start(strategy)
    runtime.extend(ran, [image, *[0] * 5])
    assert (filled.cached, filled.cache.lengths, filled.log) == (ran.cached, ran.cache.lengths, ran.log)
    assert kv_bytes_read(filled) == sum(
        (len(kept) + 5) * span * runtime.bytes_per_token()
        for kept, span in zip(image.kept, strategy.spans(runtime.layers), strict=True)
    )
    steps = DecodeSteps(runtime, [filled, ran])
    assert steps.median_ms(1) > 0 and steps.idle_share(1) is None
    assert filled.cache.lengths == ran.cache.lengths == tuple(len(kept) + 5 + 3 for kept in image.kept)
    slow = DevicePeak(flops=1e30, bandwidth=1.0)
    weights = sum(weight.nbytes for weight in (model.head.weight,)) + sum(
        4 * layer for layer in [2 * 64 * 16 * (4 + 2) + 3 * 64 * 96] * 6
    )
    assert steps.bound_ms(slow, model.network.config) == 1e3 * (weights + kv_bytes_read(filled) + kv_bytes_read(ran))
    for sequence in (filled, ran):
        sequence.release()
    runtime.pool.check_integrity([])
