"""A search that goes on by one step whenever it is asked about, without any model."""

from google.longrunning.operations_pb2 import Operation
from google.rpc import code_pb2, error_details_pb2, status_pb2

from vflow_client.v1.strategies_pb2 import Provenance, RetuneMetadata, RetuneResponse, Strategy, Trial

OBJECTIVES = (0.91, 0.88, 0.95, 0.93)
STOPPED_EARLY = 1
"""Number of the trial that is stopped early."""


class FakeSearch:
    """Steps: pictures are encoded, questions answered, one trial for each of `OBJECTIVES`, the end.

    With `endless` it stays where it is after the first two trials. `fail` and `cancel` end it where it is.
    """

    def __init__(self, name: str = "operations/one") -> None:
        self.name = name
        self.endless = False
        self.samples = 2
        self._step = 0
        self._failure: status_pb2.Status | None = None

    def fail(self, code: int, reason: str, *, draft: str = "") -> None:
        self._failure = status_pb2.Status(code=code, message="ended on purpose")
        metadata = {"operation": self.name} | ({"strategy": draft} if draft else {})
        info = error_details_pb2.ErrorInfo(reason=reason, domain="vflow.dev", metadata=metadata)
        self._failure.details.add().Pack(info)

    def cancel(self) -> None:
        if not self.now().done:
            draft = "strategies/tuned-draft" if self._trials() else ""
            self.fail(code_pb2.CANCELLED, "OPERATION_CANCELLED", draft=draft)

    def advance(self) -> Operation:
        if self._failure is None and not (self.endless and self._trials() == 2):
            self._step += 1
        return self.now()

    def now(self) -> Operation:
        operation = Operation(name=self.name, done=self._failure is not None or self._step > 1 + len(OBJECTIVES))
        operation.metadata.Pack(self._metadata(ended=operation.done))
        if self._failure is not None:
            operation.error.CopyFrom(self._failure)
        elif operation.done:
            operation.response.Pack(RetuneResponse(strategy=found_strategy(self.name, self.samples)))
        return operation

    def _trials(self) -> int:
        return min(max(self._step - 1, 0), len(OBJECTIVES))

    def _metadata(self, ended: bool) -> RetuneMetadata:
        tried = [
            Trial(objective=objective, stopped_early=number == STOPPED_EARLY)
            for number, objective in enumerate(OBJECTIVES[: self._trials()])
        ]
        metadata = RetuneMetadata(
            budget=0.1, base="strategies/preset-10", trials=len(OBJECTIVES), tried=tried, samples=2, base_objective=0.9
        )
        phases = (RetuneMetadata.ENCODING, RetuneMetadata.ANSWERING)
        metadata.phase = phases[self._step] if self._step < 2 else RetuneMetadata.SEARCHING
        if ended:
            metadata.phase = RetuneMetadata.ENDED
        if tried:
            metadata.best_objective = max(trial.objective for trial in tried if not trial.stopped_early)
            metadata.best.ratios.extend([0.2, 0.5, 0.6])
            metadata.remaining.FromSeconds(100)
        if self._failure is not None and tried:
            metadata.best.name = "strategies/tuned-draft"
        return metadata


def found_strategy(operation: str, samples: int = 2) -> Strategy:
    """What the search finds."""
    return Strategy(
        name="strategies/tuned-one",
        budget=0.1,
        starts=[0, 8, 16],
        ratios=[0.2, 0.5, 0.6],
        threshold=12.5,
        alpha=-0.25,
        grid=6.5,
        diversity=0.25,
        etag="e2",
        provenance=Provenance(
            operation=operation,
            base="strategies/preset-10",
            data_digest="ab" * 32,
            samples=samples,
            trials=len(OBJECTIVES),
            seed=7,
            objective=max(OBJECTIVES),
            base_objective=0.9,
            model_revision="cd" * 32,
            code_version="0.1.0",
        ),
    )
