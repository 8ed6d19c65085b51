"""A real model's shape with random weights: encode, score, prune, prefill and decode at every budget.

Timings do not depend on the values of the weights. Beside each is a lower bound, from the device's measured arithmetic
and bandwidth and from the shapes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks.decode_step import kv_bytes_read
from benchmarks.device import DevicePeak, measure_peak, median_ms, seconds
from benchmarks.random_model import GEOMETRIES, write_random_model
from benchmarks.table import Row, publish
from benchmarks.workload import Config, decoder_weights, encoding_flops, prefill_flops
from vflowopt.compression.pipeline import EncodedImage, choose, score
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence

BUDGETS = (1.0, 0.5, 0.25, 0.1)
QUESTION_TOKENS = 32
PICTURE_SIDE = {"demo": 448, "onevision-0.5b": 768, "onevision-7b": 1152}
"""Sides of the picture in pixels, where none is given; 1152 is 3 x 3 tiles, as in the paper."""

PAPER = """\
The paper, 7B on an A100, 7,290 tokens: 1040 / 584 / 329 / 272 ms at 100 / 50 / 25 / 10%; KV -49.5 / -74.2 / -89.0%.
(Its latency is that of whole requests of a benchmark, its device and software are others: compare the ratios.)"""

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """A loaded model, its picture, and how to time it."""

    runtime: Runtime
    config: Config
    picture: Picture
    peak: DevicePeak
    runs: int
    decode_steps: int

    def measure(self) -> Iterator[Row]:
        """One row for each budget."""
        encode_ms, encoded = self.encode()
        for budget in BUDGETS:
            yield self.row(budget, encoded, encode_ms)

    def encode(self) -> tuple[float, EncodedImage]:
        """The milliseconds that it takes to encode the picture, and what comes of it."""
        return self._timed(lambda: self.runtime.model.encode([self.picture])[0])

    def strategy(self, budget: float) -> Strategy:
        """The published strategy of a budget."""
        return Strategy.full() if budget == 1 else Strategy.preset(budget, self.runtime.layers)

    def row(self, budget: float, encoded: EncodedImage, encode_ms: float) -> Row:
        """The row of a budget, for a picture that was encoded in ``encode_ms``."""
        strategy = self.strategy(budget)
        runtime, layers = self.runtime, self.runtime.layers
        score_ms, scores = self._timed(lambda: score(encoded, strategy))
        prune_ms, image = self._timed(lambda: choose(encoded, scores, strategy, layers))
        conversation = runtime.start(strategy)
        empty = conversation.checkpoint()

        def prefill() -> None:
            conversation.rollback(empty)
            runtime.extend(conversation, [image], want_logits=False)

        prefill_ms = median_ms(prefill, runtime.model.device, self.runs)
        lengths = list(conversation.cache.lengths)
        visual_bytes = kv_bytes_read(conversation)
        held_bytes = conversation.kv_bytes
        question_ms = 1e3 * seconds(lambda: runtime.extend(conversation, [0] * QUESTION_TOKENS), runtime.model.device)
        decode_ms = self._decode_ms(conversation)
        kv_read = kv_bytes_read(conversation)
        conversation.release()
        itemsize = runtime.model.dtype.itemsize
        weights = decoder_weights(self.config)
        return {
            "retention": f"{budget:.0%}",
            "visual_tokens": image.tokens,
            "kept_tokens": lengths,
            "encode_ms": encode_ms,
            "encode_bound_ms": self.peak.bound_ms(encoding_flops(self.config, *encoded.pixels.shape[:3]), 0),
            "score_ms": score_ms,
            "prune_and_recycle_ms": prune_ms,
            "prefill_ms": prefill_ms,
            "prefill_bound_ms": self.peak.bound_ms(
                prefill_flops(self.config, lengths, strategy.spans(layers)), itemsize * weights
            ),
            "first_question_ms": question_ms,
            "decode_step_ms": decode_ms,
            "decode_bound_ms": self.peak.bound_ms(2 * weights, itemsize * weights + kv_read),
            "kv_bytes": visual_bytes,
            "kv_bytes_held": held_bytes,
            "kv_share": visual_bytes / (image.tokens * layers * runtime.bytes_per_token()),
        }

    def _timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """The median time of some work in milliseconds, and its last result."""
        results: list[T] = []

        def compress() -> None:
            results[:] = [work()]

        return median_ms(compress, self.runtime.model.device, self.runs), results[0]

    def _decode_ms(self, conversation: Sequence) -> float:
        """Median milliseconds of a step that adds one token to one conversation."""
        return median_ms(lambda: self.runtime.decode([conversation], [0]), self.runtime.model.device, self.decode_steps)


def main(arguments: abc.Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = _options(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows = []
    with tempfile.TemporaryDirectory(prefix="vflow-geometry-") as folder:
        print(f"writing {options.geometry} with random weights to {folder} ...", flush=True)
        bench = _prepare(options, Path(folder))
    with tqdm(total=len(BUDGETS), unit="budget", disable=None) as progress:
        for row in bench.measure():
            rows.append(row)
            progress.update()
    publish(rows, options.json)
    print(
        f"{options.geometry}, {options.dtype} on {options.device}, a picture of {options.picture} x {options.picture} "
        f"pixels; medians of {options.runs} runs. Bounds: {bench.peak.flops / 1e9:,.0f} GFLOP/s and "
        f"{bench.peak.bandwidth / 1e9:,.1f} GB/s, measured here."
    )
    if options.geometry == "onevision-7b":
        print(PAPER)
    return 0


def _prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """Make the model, load it, and warm it up on a picture of one tile."""
    config = write_random_model(options.geometry, folder)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    picture = random_picture(options.picture)
    vision: Any = config.vision_config
    text: Any = config.text_config
    # Pages for more tokens than the picture has with any grid of tiles.
    tokens = 2 * (options.picture // vision.patch_size + vision.image_size // vision.patch_size) ** 2
    token_bytes = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * dtype.itemsize
    runtime = Runtime.load(
        folder,
        device=options.device,
        dtype=options.dtype,
        kv_budget=(tokens + 4096) * text.num_hidden_layers * token_bytes,
    )
    bench = Bench(runtime, config, picture, measure_peak(device, dtype), options.runs, options.decode_steps)
    small = Bench(runtime, config, random_picture(vision.image_size), bench.peak, 1, 2)
    for _ in small.measure():
        pass
    return bench


def random_picture(height: int, width: int | None = None, *, seed: int | None = None) -> Picture:
    """A picture of noise, square unless ``width`` is given; the same for the same seed, which is its height if None."""
    generator = torch.Generator().manual_seed(height if seed is None else seed)
    pixels = torch.randint(0, 256, (height, width or height, 3), dtype=torch.uint8, generator=generator)
    return Picture.from_pixels(pixels.numpy())


def _options(arguments: abc.Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="geometry", description=__doc__.split("\n\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="onevision-0.5b", help="whose shape")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--picture", type=int, metavar="PIXELS", help="sides of the picture (default: by geometry)")
    parser.add_argument("--runs", type=int, default=3, help="of each step; figures are medians")
    parser.add_argument("--decode-steps", type=int, default=24, help="of each budget; figures are medians")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: torch decides)")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.picture = options.picture or PICTURE_SIDE[options.geometry]
    return options


if __name__ == "__main__":
    sys.exit(main())
