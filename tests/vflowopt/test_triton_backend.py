"""The whole runtime on the Triton backend answers like the runtime on stock attention; interpreted without a GPU."""

from pathlib import Path

import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from tests.vflowopt.interpreter import repaired_interpreter  # noqa: F401
from vflowopt.compression.strategy import Strategy
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.offload import offload, restore

TENTH = Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about infinities that are meant


def converse(runtime: Runtime) -> list[object]:
    """Two conversations of unequal strategies: chunks beside decodes, a fork, an offload, and a batch of decodes."""
    chats = [Chat(runtime, TENTH), Chat(runtime, Strategy((0, 2), (0.8, 0.4)))]
    answers: list[object] = [chat.ask([picture(56, 60, seed), "what?"], 3) for seed, chat in enumerate(chats)]
    one, other = (chat.sequence for chat in chats)
    fork = one.fork()
    restore(other, offload(other))
    other.log.extend(range(40, 60))  # prefilled in chunks of seven, while the others decode
    while other.num_cached_items < len(other.log):
        for each in (one, fork):
            each.log.append(50)
        logits = runtime.advance([one, other, fork], [None, 7, None])
        answers.append([None if row is None else int(row.argmax()) for row in logits])
    answers.append(runtime.decode([fork, other, one], [1, 2, 3]).argmax(-1).tolist())
    for sequence in (one, other, fork):
        sequence.release()
    runtime.pool.check_integrity([])
    return [*answers, *chats[0].logits, *chats[1].logits]


@pytest.mark.parametrize("kv_dtype", [None, "fp8_e4m3"])
def test_the_backend_changes_no_answer(plain_folder: Path, kv_dtype: str | None) -> None:
    stock, ours = (
        converse(Runtime.load(plain_folder, kv_budget=8 << 20, kv_dtype=kv_dtype, attention=name))
        for name in ("sdpa", "triton")
    )
    for expected, answer in zip(stock, ours, strict=True):
        if isinstance(expected, torch.Tensor):
            # Stored as fp8, a number on the edge between two of its neighbours may fall to the other side.
            torch.testing.assert_close(answer, expected, atol=1e-4 if kv_dtype is None else 2e-2, rtol=0)
        else:
            assert answer == expected
