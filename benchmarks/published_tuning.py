"""The published search's schedule: every trial computes everything it needs again, one sample at a time.

The released script encodes the picture and runs the unpruned model for every sample of every trial, and asks a single
question each. Only the schedule is rebuilt here, on this runtime: what it costs is compared, not what it finds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vflowopt.compression.pipeline import EncodedImage, compress
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Sample


@torch.inference_mode()
def published_cosine(runtime: Runtime, sample: Sample, question: str, strategy: Strategy) -> float:
    """Run one trial of the published schedule on one sample with one question; returns the cosine.

    Raises:
        PoolExhausted: the unpruned conversation does not fit into the pool.
    """
    (encoded,) = runtime.model.encode([sample.picture])
    whole, pruned = (_last_state(runtime, encoded, question, each) for each in (Strategy.full(), strategy))
    return float(torch.cosine_similarity(whole, pruned, dim=0))


def _last_state(runtime: Runtime, encoded: EncodedImage, question: str, strategy: Strategy) -> Tensor:
    """The last token's hidden state [hidden] after the last layer, at the end of the prompt."""
    conversation = runtime.start(strategy)
    conversation.log += runtime.chat.turn(0, [compress(encoded, strategy, runtime.layers), question])
    try:
        (states,) = runtime.states([conversation], [[len(conversation.log) - 1]])
    finally:
        conversation.release()
    return states[0]
