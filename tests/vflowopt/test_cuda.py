"""What runs on the CPU runs on a GPU: the same answers, whatever is done to the cache between them."""

from pathlib import Path

import pytest
import torch

from tests.vflowopt.talk import Talk, picture
from vflowopt.parking import park, unpark
from vflowopt.runtime import Runtime
from vflowopt.strategy import Strategy

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
TENTH = Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0)


def converse(runtime: Runtime, strategy: Strategy) -> Talk:
    """Two turns in one cache, a fork and a parking between them."""
    talk = Talk(runtime, strategy)
    talk.ask([picture(100, 60, 1), "what?"], 6)
    fork = talk.conversation.fork()
    runtime.extend(fork, [1, 2, 3])
    fork.release()
    unpark(talk.conversation, park(talk.conversation))
    talk.ask([picture(56, 120, 2), "and now?"], 6)
    talk.conversation.release()
    runtime.pool.check_integrity([])
    return talk


@pytest.mark.parametrize("strategy", [Strategy.full(), TENTH], ids=["full", "tenth"])
def test_the_device_changes_no_answer(plain_folder: Path, strategy: Strategy) -> None:
    here, there = (
        converse(Runtime.load(plain_folder, device=device, kv_budget=32 << 20), strategy) for device in ("cpu", DEVICE)
    )
    assert here.conversation.log[-1] == there.conversation.log[-1]
    for one, other in zip(here.logits, there.logits, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=1e-3, rtol=1e-3)


def test_half_precision_and_ragged_batches(plain_folder: Path) -> None:
    runtime = Runtime.load(plain_folder, device=DEVICE, dtype="bfloat16", kv_budget=32 << 20)
    talks = [Talk(runtime, strategy) for strategy in (TENTH, Strategy.full())]
    for talk in talks:
        talk.ask([picture(80, 80, 0), "hi"], 4)
        talk.conversation.log.append(65)
    conversations = [talk.conversation for talk in talks]
    for logits in runtime.advance(conversations, [1, None]):
        assert logits is None or logits.isfinite().all()
    for conversation in conversations:
        conversation.release()
