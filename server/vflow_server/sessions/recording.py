"""Recording: a dialogue's past, written down before anybody hears of it, and read back when it is needed.

Both wait for the disk as a need of the work, so that the engine goes on with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vflow_server.engine.engine import Steps
from vflow_server.engine.ops import Await
from vflow_server.engine.workbench import Workbench
from vflow_server.kv.session_log import Dialogue
from vflow_server.store.replays import Answer
from vflow_server.store.session_record import Entry, SessionRecord
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.runtime.sequence import Item


def write_down(dialogue: Dialogue, entry: Entry, answer: Answer | None = None) -> Steps[None]:
    """Have what was said on the disk, if ``dialogue`` has a record.

    Whoever closes the generator, or gets an exception from it, must roll the conversation back.

    Raises:
        ServiceError: it cannot be written.
    """
    if dialogue.record is None:
        return
    writing = dialogue.record.write(replace(entry, items=_on_host(entry.items)), answer)
    try:
        yield Await(writing)
    except GeneratorExit:
        if not writing.cancel():
            dialogue.record.take_back()
        raise
    writing.result()
    dialogue.record.commit()


def write_fork(origin: SessionRecord | None, twin: SessionRecord | None) -> Steps[None]:
    """Have the record of ``twin`` begin with all that is in the one of ``origin``, if they have records.

    Raises:
        ServiceError: it cannot be written.
    """
    if origin is not None and twin is not None:
        writing = twin.fork(origin)
        yield Await(writing)
        writing.result()


def recall(bench: Workbench, dialogue: Dialogue) -> Steps[None]:
    """Have the log of ``dialogue`` in memory, which may be of an earlier process.

    Raises:
        ServiceError: it cannot be read, or its pictures do not fit in memory.
    """
    if dialogue.recalled or dialogue.record is None:
        return
    reading = dialogue.record.read()
    yield Await(reading)
    entries = [replace(entry, items=_adopted(bench, dialogue, entry.items)) for entry in reading.result()]
    bench.residency.check_room(
        dialogue.conversation(bench.runtime), [item for entry in entries for item in entry.items]
    )
    dialogue.recall(bench.runtime, entries)


def _on_host(items: Sequence[Item]) -> tuple[Item, ...]:
    """The same items for another thread, which must start nothing on a device."""
    return tuple(
        replace(item, embeddings=item.embeddings.cpu())
        if isinstance(item, CompressedImage) and item.embeddings.device.type != "cpu"
        else item
        for item in items
    )


def _adopted(bench: Workbench, dialogue: Dialogue, items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(
        bench.adopt(item, dialogue.strategy, dialogue.tenant) if isinstance(item, CompressedImage) else item
        for item in items
    )
