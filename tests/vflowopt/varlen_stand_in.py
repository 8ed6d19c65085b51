"""What ``torch.nn.attention.varlen.varlen_attn`` promises, in plain operations that run anywhere.

It checks what it is given as strictly as the kernels do, so that a call which passes here is one that they take.
"""

from collections.abc import Callable

import torch
from torch import Tensor

VarlenAttention = Callable[..., Tensor]


def stand_in(*, page_multiple: int = 1, bottom_right: bool = True) -> VarlenAttention:
    """A stand-in.

    Args:
        page_multiple: what the size of a page must be a multiple of: 256 for the flash attention that PyTorch is built
            with, 1 for flash attention 3.
        bottom_right: whether the last query of a sequence sees its last key; False: its first query the first key only.
    """

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert window_size == (-1, 0), "not causal"
        assert query.is_contiguous() and key.stride(-1) == value.stride(-1) == 1
        assert key.shape == value.shape and key.dtype == value.dtype == query.dtype
        assert enable_gqa or query.shape[1] == key.shape[-2], "heads differ"
        for bounds in (cu_seq_q, cu_seq_k, seqused_k, block_table):
            assert bounds is None or (bounds.dtype == torch.int32 and bounds.stride(-1) == 1)
        sequences = len(cu_seq_q) - 1
        assert seqused_k is not None and len(seqused_k) == sequences
        assert int(cu_seq_q[0]) == 0 and int(cu_seq_q[-1]) == len(query)
        if block_table is not None:
            if key.shape[1] % page_multiple:
                raise RuntimeError(f"Paged KV cache block size must be divisible by {page_multiple}")
            assert block_table.shape[0] == sequences
            assert max_k <= block_table.shape[1] * key.shape[1]
        else:
            assert cu_seq_k is not None and int(cu_seq_k[-1]) == len(key)
        outputs = []
        for row in range(sequences):
            start, stop, held = int(cu_seq_q[row]), int(cu_seq_q[row + 1]), int(seqused_k[row])
            assert 0 < stop - start <= max_q and stop - start <= held <= max_k
            if block_table is not None:
                keys, values = (store[block_table[row].long()].flatten(0, 1)[:held] for store in (key, value))
            else:
                assert cu_seq_k is not None
                first = int(cu_seq_k[row])
                assert first + held <= int(cu_seq_k[row + 1])
                keys, values = (store[first : first + held] for store in (key, value))
            mask = torch.ones(stop - start, held, dtype=torch.bool).tril(held - (stop - start) if bottom_right else 0)
            shared = query.shape[1] // key.shape[-2]
            scores = torch.einsum(
                "qhd,khd->hqk", query[start:stop].double(), keys.double().repeat_interleave(shared, dim=1)
            )
            scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            output = torch.einsum("hqk,khd->qhd", weights, values.double().repeat_interleave(shared, dim=1))
            outputs.append(output.to(query.dtype))
        return torch.cat(outputs)

    return varlen_attn
