"""What compression costs in answers about clips: the tokens of all frames compete, or each frame is pruned by itself.

Two kinds of clips are made of the embedded model's held-out scenes: ``once`` shows the scene in one frame, the others
hold nothing but its background; ``still`` shows it in every frame. The same questions are asked about both, alone and
in conversations, as in ``benchmarks.fidelity``. The embedded model was trained on single pictures: what is to be read
here are differences between methods on the same frames, not how well it watches films.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.asked_pictures import AskedPicture, generated
from benchmarks.fidelity import Contestant, add_asking_options, measure
from benchmarks.fidelity_rows import summary
from benchmarks.rivals.divprune import DivPrune
from benchmarks.rivals.method import Compressed, Method, Sight, keep_best
from benchmarks.rivals.random_choice import RandomChoice
from benchmarks.rivals.vflowopt import VFlowOpt, own
from benchmarks.table import Row, render, write
from vflowopt.compression.diversity import diversified
from vflowopt.compression.pipeline import EncodedImage, score
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime

KINDS = ("once", "still")
RETENTIONS = (0.25, 0.1, 0.05)


class FrameByFrame(Method):
    """VFlowOpt's order within each frame, and the same number of tokens of every frame: pictures sent one by one.

    Args:
        base: whose strategies it uses; nothing is recycled.
    """

    def __init__(self, base: VFlowOpt) -> None:
        self.name = f"{base.name}-frame-by-frame"
        self._base = base

    def compress(self, runtime: Runtime, sight: Sight, retentions: Sequence[float]) -> list[Compressed]:
        """See :meth:`Method.compress`."""
        images = []
        for retention in retentions:
            strategy = self._base.strategy(retention, runtime.layers)
            plain = Strategy(strategy.starts, strategy.ratios)
            images.append(keep_best(sight.encoded, _within_frames(sight.encoded, strategy), plain, runtime.layers))
        return images


def _within_frames(encoded: EncodedImage, strategy: Strategy) -> Tensor:
    """Scores [N] by which the best token of every frame comes before the second best of any."""
    layout, scores = encoded.layout, score(encoded, strategy)
    places = torch.zeros_like(scores)
    for frame in range(int(layout.grid.max()) + 1):
        inside = ((layout.grid == frame) & ~layout.structural).nonzero().squeeze(-1)
        ranks = scores[inside]
        if strategy.diversity:
            none = torch.zeros(len(inside), dtype=torch.bool)
            ranks = diversified(ranks, encoded.entering[inside], none, len(inside), strategy.diversity)
        places[inside] = -ranks.argsort(descending=True, stable=True).argsort().float()
    return places


def clips(kind: str, seed: int, count: int, questions: int, frames: int) -> Iterator[AskedPicture]:
    """Clips of ``frames`` frames, a second apart, with questions about the scene in them.

    Args:
        kind: one of :data:`KINDS`.
        seed: which scenes, and in ``once`` which frame shows it.
        count: how many.
        questions: about each, at most.
        frames: of a clip.
    """
    rng = np.random.default_rng(seed)
    for asked in generated(seed, count, questions):
        assert isinstance(asked.picture, Picture)
        pixels = asked.picture.pixels
        empty = Picture.from_pixels(np.broadcast_to(np.median(pixels, axis=(0, 1)).astype(np.uint8), pixels.shape))
        at = int(rng.integers(frames))
        shown = [asked.picture if kind == "still" or place == at else empty for place in range(frames)]
        yield AskedPicture(Video.of(shown, range(frames)), asked.questions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    runtime = Runtime.load(model_path(), kv_budget=options.kv_budget << 20)
    contestants = _contestants(options, runtime)
    rows: list[Row] = []
    for kind in KINDS:
        shown = clips(kind, options.seed, options.pictures, options.turns, options.frames)
        try:
            of_kind = measure(runtime, shown, contestants, options)
        except (PoolExhausted, ValueError) as error:
            print(f"video: {error}", file=sys.stderr)
            return 2
        print(f"\n{kind}: {options.pictures} clips of {options.frames} frames")
        print(render(summary(of_kind)), flush=True)
        rows += [{"clips": kind, **row} for row in of_kind]
    print(
        "\nlow and high: 95% interval of accuracy in conversations, bootstrap over clips; versus: against "
        f"{contestants[0][0].name}, by how much, with the 95% interval of the difference; a tie where it holds zero"
    )
    if options.json:
        write(rows, options.json)
    return 0


def _contestants(options: argparse.Namespace, runtime: Runtime) -> list[Contestant]:
    ours = own(runtime.model.strategies, runtime.layers)
    methods: list[Method] = [ours[0], FrameByFrame(ours[0]), *ours[1:], RandomChoice(options.seed), DivPrune()]
    return [(method, options.retention) for method in methods]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="video", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", dest="pictures", type=int, default=100, help="how many of each kind")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    add_asking_options(parser, RETENTIONS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
