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
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_MOST_PAGE = 256  # MAX_PAGE in the source

_SEAL = hashlib.sha256().digest_size

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
    """Compile the kernel, or load it from the cache folder; None if neither is possible, and the log says why.

    The compiler is what the environment variable ``CC`` names, with options if there are any, or ``cc``.

    Args:
        head_dim: channels of a head.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        page_size: tokens of a page.
    """
    try:
        if heads % kv_heads or page_size > _MOST_PAGE:
            raise _NotBuilt(f"it is not made for {heads} heads on {kv_heads} and pages of {page_size} tokens")
        compiler = _compiler()
        source = resources.files("vflowopt.runtime").joinpath("kernels/paged_decode.c").read_text()
        flags = [*_FLAGS, f"-DHEAD_DIM={head_dim}", f"-DGROUP={heads // kv_heads}"]
        identity = hashlib.sha256("\0".join([source, *compiler[1:], *flags, _processor()]).encode()).hexdigest()[:24]
        with _cache_folder() as folder:
            library = folder / f"paged_decode-{identity}.so"
            if not _is_whole(library):
                _compile(compiler, flags, source, library)
            return DecodeKernel(library, head_dim, heads // kv_heads)
    except (OSError, AttributeError, subprocess.SubprocessError, _NotBuilt) as error:
        log.warning("decoding runs without its compiled kernel: %s", error)
        return None


class _NotBuilt(Exception):
    """The kernel cannot be built; the message says why."""


def _compiler() -> list[str]:
    """The compiler's command, with its options."""
    text = os.environ.get("CC") or "cc"
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise _NotBuilt(f"CC is {text!r}, which is no command ({error})") from None
    if not command or (path := shutil.which(command[0])) is None:
        raise _NotBuilt(f"there is no C compiler {text!r}; install one, or name one in CC")
    return [path, *command[1:]]


def _compile(compiler: list[str], flags: list[str], source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text, compiled, linked = (Path(scratch) / name for name in ("kernel.c", "kernel.o", "kernel.so"))
        text.write_text(source)
        # In two steps: when linking with these flags, some compilers add start-up code that flushes denormals to zero.
        for arguments in (
            ["-c", str(text), *flags, "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run(
                [*compiler, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
            )
            if done.returncode or not Path(arguments[-1]).is_file():
                said = (done.stderr or done.stdout).decode(errors="replace").strip().partition("\n")[0]
                raise _NotBuilt(f"{shlex.join(compiler)} failed with exit code {done.returncode} ({said})")
        with linked.open("r+b") as file:
            content = file.read()
            file.write(_seal(content))
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash may leave the name without the content
        linked.replace(library)


def _is_whole(library: Path) -> bool:
    """Whether the library is there as it was compiled: loading a truncated one would kill the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-_SEAL:] == _seal(content[:-_SEAL])


def _seal(content: bytes) -> bytes:
    """What stands behind the content of a library that is whole; the loader ignores it."""
    return hashlib.sha256(content).digest()


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """A folder that only this user can write to, because its files are loaded into the process.

    Where there is none for good, it is a temporary one: a library that is loaded needs its file no longer.
    """
    for variable, below in (("XDG_CACHE_HOME", "vflow"), ("HOME", ".cache/vflow")):
        if base := os.environ.get(variable):
            if _is_private(folder := Path(base) / below):
                yield folder
                return
            break
    with tempfile.TemporaryDirectory(prefix="vflow-") as temporary:
        yield Path(temporary)


def _is_private(folder: Path) -> bool:
    """Whether ``folder``, which is made if it is missing, can be written by this user and by nobody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK)


def _processor() -> str:
    """The processor's features: a home folder may be mounted on machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
