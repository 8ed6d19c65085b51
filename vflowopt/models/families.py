"""The table of families: names only, so that a model's family is imported alone, and only when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vflowopt.models.interface import MultimodalModel

_CLASSES = {
    "internvl": ("internvl", "InternVL"),
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "mistral3": ("mistral3", "Mistral3"),
    "qwen2_vl": ("qwen2_vl", "Qwen2Vl"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen25Vl"),
    "qwen3_vl": ("qwen3_vl", "Qwen3Vl"),
}
"""Module and class of each family."""


class Families(Mapping[str, "type[MultimodalModel]"]):
    """Families by the ``model_type`` of their configuration. A look-up imports the family; listing imports none."""

    def __getitem__(self, model_type: str) -> type[MultimodalModel]:
        module, name = _CLASSES[model_type]
        family: type[MultimodalModel] = getattr(import_module(f"vflowopt.models.{module}"), name)
        return family

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)

    def __contains__(self, model_type: object) -> bool:
        return model_type in _CLASSES


FAMILIES = Families()
"""The families that can be served."""
