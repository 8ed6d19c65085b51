"""What a benchmark of conversations compares: systems that hold them, behind one small face."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.talk import Talk


@dataclass(frozen=True)
class Reply:
    """One answer, as the client saw it.

    Attributes:
        text: what was answered.
        tokens: how many tokens that was.
        first_token_s: seconds from sending the turn to the first of them.
        kv_bytes: bytes of KV cache of the conversation after the turn.
        visual_kv_bytes: how many of these are the picture's; None where the system does not tell.
    """

    text: str
    tokens: int
    first_token_s: float
    kv_bytes: int
    visual_kv_bytes: int | None = None


class OpenTalk(ABC):
    """A talk that a system is holding."""

    @abstractmethod
    def say(self, question: str) -> Reply:
        """Say the next turn and wait for the whole answer; the first turn brings the picture.

        Raises:
            RuntimeError: the system failed to answer as it was asked to.
        """

    @abstractmethod
    def close(self) -> None:
        """End the talk, so that the system forgets it."""


class System(ABC):
    """Something that holds conversations about pictures.

    Attributes:
        name: what tables call it.
    """

    name: str

    @abstractmethod
    def open(self, talk: Talk) -> OpenTalk:
        """Begin a talk. May be called from several threads, and each talk is used by one."""

    @abstractmethod
    def resident_bytes(self) -> int | None:
        """Memory that its processes take now; None where they cannot be seen from here."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started for it."""
