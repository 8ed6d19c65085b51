"""Asking through shared, forked caches is asking from scratch."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from benchmarks.answering import Reply, reply
from benchmarks.ask import SINGLE, ask
from benchmarks.asked_pictures import Asked
from benchmarks.rivals import Compressed, Sight
from benchmarks.rivals.fastv import FastV
from benchmarks.rivals.vflowopt import VFlowOpt
from tests.vflowopt.generation import picture
from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime

LONGEST = 3
ASKED = [(Asked("What is it?", "a"), Asked("Where?", "b"), Asked("7 x 8", "c")), (Asked("How many are there?", "d"),)]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    loaded = Runtime.load(save(SHAPES[0], tmp_path_factory.mktemp("plain")), kv_budget=32 << 20)
    yield loaded
    loaded.pool.check_integrity([])


@pytest.fixture(scope="module")
def images(runtime: Runtime) -> list[list[Compressed]]:
    """One image for all questions about the first picture; one of its own for the question about the second."""
    first, second = (Picture.from_pixels(picture(90, 110, seed)) for seed in (1, 2))
    sights = [Sight(each, runtime.model.encode([each])[0], "How many are there?") for each in (first, second)]
    (shared,) = VFlowOpt().compress(runtime, sights[0], [0.25])
    (own,) = FastV().compress(runtime, sights[1], [0.5])
    return [[shared] * 3, [own]]


def from_scratch(runtime: Runtime, image: Compressed, questions: Sequence[Asked]) -> list[Reply]:
    conversation = runtime.start(image.strategy)
    replies = []
    for turn, question in enumerate(questions):
        prompt = runtime.chat.turn(turn, [*([] if turn else [image.image]), question.text])
        replies += reply(runtime, [conversation], [prompt], LONGEST)
    conversation.release()
    return replies


def test_every_question_alone_and_in_turn(runtime: Runtime, images: list[list[Compressed]]) -> None:
    found = {(each.picture, each.number, each.turn): each for each in ask(runtime, images, ASKED, LONGEST)}
    expected: dict[tuple[int, int, str | int], Reply] = {}
    for place, questions in enumerate(ASKED):
        for number, question in enumerate(questions):
            (expected[place, number, SINGLE],) = from_scratch(runtime, images[place][number], [question])
        for number, answer in enumerate(from_scratch(runtime, images[place][0], questions)):
            expected[place, number, number + 1] = answer
    assert found.keys() == expected.keys()
    for key, answered in found.items():
        assert answered.reply.answer == expected[key].answer
        torch.testing.assert_close(answered.reply.logits, expected[key].logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answered.reply.state, expected[key].state, rtol=1e-4, atol=1e-4)
        image = images[answered.picture][0]
        assert answered.kv_bytes == image.token_layers(runtime.layers) * runtime.bytes_per_token()


def test_the_state_is_what_the_head_reads(runtime: Runtime, images: list[list[Compressed]]) -> None:
    (answered, *_) = ask(runtime, images, ASKED, LONGEST)
    with torch.inference_mode():
        logits = runtime.model.head(answered.reply.state[None])[0]
    torch.testing.assert_close(logits, answered.reply.logits, rtol=1e-4, atol=1e-4)
