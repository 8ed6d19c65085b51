"""What holds for every family: caches, positions, features and importance belong to the tokens that they came with."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.models.matrix import MODELS, TinyModel
from tests.vflowopt.reference import Reference
from vflowopt.compression.pipeline import CompressedImage, EncodedImage, compress
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.interface import MultimodalModel
from vflowopt.models.loading import load_model
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Item

SIZE = (112, 196)
"""Height and width in whole patches and squares of most families."""


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: TinyModel = request.param
    return model.save(tmp_path_factory.mktemp(model.name))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Runtime:
    return Runtime.load(folder, kv_budget=32 << 20)


@pytest.fixture
def runtime(loaded: Runtime) -> Iterator[Runtime]:
    yield loaded
    loaded.pool.check_integrity([])


def tenth(layers: int, **fields: Any) -> Strategy:
    """Three stages, the second from the second layer on, a tenth of the visual tokens in the mean."""
    first = Strategy((0, 1, layers // 2), (0.2, 0.8, 0.3), threshold=1.0, grid=2.5)
    scale = 0.1 / first.budget(layers)
    return replace(first, ratios=(0.2 * scale, 0.8, 0.3), **fields)


def test_a_reused_cache_answers_like_a_recomputed_one(runtime: Runtime) -> None:
    strategy = tenth(runtime.layers)
    turns: list[list[str | np.ndarray]] = [
        [picture(100, 60, 1), "what?"],
        ["one"],
        [picture(56, 120, 2), picture(90, 90, 3), "two"],
        ["three"],
    ]
    reused, recomputed = Chat(runtime, strategy), Chat(runtime, strategy)
    for turn in turns:
        recomputed.sequence.release()
        assert reused.ask(turn, 4) == recomputed.ask(turn, 4)
    for held, again in zip(reused.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(held, again, atol=1e-4, rtol=0)
    reused.sequence.release()
    recomputed.sequence.release()


def test_a_prompt_read_in_pieces_equals_one_read_at_once(runtime: Runtime) -> None:
    strategy = tenth(runtime.layers)
    images = runtime.compress([Picture.from_pixels(picture(*SIZE, seed)) for seed in (1, 2)], strategy)
    items: list[Item] = [65, images[0], 66, 67, images[1], 68]
    whole, pieces = runtime.start(strategy), runtime.start(strategy)
    expected = runtime.extend(whole, items)
    pieces.log += items
    logits = None
    while pieces.num_cached_items < len(items):
        (logits,) = runtime.advance([pieces], [3])
    assert expected is not None and logits is not None
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    whole.release()
    pieces.release()


def test_kept_tokens_stand_where_the_unpruned_ones_stood(runtime: Runtime) -> None:
    shown = Picture.from_pixels(picture(*SIZE, 5))
    (full,) = runtime.compress([shown], Strategy.full())
    (image,) = runtime.compress([shown], tenth(runtime.layers))
    first = image.kept[0]
    assert len(first) < image.tokens
    assert torch.equal(image.positions, full.positions[..., first])
    assert image.span == full.span == int(full.positions.max()) + 1
    plain = ~torch.isin(first, image.recycled)
    assert torch.equal(image.embeddings[plain], full.embeddings[first[plain]])
    # So what follows the picture stands where it would stand behind the unpruned one.
    after = []
    for each, strategy in ((full, Strategy.full()), (image, tenth(runtime.layers))):
        sequence = runtime.start(strategy)
        runtime.extend(sequence, [65, each, 66])
        after.append(sequence.position)
        sequence.release()
    assert after == [full.span + 2] * 2


def test_renumbered_positions_close_the_gaps_on_every_axis(runtime: Runtime) -> None:
    (image,) = runtime.compress([Picture.from_pixels(picture(*SIZE, 5))], tenth(runtime.layers, positions="renumbered"))
    for axis in image.positions.view(-1, len(image.kept[0])):
        assert axis.tolist() == list(range(len(image.kept[0])))
    assert image.span == len(image.kept[0])


def test_pruned_tokens_are_read_as_hugging_faces_layers_read_them(runtime: Runtime, folder: Path) -> None:
    """Stage by stage, with their positions, and with the features that enter behind the first layers."""
    strategy = tenth(runtime.layers)
    (image,) = runtime.compress([Picture.from_pixels(picture(*SIZE, 7))], strategy)
    before, behind = [65, 66], [67, 68, 69]
    sequence = runtime.start(strategy)
    logits = runtime.extend(sequence, [*before, image, *behind])
    sequence.release()
    assert logits is not None
    torch.testing.assert_close(logits, _plain_logits(folder, before, image, behind, strategy), atol=1e-4, rtol=0)


@torch.no_grad()
def _plain_logits(
    folder: Path, before: list[int], image: CompressedImage, behind: list[int], strategy: Strategy
) -> Tensor:
    """Logits behind a prompt by Hugging Face's layers with their own attention, no cache, tokens dropped by hand."""
    network = Reference(folder).network
    decoder = network.model.language_model
    width = decoder.embed_tokens.embedding_dim
    words, more = (decoder.embed_tokens(torch.tensor(ids)) for ids in (before, behind))
    entering, *behind_layers = image.embeddings.split(width, dim=1)
    hidden = torch.cat((words, entering, more))
    later = [torch.cat((words * 0, features, more * 0)) for features in behind_layers]
    start, end = len(before), len(before) + image.span
    axes = image.positions.shape[:-1]
    positions = torch.cat(
        (
            torch.arange(start).expand(*axes, -1),
            image.positions + start,
            torch.arange(end, end + len(behind)).expand(*axes, -1),
        ),
        dim=-1,
    )
    last_stage = torch.full((len(hidden),), len(strategy.starts) - 1)
    last_stage[start : start + len(entering)] = image.last_stages
    for index, layer in enumerate(decoder.layers):
        if index in strategy.starts:
            stays = last_stage >= strategy.starts.index(index)
            hidden, positions, last_stage = hidden[stays], positions[..., stays], last_stage[stays]
            later = [features[stays] for features in later]
        turns = decoder.rotary_emb(hidden, positions.unsqueeze(-2))
        output = layer(hidden[None], position_embeddings=turns, attention_mask=None)
        hidden = (output[0] if isinstance(output, tuple) else output)[0]
        if index < len(later):
            hidden = hidden + later[index]
    logits: Tensor = network.lm_head(decoder.norm(hidden[-1]))
    return logits


@pytest.fixture(scope="module")
def plain_sighted(folder: Path) -> MultimodalModel:
    """The model with a tower whose layers add nothing, so that what a patch's state says is about its own pixels."""
    model = load_model(folder)
    with torch.no_grad():
        for name, weight in model.network.model.named_parameters():
            if not name.startswith("language_model") and ADDED.search(name):
                weight.zero_()
    return model


ADDED = re.compile(r"(out_proj|projection_layer|attn\.proj|fc2|down_proj)\.(weight|bias)$")
"""The last maps of a tower layer's two branches, as the towers call them."""


@pytest.mark.parametrize("corner", [(0, 56), (56, 112), (84, 28)], ids=str)
def test_importance_lines_up_with_pixels(plain_sighted: MultimodalModel, corner: tuple[int, int]) -> None:
    """A picture that is flat but for one textured and attended spot has its maximum there, and keeps it."""
    spot = (corner[0], corner[1], corner[0] + 28, corner[1] + 28)
    flat, spotted = plain_sighted.encode([Picture.from_pixels(_spotted(*area)) for area in ((0, 0, 0, 0), spot)])
    changed = (spotted.key - flat.key).float().norm(dim=-1).sum(1)
    attended, textured = _attending(spotted, changed), _attending(spotted, torch.ones_like(changed))
    for encoded, alpha in ((attended, 0.0), (textured, 1.0), (attended, 0.5)):
        image = compress(encoded, Strategy((0,), (0.1,), threshold=1.0, alpha=alpha), layers=6)
        best = int(image.importance.argmax())
        assert _overlap(image.layout.boxes[best], spot) > 0, (alpha, image.layout.boxes[best])
        assert best in image.kept[0]


def _spotted(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """A grey picture with one spot of noise."""
    pixels = np.full((*SIZE, 3), 120, np.uint8)
    spot = pixels[top:bottom, left:right]
    spot[:] = np.random.default_rng(0).integers(0, 256, spot.shape, dtype=np.uint8)
    return pixels


def _attending(encoded: EncodedImage, wanted: Tensor) -> EncodedImage:
    """The same picture, all of whose queries attend to patches as ``wanted`` [T, P] says."""
    key = torch.zeros_like(encoded.key)
    key[..., 0] = (wanted / wanted.max())[:, None]
    query = torch.zeros_like(encoded.query)
    query[..., 0] = 8.0 / encoded.scale
    return replace(encoded, query=query, key=key, class_key=None)


def _overlap(box: Tensor, spot: tuple[int, int, int, int]) -> float:
    """Pixels that a box (left, top, right, bottom) and a spot (top, left, bottom, right) have in common."""
    left, top, right, bottom = box.tolist()
    return max(0.0, min(right, spot[3]) - max(left, spot[1])) * max(0.0, min(bottom, spot[2]) - max(top, spot[0]))


def test_half_precision_runs(folder: Path) -> None:
    runtime = Runtime.load(folder, dtype="bfloat16", kv_budget=4 << 20)
    chat = Chat(runtime, tenth(runtime.layers))
    assert chat.ask([picture(*SIZE, 0), "hi"], 2)
    assert all(logits.isfinite().all() for logits in chat.logits)
    chat.sequence.release()
