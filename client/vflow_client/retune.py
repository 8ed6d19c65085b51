"""A search for a strategy, followed synchronously."""

import time
from collections.abc import Iterator

from google.longrunning.operations_pb2 import CancelOperationRequest, GetOperationRequest, Operation
from google.longrunning.operations_pb2_grpc import OperationsStub

from vflow_client.caller import Caller
from vflow_client.retune_progress import POLL_SECONDS, RetuneProgress
from vflow_client.v1.strategies_pb2 import RetuneMetadata, Strategy


class Retune(RetuneProgress):
    """A search that the service runs, whether anybody follows it or not.

    Iterate over it for its `RetuneMetadata`: how far it is, then how far whenever that has changed, until it has ended.
    Iterating does not raise where the search fails; `result()` does.
    """

    def __init__(self, operation: Operation, stub: OperationsStub, caller: Caller) -> None:
        """For `StrategyAdmin.retune()`, `operation()` and `operations()`."""
        super().__init__(operation)
        self._stub = stub
        self._caller = caller

    def __iter__(self) -> Iterator[RetuneMetadata]:
        """How far it has come, as it goes on. Raises VFlowError if the service stops telling; the search goes on."""
        yield self.metadata
        while not self.done:
            if self._poll(POLL_SECONDS):
                yield self.metadata

    def refresh(self, *, timeout: float | None = None) -> RetuneMetadata:
        """Reads how far it has come. Raises OperationNotFound if the service has forgotten it."""
        request = GetOperationRequest(name=self.name)
        self._take(self._caller.unary(self._stub.GetOperation, request, timeout, repeatable=True))
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
            OperationCancelled: it was cancelled; `metadata.best` is the draft that was kept, if it had tried anything.
            OperationInterrupted: the service ended while it ran.
            DeadlineExceeded: it has not ended within `timeout` seconds (None: no limit), and goes on.
            VFlowError: any other failure, of the search or of following it.
        """
        if not self.wait(timeout):
            raise self._too_slow(timeout)
        return self._strategy()

    def cancel(self, *, timeout: float | None = None) -> None:
        """Asks the service to end it and to keep the best so far as a draft. Returns before it has: `wait()` for that.

        No error if it has ended already.
        """
        request = CancelOperationRequest(name=self.name)
        self._caller.unary(self._stub.CancelOperation, request, timeout, repeatable=True)

    def _poll(self, seconds: float) -> bool:
        """Waits up to `seconds` for the end; returns whether anything has changed."""
        started = time.monotonic()
        request = self._wait_request(seconds)
        changed = self._take(self._caller.unary(self._stub.WaitOperation, request, None, repeatable=True))
        if not self.done:
            # A service may answer at once; it is not asked again any sooner for that.
            time.sleep(max(0.0, seconds - (time.monotonic() - started)))
        return changed
