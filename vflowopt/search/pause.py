"""Pauses of long work on a runtime, in which the owner of the runtime can do other work.

Long work is a generator. Each value that it yields is a pause, after a piece of bounded size. A caller may use what the
value says, or ignore it: the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shortage:
    """The KV pool had too few free pages. The work released all its pages, and will run the piece again.

    Attributes:
        pages: the most pages that the rest of the piece takes.
    """

    pages: int


class Aside:
    """The next piece, which needs neither the decoder nor KV pages, and may run on another thread during the pause.

    Args:
        kind: "encode" runs the vision encoder, and belongs on the thread that encodes pictures; "propose" computes with
            plain numbers, and its ``work`` and result can be pickled for another process.
        work: the piece.
    """

    def __init__(self, kind: Literal["encode", "propose"], work: Callable[[], Any]) -> None:
        self.kind = kind
        self.work = work
        self._results: list[Any] = []

    def run(self) -> Any:
        """Do the work, unless it was done before, and return its result. Raises what the work raises."""
        if not self._results:
            self.finish(self.work())
        return self._results[0]

    def finish(self, result: Any) -> None:
        """Set the result of ``work``, which was done elsewhere."""
        self._results = [result]


Pause = Shortage | Aside | None
"""None: a piece is done, and there is nothing else to report."""
