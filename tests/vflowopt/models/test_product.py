"""Products with weights: the same by either library, whatever the shape, and the faster one is chosen."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vflowopt.models import product as products
from vflowopt.models.product import Activation, by_onednn, product, speed_up

needs_onednn = pytest.mark.skipif(products._onednn is None, reason="this torch lacks the operator")


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    chosen = bool(request.param) and products._onednn is not None
    monkeypatch.setattr(products, "_onednn_is_faster", lambda *_: chosen)
    return chosen


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (700,), (5, 256)], ids=["few", "flat", "tiles"])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_multiplies_like_torch(library: bool, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool) -> None:
    states, weight, bias, onto = drawn(*shape, 48), drawn(80, 48) / 7, drawn(80), drawn(*shape, 80)
    exact = F.linear(states.double(), weight.double(), bias.double())
    states, weight, bias, onto = (each.to(dtype) for each in (states, weight, bias, onto))
    if transposed:
        weight = weight.t().contiguous().t()
    bound = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    with torch.inference_mode():
        found = product(states, weight, bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, **bound)
        torch.testing.assert_close(product(states, weight).double(), exact - bias.double(), **bound)
        torch.testing.assert_close(product(states, weight, bias, onto=onto).double(), exact + onto.double(), **bound)
        activations: tuple[tuple[Activation, str], ...] = (("gelu", "none"), ("gelu_tanh", "tanh"))
        for name, approximate in activations:
            activated = product(states, weight, bias, activation=name).double()
            torch.testing.assert_close(activated, F.gelu(exact, approximate=approximate), **bound)


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_onednns_results_do_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda *_: True)
    monkeypatch.setattr(products, "ENOUGH", 0)
    states, weight = drawn(300, 192), drawn(320, 192)
    weight = weight.t().contiguous().t() if transposed else weight
    with torch.inference_mode():
        together = product(states, weight)
        # A single row takes another way, if the weight is not transposed.
        for rows in (1, 2, 5, 16, 33, 128)[not transposed :]:
            assert torch.equal(product(states[:rows], weight), together[:rows])


@pytest.fixture
def fresh() -> Iterator[None]:
    products._onednn_is_faster.cache_clear()
    yield
    products._onednn_is_faster.cache_clear()


@needs_onednn
@pytest.mark.parametrize(("ours", "theirs", "chosen"), [(0.5, 1.0, True), (1.0, 1.0, False), (1.0, 0.5, False)])
def test_the_clearly_faster_library_is_chosen(
    fresh: None, monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float, chosen: bool
) -> None:
    times = iter((ours, theirs))
    monkeypatch.setattr(products, "_shortest", lambda work: work() is None or next(times))
    threads = torch.get_num_threads()
    assert by_onednn(drawn(96, 96)) is chosen
    assert by_onednn(drawn(96, 96)) is chosen, "a shape is tried once"
    assert torch.get_num_threads() == threads
    assert not by_onednn(drawn(96, 96).double())


def test_a_torch_without_the_operator_multiplies_by_its_own(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn", None)
    assert not by_onednn(drawn(96, 96))
    torch.testing.assert_close(product(drawn(600, 96), drawn(96, 96)), drawn(600, 96) @ drawn(96, 96).t())


def test_linear_maps_are_sped_up_where_they_are(library: bool) -> None:
    network = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    seen: list[int] = []
    network[0].register_forward_hook(lambda *_: seen.append(1))
    states = drawn(400, 64)
    before, names = network(states), set(network.state_dict())
    speed_up(network)
    assert set(network.state_dict()) == names
    with torch.inference_mode():
        torch.testing.assert_close(network(states), before, atol=1e-5, rtol=1e-5)
    assert len(seen) == 2
    network(states).sum().backward()  # outside of inference torch multiplies, and can go back
    assert network[0].weight.grad is not None
