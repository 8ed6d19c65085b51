"""The runtime: encode a picture, prefill, decode. The only place that calls a model.

It walks the decoder's layers itself, so that visual tokens can be dropped between them, and runs the tokens of any
number of conversations as one flat batch. It knows no requests, no sessions and no threads: one thread owns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vflowopt.attention import Span
from vflowopt.cache import PagePool
from vflowopt.chat import ChatFormat
from vflowopt.compression import CompressedImage, compress
from vflowopt.conversation import Conversation, Item, span, tokens_per_stage
from vflowopt.models import MultimodalModel, load_model
from vflowopt.picture import Picture
from vflowopt.strategy import Strategy


class Runtime:
    """A loaded model with its pool of KV pages.

    Args:
        model: the model.
        kv_budget: bytes for keys and values of all conversations together.
        page_size: tokens of a page.

    Attributes:
        chat: how the model writes conversations.
        layers: decoder layers.
        context: positions that the decoder was made for.
        pool: the KV pages.
        revision: short digest of the model's configuration and weights.
    """

    def __init__(self, model: MultimodalModel, *, kv_budget: int, page_size: int = 16) -> None:
        self.model = model
        self.chat = ChatFormat(model.tokenizer, model.image_token, model.stop_ids)
        self.layers = len(model.layers)
        self.context = model.context
        self.pool = PagePool(
            kv_budget,
            page_size=page_size,
            heads=model.heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self.revision = _revision(model)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        kv_budget: int,
        page_size: int = 16,
    ) -> Runtime:
        """Load a model folder or hub id and allocate its pool.

        Raises:
            ModelError: the model cannot be served; it says why.
            ValueError: the budget does not hold one page.
        """
        return cls(load_model(model, device=device, dtype=dtype), kv_budget=kv_budget, page_size=page_size)

    def bytes_per_token(self) -> int:
        """KV bytes of one token in one layer."""
        return self.pool.token_bytes

    @torch.inference_mode()
    def compress(self, pictures: Sequence[Picture], strategy: Strategy) -> list[CompressedImage]:
        """Encode pictures in one batch, and score, prune and recycle each.

        Raises:
            PictureError: the model cannot take a picture of this shape.
            StrategyError: the strategy does not fit the decoder.
        """
        strategy.check(self.layers)
        return [compress(encoded, strategy, self.layers) for encoded in self.model.encode(pictures)]

    def start(self, strategy: Strategy) -> Conversation:
        """An empty conversation.

        Raises:
            StrategyError: the strategy does not fit the decoder.
        """
        strategy.check(self.layers)
        return Conversation(self.pool, strategy, self.layers)

    @torch.inference_mode()
    def extend(self, conversation: Conversation, items: Sequence[Item], *, want_logits: bool = True) -> Tensor | None:
        """Append items to a conversation's log and run everything that its cache does not cover yet.

        Atomic: whatever is raised, the conversation is as it was before.

        Returns:
            float32 logits [vocabulary] after the last item, or None if they are not wanted.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: there is nothing to run.
        """
        before = len(conversation.log)
        conversation.log.extend(items)
        try:
            segment = self._segment(conversation)
            hidden = self._forward([segment])
        except BaseException:
            del conversation.log[before:]
            raise
        return self._logits(hidden[0]) if want_logits else None

    @torch.inference_mode()
    def decode(self, conversations: Sequence[Conversation], tokens: Sequence[int]) -> Tensor:
        """Append one token to each conversation and run them all in one step.

        Conversations need not be equally long, nor share a strategy. Atomic, like :meth:`extend`.

        Returns:
            float32 logits [conversations, vocabulary].

        Raises:
            PoolExhausted: too few pages are free.
        """
        for conversation, token in zip(conversations, tokens, strict=True):
            conversation.log.append(token)
        try:
            hidden = self._forward([self._segment(conversation) for conversation in conversations])
        except BaseException:
            for conversation in conversations:
                del conversation.log[-1]
            raise
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.head(self.model.decoder.norm(hidden)).float()
        return logits

    def _segment(self, conversation: Conversation) -> _Segment:
        """What a conversation has to run, as flat tensors, with room for it reserved in its cache."""
        items = conversation.log[conversation.cached_items :]
        if not items:
            raise ValueError("the conversation has nothing to run: its cache covers its whole log")
        counts = tokens_per_stage(items, len(conversation.cache.stages))
        conversation.cache.reserve(counts)
        embed, last = self.model.decoder.embed_tokens, len(counts) - 1
        embeddings, positions, last_stages = [], [], []
        position = conversation.cached_position
        for run in _runs(items):
            if isinstance(run, CompressedImage):
                embeddings.append(run.embeddings)
                positions.append(run.positions + position)
                last_stages.append(run.last_stages)
                position += run.span
            else:
                embeddings.append(embed(torch.tensor(run, device=self.model.device)))
                positions.append(torch.arange(position, position + len(run)))
                last_stages.append(torch.full((len(run),), last))
                position += len(run)
        return _Segment(conversation, torch.cat(embeddings), torch.cat(positions), torch.cat(last_stages), counts)

    def _forward(self, segments: Sequence[_Segment]) -> Tensor:
        """Run segments through the decoder layers; returns the last hidden state of each [segments, hidden]."""
        device = self.model.device
        hidden = torch.cat([segment.embeddings for segment in segments])[None]
        positions = torch.cat([segment.positions for segment in segments])[None].to(device)
        rotary: tuple[Tensor, Tensor] = self.model.decoder.rotary_emb(hidden, positions)
        present = [segment.last_stages for segment in segments]
        spans = _spans(segments, present)
        for index, layer in enumerate(self.model.layers):
            entered = [segment.conversation.cache.stage_of_layer[index] for segment in segments]
            staying = [stages >= stage for stages, stage in zip(present, entered, strict=True)]
            if not all(bool(stay.all()) for stay in staying):
                kept = torch.cat(staying).nonzero()[:, 0].to(device)
                hidden = hidden[:, kept]
                rotary = (rotary[0][:, kept], rotary[1][:, kept])
                present = [stages[stay] for stages, stay in zip(present, staying, strict=True)]
                spans = _spans(segments, present)
            hidden = _layer_output(layer(hidden, position_embeddings=rotary, spans=spans))
        for segment in segments:
            segment.commit()
        return hidden[0, torch.tensor([span.stop - 1 for span in spans], device=device)]


@dataclass(frozen=True, eq=False)
class _Segment:
    """What one conversation brings into a forward pass: tokens with embeddings [n, hidden] and positions [n].

    ``last_stages`` [n] says in which stage each is still present, ``counts`` how many enter each stage.
    """

    conversation: Conversation
    embeddings: Tensor
    positions: Tensor
    last_stages: Tensor
    counts: Sequence[int]

    def commit(self) -> None:
        """Count the tokens, all written by now, as cached."""
        conversation = self.conversation
        conversation.cached_position += sum(map(span, conversation.log[conversation.cached_items :]))
        conversation.cached_items = len(conversation.log)
        conversation.cache.advance(self.counts)


def _revision(model: MultimodalModel) -> str:
    """Digest of every weight's name, shape and first values: enough to tell two trainings apart, quick at any size."""
    digest = hashlib.sha256(model.network.config.to_json_string().encode())
    for name, weight in model.network.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _runs(items: Sequence[Item]) -> list[list[int] | CompressedImage]:
    """Group consecutive token ids."""
    runs: list[list[int] | CompressedImage] = []
    for item in items:
        if isinstance(item, CompressedImage):
            runs.append(item)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _spans(segments: Sequence[_Segment], present: Sequence[Tensor]) -> list[Span]:
    spans, start = [], 0
    for segment, tokens in zip(segments, present, strict=True):
        spans.append(Span(segment.conversation.cache, start, start + len(tokens)))
        start += len(tokens)
    return spans


def _layer_output(output: Any) -> Tensor:
    """A decoder layer's hidden states; some families return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
