"""References, and how a strategy is held against them, in pieces that anyone may interrupt."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.vflowopt.generation import Chat, picture
from vflowopt.compression.pipeline import compress
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.model_runner import Runtime
from vflowopt.search.calibration import PATIENCE, Calibration, CalibrationError, Comparison, Sample
from vflowopt.search.pause import Aside, Shortage

STRATEGY = Strategy.from_budget(0.3, 6, [0.4, 0.8], threshold=1.0, alpha=0.3, grid=3.0)
NEW_TOKENS = 5


def samples() -> list[Sample]:
    sizes = [(56, 112), (112, 112), (80, 60)]
    questions = [("what?", "and where?", "why"), ("how many are there",), ("a", "bc")]
    return [
        Sample(Picture.from_pixels(picture(*size, seed)), asked)
        for seed, (size, asked) in enumerate(zip(sizes, questions, strict=True))
    ]


def finish(steps: Iterator[Any], between: Callable[[Any], None] = lambda pause: None) -> Any:
    """Run a generator to its end; returns what it returns."""
    while True:
        try:
            pause = next(steps)
        except StopIteration as end:
            return end.value
        between(pause)


def prepared(runtime: Runtime, **options: int) -> Calibration:
    calibration = Calibration(runtime, samples(), **{"new_tokens": NEW_TOKENS, **options})
    finish(calibration.prepare())
    assert calibration.prepared
    return calibration


def cosines(calibration: Calibration, strategy: Strategy, between: Callable[[Any], None] = lambda pause: None) -> Any:
    return np.concatenate(finish(calibration.cosines(strategy, range(len(calibration.samples))), between))


def compared(calibration: Calibration, strategy: Strategy) -> Comparison:
    *pauses, comparison = calibration.compare(strategy)
    assert isinstance(comparison, Comparison) and not any(isinstance(pause, Comparison) for pause in pauses)
    return comparison


def test_references_are_the_model_s_own_answers_turn_by_turn(runtime: Runtime) -> None:
    calibration = prepared(runtime, piece=40)
    for sample, reference in zip(calibration.samples, calibration.references, strict=True):
        chat = Chat(runtime, Strategy.full())
        for turn, question in enumerate(sample.questions):
            first = len(chat.logits)
            answer = chat.ask([question] if turn else [sample.picture.pixels, question], NEW_TOKENS)
            assert list(reference.answers[turn]) == answer
            logits = runtime.model.head(reference.states[turn])
            torch.testing.assert_close(logits, chat.logits[first], rtol=1e-4, atol=1e-4)
        chat.sequence.release()
    assert max(len(answer) for reference in calibration.references for answer in reference.answers) > 0


def test_one_prefill_sees_what_turn_after_turn_would(runtime: Runtime) -> None:
    calibration = prepared(runtime)
    expected = []
    for sample, reference, encoded in zip(
        calibration.samples, calibration.references, calibration.encoded, strict=True
    ):
        image = compress(encoded, STRATEGY, runtime.layers)
        sequence = runtime.start(STRATEGY)
        for turn, question in enumerate(sample.questions):
            sequence.log += runtime.chat.turn(turn, [question] if turn else [image, question])
            (state,) = runtime.states([sequence], [[len(sequence.log) - 1]])
            expected.append(float(torch.cosine_similarity(state[0], reference.states[turn], dim=0)))
            sequence.log += reference.answers[turn]
        sequence.release()
    assert cosines(calibration, STRATEGY) == pytest.approx(expected, abs=1e-5)
    assert max(expected) < 0.9999, "pruning shows"


def test_the_unpruned_model_agrees_with_itself(runtime: Runtime) -> None:
    comparison = compared(prepared(runtime), Strategy.full())
    assert comparison.objective == pytest.approx(1.0, abs=1e-5) and comparison.agreement == 1.0
    assert comparison.visual_tokens == comparison.visual_tokens_full
    assert comparison.kv_bytes == comparison.kv_bytes_full


@pytest.mark.parametrize("budget", [0.9, 0.3])
def test_a_comparison_counts_what_really_happens(runtime: Runtime, budget: float) -> None:
    strategy = Strategy.from_budget(budget, runtime.layers, [min(1.0, 1.1 * budget), 1.0])
    calibration = prepared(runtime)
    agrees, kept = [], []
    for sample, reference in zip(calibration.samples, calibration.references, strict=True):
        chat = Chat(runtime, strategy)
        for turn, question in enumerate(sample.questions):
            before = len(chat.sequence.log)
            answer = chat.ask([question] if turn else [sample.picture.pixels, question], NEW_TOKENS)
            agrees.append(answer == list(reference.answers[turn]))
            # The reference's answer takes the place of its own.
            prompt = runtime.chat.turn(turn, [question]) if turn else chat.sequence.log[: -len(answer) or None]
            chat.sequence.truncate(before + len(prompt))
            chat.sequence.log += reference.answers[turn]
        (image,) = runtime.compress([sample.picture], strategy)
        kept.append(
            sum(len(each) * span for each, span in zip(image.kept, strategy.spans(runtime.layers), strict=True))
        )
        chat.sequence.release()
    comparison = compared(calibration, strategy)
    assert comparison.agreement == pytest.approx(np.mean(agrees))
    assert comparison.visual_tokens == pytest.approx(np.mean(kept) / runtime.layers)
    assert comparison.kv_bytes == pytest.approx(np.mean(kept) * runtime.bytes_per_token())
    assert comparison.visual_tokens <= budget * comparison.visual_tokens_full
    assert comparison.objective == pytest.approx(cosines(calibration, strategy).mean())


def test_pieces_of_any_size_come_to_the_same(runtime: Runtime) -> None:
    few, many = prepared(runtime, piece=4096), prepared(runtime, piece=7)
    for one, other in zip(few.references, many.references, strict=True):
        assert one.answers == other.answers
        torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=1e-4)
    assert cosines(few, STRATEGY) == pytest.approx(cosines(many, STRATEGY), abs=1e-5)


def test_conversations_may_be_released_between_any_two_pieces(runtime: Runtime) -> None:
    every = 7  # more pieces than a sequence has: what is never left alone so long never gets done
    undisturbed = prepared(runtime, piece=32)
    expected = cosines(undisturbed, STRATEGY)
    for offset in range(every):
        disturbed = Calibration(runtime, samples(), new_tokens=NEW_TOKENS, piece=32)
        pauses = iter(range(offset, 10_000))
        taken: list[int] = []

        def release(
            _: Any, calibration: Calibration = disturbed, pauses: Iterator[int] = pauses, taken: list[int] = taken
        ) -> None:
            if next(pauses) % every == 0:
                taken += [each.kv_bytes for each in calibration.sequences]
                for sequence in calibration.sequences:
                    sequence.release()

        finish(disturbed.prepare(), release)
        assert sum(taken) > 0
        for one, other in zip(undisturbed.references, disturbed.references, strict=True):
            assert one.answers == other.answers
            torch.testing.assert_close(one.states, other.states, rtol=1e-4, atol=1e-4)
        assert cosines(disturbed, STRATEGY, release) == pytest.approx(expected, abs=1e-5)


def test_a_picture_is_encoded_once_and_may_be_encoded_elsewhere(runtime: Runtime) -> None:
    calibration = Calibration(runtime, samples(), new_tokens=NEW_TOKENS)
    asides: list[Aside] = []

    def encode(pause: Any) -> None:
        if isinstance(pause, Aside):
            pause.finish(pause.work())
            pause.work = pytest.fail  # must not be done again
            asides.append(pause)

    finish(calibration.prepare(), encode)
    assert [aside.kind for aside in asides] == ["encode"] * 3
    assert list(calibration.encoded) == [aside.run() for aside in asides]


def test_preparation_goes_on_where_it_was_closed(runtime: Runtime) -> None:
    calibration = Calibration(runtime, samples(), new_tokens=NEW_TOKENS, piece=32)
    encoded = 0
    for pieces in range(1, 200):
        steps = calibration.prepare()
        for pause, _ in zip(steps, range(pieces), strict=False):
            encoded += isinstance(pause, Aside)
        steps.close()  # type: ignore[attr-defined]
        runtime.pool.check_integrity([])
        assert not calibration.sequences
        if calibration.prepared:
            break
    whole = prepared(runtime, piece=32)
    assert [each.answers for each in calibration.references] == [each.answers for each in whole.references]


def test_no_page_is_left_wherever_reading_is_closed(runtime: Runtime) -> None:
    calibration = prepared(runtime, piece=32)
    most = len(list(calibration.compare(STRATEGY)))
    held = 0
    for pieces in range(most):
        steps = calibration.compare(STRATEGY)
        for _ in range(pieces):
            next(steps)
        held = max(held, runtime.pool.bytes_used)
        steps.close()  # type: ignore[attr-defined]
        runtime.pool.check_integrity([])
    assert held, "there was something to give back"


def test_a_shortage_is_told_and_waited_for(runtime: Runtime) -> None:
    calibration = prepared(runtime, piece=32)
    expected = cosines(calibration, STRATEGY)
    others = runtime.pool.acquire(runtime.pool.free_pages - 8)
    shortages: list[Shortage] = []

    def make_room(pause: Any) -> None:
        if isinstance(pause, Shortage):
            shortages.append(pause)
            assert not any(each.kv_bytes for each in calibration.sequences), "its own pages are given back"
            runtime.pool.release(others[: pause.pages])
            del others[: pause.pages]

    assert cosines(calibration, STRATEGY, make_room) == pytest.approx(expected, abs=1e-5)
    assert shortages and all(shortage.pages > 0 for shortage in shortages)
    runtime.pool.release(others)


@pytest.mark.parametrize("free", [4, 0])
def test_what_never_finds_room_is_given_up(runtime: Runtime, free: int) -> None:
    calibration = prepared(runtime, piece=32)
    others = runtime.pool.acquire(runtime.pool.free_pages - free)
    pauses: list[Any] = []
    with pytest.raises(PoolExhausted, match="release idle conversations"):
        cosines(calibration, STRATEGY, pauses.append)
    assert sum(isinstance(pause, Shortage) for pause in pauses) == PATIENCE - 1
    assert runtime.pool.free_pages == free and not calibration.sequences
    runtime.pool.release(others)


def test_the_digest_names_pictures_and_questions_in_order(runtime: Runtime) -> None:
    one, two, three = samples()

    def digest(*chosen: Sample) -> str:
        return Calibration(runtime, chosen).digest

    assert digest(one, two) == digest(*samples()[:2])
    others: Sequence[Sequence[Sample]] = [
        (two, one),
        (one, two, three),
        (one, Sample(two.picture, ("how many are  there",))),
        (one, Sample(three.picture, two.questions)),
        (Sample(one.picture, (" ".join(one.questions),)), two),
    ]
    assert len({digest(one, two), *(digest(*chosen) for chosen in others)}) == 1 + len(others)
    assert len(digest(one)) == 64


def test_what_cannot_be_calibrated_on_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="at least one question"):
        Sample(samples()[0].picture, ())
    with pytest.raises(CalibrationError, match="at least one sample"):
        Calibration(runtime, [])
    monkeypatch.setattr(runtime, "context", 60)
    with pytest.raises(CalibrationError, match="the model's context has 60; ask fewer or shorter questions"):
        finish(Calibration(runtime, samples()[:1]).prepare())
    assert runtime.pool.bytes_used == 0


def test_a_question_that_no_context_can_hold_is_refused_before_it_is_tokenized(runtime: Runtime) -> None:
    long = Sample(samples()[0].picture, ("\N{GRINNING FACE}" * 400_000,))
    tokenized = 0
    plain = runtime.chat.text

    def counted(text: str) -> list[int]:
        nonlocal tokenized
        tokenized += len(text)
        return plain(text)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CalibrationError, match="shorter questions"):
        patch.setattr(runtime.chat, "text", counted)
        finish(Calibration(runtime, [long]).prepare())
    assert tokenized < 100_000
