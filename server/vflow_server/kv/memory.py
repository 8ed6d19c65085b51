"""How much memory there is to have."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that a process can still get on ``device``: on the host within its container's limit, if it has one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min([_host_memory(), *_left_in_container(_CGROUP)])


def _host_memory() -> int:
    """What the system could give without swapping; where it does not tell, half of all there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_container(cgroup: Path) -> list[int]:
    """What is left of a limit on memory (cgroup v2), if there is one; cached files give way and do not count."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [max(int(limit) - used + int(counts.get("inactive_file", 0)), 0)]
