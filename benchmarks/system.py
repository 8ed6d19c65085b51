"""The systems that a benchmark of conversations compares, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.chat import Chat


@dataclass(frozen=True)
class Reply:
    """One answer, as the client saw it.

    Attributes:
        text: the answer.
        tokens: tokens of the answer.
        first_token_s: seconds from sending the turn to the first token.
        kv_bytes: bytes of the conversation's KV cache after the turn.
        visual_kv_bytes: how many of these are the picture's; None if the system does not report it.
    """

    text: str
    tokens: int
    first_token_s: float
    kv_bytes: int
    visual_kv_bytes: int | None = None


class OpenChat(ABC):
    """A chat in progress with a system."""

    @abstractmethod
    def say(self, question: str) -> Reply:
        """Send the next turn and wait for the whole answer; the first turn includes the picture.

        Raises:
            RuntimeError: the system failed to answer, or gave another number of tokens than it was asked for.
        """

    @abstractmethod
    def close(self) -> None:
        """End the chat, so that the system can free its memory."""


class System(ABC):
    """A system that answers conversations about pictures.

    Attributes:
        name: its name in tables.
    """

    name: str

    @abstractmethod
    def open(self, chat: Chat) -> OpenChat:
        """Begin a chat. May be called from several threads; each chat is used by one of them."""

    @abstractmethod
    def resident_bytes(self) -> int | None:
        """Bytes of memory that its processes take now; None if they run on another machine."""

    @abstractmethod
    def close(self) -> None:
        """Stop the processes that were started for it."""
