"""Long-running operations: the searches that were started, and their results.

They survive a restart: an operation that was running when the process ended has failed afterwards. Belongs to the event
loop's thread, except for writing the file.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import structlog
from google.longrunning import operations_pb2
from google.protobuf import json_format
from google.rpc import status_pb2

from vflow_client.v1 import strategies_pb2
from vflow_server.rpc.errors import operation_interrupted, operation_not_found, storage_failed
from vflow_server.store.files import WrittenByNewerRelease, check_schema, replace_file, set_aside

Metadata = strategies_pb2.RetuneMetadata

MOST_ENDED = 100
"""Number of ended operations that are remembered; beyond it the tenant that has the most loses its oldest."""

_SCHEMA = 1

log = structlog.get_logger(__name__)


class Operation:
    """One search.

    Args:
        name: its resource name.
        number: position in the order in which operations were started.
        tenant: the tenant that it belongs to.
        metadata: its progress; the code that runs the search updates it.
        cancel: asks the search to end.

    Attributes:
        ended: set when it has ended.
        deleted: whether it is forgotten as soon as it has ended.
    """

    def __init__(
        self,
        name: str,
        number: int,
        tenant: str,
        metadata: Metadata,
        cancel: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.number = number
        self.tenant = tenant
        self.metadata = metadata
        self.cancel = cancel
        self.ended = asyncio.Event()
        self.deleted = False
        self._outcome: strategies_pb2.RetuneResponse | status_pb2.Status | None = None

    def end(self, outcome: strategies_pb2.RetuneResponse | status_pb2.Status) -> None:
        """Mark the operation as ended, with a result or an error."""
        self.metadata.phase = Metadata.ENDED
        self.metadata.ClearField("remaining")
        self.metadata.end_time.GetCurrentTime()
        self._outcome = outcome
        self.ended.set()

    def message(self) -> operations_pb2.Operation:
        """The present state as the contract's message."""
        message = operations_pb2.Operation(name=self.name, done=self.ended.is_set())
        message.metadata.Pack(self.metadata)
        if isinstance(self._outcome, status_pb2.Status):
            message.error.CopyFrom(self._outcome)
        elif self._outcome is not None:
            message.response.Pack(self._outcome)
        return message

    @classmethod
    def from_message(cls, message: operations_pb2.Operation, number: int, tenant: str) -> Operation:
        """The operation that ``message`` describes. One that was running has failed (OPERATION_INTERRUPTED)."""
        metadata = Metadata()
        message.metadata.Unpack(metadata)
        operation = cls(message.name, number, tenant, metadata)
        if not message.done:
            operation.end(operation_interrupted(message.name).status())
            return operation
        response = strategies_pb2.RetuneResponse()
        message.response.Unpack(response)
        operation._outcome = message.error if message.HasField("error") else response
        operation.ended.set()
        return operation


class OperationStore:
    """The operations that are known.

    Args:
        file: stores them; None: they are in memory only.
        check: called before the file is written; raises OSError if its folder is not the one that it was read from.

    Raises:
        WrittenByNewerRelease: a newer release wrote the file, which stays unchanged.
    """

    def __init__(self, file: Path | None = None, check: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._check = check
        self._writing = asyncio.Lock()
        self._operations: dict[str, Operation] = {}
        self._numbers = count()
        if file is not None and file.exists():
            self._load(file)

    def of(self, tenant: str) -> Iterator[Operation]:
        """The operations of ``tenant``, oldest first."""
        return (operation for operation in self._operations.values() if operation.tenant == tenant)

    def get(self, tenant: str, name: str) -> Operation:
        """The operation ``name`` of ``tenant``.

        Raises:
            NotFound: OPERATION_NOT_FOUND, also for an operation of another tenant.
        """
        operation = self._operations.get(name)
        if operation is None or operation.tenant != tenant:
            raise operation_not_found(name)
        return operation

    def begin(self, tenant: str, metadata: Metadata, cancel: Callable[[], None]) -> Operation:
        """Create an operation of ``tenant``. Do not return its name to a caller before :meth:`write` has returned."""
        name = f"operations/r{secrets.token_hex(8)}"
        operation = Operation(name, next(self._numbers), tenant, metadata, cancel)
        self._operations[name] = operation
        return operation

    async def end(self, operation: Operation, outcome: strategies_pb2.RetuneResponse | status_pb2.Status) -> None:
        """End ``operation`` with a result or an error.

        Raises:
            ServiceError: STORAGE_FAILED; the operation has ended all the same.
        """
        operation.end(outcome)
        if operation.deleted:
            del self._operations[operation.name]
        ended = [each for each in self._operations.values() if each.ended.is_set()]
        while len(ended) > MOST_ENDED:
            (tenant, _), *_ = Counter(each.tenant for each in ended).most_common(1)
            oldest = next(each for each in ended if each.tenant == tenant)
            ended.remove(oldest)
            del self._operations[oldest.name]
        await self.write()

    async def delete(self, operation: Operation) -> None:
        """Forget ``operation``. One that is running continues, and is forgotten when it has ended.

        Raises:
            ServiceError: STORAGE_FAILED.
        """
        operation.deleted = True
        if operation.ended.is_set() and self._operations.pop(operation.name, None) is not None:
            await self.write()

    async def write(self) -> None:
        """Write the present state of all operations to the file.

        Raises:
            ServiceError: STORAGE_FAILED.
        """
        if self._file is not None:
            await asyncio.shield(self._write_to(self._file))  # a cancelled caller must not let two writes overlap

    def _load(self, file: Path) -> None:
        operations: dict[str, Operation] = {}
        try:
            document = json.loads(file.read_text())
            check_schema(file, document["schema"], _SCHEMA)
            for entry in document["operations"]:
                message = json_format.ParseDict(entry["operation"], operations_pb2.Operation())
                operation = Operation.from_message(message, next(self._numbers), str(entry["tenant"]))
                if not message.done:
                    log.warning("an operation was interrupted by the end of the service", operation=message.name)
                operations[message.name] = operation
        except WrittenByNewerRelease:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, json_format.ParseError) as error:
            set_aside(file, because=error)
            return
        self._operations = operations

    async def _write_to(self, file: Path) -> None:
        async with self._writing:
            document: dict[str, Any] = {
                "schema": _SCHEMA,
                "operations": [
                    {"tenant": each.tenant, "operation": json_format.MessageToDict(each.message())}
                    for each in self._operations.values()
                    if not (each.deleted and each.ended.is_set())
                ],
            }
            try:
                self._check()
                await asyncio.to_thread(replace_file, file, json.dumps(document, indent=1))
            except OSError as error:
                raise storage_failed(error) from error
