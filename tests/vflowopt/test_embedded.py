"""The embedded model with the presets: what is really held of a picture."""

from collections.abc import Iterator

import pytest

from tests.vflowopt.generation import picture
from vflowopt.compression.strategy import Strategy
from vflowopt.demo import model_path
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sequence import Sequence


@pytest.fixture(scope="module")
def embedded() -> Iterator[Runtime]:
    runtime = Runtime.load(model_path(), kv_budget=64 << 20)
    yield runtime
    runtime.pool.check_integrity([])


def tensor_bytes(sequence: Sequence) -> int:
    """Bytes of the keys and values themselves."""
    return sum(
        tensor.numel() * tensor.element_size()
        for stage in sequence.cache.stages
        for layer in stage.layers
        for tensor in stage.read(layer)
    )


@pytest.mark.parametrize(("budget", "most"), [(0.5, 0.5), (0.25, 0.25), (0.1, 0.1)])
def test_the_presets_hold_no_more_than_their_share(embedded: Runtime, budget: float, most: float) -> None:
    """In tensors exactly, and in pages allocated within a page per stage and layer."""
    held, allocated = [], []
    for strategy in (Strategy.preset(budget, embedded.layers), Strategy.full()):
        (image,) = embedded.compress([Picture.from_pixels(picture(448, 448, 3))], strategy)
        assert image.tokens == 1312
        sequence = embedded.start(strategy)
        embedded.extend(sequence, [image], want_logits=False)
        held.append(tensor_bytes(sequence))
        allocated.append(sequence.kv_bytes)
        sequence.release()
    assert held[0] <= most * held[1]
    assert allocated[0] <= (most + 0.01) * allocated[1]
