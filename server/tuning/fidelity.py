"""How close turns under a strategy stay to the unpruned model: of one turn, and summed up over turns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fidelity:
    """Of one turn.

    Attributes:
        cosine: of the last hidden state at the end of the prompt with the unpruned model's.
        tokens: of the answer that were looked at; none of an answer that was sampled.
        tokens_agreed: those that the unpruned model, given all that came before them, would have chosen.
    """

    cosine: float
    tokens: int
    tokens_agreed: int


@dataclass
class FidelityTotals:
    """Of a strategy, since the service started: counters and sums that only grow.

    Attributes:
        watched: turns that were looked at.
        skipped: turns that were chosen, but could not be looked at: a picture was gone, or there was no room.
        cosine_sum: of the turns that were looked at.
        tokens: of their answers.
        tokens_agreed: see :class:`Fidelity`.
        rollbacks: how often the strategy was rolled back for what was seen.
    """

    watched: int = 0
    skipped: int = 0
    cosine_sum: float = 0.0
    tokens: int = 0
    tokens_agreed: int = 0
    rollbacks: int = 0

    def add(self, turn: Fidelity) -> None:
        """Count a turn."""
        self.watched += 1
        self.cosine_sum += turn.cosine
        self.tokens += turn.tokens
        self.tokens_agreed += turn.tokens_agreed

    @property
    def cosine(self) -> float | None:
        """Mean cosine; None before the first turn."""
        return self.cosine_sum / self.watched if self.watched else None

    @property
    def agreement(self) -> float | None:
        """Share of the answers' tokens that agree; None before the first."""
        return self.tokens_agreed / self.tokens if self.tokens else None
