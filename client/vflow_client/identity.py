"""Request metadata that identifies the caller and the tenant."""

AUTHORIZATION = "authorization"
TENANT = "vflow-tenant"


def identity_metadata(token: str | None, tenant: str | None) -> tuple[tuple[str, str], ...]:
    """The request metadata for `token` and `tenant`; None leaves the entry out.

    White space around them is dropped: a token that was read from a file ends with a newline.

    Raises:
        ValueError: one of them is empty, or has a character that metadata cannot carry. The message does not show it.
    """
    bearer = () if token is None else ((AUTHORIZATION, f"Bearer {_sendable(token, 'token')}"),)
    return bearer if tenant is None else (*bearer, (TENANT, _sendable(tenant, "tenant")))


def _sendable(text: str, name: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError(f"the {name} is empty; leave it out, or give one")
    for position, character in enumerate(text, start=1):
        if not " " <= character <= "~":
            raise ValueError(
                f"the {name} has the character U+{ord(character):04X} at position {position}, which cannot be sent: "
                "only printable ASCII can"
            )
    return text
