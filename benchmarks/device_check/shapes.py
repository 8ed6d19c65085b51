"""Parts: the shapes of published models with random weights, at every budget, beside Hugging Face's ``generate``.

The paper's picture has 7,290 tokens: 10 tiles of LLaVA-OneVision, which adds a newline to each row.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.decode_step import DecodeSteps, fill
from benchmarks.device import median_ms
from benchmarks.device_check.part import Setting, last_line
from benchmarks.device_check.peak import dtype, peak
from benchmarks.generate import Generate
from benchmarks.geometry import BUDGETS, QUESTION_TOKENS, Bench, random_picture
from benchmarks.random_model import random_model
from benchmarks.table import Row
from benchmarks.workload import Config
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.compilation import compile_encoder
from vflowopt.models.interface import MultimodalModel
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler

_KEPT_FREE = 8 << 30
"""Bytes of a device's memory that are left to the steps themselves."""


@dataclass(frozen=True)
class Shape:
    """A published shape and its picture, and what stands in for both in a rehearsal."""

    name: str
    picture: tuple[int, int]
    tiny_name: str
    tiny_picture: tuple[int, int]

    def model(self, setting: Setting) -> MultimodalModel:
        """The model, with random weights."""
        name = self.tiny_name if setting.rehearse else self.name
        return random_model(name, torch.device(setting.device), dtype(setting))

    def shown(self, setting: Setting, seed: int = 0) -> Picture:
        """A picture of its size; another for every seed."""
        return random_picture(*(self.tiny_picture if setting.rehearse else self.picture), seed=seed)


ONEVISION = Shape("onevision-7b", (1152, 1152), "onevision-tiny", (168, 168))
QWEN = Shape("qwen3-vl-8b", (2720, 2752), "qwen3-vl-tiny", (192, 224))
"""85 x 86 visual tokens of 32 x 32 pixels."""


def onevision(setting: Setting) -> Iterator[Row]:
    """This runtime in the shape of LLaVA-OneVision-7B."""
    return _ours(setting, ONEVISION)


def onevision_generate(setting: Setting) -> Iterator[Row]:
    """``generate`` in the same shape."""
    return _theirs(setting, ONEVISION)


def qwen(setting: Setting) -> Iterator[Row]:
    """This runtime in the shape of Qwen3-VL-8B."""
    return _ours(setting, QWEN)


def qwen_generate(setting: Setting) -> Iterator[Row]:
    """``generate`` in the same shape."""
    return _theirs(setting, QWEN)


def batches(setting: Setting) -> tuple[int, ...]:
    """Batches of decode steps; what the target is set for comes first."""
    return (2, 1) if setting.rehearse else (32, 1, 8, 64)


def runtime_for(model: MultimodalModel, kv_budget: int) -> Runtime:
    """A runtime with pages for so many bytes, or as many as the device has to spare."""
    if model.device.type == "cuda":
        kv_budget = min(kv_budget, torch.cuda.mem_get_info(model.device)[0] - _KEPT_FREE)
    return Runtime(model, kv_budget=kv_budget)


def _ours(setting: Setting, shape: Shape) -> Iterator[Row]:
    model = shape.model(setting)
    config: Config = model.network.config
    runs, steps = (1, 2) if setting.rehearse else (3, 24)
    picture = shape.shown(setting)
    tokens = 1.1 * max(8192, picture.width * picture.height / 150)
    token_bytes = 2 * model.heads * model.head_dim * model.dtype.itemsize * len(model.layers)
    runtime = runtime_for(model, (4 << 20) if setting.rehearse else int(max(batches(setting)) * tokens * token_bytes))
    bench = Bench(runtime, config, picture, peak(setting), runs, steps)
    encode_ms, encoded = replace(bench, runs=1).encode()
    replace(bench, runs=1, decode_steps=2).row(0.1, encoded, encode_ms)  # what is made once is made
    encode_ms, encoded = bench.encode()
    for budget in BUDGETS:
        yield {"step": "picture", **bench.row(budget, encoded, encode_ms)}
    for budget in BUDGETS:
        first_ms = median_ms(_to_first_token(bench, bench.strategy(budget)), model.device, runs)
        yield {"step": "first token", "retention": f"{budget:.0%}", "from_picture_ms": first_ms}
    for batch in batches(setting):
        for budget in sorted(BUDGETS):
            if setting.left < 0:
                return
            yield {"step": "decode", "retention": f"{budget:.0%}", "batch": batch, **_decode(bench, budget, batch)}
    if not setting.rehearse:  # where there is a compiler it takes longer than all the rest of a rehearsal
        yield {"step": "compiled encoder", **_compiled(bench, encode_ms)}


def _compiled(bench: Bench, encode_ms: float) -> Row:
    """Encoding with compiled layers, beside ``encode_ms`` without; and how long it took to compile them."""
    with tempfile.TemporaryDirectory(prefix="vflow-compiled-") as cache:
        begun = time.perf_counter()
        compile_encoder(bench.runtime.model, Path(cache))
        compile_s = time.perf_counter() - begun
        bench.encode()  # its number of tiles or patches is new to the compiled layers
        compiled_ms, _ = bench.encode()
    return {"encode_ms": encode_ms, "compiled_encode_ms": compiled_ms, "compile_s": compile_s}


def _to_first_token(bench: Bench, strategy: Strategy) -> Callable[[], None]:
    """From the picture to the first token of an answer to a question about it."""

    def work() -> None:
        (image,) = bench.runtime.compress([bench.picture], strategy)
        sequence = bench.runtime.start(strategy)
        sequence.log.extend([image, *[0] * QUESTION_TOKENS])
        try:
            bench.runtime.step([sequence], [None], [Sampler()])
        finally:
            sequence.release()

    return work


def _decode(bench: Bench, budget: float, batch: int) -> Row:
    runtime, strategy = bench.runtime, bench.strategy(budget)
    (image,) = runtime.compress([bench.picture], strategy)
    sequences = []
    figures: dict[str, object] = dict.fromkeys(("step_ms", "bound_ms", "share_of_bound", "tokens_per_s", "idle_share"))
    figures["error"] = None
    try:
        for _ in range(batch):
            sequences.append(fill(runtime, strategy, image, QUESTION_TOKENS))
        step = DecodeSteps(runtime, sequences)
        step_ms = step.median_ms(bench.decode_steps)
        bound_ms = step.bound_ms(bench.peak, bench.config)
        figures |= {
            "step_ms": step_ms,
            "bound_ms": bound_ms,
            "share_of_bound": bound_ms / step_ms,
            "tokens_per_s": 1e3 * batch / step_ms,
            "idle_share": step.idle_share(bench.decode_steps),
        }
    except Exception as failure:  # such as too few pages, or too little memory: the other batches are still measured
        figures["error"] = last_line(failure)
    finally:
        for sequence in sequences:
            sequence.release()
    return figures


def _theirs(setting: Setting, shape: Shape) -> Iterator[Row]:
    model = shape.model(setting)
    generate = Generate(model, shape.shown(setting), QUESTION_TOKENS)
    runs, steps = (1, 2) if setting.rehearse else (3, 24)
    first_ms = median_ms(generate.first_token, model.device, runs + 1)
    yield {"step": "generate: first token", "visual_tokens": generate.visual_tokens, "from_picture_ms": first_ms}
    for batch in batches(setting):
        figures: dict[str, object] = {"step_ms": None, "compiled": None, "error": None}
        for compiled in (True, False):
            if setting.left < 0:
                return
            try:
                step_ms, graphs = generate.decode(batch, steps, compiled=compiled)
            except Exception as failure:
                figures["error"] = last_line(failure)
            else:
                figures |= {"step_ms": step_ms, "compiled": graphs > 0}
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            if figures["step_ms"] is not None:
                break
        yield {"step": "generate: decode", "retention": "100%", "batch": batch, **figures}
