"""Part: the tests that need a CUDA device, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.device_check.part import Setting
from benchmarks.table import Row

_ROOT = Path(__file__).resolve().parents[2]
_OUTCOME = re.compile(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")
_REASON = re.compile(r"(?:FAILED|ERROR) (tests/\S+)(?: - (.*))?$")


def rows(setting: Setting) -> Iterator[Row]:
    """Each test and its outcome, as it comes; then why some failed, and how many there were of each outcome."""
    marked = "pytest.mark.cuda"
    files = sorted(path for path in (_ROOT / "tests" / "vflowopt").rglob("test_*.py") if marked in path.read_text())
    command = [
        *(sys.executable, "-m", "pytest", "-m", "cuda and not long", "-v", "-rfE", "--tb=short", "--color=no"),
        # The fixtures of all tests need hypothesis; those of the library do not.
        *("-p", "no:cacheprovider", f"--confcutdir={_ROOT / 'tests' / 'vflowopt'}"),
        # Other versions of the libraries deprecate other things. All other warnings stay errors.
        *("-W", "default::DeprecationWarning", "-W", "default::FutureWarning"),
        *map(str, files),
    ]
    environment = {**os.environ, "COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    counts: Counter[str] = Counter()
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_ROOT, env=environment
    ) as process:
        too_late = threading.Timer(setting.left, process.kill)
        too_late.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[-40:], line.rstrip()]
            if (found := _OUTCOME.match(line)) is not None:
                counts[found[2].lower()] += 1
                yield {"test": found[1], "outcome": found[2].lower()}
            elif (found := _REASON.match(line.rstrip())) is not None:
                yield {"failed_test": found[1], "reason": found[2]}
        cut_off = not too_late.is_alive()
        too_late.cancel()
    outcomes = {outcome: counts[outcome] for outcome in ("passed", "failed", "error", "skipped")}
    yield {"tests_in_all": counts.total(), **outcomes, "exit_code": process.returncode, "cut_off": cut_off}
    if process.returncode not in (0, 1, 5) and not cut_off:
        raise RuntimeError("pytest did not run:\n" + "\n".join(lines))
