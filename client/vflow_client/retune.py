"""A search for a strategy, followed synchronously."""

import time
from collections.abc import Iterator

from google.longrunning.operations_pb2 import CancelOperationRequest, GetOperationRequest, Operation
from google.longrunning.operations_pb2_grpc import OperationsStub

from vflow_client.caller import Caller
from vflow_client.retune_progress import POLL_SECONDS, RetuneProgress
from vflow_client.v1.strategies_pb2 import RetuneMetadata, Strategy


class Retune(RetuneProgress):
    """A search that the service runs. It goes on whether or not anybody follows it.

    Iterating yields its `RetuneMetadata`: the present one, then every new one until the search has ended. A search that
    fails does not raise while iterating; `result()` raises.
    """

    def __init__(self, operation: Operation, stub: OperationsStub, caller: Caller) -> None:
        """For `StrategyAdmin.retune()`, `operation()` and `operations()`."""
        super().__init__(operation)
        self._stub = stub
        self._caller = caller

    def __iter__(self) -> Iterator[RetuneMetadata]:
        """Yields its progress. Raises VFlowError if the service cannot be asked any more; the search goes on."""
        yield self.metadata
        while not self.done:
            if self._poll(POLL_SECONDS):
                yield self.metadata

    def refresh(self, *, timeout: float | None = None) -> RetuneMetadata:
        """Reads its progress. Raises OperationNotFound if the service no longer stores the search."""
        request = GetOperationRequest(name=self.name)
        self._update(self._caller.unary(self._stub.GetOperation, request, timeout, repeatable=True))
        return self.metadata

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it has ended, but at most `timeout` seconds (None: no limit); returns whether it has."""
        started = time.monotonic()
        while not self.done:
            remaining = POLL_SECONDS if timeout is None else timeout - (time.monotonic() - started)
            if remaining <= 0:
                return False
            self._poll(min(POLL_SECONDS, remaining))
        return True

    def result(self, timeout: float | None = None) -> Strategy:
        """Waits for the end and returns the strategy that was found.

        Raises:
            OperationCancelled: it was cancelled; `metadata.best` is the draft of its best trial, if there was any.
            OperationInterrupted: the service stopped while the search ran.
            DeadlineExceeded: it has not ended within `timeout` seconds (None: no limit), and goes on.
            VFlowError: any other failure, of the search or of following it.
        """
        if not self.wait(timeout):
            raise self._timed_out(timeout)
        return self._strategy()

    def cancel(self, *, timeout: float | None = None) -> None:
        """Asks the service to end the search and store its best strategy as a draft. Does not wait for the end.

        No error if it has ended already.
        """
        request = CancelOperationRequest(name=self.name)
        self._caller.unary(self._stub.CancelOperation, request, timeout, repeatable=True)

    def _poll(self, seconds: float) -> bool:
        """Waits up to `seconds` for the end; returns whether anything has changed."""
        started = time.monotonic()
        request = self._wait_request(seconds)
        changed = self._update(self._caller.unary(self._stub.WaitOperation, request, None, repeatable=True))
        if not self.done:
            # The service may respond early; the next request still waits for the full interval.
            time.sleep(max(0.0, seconds - (time.monotonic() - started)))
        return changed
