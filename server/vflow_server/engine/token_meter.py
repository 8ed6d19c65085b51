"""The token meter: how many tokens the model ran for each tenant, counted as they are run."""

from __future__ import annotations


class TokenMeter:
    """Counts the tokens of the tenants that are watched.

    Tokens are counted in the engine's thread, whatever becomes of the work that they were run for. The other methods
    belong to the event loop's thread.
    """

    def __init__(self) -> None:
        self._run: dict[str, int] = {}

    def watch(self, tenant: str) -> None:
        """Begin to count the tokens of ``tenant``, unless they are counted already."""
        self._run.setdefault(tenant, 0)

    def forget(self, tenant: str) -> None:
        """Stop counting the tokens of ``tenant``."""
        self._run.pop(tenant, None)

    def add(self, tenant: str, tokens: int) -> None:
        """Count ``tokens`` that were run for ``tenant``, if it is watched."""
        # Only this thread changes a count, and a tenant with running work is not forgotten: no lock is needed.
        if tenant in self._run:
            self._run[tenant] += tokens

    def total(self, tenant: str) -> int:
        """Number of tokens that were run for ``tenant`` since it is watched; 0 if it is not."""
        return self._run.get(tenant, 0)
