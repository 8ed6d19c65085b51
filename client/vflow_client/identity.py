"""Saying who calls, and on whose behalf."""

AUTHORIZATION = "authorization"
TENANT = "vflow-tenant"


def identity_metadata(token: str | None, tenant: str | None) -> tuple[tuple[str, str], ...]:
    """The request metadata of calls by whoever holds `token`, for `tenant`; None says nothing."""
    bearer = () if token is None else ((AUTHORIZATION, f"Bearer {token}"),)
    return bearer if tenant is None else (*bearer, (TENANT, tenant))
