"""When a failed call is tried again, and after how long: shared by the synchronous and the asyncio client.

Two kinds of failure are worth another attempt. If the service reports that it has no capacity or is stopping, it did
nothing, and any call is sent again. If it cannot be reached, or ends the call without a reason, as a server does that
shuts down, it may have acted, and only a call that can be repeated without harm (`repeatable`) is sent again.
"""

import random
import time
from dataclasses import dataclass, field

from vflow_client.errors import Cancelled, CapacityExhausted, ServerStopping, Unavailable, VFlowError

DEFAULT_TIMEOUT = 120.0
"""Seconds that a call may take, its retries included, unless the caller says otherwise."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently to retry.

    Attributes:
        attempts: calls in all, the first included; 1 never retries.
        first_delay: seconds before the second attempt; doubled for each one after it.
        longest_delay: seconds that a delay never exceeds, unless the service itself asks for longer.
    """

    attempts: int = 4
    first_delay: float = 0.2
    longest_delay: float = 5.0

    def __post_init__(self) -> None:
        """Raises ValueError for a policy without any attempt, or with delays out of order."""
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if not 0 <= self.first_delay <= self.longest_delay:
            raise ValueError(f"need 0 <= first_delay <= longest_delay, got {self.first_delay} and {self.longest_delay}")


@dataclass
class Attempts:
    """The attempts of one call under its policy and overall timeout (seconds; None: no limit)."""

    policy: RetryPolicy
    timeout: float | None
    repeatable: bool
    made: int = field(default=0, init=False)
    started: float = field(default_factory=time.monotonic, init=False)

    def remaining(self) -> float | None:
        """Seconds left of the timeout, at least 0; None without one."""
        if self.timeout is None:
            return None
        return max(0.0, self.timeout - (time.monotonic() - self.started))

    def delay_after(self, error: VFlowError) -> float | None:
        """Seconds to wait before trying again after `error`, or None to give up and raise it."""
        self.made += 1
        nothing_happened = isinstance(error, CapacityExhausted | ServerStopping)
        # A call that this client cancels is not retried, so a cancelled call here was ended by the server.
        unreachable = isinstance(error, Unavailable | Cancelled) and error.reason is None
        if not nothing_happened and not (unreachable and self.repeatable):
            return None
        if isinstance(error, CapacityExhausted) and error.retry_after is None:
            return None  # The service says that waiting does not help.
        if self.made >= self.policy.attempts:
            return None
        backoff = min(self.policy.longest_delay, self.policy.first_delay * 2 ** (self.made - 1))
        # The jitter spreads the retries of clients that were refused at the same time.
        delay = max(backoff * random.uniform(0.5, 1.0), error.retry_after or 0.0)
        remaining = self.remaining()
        return None if remaining is not None and delay >= remaining else delay
