"""Every rival keeps exactly its budget, in the cache; the controls are really what they say."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.rivals import Compressed, Method, Sight, looks, rivals
from benchmarks.rivals.divprune import DivPrune
from benchmarks.rivals.downsampling import Downsampling, encode_whole, grid_within, shrink
from benchmarks.rivals.fastervlm import FasterVlm, attention_received
from benchmarks.rivals.fastv import FastV
from benchmarks.rivals.greedy import content_similarity
from benchmarks.rivals.method import content_kept, tokens_kept
from benchmarks.rivals.prompt_pass import PromptPass
from benchmarks.rivals.pyramiddrop import PyramidDrop, pyramid
from benchmarks.rivals.random_choice import RandomChoice
from benchmarks.rivals.scope import Scope
from benchmarks.rivals.sparsevlm import SparseVlmRaters
from benchmarks.rivals.uniform_grid import UniformGrid
from benchmarks.rivals.vflowopt import Staged, VFlowOpt, ablations, choices, curves, own
from benchmarks.rivals.visionzip import CONTEXTUAL, VisionZip
from tests.vflowopt.generation import picture
from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.llava_onevision import LlavaOnevision
from vflowopt.runtime.model_runner import Runtime

RETENTIONS = (1.0, 0.5, 0.25, 0.3, 0.15)
METHODS = list(
    {
        method.name: method
        for method in (*rivals(0), VFlowOpt(), *ablations(VFlowOpt(), 6), *choices(VFlowOpt(), 6), *looks(6))
    }.values()
)
AGNOSTIC = [method for method in rivals(0) if not method.question_aware]
AWARE = [method for method in rivals(0) if method.question_aware]


def by_name(method: Method) -> str:
    return method.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(SHAPES[0], tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[Runtime]:
    loaded = Runtime.load(folder, kv_budget=32 << 20)
    yield loaded
    loaded.pool.check_integrity([])


@pytest.fixture(scope="module")
def sight(runtime: Runtime) -> Sight:
    """A picture with an overview and a mosaic of four tiles, which padding has cut."""
    return look_at(runtime, 110, 100, "What is in the picture?")


def look_at(runtime: Runtime, height: int, width: int, question: str, seed: int = 3) -> Sight:
    seen = Picture.from_pixels(picture(height, width, seed))
    return Sight(seen, runtime.model.encode([seen])[0], question)


def cached_token_layers(runtime: Runtime, outcome: Compressed) -> int:
    """Tokens that the picture takes in the cache, over all layers, as read from the pool."""
    conversation = runtime.start(outcome.strategy)
    runtime.extend(conversation, [outcome.image], want_logits=False)
    held = sum(len(stage.read(layer)[0]) for stage in conversation.cache.stages for layer in stage.layers)
    conversation.release()
    return held


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_the_budget_is_kept_in_the_cache(runtime: Runtime, sight: Sight, method: Method) -> None:
    layers, layout = runtime.layers, sight.encoded.layout
    for retention, outcome in zip(RETENTIONS, method.compress(runtime, sight, RETENTIONS), strict=True):
        held = cached_token_layers(runtime, outcome)
        assert held == outcome.token_layers(layers)
        room = tokens_kept(sight.encoded, retention, layers) * layers
        if method.name == "downsampling":
            # Whole rows and columns only: the largest grid that fits, and its newline.
            rows, columns = grid_within(room // layers - 1, 110, 100)
            assert held == (rows * columns + 1) * layers <= room
        elif method.name.endswith("-lean-rows"):
            assert room - 2 * layers <= held <= room + layers
        elif method.name == "vflowopt-published-reserve":
            pass  # overshoots, as published
        else:
            # A stage's tokens come in whole layers: less than one token of the deepest stage stays unused.
            assert room - max(outcome.strategy.spans(layers)) < held <= retention * len(layout) * layers + 1e-6


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_stages_are_nested_and_keep_what_carries_no_pixels(runtime: Runtime, sight: Sight, method: Method) -> None:
    for outcome in method.compress(runtime, sight, RETENTIONS):
        image = outcome.image
        assert len(image.embeddings) == len(image.positions) == len(image.kept[0])
        for kept in image.kept:
            assert (kept[1:] > kept[:-1]).all() and torch.isin(kept, image.kept[0]).all()
            if not method.name.endswith("-lean-rows"):
                assert image.layout.structural.sum() == image.layout.structural[kept].sum()


@pytest.mark.parametrize("method", AGNOSTIC, ids=by_name)
def test_the_question_does_not_matter_to_agnostic_methods(runtime: Runtime, sight: Sight, method: Method) -> None:
    other = Sight(sight.picture, sight.encoded, "Is there a zebra behind the second tree?")
    (here,), (there,) = (method.compress(runtime, each, [0.25]) for each in (sight, other))
    assert here.image.kept[0].equal(there.image.kept[0]) and here.image.embeddings.equal(there.image.embeddings)


@pytest.mark.parametrize("method", AWARE, ids=by_name)
def test_the_question_matters_to_aware_methods(runtime: Runtime, sight: Sight, method: Method) -> None:
    others = ["Is there a zebra behind the second tree?", "7 x 8", "Read the sign.", "z"]
    (here,) = method.compress(runtime, sight, [0.25])
    there = [method.compress(runtime, Sight(sight.picture, sight.encoded, each), [0.25])[0] for each in others]
    assert any(not each.image.kept[-1].equal(here.image.kept[-1]) for each in there)


def test_random_is_random(runtime: Runtime, sight: Sight) -> None:
    layout = sight.encoded.layout
    counts = torch.zeros(len(layout))
    draws = 300
    for seed in range(draws):
        (outcome,) = RandomChoice(seed).compress(runtime, sight, [0.5])
        counts[outcome.image.kept[0]] += 1
    assert (counts[layout.structural] == draws).all()
    content = counts[~layout.structural]
    share = content_kept(sight.encoded, 0.5, runtime.layers) / len(content)
    # Five standard deviations of a binomial: no token is favoured.
    assert ((content / draws - share).abs() < 5 * (share * (1 - share) / draws) ** 0.5).all()
    again, other = (RandomChoice(seed).compress(runtime, sight, [0.5])[0].image.kept[0] for seed in (7, 8))
    assert again.equal(RandomChoice(7).compress(runtime, sight, [0.5])[0].image.kept[0]) and not again.equal(other)


def test_downsampling_encodes_a_smaller_picture(runtime: Runtime, sight: Sight) -> None:
    model = runtime.model
    assert isinstance(model, LlavaOnevision)
    full, half, tenth = Downsampling().compress(runtime, sight, [1.0, 0.5, 0.1])
    assert len(full.image.embeddings) > len(half.image.embeddings) > len(tenth.image.embeddings)
    (rows, columns), *more = half.image.layout.shapes()
    assert not more and rows * columns + 1 == len(half.image.embeddings)
    patch = 14
    small = shrink(sight.picture.pixels, rows * patch, columns * patch)
    assert small.shape == (rows * patch, columns * patch, 3) and small.size < sight.picture.pixels.size
    assert half.image.embeddings[:-1].equal(encode_whole(model, small))
    # It is the picture: averaged down alike, the two are alike.
    blocks = [shrink(each, 7, 7).astype(int) for each in (small, sight.picture.pixels)]
    assert np.abs(blocks[0] - blocks[1]).mean() < 12
    assert np.abs(blocks[0] - blocks[1][::-1]).mean() > 12


def test_at_the_tower_s_own_size_nothing_is_interpolated(runtime: Runtime) -> None:
    model = runtime.model
    assert isinstance(model, LlavaOnevision)
    seen = Picture.from_pixels(picture(56, 56, 4))
    (encoded,) = model.encode([seen])
    torch.testing.assert_close(encode_whole(model, seen.pixels), encoded.embeddings[:16], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "height", "width"), [(130, 448, 448), (64, 300, 600), (9, 1000, 10), (1, 5, 5)])
def test_grids_fit_and_keep_the_shape(count: int, height: int, width: int) -> None:
    rows, columns = grid_within(count, height, width)
    assert 0.8 * count <= rows * columns <= count or min(rows, columns) == 1
    assert (rows >= columns) if height > width else (columns >= rows) or height == width


def test_a_uniform_grid_is_even(runtime: Runtime) -> None:
    sight = look_at(runtime, 112, 112, "")
    layout = sight.encoded.layout
    (outcome,) = UniformGrid().compress(runtime, sight, [0.3])
    kept = outcome.image.kept[0]
    kept = kept[~layout.structural[kept]]
    for grid, (rows, columns) in enumerate(layout.shapes()):
        inside = kept[layout.grid[kept] == grid]
        expected = content_kept(sight.encoded, 0.3, runtime.layers) / int((~layout.structural).sum())
        assert len(inside) == pytest.approx(expected * rows * columns, abs=1)
        # No token is further than two steps from one that is kept.
        every = (layout.grid == grid) & ~layout.structural
        down = (layout.row[every][:, None] - layout.row[inside]).abs()
        across = (layout.column[every][:, None] - layout.column[inside]).abs()
        assert torch.maximum(down, across).amin(-1).max() <= 2


def test_fastervlm_keeps_what_receives_most_attention(runtime: Runtime, sight: Sight) -> None:
    layout = sight.encoded.layout
    query, key = (states.float() for states in (sight.encoded.query, sight.encoded.key))
    received = ((query @ key.transpose(-1, -2)) * sight.encoded.scale).softmax(-1).mean((1, 2))
    values = sight.encoded.arrange(received)
    torch.testing.assert_close(attention_received(sight.encoded)[~layout.structural], values[~layout.structural])
    (outcome,) = FasterVlm().compress(runtime, sight, [0.5])
    kept = torch.zeros(len(layout), dtype=torch.bool)
    kept[outcome.image.kept[0]] = True
    content = ~layout.structural
    assert values[kept & content].min() >= values[~kept & content].max()


def test_visionzip_merges_all_that_is_not_dominant(runtime: Runtime, sight: Sight) -> None:
    encoded = sight.encoded
    (outcome,) = VisionZip().compress(runtime, sight, [0.4])
    kept = outcome.image.kept[0]
    changed = (outcome.image.embeddings != encoded.embeddings[kept]).any(-1)
    contextual = int(CONTEXTUAL * content_kept(encoded, 0.4, runtime.layers))
    assert 1 <= int(changed.sum()) <= contextual
    content = (~encoded.layout.structural).nonzero().squeeze(-1)
    ranked = content[attention_received(encoded)[content].argsort(descending=True, stable=True)]
    dominant = ranked[: content_kept(encoded, 0.4, runtime.layers) - contextual]
    assert torch.isin(dominant, kept).all() and not changed[torch.isin(kept, dominant)].any()
    # Averages of groups that hold everything else once: weighted by size they sum up to all that was merged.
    merged = outcome.image.embeddings[~torch.isin(kept, dominant) & torch.isin(kept, content)]
    rest = encoded.embeddings[content[~torch.isin(content, dominant)]]
    assert merged.min() >= rest.min() - 1e-5 and merged.max() <= rest.max() + 1e-5
    sizes = torch.linalg.lstsq(merged.T.double(), rest.sum(0).double()).solution
    torch.testing.assert_close(sizes, sizes.round(), rtol=0, atol=1e-3)
    assert sizes.sum().round() == len(rest) and (sizes.round() >= 1).all()


def test_divprune_is_more_diverse_than_chance(runtime: Runtime, sight: Sight) -> None:
    similarity, content = content_similarity(sight.encoded)

    def least_distance(method: Method) -> float:
        (outcome,) = method.compress(runtime, sight, [0.5])
        chosen = torch.isin(content, outcome.image.kept[0])
        among = similarity[chosen][:, chosen] - 2 * torch.eye(int(chosen.sum()))
        return 1 - float(among.max())

    diverse = least_distance(DivPrune())
    assert all(diverse > least_distance(RandomChoice(seed)) for seed in range(10))


def test_scope_without_saliency_covers_best(runtime: Runtime, sight: Sight) -> None:
    similarity, content = content_similarity(sight.encoded)

    def coverage(method: Method) -> float:
        (outcome,) = method.compress(runtime, sight, [0.4])
        return float(similarity[:, torch.isin(content, outcome.image.kept[0])].amax(-1).clamp_min(0).sum())

    covered = coverage(Scope(exponent=0.0))
    assert all(covered > coverage(RandomChoice(seed)) for seed in range(10)) and covered >= coverage(FasterVlm())


def test_votes_are_the_attention_that_hugging_face_computes(runtime: Runtime, folder: Path, sight: Sight) -> None:
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = len(sight.encoded.layout)
    (full,) = VFlowOpt().compress(runtime, sight, [1.0])
    items = runtime.chat.turn(0, [full.image, sight.question])
    before = items.index(full.image)
    ids = torch.tensor([item for item in items if isinstance(item, int)])
    with torch.inference_mode():
        words = network.get_input_embeddings()(ids)
        embeds = torch.cat((words[:before], sight.encoded.embeddings, words[before:]))[None]
        weights = network.model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    prompt = PromptPass(runtime, sight.encoded, sight.question)
    prompt.run(range(2))
    visual = slice(before, before + tokens)
    torch.testing.assert_close(prompt.attention(), weights[1][0].mean(0)[-1, visual], rtol=1e-4, atol=1e-6)
    two = weights[1][0].mean(0)[before + tokens + torch.tensor([0, 3]), visual].mean(0)
    torch.testing.assert_close(prompt.attention(torch.tensor([0, 3])), two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("retention", [0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("layers", [2, 6, 28])
def test_a_pyramid_meets_its_budget(retention: float, layers: int) -> None:
    assert pyramid(retention, layers).budget(layers) == pytest.approx(retention, rel=1e-9)


def test_curves_move_one_parameter_and_keep_the_budget() -> None:
    for method in curves(VFlowOpt(), 6):
        assert isinstance(method, VFlowOpt)
        for retention in (0.5, 0.25, 0.1, 0.05):
            strategy, base = method.strategy(retention, 6), VFlowOpt().strategy(retention, 6)
            assert strategy.budget(6) == pytest.approx(retention)
            fields = ("threshold", "alpha", "grid", "diversity", "ratios")
            assert sum(getattr(strategy, name) != getattr(base, name) for name in fields) <= 1
    assert VFlowOpt().strategy(1.0, 6) == Strategy.full()


def test_a_model_s_own_strategies_are_methods_by_their_stem() -> None:
    brought = {
        "lean-10": Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=3.0),
        "lean-50": Strategy.from_budget(0.5, 6, (0.6, 0.9), diversity=0.4),
        "other": Strategy((0,), (0.3,)),
    }
    lean, other, published = own(brought, 6)
    assert [method.name for method in (lean, other, published)] == ["vflowopt-lean", "vflowopt-other", "vflowopt"]
    assert lean.strategy(0.1, 6) == brought["lean-10"] and lean.strategy(0.5, 6) == brought["lean-50"]
    between = lean.strategy(0.25, 6)
    assert between.budget(6) == pytest.approx(0.25) and between.diversity == 0.4 and between.ratios[:2] == (0.3, 0.9)
    assert other.strategy(0.1, 6) == Strategy((0,), (0.1,))
    assert published.strategy(0.25, 6) == Strategy.preset(0.25, 6)


def test_a_staged_choice_begins_with_the_same_tokens(runtime: Runtime, sight: Sight) -> None:
    structural = sight.encoded.layout.structural
    base = VFlowOpt()
    (staged,) = Staged(DivPrune(), base).compress(runtime, sight, [0.3])
    assert staged.strategy.ratios == base.strategy(0.3, runtime.layers).ratios
    order = DivPrune().scores(runtime, sight, int((~structural).sum()))
    for kept in staged.image.kept:
        content = kept[~structural[kept]]
        best = order.masked_fill(structural, -torch.inf).argsort(descending=True)[: len(content)]
        assert content.equal(best.sort().values)
    (lean,) = Staged(DivPrune(), base, lean_rows=True).compress(runtime, sight, [0.3])
    rows = torch.stack((sight.encoded.layout.grid, sight.encoded.layout.row), dim=-1)
    for kept, all_ends in zip(lean.image.kept, staged.image.kept, strict=True):
        ends, content = kept[structural[kept]], kept[~structural[kept]]
        # A row end stays where a token of its row does.
        assert {*map(tuple, rows[ends].tolist())} <= {*map(tuple, rows[content].tolist())}
        assert len(content) >= len(all_ends) - int(structural.sum())


def test_looking_deeper_changes_the_choice_and_not_the_budget(runtime: Runtime, sight: Sight) -> None:
    by_name = {method.name: method for method in looks(runtime.layers)}
    for name, published in (
        ("fastv", FastV()),
        ("pyramiddrop", PyramidDrop()),
        ("sparsevlm-raters", SparseVlmRaters()),
    ):
        kept = [by_name[f"{name}-{look}"].compress(runtime, sight, [0.2])[0] for look in (1, 2, runtime.layers)]
        (default,) = published.compress(runtime, sight, [0.2])
        assert any(default.image.kept[-1].equal(each.image.kept[-1]) for each in kept[:2])
        assert not kept[0].image.kept[-1].equal(kept[-1].image.kept[-1])
