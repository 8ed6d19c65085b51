"""When a failed call is tried again, and after how long: shared by the synchronous and the asyncio client.

Two kinds of failure are worth another attempt. If the call was surely not begun, any call is sent again: no connection
came about, or the service refused the call and says when to come back, as it does when it stops or has no capacity. If
the connection broke, or something between client and service answered, the service may have acted, and only a call that
can be repeated without harm (`repeatable`) is sent again.
"""

import random
import time
from dataclasses import dataclass, field

import grpc

from vflow_client.errors import Cancelled, CapacityExhausted, ServerStopping, Unavailable, VFlowError
from vflow_client.peer import CANNOT_CONNECT, Peer

DEFAULT_TIMEOUT = 120.0
"""Seconds that a call may take, its retries included, unless the caller says otherwise."""

SILENT = 1.0
"""Seconds for which calls are tried again without a word."""

_NOT_CONNECTED = (CANNOT_CONNECT, "connections to all backends failing", "errors resolving ")
"""How gRPC begins its messages about calls that it could not send, because there was no connection."""

_RESET = ("RST_STREAM", "Stream removed")
"""Parts of gRPC's messages about calls that a proxy, or a server that shuts down, has cut off."""

_NEAR = 0.1
"""Seconds before the timeout in which a call may already end by it: the service's clock may be ahead."""

_FOR_GOOD = ("WRONG_VERSION_NUMBER", "CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
"""Parts of gRPC's messages about connections that fail by their TLS, which does not change by waiting."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long and how patiently to retry. The defaults outlast a restart of 30 s, and two in a row.

    Attributes:
        patience: seconds for which a call is tried again after its first failure; text of an answer that arrives begins
            them anew.
        first_delay: seconds before the second attempt, at most; doubled for each one after it. The delays are random
            below that, so that clients that were refused together do not come back together.
        longest_delay: seconds that such a delay never exceeds. Where the service says when to come back, the delay is
            added to that.
        attempts: calls in all, the first included; 1 never retries; None: as many as `patience` allows.
    """

    patience: float = 90.0
    first_delay: float = 0.2
    longest_delay: float = 2.0
    attempts: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a policy without any attempt, without patience, or with delays out of order."""
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if not self.patience >= 0:
            raise ValueError(f"patience must be at least 0 seconds, got {self.patience}")
        if not 0 <= self.first_delay <= self.longest_delay:
            raise ValueError(f"need 0 <= first_delay <= longest_delay, got {self.first_delay} and {self.longest_delay}")


@dataclass
class Attempts:
    """The attempts of one call under its policy and overall timeout (seconds; None: no limit).

    Attributes:
        repeatable: whether the call may be sent again although an earlier attempt may have been carried out.
        peer: the service that is called.
    """

    policy: RetryPolicy
    timeout: float | None
    repeatable: bool
    peer: Peer = field(default_factory=Peer)
    made: int = field(default=0, init=False)
    started: float = field(default_factory=time.monotonic, init=False)
    failed_since: float | None = field(default=None, init=False)
    failure: VFlowError | None = field(default=None, init=False)

    def remaining(self) -> float | None:
        """Seconds left of the timeout, at least 0; None without one."""
        if self.timeout is None:
            return None
        return max(0.0, self.timeout - (time.monotonic() - self.started))

    def progressed(self) -> None:
        """The present attempt has brought something new: the patience begins anew."""
        self.made, self.failed_since, self.failure = 0, None, None

    def delay_after(self, error: VFlowError) -> float | None:
        """Seconds to wait before trying again after `error`, or None to give up and raise it.

        The message of `error` is completed: by the timeout that has passed, and by what may be wrong.
        """
        self._complete(error)
        delay = self._delay_after(error)
        self.failure = error
        return delay

    def _complete(self, error: VFlowError) -> None:
        remaining = self.remaining()
        timed_out = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and error.reason is None
        if timed_out and remaining is not None and remaining < _NEAR:
            error.message = f"no answer within {self.timeout:g} s; pass timeout=... (--timeout) for another limit"
            if self.failure is not None:
                error.message += f"; the attempt before failed by {self.failure}"
        self.peer.advise(error)

    def _delay_after(self, error: VFlowError) -> float | None:
        now = time.monotonic()
        self.made += 1
        if self.failed_since is None:
            self.failed_since = now
        if not (not_begun(error) or (self.repeatable and cut_off(error))):
            return None
        if self.policy.attempts is not None and self.made >= self.policy.attempts:
            return None
        longest = min(self.policy.longest_delay, self.policy.first_delay * 2.0 ** min(self.made - 1, 30))
        delay = (error.retry_after or 0.0) + random.uniform(0.0, longest)
        left = self.policy.patience - (now - self.failed_since)
        if (remaining := self.remaining()) is not None:
            left = min(left, remaining)
        if delay >= left:
            return None
        if now + delay - self.failed_since >= SILENT:
            self.peer.waiting(error, left)
        return delay


def not_begun(error: VFlowError) -> bool:
    """Whether the call surely did nothing, and may do something later: any call may be sent again."""
    if error.reason is not None:
        # A service that says when to come back has done nothing. Without that, waiting for capacity does not help.
        return isinstance(error, ServerStopping) or (
            error.retry_after is not None and isinstance(error, CapacityExhausted | Unavailable)
        )
    return isinstance(error, Unavailable) and error.message.startswith(_NOT_CONNECTED) and not _for_good(error)


def cut_off(error: VFlowError) -> bool:
    """Whether the connection broke, or something between client and service failed: the call may have been done."""
    if error.reason is not None or _for_good(error):
        return False
    # A call that this client cancels is not retried, so a cancelled call here was ended by the server.
    return isinstance(error, Unavailable | Cancelled) or (
        error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
        and any(part in error.message for part in _RESET)
    )


def _for_good(error: VFlowError) -> bool:
    return any(part in error.message for part in _FOR_GOOD)
