"""Hugging Face ``generate`` as it is used without a serving engine: in a process of its own, one turn at a time.

It batches nothing over conversations, so turns of several wait for each other.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from benchmarks.chat import Chat
from benchmarks.memory import resident_bytes
from benchmarks.system import OpenChat, Reply, System

_MARK = "\ue000"


class TransformersSystem(System):
    """A worker process with a model folder and ``generate``.

    Args:
        name: what tables call it.
        folder: the model.
        keep_cache: keep each conversation's KV cache, so that only what is new is run; else every turn sends
            everything again, the picture included, and its cache is dropped when the turn ends.
        new_tokens: tokens of every answer; the end of text is ignored.
        threads: threads of the model.
        dtype: number type of the model.
    """

    def __init__(
        self, name: str, folder: Path, *, keep_cache: bool, new_tokens: int, threads: int, dtype: str = "float32"
    ) -> None:
        self.name = name
        self._numbers = itertools.count()
        self._worker = ProcessPoolExecutor(
            1, get_context("spawn"), _load, (str(folder), keep_cache, new_tokens, threads, dtype)
        )
        self._process = self._worker.submit(os.getpid).result()

    def open(self, chat: Chat) -> OpenChat:
        """Begin a chat."""
        return _OpenChat(self._worker, next(self._numbers), chat.picture)

    def resident_bytes(self) -> int | None:
        """Memory of the worker process."""
        return resident_bytes(self._process)

    def close(self) -> None:
        """Stop the worker process."""
        self._worker.shutdown()


class _OpenChat(OpenChat):
    def __init__(self, worker: ProcessPoolExecutor, number: int, picture: bytes) -> None:
        self._worker = worker
        self._number = number
        self._picture: bytes | None = picture

    def say(self, question: str) -> Reply:
        begun = time.perf_counter()
        text, tokens, first_token_at, kv_bytes = self._worker.submit(
            _answer, self._number, self._picture, question
        ).result()
        self._picture = None
        # Both processes read the same clock of the machine.
        return Reply(text, tokens, first_token_at - begun, kv_bytes)

    def close(self) -> None:
        self._worker.submit(_forget, self._number).result()


@dataclass
class _Past:
    """A conversation in the worker: its picture, every token of it so far, and the cache if it is kept."""

    picture: bytes
    tokens: list[int] = field(default_factory=list)
    cache: Any = None


class _FirstToken(BaseStreamer):
    """Notes when the first new token comes."""

    def __init__(self) -> None:
        self._calls = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token after token."""
        self._calls += 1
        if self._calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to do."""


class _Generator:
    """The model in the worker, with its conversations."""

    def __init__(self, folder: str, keep_cache: bool, new_tokens: int, dtype: str) -> None:
        self._network: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._processor: Any = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        self._keep_cache = keep_cache
        self._new_tokens = new_tokens
        self._image_tokens: dict[tuple[int, int], int] = {}
        self.pasts: dict[int, _Past] = {}

    @torch.inference_mode()
    def answer(self, past: _Past, question: str) -> tuple[str, int, float, int]:
        """Text, tokens, when the first token came, and bytes of KV cache."""
        inputs: dict[str, torch.Tensor] = {}
        if past.cache is None:
            inputs = self._look(past.picture)
        past.tokens += self._said(question, inputs, first=not past.tokens)
        prompt = torch.tensor([past.tokens])
        first_token = _FirstToken()
        output = self._network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=past.cache,
            min_new_tokens=self._new_tokens,
            max_new_tokens=self._new_tokens,
            do_sample=False,
            streamer=first_token,
            return_dict_in_generate=True,
            **inputs,
        )
        answer: list[int] = output.sequences[0, prompt.shape[1] :].tolist()
        past.tokens += answer
        cache: Any = output.past_key_values
        if self._keep_cache:
            past.cache = cache
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return self._tokenizer.decode(answer, skip_special_tokens=True), len(answer), first_token.at, kv_bytes

    def _look(self, picture: bytes) -> dict[str, torch.Tensor]:
        """The pixels as ``generate`` takes them."""
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        batch = self._processor(pixels, return_tensors="pt", input_data_format="channels_last")
        return {key: batch[key] for key in ("pixel_values", "image_sizes")}

    def _said(self, question: str, inputs: dict[str, torch.Tensor], *, first: bool) -> list[int]:
        """The tokens that a turn adds: its chat template, with the picture in the first one."""
        picture = [{"type": "image"}] if first else []
        turn = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
        before = [
            {"role": "user", "content": [{"type": "text", "text": ""}]},
            {"role": "assistant", "content": [{"type": "text", "text": _MARK}]},
        ]
        text: str = self._tokenizer.apply_chat_template(
            [turn] if first else [*before, turn], tokenize=False, add_generation_prompt=True
        )
        # Only from the end of the answer before: earlier answers enter as the tokens that were generated.
        ids: list[int] = self._tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
        image = self._network.config.image_token_id
        return [each for token in ids for each in [token] * (self._count(inputs) if token == image else 1)]

    def _count(self, inputs: dict[str, torch.Tensor]) -> int:
        """Tokens of a picture: all pictures of a size have the same."""
        size = (int(inputs["image_sizes"][0, 0]), int(inputs["image_sizes"][0, 1]))
        if size not in self._image_tokens:
            features = self._network.get_image_features(**inputs).pooler_output
            self._image_tokens[size] = len(features[0])
        return self._image_tokens[size]


_generator: _Generator
"""The worker process's own; set when it starts."""


def _load(folder: str, keep_cache: bool, new_tokens: int, threads: int, dtype: str) -> None:
    global _generator
    torch.set_num_threads(threads)
    _generator = _Generator(folder, keep_cache, new_tokens, dtype)


def _answer(number: int, picture: bytes | None, question: str) -> tuple[str, int, float, int]:
    if picture is not None:
        _generator.pasts[number] = _Past(picture)
    return _generator.answer(_generator.pasts[number], question)


def _forget(number: int) -> None:
    _generator.pasts.pop(number, None)
