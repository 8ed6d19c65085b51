"""Strategies swapped while conversations are held: no turn fails, and no session mixes two of them."""

from concurrent.futures import ThreadPoolExecutor

from tests.server.drawing import png
from tests.server.served import Served

STRATEGIES = ("full", "preset-50", "preset-25", "preset-10")


def converse(served: Served, number: int) -> tuple[str, set[str], list[str]]:
    """One conversation: the strategy of its session, those of all its receipts, and its answers."""
    with served.client.session() as session:
        given = session.state().strategy
        receipts = {session.add_image(png(60, 70, seed=number)).strategy}
        texts = []
        for turn in range(3):
            picture = [png(50, 50, seed=number + turn)] if turn == 1 else []
            answer = session.ask(f"Question {turn}", images=picture, max_new_tokens=6)
            texts.append(answer.read())
            receipts |= {answer.receipt.strategy, *(image.strategy for image in answer.images)}
        return given, receipts, texts


def test_no_session_mixes_strategies_and_no_turn_fails(served: Served) -> None:
    with ThreadPoolExecutor(5) as threads:
        held = [threads.submit(converse, served, number % 3) for number in range(24)]
        swaps = 0
        while not all(each.done() for each in held):
            if swaps % 3 == 2:
                served.client.strategies.rollback()
            else:
                served.client.strategies.activate(STRATEGIES[swaps % len(STRATEGIES)])
            swaps += 1
        conversations = [each.result() for each in held]
    used = {given for given, _, _ in conversations}
    assert swaps > 10 and len(used) > 1, "nothing was swapped under them: the test proves nothing"
    assert all(receipts == {given} for given, receipts, _ in conversations)
    # The same conversation under the same strategy has the same answers, whatever was active meanwhile.
    answers: dict[tuple[str, int], list[str]] = {}
    for number, (given, _, texts) in enumerate(conversations):
        assert answers.setdefault((given, number % 3), texts) == texts
