"""Access: decides which callers may call which methods.

If tokens are configured, every call must carry one, and the token determines the tenant. Without tokens every caller
may call every method, for the tenant that the call names. By default the service then listens on the loopback interface
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import grpc

from vflow_server.access.caller import DEFAULT_TENANT, METADATA_KEY, Caller, is_tenant
from vflow_server.access.tokens import TokenEntry, find_token, read_token_file, reread_token_file
from vflow_server.access.watched_files import WatchedFiles
from vflow_server.rpc.errors import InvalidRequest, ServiceError, unauthenticated

AUTHORIZATION = "authorization"
"""Request metadata that carries the token."""

ADMINISTRATION = ("/vflow.v1.Strategies/", "/google.longrunning.Operations/")
"""Prefixes of the methods that only administrators may call."""

Metadata = Sequence[tuple[str, str | bytes]]


class Access:
    """Admits calls, or refuses them.

    Args:
        tokens: the known tokens, or the file that lists them, which is read again when it changes; None admits every
            caller.

    Attributes:
        open: whether every caller is admitted.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a list of tokens.
    """

    def __init__(self, tokens: Sequence[TokenEntry] | Path | None) -> None:
        self._entries: Sequence[TokenEntry] = ()
        self._file: WatchedFiles[Sequence[TokenEntry]] | None = None
        self.open = tokens is None
        if isinstance(tokens, Path):
            self._file = WatchedFiles([tokens], lambda: read_token_file(tokens), lambda: reread_token_file(tokens))
        elif tokens is not None:
            self._entries = tokens

    def caller(self, method: str, metadata: Metadata) -> Caller:
        """The caller of ``method`` (``/package.Service/Method``) with the request metadata ``metadata``.

        Raises:
            ServiceError: TOKEN_MISSING, TOKEN_INVALID, TOKEN_EXPIRED, TENANT_INVALID, TENANT_FORBIDDEN, ADMIN_REQUIRED.
        """
        if self.open:
            return Caller(named_tenant(metadata) or DEFAULT_TENANT, admin=True)
        caller = self.bearer(_token(metadata))
        if (named := named_tenant(metadata)) not in (None, caller.tenant):
            raise ServiceError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_FORBIDDEN",
                f"the token is of another tenant than {named!r}; leave {METADATA_KEY} out, or use a token of {named!r}",
                metadata={"tenant": named},
            )
        if method.startswith(ADMINISTRATION) and not caller.admin:
            raise ServiceError(
                grpc.StatusCode.PERMISSION_DENIED,
                "ADMIN_REQUIRED",
                f"{method[1:]} is for administrators and the token is of a user; use one with role=admin",
                metadata={"method": method[1:]},
            )
        return caller

    def bearer(self, token: str) -> Caller:
        """The caller that ``token`` belongs to.

        Raises:
            ServiceError: TOKEN_INVALID, TOKEN_EXPIRED.
        """
        entry = find_token(self._entries if self._file is None else self._file.current(), token)
        if entry is None:
            raise unauthenticated("TOKEN_INVALID", "the token is not known here; ask the operator for a valid one")
        if entry.expired(datetime.now(UTC)):
            raise unauthenticated("TOKEN_EXPIRED", "the token has expired; ask the operator for a new one")
        return entry.caller


def named_tenant(metadata: Metadata) -> str | None:
    """The tenant that the request metadata names; None if it names none.

    Raises:
        InvalidRequest: TENANT_INVALID.
    """
    named = [str(value) for key, value in metadata if key == METADATA_KEY]
    if not named:
        return None
    if len(named) > 1 or not is_tenant(named[0]):
        raise InvalidRequest(
            "TENANT_INVALID",
            METADATA_KEY,
            f"the request metadata {METADATA_KEY} is {', '.join(map(repr, named))[:160]}; name one tenant by 1 to 63 "
            "lower-case letters, digits and hyphens, or leave it out",
            metadata={"tenant": named[0][:80]},
        )
    return named[0]


def _token(metadata: Metadata) -> str:
    brought = [str(value) for key, value in metadata if key == AUTHORIZATION]
    if not brought:
        raise unauthenticated(
            "TOKEN_MISSING",
            f"this service needs a token; send the request metadata {AUTHORIZATION}: Bearer TOKEN",
        )
    scheme, _, token = brought[0].partition(" ")
    if len(brought) > 1 or scheme.lower() != "bearer" or not token:
        raise unauthenticated("TOKEN_INVALID", f"the request metadata {AUTHORIZATION} must be one 'Bearer TOKEN'")
    return token
