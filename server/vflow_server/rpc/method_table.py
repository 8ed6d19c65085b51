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
        self._found_in: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add the methods that ``handlers`` find."""
        self._found_in.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Does nothing: the generated functions offer the same methods in the other way, too."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call; None if there is no such method."""
        method = str(handler_call_details.method)
        handler = self._handlers.get(method)
        if handler is None:
            found = (each.service(handler_call_details) for each in self._found_in)
            handler = next((each for each in found if each is not None), None)
            if handler is not None:  # or the table would grow with the methods that callers think up
                for layer in reversed(self._layers):
                    handler = layer.around(method, handler)
                self._handlers[method] = handler
        return handler
