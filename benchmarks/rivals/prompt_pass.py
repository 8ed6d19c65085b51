"""Running a prompt through the first layers of the decoder, to measure the attention of its text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vflowopt.compression.pipeline import CompressedImage, EncodedImage, choose
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime


class PromptPass:
    """The prompt of a first question about a picture, run outside of any cache.

    Visual tokens can be dropped on the way; they are named by their index among all N tokens of the picture.

    Args:
        runtime: its decoder runs the prompt.
        encoded: the picture, of which all tokens enter the first layer.
        question: the question.

    Attributes:
        present: int64, ascending: the visual tokens that are still there.
    """

    def __init__(self, runtime: Runtime, encoded: EncodedImage, question: str) -> None:
        self._decoder = runtime.decoder
        tokens = len(encoded.layout)
        whole = choose(encoded, torch.zeros(tokens), Strategy.full(), runtime.layers)
        items = runtime.chat.turn(0, [whole, question])
        self._start = items.index(whole)
        ids = [item for item in items if isinstance(item, int)]
        with torch.inference_mode():
            words = runtime.model.decoder.embed_tokens(torch.tensor(ids, device=runtime.model.device))
            entering, *later = whole.embeddings.split(words.shape[1], dim=1)
            before, behind = words.split([self._start, len(words) - self._start])
            self._hidden = torch.cat((before, entering, behind))
            # Features that enter behind the first layers (deepstack); text has none.
            self._later = [torch.cat((before * 0, features, behind * 0)) for features in later]
            self._rotary = self._decoder.rotary(self._positions(whole, len(behind)))
        self._attention = _Recorded()
        self.present = torch.arange(tokens)

    @property
    def text_states(self) -> Tensor:
        """Hidden states of the text behind the picture, [tokens, hidden]."""
        return self._hidden[self._start + len(self.present) :]

    @property
    def visual_states(self) -> Tensor:
        """Hidden states of the visual tokens present, [tokens, hidden]."""
        return self._hidden[self._start : self._start + len(self.present)]

    @torch.inference_mode()
    def run(self, layers: range) -> None:
        """Go through a run of layers, the next ones in turn."""
        for layer in layers:
            self._hidden = self._decoder.run(range(layer, layer + 1), self._hidden, self._rotary, self._attention)
            if layer < len(self._later):
                self._hidden = self._hidden + self._later[layer]

    @torch.inference_mode()
    def attention(self, text: Tensor | None = None) -> Tensor:
        """Attention that text paid to each visual token in the last layer run, averaged over heads and text tokens.

        Args:
            text: int64, which tokens of the text behind the picture; None: the very last one.

        Returns:
            float32 [visual tokens present].
        """
        behind = self._start + len(self.present)
        rows = torch.tensor([len(self._hidden) - 1]) if text is None else text.cpu() + behind
        return self._attention.of(rows).mean(0)[self._start : behind].cpu()

    @torch.inference_mode()
    def keep(self, kept: Tensor) -> None:
        """Drop all visual tokens but ``kept``, int64, ascending, a subset of those present."""
        stays = torch.ones(len(self._hidden), dtype=torch.bool)
        stays[self._start : self._start + len(self.present)] = torch.isin(self.present, kept)
        rows = stays.nonzero().squeeze(-1).to(self._hidden.device)
        self._hidden, self._rotary = self._hidden[rows], self._decoder.pick(self._rotary, rows)
        self._later = [features[rows] for features in self._later]
        self.present = kept

    def _positions(self, whole: CompressedImage, behind: int) -> Tensor:
        """Where the prompt's tokens stand, int64 [tokens] or [axes, tokens], with so many ``behind`` the picture."""
        axes, end = whole.positions.shape[:-1], self._start + whole.span
        text = torch.arange(self._start).expand(*axes, -1), torch.arange(end, end + behind).expand(*axes, -1)
        return torch.cat((text[0], whole.positions + self._start, text[1]), dim=-1)


class _Recorded:
    """Causal attention of a sequence to itself alone; remembers the queries and keys of the last layer."""

    def __init__(self) -> None:
        # There is no cache: nothing of what a plan works out is needed.
        self._query = self._key = torch.empty(0)
        self._scale = 1.0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """See :meth:`vflowopt.runtime.attention.AttentionPlan.attend`."""
        self._query, self._key, self._scale = query, key, scale
        attended = nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1)

    def of(self, rows: Tensor) -> Tensor:
        """Weights of some queries, averaged over heads: float32 [rows, tokens]."""
        key = self._key.float().repeat_interleave(self._query.shape[1] // self._key.shape[1], dim=1)
        query = self._query[rows.to(self._query.device)].float()
        scores = torch.einsum("qhd,khd->hqk", query, key) * self._scale
        later = torch.arange(scores.shape[-1]) > rows[:, None]
        return scores.masked_fill(later.to(scores.device), -torch.inf).softmax(-1).mean(0)
