"""The runtime: encode a picture, prefill, decode. The only place that calls a model.

It runs the decoder layer by layer, so that visual tokens can be dropped between layers, and runs the tokens of any
number of sequences as one flat batch. It knows no requests and no sessions. Only one thread may run sequences at a
time; another may compress pictures meanwhile.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vflowopt.compression.pieces import Pieces, whole
from vflowopt.compression.pipeline import CompressedImage, compressing
from vflowopt.compression.strategy import Strategy
from vflowopt.kernels.decode_kernel import build_decode_kernel
from vflowopt.kernels.diversity_kernel import diversity_kernel
from vflowopt.media.video import Video, Visual
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import DTYPES, load_model
from vflowopt.models.revision import earlier_revisions, first_values, revision
from vflowopt.runtime.attention import SdpaBackend
from vflowopt.runtime.backend import Backend, BackendName, Plan
from vflowopt.runtime.backend_choice import build_backend, choose_backend
from vflowopt.runtime.batch import Chunk, joined, next_chunk
from vflowopt.runtime.cache import PagePool, StagedCache, reserve
from vflowopt.runtime.chat import ChatFormat
from vflowopt.runtime.cuda_graph import DecodeGraphs, DecodePlan, Rotary
from vflowopt.runtime.decoder import build_decoder
from vflowopt.runtime.sampling import Sampler, sample
from vflowopt.runtime.sequence import Item, Sequence, tokens_per_stage

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Types in which keys and values can be stored, by name."""


class Runtime:
    """A loaded model with its pool of KV pages.

    Args:
        model: the model.
        kv_budget: bytes for the keys and values of all sequences together.
        page_size: tokens of a page.
        tower_dtype: type that the vision tower is converted to; None: it stays as it is.
        kv_dtype: type of the stored keys and values, one of :data:`KV_DTYPES`; None: the model's.
        attention: the attention backend; None: the best one on the model's device.

    Attributes:
        backend: computes attention.
        model: the model.
        chat: turns the parts of a chat turn into items of a log.
        layers: number of decoder layers.
        decoder: runs the decoder layers.
        context: positions in the model's context.
        pool: the KV pages.

    Raises:
        ModelError: the vision tower cannot be of another type than the decoder.
        ValueError: the budget does not hold one page, or the attention backend does not work here.
    """

    def __init__(
        self,
        model: MultimodalModel,
        *,
        kv_budget: int,
        page_size: int = 16,
        tower_dtype: torch.dtype | None = None,
        kv_dtype: str | None = None,
        attention: BackendName | None = None,
    ) -> None:
        self.model = model
        self.chat = ChatFormat(model.tokenizer, model.image_token, model.stop_ids, model.video_mark)
        self.layers = len(model.layers)
        self.context = model.context
        self.pool = PagePool(
            kv_budget,
            page_size=page_size,
            heads=model.heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            stored_as=None if kv_dtype is None else KV_DTYPES[kv_dtype],
            device=model.device,
        )
        self._first_values = first_values(model)
        self.decoder = build_decoder(model.decoder, fuse=not model.shared)
        if tower_dtype is not None:
            model.set_tower_dtype(tower_dtype)
        if not model.shared:
            model.fuse()
        self._graphs: DecodeGraphs | None = None
        self._products_per_token = model.decoder.config.hidden_size * model.decoder.config.intermediate_size
        heads = model.decoder.config.num_attention_heads
        layer: int = sum(weight.numel() for weight in model.layers[0].parameters() if weight.dim() > 1)
        self._context_per_token: float = layer / (2 * heads * model.head_dim)
        if model.device.type == "cpu":
            diversity_kernel()  # so that the first picture does not wait for a compiler
        self.backend = self._build_backend(heads, attention)
        # A quantizer's operations may wait for the device, which a capture does not allow.
        if model.device.type == "cuda" and not model.quantized:
            self._graphs = DecodeGraphs(
                self.pool, self.layers, rotary=self.decoder.rotary, step=self._step, backend=self.backend
            )

    def _build_backend(self, heads: int, name: BackendName | None) -> Backend:
        pool = self.pool
        if name is None and pool.keys.device.type == "cpu":
            compiled = pool.keys.dtype == pool.dtype == torch.float32
            return SdpaBackend(
                pool,
                build_decode_kernel(self.model.head_dim, heads, self.model.heads, pool.page_size) if compiled else None,
            )
        backend = choose_backend(pool, heads) if name is None else build_backend(name, pool, heads)
        if backend is None:
            raise ValueError(f"the attention backend {name!r} does not work here; the log says why")
        return backend

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        quantization: str | None = None,
        tower_dtype: str | None = None,
        kv_budget: int,
        page_size: int = 16,
        kv_dtype: str | None = None,
        attention: BackendName | None = None,
    ) -> Runtime:
        """Load a model and allocate its pool.

        Args:
            model: a folder or hub id; see :func:`vflowopt.models.load_model` for this and the next three.
            device: a torch device.
            dtype: a torch type, by name.
            quantization: how to quantize the weights; None: they stay as they are.
            tower_dtype: a torch type, by name, for the vision tower; None: as ``dtype``.
            kv_budget: bytes for the keys and values of all sequences together.
            page_size: tokens of a page.
            kv_dtype: type of the stored keys and values, one of :data:`KV_DTYPES`; None: ``dtype``.
            attention: the attention backend; None: the best one on the device.

        Raises:
            ModelError: the model cannot be served; the message says why.
            ValueError: the budget does not hold one page, or the attention backend does not work here.
        """
        loaded = load_model(model, device=device, dtype=dtype, quantization=quantization)
        return cls(
            loaded,
            kv_budget=kv_budget,
            page_size=page_size,
            tower_dtype=None if tower_dtype is None else DTYPES[tower_dtype],
            kv_dtype=kv_dtype,
            attention=attention,
        )

    @cached_property
    def revision(self) -> str:
        """Short digest of all that the model's answers depend on; see :func:`vflowopt.models.revision.revision`.

        Raises:
            ModelError: a file of the model cannot be read any more.
        """
        return revision(self.model, self.pool.keys.dtype)

    def earlier_revisions(self) -> frozenset[str]:
        """See :func:`vflowopt.models.revision.earlier_revisions`."""
        return earlier_revisions(self.model, self._first_values, self.pool.keys.dtype)

    def bytes_per_token(self) -> int:
        """KV bytes of one token in one layer."""
        return self.pool.token_bytes

    def compress(self, visuals: abc.Sequence[Visual], strategy: Strategy) -> list[CompressedImage]:
        """Encode pictures in one batch and videos one by one, and score, prune and recycle each.

        Args:
            visuals: pictures and videos, in any order.
            strategy: says how many tokens each stage keeps.

        Returns:
            A compressed image for each, in the same order.

        Raises:
            PictureError: the model cannot take a picture of this shape, or takes no videos.
            StrategyError: the strategy does not fit the decoder.
        """
        return whole(self.compressing(visuals, strategy))

    @torch.inference_mode()
    def compressing(self, visuals: abc.Sequence[Visual], strategy: Strategy) -> Pieces[list[CompressedImage]]:
        """:meth:`compress` in pieces: some frames or tiles in each, whatever the length of a video."""
        strategy.check(self.layers)
        pictures = [visual for visual in visuals if not isinstance(visual, Video)]
        of_pictures = iter((yield from self.model.encoding(pictures)) if pictures else ())
        compressed = []
        for visual in visuals:
            encoded = (yield from self.model.encoding_video(visual)) if isinstance(visual, Video) else next(of_pictures)
            compressed.append((yield from compressing(encoded, strategy, self.layers)))
        return compressed

    def relative_cost(self, context: int) -> float:
        """What it takes to run a token behind ``context`` cached ones, in tokens with nothing before them.

        An estimate by multiplications: those of a layer's matrices, and those of attention to the context.
        """
        return 1.0 + context / self._context_per_token

    def start(self, strategy: Strategy) -> Sequence:
        """Start an empty sequence.

        Args:
            strategy: every picture of the sequence must be compressed by it.

        Raises:
            StrategyError: the strategy does not fit the decoder.
        """
        strategy.check(self.layers)
        return Sequence(self.pool, strategy, self.layers)

    def extend(self, sequence: Sequence, items: abc.Sequence[Item], *, want_logits: bool = True) -> Tensor | None:
        """Append items to a sequence's log and run everything that its cache does not cover yet.

        Atomic: if it raises, the sequence is as it was before.

        Args:
            sequence: what to extend.
            items: token ids and compressed pictures.
            want_logits: False if the logits are not needed.

        Returns:
            float32 logits [vocabulary] after the last item; None if they are not wanted, or if the log ends with tokens
            of a picture that do not reach the last stage.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: there is nothing to run.
        """
        before = sequence.checkpoint()
        sequence.log.extend(items)
        try:
            (logits,) = self.advance([sequence], want_logits=want_logits)
        except BaseException:
            sequence.rollback(before)
            raise
        return logits

    def decode(self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int]) -> Tensor:
        """Append one token to each sequence and run them all in one step.

        Sequences may differ in length and strategy. Atomic, like :meth:`extend`.

        Args:
            sequences: all different.
            tokens: one for each sequence.

        Returns:
            float32 logits [sequences, vocabulary].

        Raises:
            PoolExhausted: too few pages are free.
        """
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.log.append(token)
        try:
            logits = self.advance(sequences)
        except BaseException:
            for sequence in sequences:
                del sequence.log[-1]
            raise
        return torch.stack([row for row in logits if row is not None])

    @torch.inference_mode()
    def advance(
        self,
        sequences: abc.Sequence[Sequence],
        limits: abc.Sequence[int | None] | None = None,
        *,
        want_logits: bool = True,
    ) -> list[Tensor | None]:
        """Run what the caches of sequences do not cover of their logs yet, all in one batch.

        Atomic: if it raises, every sequence is as it was before.

        Args:
            sequences: each with something to run; all different.
            limits: for each, the most tokens to run (first-stage tokens, at least 1); None: all of them.
            want_logits: False if the logits are not needed.

        Returns:
            For each sequence, float32 logits [vocabulary] after its last item; None if they are not wanted, if
            something is left to run, or if the log ends with tokens of a picture that do not reach the last stage.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: a sequence has nothing to run.
        """
        logits: list[Tensor | None] = [None] * len(sequences)

        def run(chunks: abc.Sequence[Chunk]) -> None:
            done = [place for place, chunk in enumerate(chunks) if want_logits and chunk.reaches_the_end]
            for place, row in zip(done, self._logits(chunks, done), strict=True):
                logits[place] = row

        self._run(sequences, limits or [None] * len(sequences), run)
        return logits

    @torch.inference_mode()
    def step(
        self,
        sequences: abc.Sequence[Sequence],
        limits: abc.Sequence[int | None],
        samplers: abc.Sequence[Sampler | None],
    ) -> list[int | None]:
        """Run what the caches of sequences do not cover of their logs yet, in one batch, and draw the next tokens.

        The host waits for the device once, whatever the size of the batch. Atomic: if it raises, every sequence is as
        it was before. The logs do not grow: the caller appends the tokens.

        Args:
            sequences: each with something to run; all different.
            limits: for each, the most tokens to run (first-stage tokens, at least 1); None: all of them.
            samplers: for each, what draws its next token; None: no token is wanted.

        Returns:
            For each sequence, the token that follows its log; None if none is wanted, if something is left to run, or
            if the log ends with tokens of a picture that do not reach the last stage.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: a sequence has nothing to run.
        """
        tokens: list[int | None] = [None] * len(sequences)

        def run(chunks: abc.Sequence[Chunk]) -> None:
            drawn = {
                place: sampler
                for place, (chunk, sampler) in enumerate(zip(chunks, samplers, strict=True))
                if sampler is not None and chunk.reaches_the_end
            }
            logits = self._logits(chunks, list(drawn))
            for place, token in zip(drawn, sample(logits, list(drawn.values())) if drawn else (), strict=True):
                tokens[place] = token

        self._run(sequences, limits, run)
        return tokens

    def synchronize(self) -> None:
        """Wait until the device has done all that this thread queued. Returns at once on the CPU, which queues nothing.

        What another thread has queued on a stream of its own is not waited for.
        """
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    @torch.inference_mode()
    def states(self, sequences: abc.Sequence[Sequence], items: abc.Sequence[abc.Sequence[int]]) -> list[Tensor]:
        """Run all that the caches of sequences do not cover yet, in one batch, and return hidden states.

        Atomic: if it raises, every sequence is as it was before.

        Args:
            sequences: each with something to run; all different.
            items: for each, the places in its log whose states are wanted: tokens of text that its cache does not
                cover yet.

        Returns:
            For each sequence, float32 [places, hidden]: the hidden states after the last layer and its norm, which
            are the input of the output head.

        Raises:
            PoolExhausted: too few pages are free.
            ValueError: a sequence has nothing to run, or a place is not a token of text that is still to be run.
        """
        for each, places in zip(sequences, items, strict=True):
            for place in places:
                if not (each.num_cached_items <= place < len(each.log) and isinstance(each.log[place], int)):
                    raise ValueError(f"item {place} of the log is no token of text that is still to be run")
        by_sequence: list[Tensor] = []

        def run(chunks: abc.Sequence[Chunk]) -> None:
            rows = [
                (number, tokens_per_stage(each.log[place + 1 :], len(each.cache.stages))[-1])
                for number, (each, places) in enumerate(zip(sequences, items, strict=True))
                for place in places
            ]
            states: Tensor = self.decoder.norm(self._forward(chunks, rows)).float()
            by_sequence.extend(states.split(list(map(len, items))))

        self._run(sequences, [None] * len(sequences), run)
        return by_sequence

    @torch.inference_mode()
    def most_likely(self, states: Tensor) -> list[int]:
        """The most likely token after each of ``states``, [n, hidden], which :meth:`states` returned."""
        tokens: list[int] = []
        for some in states.split(_MOST_ROWS):
            tokens += self.model.head(some.to(self.model.device, self.model.dtype)).float().argmax(-1).tolist()
        return tokens

    def _run(
        self,
        sequences: abc.Sequence[Sequence],
        limits: abc.Sequence[int | None],
        run: Callable[[abc.Sequence[Chunk]], None],
    ) -> None:
        """Reserve pages for what each sequence has to run, ``run`` it, and count it as cached unless that raises."""
        threads = torch.get_num_threads()
        try:
            chunks = [next_chunk(each, limit) for each, limit in zip(sequences, limits, strict=True)]
            reserve([each.cache for each in sequences], [chunk.counts for chunk in chunks])
            small = self._products_per_token * sum(map(len, chunks)) < _ENOUGH_FOR_THREADS
            if small and threads > 1:
                torch.set_num_threads(1)
            run(chunks)
        except BaseException:
            for sequence in sequences:
                sequence.cache.truncate(sequence.cache.lengths)  # gives back the pages that were reserved
            raise
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
        for chunk in chunks:
            chunk.commit()

    def _logits(self, chunks: abc.Sequence[Chunk], wanted: abc.Sequence[int]) -> Tensor:
        """Run chunks; float32 logits [wanted, vocabulary] after the last tokens of the ``wanted`` ones."""
        caches = [chunk.sequence.cache for chunk in chunks]
        if self._graphs is not None and all(chunk.is_one_token for chunk in chunks) and self._graphs.suit(caches):
            tokens = [int(chunk.pieces[0][0]) for chunk in chunks]
            positions = [int(chunk.positions[0]) for chunk in chunks]
            return self._graphs.run(caches, tokens, positions)[list(wanted)]
        return self._head(self._forward(chunks, [(place, 0) for place in wanted]))

    def _step(self, tokens: Tensor, rotary: Rotary, plan: DecodePlan) -> Tensor:
        """A token of each sequence through all layers; see :class:`vflowopt.runtime.cuda_graph.DecodeGraphs`."""
        embeddings: Tensor = self.model.decoder.embed_tokens(tokens)
        return self._head(self.decoder.run(range(self.layers), embeddings, rotary, plan))

    def _head(self, hidden: Tensor) -> Tensor:
        """float32 logits [n, vocabulary] of hidden states [n, hidden] after the last layer."""
        logits: Tensor = self.model.head(self.decoder.norm(hidden)).float()
        return logits

    def _plan(self, layers: range, caches: abc.Sequence[StagedCache], counts: abc.Sequence[int]) -> Plan:
        return self.backend.plan(layers, caches, counts)

    def _forward(self, chunks: abc.Sequence[Chunk], wanted: abc.Sequence[tuple[int, int]]) -> Tensor:
        """Run chunks through the decoder layers; hidden states [wanted, hidden] after the last one.

        Args:
            chunks: what to run.
            wanted: for each state, its chunk, and how many tokens of that chunk that reach the last layer come after
                it.
        """
        # Decodes come first, as the attention plan requires.
        lengths = [chunk.positions.shape[-1] for chunk in chunks]
        decodes = [place for place, length in enumerate(lengths) if length == 1]
        order = [*decodes, *[place for place, length in enumerate(lengths) if length > 1]]
        chunks = [chunks[place] for place in order]
        # Tokens of an answer go through all stages; most steps run nothing else.
        may_shrink = len([chunk for chunk in chunks if chunk.last_stages is not None]) > 0
        device = self.model.device
        caches = [chunk.sequence.cache for chunk in chunks]
        embeddings = self._embed([piece for chunk in chunks for piece in chunk.pieces])
        # The further features are added to the outputs of the first layers (deepstack), and dropped with their token.
        hidden: Tensor
        hidden, *later = embeddings.split(self.model.decoder.embed_tokens.embedding_dim, dim=-1)
        rotary = self.decoder.rotary(torch.from_numpy(joined([chunk.positions for chunk in chunks])))
        here = [0] * len(chunks)  # the stage that each chunk is in
        for layers in _runs_within_stages(caches, self.layers, alone=len(later)):
            entered = [cache.stage_of_layer[layers.start] for cache in caches]
            staying = (
                [chunk.staying(before, stage) for chunk, before, stage in zip(chunks, here, entered, strict=True)]
                if may_shrink
                else []
            )
            if any(stay is not None for stay in staying):
                counts = [chunk.counts[before] for chunk, before in zip(chunks, here, strict=True)]
                every = [
                    np.ones(count, bool) if stay is None else stay for stay, count in zip(staying, counts, strict=True)
                ]
                kept = torch.from_numpy(np.concatenate(every).nonzero()[0]).to(device)
                hidden, rotary = hidden[kept], self.decoder.pick(rotary, kept)
                later = [features[kept] for features in later]
            here = entered
            if not len(hidden):
                break  # the batch is a chunk of a picture, and no token of it reaches this stage
            counts = [chunk.counts[stage] for chunk, stage in zip(chunks, here, strict=True)]
            hidden = self.decoder.run(layers, hidden, rotary, self._plan(layers, caches, counts))
            if layers.stop <= len(later):
                hidden = hidden + later[layers.stop - 1]
        last = np.empty(len(order), np.int64)
        last[order] = np.cumsum([chunk.counts[stage] for chunk, stage in zip(chunks, here, strict=True)]) - 1
        rows = np.array([last[place] - after for place, after in wanted], np.int64)
        return hidden[torch.from_numpy(rows).to(device)]

    def _embed(self, pieces: abc.Sequence[list[int] | Tensor]) -> Tensor:
        """Embeddings [tokens, width] of pieces, which are token ids or embeddings; padded to the widest of these."""
        ids = [token for piece in pieces if isinstance(piece, list) for token in piece]
        words: Tensor = self.model.decoder.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=self.model.device))
        if len(ids) == sum(map(len, pieces)):
            return words
        widest = max(piece.shape[1] for piece in pieces if isinstance(piece, Tensor))
        words = nn.functional.pad(words, (0, widest - words.shape[1]))
        in_turn = iter(words.split([len(piece) for piece in pieces if isinstance(piece, list)]))
        return torch.cat([next(in_turn) if isinstance(piece, list) else piece for piece in pieces])


_MOST_ROWS = 256
"""Rows of logits over the vocabulary in memory at a time: thousands would take gigabytes."""

_ENOUGH_FOR_THREADS = 8 << 20
"""Multiplications in one matrix product of a layer from which on several threads pay off.

In a small step, threads wait for each other longer than they compute, and they wait busily: on two cores a second
thread made decode steps three times as slow, and left no processor time for the threads that send the answers."""


def _runs_within_stages(caches: abc.Sequence[StagedCache], layers: int, alone: int) -> list[range]:
    """Runs of layers within which no cache changes stage; each of the first ``alone`` layers is a run of its own."""
    first = range(1, min(alone + 1, layers))
    starts = sorted({stage.layers.start for cache in caches for stage in cache.stages}.union(first))
    return [range(start, end) for start, end in zip(starts, (*starts[1:], layers), strict=True)]
