"""The history of the active strategy: those that were active before it, and the events of each. Immutable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, auto
from typing import Any, Self

MOST_EVENTS = 100
"""Number of events that are stored of each strategy."""

MOST_BEFORE = 100
"""Number of activations that can be rolled back."""


class EventKind(Enum):
    """The kinds of events, with the names of the contract's ``StrategyEvent.Kind``."""

    ACTIVATED = auto()
    REPLACED = auto()
    ROLLED_BACK = auto()
    RESTORED = auto()


@dataclass(frozen=True)
class StrategyEvent:
    """An event of a strategy.

    Attributes:
        time: Unix time in seconds.
        kind: the kind of event.
        reason: the reason, for people.
    """

    time: float
    kind: EventKind
    reason: str


@dataclass(frozen=True)
class History:
    """The active strategy and its past. Strategies are given by their resource names.

    Attributes:
        active: the active strategy.
        before: strategies that were active before it, the latest last. A rollback removes the last one.
        generation: number of changes of the active strategy.
        events: the events of each strategy, oldest first.
    """

    active: str
    before: tuple[str, ...] = ()
    generation: int = 0
    events: Mapping[str, tuple[StrategyEvent, ...]] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        """A tag that changes whenever the active strategy changes."""
        return hashlib.blake2b(f"{self.generation} {self.active}".encode(), digest_size=8).hexdigest()

    def activated(self, name: str) -> Self:
        """The history after the activation of ``name``, which must not be active."""
        return replace(
            self,
            active=name,
            before=(*self.before, self.active)[-MOST_BEFORE:],
            generation=self.generation + 1,
            events=self._with(
                (name, EventKind.ACTIVATED, ""), (self.active, EventKind.REPLACED, f"{name} was activated")
            ),
        )

    def rolled_back(self, there: Container[str], reason: str) -> Self | None:
        """The history after a rollback of the active strategy; None if no strategy was active before it.

        Args:
            there: the strategies that exist; others are skipped.
            reason: the reason, for people.
        """
        before = list(self.before)
        while before:
            if (name := before.pop()) in there and name != self.active:
                return replace(
                    self,
                    active=name,
                    before=tuple(before),
                    generation=self.generation + 1,
                    events=self._with(
                        (self.active, EventKind.ROLLED_BACK, reason),
                        (name, EventKind.RESTORED, f"{self.active} was rolled back"),
                    ),
                )
        return None

    def to_document(self) -> dict[str, Any]:
        """The history as a JSON document."""
        return {
            "active": self.active,
            "generation": self.generation,
            "before": list(self.before),
            "events": {
                name: [{**asdict(event), "kind": event.kind.name} for event in events]
                for name, events in self.events.items()
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The history that :meth:`to_document` converted.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the document is not such a history.
        """
        return cls(
            active=str(document["active"]),
            before=tuple(map(str, document["before"])),
            generation=int(document["generation"]),
            events={
                str(name): tuple(
                    StrategyEvent(float(event["time"]), EventKind[event["kind"]], str(event["reason"]))
                    for event in events
                )
                for name, events in document["events"].items()
            },
        )

    def _with(self, *happened: tuple[str, EventKind, str]) -> dict[str, tuple[StrategyEvent, ...]]:
        events, now = dict(self.events), time.time()
        for name, kind, reason in happened:
            events[name] = (*events.get(name, ()), StrategyEvent(now, kind, reason))[-MOST_EVENTS:]
        return events


@dataclass(frozen=True)
class Provenance:
    """How a search found a strategy.

    Attributes:
        operation: resource name of the operation that ran the search.
        base: resource name of the strategy that it started from.
        data_digest: SHA-256 of the calibration samples, in hex.
        samples: number of samples.
        trials: number of strategies that were tried.
        seed: seed of the search.
        objective: mean cosine between the last hidden states of the pruned and the unpruned model.
        base_objective: the objective of the strategy that the search started from.
        model_revision: digest of the model.
        code_version: version of the service.
    """

    operation: str
    base: str
    data_digest: str
    samples: int
    trials: int
    seed: int
    objective: float
    base_objective: float
    model_revision: str
    code_version: str
