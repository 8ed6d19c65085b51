"""The visual information flow, layer by layer: how close text tokens stay to those of the unpruned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vflowopt.compression.pipeline import compress
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.backend import Plan
from vflowopt.runtime.decoder import Decoder
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item
from vflowopt.search.calibration import Calibration


def information_flow(
    runtime: Runtime, calibration: Calibration, strategies: Mapping[str, Strategy]
) -> dict[str, list[float]]:
    """For each strategy, the mean cosine after each decoder layer, over the text after the pictures and all samples.

    Args:
        runtime: the model.
        calibration: prepared samples; their references' answers are part of the text.
        strategies: by name.

    Raises:
        PoolExhausted: an unpruned conversation does not fit into the pool.
    """
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in strategies}
    for number in range(len(calibration.samples)):
        whole = _text_states(runtime, calibration, number, Strategy.full())
        for name, strategy in strategies.items():
            states = _text_states(runtime, calibration, number, strategy)
            cosines[name].append(torch.cosine_similarity(states, whole, dim=-1).mean(1).numpy())
    return {name: np.mean(of_samples, axis=0).tolist() for name, of_samples in cosines.items()}


def _text_states(runtime: Runtime, calibration: Calibration, number: int, strategy: Strategy) -> Tensor:
    """Hidden states [layers, text tokens, hidden] of the text after a sample's picture."""
    sample, answers = calibration.samples[number], calibration.references[number].answers
    image = compress(calibration.encoded[number], strategy, runtime.layers)
    log: list[Item] = []
    for turn, (question, answer) in enumerate(zip(sample.questions, answers, strict=True)):
        log += [*runtime.chat.turn(turn, [question] if turn else [image, question]), *answer]
    conversation = runtime.start(strategy)
    try:
        with _watching(runtime, len(log) - log.index(image) - 1) as states:
            runtime.extend(conversation, log, want_logits=False)
    finally:
        conversation.release()
    return torch.stack(states)


@contextmanager
def _watching(runtime: Runtime, last: int) -> Iterator[list[Tensor]]:
    """Collect the hidden states [last, hidden] of the last tokens after each layer."""
    decoder = runtime.decoder
    watched = _Watched(decoder, last)
    runtime.decoder = watched
    try:
        yield watched.states
    finally:
        runtime.decoder = decoder


class _Watched(Decoder):
    """A decoder that records its layers' outputs for the last tokens."""

    def __init__(self, decoder: Decoder, last: int) -> None:
        self.states: list[Tensor] = []
        self._decoder = decoder
        self._last = last

    def rotary(self, positions: Tensor) -> tuple[Tensor, ...]:
        return self._decoder.rotary(positions)

    def pick(self, rotary: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
        return self._decoder.pick(rotary, kept)

    def run(self, layers: range, hidden: Tensor, rotary: tuple[Tensor, ...], plan: Plan) -> Tensor:
        for layer in layers:
            hidden = self._decoder.run(range(layer, layer + 1), hidden, rotary, plan)
            self.states.append(hidden[-self._last :].float().cpu())
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        return self._decoder.norm(hidden)
