"""Recording: a dialogue's past, written down before anybody hears of it, and read back when it is needed.

Both wait for the disk as a need of the work, so that the engine goes on with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Wait
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_state import SessionState
from vflow_server.store.replays import Answer
from vflow_server.store.session_record import Entry, SessionRecord
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Item


def write_down(state: SessionState, entry: Entry, answer: Answer | None = None) -> Steps[None]:
    """Have what was said on the disk, if ``state`` has a record.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Raises:
        ServiceError: it cannot be written.
    """
    if state.record is None:
        return
    writing = state.record.write(replace(entry, items=_on_host(entry.items)), answer)
    try:
        yield Wait(writing)
    except GeneratorExit:
        if not writing.cancel():
            state.record.take_back()
        raise
    writing.result()
    state.record.commit()


def write_fork(origin: SessionRecord | None, twin: SessionRecord | None) -> Steps[None]:
    """Have the record of ``twin`` begin with all that is in the one of ``origin``, if they have records.

    Raises:
        ServiceError: it cannot be written.
    """
    if origin is not None and twin is not None:
        writing = twin.fork(origin)
        yield Wait(writing)
        writing.result()


def recall(bench: Workbench, state: SessionState) -> Steps[None]:
    """Have the log of ``state`` in memory, which may be of an earlier process.

    Raises:
        ServiceError: it cannot be read, or its pictures do not fit in memory.
    """
    if state.recalled or state.record is None:
        return
    reading = state.record.read()
    yield Wait(reading)
    entries = [replace(entry, items=_adopted(bench, state, entry.items)) for entry in reading.result()]
    bench.kv.check_room(state.sequence(bench.runtime), [item for entry in entries for item in entry.items])
    state.recall(bench.runtime, entries)


def _on_host(items: Sequence[Item]) -> tuple[Item, ...]:
    """The same items for another thread, which must start nothing on a device."""
    return tuple(
        replace(item, embeddings=item.embeddings.cpu())
        if isinstance(item, CompressedImage) and item.embeddings.device.type != "cpu"
        else item
        for item in items
    )


def _adopted(bench: Workbench, state: SessionState, items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(
        bench.adopt(item, state.strategy, state.tenant) if isinstance(item, CompressedImage) else item for item in items
    )
