"""Hugging Face's ``generate`` at its best: a static cache, compiled where that can be, for any batch of one picture."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.image_utils import ChannelDimension

from vflowopt.media.picture import Picture
from vflowopt.models.interface import MultimodalModel

_WARM_UP = 8
"""Steps that are not counted: compiling, and capturing graphs, happen in the first few."""


class _Clock(LogitsProcessor):
    """Notes when each step has ended; the logits stay as they are."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores


class Generate:
    """One picture and a question, answered by ``generate``.

    Args:
        model: the model, whose network must still have its weights.
        picture: the picture.
        text: tokens of the question.

    Attributes:
        visual_tokens: tokens of the picture.
    """

    def __init__(self, model: MultimodalModel, picture: Picture, text: int) -> None:
        self._model, self._picture, self._text = model, picture, text
        self._network = model.network
        (encoded,) = model.encode([picture])
        self.visual_tokens = len(encoded.layout)
        self._filled: StaticCache | None = None

    @torch.inference_mode()
    def first_token(self) -> None:
        """From the picture to the first token, the picture's preprocessing included."""
        self._network.generate(**self._inputs(), max_new_tokens=1, do_sample=False)

    @torch.inference_mode()
    def decode(self, batch: int, steps: int, *, compiled: bool) -> tuple[float, int]:
        """Median milliseconds of a step that adds a token to each sequence of a batch.

        The prompt is run for one sequence, and its keys and values are copied to the others.

        Args:
            batch: sequences.
            steps: steps that count.
            compiled: whether ``generate`` may compile its steps, which it does on CUDA devices.

        Returns:
            The milliseconds, and how many graphs were compiled.
        """
        inputs = self._inputs()
        length = inputs["input_ids"].shape[1]
        new = steps + _WARM_UP
        config = self._network.config.get_text_config(decoder=True)
        alone = StaticCache(config=config, max_cache_len=length)
        self._network(**inputs, past_key_values=alone, use_cache=True, logits_to_keep=1)
        cache = StaticCache(config=config, max_cache_len=length + new + 1)
        for index, layer in enumerate(alone.layers):
            cache.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), layer_idx=index)
        del alone
        deltas = getattr(self._network.model, "rope_deltas", None)
        if deltas is not None:
            self._network.model.rope_deltas = deltas[:1].expand(batch, *deltas.shape[1:])
        ids = torch.cat((inputs["input_ids"], inputs["input_ids"][:, -1:]), dim=1).expand(batch, -1)
        clock, before = _Clock(), counters["stats"]["unique_graphs"]
        self._network.generate(
            input_ids=ids.contiguous(),
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            disable_compile=not compiled,
            logits_processor=LogitsProcessorList([clock]),
        )
        ends = clock.times[_WARM_UP - 1 :]
        each = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
        return 1e3 * statistics.median(each), counters["stats"]["unique_graphs"] - before

    def _inputs(self) -> dict[str, Any]:
        """What ``generate`` takes of the picture and the question, on the device."""
        batch = self._model.processor(
            [self._picture.pixels], return_tensors="pt", input_data_format=ChannelDimension.LAST
        )
        image = self._network.config.image_token_id
        ids = torch.tensor([[*[image] * self.visual_tokens, *[0] * self._text]], device=self._model.device)
        inputs = {name: values.to(self._model.device) for name, values in batch.items()}
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = ids.eq(image).int()
        return inputs
