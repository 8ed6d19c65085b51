"""Resource names of the contract: ``sessions/{session}``, ``strategies/{strategy}``."""

from __future__ import annotations

import re

from vflow_server.rpc.errors import InvalidRequest

_IDENTIFIER = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def check_name(name: str, collection: str, field: str) -> str:
    """Check that ``name`` is ``{collection}/{identifier}``; returns it.

    Raises:
        InvalidRequest: NAME_INVALID.
    """
    parent, _, identifier = name.partition("/")
    if parent != collection or not _IDENTIFIER.fullmatch(identifier):
        raise InvalidRequest(
            "NAME_INVALID",
            field,
            f"{name[:80]!r} is not a name of the form {collection}/..., as the server gave it out",
            metadata={"name": name[:80]},
        )
    return name


def check_identifier(identifier: str, field: str) -> str:
    """Check that ``identifier`` can be the last part of a resource name; returns it.

    Raises:
        InvalidRequest: NAME_INVALID.
    """
    if not _IDENTIFIER.fullmatch(identifier):
        raise InvalidRequest(
            "NAME_INVALID",
            field,
            f"{identifier[:80]!r} cannot be an identifier; take 1 to 63 lower-case letters, digits and hyphens, "
            "beginning with a letter and not ending with a hyphen",
            metadata={"name": identifier[:80]},
        )
    return identifier
