"""A compiled kernel for decode attention on the CPU: one new token per sequence attends to all pages of its sequence.

PyTorch's attention needs contiguous keys and values, so the pages of every sequence are gathered first, in every layer
of every step. That takes longer than the attention itself. The kernel reads the pages in place.

It is a page of C, compiled for the model's geometry and this processor when the model is loaded. On a machine without a
C compiler, decoding is slower, and otherwise the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_MOST_PAGE = 256  # MAX_PAGE in the source

_FLAGS = (
    *("-O3", "-march=native", "-fPIC", "-std=c11", "-mprefer-vector-width=512", "-ffp-contract=fast"),
    # Sums may be reordered, as every vectorised product does. Not -ffast-math: it changes rounding for the process.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
)


class DecodeKernel:
    """The kernel for one geometry, float32.

    Args:
        library: the compiled source.
        head_dim: channels of a head.
        group: query heads that share a key head.
    """

    def __init__(self, library: Path, head_dim: int, group: int) -> None:
        self._head_dim, self._group = head_dim, group
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._function = ctypes.CDLL(str(library)).paged_decode
        self._function.restype = None
        self._function.argtypes = [*[pointer] * 5, *[whole] * 4, ctypes.c_float, pointer]

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, page_size: int, scale: float
    ) -> Tensor:
        """Attention of one token of each sequence.

        Args:
            query: float32 [sequences, kv_heads * group, head_dim].
            keys: float32 [slots, kv_heads, head_dim].
            values: like ``keys``.
            pages: int64 [sequences, blocks], the block tables; pages after the end of a context are not read.
            lengths: int64 [sequences], the tokens of each context.
            page_size: slots of a page, at most 256.
            scale: factor of the scores.

        Returns:
            float32 like ``query``.
        """
        query = query.contiguous()
        output = torch.empty_like(query)
        sequences, num_blocks = pages.shape
        self._function(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            pages.data_ptr(),
            lengths.data_ptr(),
            sequences,
            num_blocks,
            page_size,
            keys.shape[1],
            scale,
            output.data_ptr(),
        )
        return output


def build_decode_kernel(head_dim: int, heads: int, kv_heads: int, page_size: int) -> DecodeKernel | None:
    """Compile the kernel, or load it from the cache folder; None if neither is possible.

    Args:
        head_dim: channels of a head.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        page_size: tokens of a page.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or heads % kv_heads or page_size > _MOST_PAGE:
        return None
    source = resources.files("vflowopt.runtime").joinpath("kernels/paged_decode.c").read_text()
    command = [*_FLAGS, f"-DHEAD_DIM={head_dim}", f"-DGROUP={heads // kv_heads}"]
    identity = hashlib.sha256("\0".join([source, *command, _processor()]).encode()).hexdigest()[:24]
    try:
        folder = _cache_folder()
        library = folder / f"paged_decode-{identity}.so"
        if not library.exists():
            _compile(compiler, command, source, library)
        return DecodeKernel(library, head_dim, heads // kv_heads)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("decoding runs without its compiled kernel: %s", error)
        return None


def _compile(compiler: str, command: list[str], source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text, compiled, linked = (Path(scratch) / name for name in ("kernel.c", "kernel.o", "kernel.so"))
        text.write_text(source)
        # In two steps: when linking with these flags, some compilers add start-up code that flushes denormals to zero.
        for arguments in (
            ["-c", str(text), *command, "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run([compiler, *arguments], check=True, capture_output=True, timeout=120)
        linked.replace(library)


def _cache_folder() -> Path:
    """A folder that only this user can write to, because its files are loaded into the process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vflow"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="vflow-"))


def _processor() -> str:
    """The processor's features: a home folder may be mounted on machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
