"""The methods that one would pick instead of VFlowOpt, each a small implementation of its own, from its paper.

None shares code with a released implementation. What a method needed to be changed to fit one cache and one budget is
said in its docstring.
"""

from benchmarks.rivals.divprune import DivPrune
from benchmarks.rivals.downsampling import Downsampling
from benchmarks.rivals.fastervlm import FasterVlm
from benchmarks.rivals.fastv import FastV
from benchmarks.rivals.idpruner import IdPruner
from benchmarks.rivals.method import Compressed, Method, ScoringMethod, Sight
from benchmarks.rivals.pyramiddrop import PyramidDrop
from benchmarks.rivals.random_choice import RandomChoice
from benchmarks.rivals.scope import Scope
from benchmarks.rivals.sparsevlm import SparseVlmRaters
from benchmarks.rivals.uniform_grid import UniformGrid
from benchmarks.rivals.visionzip import VisionZip

__all__ = ["Compressed", "Method", "ScoringMethod", "Sight", "rivals"]


def rivals(seed: int) -> list[Method]:
    """One of each.

    Args:
        seed: of random pruning.
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
        FastV(),
        PyramidDrop(),
        SparseVlmRaters(),
    ]
