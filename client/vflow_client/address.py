"""The address of a service in the forms in which people write it, and what gRPC calls it."""

import ipaddress
import re
from dataclasses import dataclass

DEFAULT_PORT = 50051
"""The port of a service whose address names none."""

_ENCRYPTED = {"http": False, "https": True, "grpc": False, "grpcs": True}
"""Schemes of web addresses, and whether they ask for an encrypted connection."""

_TARGET = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):", re.IGNORECASE)
"""Schemes that gRPC knows itself."""

_HELP = "give HOST:PORT, such as localhost:50051 or [::1]:50051"


@dataclass(frozen=True)
class Address:
    """Where a service is.

    Attributes:
        target: the address as gRPC takes it.
        encrypted: whether the address itself asks for TLS; None: it does not say.
        local: whether it is on this machine, which no proxy leads to.
    """

    target: str
    encrypted: bool | None = None
    local: bool = False


def to_address(text: str) -> Address:
    """Reads an address: host and port, a host alone (port 50051), a web address without a path, or a gRPC target.

    Raises:
        ValueError: `text` is none of these.
    """
    text = text.strip()
    if scheme := _TARGET.match(text):
        return Address(text, local=_is_local_target(scheme[1].lower(), text[scheme.end() :]))
    encrypted = None
    if "://" in text:
        name, _, rest = text.partition("://")
        if name.lower() not in _ENCRYPTED:
            raise ValueError(f"the address {text!r} begins with {name + '://'!r}, which is not known; {_HELP}")
        encrypted, text = _ENCRYPTED[name.lower()], rest.removesuffix("/")
    host, port = _split(text)
    if not host or re.search(r"[\s/@?#,\\]", host):
        raise ValueError(f"{text!r} is no address of a service; {_HELP}")
    shown = f"[{host}]" if ":" in host else host
    return Address(f"{shown}:{port}", encrypted, _is_local(host))


def _split(text: str) -> tuple[str, int]:
    """Host, without brackets, and port."""
    if bracketed := re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text):
        host, port = bracketed[1], bracketed[2]
        if not _is_ipv6(host):
            raise ValueError(f"{text!r}: what stands in brackets is no IPv6 address; {_HELP}")
    elif _is_ipv6(text):
        host, port = text, None
    elif text.count(":") > 1:
        raise ValueError(f"{text!r} is no address of a service; write an IPv6 address in brackets: [::1]:50051")
    else:
        host, colon, number = text.partition(":")
        port = number if colon else None
    if port is None:
        return host, DEFAULT_PORT
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: the port must be a number from 1 to 65535")
    return host, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_local_target(scheme: str, rest: str) -> bool:
    """Whether a gRPC target is on this machine. A list of addresses is if all of them are."""
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme not in ("dns", "ipv4", "ipv6"):
        return False
    for each in rest.rpartition("/")[2].split(","):
        try:
            if not _is_local(_split(each)[0]):
                return False
        except ValueError:
            return False
    return True
