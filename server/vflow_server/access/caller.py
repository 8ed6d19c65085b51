"""The caller of a call, and its tenant. The guard binds the caller to the call; servicers read it here."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The caller of a call.

    Attributes:
        tenant: the tenant whose sessions, pictures and operations the caller sees.
        admin: whether the caller may manage strategies and operations.
    """

    tenant: str
    admin: bool


_current: ContextVar[Caller] = ContextVar("caller")  # each call runs in its own task, and so in its own context


def current_caller() -> Caller:
    """The caller of the call that is served in this context.

    Raises:
        LookupError: the context serves no call.
    """
    return _current.get()


def bind_caller(caller: Caller) -> None:
    """Set the caller of the call that is served in this context."""
    _current.set(caller)


METADATA_KEY = "vflow-tenant"
"""Request metadata that names the tenant."""

DEFAULT_TENANT = "default"
"""The tenant of calls without a token that name none."""

_TENANT = re.compile("[a-z0-9-]{1,63}")


def is_tenant(name: str) -> bool:
    """Whether ``name`` can name a tenant."""
    return _TENANT.fullmatch(name) is not None


def tenants(text: str) -> frozenset[str]:
    """The tenants that ``text`` names, separated by commas.

    Raises:
        ValueError: it names none, or one of them cannot name a tenant.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(map(is_tenant, names)):
        raise ValueError(
            "expected names of tenants, separated by commas, each of lower-case letters, digits and hyphens"
        )
    return frozenset(names)
