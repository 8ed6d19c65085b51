"""Request metadata that identifies the caller and the tenant."""

AUTHORIZATION = "authorization"
TENANT = "vflow-tenant"


def identity_metadata(token: str | None, tenant: str | None) -> tuple[tuple[str, str], ...]:
    """The request metadata for `token` and `tenant`; None leaves the entry out."""
    bearer = () if token is None else ((AUTHORIZATION, f"Bearer {token}"),)
    return bearer if tenant is None else (*bearer, (TENANT, tenant))
