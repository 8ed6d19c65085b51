"""The memory that decoded pictures may take: of running requests, of live samples, and those that are held."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vflow_server.rpc.errors import CapacityExhausted

_LITTLE = 16
"""A tenant that uses less than this part of the bound may exceed it, ..."""
_BEYOND = 4
"""... by this part of it in all. So large pictures of some tenants do not keep out the small ones of others."""


class DecodedMemory:
    """Counts the bytes of all pixels that are referenced anywhere, and of those that are about to be. For any thread.

    Args:
        most: bytes that there may be.
        unused: bytes of a tenant's pixels that no request uses; they do not count against it.
    """

    def __init__(self, most: int, unused: Callable[[str], int]) -> None:
        self._most = most
        self._unused = unused
        self._bytes: Counter[str] = Counter()
        # A finalizer may run within any allocation, so also while this thread has the lock.
        self._lock = threading.RLock()

    @property
    def total(self) -> int:
        """Bytes that are counted."""
        with self._lock:
            return self._bytes.total()

    def reserve(self, tenant: str, nbytes: int) -> None:
        """Count ``nbytes`` more for ``tenant``, until they are given back.

        Raises:
            CapacityExhausted: there may not be that many. None was counted.
        """
        with self._lock:
            total = self._bytes.total()
            if total + nbytes > self._most:
                used = self._bytes[tenant] - self._unused(tenant) + nbytes
                if used > self._most // _LITTLE or total + nbytes > self._most + self._most // _BEYOND:
                    raise CapacityExhausted(
                        "picture_decoding",
                        f"the pictures of the requests under way take the {self._most} bytes that they may; retry when "
                        "some have ended",
                        metadata={"max_bytes": self._most},
                    )
            self._change(tenant, nbytes)

    def give_back(self, tenant: str, nbytes: int) -> None:
        """Count ``nbytes`` less."""
        self._change(tenant, -nbytes)

    def count(self, tenant: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Count ``pixels`` until they are garbage-collected."""
        self._change(tenant, pixels.nbytes)
        weakref.finalize(pixels, self._change, tenant, -pixels.nbytes).atexit = False

    def _change(self, tenant: str, nbytes: int) -> None:
        with self._lock:
            self._bytes[tenant] += nbytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]
