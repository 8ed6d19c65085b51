"""Whose call it is. The one place that decides it; what authenticates callers will bind their tenant here."""

from __future__ import annotations

import re
from typing import Any

import grpc

from vflow_server.errors import InvalidRequest

METADATA_KEY = "vflow-tenant"
"""Request metadata that names the tenant."""

DEFAULT_TENANT = "default"
"""The tenant of calls that name none."""

_TENANT = re.compile("[a-z0-9-]{1,63}")


def tenant_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The tenant whose call ``context`` is of.

    Raises:
        InvalidRequest: TENANT_INVALID.
    """
    named = [str(value) for key, value in context.invocation_metadata() or () if key == METADATA_KEY]
    if not named:
        return DEFAULT_TENANT
    if len(named) > 1 or not _TENANT.fullmatch(named[0]):
        raise InvalidRequest(
            "TENANT_INVALID",
            METADATA_KEY,
            f"the request metadata {METADATA_KEY} is {', '.join(map(repr, named))[:160]}; name one tenant by 1 to 63 "
            f"lower-case letters, digits and hyphens, or leave it out for {DEFAULT_TENANT!r}",
            metadata={"tenant": named[0][:80]},
        )
    return named[0]
