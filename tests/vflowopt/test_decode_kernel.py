"""The compiled kernel computes what stock attention computes; a machine without a compiler loses nothing but time."""

import ctypes
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vflowopt.compression.strategy import Strategy
from vflowopt.kernels import build
from vflowopt.kernels.decode_kernel import build_decode_kernel
from vflowopt.kernels.row_kernel import row_kernel
from vflowopt.runtime import decoder
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.rope import apply_rope

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "page_size"),
    [(32, 6, 2, 16), (16, 4, 4, 16), (64, 14, 2, 8), (12, 3, 1, 1), (80, 4, 2, 16), (6, 2, 1, 256)],
)
def test_kernel_agrees_with_stock_attention(
    head_dim: int, heads: int, kv_heads: int, page_size: int, rotated: bool
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    lengths = torch.tensor([1, page_size, page_size + 1, 5 * page_size + 3, 300])
    blocks = -(-int(lengths.max()) // page_size)
    pages = torch.randperm(len(lengths) * blocks, generator=generator).view(len(lengths), blocks)
    keys, values = torch.randn(2, len(lengths) * blocks * page_size, kv_heads, head_dim, generator=generator)
    before = keys.clone()
    states = torch.randn(len(lengths) + 1, heads + 2 * kv_heads, head_dim, generator=generator)
    states[:, :heads] *= 3
    angles = torch.rand(len(lengths) + 1, 1, head_dim // 2, generator=generator) * 6
    freqs = None if rotated else torch.polar(torch.ones_like(angles), angles)
    kernel = build_decode_kernel(head_dim, heads, kv_heads, page_size)
    assert kernel is not None
    found = kernel(states.flatten(1), freqs, keys, values, pages, lengths, head_dim**-0.5).view(-1, heads, head_dim)
    query, key, value = states.split([heads, kv_heads, kv_heads], dim=1)
    if freqs is not None:
        query, key = apply_rope(query, freqs), apply_rope(key, freqs)
    written = []
    for row, length in enumerate(lengths.tolist()):
        slots = (pages[row, :, None] * page_size + torch.arange(page_size)).flatten()[:length]
        torch.testing.assert_close(keys[slots[-1]], key[row])
        assert torch.equal(values[slots[-1]], value[row])
        written.append(slots[-1])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row][None, :, None],
            keys[slots].transpose(0, 1)[None],
            values[slots].transpose(0, 1)[None],
            enable_gqa=True,
        )
        torch.testing.assert_close(found[row], expected[0, :, 0], atol=2e-6, rtol=1e-5)
    places = torch.stack(written)
    before[places] = keys[places]
    assert torch.equal(before, keys)  # nothing else was written


@needs_compiler
def test_large_scores_do_not_overflow() -> None:
    kernel = build_decode_kernel(16, 2, 2, 4)
    assert kernel is not None
    keys = torch.zeros(8, 2, 16)
    keys[:, :, 0] = torch.tensor([-3e4, 0, 3e4, 1, 2, 3e4, -1e4, 0])[:, None]
    values = torch.arange(8.0)[:, None, None].expand(8, 2, 16).contiguous()
    states = torch.zeros(1, 6, 16)
    states[:, :2, 0] = 1
    states[:, 2:4, 0] = 5
    states[:, 4:] = 7
    found = kernel(states.flatten(1), None, keys, values, torch.tensor([[0, 1]]), torch.tensor([8]), 1.0)
    torch.testing.assert_close(found, torch.full((1, 32), 3.5))  # the two largest share all the weight


@needs_compiler
def test_a_sequence_is_attended_to_alike_in_any_batch() -> None:
    """Bit for bit."""
    generator = torch.Generator().manual_seed(1)
    kernel = build_decode_kernel(32, 6, 2, 16)
    assert kernel is not None
    lengths = torch.tensor([1, 40, 16, 33, 90])
    pages = torch.randperm(30, generator=generator).view(5, 6)
    keys, values = torch.randn(2, 480, 2, 32, generator=generator)
    states = torch.randn(5, 10 * 32, generator=generator)
    freqs = torch.randn(5, 1, 16, dtype=torch.complex64, generator=generator)
    together = kernel(states, freqs, keys.clone(), values.clone(), pages, lengths, 0.2)
    for row in range(5):
        own = slice(row, row + 1)
        alone = kernel(states[own], freqs[own], keys.clone(), values.clone(), pages[own], lengths[own], 0.2)
        assert torch.equal(alone, together[own])


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_decode_kernel(8, 2, 1, 16) is not None
    (library,) = tmp_path.glob("vflow/*.so")
    made = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", None)  # calling it would raise
    assert build_decode_kernel(8, 2, 1, 16) is not None
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_stock_attention_serves(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[int]:
        runtime = Runtime.load(plain_folder, kv_budget=1 << 20)
        sequences = [runtime.start(Strategy.full()) for _ in range(3)]
        for index, sequence in enumerate(sequences):
            runtime.extend(sequence, list(range(1, 5 + 17 * index)))
        found = []
        for step in range(6):
            found += runtime.decode(sequences, [step, 3, 9]).argmax(-1).tolist()
        return found

    with_kernel = answers()
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(decoder, "row_kernel", row_kernel.__wrapped__)  # which built it for the whole process
    assert build_decode_kernel(8, 2, 1, 16) is None
    assert answers() == with_kernel


@needs_compiler
def test_a_compiler_that_fails_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert build_decode_kernel(8, 2, 1, 16) is None
    assert "without its compiled kernel" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "cut off by a page": lambda content: content[:4096],
    "without its end": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_kernel_in_the_cache_is_built_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process would die when it loads one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded: list[bytes] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(Path(path).read_bytes()))
    build.load("token_rows", "decoding")
    (library,) = tmp_path.glob("vflow/*.so")
    library.write_bytes(damage(library.read_bytes()))
    build.load("token_rows", "decoding")
    assert loaded[1] == loaded[0]


@needs_compiler
def test_the_compiler_may_have_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -Wall  '-DNAME=a b'")
    assert build_decode_kernel(8, 2, 1, 16) is not None
    monkeypatch.setenv("CC", "")
    assert build_decode_kernel(8, 2, 1, 16) is not None
    assert len(list(tmp_path.glob("vflow/*.so"))) == 2


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -m64", "there is no C compiler 'no-such-compiler -m64'"),
        ("cc '", "which is no command"),
        (" ", "there is no C compiler"),
        ("true", "failed with exit code 0"),
        ("cat", "failed with exit code 1"),
        ("sh -c 'echo unknown option >&2; exit 3'", "failed with exit code 3 (unknown option)"),
    ],
)
def test_the_log_says_why_there_is_no_kernel(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    assert build_decode_kernel(8, 2, 1, 16) is None
    assert reason in caplog.text


@needs_compiler
@pytest.mark.parametrize("home", ["/proc", "/dev/null", ""])
def test_without_a_folder_to_cache_it_in_nothing_is_left_behind(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kernel = build_decode_kernel(16, 2, 2, 4)
    assert kernel is not None and not list(tmp_path.iterdir())
    keys = torch.zeros(4, 2, 16)
    pages, lengths = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([2])
    assert kernel(torch.zeros(1, 6 * 16), None, keys, keys, pages, lengths, 0.25).abs().sum() == 0
