"""With a budget of 100% the runtime answers what Hugging Face's ``generate`` answers, token for token."""

from pathlib import Path

import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.matrix import MODELS, TinyModel
from tests.vflowopt.reference import Reference
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.models.loading import DTYPES
from vflowopt.runtime.model_runner import Runtime

NEW_TOKENS = 8


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: TinyModel = request.param
    return model.save(tmp_path_factory.mktemp(model.name))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime.load(folder, kv_budget=32 << 20)


@pytest.mark.parametrize(
    "sizes",
    [((56, 56), (70, 150)), ((180, 61), (112, 112)), ((2, 300), (300, 2))],
    ids=["square-wide", "tall-mosaic", "thin"],
)
def test_three_turns_with_two_pictures_answer_like_generate(
    runtime: Runtime, reference: Reference, sizes: list[tuple[int, int]]
) -> None:
    first, second = (picture(*size, seed=index) for index, size in enumerate(sizes))
    turns = [[first, "what is this?"], ["and now?"], ["look: ", second, " same?"]]
    expected = reference.answers(turns, NEW_TOKENS)
    chat = Chat(runtime, Strategy.full())
    answers = [chat.ask(turn, NEW_TOKENS) for turn in turns]

    assert answers == expected
    for ours, theirs in zip(chat.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert len({token for answer in answers for token in answer}) > 5, "answers too uniform to prove anything"
    chat.sequence.release()
    assert runtime.pool.bytes_used == 0


@pytest.mark.parametrize("tower_dtype", ["float32", "bfloat16"])
def test_the_embedded_model_answers_like_generate(tower_dtype: str) -> None:
    """Three turns on the weights that ship, a square picture first and a wide one in turn three."""
    turns = [
        [picture(448, 448, 1), "What colour is the star?"],
        ["How many circles are there?"],
        [picture(160, 500, 2), "And what shape is the red object?"],
    ]
    expected = Reference(model_path(), tower_dtype=DTYPES[tower_dtype]).answers(turns, NEW_TOKENS)
    runtime = Runtime.load(model_path(), tower_dtype=tower_dtype, kv_budget=64 << 20)
    chat = Chat(runtime, Strategy.full())
    assert [chat.ask(turn, NEW_TOKENS) for turn in turns] == expected
    chat.sequence.release()
    assert runtime.pool.bytes_used == 0
