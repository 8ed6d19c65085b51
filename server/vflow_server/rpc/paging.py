"""Pages of a list: their sizes, and tokens that say where the next page begins.

A token is opaque to clients. It is a cursor with a keyed checksum, so that a list accepts only tokens that it returned
itself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

from vflow_server.rpc.errors import InvalidRequest

DEFAULT_PAGE, LARGEST_PAGE = 50, 1000

T = TypeVar("T")

_CHECK_BYTES = 8


class Pager:
    """The pages of one list, whose entries have ascending cursors."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def page(
        self, entries: Iterable[T], cursor: Callable[[T], int], page_size: int, page_token: str
    ) -> tuple[list[T], str]:
        """One page of ``entries``, and the token of the next page, empty if there is none.

        Args:
            entries: all entries, by ascending cursor.
            cursor: returns the cursor of an entry, 0 or more.
            page_size: entries of the page at most; 0: the default.
            page_token: the token of the page; empty: the first page.

        Raises:
            InvalidRequest: OPTION_OUT_OF_RANGE for a negative size, PAGE_TOKEN_INVALID for a foreign token.
        """
        if page_size < 0:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                "page_size",
                f"page_size is {page_size}; give 1 to {LARGEST_PAGE}, or 0 for {DEFAULT_PAGE}",
                metadata={"value": page_size, "min": 0, "max": LARGEST_PAGE},
            )
        size = min(page_size or DEFAULT_PAGE, LARGEST_PAGE)
        after = self._read(page_token) if page_token else -1
        found = list(islice((entry for entry in entries if cursor(entry) > after), size + 1))
        more = len(found) > size
        return found[:size], self._token(cursor(found[size - 1])) if more else ""

    def _token(self, after: int) -> str:
        cursor = after.to_bytes(8, "big")
        return base64.urlsafe_b64encode(cursor + self._check(cursor)).decode()

    def _read(self, token: str) -> int:
        try:
            raw = base64.b64decode(token, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        cursor, check = raw[:8], raw[8:]
        if not secrets.compare_digest(check, self._check(cursor)):
            raise InvalidRequest(
                "PAGE_TOKEN_INVALID",
                "page_token",
                "page_token is not one that this listing gave out; begin again without one",
                metadata={"page_token": token[:80]},
            )
        return int.from_bytes(cursor, "big")

    def _check(self, cursor: bytes) -> bytes:
        return hashlib.blake2b(cursor, key=self._key, digest_size=_CHECK_BYTES).digest()
