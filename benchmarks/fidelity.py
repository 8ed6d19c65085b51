"""What compression costs in answers: VFlowOpt, its rivals and its ablations on the same pictures and questions.

Every method keeps the same number of visual tokens, averaged over the decoder's layers. Each question is asked twice:
alone, as the first one about its picture, and as a turn of one conversation per picture, which reuses the cache of the
turns before it. Methods that read the question choose tokens by the question asked alone; in a conversation, by the
first question, because a server with a cache prunes the picture only once.

Agreement, cosine and KL divergence compare with the unpruned model (``full``). A question whose true answer is not
given counts as right if the unpruned model answers it in the same words. In later turns they include the effect
of earlier answers that differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.answering import Reply
from benchmarks.ask import SINGLE, Answered, ask
from benchmarks.asked_pictures import AskedPicture, from_folder, generated
from benchmarks.fidelity_rows import ALL, Mark, Scores, compare, group_summary, summary
from benchmarks.line_chart import line_chart, save
from benchmarks.rivals import Compressed, Method, Sight, looks, rivals
from benchmarks.rivals.other_tower import OtherTower
from benchmarks.rivals.vflowopt import VFlowOpt, ablations, choices, curves, own
from benchmarks.table import Row, render, write
from vflow_client.commands.share import share
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.media.video import Video, Visual
from vflowopt.models.error import ModelError
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime

RETENTIONS = (0.5, 0.25, 0.1, 0.05)
FULL = "full"
LOOK = 4
"""The layer in which methods that read the question do best on the embedded model, by ``--compare looks`` on pictures
that the table of rivals does not use."""

Contestant = tuple[Method, Sequence[float]]
"""A method, and the retentions that it is measured at."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        runtime = Runtime.load(
            options.model, device=options.device, dtype=options.dtype, kv_budget=options.kv_budget << 20
        )
        contestants = _contestants(options, runtime)
        pictures = (
            from_folder(options.data, options.pictures, options.turns)
            if options.data
            else generated(options.seed, options.pictures, options.turns)
        )
        rows = measure(runtime, pictures, contestants, options)
    except (ModelError, PoolExhausted, ValueError, OSError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    print(render(summary(rows)))
    if groups := group_summary(rows):
        print("\naccuracy by kind of question, over the turns of the conversations")
        print(render(groups))
    print(
        f"\n{next(row['questions'] for row in rows if row['turn'] == ALL)} questions; low and high: 95% interval of "
        "accuracy in conversations, bootstrap over pictures; versus: against "
        f"{contestants[0][0].name}, by how much, with the 95% interval of the difference; a tie where it holds zero"
    )
    if options.json:
        write(rows, options.json)
    if options.plot:
        save(chart(rows), options.plot)
    return 0


def measure(
    runtime: Runtime, pictures: Iterator[AskedPicture], contestants: Sequence[Contestant], options: argparse.Namespace
) -> list[Row]:
    """Ask every method all questions; returns a row for each method, retention and turn.

    Raises:
        ValueError: there are no pictures, or one cannot be used (PictureError is a ValueError).
        PoolExhausted: the conversations of a batch do not fit into the pool.
    """
    scores, seen = Scores(), 0
    progress = tqdm(total=options.pictures, unit="picture", disable=None)
    while batch := list(islice(pictures, options.batch)):
        # One picture at a time: all tiles of a batch at once would not fit the caches of a processor.
        of_batch = [encoded(runtime.model, each.picture) for each in batch]
        sights = [
            [Sight(each.picture, tokens, question.text) for question in each.questions]
            for each, tokens in zip(batch, of_batch, strict=True)
        ]
        asked = [each.questions for each in batch]
        reference: dict[tuple[int, int, str], Reply] = {}
        for method, retentions in ((VFlowOpt(FULL), (1.0,)), *contestants):
            images = [_compressed(runtime, method, of_picture, retentions) for of_picture in sights]
            for place, retention in enumerate(retentions):
                answered = ask(runtime, [each[place] for each in images], asked, options.new_tokens)
                if not reference:
                    reference = {(each.picture, each.number, setting(each)): each.reply for each in answered}
                scores.marks[method.name, retention] += [
                    mark(each, batch, reference[each.picture, each.number, setting(each)], seen) for each in answered
                ]
        seen += len(batch)
        progress.update(len(batch))
    progress.close()
    if not seen:
        raise ValueError("there are no pictures to ask about: ask for one at least, and of a folder that is not empty")
    return scores.rows(seen, contestants[0][0].name)


def encoded(model: MultimodalModel, shown: Visual) -> EncodedImage:
    """A picture's or a video's tokens."""
    return model.encode_video(shown) if isinstance(shown, Video) else model.encode([shown])[0]


def chart(rows: Sequence[Row]) -> Figure:
    """Accuracy in conversations against retention, one line a method."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["turn"] == ALL and row["method"] != FULL:
            point = float(str(row["retention"])), float(str(row["accuracy"]))
            lines.setdefault(str(row["method"]), []).append(point)
    (whole,) = (float(str(row["accuracy"])) for row in rows if row["method"] == FULL and row["turn"] == ALL)
    return line_chart(
        lines,
        title="Exact match in conversations",
        across="visual tokens kept",
        up="accuracy",
        levels={"unpruned": whole},
    )


def _compressed(
    runtime: Runtime, method: Method, sights: Sequence[Sight], retentions: Sequence[float]
) -> list[list[Compressed]]:
    """A picture at each retention, once for each of its questions; methods that do not look at them choose once."""
    if method.question_aware:
        by_question = [method.compress(runtime, sight, retentions) for sight in sights]
        return [list(images) for images in zip(*by_question, strict=True)]
    return [[image] * len(sights) for image in method.compress(runtime, sights[0], retentions)]


def setting(answered: Answered) -> str:
    """``SINGLE`` for a question asked alone, else ``ALL``."""
    return SINGLE if answered.turn == SINGLE else ALL


def mark(answered: Answered, batch: Sequence[AskedPicture], reference: Reply, before: int) -> Mark:
    """A reply of a batch compared with ``reference``; ``before`` pictures were asked about before the batch."""
    question = batch[answered.picture].questions[answered.number]
    agrees, cosine, divergence = compare(answered.reply, reference)
    return Mark(
        picture=before + answered.picture,
        turn=answered.turn,
        right=question.answered_by(answered.reply.answer) if question.answer else agrees,
        agrees=agrees,
        cosine=cosine,
        divergence=divergence,
        kv_bytes=answered.kv_bytes,
        groups=question.groups,
    )


def _contestants(options: argparse.Namespace, runtime: Runtime) -> list[Contestant]:
    """The methods and their retentions; the first method is the one that the others are compared with."""
    ours = own(runtime.model.strategies, runtime.layers)
    base = next((method for method in ours if method.name == options.base), None)
    if options.base and base is None:
        raise ValueError(f"--base is {options.base}; there is {', '.join(method.name for method in ours)}")
    base = base or ours[0]
    methods: list[Method] = [base, *(method for method in ours if method is not base)]
    look = options.look or (LOOK if options.model == model_path() else None)
    methods += rivals(options.seed, look) if "rivals" in options.compare else []
    methods += choices(base, runtime.layers) if "choices" in options.compare else []
    methods += looks(runtime.layers) if "looks" in options.compare else []
    methods += ablations(base, runtime.layers) if "ablations" in options.compare else []
    methods += curves(base, runtime.layers) if "curves" in options.compare else []
    methods += [
        OtherTower(base, options.model, device=options.device, dtype=options.dtype, tower_dtype=DTYPES[each])
        for each in options.tower_dtype
    ]
    methods = list({method.name: method for method in methods}.values())
    if options.methods:
        unknown = sorted(set(options.methods) - {method.name for method in methods})
        if unknown:
            known = ", ".join(method.name for method in methods)
            raise ValueError(f"no method is called {', '.join(unknown)}; with this --compare there are {known}")
        methods = [method for method in methods if method.name in options.methods]
    contestants: list[Contestant] = []
    for method in methods:
        if (flaw := method.flaw(runtime.model)) is None:
            contestants.append((method, options.retention))
        else:
            print(f"fidelity: left out: {method.name} {flaw}", file=sys.stderr)
    for path in options.strategy:
        strategy = Strategy.from_json(path.read_text(encoding="utf-8"))
        budget = strategy.budget(runtime.layers)
        # Verdicts compare equal retentions: what was solved for a budget misses it by rounding.
        budget = next((each for each in options.retention if abs(each - budget) < 1e-6), budget)
        contestants.append((VFlowOpt(f"vflowopt-{path.stem}", {budget: strategy}), (budget,)))
    if not contestants:
        raise ValueError("no method is left to measure; name others by --methods")
    return contestants


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fidelity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=400, help="how many, several questions each")
    add_asking_options(parser, RETENTIONS)
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=("rivals", "choices", "looks", "ablations", "curves"),
        default=["rivals"],
        help="VFlowOpt with what: its rivals; choices of tokens in the same stages; methods that read the question, by "
        "the layer that they look in; itself without its parts; each hyperparameter moved",
    )
    parser.add_argument(
        "--base", metavar="NAME", help="what is held against the others and taken apart (default: the model's own)"
    )
    parser.add_argument(
        "--look",
        type=int,
        metavar="LAYER",
        help="the layer, from 1, in which rivals that read the question look at all tokens (default: the best one of "
        "the embedded model, the published ones for others)",
    )
    parser.add_argument("--methods", nargs="+", help="only these of them, by name")
    parser.add_argument(
        "--strategy", type=Path, nargs="+", default=[], help="strategies as JSON files, measured as vflowopt-FILE, too"
    )
    parser.add_argument("--data", type=Path, help="folder of pictures with a questions.jsonl instead of generated ones")
    parser.add_argument("--model", default=model_path(), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number type")
    parser.add_argument(
        "--tower-dtype",
        nargs="+",
        choices=DTYPES,
        default=[],
        help="the base with a vision tower of each of these types, too",
    )
    parser.add_argument("--plot", type=Path, help="draw accuracy against retention here, as SVG or PNG")
    return parser.parse_args(arguments)


def add_asking_options(parser: argparse.ArgumentParser, retentions: Sequence[float]) -> None:
    """Add the options that :func:`measure` reads, but for how many pictures, and those of every such comparison."""
    parser.add_argument("--turns", type=int, default=5, help="questions about each picture, at most")
    parser.add_argument(
        "--retention", type=share, nargs="+", default=list(retentions), help="shares kept, such as 0.25 or 25%%"
    )
    parser.add_argument("--kv-budget", type=int, default=512, help="MiB for the KV cache")
    parser.add_argument("--batch", type=int, default=16, help="pictures that are talked about at the same time")
    parser.add_argument("--new-tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0, help="of generated pictures and of random pruning")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: torch decides)")
    parser.add_argument("--json", type=Path, help="write the rows here")


if __name__ == "__main__":
    sys.exit(main())
