"""The last known state of a search: the part that `Retune` and `AsyncRetune` share, without input or output."""

from google.longrunning.operations_pb2 import Operation, WaitOperationRequest
from google.protobuf.duration_pb2 import Duration

from vflow_client.errors import DeadlineExceeded, ServerFault, error_from_status
from vflow_client.v1.strategies_pb2 import RetuneMetadata, RetuneResponse, Strategy

POLL_SECONDS = 0.5
"""Seconds after which the service reports the progress of a search that has not ended."""


class RetuneProgress:
    """The state of a search that the service reported last."""

    def __init__(self, operation: Operation) -> None:
        """Starts with the state in `operation`."""
        self._operation = operation

    @property
    def name(self) -> str:
        """Resource name, `operations/{operation}`; `StrategyAdmin.operation()` finds the search again by it."""
        name: str = self._operation.name
        return name

    @property
    def done(self) -> bool:
        """Whether the search had ended, with or without success, at the last report."""
        done: bool = self._operation.done
        return done

    @property
    def metadata(self) -> RetuneMetadata:
        """The progress at the last report. `best` names the draft that a cancelled search left."""
        metadata = RetuneMetadata()
        self._operation.metadata.Unpack(metadata)
        return metadata

    def _update(self, operation: Operation) -> bool:
        """Stores a newer state; returns whether it differs from the one before."""
        changed: bool = operation != self._operation
        self._operation = operation
        return changed

    def _wait_request(self, seconds: float) -> WaitOperationRequest:
        timeout = Duration()
        timeout.FromNanoseconds(round(seconds * 1e9))
        return WaitOperationRequest(name=self.name, timeout=timeout)

    def _strategy(self) -> Strategy:
        """The strategy that the search found, once it has ended; raises the VFlowError with which it failed."""
        if self._operation.HasField("error"):
            raise error_from_status(self._operation.error)
        response = RetuneResponse()
        if not self._operation.response.Unpack(response):
            raise ServerFault(f"{self.name} ended with neither a strategy nor an error")
        return response.strategy

    def _timed_out(self, timeout: float | None) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self.name} did not end within {timeout:g} s; it goes on in the service")
