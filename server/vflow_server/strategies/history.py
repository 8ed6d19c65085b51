"""Which strategy is active, which were so before it, and what happened to each. What happens makes a new history."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, auto
from typing import Any, Self

MOST_EVENTS = 100
"""Events that are kept of each strategy."""

MOST_BEFORE = 100
"""Activations that can be rolled back."""


class EventKind(Enum):
    """What can happen to a strategy, by the names of the contract's ``StrategyEvent.Kind``."""

    ACTIVATED = auto()
    REPLACED = auto()
    ROLLED_BACK = auto()
    RESTORED = auto()


@dataclass(frozen=True)
class StrategyEvent:
    """Something that happened to a strategy.

    Attributes:
        time: Unix time in seconds.
        kind: what.
        reason: why, in a person's words.
    """

    time: float
    kind: EventKind
    reason: str


@dataclass(frozen=True)
class History:
    """The active strategy and its past; strategies are named by their resource names.

    Attributes:
        active: the active one.
        before: those that were active before it, the latest last; rolling back takes the last away.
        generation: counts the changes of the active one.
        events: what happened to each, oldest first.
    """

    active: str
    before: tuple[str, ...] = ()
    generation: int = 0
    events: Mapping[str, tuple[StrategyEvent, ...]] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        """Changes whenever the active strategy changes."""
        return hashlib.blake2b(f"{self.generation} {self.active}".encode(), digest_size=8).hexdigest()

    def activated(self, name: str) -> Self:
        """The history after ``name``, which is not active, was activated."""
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
        """The history after the active strategy was rolled back; None where none was active before it.

        Args:
            there: the strategies that exist; others are passed over.
            reason: why, in a person's words.
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
        """The history as what JSON can hold."""
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
        """Read what :meth:`to_document` made.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: something else made it.
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
        base: resource name of the strategy that it began with.
        data_digest: SHA-256 of the calibration samples, in hex.
        samples: how many there were.
        trials: strategies that were tried.
        seed: of the search.
        objective: mean cosine of the last hidden state with the unpruned model's.
        base_objective: that of the strategy that the search began with.
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
