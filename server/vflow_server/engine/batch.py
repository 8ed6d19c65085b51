"""A batch: the sequences that the model runs in one step, and how many tokens of each."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from vflow_server.engine.engine import Task
from vflow_server.engine.ops import Forward
from vflowopt.runtime.sampling import Sampler
from vflowopt.runtime.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A task whose sequence is to be run.

    Attributes:
        task: whose op it is.
        op: what to run.
        num_tokens: tokens of the sequence that are not cached yet.
    """

    task: Task
    op: Forward
    num_tokens: int

    @property
    def sequence(self) -> Sequence:
        """The sequence to run."""
        return self.op.sequence

    def counted_again(self) -> Scheduled:
        """The same, with the tokens counted anew: its cache has come back, or was released."""
        return replace(self, num_tokens=self.op.sequence.pending_tokens)


@dataclass(eq=False)
class Batch:
    """What runs in one step, in no particular order.

    Attributes:
        limits: how many tokens of each are run.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scheduled)

    def __iter__(self) -> Iterator[Scheduled]:
        return iter(self.scheduled)

    def add(self, scheduled: Scheduled, limit: int) -> None:
        """Run at most ``limit`` tokens of ``scheduled``, too."""
        self.scheduled.append(scheduled)
        self.limits.append(limit)

    @property
    def sequences(self) -> list[Sequence]:
        """Of each, the sequence."""
        return [each.op.sequence for each in self.scheduled]

    @property
    def samplers(self) -> list[Sampler | None]:
        """Of each, what draws its next token."""
        return [each.op.sampler for each in self.scheduled]

    @property
    def pending(self) -> list[int]:
        """Of each, the tokens that were not cached before the step."""
        return [each.num_tokens for each in self.scheduled]

    def finish(self, tokens: abc.Sequence[int | None], begun: float) -> None:
        """Hand out what the step came to.

        Args:
            tokens: the next token of each sequence; None where something is left to run, or none is wanted.
            begun: ``time.perf_counter()`` at the beginning of the step.
        """
        for each, limit, token in zip(self.scheduled, self.limits, tokens, strict=True):
            op = each.op
            op.num_run += limit
            if op.begun is None:
                op.begun = begun
            if limit == each.num_tokens:
                if token is not None:
                    op.token = token
                each.task.done()
