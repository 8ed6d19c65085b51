"""When a call is tried again."""

import math

import grpc
import pytest

from vflow_client.errors import (
    Cancelled,
    CapacityExhausted,
    EngineFailed,
    OperationCancelled,
    ServerFault,
    ServerStopping,
    SessionBusy,
    StorageFailed,
    Unavailable,
    VFlowError,
)
from vflow_client.retry import DEFAULT_TIMEOUT, Attempts, RetryPolicy

UNREACHABLE = Unavailable("refused", code=grpc.StatusCode.UNAVAILABLE)
NOT_CONNECTED = Unavailable(
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
    code=grpc.StatusCode.UNAVAILABLE,
)
NO_NAME = Unavailable("errors resolving nope.invalid:1: Domain name not found", code=grpc.StatusCode.UNAVAILABLE)
UNTRUSTED = Unavailable(
    "failed to connect to all addresses; last error: CERTIFICATE_VERIFY_FAILED", code=grpc.StatusCode.UNAVAILABLE
)
BY_A_PROXY = Unavailable("no healthy upstream", code=grpc.StatusCode.UNAVAILABLE)
CUT_OFF = Cancelled("CANCELLED", code=grpc.StatusCode.CANCELLED)


def test_delays_double_up_to_the_longest_and_attempts_run_out() -> None:
    policy = RetryPolicy(attempts=5, first_delay=1.0, longest_delay=3.0)
    rows = [Attempts(policy, timeout=None, repeatable=True) for _ in range(200)]
    columns = [[attempts.delay_after(UNREACHABLE) for attempts in rows] for _ in range(5)]
    assert columns.pop() == [None] * len(rows)
    for column, longest in zip(columns, [1.0, 2.0, 3.0, 3.0], strict=True):
        delays = [delay for delay in column if delay is not None]
        assert len(delays) == len(rows)
        assert 0 <= min(delays) < longest / 4 and longest * 3 / 4 < max(delays) <= longest


def test_patience_ends_and_what_arrives_renews_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("vflow_client.retry.time.monotonic", lambda: now[0])
    attempts = Attempts(RetryPolicy(patience=60.0), timeout=None, repeatable=True)

    def time_out() -> float:
        began = now[0]
        while (delay := attempts.delay_after(UNREACHABLE)) is not None:
            assert 0 <= delay <= 2.0
            now[0] += delay + 0.01
        return now[0] - began

    now[0] = 500.0  # the call ran for long before it failed
    assert 58.0 <= time_out() <= 60.0
    now[0] = 560.0  # a delay is random, so a short one might still fit before
    assert attempts.delay_after(UNREACHABLE) is None
    attempts.progressed()
    assert 58.0 <= time_out() <= 60.0


def test_the_default_outlasts_an_outage_of_half_a_minute() -> None:
    assert RetryPolicy().patience >= 60 and RetryPolicy().attempts is None
    assert RetryPolicy().patience < DEFAULT_TIMEOUT


@pytest.mark.parametrize(
    ("error", "repeatable", "again"),
    [
        (UNREACHABLE, True, True),
        (UNREACHABLE, False, False),
        (NOT_CONNECTED, False, True),
        (NO_NAME, False, True),
        (UNTRUSTED, True, False),
        (BY_A_PROXY, True, True),
        (BY_A_PROXY, False, False),
        (ServerFault("Received RST_STREAM with error code 2", code=grpc.StatusCode.INTERNAL), True, True),
        (ServerFault("it broke", code=grpc.StatusCode.INTERNAL), True, False),
        (StorageFailed("", reason="STORAGE_FAILED", retry_after=10.0), False, True),
        (EngineFailed("", reason="ENGINE_FAILED"), True, False),
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
        "not connected, unsafe",
        "no such name, unsafe",
        "untrusted",
        "refused by a proxy",
        "refused by a proxy, unsafe",
        "reset",
        "fault",
        "disk",
        "engine",
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
    delay = Attempts(RetryPolicy(), timeout=60.0, repeatable=True).delay_after(full)
    assert delay is not None and 30.0 <= delay <= 32.0
    assert Attempts(RetryPolicy(patience=20.0), timeout=60.0, repeatable=True).delay_after(full) is None


def test_the_timeout_covers_all_attempts() -> None:
    assert Attempts(RetryPolicy(), timeout=None, repeatable=True).remaining() is None
    remaining = Attempts(RetryPolicy(), timeout=5.0, repeatable=True).remaining()
    assert remaining is not None and 4.0 < remaining <= 5.0
    assert Attempts(RetryPolicy(), timeout=-1.0, repeatable=True).remaining() == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"patience": -1.0},
        {"patience": math.nan},
        {"first_delay": -1.0},
        {"first_delay": 9.0, "longest_delay": 1.0},
        {"first_delay": math.nan},
    ],
)
def test_a_policy_checks_itself(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        RetryPolicy(**wrong)  # type: ignore[arg-type]
