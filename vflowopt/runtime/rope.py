"""The rotary embedding of the fused decoder, whose pairs of channels are adjacent."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(states: Tensor, freqs: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels.

    Args:
        states: [tokens, heads, head_dim].
        freqs: complex64 [tokens, 1, head_dim / 2], the rotation of each pair.

    Returns:
        Like ``states``.
    """
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(states.dtype)
