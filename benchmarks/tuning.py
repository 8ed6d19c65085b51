"""The search for a strategy: what it costs beside the published schedule, and what it finds beside simpler searches.

Three tables and two plots. Cost: this project's whole search, references included, against the published schedule with
the same trials, pictures and questions, of which some trials are run and the rest is counted as the same. Quality: the
best objective of Gaussian process, TPE and random search, over several seeds, on the samples and on held-out ones.
Information flow: how close text tokens stay to the unpruned model's behind each layer, before tuning and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.asked_pictures import from_folder
from benchmarks.information_flow import information_flow
from benchmarks.line_chart import line_chart, save
from benchmarks.published_tuning import published_cosine
from benchmarks.searches import Search, objective, row, search
from benchmarks.table import Row, render
from demo_model.questions import held_out
from vflow_client.commands.share import share
from vflowopt.compression.strategy import PUBLISHED, Strategy
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.models.error import ModelError
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Sample
from vflowopt.search.proposal import Sampler

SAMPLERS: tuple[Sampler, ...] = ("gp", "tpe", "random")

_FIRST_SEED = 6_000_000
"""Far from the seeds of training, of evaluations and of tests."""

_TARGET = 0.1
"""Most of the published schedule's time that this project's search may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        runtime = Runtime.load(
            options.model, device=options.device, dtype=options.dtype, kv_budget=options.kv_budget << 20
        )
        figures = measure(runtime, options)
    except (ModelError, PoolExhausted, ValueError, OSError) as error:
        print(f"tuning: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(runtime: Runtime, options: argparse.Namespace) -> dict[str, object]:
    """Run everything, print the tables and draw the plots; returns all figures.

    Raises:
        ValueError: there are too few pictures, or one is not as it should be; or the budget cannot be reached.
        PoolExhausted: the pool is too small.
    """
    base = _base(runtime, options.base)
    samples = _samples(options)
    calibration, unseen = (
        Calibration(runtime, samples[part::2], new_tokens=options.new_tokens, piece=options.piece) for part in (0, 1)
    )
    preparing, _ = (_prepare(each) for each in (calibration, unseen))
    searches = _searches(runtime, calibration, base, options)
    cost = _cost(runtime, calibration, preparing + searches["gp"][0].seconds, base, options)
    quality: list[Row] = [
        *(row(searches[sampler], options.trials, unseen) for sampler in SAMPLERS),
        row(searches["random"], options.random_trials, unseen),
        {"search": "none", "best_objective": objective(calibration, base), "held_out": objective(unseen, base)},
    ]
    best = max((each.best(options.trials) for each in searches["gp"]), key=lambda trial: trial.objective).strategy
    flow = information_flow(runtime, unseen, {"after tuning": best, "before tuning": base})
    print(
        f"\n{options.trials} trials, {len(calibration.samples)} pictures, {int(calibration.turns.sum())} questions. "
        f"{options.published_trials} trials of the published schedule were run and are counted as {options.trials}, "
        f"without proposals. Target: at most {_TARGET:.0%} of its time.\n\n{render(cost)}"
    )
    print(
        f"\nMeans, lowest and highest of {options.seeds} seeds; held out: {len(unseen.samples)} other pictures."
        f"\n\n{render(quality)}"
    )
    print(f"\nMean cosine of the text's states behind each layer, held-out pictures.\n\n{render(_by_layer(flow))}")
    if options.plots:
        _draw(options.plots, searches, flow)
    return {
        "cost": cost,
        "quality": quality,
        "flow": flow,
        "best": json.loads(best.to_json()),
        "climbs": {sampler: [each.climb for each in of_sampler] for sampler, of_sampler in searches.items()},
    }


def _base(runtime: Runtime, name: str) -> Strategy:
    """A preset, or a strategy that the model brings."""
    known = {
        **{f"preset-{100 * budget:.0f}": Strategy.preset(budget, runtime.layers) for budget in PUBLISHED},
        **runtime.model.strategies,
    }
    if name not in known:
        raise ValueError(f"no strategy is called {name!r} to start from; there are {', '.join(known)}")
    return known[name]


def _samples(options: argparse.Namespace) -> list[Sample]:
    """Twice as many as are searched on."""
    if options.data:
        asked = from_folder(options.data, 2 * options.samples, options.questions)
        samples = [Sample(each.picture, tuple(question.text for question in each.questions)) for each in asked]
    else:
        # A scene may hold nothing that can be asked about without ambiguity: such ones are left out.
        scenes = held_out(_FIRST_SEED + options.seed * 100_000, 3 * options.samples, options.questions)
        samples = [
            Sample(Picture.from_pixels(scene.image), tuple(question.text for question in about))
            for scene, about in islice(((scene, about) for scene, about in scenes if about), 2 * options.samples)
        ]
    if len(samples) < 2 * options.samples:
        raise ValueError(
            f"{2 * options.samples} pictures are needed, half of them held out, but there are {len(samples)}; "
            "lower --samples, or give more"
        )
    return samples


def _prepare(calibration: Calibration) -> float:
    """Make the references; returns the seconds that it took."""
    begun = time.perf_counter()
    for _ in tqdm(calibration.prepare(), unit="piece", desc="references", leave=False, disable=None):
        pass
    return time.perf_counter() - begun


def _searches(
    runtime: Runtime, calibration: Calibration, base: Strategy, options: argparse.Namespace
) -> dict[Sampler, list[Search]]:
    lengths: dict[Sampler, int] = dict.fromkeys(SAMPLERS, options.trials)
    lengths["random"] = max(options.trials, options.random_trials)
    searches: dict[Sampler, list[Search]] = {}
    with tqdm(total=options.seeds * sum(lengths.values()), unit="trial", disable=None) as progress:
        for sampler, trials in lengths.items():
            searches[sampler] = [
                search(
                    runtime,
                    calibration,
                    sampler=sampler,
                    seed=options.seed + seed,
                    budget=options.budget,
                    base=base,
                    trials=trials,
                    progress=progress.update,
                )
                for seed in range(options.seeds)
            ]
    return searches


def _cost(
    runtime: Runtime, calibration: Calibration, ours: float, base: Strategy, options: argparse.Namespace
) -> list[Row]:
    """Seconds of this project's search and of the published schedule: all questions, and each picture's first alone."""
    seconds = {"all questions": 0.0, "one question a picture": 0.0}
    pairs = [(sample, question) for sample in calibration.samples for question in sample.questions]
    with tqdm(total=options.published_trials * len(pairs), unit="call", disable=None) as progress:
        for _ in range(options.published_trials):
            for sample, question in pairs:
                begun = time.perf_counter()
                published_cosine(runtime, sample, question, base)
                taken = time.perf_counter() - begun
                seconds["all questions"] += taken
                if question == sample.questions[0]:
                    seconds["one question a picture"] += taken
                progress.update()
    scale = options.trials / options.published_trials
    return [
        {"schedule": "this search, all questions", "seconds": ours, "this_search_takes": None},
        *(
            {"schedule": f"published, {what}", "seconds": taken * scale, "this_search_takes": ours / (taken * scale)}
            for what, taken in seconds.items()
        ),
    ]


def _by_layer(flow: Mapping[str, Sequence[float]]) -> list[Row]:
    return [
        {"layer": str(number), **dict(zip(flow, cosines, strict=True))}
        for number, cosines in enumerate(zip(*flow.values(), strict=True), start=1)
    ]


def _draw(folder: Path, searches: Mapping[Sampler, Sequence[Search]], flow: Mapping[str, Sequence[float]]) -> None:
    """Write both plots into ``folder``."""
    climbs = {sampler: np.mean([each.climb for each in of_sampler], axis=0) for sampler, of_sampler in searches.items()}
    drawn = {
        "objective.svg": line_chart(
            {
                sampler: [(trial, float(value)) for trial, value in enumerate(climb, 1)]
                for sampler, climb in climbs.items()
            },
            title="Best objective so far, mean over seeds",
            across="trials",
            up="mean cosine",
        ),
        "flow.svg": line_chart(
            {name: list(enumerate(cosines, 1)) for name, cosines in flow.items()},
            title="Text states against the unpruned model's, held-out pictures",
            across="behind layer",
            up="mean cosine",
        ),
    }
    for name, figure in drawn.items():
        save(figure, folder / name)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tuning", description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=_count, default=30, help="pictures searched on; as many others are held out")
    parser.add_argument("--questions", type=_count, default=3, help="about each picture, at most")
    parser.add_argument("--trials", type=_count, default=50, help="of each search")
    parser.add_argument("--random-trials", type=_count, default=200, help="of the long random search")
    parser.add_argument(
        "--published-trials", type=_count, default=2, help="of the published schedule that are really run"
    )
    parser.add_argument("--seeds", type=_count, default=5, help="searches of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first of them, and of the pictures")
    parser.add_argument("--budget", type=share, default=0.1, help="share of the visual tokens kept, such as 10%%")
    parser.add_argument(
        "--base", default="preset-10", help="where to start: a preset, or a strategy of the model's own"
    )
    parser.add_argument("--data", type=Path, help="folder of pictures with a questions.jsonl instead of generated ones")
    parser.add_argument("--model", default=model_path(), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number type")
    parser.add_argument("--kv-budget", type=int, default=512, help="MiB for the KV cache")
    parser.add_argument("--piece", type=int, default=2048, help="tokens run in one piece; a service takes smaller ones")
    parser.add_argument("--new-tokens", type=int, default=8, help="of a reference's answer, at most")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: torch decides)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plots", type=Path, help="draw objective.svg and flow.svg in this folder")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
