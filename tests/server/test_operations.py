"""Operations in their file: how many are remembered, and what a process that ended leaves."""

import asyncio
import json
from pathlib import Path

import pytest
from google.rpc import code_pb2

from vflow_client.v1.strategies_pb2 import RetuneMetadata, RetuneResponse, Strategy
from vflow_server.rpc.errors import NotFound
from vflow_server.store.files import FOLDER
from vflow_server.tuning.operations import MOST_ENDED, Operation, OperationStore


async def ended(store: OperationStore, tenant: str = "red") -> Operation:
    operation = store.begin(tenant, RetuneMetadata(budget=0.1), lambda: None)
    await store.end(operation, RetuneResponse(strategy=Strategy(name="strategies/found")))
    return operation


def test_what_ran_when_the_process_ended_has_failed_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "operations.json"
    store = OperationStore(file)

    async def use() -> tuple[Operation, Operation]:
        done = await ended(store)
        running = store.begin("red", RetuneMetadata(budget=0.2, phase=RetuneMetadata.SEARCHING), lambda: None)
        await store.write()
        return done, running

    done, running = asyncio.run(use())
    later = OperationStore(file)
    assert later.get("red", done.name).message() == done.message()
    lost = later.get("red", running.name)
    assert lost.ended.is_set() and lost.metadata.phase == RetuneMetadata.ENDED and lost.metadata.budget == 0.2
    error = lost.message().error
    assert error.code == code_pb2.ABORTED and running.name in error.message and "anew" in error.message
    assert [each.name for each in later.of("red")] == [done.name, running.name] and not list(later.of("blue"))
    with pytest.raises(NotFound):
        later.get("blue", done.name)


def test_only_so_many_are_remembered_after_their_end(tmp_path: Path) -> None:
    file = tmp_path / "operations.json"
    store = OperationStore(file)

    async def use() -> list[str]:
        store.begin("red", RetuneMetadata(), lambda: None)
        return [(await ended(store)).name for _ in range(MOST_ENDED + 3)]

    names = asyncio.run(use())
    running, *remembered = [each.name for each in store.of("red")]
    assert running not in names and remembered == names[3:]
    assert len(json.loads(file.read_text())["operations"]) == MOST_ENDED + 1


def test_many_operations_of_one_tenant_do_not_displace_those_of_another() -> None:
    store = OperationStore()

    async def use() -> str:
        quiet = await ended(store, "blue")
        for _ in range(MOST_ENDED + 3):
            await ended(store)
        return quiet.name

    assert [asyncio.run(use())] == [each.name for each in store.of("blue")]
    assert len(list(store.of("red"))) == MOST_ENDED - 1


@pytest.mark.parametrize("text", ["{", "{}", '{"schema": 0, "operations": []}', '{"schema": 1, "operations": [{}]}'])
def test_a_foreign_file_is_set_aside(tmp_path: Path, text: str) -> None:
    file = tmp_path / "operations.json"
    file.write_text(text)
    assert not list(OperationStore(file).of("red"))
    assert not file.exists() and [kept.read_text() for kept in (tmp_path / FOLDER).iterdir()] == [text]
