"""The service knows no family: what it answers is what the runtime answers, for a small model of each."""

import pytest
import torch
from safetensors.torch import load

from tests.server.conftest import Serve
from tests.server.drawing import encoded, noise
from tests.vflowopt.generation import Chat
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime


@pytest.fixture(scope="module", params=ONE_EACH, ids=lambda model: model.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    model: TinyModel = request.param
    runtime = Runtime.load(model.save(tmp_path_factory.mktemp(model.name)), kv_budget=16 << 20)
    runtime.chat.stop_ids = frozenset()
    return runtime


def test_a_conversation_about_several_pictures(family: Runtime, serve: Serve) -> None:
    first, second, third = (noise(*size, seed) for seed, size in enumerate([(112, 196), (90, 60), (150, 70)]))
    chat = Chat(family, Strategy.preset(0.1, family.layers))
    chat.look(first)
    turns = [["what?"], [second, "and", third, "?"], ["so?"]]
    expected = [family.chat.decode(chat.ask(turn, 6)) for turn in turns]
    chat.sequence.release()

    served = serve(runtime=family)
    with served.client.session("preset-10") as session:
        receipt = session.add_image(encoded(first))
        assert receipt.kept_tokens[0] < receipt.visual_tokens
        answers = []
        for turn in turns:
            parts = [part if isinstance(part, str) else encoded(part) for part in turn]
            answers.append("".join(session.ask(*parts, max_new_tokens=6, temperature=0)))
    assert answers == expected


def test_a_picture_compressed_without_a_session(family: Runtime, serve: Serve) -> None:
    pixels = noise(112, 196, 3)
    (image,) = family.compress([Picture.from_pixels(pixels)], Strategy.preset(0.25, family.layers))
    response = serve(runtime=family).client.compress(encoded(pixels), strategy="preset-25", embeddings=True)
    tensors = load(response.embeddings)
    assert response.position_span == image.span
    assert list(response.positions) == image.positions.flatten().tolist()
    assert torch.equal(tensors["positions"], image.positions)
    assert torch.equal(tensors["embeddings"], image.embeddings)
