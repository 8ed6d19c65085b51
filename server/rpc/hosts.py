"""Addresses that the service listens on."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(host: str, port: int) -> str:
    """``host:port``, as gRPC and people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
