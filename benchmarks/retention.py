"""Exact match on the embedded model's held-out questions, against the share of visual tokens kept.

VFlowOpt, by the published presets and by those that the model brings, beside random pruning with the same number of
tokens in every stage, on the same pictures and questions, in
turns of one conversation per picture: each question is answered from the cache that the ones before it left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vflowopt.compression import CompressedImage, EncodedImage, choose, score
from vflowopt.conversation import Conversation
from vflowopt.demo import model_path
from vflowopt.demo.questions import Question, held_out
from vflowopt.picture import Picture
from vflowopt.runtime import Runtime
from vflowopt.strategy import Strategy

BUDGETS = (0.5, 0.25, 0.1)
_LONGEST_ANSWER = 6
_BATCH = 16

Sample = tuple[EncodedImage, Sequence[Question]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="retention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=400, help="held-out pictures, several questions each")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures, the questions and random pruning")
    parser.add_argument("--model", type=Path, default=model_path(), help="model folder")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    runtime = Runtime.load(options.model, kv_budget=512 << 20)
    methods = {("full", 1.0): Strategy.full()}
    for budget in BUDGETS:
        methods["published", budget] = Strategy.preset(budget, runtime.layers)
        if tuned := runtime.model.strategies.get(f"tuned-{100 * budget:.0f}"):
            methods["tuned", budget] = tuned
        methods["random", budget] = Strategy.from_budget(
            budget, runtime.layers, Strategy.preset(budget, runtime.layers).ratios[:-1]
        )
    right: dict[tuple[str, float], dict[str, list[bool]]] = {key: defaultdict(list) for key in methods}
    progress = tqdm(total=options.pictures, unit="picture", disable=None)
    for batch in _batches(runtime, options.seed, options.pictures):
        for key, strategy in methods.items():
            images = [
                choose(encoded, _scores(key[0], encoded, strategy), strategy, runtime.layers) for encoded, _ in batch
            ]
            for question, correct in _converse(runtime, strategy, images, [asked for _, asked in batch]):
                for group in ("all", question.kind, *(("fine",) if question.fine else ())):
                    right[key][group].append(correct)
        progress.update(len(batch))
    progress.close()
    rows = [
        {
            "method": method,
            "retention": budget,
            "questions": len(groups["all"]),
            **{group: sum(correct) / len(correct) for group, correct in sorted(groups.items())},
        }
        for (method, budget), groups in right.items()
    ]
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def _batches(runtime: Runtime, seed: int, pictures: int) -> Iterator[list[Sample]]:
    """Held-out pictures, encoded, with their questions."""
    scenes = iter(held_out(seed, pictures))
    while batch := list(islice(scenes, _BATCH)):
        # One at a time: all tiles of a batch at once would not fit the caches of a processor.
        yield [(runtime.model.encode([Picture.from_pixels(scene.image)])[0], asked) for scene, asked in batch]


def _scores(method: str, encoded: EncodedImage, strategy: Strategy) -> Tensor:
    return torch.rand(len(encoded.layout)) if method == "random" else score(encoded, strategy)


def _converse(
    runtime: Runtime, strategy: Strategy, images: Sequence[CompressedImage], asked: Sequence[Sequence[Question]]
) -> Iterator[tuple[Question, bool]]:
    """Hold one conversation per picture, all in step, and judge every answer."""
    conversations = [runtime.start(strategy) for _ in images]
    for turn in range(max(map(len, asked))):
        taking = [place for place, questions in enumerate(asked) if turn < len(questions)]
        prompts = {
            place: runtime.chat.turn(turn, [*([images[place]] if turn == 0 else []), asked[place][turn].text])
            for place in taking
        }
        answers = _answers(runtime, [conversations[place] for place in taking], list(prompts.values()))
        for place, answer in zip(taking, answers, strict=True):
            yield asked[place][turn], answer == asked[place][turn].answer
    for conversation in conversations:
        conversation.release()


def _answers(
    runtime: Runtime, conversations: Sequence[Conversation], prompts: Sequence[Sequence[int | CompressedImage]]
) -> list[str]:
    """Greedy answers, decoded as one batch."""
    logits = [runtime.extend(each, prompt) for each, prompt in zip(conversations, prompts, strict=True)]
    tokens: list[list[int]] = [[] for _ in conversations]
    running = {place: int(row.argmax()) for place, row in enumerate(logits) if row is not None}
    while running := {
        place: token
        for place, token in running.items()
        if token not in runtime.chat.stop_ids and len(tokens[place]) < _LONGEST_ANSWER
    }:
        for place, token in running.items():
            tokens[place].append(token)
        step = runtime.decode([conversations[place] for place in running], list(running.values()))
        running = {place: int(row.argmax()) for place, row in zip(running, step, strict=True)}
    return [runtime.chat.decode(answer) for answer in tokens]


def _print_table(rows: Sequence[dict[str, object]]) -> None:
    columns = [key for key in rows[0] if key != "questions"]
    print("  ".join(f"{column:>10}" for column in columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        print("  ".join(f"{cell:>10.1%}" if isinstance(cell, float) else f"{cell:>10}" for cell in cells))
    print(f"exact match over {rows[0]['questions']} questions; fine: codes and small objects")


if __name__ == "__main__":
    sys.exit(main())
