"""What is known of a search for a strategy: pure, the common part of `Retune` and `AsyncRetune`."""

from google.longrunning.operations_pb2 import Operation, WaitOperationRequest
from google.protobuf.duration_pb2 import Duration

from vflow_client.errors import DeadlineExceeded, ServerFault, error_from_status
from vflow_client.v1.strategies_pb2 import RetuneMetadata, RetuneResponse, Strategy

POLL_SECONDS = 0.5
"""How long the service is asked to wait for the end before it tells how far the search has come."""


class RetuneProgress:
    """A search as the service last told of it."""

    def __init__(self, operation: Operation) -> None:
        """Starts with what `operation` says."""
        self._operation = operation

    @property
    def name(self) -> str:
        """Resource name, `operations/{operation}`; by it `StrategyAdmin.operation()` finds the search again."""
        name: str = self._operation.name
        return name

    @property
    def done(self) -> bool:
        """Whether it had ended, well or not, when the service last told of it."""
        done: bool = self._operation.done
        return done

    @property
    def metadata(self) -> RetuneMetadata:
        """How far it had come when the service last told of it. `best` names the draft that a cancelled one kept."""
        metadata = RetuneMetadata()
        self._operation.metadata.Unpack(metadata)
        return metadata

    def _take(self, operation: Operation) -> bool:
        """Notes a newer state; returns whether it differs from the one before."""
        changed: bool = operation != self._operation
        self._operation = operation
        return changed

    def _wait_request(self, seconds: float) -> WaitOperationRequest:
        timeout = Duration()
        timeout.FromNanoseconds(round(seconds * 1e9))
        return WaitOperationRequest(name=self.name, timeout=timeout)

    def _strategy(self) -> Strategy:
        """The strategy that an ended search found; raises the VFlowError with which it failed."""
        if self._operation.HasField("error"):
            raise error_from_status(self._operation.error)
        response = RetuneResponse()
        if not self._operation.response.Unpack(response):
            raise ServerFault(f"{self.name} ended with neither a strategy nor an error")
        return response.strategy

    def _too_slow(self, timeout: float | None) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.name} did not end within {timeout:g} s; it goes on in the service")
