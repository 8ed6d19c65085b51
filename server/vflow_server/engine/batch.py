"""A batch: the sequences that the model runs in one step, and the number of tokens of each."""

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
    """A task that waits for a :class:`Forward`.

    Attributes:
        task: the task.
        op: the op that it waits for.
        num_tokens: tokens of the op's sequence that are not cached yet.
    """

    task: Task
    op: Forward
    num_tokens: int

    @property
    def sequence(self) -> Sequence:
        """The sequence to run."""
        return self.op.sequence

    def counted_again(self) -> Scheduled:
        """A copy with a new ``num_tokens``, for a sequence whose cache was restored or released meanwhile."""
        return replace(self, num_tokens=self.op.sequence.pending_tokens)


@dataclass(eq=False)
class Batch:
    """The sequences of one step, in no particular order.

    Attributes:
        scheduled: the tasks whose sequences run.
        limits: for each of them, the number of tokens that the step runs.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scheduled)

    def __iter__(self) -> Iterator[Scheduled]:
        return iter(self.scheduled)

    def add(self, scheduled: Scheduled, limit: int) -> None:
        """Add a task; the step runs ``limit`` tokens of its sequence, at most its ``num_tokens``."""
        self.scheduled.append(scheduled)
        self.limits.append(limit)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequence of each task."""
        return [each.op.sequence for each in self.scheduled]

    @property
    def samplers(self) -> list[Sampler | None]:
        """The sampler of each task; None where no token is wanted."""
        return [each.op.sampler for each in self.scheduled]

    @property
    def pending(self) -> list[int]:
        """For each task, the number of tokens that were not cached before the step."""
        return [each.num_tokens for each in self.scheduled]

    def finish(self, tokens: abc.Sequence[int | None], begun: float) -> None:
        """Hand the results of the step to the ops. An op is done when its sequence has run to its end.

        Args:
            tokens: the next token of each sequence; None where tokens are left to run or none is wanted.
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
