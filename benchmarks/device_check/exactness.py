"""Part: small models of every family answer like Hugging Face's ``generate`` on the same device.

In half precision two ways to compute the same may round differently, and where two tokens are about equally likely,
either may win. So up to the first difference the tokens must be the same, and there the two tokens must be as likely as
rounding leaves them. Behind it the conversations differ, and nothing is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.device_check.part import Setting, last_line
from benchmarks.table import Row
from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from tests.vflowopt.reference import Reference
from vflowopt.compression.strategy import Strategy
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.model_runner import Runtime

_NEW_TOKENS = 8
_ROUNDINGS = 16
"""How many roundings of the largest logit two logits may be apart to count as about equal."""


_COLUMNS = ("tokens_compared", "of", "largest_logit_difference", "answers", "error")


def rows(setting: Setting) -> Iterator[Row]:
    """A row for each small model and number type."""
    models = ONE_EACH[:1] if setting.rehearse else ONE_EACH
    dtypes = ["float32"] if setting.device == "cpu" else ["bfloat16", "float16", "float32"]
    for dtype in dtypes:
        for model in models:
            if setting.left < 0:
                return
            with tempfile.TemporaryDirectory(prefix="vflow-check-") as folder:
                row: dict[str, object] = {"model": model.name, "dtype": dtype, **dict.fromkeys(_COLUMNS)}
                try:
                    row |= _compared(model, Path(folder), setting.device, dtype)
                except Exception as failure:  # the other models are still compared
                    row |= {"answers": "failed", "error": last_line(failure)}
                yield row


def _compared(model: TinyModel, folder: Path, device: str, dtype: str) -> Row:
    model.save(folder)
    first, second = picture(56, 56, seed=0), picture(70, 150, seed=1)
    turns = [[first, "what is this?"], ["and now?"], ["look: ", second, " same?"]]
    reference = Reference(folder, device=device, dtype=DTYPES[dtype])
    expected = reference.answers(turns, _NEW_TOKENS)
    runtime = Runtime.load(folder, device=device, dtype=dtype, kv_budget=32 << 20)
    chat = Chat(runtime, Strategy.full())
    answers = [chat.ask(turn, _NEW_TOKENS) for turn in turns]
    chat.sequence.release()
    return verdict(answers, expected, chat.logits, reference.logits, DTYPES[dtype])


def verdict(
    answers: list[list[int]],
    expected: list[list[int]],
    logits: list[Tensor],
    theirs: list[Tensor],
    dtype: torch.dtype,
) -> Row:
    """Compare answers.

    Args:
        answers: ours, a list of tokens for each turn.
        expected: those of ``generate``.
        logits: ours, float32 [vocabulary] before each token of all answers.
        theirs: those of ``generate``.
        dtype: the number type that both computed in.

    Returns:
        How many tokens were compared, how far apart the logits were, and the answer: "same", "rounding" or "differs".
    """
    pairs = list(zip(logits, theirs, strict=False))
    largest, tokens, answer = 0.0, 0, "same"
    for ours, other in pairs:
        ours, other = ours.float().cpu(), other.float().cpu()
        largest = max(largest, float((ours - other).abs().max()))
        tokens += 1
        chosen, wanted = int(ours.argmax()), int(other.argmax())
        if chosen != wanted:
            apart = max(float(other[wanted] - other[chosen]), float(ours[chosen] - ours[wanted]))
            rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(other.abs().max())
            answer = "rounding" if apart <= rounding else "differs"
            break
    if answer == "same" and answers != expected:
        answer = "differs"
    return {"tokens_compared": tokens, "of": len(theirs), "largest_logit_difference": largest, "answers": answer}
