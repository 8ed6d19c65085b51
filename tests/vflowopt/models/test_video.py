"""Videos: frames as each family reads them, pruned over the whole clip."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vflowopt.generation import Chat, picture, video
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from tests.vflowopt.models.tiny_internvl import INTERNVL
from tests.vflowopt.models.tiny_qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tests.vflowopt.reference import Reference
from tests.vflowopt.tiny_models import SHAPES
from vflowopt.compression.importance import patch_entropy
from vflowopt.compression.pipeline import choose, compress
from vflowopt.compression.serialize import pack, unpack
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video, VideoError
from vflowopt.models.loading import load_model
from vflowopt.models.qwen_vl import QwenVl
from vflowopt.runtime.model_runner import Runtime

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
    chat = Chat(runtime, Strategy.full())
    answers = [chat.ask(turn, 8) for turn in turns]
    assert answers == expected
    for ours, theirs in zip(chat.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert len({token for answer in answers for token in answer}) > 5, "answers too uniform to prove anything"
    chat.sequence.release()


TENTH = Strategy((0, 1, 3), (0.16, 0.7, 0.5), threshold=1.0, grid=2.0)


def test_a_reused_cache_answers_like_a_recomputed_one(runtime: Runtime) -> None:
    clip = video(84, 112, (0.0, 1.0, 2.0, 3.0), seed=2)
    turns = [[clip, "what?"], ["one"], [picture(60, 90, 3), "two"]]
    reused, recomputed = Chat(runtime, TENTH), Chat(runtime, TENTH)
    for turn in turns:
        recomputed.sequence.release()
        assert reused.ask(turn, 4) == recomputed.ask(turn, 4)
    for held, again in zip(reused.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(held, again, atol=1e-4, rtol=0)
    reused.sequence.release()
    recomputed.sequence.release()


def test_a_video_shown_ahead_is_one_shown_with_its_question(runtime: Runtime) -> None:
    clip, other = video(84, 112, (0.0, 1.0, 2.0), seed=3), picture(60, 90, 4)
    ahead, together = Chat(runtime, TENTH), Chat(runtime, TENTH)
    ahead.look(clip)
    ahead.look(other)
    assert ahead.ask(["same?"], 6) == together.ask([clip, other, "same?"], 6)
    assert ahead.sequence.log[:3] == together.sequence.log[:3]
    ahead.sequence.release()
    together.sequence.release()


def test_kept_tokens_stand_where_the_unpruned_ones_stood(runtime: Runtime) -> None:
    clip = video(84, 112, (0.0, 1.0, 2.0, 4.0), seed=5)
    (full,) = runtime.compress([clip], Strategy.full())
    (pruned,) = runtime.compress([clip], TENTH)
    first = pruned.kept[0]
    assert len(first) < pruned.tokens
    assert torch.equal(pruned.positions, full.positions[..., first])
    assert pruned.span == full.span == int(full.positions.max()) + 1
    plain = ~torch.isin(first, pruned.recycled)
    assert torch.equal(pruned.embeddings[plain], full.embeddings[first[plain]])
    structural = pruned.layout.structural.nonzero().squeeze(-1)
    assert all(torch.isin(structural, kept).all() for kept in pruned.kept)
    assert pruned.frames == full.frames == 4


def test_the_budget_goes_to_the_frames_that_matter(runtime: Runtime) -> None:
    """Of a clip that is flat but for a spot in one frame, what is kept beyond the structural tokens lies in it."""
    encoded = runtime.model.encode_video(_flat_but_for_a_spot(frame=2))
    entropies = encoded.arrange(patch_entropy(encoded.pixels, encoded.patch).flatten(1))
    best = int(entropies.masked_fill(encoded.layout.structural, -1.0).argmax())
    left, top, right, bottom = encoded.layout.boxes[best].tolist()
    assert left < 84 and right > 42 and top < 84 and bottom > 42

    attended = (patch_entropy(encoded.pixels, encoded.patch).flatten(1) > 0).float()
    scores = encoded.arrange(attended).masked_fill(encoded.layout.structural, 0.0)
    few = (int(encoded.layout.structural.sum()) + 2) / len(encoded.layout)
    chosen = choose(encoded, scores, Strategy((0,), (few,)), runtime.layers)
    content = chosen.kept[0][~encoded.layout.structural[chosen.kept[0]]]
    assert len(content) >= 1
    assert set(encoded.layout.grid[content].tolist()) == {int(encoded.layout.grid[best])}


def test_scores_are_of_the_frames_that_they_stand_for(runtime: Runtime) -> None:
    encoded = runtime.model.encode_video(video(84, 112, (0.0, 1.0, 2.0, 3.0), seed=6))
    maps = encoded.context_relevance(1.0)
    steps, patches = maps.shape
    layout = encoded.layout
    assert len(layout) == len(encoded.embeddings) == encoded.places.shape[-1]
    assert layout.grid.max() + 1 == steps == len(layout.shapes())
    assert encoded.pixels.shape[0] == steps
    assert patches == encoded.pixels.shape[1] // encoded.patch * (encoded.pixels.shape[2] // encoded.patch)
    numbered = torch.arange(steps, dtype=torch.float32)[:, None].expand(-1, patches).contiguous()
    content = ~layout.structural
    torch.testing.assert_close(encoded.arrange(numbered)[content], layout.grid[content].float())
    assert (layout.boxes[layout.structural] == 0).all()


def test_what_is_said_of_patches_is_said_of_the_pixels_that_tokens_cover(runtime: Runtime) -> None:
    clip = video(84, 112, (0.0, 1.0, 2.0), seed=6)
    encoded = runtime.model.encode_video(clip)
    steps, rows, columns = patch_entropy(encoded.pixels, encoded.patch).shape
    content = ~encoded.layout.structural
    left, top, right, bottom = encoded.layout.boxes[content].unbind(-1)
    down = (torch.arange(rows) + 0.5)[:, None].expand(steps, -1, columns) * clip.height / rows
    across = (torch.arange(columns) + 0.5).expand(steps, rows, -1) * clip.width / columns
    for values, begin, end in ((down, top, bottom), (across, left, right)):
        arranged = encoded.arrange(values.reshape(steps, -1))[content]
        assert ((arranged - (begin + end) / 2).abs() < (end - begin) / 8).all()


def test_structural_tokens_are_of_the_frame_that_they_mark(runtime: Runtime) -> None:
    layout = runtime.model.encode_video(video(84, 112, (0.0, 1.0, 2.0, 3.0), seed=6)).layout
    content = ~layout.structural
    rows, columns = layout.shapes()[0]
    last = int(content.nonzero()[-1])
    for token in layout.structural.nonzero().flatten().tolist():
        behind = token + int(content[token:].nonzero()[0]) if token < last else last
        at = [int(each[token]) for each in (layout.grid, layout.row, layout.column)]
        assert at == [int(layout.grid[behind]), 0 if token < last else rows - 1, columns]


def test_a_packed_video_is_the_same_video(runtime: Runtime) -> None:
    (image,) = runtime.compress([video(84, 112, (0.0, 1.0), seed=7)], TENTH)
    again = unpack(pack(image))
    assert (again.frames, again.identity, again.span) == (2, image.identity, image.span)
    assert torch.equal(again.embeddings, image.embeddings)


def test_videos_and_pictures_are_compressed_in_the_order_given(runtime: Runtime) -> None:
    clip, shown = video(84, 112, (0.0, 1.0), seed=8), Picture.from_pixels(picture(60, 90, 1))
    images = runtime.compress([clip, shown, clip], TENTH)
    assert [image.identity for image in images] == [clip.identity, shown.identity, clip.identity]
    assert [image.frames for image in images] == [2, 0, 2]


def _flat_but_for_a_spot(frame: int) -> Video:
    frames = []
    for index in range(4):
        pixels = np.full((84, 112, 3), 120, np.uint8)
        if index == frame:
            spot = pixels[42:84, 42:84]
            spot[:] = np.random.default_rng(0).integers(0, 256, spot.shape, dtype=np.uint8)
        frames.append(Picture.from_pixels(pixels))
    return Video.of(frames, (0.0, 1.0, 2.0, 3.0))


@pytest.mark.parametrize("tiny", ONE_EACH, ids=lambda tiny: tiny.name)
def test_a_family_takes_videos_or_says_that_it_does_not(tiny: TinyModel, tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path))
    clip = video(56, 56, (0.0, 1.0), seed=1)
    if tiny in TINY:
        assert model.video_mark and model.encode_video(clip).frames == 2
    else:
        assert model.video_mark is None
        with pytest.raises(VideoError, match=f"{model.family} model takes no videos") as refused:
            model.encode_video(clip)
        assert refused.value.reason == "VIDEO_UNSUPPORTED"


def test_a_model_whose_template_knows_no_videos_takes_none(tmp_path: Path) -> None:
    folder = SHAPES[0].save(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'video'", "'film'"))
    assert load_model(folder).video_mark is None


def test_frames_of_a_long_video_stand_as_in_training(tmp_path: Path) -> None:
    """Time reaches farther than rows and columns: what follows begins behind all three axes.

    So Qwen2.5-VL was trained. Hugging Face's present ``get_rope_index`` looks at rows and columns alone there, and its
    ``generate`` then puts the answer elsewhere than the text before it: so the reference is its layers with positions
    by the rule of the model's authors.
    """
    folder = QWEN2_5_VL[0].save(tmp_path)
    runtime = Runtime.load(folder, kv_budget=16 << 20)
    clip = video(56, 56, (0.0, 4.0, 8.0, 12.0), seed=1)
    (image,) = runtime.compress([clip], Strategy.full())
    time, row, column = image.positions
    assert time.max() == 16 > row.max() + column.max()  # two positions a second, two frames a step, four seconds apart
    assert image.span == 17
    sequence = runtime.start(Strategy.full())
    logits = runtime.extend(sequence, [65, image, 66, 67])
    assert logits is not None
    network = Reference(folder).network
    with torch.no_grad():
        words = network.model.language_model.embed_tokens(torch.tensor([65, 66, 67]))
        hidden = torch.cat((words[:1], image.embeddings, words[1:]))[None]
        positions = torch.cat(
            (torch.zeros(3, 1, dtype=torch.long), image.positions + 1, torch.tensor([[18, 19]]).expand(3, -1)), dim=1
        )
        decoder = network.model.language_model
        turns = decoder.rotary_emb(hidden, positions[:, None])
        for layer in decoder.layers:
            output = layer(hidden, position_embeddings=turns, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        expected: Tensor = network.lm_head(decoder.norm(hidden[0, -1]))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    sequence.release()


@pytest.mark.parametrize(
    ("file", "document", "expected"),
    [
        ("video_preprocessor_config.json", {"size": {"shortest_edge": 3136, "longest_edge": 6272}}, (3136, 6272)),
        ("video_preprocessor_config.json", {"min_pixels": 784, "max_pixels": 6272}, (784, 6272)),
        ("processor_config.json", {"video_processor": {"size": {"shortest_edge": 8, "longest_edge": 9}}}, (8, 9)),
        ("video_preprocessor_config.json", {"temporal_patch_size": 2}, QwenVl.usual_video_size),
    ],
    ids=["own", "older", "together", "silent"],
)
def test_frames_are_as_large_as_the_video_processor_makes_them(
    file: str, document: dict[str, object], expected: tuple[int, int], tmp_path: Path
) -> None:
    folder = QWEN2_VL[0].save(tmp_path / "model")
    plain = load_model(folder)
    assert isinstance(plain, QwenVl)
    size = plain.processor.size
    assert plain.video_size == (size.shortest_edge, size.longest_edge)  # the image processor's, where there is no other
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / file).write_text(json.dumps(document))
    model = load_model(other)
    assert isinstance(model, QwenVl)
    assert model.video_size == expected


def test_what_importance_says_of_a_video_is_compressed(runtime: Runtime) -> None:
    encoded = runtime.model.encode_video(video(84, 112, (0.0, 1.0, 2.0, 3.0), seed=9))
    image = compress(encoded, TENTH, runtime.layers)
    ends = [len(kept) for kept in image.kept]
    structural = int(encoded.layout.structural.sum())
    assert ends == sorted(ends, reverse=True) and ends[0] > structural
    assert image.importance.shape == (len(encoded.layout),)
    assert (image.importance[encoded.layout.structural] == 0).all()


def test_many_frames_are_looked_at_a_few_at_a_time(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = video(84, 112, (0.0, 1.0, 2.0, 3.0, 4.0), seed=10)
    together = runtime.model.encode_video(clip)
    monkeypatch.setattr("vflowopt.models.tiled_video._MOST_FRAMES", 2)
    monkeypatch.setattr("vflowopt.models.qwen_vl._MOST_PATCHES", 1)
    apart = runtime.model.encode_video(clip)
    for name in ("embeddings", "query", "key"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(apart.pixels, together.pixels)
    assert (apart.class_key is None) == (together.class_key is None)


@pytest.mark.parametrize("tiny", [SHAPES[0], QWEN2_VL[0]], ids=lambda tiny: tiny.name)
def test_more_tokens_than_the_model_was_made_for_are_refused_unseen(tiny: TinyModel, tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path))
    clip = video(56, 56, (0.0, 1.0, 2.0, 3.0), seed=1)
    tokens = len(model.encode_video(clip).layout)
    model.context = tokens
    model.encode_video(clip)
    model.context = tokens - 1
    with pytest.raises(VideoError, match=f"4 frames take {tokens} tokens, some {tokens // 4} each") as refused:
        model.encode_video(clip)
    assert refused.value.reason == "VIDEO_TOO_LONG"
    assert refused.value.metadata == {"frames": "4", "max_frames": "3"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_videos_in_half_precision(folder: Path, dtype: str) -> None:
    runtime = Runtime.load(folder, dtype=dtype, kv_budget=16 << 20)
    (whole,) = runtime.compress([video(84, 112, (0.0, 1.0, 2.0), seed=11)], Strategy.full())
    assert whole.embeddings.dtype == runtime.model.dtype
    chat = Chat(runtime, TENTH)
    assert len(chat.ask([video(84, 112, (0.0, 1.0, 2.0), seed=11), "what?"], 2)) > 0
    assert all(torch.isfinite(logits).all() for logits in chat.logits)
    chat.sequence.release()


@pytest.mark.parametrize("tiny", INTERNVL, ids=lambda tiny: tiny.name)
def test_class_tokens_score_the_frames_that_they_belong_to(tiny: TinyModel, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vflow_scoring": "cls"}))
    model = load_model(folder)
    clip = video(84, 112, (0.0, 1.0, 2.0), seed=12)
    of_clip = model.encode_video(clip).context_relevance(1.0)
    alone = [each.context_relevance(1.0) for each in model.encode([frame.in_detail("low") for frame in clip.frames])]
    torch.testing.assert_close(of_clip, torch.cat(alone), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(of_clip[0], of_clip[1])
