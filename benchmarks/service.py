"""A real service process for the length of a block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READY = "VFlow is ready on "


@contextmanager
def running_service(*flags: str, vflow: Path | None = None, patience: float = 20.0) -> Iterator[str]:
    """Start ``vflow serve`` on a free port, yield its address, and stop it whatever happens.

    Args:
        flags: further flags of ``vflow serve``.
        vflow: the command; None: the one beside this interpreter.
        patience: seconds that it may take to stop before it is killed.

    Raises:
        RuntimeError: the process ended before it was ready; its output is on standard error.
    """
    command = vflow or Path(sys.executable).with_name("vflow")
    with subprocess.Popen((str(command), "serve", "--port", "0", *flags), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(_READY):
                raise RuntimeError(f"the service did not start (exit code {process.wait()}); see its message above")
            yield line.removeprefix(_READY).strip()
        finally:
            process.terminate()
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
