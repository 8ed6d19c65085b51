"""What compression adds to encoding a picture: scoring, pruning and recycling; or choosing by diversity, too."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.device import median_ms
from benchmarks.geometry import PICTURE_SIDE, random_picture
from benchmarks.random_model import GEOMETRIES, write_random_model
from benchmarks.table import Row, publish
from vflowopt.compression.pipeline import EncodedImage, choose, score
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import DTYPES, load_model

BUDGETS = (0.5, 0.25, 0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = _options(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows: list[Row] = []
    progress = tqdm(total=2 * len(BUDGETS) * len(options.geometry), unit="strategy", disable=None)
    for geometry in options.geometry:
        with tempfile.TemporaryDirectory(prefix="vflow-scoring-") as folder:
            write_random_model(geometry, Path(folder))
            model = load_model(folder, device=options.device, dtype=options.dtype)
        picture = random_picture(PICTURE_SIDE[geometry])
        for figures in measure(model, picture, options.runs):
            rows.append({"model": geometry, **figures})
            progress.update()
    progress.close()
    publish(rows, options.json)
    print(
        f"{options.dtype} on {options.device}; medians of {options.runs} runs; one picture, "
        + ", ".join(f"{PICTURE_SIDE[geometry]} px for {geometry}" for geometry in options.geometry)
        + f". The project's target for the share of encoding: <= {0.05:.0%}."
    )
    return 0


def measure(model: MultimodalModel, picture: Picture, runs: int) -> Iterator[Row]:
    """What compression takes beside encoding: at each budget, as published and with diversity."""
    (encoded,) = model.encode([picture])
    encode_ms = median_ms(lambda: model.encode([picture]), model.device, runs)
    for budget in BUDGETS:
        for name, strategy in _strategies(budget, len(model.layers)).items():
            yield {
                "retention": f"{budget:.0%}",
                "strategy": name,
                "visual_tokens": len(encoded.layout),
                "encode_ms": encode_ms,
                **_added(encoded, strategy, model, encode_ms, runs),
            }


def _strategies(budget: float, layers: int) -> dict[str, Strategy]:
    diverse = Strategy.from_budget(budget, layers, (1.3 * budget, 0.95), threshold=2.0, diversity=0.7)
    return {"preset": Strategy.preset(budget, layers), "diverse": diverse}


def _added(encoded: EncodedImage, strategy: Strategy, model: MultimodalModel, encode_ms: float, runs: int) -> Row:
    """The figures of one strategy."""
    layers = len(model.layers)
    scores = score(encoded, strategy)
    image = choose(encoded, scores, strategy, layers)
    plain = replace(strategy, grid=None, diversity=0.0)
    score_ms = median_ms(lambda: score(encoded, strategy), model.device, runs)
    prune_ms = median_ms(lambda: choose(encoded, scores, plain, layers), model.device, runs)
    both_ms = median_ms(lambda: choose(encoded, scores, strategy, layers), model.device, runs)
    return {
        "kept_tokens": [len(kept) for kept in image.kept],
        "recycled_tokens": len(image.recycled),
        "score_ms": score_ms,
        "prune_ms": prune_ms,
        "choose_and_recycle_ms": both_ms,
        "share_of_encoding": (score_ms + both_ms) / encode_ms,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scoring", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--geometry", nargs="+", choices=GEOMETRIES, default=["demo", "onevision-0.5b"], help="whose shapes"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="number type (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--runs", type=int, default=3, help="of each step; figures are medians")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: torch decides)")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


if __name__ == "__main__":
    sys.exit(main())
