"""A compiled vision encoder sees what one that is not compiled sees, and finds at the next start what it compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.vflowopt.generation import picture
from tests.vflowopt.models.matrix import ONE_EACH, TinyModel
from vflowopt.media.picture import Picture
from vflowopt.models.compilation import compile_encoder
from vflowopt.models.loading import load_model

SIZES = [(56, 56), (60, 200), (113, 97)]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compared(folder: Path, cache: Path, backend: str) -> int:
    """Encode with and without; returns how many programs were made."""
    plain, compiled = load_model(folder), load_model(folder)
    compile_encoder(compiled, cache, backend=backend)
    for seed, size in enumerate(SIZES):
        shown = [Picture.from_pixels(picture(*size, seed))]
        (expected,), (encoded,) = plain.encode(shown), compiled.encode(shown)
        torch.testing.assert_close(encoded.embeddings, expected.embeddings, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(encoded.key, expected.key, atol=1e-4, rtol=1e-4)
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "tiny",
    [ONE_EACH[0], *(pytest.param(model, marks=pytest.mark.long) for model in ONE_EACH[1:])],
    ids=lambda model: model.name,
)
def test_every_family_is_encoded_by_compiled_layers(tiny: TinyModel, tmp_path: Path) -> None:
    """Traced, but not compiled: that takes long, and is torch's own."""
    assert compared(tiny.save(tmp_path / "model"), tmp_path / "cache", "eager") > 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_what_was_compiled_is_found_again(tmp_path: Path) -> None:
    folder = ONE_EACH[0].save(tmp_path / "model")
    made = []
    for _ in range(2):
        torch.compiler.reset()
        counters.clear()
        assert compared(folder, tmp_path / "cache", "inductor") > 0
        made.append(counters["inductor"]["fxgraph_cache_miss"])
    assert made[0] > 0 and made[1] == 0


def test_layers_that_cannot_be_compiled_stay_as_they_are(tmp_path: Path) -> None:
    model = load_model(ONE_EACH[0].save(tmp_path / "model"))
    shown = [Picture.from_pixels(picture(56, 56, 0))]
    (expected,) = model.encode(shown)

    def failing(module: object, inputs: object) -> Callable[..., object]:
        raise ValueError("no compiler here")

    with pytest.raises(RuntimeError, match="the vision encoder cannot be compiled"):
        compile_encoder(model, tmp_path / "cache", backend=failing)
    (encoded,) = model.encode(shown)
    assert torch.equal(encoded.embeddings, expected.embeddings)
