import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from demo_model.anyres import SIDE, layout, tiles, token_sources
from demo_model.architecture import configuration, normalise
from vflowopt.demo import model_path

SIZES = [(448, 448), (448, 336), (336, 448), (672, 224), (224, 672), (224, 448), (224, 224), (300, 400), (901, 203)]


@pytest.fixture(scope="module")
def processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil.from_pretrained(model_path())


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_image_processor(
    size: tuple[int, int], processor: LlavaOnevisionImageProcessorPil
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    expected = processor(picture, return_tensors="pt", input_data_format="channels_last").pixel_values[0]
    torch.testing.assert_close(normalise(torch.from_numpy(tiles(picture))), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_the_model(size: tuple[int, int]) -> None:
    config = configuration(vocabulary=16, image=1, video=2, end=3, pad=4)
    with torch.device("meta"):
        model = LlavaOnevisionModel(config)
    plan = layout(*size)
    count = (1 + plan.tiles) * SIDE * SIDE
    numbers = torch.arange(count, dtype=torch.float32).view(1 + plan.tiles, SIDE * SIDE, 1)
    packed, _ = model.pack_image_features([numbers], torch.tensor([size[::-1]]), image_newline=torch.tensor([-1.0]))
    assert packed[0][:, 0].long().tolist() == token_sources(*size).tolist()
    assert plan.token_count == len(token_sources(*size))


def test_a_square_picture_costs_1312_tokens() -> None:
    assert layout(448, 448).token_count == 1312
