"""The families of large multimodal models that can be served, one file each.

A new family is a subclass of :class:`~vflowopt.models.interface.MultimodalModel` and a line in :data:`FAMILIES`.
"""

from vflowopt.models.error import ModelError
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.llava_onevision import LlavaOnevision
from vflowopt.models.loading import FAMILIES, load_model, wrap_model

__all__ = ["FAMILIES", "LlavaOnevision", "ModelError", "MultimodalModel", "load_model", "wrap_model"]
