"""Check a device within minutes: tests, exactness, and speed in the shapes of published models, against targets.

The results are written as they come, so being cut off loses nothing. No target that is missed fails the check; an
answer that differs, a test or a part that fails does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.device_check.part import PARTS, Part
from benchmarks.device_check.report import Report
from benchmarks.device_check.targets import verdicts
from benchmarks.device_check.worker import Worker
from benchmarks.table import Row, render

PAPER = """\
The paper, LLaVA-OneVision-7B on an A100, 7,290 tokens: 1040 / 584 / 329 / 272 ms at 100 / 50 / 25 / 10%. These are
whole requests of a benchmark with other software: compare the ratios."""

_NEEDED = ("numpy", "PIL", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "pytest")
_GRACE = 0.15
"""How much longer than its share a part may run before it is killed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    options = _options(arguments)
    parts = [part for part in PARTS if part.name in options.parts]
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(f"device_check: not installed, so that parts will fail: {', '.join(missing)}", file=sys.stderr)
    about = {
        "device": options.device,
        "rehearsal": options.rehearse,
        "minutes": options.minutes,
        "missing": missing,
        "paper": PAPER,
    }
    report = Report(options.json, parts, about)
    run(parts, report, options.device, 60 * options.minutes, rehearse=options.rehearse)
    report.targets = verdicts(report)
    report.finished = True
    report.write()
    if report.targets:
        print(render(report.targets), flush=True)
    if options.rehearse:
        print("A rehearsal: its figures mean nothing.")
    print(PAPER)
    return int(_failed(report))


def run(parts: Sequence[Part], report: Report, device: str, seconds: float, *, rehearse: bool) -> None:
    """Run the parts, each within its share of what is left of ``seconds``."""
    ends = time.monotonic() + seconds
    worker: Worker | None = None
    try:
        for place, part in enumerate(parts):
            left = ends - time.monotonic()
            share = left * part.share / sum(each.share for each in parts[place:])
            worker = worker or Worker()
            if not _run_part(worker, part, report, device, share, rehearse=rehearse):
                # What it left on the device, or broke there, is no concern of the next part.
                worker.kill()
                worker = None
            print(report.text(part.name), end="\n\n", flush=True)
    except BaseException:
        if worker is not None:
            worker.kill()
        raise
    if worker is not None:
        worker.close()


def _run_part(worker: Worker, part: Part, report: Report, device: str, seconds: float, *, rehearse: bool) -> bool:
    """Run a part, and report what it sends; returns whether it ended well."""
    found = report.parts[part.name]
    begun = time.monotonic()
    found.state = "running"
    report.write()
    worker.begin(part, device, seconds, rehearse=rehearse)
    while found.state == "running":
        sent = worker.next(begun + seconds * (1 + _GRACE) - time.monotonic())
        match sent:
            case None:
                found.state = "out of time"
            case ("row", row):
                found.rows.append(_row(row))
            case ("done", _):
                found.state = "done"
            case (_, text):
                found.state, found.error = "failed", str(text)
        found.seconds = round(time.monotonic() - begun, 2)
        report.write()
    return found.state == "done"


def _row(value: object) -> Row:
    assert isinstance(value, dict)
    return value


def _failed(report: Report) -> bool:
    """Whether a part failed, a test failed, or an answer differed from that of ``generate``."""
    return (
        any(part.state == "failed" for part in report.parts.values())
        or any(row.get("outcome") in ("failed", "error") for row in report.rows("tests"))
        or any(row.get("answers") in ("differs", "failed") for row in report.rows("exactness"))
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="device_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together")
    parser.add_argument("--json", type=Path, help="write the results here, as they come")
    parser.add_argument("--device", help="a torch device (default: cuda; of a rehearsal: cpu)")
    parser.add_argument("--rehearse", action="store_true", help="run tiny shapes, to see that everything works")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="run these alone")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.rehearse else "cuda")
    return options


if __name__ == "__main__":
    sys.exit(main())
