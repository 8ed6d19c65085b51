"""Attention of the decoder over the paged cache: registered with Hugging Face, called by its own layers.

Hugging Face's layers look attention up by name and pass keyword arguments through. A forward pass over a ragged batch
gives them the tokens of all sequences as *one* row. The registered function writes the new keys and values to the
caches, and then attends, sequence by sequence, to each sequence's context.

An :class:`AttentionPlan` computes the slots of a batch once for all layers of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vflowopt.kernels.decode_kernel import DecodeKernel
from vflowopt.runtime.backend import BackendName, DecodeAttention, Plan
from vflowopt.runtime.cache import PagePool, StagedCache
from vflowopt.runtime.rope import apply_rope

PAGED = "vflow_paged"


class AttentionPlan:
    """Where the tokens of a flat batch are written and read, for a run of layers within which no cache changes stage.

    A sequence with one token in the batch is a decode; one with more tokens is a prefill.

    Args:
        pool: the caches' pages.
        layers: the run of layers.
        caches: the caches of the batch, in order, with pages reserved; decodes first.
        counts: how many tokens each sequence runs in these layers.
        kernel: computes the attention of the decodes; None: PyTorch's attention does.

    Attributes:
        pool: as given.
        first_layer: the first layer of the run.
        decodes: the number of decodes.
        rotates: whether :meth:`attend_unrotated` can be called.
        write_slots: int64 [layers, tokens], the slots of the new keys and values.
        prefills: for each prefill, its tokens in the batch; the slots of its context, int64 [layers, context_len]; and
            which of these each token attends to, bool [tokens, context_len]. Both are None if the context is nothing
            but the tokens themselves.
    """

    def __init__(
        self,
        pool: PagePool,
        layers: range,
        caches: Sequence[StagedCache],
        counts: Sequence[int],
        kernel: DecodeKernel | None = None,
    ) -> None:
        self.pool = pool
        self._kernel = kernel
        self.first_layer = layers.start
        tables = [cache.stages[cache.stage_of_layer[layers.start]] for cache in caches]
        self._pages = [
            table.pages[layers.start - table.layers.start : layers.stop - table.layers.start] for table in tables
        ]
        self._context_lens = [table.length + count for table, count in zip(tables, counts, strict=True)]
        self.decodes = next((place for place, count in enumerate(counts) if count != 1), len(counts))
        written = [self._plan_decodes(len(layers))] if self.decodes else []
        written += [
            pool.slots_of(pages, range(end - count, end))
            for pages, end, count in zip(
                self._pages[self.decodes :], self._context_lens[self.decodes :], counts[self.decodes :], strict=True
            )
        ]
        self.write_slots = torch.from_numpy(np.concatenate(written, axis=1)).to(pool.keys.device)
        self.prefills = self._plan_prefills(counts)
        self.rotates = kernel is not None and self.decodes > 0

    def _plan_decodes(self, layers: int) -> np.ndarray:
        """The slots of the decodes' tokens, int64 [layers, decodes]; also sets the decodes' block tables and mask.

        The decodes attend together, padded to the longest of them by whole pages.

        A sequence is padded with its own last page, so that wrong numbers in another sequence (NaN times a weight of
        zero is NaN) cannot reach it. That page holds nothing of an earlier owner: it was zeroed.
        """
        context_lens, size = self._context_lens[: self.decodes], self.pool.page_size
        num_blocks = -(-max(context_lens) // size)
        pages = np.empty((layers, self.decodes, num_blocks), np.int64)
        last = np.empty((layers, self.decodes), np.int64)
        for place, length in enumerate(context_lens):
            own = -(-length // size)
            pages[:, place, :own] = self._pages[place][:, :own]
            pages[:, place, own:] = self._pages[place][:, own - 1 : own]
            last[:, place] = self._pages[place][:, own - 1]
        device = self.pool.keys.device
        self.decode_block_tables = torch.from_numpy(pages).to(device)
        """int64 [layers, decodes, blocks]."""
        self.decode_context_lens = torch.tensor(context_lens)
        """int64 [decodes], on the host: the tokens of each context, the new one included."""
        self.decode_mask: Tensor | None = None
        """[decodes, 1, 1, blocks * page_size], minus infinity after the end of each context; None if no context ends
        before its blocks do, or if a kernel reads the lengths."""
        if self._kernel is None and any(length != num_blocks * size for length in context_lens):
            valid = np.arange(num_blocks * size) < np.array(context_lens)[:, None]
            mask = np.where(valid, np.float32(0), np.float32(-np.inf))[:, None, None]
            self.decode_mask = torch.from_numpy(mask).to(device, self.pool.dtype)
        slots: np.ndarray = last * size + (np.array(context_lens) - 1) % size
        return slots

    def _plan_prefills(self, counts: Sequence[int]) -> list[tuple[slice, Tensor | None, Tensor | None]]:
        prefills: list[tuple[slice, Tensor | None, Tensor | None]] = []
        device, start = self.pool.keys.device, self.decodes
        for pages, end, count in list(zip(self._pages, self._context_lens, counts, strict=True))[self.decodes :]:
            tokens = slice(start, start + count)
            start += count
            if not count:
                continue  # a chunk of a picture, and none of its tokens reaches this stage
            if count == end:
                prefills.append((tokens, None, None))
            else:
                mask = torch.ones(count, end, dtype=torch.bool, device=device).tril(end - count)
                slots = torch.from_numpy(self.pool.slots_of(pages, range(end))).to(device)
                prefills.append((tokens, slots, mask))
        return prefills

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Write new keys and values to a layer, then attend causally from each new token to its sequence's context.

        Args:
            layer: the decoder layer.
            query: [tokens, heads, head_dim].
            key: [tokens, kv_heads, head_dim]; written into the caches, like ``value``.
            value: [tokens, kv_heads, head_dim].
            scale: factor of the scores.

        Returns:
            [tokens, heads, head_dim].
        """
        if self.rotates:
            joint = torch.cat([each.reshape(len(each), -1) for each in (query, key, value)], dim=1)
            return self._attend_compiled(layer, joint, None, scale).view(query.shape)
        layer -= self.first_layer
        self._write(layer, slice(None), key, value)
        outputs = [self._attend_decodes(layer, query[: self.decodes], key.shape[1], scale)] if self.decodes else []
        outputs += self._attend_prefills(layer, query, key, value, scale)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_unrotated(self, layer: int, states: Tensor, freqs: Tensor, scale: float) -> Tensor:
        """The same as :meth:`attend`, by the kernel.

        Args:
            layer: the decoder layer.
            states: [tokens, (heads + 2 * kv_heads) * head_dim], queries, keys and values side by side.
            freqs: complex64 [tokens, 1, head_dim / 2], the rotation of queries and keys; see
                :func:`vflowopt.runtime.rope.apply_rope`.
            scale: factor of the scores.

        Returns:
            [tokens, heads * head_dim].
        """
        return self._attend_compiled(layer, states, freqs, scale)

    def _attend_compiled(self, layer: int, states: Tensor, freqs: Tensor | None, scale: float) -> Tensor:
        """Attention of the decodes by the kernel, of the prefills by PyTorch; arguments as the kernel takes them."""
        assert self._kernel is not None
        layer, pool = layer - self.first_layer, self.pool
        output = self._kernel(
            states, freqs, pool.keys, pool.values, self.decode_block_tables[layer], self.decode_context_lens, scale
        )
        if self.prefills:
            kv_heads, size = pool.keys.shape[1:]
            heads = states[self.decodes :].view(len(states) - self.decodes, -1, size)
            rotated, value = heads[:, :-kv_heads], heads[:, -kv_heads:]
            if freqs is not None:
                rotated = apply_rope(rotated, freqs[self.decodes :])
            query, key = rotated[:, :-kv_heads], rotated[:, -kv_heads:]
            self._write(layer, slice(self.decodes, None), key, value)
            attended = self._attend_prefills(layer, query, key, value, scale, first=self.decodes)
            torch.cat(attended, out=output[self.decodes :].view(query.shape))
        return output

    def _write(self, layer: int, tokens: slice, key: Tensor, value: Tensor) -> None:
        """Write the keys and values of some of the batch's tokens."""
        self.pool.write(self.write_slots[layer, tokens], key, value)

    def _attend_prefills(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, first: int = 0
    ) -> list[Tensor]:
        """Attention of each prefill, of tokens [tokens, heads, head_dim] of which ``first`` is the batch's first."""
        outputs, pool = [], self.pool
        for tokens, context_slots, mask in self.prefills:
            tokens = slice(tokens.start - first, tokens.stop - first)
            if context_slots is None:
                # The context is what was just computed: no need to gather it.
                keys, values = key[tokens], value[tokens]
                if pool.rounds:  # but as a later chunk reads it: answers must not depend on where chunks end
                    keys, values = (pool.computed(pool.stored(each)) for each in (keys, values))
            else:
                keys, values = pool.read(context_slots[layer])
            attended = nn.functional.scaled_dot_product_attention(
                query[tokens].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(attended[0].transpose(0, 1))
        return outputs

    def _attend_decodes(self, layer: int, query: Tensor, kv_heads: int, scale: float) -> Tensor:
        """Attention of the decodes: [decodes, heads, head_dim] to the same shape."""
        pages = self.decode_block_tables[layer]
        keys, values = (
            each.view(self.decodes, -1, kv_heads, query.shape[-1]) for each in self.pool.read_pages(pages.flatten())
        )
        # The query heads that share a key head stand in for query tokens: one pass over the keys serves them all.
        together = nn.functional.scaled_dot_product_attention(
            query.reshape(self.decodes, kv_heads, -1, query.shape[-1]),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self.decode_mask,
            scale=scale,
        )
        return together.reshape(query.shape)


class SdpaBackend:
    """PyTorch's scaled dot-product attention.

    Args:
        pool: the pages.
        kernel: computes the attention of the decodes of a plan; None: PyTorch's attention does.

    Raises:
        ValueError: the kernel is made for pages of another size.
    """

    name: BackendName = "sdpa"
    in_place = False

    def __init__(self, pool: PagePool, kernel: DecodeKernel | None = None) -> None:
        if kernel is not None and kernel.page_size != pool.page_size:
            raise ValueError(f"the kernel reads pages of {kernel.page_size} tokens, the pool's have {pool.page_size}")
        self._pool = pool
        self.kernel = kernel

    def plan(self, layers: range, caches: Sequence[StagedCache], counts: Sequence[int]) -> Plan:
        """See :meth:`vflowopt.runtime.backend.Backend.plan`; decodes come first."""
        return AttentionPlan(self._pool, layers, caches, counts, self.kernel)

    def decodes(self, batch: int, blocks: int) -> DecodeAttention:
        """See :meth:`vflowopt.runtime.backend.Backend.decodes`."""
        return SdpaDecodes(self._pool, blocks)


class SdpaDecodes:
    """A :class:`vflowopt.runtime.backend.DecodeAttention` over copies of the pages.

    Args:
        pool: the pages.
        blocks: the most blocks of a sequence.
    """

    def __init__(self, pool: PagePool, blocks: int) -> None:
        self._pool = pool
        self._places = torch.arange(blocks * pool.page_size, dtype=torch.int32, device=pool.keys.device)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, context_lens: Tensor, scale: float
    ) -> Tensor:
        """See :class:`vflowopt.runtime.backend.DecodeAttention`."""
        pool = self._pool
        batch, kv_heads, head_dim = key.shape
        pool.write(pool.last_slots(pages, context_lens), key, value)
        keys, values = (each.view(batch, -1, kv_heads, head_dim) for each in pool.read_pages(pages.flatten()))
        # The query heads that share a key head stand in for query tokens: one pass over the keys serves them all.
        together = nn.functional.scaled_dot_product_attention(
            query.reshape(batch, kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=(self._places < context_lens[:, None])[:, None, None],
            scale=scale,
        )
        return together.reshape(query.shape)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """:meth:`AttentionPlan.attend` as Hugging Face's layers call it.

    Args:
        module: the attention module of a decoder layer; its ``layer_idx`` says which.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim].
        value: [1, kv_heads, tokens, head_dim].
        attention_mask: always None; the plan decides what each token attends to.
        plan: where the tokens are written and read.
        scaling: factor of the scores.

    Returns:
        [1, tokens, heads, head_dim], and None for the weights, which are never materialised.
    """
    states = (each[0].transpose(0, 1) for each in (query, key, value))
    return plan.attend(cast(int, module.layer_idx), *states, scale=scaling)[None], None


AttentionInterface.register(PAGED, paged_attention)
