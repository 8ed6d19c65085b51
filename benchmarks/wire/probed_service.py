"""``vflow serve`` with a probe: each line on standard input is answered with what its threads have used so far.

Imports nothing of this repository but the service, so that the interpreter of another checkout can run this file.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections import Counter
from types import FrameType

from vflow_server.cli import main

CALLS = "--calls"
"""The first argument if calls are to be counted, too. That makes everything slower."""


class Calls:
    """Counts the calls of every thread that starts from now on, and of this one: functions of Python and of C."""

    def __init__(self) -> None:
        self.of: Counter[int] = Counter()
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" or event == "c_call":
            self.of[threading.get_ident()] += 1


def answer_forever(calls: Calls | None) -> None:
    """Print, for each line that comes, the nanoseconds of processor time and the calls of each thread, as JSON.

    The process stands for all its threads, also those that gRPC and torch have started. ``frozen`` is the number of its
    objects that the garbage collector leaves alone.
    """
    sys.setprofile(None)
    for _ in sys.stdin:
        used = {"process": {"ns": time.process_time_ns(), "calls": 0, "frozen": gc.get_freeze_count()}}
        for thread in threading.enumerate():
            if thread.ident is not None:
                clock = time.pthread_getcpuclockid(thread.ident)
                number = 0 if calls is None else calls.of[thread.ident]
                used[thread.name] = {"ns": time.clock_gettime_ns(clock), "calls": number}
        print(json.dumps(used), flush=True)


if __name__ == "__main__":
    counting = sys.argv[1:2] == [CALLS]
    calls = Calls() if counting else None
    threading.Thread(target=answer_forever, args=(calls,), name="probe", daemon=True).start()
    raise SystemExit(main(["serve", *sys.argv[1 + counting :]]))
