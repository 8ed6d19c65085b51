"""Visual token compression for large multimodal models, chosen without looking at the question (VFlowOpt)."""

from vflowopt.compression.strategy import Strategy, StrategyError
from vflowopt.media.picture import Picture, PictureError, PictureLimits

__version__ = "0.1.0"

__all__ = ["Picture", "PictureError", "PictureLimits", "Strategy", "StrategyError", "__version__"]
