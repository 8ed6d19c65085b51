"""Saying on whose behalf calls are made."""

METADATA_KEY = "vflow-tenant"


def tenant_metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """The request metadata of calls for `tenant`; None names nobody."""
    return () if tenant is None else ((METADATA_KEY, tenant),)
