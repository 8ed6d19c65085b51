"""Building kernels: each is a page of C, compiled for this processor and kept in a cache folder of the user's.

On a machine without a C compiler there are no kernels. What uses one is slower there, and otherwise the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

log = logging.getLogger(__name__)

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
"""A file of this folder that is put where it is named: what is compiled is one text."""

_SEAL = hashlib.sha256().digest_size

_FLAGS = (
    *("-O3", "-march=native", "-fPIC", "-std=c11", "-mprefer-vector-width=512", "-ffp-contract=fast"),
    # Sums may be reordered, as every vectorised product does. Not -ffast-math: it changes rounding for the process.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
)


def load(name: str, purpose: str, **macros: int) -> ctypes.CDLL | None:
    """Compile a kernel, or load it from the cache folder.

    The compiler is what the environment variable ``CC`` names, with options if there are any, or ``cc``.

    Args:
        name: its file beside this one, without the ending.
        purpose: what is slower without it, for the log.
        macros: what is defined in its source.

    Returns:
        The library; None if it cannot be built, and the log says why.
    """
    try:
        compiler = _compiler()
        source = _INCLUDE.sub(lambda line: _text(line[1]), _text(f"{name}.c"))
        flags = [*_FLAGS, *(f"-D{macro}={value}" for macro, value in macros.items())]
        identity = hashlib.sha256("\0".join([source, *compiler[1:], *flags, _processor()]).encode()).hexdigest()[:24]
        with _cache_folder() as folder:
            library = folder / f"{name}-{identity}.so"
            if not _is_whole(library):
                _compile(compiler, flags, source, library)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, _NotBuilt) as error:
        log.warning("%s runs without its compiled kernel: %s", purpose, error)
        return None


def _text(file: str) -> str:
    return resources.files("vflowopt.kernels").joinpath(file).read_text()


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


def _compile(compiler: list[str], flags: Sequence[str], source: str, library: Path) -> None:
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
