"""Visual token compression for large multimodal models, chosen without looking at the question (VFlowOpt)."""

from vflowopt.strategy import Strategy, StrategyError

__version__ = "0.1.0"

__all__ = ["Strategy", "StrategyError", "__version__"]
