"""Measure the embedded model on pictures it has never seen: ``python -m demo_model.evaluate``.

Every question is put as the first one after its picture, at full visual tokens, in float32, and counts as right only if
the whole answer is. A blank picture of the same size, and the best constant answer, say what could be had without
looking.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.anyres import tiles
from demo_model.architecture import normalise
from demo_model.questions import KINDS, Question, held_out
from demo_model.tokenizer import ASSISTANT, END, USER, token_id
from vflowopt.demo import model_path

_FIRST_SEED = 5_000_000
"""Far from every seed that training draws; the photographs are others, too."""


@dataclass(frozen=True)
class Score:
    """Exact match of one group of questions, in percent.

    Attributes:
        questions: how many were asked.
        right: with the picture.
        blank: with a blank picture in its place.
        constant: by the best constant answer.
    """

    questions: int
    right: float
    blank: float
    constant: float


def picture_tokens(model: LlavaOnevisionForConditionalGeneration, picture: np.ndarray) -> Tensor:
    """What the language model reads of a picture (height, width, 3): projected tokens and newlines, (tokens, width)."""
    pixels = normalise(torch.from_numpy(tiles(picture)))[None]
    sizes = torch.tensor([picture.shape[:2]])
    features: Tensor = model.get_image_features(pixels.to(model.dtype), sizes).pooler_output[0]
    return features


def answered_right(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    visual: Tensor,
    questions: list[Question],
) -> list[bool]:
    """Whether greedy decoding answers each question exactly, each asked alone after the picture.

    One pass does for all: every question sees the picture and itself only, at the positions that it would have alone,
    and greedy decoding gives the true answer just if the true answer's every token is the likeliest after those before
    it.
    """
    user, assistant, end = (token_id(tokenizer, token) for token in (USER, ASSISTANT, END))
    first = 1 + len(visual)
    ids: list[int] = []
    positions: list[int] = []
    turns: list[int] = []
    spans: list[tuple[int, int]] = []
    for turn, question in enumerate(questions):
        asked = [*tokenizer.encode(question.text, add_special_tokens=False), end, assistant]
        answer = [*tokenizer.encode(question.answer, add_special_tokens=False), end]
        spans.append((len(ids) + len(asked), len(ids) + len(asked) + len(answer)))
        ids += asked + answer
        positions += range(first, first + len(asked) + len(answer))
        turns += [turn] * (len(asked) + len(answer))
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([user])), visual, embed(torch.tensor(ids))])[None]
    owner = torch.tensor([-1] * first + turns)
    length = len(owner)
    visible = (owner[None] == -1) | (owner[None] == owner[:, None])
    visible = visible.tril()
    mask = torch.zeros(length, length, dtype=embeds.dtype).masked_fill_(~visible, torch.finfo(embeds.dtype).min)
    where = torch.tensor([*range(first), *positions])[None]
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=where, use_cache=False
    ).last_hidden_state[0, first - 1 :]
    likeliest = model.lm_head(hidden).argmax(-1).tolist()  # likeliest[i] follows what stands before ids[i]
    return [likeliest[start:stop] == ids[start:stop] for start, stop in spans]


@torch.no_grad()
def evaluate(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, questions: int, seed: int = 0
) -> dict[str, Score]:
    """Score the model on held-out scenes.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        questions: at least so many are asked.
        seed: which held-out scenes.

    Returns:
        A score per kind of question, and for "fine" detail and "all".
    """
    hits: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    answers: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    blanks: dict[tuple[int, int], Tensor] = {}
    asked = 0
    with tqdm(total=questions, desc="evaluate", unit="question", mininterval=5) as progress:
        for scene, about in held_out(_FIRST_SEED + seed, questions):
            if scene.size not in blanks:
                blanks[scene.size] = picture_tokens(model, np.full_like(scene.image, 128))
            seen = answered_right(model, tokenizer, picture_tokens(model, scene.image), about)
            unseen = answered_right(model, tokenizer, blanks[scene.size], about)
            for question, *hit in zip(about, seen, unseen, strict=True):
                for group in (question.kind, *(["fine"] if question.fine else []), "all"):
                    hits[group].append((hit[0], hit[1]))
                    answers[group][question.kind, question.answer] += 1
            asked += len(about)
            progress.update(len(about))
            if asked >= questions:
                break

    scores = {}
    for group in (*KINDS, "fine", "all"):
        if hits[group]:
            right, blank = (100 * float(np.mean([pair[side] for pair in hits[group]])) for side in (0, 1))
            constant = sum(
                max(number for (kind, _), number in answers[group].items() if kind == one)
                for one in {kind for kind, _ in answers[group]}
            )
            scores[group] = Score(len(hits[group]), right, blank, 100 * constant / len(hits[group]))
    return scores


def load(folder: Path) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    """The model in float32, in eval mode, and its tokenizer."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def main() -> None:
    """Read the command line, evaluate, print a table."""
    parser = argparse.ArgumentParser(description="Exact match of the embedded model on held-out pictures.")
    parser.add_argument("--folder", type=Path, default=model_path(), help="the model")
    parser.add_argument("--questions", type=int, default=2000, help="how many to ask, at least")
    parser.add_argument("--seed", type=int, default=0, help="which held-out scenes")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    model, tokenizer = load(options.folder)
    begun = time.monotonic()
    scores = evaluate(model, tokenizer, options.questions, options.seed)
    print(f"{'kind':<12}{'questions':>10}{'right %':>10}{'blank %':>10}{'constant %':>12}")
    for kind, score in scores.items():
        print(f"{kind:<12}{score.questions:>10}{score.right:>10.1f}{score.blank:>10.1f}{score.constant:>12.1f}")
    print(f"{time.monotonic() - begun:.0f} seconds")
    if options.json:
        figures = {kind: vars(score) for kind, score in scores.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
