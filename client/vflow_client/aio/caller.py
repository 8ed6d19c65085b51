"""Making asyncio calls: tenant, timeout, retries and typed errors in one place."""

import asyncio
from functools import partial
from typing import Any

import grpc

from vflow_client.errors import error_from_call
from vflow_client.identity import identity_metadata
from vflow_client.peer import Peer
from vflow_client.retry import Attempts, RetryPolicy


class AsyncCaller:
    """Makes calls under one default timeout (seconds; None: no limit) and one retry policy, for one caller."""

    def __init__(
        self,
        timeout: float | None,
        retry: RetryPolicy,
        *,
        token: str | None = None,
        tenant: str | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._timeout = timeout
        self._retry = retry
        self._metadata = identity_metadata(token, tenant)
        self._peer = peer or Peer()

    def attempts(self, timeout: float | None, *, repeatable: bool) -> Attempts:
        """Counts the attempts of one call; `timeout` in seconds, None: the default."""
        return Attempts(self._retry, self._timeout if timeout is None else timeout, repeatable, self._peer)

    def streaming(self, method: Any) -> Any:
        """A streaming method, bound to token and tenant; the caller retries it."""
        return partial(method, metadata=self._metadata)

    async def unary(self, method: Any, request: Any, timeout: float | None, *, repeatable: bool) -> Any:
        """Calls a unary method and returns its response.

        `repeatable`: the call may be sent again even if an earlier attempt may have been carried out.

        Raises:
            VFlowError: the call failed for good.
        """
        attempts = self.attempts(timeout, repeatable=repeatable)
        while True:
            try:
                return await method(request, timeout=attempts.remaining(), metadata=self._metadata)
            except grpc.RpcError as failure:
                error = error_from_call(failure)
                delay = attempts.delay_after(error)
                if delay is None:
                    raise error from failure
            await asyncio.sleep(delay)
