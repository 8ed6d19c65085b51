"""The runtime: encode a picture, prefill, decode. The only place that calls a model.

It walks the decoder's layers itself, so that visual tokens can be dropped between them, and runs the tokens of any
number of conversations as one flat batch. It knows no requests, no sessions and no threads: one thread owns it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vflowopt.attention import AttentionPlan
from vflowopt.cache import PagePool, StagedCache
from vflowopt.chat import ChatFormat
from vflowopt.compression import CompressedImage, compress
from vflowopt.conversation import Conversation, Item, Progress
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

    def extend(self, conversation: Conversation, items: Sequence[Item], *, want_logits: bool = True) -> Tensor | None:
        """Append items to a conversation's log and run everything that its cache does not cover yet.

        Atomic: whatever is raised, the conversation is as it was before.

        Returns:
            float32 logits [vocabulary] after the last item, or None if they are not wanted.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: there is nothing to run.
        """
        before = conversation.checkpoint()
        conversation.log.extend(items)
        try:
            (logits,) = self.advance([conversation], want_logits=want_logits)
        except BaseException:
            conversation.rollback(before)
            raise
        return logits

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
            logits = self.advance(conversations)
        except BaseException:
            for conversation in conversations:
                del conversation.log[-1]
            raise
        return torch.stack([row for row in logits if row is not None])

    @torch.inference_mode()
    def advance(
        self,
        conversations: Sequence[Conversation],
        limits: Sequence[int | None] | None = None,
        *,
        want_logits: bool = True,
    ) -> list[Tensor | None]:
        """Run what the caches of conversations do not cover of their logs yet, all in one batch.

        Args:
            conversations: each with something to run; all different.
            limits: tokens to run of each at most (first-stage tokens, at least 1); None: all of them.
            want_logits: False where nobody will read them.

        Returns:
            For each conversation, float32 logits [vocabulary] after its last item, or None where they are not wanted,
            something is left to run, or the log ends with tokens of a picture that do not reach the last stage.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: a conversation has nothing to run.

            Whatever is raised, every conversation is as it was before.
        """
        limits = limits or [None] * len(conversations)
        logits: list[Tensor | None] = [None] * len(conversations)
        try:
            segments = [self._segment(each, limit) for each, limit in zip(conversations, limits, strict=True)]
            done = [place for place, segment in enumerate(segments) if want_logits and segment.reaches_the_end]
            hidden = self._forward(segments, done)
            if done:
                rows: Tensor = self.model.head(self.model.decoder.norm(hidden)).float()
                for place, row in zip(done, rows, strict=True):
                    logits[place] = row
        except BaseException:
            for conversation in conversations:
                conversation.cache.truncate(conversation.cache.lengths)  # gives back the room reserved in vain
            raise
        for segment in segments:
            segment.commit()
        return logits

    def _segment(self, conversation: Conversation, limit: int | None) -> _Segment:
        """What a conversation has to run, as flat tensors, with room for it reserved in its cache."""
        items, offset = conversation.log[conversation.cached.items :], conversation.cached.offset
        if not items:
            raise ValueError("the conversation has nothing to run: its cache covers its whole log")
        last = len(conversation.cache.stages) - 1
        embeddings, positions, last_stages = [], [], []
        position, whole, left = conversation.cached.position, conversation.cached.items, limit or sys.maxsize
        for run in _runs(items):
            if isinstance(run, CompressedImage):
                part = slice(offset, offset + left)
                embeddings.append(run.embeddings[part])
                positions.append(run.positions[part] + position)
                last_stages.append(run.last_stages[part])
                left -= len(positions[-1])
                offset += len(positions[-1])
                if offset < len(run.positions):
                    break
                position, whole, offset = position + run.span, whole + 1, 0
            else:
                run = run[:left]
                embeddings.append(self.model.decoder.embed_tokens(torch.tensor(run, device=self.model.device)))
                positions.append(torch.arange(position, position + len(run)))
                last_stages.append(torch.full((len(run),), last))
                left -= len(run)
                position, whole = position + len(run), whole + len(run)
            if not left:
                break
        stages = torch.cat(last_stages)
        counts = [int((stages >= stage).sum()) for stage in range(last + 1)]
        conversation.cache.reserve(counts)
        to = Progress(whole, offset, position)
        return _Segment(conversation, torch.cat(embeddings), torch.cat(positions), stages, counts, to)

    def _forward(self, segments: Sequence[_Segment], wanted: Sequence[int]) -> Tensor:
        """Run segments through the decoder layers; the last hidden state of the ``wanted`` ones [wanted, hidden]."""
        # Single tokens first, as the attention plan wants them.
        order = sorted(range(len(segments)), key=lambda place: len(segments[place].positions) > 1)
        segments = [segments[place] for place in order]
        device = self.model.device
        caches = [segment.conversation.cache for segment in segments]
        hidden = torch.cat([segment.embeddings for segment in segments])[None]
        positions = torch.cat([segment.positions for segment in segments])[None].to(device)
        rotary: tuple[Tensor, Tensor] = self.model.decoder.rotary_emb(hidden, positions)
        present = [segment.last_stages for segment in segments]
        for layers in _runs_within_stages(caches, self.layers):
            entered = [cache.stage_of_layer[layers.start] for cache in caches]
            staying = [stages >= stage for stages, stage in zip(present, entered, strict=True)]
            if not all(bool(stay.all()) for stay in staying):
                kept = torch.cat(staying).nonzero()[:, 0].to(device)
                hidden = hidden[:, kept]
                rotary = (rotary[0][:, kept], rotary[1][:, kept])
                present = [stages[stay] for stages, stay in zip(present, staying, strict=True)]
            if not hidden.shape[1]:
                break  # a chunk of a picture of which nothing goes further
            plan = AttentionPlan(self.pool, layers, caches, [len(stages) for stages in present])
            for layer in layers:
                hidden = _layer_output(self.model.layers[layer](hidden, position_embeddings=rotary, plan=plan))
        rows = torch.empty(len(order), dtype=torch.int64)
        rows[order] = torch.tensor([len(stages) for stages in present]).cumsum(0) - 1
        return hidden[0, rows[list(wanted)].to(device)]


@dataclass(frozen=True, eq=False)
class _Segment:
    """What one conversation brings into a forward pass: tokens with embeddings [n, hidden] and positions [n].

    ``last_stages`` [n] says in which stage each is still present, ``counts`` how many enter each stage, ``to`` how far
    the conversation's cache comes by them.
    """

    conversation: Conversation
    embeddings: Tensor
    positions: Tensor
    last_stages: Tensor
    counts: Sequence[int]
    to: Progress

    @property
    def reaches_the_end(self) -> bool:
        """Whether it runs the last of the log, through all layers."""
        return self.to.items == len(self.conversation.log) and self.counts[-1] > 0

    def commit(self) -> None:
        """Count the tokens, all written by now, as cached."""
        self.conversation.cached = self.to
        self.conversation.cache.advance(self.counts)


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


def _runs_within_stages(caches: Sequence[StagedCache], layers: int) -> list[range]:
    """Cut the decoder into runs of layers within which none of the caches changes stage."""
    starts = sorted({stage.layers.start for cache in caches for stage in cache.stages})
    return [range(start, end) for start, end in zip(starts, (*starts[1:], layers), strict=True)]


def _layer_output(output: Any) -> Tensor:
    """A decoder layer's hidden states; some families return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
