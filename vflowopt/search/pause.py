"""Where long work on a runtime pauses, so that whoever owns the runtime can do something else in between.

Such work is a generator. Each value that it yields is a pause, after a piece of bounded size; what the value says is
offered, not demanded: a caller that ignores all pauses gets the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shortage:
    """The KV pool had too few free pages: everything held here was released, and going on means to try again.

    Attributes:
        pages: how many the rest of the piece takes at most.
    """

    pages: int


class Aside:
    """The next piece needs neither the decoder nor KV pages, and may run on another thread before the work goes on.

    Args:
        kind: "encode" is the vision encoder's work and wants to be where pictures are encoded; "propose" is arithmetic
            of plain numbers, whose ``work`` and result can also travel to another process.
        work: the piece.
    """

    def __init__(self, kind: Literal["encode", "propose"], work: Callable[[], Any]) -> None:
        self.kind = kind
        self.work = work
        self._results: list[Any] = []

    def run(self) -> Any:
        """Do the work, unless it was done before; returns its result. Raises what the work raises."""
        if not self._results:
            self.finish(self.work())
        return self._results[0]

    def finish(self, result: Any) -> None:
        """Hand in the result of ``work``, done elsewhere."""
        self._results = [result]


Pause = Shortage | Aside | None
"""None where there is nothing more to say than that a piece is done."""
