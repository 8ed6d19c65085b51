"""How long the service takes to start: to its first log line, and until it is ready with the embedded model.

Wall time depends on what else the machine does, CPU time (of all threads of the process) hardly does. In the first row
Python finds the byte code of every module, in the second it compiles all of them, as on the first start after an
installation that did not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.table import Row, publish

BYTE_CODE = ("found", "compiled")


@dataclass(frozen=True)
class Moment:
    """When something was seen of a process, in seconds since it was started.

    Attributes:
        wall: by the clock.
        cpu: of all its threads together.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Start:
    """One start: the moments of the first line of the log, and of the line that says that the service is ready."""

    first_log: Moment
    ready: Moment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="start", description=__doc__.split("\n\n")[0])
    parser.add_argument("--starts", type=int, default=5, help="starts of which the medians are taken")
    parser.add_argument(
        "--byte-code", nargs="+", choices=BYTE_CODE, default=BYTE_CODE, help="rows to measure (default: both)"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    rows = []
    if "found" in options.byte_code:
        measure()  # leaves the byte code
        rows.append(_row("found", [measure() for _ in range(options.starts)]))
    if "compiled" in options.byte_code:
        with tempfile.TemporaryDirectory(prefix="vflow-start-") as folder:
            rows.append(_row("compiled", [measure(Path(folder) / str(number)) for number in range(options.starts)]))
    publish(rows, options.json)
    return 0


def measure(byte_code: Path | None = None) -> Start:
    """Start a service on the embedded model, and kill it when it is ready.

    Args:
        byte_code: folder where Python looks for byte code, and writes what it does not find; None: the usual ones.

    Raises:
        RuntimeError: the service did not start; the message is its log.
    """
    elsewhere = {} if byte_code is None else {"PYTHONPYCACHEPREFIX": str(byte_code)}
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "vflow_server", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **elsewhere},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        told = process.stderr.readline()
        first_log = _moment(process.pid, begun)
        ready = process.stdout.readline()
        if not ready:
            raise RuntimeError(told + process.stderr.read())
        start = Start(first_log, _moment(process.pid, begun))
        process.kill()
    return start


def _moment(process: int, begun: float) -> Moment:
    wall = time.perf_counter() - begun
    used = psutil.Process(process).cpu_times()
    return Moment(wall, used.user + used.system)


def _row(byte_code: str, starts: Sequence[Start]) -> Row:
    return {
        "byte_code": byte_code,
        "starts": len(starts),
        "first_log_wall_s": statistics.median(start.first_log.wall for start in starts),
        "first_log_cpu_s": statistics.median(start.first_log.cpu for start in starts),
        "ready_wall_s": statistics.median(start.ready.wall for start in starts),
        "ready_cpu_s": statistics.median(start.ready.cpu for start in starts),
    }


if __name__ == "__main__":
    sys.exit(main())
