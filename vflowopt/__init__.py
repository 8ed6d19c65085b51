"""Visual token compression for large multimodal models, chosen without looking at the question (VFlowOpt).

A picture is compressed once, when it arrives. Any number of questions about it follow::

    from vflowopt import Picture, Runtime, generate
    from vflowopt.demo import model_path, picture_path

    runtime = Runtime.load(model_path(), kv_budget=64 << 20)
    strategy = runtime.model.strategies["diverse-10"]
    picture = Picture.decode((picture_path() / "cat.png").read_bytes())
    (image,) = runtime.compress([picture], strategy)
    sequence = runtime.start(strategy)
    for turn, parts in enumerate([[image, "Which shape is green?"], ["Where do you see the hourglass?"]]):
        for piece in generate(runtime, sequence, runtime.chat.turn(turn, parts), max_new_tokens=16):
            print(piece, end="", flush=True)

- :class:`Picture` and :class:`Video` are the input.
- :class:`Strategy` says how many visual tokens each stage of the decoder keeps.
- :class:`Runtime` runs a model. :meth:`Runtime.load` loads one from a folder; :func:`wrap_model` takes a Hugging Face
  model that is already loaded.
- :class:`Sequence` is the log of a conversation and its KV cache.
- :func:`generate` answers.

:func:`compress` needs no runtime: it turns an :class:`EncodedImage`, the output of a model's vision encoder, into a
:class:`CompressedImage`.

Every name is imported when it is first used: ``import vflowopt`` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vflowopt.compression.pipeline import CompressedImage, EncodedImage, compress
    from vflowopt.compression.strategy import Strategy, StrategyError
    from vflowopt.media.picture import Picture, PictureError, PictureLimits
    from vflowopt.media.video import Video, VideoError
    from vflowopt.models.error import ModelError
    from vflowopt.models.interface import MultimodalModel
    from vflowopt.models.loading import load_model, wrap_model
    from vflowopt.runtime.cache import PoolExhausted
    from vflowopt.runtime.generate import generate
    from vflowopt.runtime.model_runner import Runtime
    from vflowopt.runtime.sampling import SamplingOptions
    from vflowopt.runtime.sequence import Sequence

__version__ = "0.1.0"

__all__ = [
    "CompressedImage",
    "EncodedImage",
    "ModelError",
    "MultimodalModel",
    "Picture",
    "PictureError",
    "PictureLimits",
    "PoolExhausted",
    "Runtime",
    "SamplingOptions",
    "Sequence",
    "Strategy",
    "StrategyError",
    "Video",
    "VideoError",
    "__version__",
    "compress",
    "generate",
    "load_model",
    "wrap_model",
]

_MODULES = {
    "compression.pipeline": ("CompressedImage", "EncodedImage", "compress"),
    "compression.strategy": ("Strategy", "StrategyError"),
    "media.picture": ("Picture", "PictureError", "PictureLimits"),
    "media.video": ("Video", "VideoError"),
    "models.error": ("ModelError",),
    "models.interface": ("MultimodalModel",),
    "models.loading": ("load_model", "wrap_model"),
    "runtime.cache": ("PoolExhausted",),
    "runtime.generate": ("generate",),
    "runtime.model_runner": ("Runtime",),
    "runtime.sampling": ("SamplingOptions",),
    "runtime.sequence": ("Sequence",),
}
"""Where each public name is defined."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # so that this function is called once for each name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
