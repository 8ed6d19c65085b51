"""The alternatives to VFlowOpt, each a small implementation of its own, from its paper.

None shares code with a released implementation. Every change that a method needed to fit one cache and one budget is
described in its docstring.
"""

from benchmarks.rivals.divprune import DivPrune
from benchmarks.rivals.downsampling import Downsampling
from benchmarks.rivals.fastervlm import FasterVlm
from benchmarks.rivals.fastv import PUBLISHED_LOOK, FastV
from benchmarks.rivals.idpruner import IdPruner
from benchmarks.rivals.method import Compressed, Method, ScoringMethod, Sight
from benchmarks.rivals.pyramiddrop import PyramidDrop
from benchmarks.rivals.random_choice import RandomChoice
from benchmarks.rivals.scope import Scope
from benchmarks.rivals.sparsevlm import SparseVlmRaters
from benchmarks.rivals.uniform_grid import UniformGrid
from benchmarks.rivals.visionzip import VisionZip

__all__ = ["PUBLISHED_LOOK", "Compressed", "Method", "ScoringMethod", "Sight", "looks", "rivals"]


def rivals(seed: int, look: int | None = None) -> list[Method]:
    """One of each.

    Args:
        seed: of random pruning.
        look: the layer in which the methods that read the question look at all tokens; None: each as published.
    """
    return [
        RandomChoice(seed),
        UniformGrid(),
        Downsampling(),
        FasterVlm(),
        VisionZip(),
        DivPrune(),
        Scope(),
        IdPruner(),
        FastV(look or PUBLISHED_LOOK),
        PyramidDrop(look or 0),
        SparseVlmRaters(look or PUBLISHED_LOOK),
    ]


def looks(layers: int) -> list[Method]:
    """The methods that read the question, looking at all tokens in each layer in turn; the name says in which."""
    return [
        method
        for look in range(1, layers + 1)
        for method in (
            FastV(look, f"fastv-{look}"),
            PyramidDrop(look, f"pyramiddrop-{look}"),
            SparseVlmRaters(look, f"sparsevlm-raters-{look}"),
        )
    ]
