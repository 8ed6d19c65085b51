"""Visual token compression for large multimodal models, chosen without looking at the question (VFlowOpt)."""

from vflowopt.picture import Picture, PictureError, PictureLimits
from vflowopt.strategy import Strategy, StrategyError

__version__ = "0.1.0"

__all__ = ["Picture", "PictureError", "PictureLimits", "Strategy", "StrategyError", "__version__"]
