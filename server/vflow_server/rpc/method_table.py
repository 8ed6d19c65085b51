"""The methods of a listener, each with what surrounds it, put together once and not again for every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grpc


class Layer(Protocol):
    """Something that surrounds methods."""

    def around(self, method: str, handler: Any) -> Any:
        """The handler of ``method`` (``/package.Service/Method``) with this around it."""
        ...


class MethodTable(grpc.GenericRpcHandler):
    """Finds the handler of a method. The generated ``add_..._to_server`` functions take it for a server.

    gRPC's interceptors would wrap the handler anew for every call. And its server waits for the next call of each
    method that it knows of with a future of its own, and looks at all of these futures whenever a call comes.

    Args:
        layers: what surrounds each method, the outermost first.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the methods of a service."""
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            for layer in reversed(self._layers):
                handler = layer.around(method, handler)
            self._handlers[method] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Does nothing: the generated functions offer the same methods in both ways."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call; None if there is no such method."""
        return self._handlers.get(handler_call_details.method)
