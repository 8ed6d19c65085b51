"""A conversation that needs the whole pool gets it, and one that needs a page more is refused at once."""

from pathlib import Path

import pytest

from tests.server.conftest import Serve
from vflow_client import CapacityExhausted
from vflowopt.runtime.model_runner import Runtime

TEXT = "What is the answer to this?"


def test_the_last_page_can_be_had(serve: Serve, runtime: Runtime, model_folder: Path) -> None:
    with serve().client.session("full") as session:
        answer = session.ask(TEXT, max_new_tokens=1)
        expected = answer.read()
    pool = runtime.pool
    pages = -(-answer.usage.prompt_tokens // pool.page_size) * runtime.layers
    exact, short = (Runtime.load(model_folder, kv_budget=count * pool.page_bytes) for count in (pages, pages - 1))
    for tight in (exact, short):
        tight.chat.stop_ids = frozenset()
    with serve(runtime=exact).client.session("full") as session:
        assert session.ask(TEXT, max_new_tokens=1).read() == expected
        assert session.state().kv_bytes == exact.pool.bytes_total
    with serve(runtime=short).client.session("full") as session:
        with pytest.raises(CapacityExhausted) as refused:
            session.ask(TEXT, max_new_tokens=1).read()
        needed, budget = (int(refused.value.metadata[key]) for key in ("kv_bytes_needed", "kv_budget"))
        assert needed == budget + pool.page_bytes
