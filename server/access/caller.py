"""Who calls. The guard finds it out and binds it to the call; whatever serves the call asks here."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Whoever a call comes from.

    Attributes:
        tenant: whose sessions, pictures and operations it sees.
        admin: whether it may administrate strategies and operations.
    """

    tenant: str
    admin: bool


_current: ContextVar[Caller] = ContextVar("caller")  # each call is served in a task, and so a context, of its own


def current_caller() -> Caller:
    """The caller of the call that is being served."""
    return _current.get()


def bind_caller(caller: Caller) -> None:
    """Have ``caller`` be the one whose call is served in this context."""
    _current.set(caller)
