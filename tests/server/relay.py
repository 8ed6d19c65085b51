"""A relay to a service that can fall silent or break, like the connection of a client whose machine dies."""

import socket
import struct
import threading
from contextlib import suppress


class Relay:
    """Carries the bytes of one connection to the service and back.

    Args:
        address: of the service, host:port.

    Attributes:
        address: where the client is to connect.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._service = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def fall_silent(self) -> None:
        """Carry no more bytes, and close neither end."""
        self._open.clear()

    def cut(self) -> None:
        """Reset both connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):  # it has ended already
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads
        self._open.set()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):  # cut before a client connected
            client, _ = self._listener.accept()
            service = socket.create_connection(self._service)
            self._ends += [client, service]
            for source, sink in ((client, service), (service, client)):
                self._threads.append(threading.Thread(target=self._carry, args=(source, sink)))
                self._threads[-1].start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # the other end is gone
            while data := source.recv(65536):
                self._open.wait()
                sink.sendall(data)
