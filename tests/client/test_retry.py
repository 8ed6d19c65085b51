"""When a call is tried again."""

import math

import grpc
import pytest

from vflow_client.errors import (
    Cancelled,
    CapacityExhausted,
    OperationCancelled,
    ServerStopping,
    SessionBusy,
    Unavailable,
    VFlowError,
)
from vflow_client.retry import Attempts, RetryPolicy

UNREACHABLE = Unavailable("refused", code=grpc.StatusCode.UNAVAILABLE)
CUT_OFF = Cancelled("CANCELLED", code=grpc.StatusCode.CANCELLED)


def test_delays_double_up_to_the_longest_and_attempts_run_out() -> None:
    attempts = Attempts(RetryPolicy(attempts=5, first_delay=1.0, longest_delay=3.0), timeout=None, repeatable=True)
    delays = [attempts.delay_after(UNREACHABLE) for _ in range(5)]
    assert delays[-1] is None
    for delay, longest in zip(delays[:-1], [1.0, 2.0, 3.0, 3.0], strict=True):
        assert delay is not None and longest / 2 <= delay <= longest


@pytest.mark.parametrize(
    ("error", "repeatable", "again"),
    [
        (UNREACHABLE, True, True),
        (UNREACHABLE, False, False),
        (CUT_OFF, True, True),
        (CUT_OFF, False, False),
        (OperationCancelled("", reason="OPERATION_CANCELLED"), True, False),
        (ServerStopping("", reason="SERVER_STOPPING"), False, True),
        (CapacityExhausted("", reason="CAPACITY_EXHAUSTED", retry_after=0.1), False, True),
        (CapacityExhausted("", reason="CAPACITY_EXHAUSTED"), True, False),
        (SessionBusy("", reason="SESSION_BUSY"), True, False),
        (VFlowError(""), True, False),
    ],
    ids=[
        "unreachable",
        "unreachable, unsafe",
        "cut off",
        "cut off, unsafe",
        "operation cancelled",
        "stopping",
        "full",
        "full for good",
        "busy",
        "unknown",
    ],
)
def test_what_is_worth_another_attempt(error: VFlowError, repeatable: bool, again: bool) -> None:
    delay = Attempts(RetryPolicy(), timeout=None, repeatable=repeatable).delay_after(error)
    assert (delay is not None) == again


def test_a_delay_beyond_the_timeout_is_not_waited_for() -> None:
    full = CapacityExhausted("", reason="CAPACITY_EXHAUSTED", retry_after=30.0)
    assert Attempts(RetryPolicy(), timeout=10.0, repeatable=True).delay_after(full) is None
    assert Attempts(RetryPolicy(), timeout=60.0, repeatable=True).delay_after(full) == 30.0


def test_the_timeout_covers_all_attempts() -> None:
    assert Attempts(RetryPolicy(), timeout=None, repeatable=True).remaining() is None
    remaining = Attempts(RetryPolicy(), timeout=5.0, repeatable=True).remaining()
    assert remaining is not None and 4.0 < remaining <= 5.0
    assert Attempts(RetryPolicy(), timeout=-1.0, repeatable=True).remaining() == 0.0


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"first_delay": -1.0}, {"first_delay": 9.0, "longest_delay": 1.0}, {"first_delay": math.nan}],
)
def test_a_policy_checks_itself(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        RetryPolicy(**wrong)  # type: ignore[arg-type]
