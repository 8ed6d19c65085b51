"""Videos: frames as each family reads them, pruned over the whole clip."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.vflowopt.models.matrix import TinyModel
from tests.vflowopt.models.tiny_internvl import INTERNVL
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tests.vflowopt.reference import Reference
from tests.vflowopt.talk import Talk, picture, video
from tests.vflowopt.tiny_models import SHAPES
from vflowopt.runtime import Runtime
from vflowopt.strategy import Strategy

TINY: tuple[TinyModel, ...] = (SHAPES[0], SHAPES[3], *INTERNVL, *QWEN2_VL, *QWEN2_5_VL, *QWEN3_VL)


@pytest.fixture(scope="module", params=TINY, ids=lambda model: model.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: TinyModel = request.param
    return model.save(tmp_path_factory.mktemp(model.name))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Runtime:
    return Runtime.load(folder, kv_budget=32 << 20)


@pytest.fixture
def runtime(loaded: Runtime) -> Iterator[Runtime]:
    yield loaded
    assert loaded.pool.bytes_used == 0


@pytest.mark.parametrize(
    ("size", "seconds"),
    [((84, 112), (0.0, 0.5, 1.0, 1.5)), ((120, 61), (0.2, 0.7, 1.2)), ((56, 150), (3.0,))],
    ids=["four-frames", "odd", "one-frame"],
)
def test_three_turns_about_a_video_answer_like_generate(
    runtime: Runtime, folder: Path, size: tuple[int, int], seconds: tuple[float, ...]
) -> None:
    clip = video(*size, seconds, seed=1)
    turns = [[clip, "what happens?"], ["and then?"], [picture(50, 50, 9), "this?"]]
    reference = Reference(folder)
    expected = reference.answers(turns, 8)
    talk = Talk(runtime, Strategy.full())
    answers = [talk.ask(turn, 8) for turn in turns]
    assert answers == expected
    for ours, theirs in zip(talk.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert len({token for answer in answers for token in answer}) > 5, "answers too uniform to prove anything"
    talk.conversation.release()
