"""Attention of the words that speak of the picture (SparseVLM, arXiv 2410.04417), without its merged tokens."""

from __future__ import annotations

from torch import Tensor

from benchmarks.rivals.fastv import PUBLISHED_LOOK, FastV
from benchmarks.rivals.prompt_pass import PromptPass


class SparseVlmRaters(FastV):
    """Keep what the text raters attend to.

    SparseVLM (arXiv 2410.04417) lets only those words vote that have to do with the picture: whose similarity to the
    visual tokens, softmaxed over the words and averaged over the visual tokens, is at least the mean over the words.
    That is what this method takes from it, and its name says so. The rest of SparseVLM is left out: its number of
    tokens per layer follows from the rank of the attention and meets no given budget, and the tokens that it makes of
    pruned ones come into being inside the decoder, where a cache that is filled once from the picture has no place for
    them. The vote is taken and applied where FastV takes and applies its own.
    """

    def __init__(self, look: int = PUBLISHED_LOOK, name: str = "sparsevlm-raters") -> None:
        super().__init__(look, name)

    def voters(self, look: PromptPass) -> Tensor:
        """See :meth:`FastV.voters`."""
        relevance = (look.visual_states.float() @ look.text_states.float().T).softmax(-1).mean(0)
        # At least the mean, up to rounding: were all words equally relevant, none would be above it.
        return (relevance >= relevance.mean() * (1 - 1e-6)).nonzero().squeeze(-1)
