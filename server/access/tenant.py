"""Tenants: their names, and how request metadata names one."""

from __future__ import annotations

import re

METADATA_KEY = "vflow-tenant"
"""Request metadata that names the tenant."""

DEFAULT_TENANT = "default"
"""The tenant of calls that name none, where no token says whose they are."""

_TENANT = re.compile("[a-z0-9-]{1,63}")


def is_tenant(name: str) -> bool:
    """Whether ``name`` can name a tenant."""
    return _TENANT.fullmatch(name) is not None
