"""A real process that is killed in the middle of a search, and what the next service finds."""

from pathlib import Path

import psutil
import pytest

from tests.server.calibrating import samples
from tests.server.conftest import Serve
from tests.server.test_process import Process
from tests.server.waiting import until
from vflow_client import OperationInterrupted, RetryPolicy, connect


def test_a_search_that_was_killed_has_failed_and_what_was_there_is_intact(
    serve: Serve, model_folder: Path, tmp_path: Path
) -> None:
    flags = ("--model", str(model_folder), "--kv-budget", "32MiB", "--data", str(tmp_path))
    killed = Process(*flags)
    try:
        with connect(killed.address, timeout=60, retry=RetryPolicy(attempts=1)) as client:
            ended = client.strategies.retune(0.3, samples(1), trials=1, strategy_id="found")
            found = ended.result(timeout=60)
            client.strategies.activate("found")
            search = client.strategies.retune(0.2, samples(2), trials=1000)
            # Its proposals are made by a process of their own, which must end with it.
            children = psutil.Process(killed.popen.pid).children
            until(lambda: len(search.refresh().tried) >= 1 and bool(children(recursive=True)), seconds=60)
            proposers = children(recursive=True)
    finally:
        killed.popen.kill()
        killed.popen.communicate()
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in proposers), 60)

    client = serve(data=str(tmp_path)).client
    lost = client.strategies.operation(search.name)
    with pytest.raises(OperationInterrupted, match="anew"):
        lost.result()
    assert client.strategies.operation(ended.name).result() == found
    now = client.strategies.get("found")
    assert now.active and now.provenance == found.provenance
    assert client.strategies.rollback().name == found.provenance.base
