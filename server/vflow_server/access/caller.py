"""Who calls, and for which tenant. The guard finds it out and binds it to the call; the servicers read it here."""

from __future__ import annotations

import re
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


METADATA_KEY = "vflow-tenant"
"""Request metadata that names the tenant."""

DEFAULT_TENANT = "default"
"""The tenant of calls that name none, where no token says whose they are."""

_TENANT = re.compile("[a-z0-9-]{1,63}")


def is_tenant(name: str) -> bool:
    """Whether ``name`` can name a tenant."""
    return _TENANT.fullmatch(name) is not None
