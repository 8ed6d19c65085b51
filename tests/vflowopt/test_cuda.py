"""What runs on the CPU runs on a GPU: the same answers, whatever is done to the cache between them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.attention import GEOMETRIES, rows, scenarios, variants
from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.test_cuda_graph import decode, graphs, sequences
from tests.vflowopt.test_varlen_attention import compare, page_access, pool
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.loading import load_model
from vflowopt.models.tiled import TiledModel
from vflowopt.runtime.backend import BackendName
from vflowopt.runtime.backend_choice import BACKENDS, build_backend, choose_backend
from vflowopt.runtime.cache import StagedCache
from vflowopt.runtime.cuda_graph import DecodeGraphs
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import offload, restore
from vflowopt.runtime.side_stream import SideStream

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
TENTH = Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0)


def converse(runtime: Runtime, strategy: Strategy) -> Chat:
    """Two turns in one cache, a fork and a parking between them."""
    chat = Chat(runtime, strategy)
    chat.ask([picture(100, 60, 1), "what?"], 6)
    fork = chat.sequence.fork()
    runtime.extend(fork, [1, 2, 3])
    fork.release()
    restore(chat.sequence, offload(chat.sequence))
    chat.ask([picture(56, 120, 2), "and now?"], 6)
    chat.sequence.release()
    runtime.pool.check_integrity([])
    return chat


@pytest.mark.parametrize("strategy", [Strategy.full(), TENTH], ids=["full", "tenth"])
def test_the_device_changes_no_answer(plain_folder: Path, strategy: Strategy) -> None:
    here, there = (
        converse(Runtime.load(plain_folder, device=device, kv_budget=32 << 20), strategy) for device in ("cpu", DEVICE)
    )
    assert here.sequence.log[-1] == there.sequence.log[-1]
    for one, other in zip(here.logits, there.logits, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=1e-3, rtol=1e-3)


def test_half_precision_and_ragged_batches(plain_folder: Path) -> None:
    runtime = Runtime.load(plain_folder, device=DEVICE, dtype="bfloat16", kv_budget=32 << 20)
    chats = [Chat(runtime, strategy) for strategy in (TENTH, Strategy.full())]
    for chat in chats:
        chat.ask([picture(80, 80, 0), "hi"], 4)
        chat.sequence.log.append(65)
    sequences = [chat.sequence for chat in chats]
    for logits in runtime.advance(sequences, [1, None]):
        assert logits is None or logits.isfinite().all()
    for sequence in sequences:
        sequence.release()


def test_the_triton_kernels_are_chosen(plain_folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert Runtime.load(plain_folder, device=DEVICE, dtype=dtype, kv_budget=8 << 20).backend.name == "triton"


@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3"])
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_backends_answer_alike(plain_folder: Path, name: BackendName, kv_dtype: str | None) -> None:
    """In float32, against stock attention on the CPU. test_ragged_attention compares the numbers of each batch."""
    here = converse(Runtime.load(plain_folder, kv_budget=32 << 20, kv_dtype=kv_dtype), TENTH)
    there = converse(
        Runtime.load(plain_folder, device=DEVICE, kv_budget=32 << 20, kv_dtype=kv_dtype, attention=name), TENTH
    )
    for one, other in zip(here.logits, there.logits, strict=True):
        tolerance = 1e-3 if kv_dtype is None else 5e-2
        torch.testing.assert_close(one, other.cpu(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pytorchs_kernel_attends_as_stock_attention_does(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("PyTorch's flash attention needs compute capability 8.0")
    access = page_access(pool(dtype, DEVICE))
    if access is None:
        pytest.skip("this PyTorch's variable-length attention takes neither pages nor lengths")
    for seed in range(4):
        compare(pool(dtype, DEVICE), access, seed, tolerance=2e-2)


def test_full_precision_is_nothing_for_pytorchs_kernel() -> None:
    assert page_access(pool(torch.float32, DEVICE)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_is_right_or_missing(dtype: torch.dtype) -> None:
    """The Triton kernels, FlexAttention over pages and PyTorch's kernels, on the geometry of a 7B model."""
    geometry = GEOMETRIES["7b"]
    ways = variants(dtype, geometry, tilings=False)
    found = list(rows(torch.device(DEVICE), dtype, geometry, scenarios(4), ways, budget_s=600, repeats=3))
    for row in found:
        assert row["why_not"] != "wrong numbers", row
        if str(row["variant"]).startswith("triton"):
            assert row["ms"] is not None, row
            assert row["captured"], "its launches can be captured, decodes and chunks alike"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_replayed_steps_equal_those_that_are_launched(
    plain_folder: Path, name: BackendName, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over page boundaries, with sequences that come and go. A step that cannot be captured warns, and so fails."""
    monkeypatch.setattr(DecodeGraphs, "suit", lambda graphs, caches: False)  # the runtime launches its steps
    runtime = Runtime.load(plain_folder, device=DEVICE, dtype=dtype, kv_budget=64 << 20)
    ours = sequences(runtime)
    theirs = [each.fork() for each in ours]
    backend = build_backend(name, runtime.pool, runtime.model.decoder.config.num_attention_heads)
    if backend is None:
        pytest.skip(f"{name} takes no {dtype} here")
    replayed = graphs(runtime, backend)
    for step in range(40):
        chosen = range(step % 3, 1 + (step * 5) % len(ours) + step % 3)[: len(ours) - step % 3]
        tokens = [(7 * step + place) % 256 for place in chosen]
        expected = runtime.decode([theirs[place] for place in chosen], tokens)
        answer = decode(runtime, replayed, [ours[place] for place in chosen], tokens)
        if dtype == "float32":
            torch.testing.assert_close(answer, expected, atol=1e-3, rtol=1e-3)
        else:
            assert torch.cosine_similarity(answer, expected).min() > 0.99
    for each in (*ours, *theirs):
        each.release()
    runtime.pool.check_integrity([])


def test_nothing_waits_for_the_device(plain_folder: Path) -> None:
    """Neither a step that is replayed nor a plan, once there is room for its tokens."""
    runtime = Runtime.load(plain_folder, device=DEVICE, dtype="bfloat16", kv_budget=64 << 20)
    backend = choose_backend(runtime.pool, runtime.model.decoder.config.num_attention_heads)
    batch = sequences(runtime)
    caches: list[StagedCache] = [each.cache for each in batch]
    replayed = graphs(runtime, backend)
    decode(runtime, replayed, batch, [1] * len(batch))  # captures
    for cache in caches:
        cache.reserve([1] * len(cache.stages))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed.run(caches, [2] * len(batch), [each.cached.position for each in batch])
        backend.plan(range(1), caches, [1] * len(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in batch:
        each.release()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_are_encoded_beside_steps(plain_folder: Path, dtype: str) -> None:
    """On a stream and a thread of their own, while steps are captured and replayed."""
    runtime = Runtime.load(plain_folder, device=DEVICE, dtype=dtype, kv_budget=64 << 20)
    shown = [Picture.from_pixels(picture(100, 60 + seed, seed)) for seed in range(4)]
    expected = [runtime.compress([each], TENTH)[0].embeddings for each in shown]
    side = SideStream.on(runtime.model.device)
    assert side is not None
    batch = sequences(runtime)

    def encode() -> None:
        for _ in range(8):
            for each, embeddings in zip(shown, expected, strict=True):
                with side:
                    (image,) = runtime.compress([each], TENTH)
                    side.hand_over(image)
                torch.testing.assert_close(image.embeddings, embeddings)

    with ThreadPoolExecutor(1) as thread:
        encoding = thread.submit(encode)
        for step in range(200):
            if encoding.done() and step > 8:
                break
            runtime.decode(batch[: 1 + step % len(batch)], [1] * (1 + step % len(batch)))
        encoding.result()
    for each in batch:
        each.release()
    runtime.pool.check_integrity([])


def test_pixels_are_normalised_on_the_device_as_on_the_host(plain_folder: Path) -> None:
    here, there = (load_model(plain_folder, device=device) for device in ("cpu", DEVICE))
    assert isinstance(here, TiledModel) and isinstance(there, TiledModel)
    tiles = here.tiles(Picture.from_pixels(picture(113, 97, seed=3)))
    assert torch.equal(here.normalised(tiles), there.normalised(tiles).cpu())
