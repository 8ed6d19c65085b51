"""Memory of another process on this machine, found by the port it listens on."""

from __future__ import annotations

import psutil


def resident_bytes(process: int) -> int:
    """Bytes of memory of a process and all its descendants; memory that several of them share counts once.

    Raises:
        psutil.Error: there is no such process, or it may not be read.
    """
    root = psutil.Process(process)
    total = 0
    for each in (root, *root.children(recursive=True)):
        try:
            used = each.memory_full_info()
        except psutil.NoSuchProcess:
            if each is root:
                raise
            continue  # it ended meanwhile
        # The proportional share is known on Linux only.
        total += getattr(used, "pss", 0) or used.rss
    return total


def listener(address: str) -> int | None:
    """The process on this machine that listens at ``host:port``; None if none is found."""
    port = int(address.rpartition(":")[2])
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection.pid
    return None
