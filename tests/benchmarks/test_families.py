"""Rivals, ablations and the search run on every family: none knows one, but for those that refuse it by name."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.rivals import Compressed, Method, Sight, rivals
from benchmarks.rivals.downsampling import Downsampling
from benchmarks.rivals.prompt_pass import PromptPass
from benchmarks.rivals.pyramiddrop import PyramidDrop
from benchmarks.rivals.vflowopt import VFlowOpt, ablations
from tests.vflowopt.generation import picture
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.families import FAMILIES
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import Calibration, Comparison, Sample
from vflowopt.search.tuner import Trial, Tuner

QUESTION = "What is in the picture?"
OVERSHOOTING = {"vflowopt-published-reserve", "vflowopt-lean-rows"}
"""The first as published, the second by a row end."""
CHANGING_ALL = {"downsampling", "vflowopt-renumbered"}
"""What changes a picture even where nothing is dropped: renumbering does where positions have several axes."""


@pytest.fixture(scope="module", params=ONE_EACH, ids=lambda model: model.name)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    model: TinyModel = request.param
    return Runtime.load(model.save(tmp_path_factory.mktemp(model.name)), kv_budget=32 << 20)


@pytest.fixture
def runtime(loaded: Runtime) -> Iterator[Runtime]:
    yield loaded
    loaded.pool.check_integrity([])


@pytest.fixture(scope="module")
def sight(loaded: Runtime) -> Sight:
    seen = Picture.from_pixels(picture(112, 168, 3))
    return Sight(seen, loaded.model.encode([seen])[0], QUESTION)


def test_every_family_is_here() -> None:
    assert len(ONE_EACH) == len(FAMILIES)


def logits(runtime: Runtime, outcome: Compressed) -> torch.Tensor:
    """Behind the question, as answered from the cache; it holds exactly what the method says."""
    conversation = runtime.start(outcome.strategy)
    items = runtime.chat.turn(0, [outcome.image, QUESTION])
    found = runtime.extend(conversation, items)
    held = sum(len(stage.read(layer)[0]) for stage in conversation.cache.stages for layer in stage.layers)
    assert held == outcome.token_layers(runtime.layers) + (len(items) - 1) * runtime.layers
    conversation.release()
    assert found is not None
    return found


def test_every_method_keeps_its_budget_and_is_answered_from(runtime: Runtime, sight: Sight) -> None:
    tokens = len(sight.encoded.layout)
    retentions = (1.0, 0.45)
    methods: list[Method] = [*rivals(0), VFlowOpt(), *ablations(VFlowOpt(), runtime.layers)]
    suited = [method for method in methods if method.flaw(runtime.model) is None]
    full = logits(runtime, VFlowOpt().compress(runtime, sight, [1.0])[0])
    for method in suited:
        outcomes = method.compress(runtime, sight, retentions)
        for retention, outcome in zip(retentions, outcomes, strict=True):
            answered = logits(runtime, outcome)
            assert answered.isfinite().all(), method.name
            room = retention * tokens * runtime.layers
            if method.name not in OVERSHOOTING:
                assert outcome.token_layers(runtime.layers) <= room + 1e-6, method.name
            if retention == 1.0 and method.name not in CHANGING_ALL:
                torch.testing.assert_close(answered, full, rtol=1e-4, atol=1e-4)
            elif retention < 1.0:
                assert not torch.allclose(answered, full, rtol=1e-4, atol=1e-4), method.name


def test_who_cannot_be_had_says_so_by_name(runtime: Runtime, sight: Sight) -> None:
    flaws = {method.name: flaw for method in rivals(0) if (flaw := method.flaw(runtime.model))}
    if runtime.model.family != "InternVL":
        assert not flaws
        return
    assert list(flaws) == ["downsampling"] and "InternVL" in flaws["downsampling"]
    with pytest.raises(ValueError, match="downsampling encodes no picture of InternVL"):
        Downsampling().compress(runtime, sight, [0.5])


def test_the_prompt_pass_is_the_decoder_s_own_way(runtime: Runtime, sight: Sight) -> None:
    prompt = PromptPass(runtime, sight.encoded, sight.question)
    for layer in range(runtime.layers):
        prompt.run(range(layer, layer + 1))
    weights = prompt.attention()
    assert weights.shape == (len(sight.encoded.layout),) and 0 < float(weights.sum()) < 1
    (full,) = VFlowOpt().compress(runtime, sight, [1.0])
    mine = runtime.model.head(runtime.decoder.norm(prompt.text_states[-1:]))[0].float()
    torch.testing.assert_close(mine, logits(runtime, full), rtol=1e-4, atol=1e-4)


def test_dropping_on_the_way_is_what_the_cache_will_hold(runtime: Runtime, sight: Sight) -> None:
    (outcome,) = PyramidDrop().compress(runtime, sight, [0.5])
    prompt = PromptPass(runtime, sight.encoded, sight.question)
    ends = (*outcome.strategy.starts[1:], runtime.layers)
    for start, end, kept in zip(outcome.strategy.starts, ends, outcome.image.kept, strict=True):
        prompt.keep(kept)
        prompt.run(range(start, end))
    mine = runtime.model.head(runtime.decoder.norm(prompt.text_states[-1:]))[0].float()
    torch.testing.assert_close(mine, logits(runtime, outcome), rtol=1e-4, atol=1e-4)


def test_the_search_runs_and_unpruned_is_its_own_reference(runtime: Runtime) -> None:
    samples = [Sample(Picture.from_pixels(picture(112, 168, seed)), (QUESTION, "And?")) for seed in (1, 2)]
    calibration = Calibration(runtime, samples, new_tokens=2)
    base = Strategy.preset(0.5, runtime.layers)
    tuner = Tuner(runtime, calibration, budget=0.5, base=base, trials=2, sampler="random")
    trials = [step for step in tuner.steps() if isinstance(step, Trial)]
    assert [trial.strategy.budget(runtime.layers) for trial in trials] == pytest.approx([0.5, 0.5])
    assert all(-1 <= trial.objective < 0.9999 for trial in trials)
    *_, comparison = calibration.compare(Strategy.full())
    assert isinstance(comparison, Comparison)
    assert comparison.objective == pytest.approx(1.0, abs=1e-5) and comparison.agreement == 1.0
