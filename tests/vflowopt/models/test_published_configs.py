"""Published checkpoints: their configurations build, without weights, and pass the checks of their families.

The files under ``published/`` state what the checkpoints' own ``config.json`` say, in the hub's layout.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vflowopt.compression.strategy import Strategy
from vflowopt.models.families import FAMILIES
from vflowopt.models.interface import MultimodalModel

FOLDER = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Published:
    """What must come out of a configuration.

    Attributes:
        processor: the image processor that comes with it.
        layers: of the decoder.
        scoring_layer: of the tower, from 0.
        kv_bytes: of a token in all layers, in bfloat16.
        starts: of the stages of the published strategies.
    """

    processor: Any
    layers: int
    scoring_layer: int
    kv_bytes: int
    starts: tuple[int, ...]


PUBLISHED = {
    "InternVL3-8B-hf": Published(GotOcr2ImageProcessorPil(), 28, 23, 57_344, (0, 9, 18)),
    "llava-1.5-7b-hf": Published(CLIPImageProcessorPil(), 32, 22, 524_288, (0, 10, 20)),
    "llava-onevision-qwen2-7b-ov-hf": Published(LlavaOnevisionImageProcessorPil(), 28, 25, 57_344, (0, 9, 18)),
    "llava-v1.6-mistral-7b-hf": Published(LlavaNextImageProcessorPil(), 32, 22, 131_072, (0, 10, 20)),
    "Mistral-Small-3.1-24B-Instruct-2503": Published(PixtralImageProcessorPil(), 40, 23, 163_840, (0, 13, 26)),
    "Qwen2-VL-7B-Instruct": Published(Qwen2VLImageProcessorPil(), 28, 31, 57_344, (0, 9, 18)),
    "Qwen2.5-VL-7B-Instruct": Published(Qwen2VLImageProcessorPil(), 28, 31, 57_344, (0, 9, 18)),
    "Qwen3-VL-8B-Instruct": Published(Qwen2VLImageProcessorPil(patch_size=16), 36, 26, 147_456, (0, 12, 24)),
}


def build(path: Path, processor: Any) -> MultimodalModel:
    """The model of a configuration on the meta device."""
    config = AutoConfig.from_pretrained(path)
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        network = family.architecture._from_config(config, dtype=torch.bfloat16)
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=str,
        convert_tokens_to_ids=len,
        eos_token_id=0,
        start_image_token_id=1,
        end_image_token_id=2,
    )
    return family(network, tokenizer, processor)


def test_every_file_is_expected() -> None:
    files = list(FOLDER.glob("*.json"))
    assert {path.stem for path in files} == set(PUBLISHED)
    assert {AutoConfig.from_pretrained(path).model_type for path in files} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_builds(name: str) -> None:
    expected = PUBLISHED[name]
    model = build(FOLDER / f"{name}.json", expected.processor)
    assert len(model.layers) == expected.layers
    assert model.scoring_layer == expected.scoring_layer
    assert len(model.layers) * 2 * model.heads * model.head_dim * model.dtype.itemsize == expected.kv_bytes
    for budget in (0.5, 0.25, 0.1):
        preset = Strategy.preset(budget, expected.layers)
        preset.check(expected.layers)
        assert preset.starts == expected.starts
        assert preset.budget(expected.layers) == pytest.approx(budget)
