"""What it costs in answers to store keys and values in fewer bits.

The same pictures and questions as in :mod:`benchmarks.fidelity`, unpruned and pruned. Every type is compared with
float32 at the same retention: agreement, cosine and KL divergence say what the type does, not what pruning does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice

import torch
from tqdm import tqdm

from benchmarks.answering import Reply
from benchmarks.ask import ask
from benchmarks.asked_pictures import generated
from benchmarks.fidelity import add_asking_options, encoded, mark, setting
from benchmarks.fidelity_rows import ALL, Scores, summary
from benchmarks.rivals.method import Sight
from benchmarks.rivals.vflowopt import own
from benchmarks.table import Row, render, write
from vflowopt.demo import model_path
from vflowopt.models.error import ModelError
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import KV_DTYPES, Runtime

RETENTIONS = (1.0, 0.1)
BASE = "float32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        rows = measure(options)
    except (ModelError, PoolExhausted, ValueError, OSError) as error:
        print(f"kv_types: {error}", file=sys.stderr)
        return 2
    print(render(summary(rows)))
    print(
        f"\n{next(row['questions'] for row in rows if row['turn'] == ALL)} questions; low and high: 95% interval of "
        f"accuracy in conversations, bootstrap over pictures; by: against {BASE} at the same retention, with the 95% "
        "interval of the difference"
    )
    if options.json:
        write(rows, options.json)
    return 0


def measure(options: argparse.Namespace) -> list[Row]:
    """Ask all questions with each type; returns a row for each type, retention and turn.

    Raises:
        ModelError: the model cannot be loaded.
        PoolExhausted: the conversations of a batch do not fit into a pool.
        ValueError: there are no pictures.
    """
    runtimes = {
        name: Runtime.load(
            options.model,
            device=options.device,
            dtype=options.dtype,
            kv_budget=options.kv_budget << 20,
            kv_dtype=name,
        )
        for name in dict.fromkeys((BASE, *options.types))
    }
    base = runtimes[BASE]
    method, scores, seen = own(base.model.strategies, base.layers)[0], Scores(), 0
    pictures = generated(options.seed, options.pictures, options.turns)
    progress = tqdm(total=options.pictures, unit="picture", disable=None)
    while batch := list(islice(pictures, options.batch)):
        sights = [Sight(each.picture, encoded(base.model, each.picture), each.questions[0].text) for each in batch]
        compressed = [method.compress(base, sight, options.retention) for sight in sights]
        asked = [each.questions for each in batch]
        for place, retention in enumerate(options.retention):
            reference: dict[tuple[int, int, str], Reply] = {}
            images = [[each[place]] * len(own_questions) for each, own_questions in zip(compressed, asked, strict=True)]
            for name, runtime in runtimes.items():
                answered = ask(runtime, images, asked, options.new_tokens)
                if not reference:
                    reference = {(each.picture, each.number, setting(each)): each.reply for each in answered}
                scores.marks[name, retention] += [
                    mark(each, batch, reference[each.picture, each.number, setting(each)], seen) for each in answered
                ]
        seen += len(batch)
        progress.update(len(batch))
    progress.close()
    if not seen:
        raise ValueError("there are no pictures to ask about: ask for one at least")
    return scores.rows(seen, BASE)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kv_types", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=150, help="how many, several questions each")
    add_asking_options(parser, RETENTIONS)
    parser.add_argument("--types", nargs="+", choices=KV_DTYPES, default=list(KV_DTYPES), help="of keys and values")
    parser.add_argument("--model", default=model_path(), help="folder or hub id (default: the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number type of the model")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
